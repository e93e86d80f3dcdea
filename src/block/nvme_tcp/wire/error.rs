//! What a controller did against the protocol, and the H2CTermReq that tells it so (TCP 3.5).

use std::fmt;
use std::ops::Deref;

use super::pdu::{PduType, TERM_REQ_HEADER};

/// Bytes of the wrong PDU's header that a termination request may carry (TCP 3.5.1).
const MAX_TERM_DATA: usize = 128;

/// Fatal Error Status, FES (TCP 3.6.2.4, 3.6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FatalErrorStatus {
    /// A field of the PDU's header that can not be so.
    InvalidPduHeaderField = 1,
    /// A PDU that can not come now.
    PduSequenceError = 2,
    /// The header's digest does not fit the header.
    HeaderDigestError = 3,
    /// Data beyond the ends of the command's buffer.
    DataTransferOutOfRange = 4,
    /// More R2Ts than the host supports; to a host: more data in a PDU than the controller supports.
    LimitExceeded = 5,
    /// A parameter that is right, and that the receiver does not support.
    UnsupportedParameter = 6,
}

impl FatalErrorStatus {
    /// The status with this number, if the specification has one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::InvalidPduHeaderField,
            2 => Self::PduSequenceError,
            3 => Self::HeaderDigestError,
            4 => Self::DataTransferOutOfRange,
            5 => Self::LimitExceeded,
            6 => Self::UnsupportedParameter,
            _ => return None,
        })
    }
}

impl fmt::Display for FatalErrorStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::InvalidPduHeaderField => "Invalid PDU Header Field",
            Self::PduSequenceError => "PDU Sequence Error",
            Self::HeaderDigestError => "Header Digest Error",
            Self::DataTransferOutOfRange => "Data Transfer Out of Range",
            Self::LimitExceeded => "R2T or Data Transfer Limit Exceeded",
            Self::UnsupportedParameter => "Unsupported Parameter",
        })
    }
}

/// What exactly was wrong. Every one of these ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A type that the specification does not have.
    #[error("PDU of unknown type {0:#04x}")]
    UnknownType(u8),
    /// A PDU that only the other side sends, or not in this phase of a connection.
    #[error("{0} where none can come")]
    UnexpectedType(PduType),
    /// A digest flag that is not as agreed, or SUCCESS without LAST_PDU.
    #[error("{pdu} with flags {flags:#04x}: {why}")]
    Flags {
        /// The PDU.
        pdu: PduType,
        /// Its FLAGS.
        flags: u8,
        /// What is wrong with them.
        why: &'static str,
    },
    /// HLEN is not what it is for this type.
    #[error("{pdu} with a header length of {hlen} bytes, not {expected}")]
    HeaderLength {
        /// The PDU.
        pdu: PduType,
        /// Its HLEN, in bytes.
        hlen: u8,
        /// What it has to be.
        expected: u8,
    },
    /// PDO is inside the header, or not aligned as agreed.
    #[error("{pdu} with data at byte {pdo}")]
    DataOffset {
        /// The PDU.
        pdu: PduType,
        /// Its PDO, in bytes.
        pdo: u8,
    },
    /// PLEN does not fit the rest of the header.
    #[error("{pdu} of {plen} bytes, which can not be")]
    PduLength {
        /// The PDU.
        pdu: PduType,
        /// Its PLEN, in bytes.
        plen: u32,
    },
    /// A field of the PDU specific header that can not be so.
    #[error("{pdu}: {field} {value:#x}: {why}")]
    Field {
        /// The PDU.
        pdu: PduType,
        /// The field's name in the specification.
        field: &'static str,
        /// Bytes from the start of the PDU.
        offset: u8,
        /// What it said.
        value: u32,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The header's digest does not fit the header.
    #[error("{pdu} with a header digest of {received:#010x}, not {computed:#010x}")]
    HeaderDigest {
        /// The PDU, if its type is to be believed.
        pdu: PduType,
        /// HDGST as it came.
        received: u32,
        /// What it should be.
        computed: u32,
    },
    /// A command identifier that no command has that is under way.
    #[error("{pdu} for command {cid:#06x}, which is not under way")]
    UnknownCommand {
        /// The PDU.
        pdu: PduType,
        /// Its command identifier.
        cid: u16,
    },
    /// A PDU that the command can not have now.
    #[error("{pdu} for command {cid:#06x}: {why}")]
    Sequence {
        /// The PDU.
        pdu: PduType,
        /// The command.
        cid: u16,
        /// What is wrong.
        why: &'static str,
    },
    /// Data, or a request for data, that does not begin where the last one ended.
    #[error("{pdu} for command {cid:#06x} at offset {offset}, not {expected}")]
    NotContiguous {
        /// The PDU.
        pdu: PduType,
        /// The command.
        cid: u16,
        /// Where it begins, in bytes.
        offset: u32,
        /// Where it had to.
        expected: u32,
    },
    /// Data, or a request for data, beyond the end of the command's.
    #[error("{pdu} for command {cid:#06x}: {length} bytes at offset {offset} of {size}")]
    OutOfRange {
        /// The PDU.
        pdu: PduType,
        /// The command.
        cid: u16,
        /// Where it begins, in bytes.
        offset: u32,
        /// Its bytes.
        length: u32,
        /// Bytes of data that the command has.
        size: u32,
    },
    /// More R2Ts for a command than we said we support.
    #[error(
        "R2T for command {cid:#06x} while {limit} are outstanding, the most that was agreed on"
    )]
    R2tLimit {
        /// The command.
        cid: u16,
        /// MAXR2T + 1.
        limit: u32,
    },
    /// The controller ended the connection with a C2HTermReq.
    #[error("the controller ended the connection: {}, information {fei:#x}", TermText(*.fes))]
    Terminated {
        /// Fatal Error Status, as it came.
        fes: u16,
        /// Fatal Error Information.
        fei: u32,
    },
    /// A C2HTermReq that can not be one: to be ignored, and the connection to be closed (TCP 3.5.1).
    #[error("the controller ended the connection with a malformed C2HTermReq of {plen} bytes")]
    MalformedTermReq {
        /// Its PLEN, in bytes.
        plen: u32,
    },
}

struct TermText(u16);

impl fmt::Display for TermText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match FatalErrorStatus::from_number(self.0) {
            Some(status) => write!(f, "{status}"),
            None => write!(f, "unknown status {:#x}", self.0),
        }
    }
}

impl Violation {
    /// What a termination request has to say of it: the status and the information that belongs to it.
    /// `None` where the other side ended the connection already: it gets no answer (TCP 3.5.1).
    pub fn fatal_error(&self) -> Option<(FatalErrorStatus, u32)> {
        use FatalErrorStatus as Fes;
        Some(match *self {
            // The offset of the field that is wrong; of several the first (TCP 3.6.2.4).
            Self::UnknownType(_) => (Fes::InvalidPduHeaderField, 0),
            Self::Flags { .. } => (Fes::InvalidPduHeaderField, 1),
            Self::HeaderLength { .. } => (Fes::InvalidPduHeaderField, 2),
            Self::DataOffset { .. } => (Fes::InvalidPduHeaderField, 3),
            Self::PduLength { .. } => (Fes::InvalidPduHeaderField, 4),
            Self::Field { offset, .. } => (Fes::InvalidPduHeaderField, u32::from(offset)),
            // CCCID, or the CID of the completion queue entry at byte 12 of it.
            Self::UnknownCommand { pdu, .. } => {
                let offset = if pdu == PduType::CapsuleResp { 20 } else { 8 };
                (Fes::InvalidPduHeaderField, offset)
            }
            Self::UnexpectedType(_) | Self::Sequence { .. } | Self::NotContiguous { .. } => {
                (Fes::PduSequenceError, 0)
            }
            Self::HeaderDigest { received, .. } => (Fes::HeaderDigestError, received),
            Self::OutOfRange { .. } => (Fes::DataTransferOutOfRange, 0),
            Self::R2tLimit { .. } => (Fes::LimitExceeded, 0),
            Self::Terminated { .. } | Self::MalformedTermReq { .. } => return None,
        })
    }
}

#[derive(Clone, Debug)]
struct Inner {
    violation: Violation,
    header: [u8; MAX_TERM_DATA],
    header_len: u8,
}

/// A fatal transport error: what was wrong, and the header of the PDU that it was found in. The connection
/// is of no use any more; [`ProtocolError::term_req`] is what is sent before it is closed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{}", .0.violation)]
pub struct ProtocolError(Box<Inner>);

impl ProtocolError {
    /// `header` is as much of the PDU's header as has come; only the first 128 bytes are kept.
    #[cold]
    pub fn new(violation: Violation, header: &[u8]) -> Self {
        let len = header.len().min(MAX_TERM_DATA);
        let mut kept = [0; MAX_TERM_DATA];
        kept[..len].copy_from_slice(&header[..len]);
        Self(Box::new(Inner {
            violation,
            header: kept,
            header_len: len as u8,
        }))
    }

    /// What was wrong.
    pub fn violation(&self) -> &Violation {
        &self.0.violation
    }

    /// The Fatal Error Status and Fatal Error Information that a termination request must carry; `None` if
    /// the controller ended the connection itself.
    pub fn fatal_error(&self) -> Option<(FatalErrorStatus, u32)> {
        self.0.violation.fatal_error()
    }

    /// The header of the PDU that was wrong, as far as it has come.
    pub fn header(&self) -> &[u8] {
        &self.0.header[..usize::from(self.0.header_len)]
    }

    /// The H2CTermReq to send before the connection is closed. Empty if none is to be sent.
    pub fn term_req(&self) -> TermReqBytes {
        let mut term = TermReqBytes {
            bytes: [0; TERM_REQ_HEADER + MAX_TERM_DATA],
            len: 0,
        };
        let Some((status, information)) = self.fatal_error() else {
            return term;
        };
        let data = self.header();
        let len = TERM_REQ_HEADER + data.len();
        term.bytes[0] = PduType::H2CTermReq as u8;
        term.bytes[2] = TERM_REQ_HEADER as u8;
        term.bytes[4..8].copy_from_slice(&(len as u32).to_le_bytes());
        term.bytes[8..10].copy_from_slice(&(status as u16).to_le_bytes());
        term.bytes[10..14].copy_from_slice(&information.to_le_bytes());
        term.bytes[TERM_REQ_HEADER..len].copy_from_slice(data);
        term.len = len as u8;
        term
    }
}

/// The bytes of an H2CTermReq, at most 152 of them.
#[derive(Clone, Copy, Debug)]
pub struct TermReqBytes {
    bytes: [u8; TERM_REQ_HEADER + MAX_TERM_DATA],
    len: u8,
}

impl Deref for TermReqBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}
