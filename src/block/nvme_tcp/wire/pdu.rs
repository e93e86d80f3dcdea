//! The PDUs of NVMe/TCP (TCP 3.6.2), all fields little-endian.
//!
//! Reserved fields are sent as zeros and not looked at when they come.

use std::fmt;

use super::command::{Cqe, Sqe};
use super::digest::DIGEST;
use super::error::{ProtocolError, Violation};
use super::{array, u16_at, u32_at};

/// Bytes of the common header (TCP 3.6.2.1).
pub const COMMON_HEADER: usize = 8;
/// Bytes of an ICReq or ICResp.
pub const IC_PDU: usize = 128;
/// Bytes of a termination request's header.
pub const TERM_REQ_HEADER: usize = 24;
/// The longest termination request, its data included (TCP 3.5.1).
pub const MAX_TERM_REQ: usize = 152;
/// Bytes of a command capsule's header.
pub const CAPSULE_CMD_HEADER: usize = 72;
/// Bytes of a response capsule.
pub const CAPSULE_RESP_HEADER: usize = 24;
/// Bytes of the header of H2CData and C2HData.
pub const DATA_HEADER: usize = 24;
/// Bytes of an R2T.
pub const R2T_HEADER: usize = 24;
/// The least that a controller may give as MAXH2CDATA (TCP 3.6.2.3).
pub const MIN_MAX_H2C_DATA: u32 = 4096;
/// In-capsule data of admin and fabrics commands, in bytes (TCP 3.3.1).
pub const ADMIN_IN_CAPSULE: u32 = 8192;
/// The largest alignment of data in a PDU, and so the largest offset of it (TCP 3.3).
pub const MAX_ALIGNMENT: u32 = 128;

/// FLAGS: a header digest follows the header.
pub const FLAG_HDGST: u8 = 1 << 0;
/// FLAGS: a data digest follows the data.
pub const FLAG_DDGST: u8 = 1 << 1;
/// FLAGS of H2CData and C2HData: the last of its R2T, or of its command.
pub const FLAG_LAST_PDU: u8 = 1 << 2;
/// FLAGS of C2HData: the command succeeded, and no response capsule follows.
pub const FLAG_SUCCESS: u8 = 1 << 3;

/// PDU types (TCP 3.3, figure 10). An even one goes from host to controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PduType {
    /// Initialize Connection Request.
    ICReq = 0,
    /// Initialize Connection Response.
    ICResp = 1,
    /// Host to Controller Terminate Connection Request.
    H2CTermReq = 2,
    /// Controller to Host Terminate Connection Request.
    C2HTermReq = 3,
    /// Command Capsule.
    CapsuleCmd = 4,
    /// Response Capsule.
    CapsuleResp = 5,
    /// Host to Controller Data.
    H2CData = 6,
    /// Controller to Host Data.
    C2HData = 7,
    /// Ready to Transfer.
    R2T = 9,
}

impl PduType {
    /// The type with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0 => Self::ICReq,
            1 => Self::ICResp,
            2 => Self::H2CTermReq,
            3 => Self::C2HTermReq,
            4 => Self::CapsuleCmd,
            5 => Self::CapsuleResp,
            6 => Self::H2CData,
            7 => Self::C2HData,
            9 => Self::R2T,
            _ => return None,
        })
    }

    /// HLEN of every PDU of this type: bytes of its header, without the digest.
    pub fn header_len(self) -> u8 {
        match self {
            Self::ICReq | Self::ICResp => IC_PDU as u8,
            Self::CapsuleCmd => CAPSULE_CMD_HEADER as u8,
            _ => DATA_HEADER as u8,
        }
    }

    /// True if it goes from the controller to the host.
    pub fn from_controller(self) -> bool {
        self as u8 & 1 == 1
    }
}

impl fmt::Display for PduType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// PDU Common Header, CH (TCP 3.6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommonHeader {
    /// PDU-Type, as it came.
    pub pdu_type: u8,
    /// FLAGS.
    pub flags: u8,
    /// HLEN: bytes of the header, without its digest.
    pub hlen: u8,
    /// PDO: where the data begin, in bytes from the start of the PDU.
    pub pdo: u8,
    /// PLEN: bytes of the PDU with everything.
    pub plen: u32,
}

impl CommonHeader {
    /// As it is sent.
    pub fn encode(&self) -> [u8; COMMON_HEADER] {
        let [a, b, c, d] = self.plen.to_le_bytes();
        [self.pdu_type, self.flags, self.hlen, self.pdo, a, b, c, d]
    }

    /// From the first bytes of a PDU. What they say is not checked.
    pub fn decode(bytes: &[u8; COMMON_HEADER]) -> Self {
        let [pdu_type, flags, hlen, pdo, plen @ ..] = *bytes;
        Self {
            pdu_type,
            flags,
            hlen,
            pdo,
            plen: u32::from_le_bytes(plen),
        }
    }
}

/// What two sides agreed on, as far as the layout of PDUs depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Every PDU but the termination requests has a header digest.
    pub header_digest: bool,
    /// Every PDU with data has a data digest.
    pub data_digest: bool,
    /// Data begin at a multiple of this many bytes, 4 to 128.
    pub alignment: u32,
}

impl Agreed {
    /// Bytes of a header digest.
    pub fn header_digest_len(&self) -> usize {
        if self.header_digest { DIGEST } else { 0 }
    }

    /// Bytes of a data digest.
    pub fn data_digest_len(&self) -> usize {
        if self.data_digest { DIGEST } else { 0 }
    }

    /// Where the data of a PDU begin whose header has `header_len` bytes.
    pub fn data_offset(&self, header_len: usize) -> usize {
        (header_len + self.header_digest_len()).next_multiple_of(self.alignment.max(1) as usize)
    }
}

/// Where the parts of a PDU are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The PDU's type.
    pub pdu: PduType,
    /// Bytes of the header, and of its digest where there is one.
    pub header_len: usize,
    /// Bytes of padding behind that.
    pub padding: usize,
    /// Bytes of data.
    pub data_len: usize,
    /// Bytes of the data digest.
    pub digest_len: usize,
}

impl CommonHeader {
    /// Checks a PDU's common header against what was agreed, and says where its parts are. In the order of
    /// the fields, so that the first that is wrong is told (TCP 3.6.2.4).
    ///
    /// `from_controller` says which direction the PDU goes. `bytes` is as much of the header as there is,
    /// for the error.
    ///
    /// # Errors
    /// What is wrong; all of it is fatal to the connection.
    pub fn layout(
        &self,
        agreed: &Agreed,
        from_controller: bool,
        bytes: &[u8],
    ) -> Result<Layout, ProtocolError> {
        self.check(agreed, from_controller)
            .map_err(|violation| ProtocolError::new(violation, bytes))
    }

    fn check(&self, agreed: &Agreed, from_controller: bool) -> Result<Layout, Violation> {
        let Some(pdu) = PduType::from_number(self.pdu_type) else {
            return Err(Violation::UnknownType(self.pdu_type));
        };
        if pdu.from_controller() != from_controller {
            return Err(Violation::UnexpectedType(pdu));
        }
        let length = Violation::PduLength {
            pdu,
            plen: self.plen,
        };
        let plen = u64::from(self.plen);
        let term_req = matches!(pdu, PduType::C2HTermReq | PduType::H2CTermReq);
        if term_req {
            // Checked before all else: a termination request that is none is ignored (TCP 3.5.1).
            if plen < TERM_REQ_HEADER as u64 || plen > MAX_TERM_REQ as u64 {
                return Err(Violation::MalformedTermReq { plen: self.plen });
            }
        }
        let initial = matches!(pdu, PduType::ICReq | PduType::ICResp);
        let hdgst = if term_req || initial {
            0
        } else {
            agreed.header_digest_len()
        };
        let flags = |why| Violation::Flags {
            pdu,
            flags: self.flags,
            why,
        };
        if !term_req && !initial {
            if (self.flags & FLAG_HDGST != 0) != agreed.header_digest {
                return Err(flags("the header digest is not as agreed"));
            }
            let with_data = match pdu {
                PduType::H2CData | PduType::C2HData => true,
                PduType::CapsuleCmd => {
                    plen > (CAPSULE_CMD_HEADER + hdgst) as u64 || self.flags & FLAG_DDGST != 0
                }
                _ => false,
            };
            if with_data && (self.flags & FLAG_DDGST != 0) != agreed.data_digest {
                return Err(flags("the data digest is not as agreed"));
            }
        }
        let last = self.flags & FLAG_LAST_PDU != 0;
        if pdu == PduType::C2HData && self.flags & FLAG_SUCCESS != 0 && !last {
            return Err(flags("SUCCESS without LAST_PDU"));
        }
        let expected = pdu.header_len();
        if self.hlen != expected {
            return Err(Violation::HeaderLength {
                pdu,
                hlen: self.hlen,
                expected,
            });
        }
        let header_len = usize::from(self.hlen) + hdgst;
        let plain = Layout {
            pdu,
            header_len,
            padding: 0,
            data_len: 0,
            digest_len: 0,
        };
        match pdu {
            PduType::C2HTermReq | PduType::H2CTermReq => {
                return Ok(Layout {
                    data_len: self.plen as usize - header_len,
                    ..plain
                });
            }
            PduType::H2CData | PduType::C2HData => {}
            PduType::CapsuleCmd if plen > header_len as u64 => {}
            _ if plen == header_len as u64 => return Ok(plain),
            _ => return Err(length),
        }
        let pdo = usize::from(self.pdo);
        // More padding than the alignment needs does no harm, and is taken.
        if pdo < header_len || pdo % agreed.alignment.max(1) as usize != 0 {
            return Err(Violation::DataOffset { pdu, pdo: self.pdo });
        }
        let digest_len = agreed.data_digest_len();
        let Some(data_len) = plen.checked_sub((pdo + digest_len) as u64) else {
            return Err(length);
        };
        Ok(Layout {
            padding: pdo - header_len,
            data_len: data_len as usize,
            digest_len,
            ..plain
        })
    }
}

/// Initialize Connection Request (TCP 3.6.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ICReq {
    /// HPDA: alignment of the data that the controller sends, in units of four bytes, less one; 0 to 31.
    pub hpda: u8,
    /// The host asks for header digests.
    pub header_digest: bool,
    /// The host asks for data digests.
    pub data_digest: bool,
    /// MAXR2T: R2Ts that may be outstanding for a command, less one.
    pub max_r2t: u32,
}

fn digests(header: bool, data: bool) -> u8 {
    u8::from(header) | u8::from(data) << 1
}

fn ic_pdu(pdu: PduType, alignment: u8, digests: u8, last: u32) -> [u8; IC_PDU] {
    let mut bytes = [0; IC_PDU];
    bytes[0] = pdu as u8;
    bytes[2] = IC_PDU as u8;
    bytes[4..8].copy_from_slice(&(IC_PDU as u32).to_le_bytes());
    bytes[10] = alignment;
    bytes[11] = digests;
    bytes[12..16].copy_from_slice(&last.to_le_bytes());
    bytes
}

/// Checks what an ICReq and an ICResp have in common; gives HPDA or CPDA, DGST and the last field.
fn ic_fields(bytes: &[u8; IC_PDU], expected: PduType) -> Result<(u8, u8, u32), Violation> {
    let header = CommonHeader::decode(&array(bytes, 0));
    let none = Agreed {
        header_digest: false,
        data_digest: false,
        alignment: 4,
    };
    let pdu = header.check(&none, expected.from_controller())?.pdu;
    match pdu {
        pdu if pdu == expected => {}
        PduType::C2HTermReq => {
            let (fes, fei) = term_fields(bytes);
            return Err(Violation::Terminated { fes, fei });
        }
        _ => return Err(Violation::UnexpectedType(pdu)),
    }
    let field = |field, offset, value: u32, why| Violation::Field {
        pdu,
        field,
        offset,
        value,
        why,
    };
    let version = u16_at(bytes, 8);
    if version != 0 {
        let why = "only version 0 is known";
        return Err(field("PFV", 8, version.into(), why));
    }
    if bytes[10] > 31 {
        let name = if pdu == PduType::ICReq {
            "HPDA"
        } else {
            "CPDA"
        };
        return Err(field(name, 10, bytes[10].into(), "more than 128 bytes"));
    }
    Ok((bytes[10], bytes[11], u32_at(bytes, 12)))
}

impl ICReq {
    /// As it is sent.
    pub fn encode(&self) -> [u8; IC_PDU] {
        ic_pdu(
            PduType::ICReq,
            self.hpda,
            digests(self.header_digest, self.data_digest),
            self.max_r2t,
        )
    }

    /// From the bytes of a whole ICReq.
    ///
    /// # Errors
    /// A field that can not be so, or another PDU.
    pub fn decode(bytes: &[u8; IC_PDU]) -> Result<Self, ProtocolError> {
        let (hpda, digest, max_r2t) = ic_fields(bytes, PduType::ICReq)
            .map_err(|violation| ProtocolError::new(violation, bytes))?;
        Ok(Self {
            hpda,
            header_digest: digest & 1 != 0,
            data_digest: digest & 2 != 0,
            max_r2t,
        })
    }
}

/// Initialize Connection Response (TCP 3.6.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ICResp {
    /// CPDA: alignment of the data that the host sends, in units of four bytes, less one; 0 to 31.
    pub cpda: u8,
    /// Header digests are used.
    pub header_digest: bool,
    /// Data digests are used.
    pub data_digest: bool,
    /// MAXH2CDATA: most bytes of data in an H2CData.
    pub max_h2c_data: u32,
}

impl ICResp {
    /// As it is sent.
    pub fn encode(&self) -> [u8; IC_PDU] {
        ic_pdu(
            PduType::ICResp,
            self.cpda,
            digests(self.header_digest, self.data_digest),
            self.max_h2c_data,
        )
    }

    /// From the bytes of a whole ICResp, the answer to `request`. If they are a C2HTermReq (whose rest may
    /// be missing, then zero), the error says so.
    ///
    /// # Errors
    /// A field that can not be so, a digest that was not asked for (TCP 3.3.1.1), or another PDU. A digest
    /// that was asked for and is not given is no error here: the host may take it or leave it.
    pub fn decode(bytes: &[u8; IC_PDU], request: &ICReq) -> Result<Self, ProtocolError> {
        let error = |violation| ProtocolError::new(violation, bytes);
        let (cpda, digest, max_h2c_data) = ic_fields(bytes, PduType::ICResp).map_err(error)?;
        let field = |field, offset, value, why| {
            error(Violation::Field {
                pdu: PduType::ICResp,
                field,
                offset,
                value,
                why,
            })
        };
        if digest & 3 & !digests(request.header_digest, request.data_digest) != 0 {
            let why = "a digest that the host did not ask for";
            return Err(field("DGST", 11, digest.into(), why));
        }
        if max_h2c_data < MIN_MAX_H2C_DATA || max_h2c_data % 4 != 0 {
            let why = "not a multiple of 4 of at least 4096";
            return Err(field("MAXH2CDATA", 12, max_h2c_data, why));
        }
        Ok(Self {
            cpda,
            header_digest: digest & 1 != 0,
            data_digest: digest & 2 != 0,
            max_h2c_data,
        })
    }

    /// Alignment of the data that the host sends, in bytes.
    pub fn host_pdu_alignment(&self) -> u32 {
        (u32::from(self.cpda) + 1) * 4
    }
}

/// FES and FEI of a termination request's header.
fn term_fields(header: &[u8]) -> (u16, u32) {
    (u16_at(header, 8), u32_at(header, 10))
}

/// The header of H2CTermReq or C2HTermReq (TCP 3.6.2.4, 3.6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TermReq {
    /// FES: Fatal Error Status, as it came.
    pub fes: u16,
    /// FEI: Fatal Error Information.
    pub fei: u32,
}

impl TermReq {
    /// From the header.
    pub fn decode(header: &[u8; TERM_REQ_HEADER]) -> Self {
        let (fes, fei) = term_fields(header);
        Self { fes, fei }
    }
}

/// The header of a Command Capsule (TCP 3.6.2.6).
#[derive(Clone, Copy, Debug)]
pub struct CapsuleCmd {
    /// The submission queue entry.
    pub sqe: Sqe,
    /// Bytes of in-capsule data.
    pub data_len: u32,
}

impl CapsuleCmd {
    /// The common header of a capsule with `data_len` bytes of data in it. With no data, PDO is zero and
    /// there is no data digest.
    pub fn common_header(data_len: u32, agreed: &Agreed) -> CommonHeader {
        let hdgst = if agreed.header_digest { FLAG_HDGST } else { 0 };
        let mut header = CommonHeader {
            pdu_type: PduType::CapsuleCmd as u8,
            flags: hdgst,
            hlen: CAPSULE_CMD_HEADER as u8,
            pdo: 0,
            plen: (CAPSULE_CMD_HEADER + agreed.header_digest_len()) as u32,
        };
        if data_len > 0 {
            let offset = agreed.data_offset(CAPSULE_CMD_HEADER);
            header.flags |= if agreed.data_digest { FLAG_DDGST } else { 0 };
            header.pdo = offset as u8;
            header.plen = ((offset + agreed.data_digest_len()) as u32).saturating_add(data_len);
        }
        header
    }

    /// The header as it is sent, without its digest.
    pub fn encode(&self, agreed: &Agreed) -> [u8; CAPSULE_CMD_HEADER] {
        let mut bytes = [0; CAPSULE_CMD_HEADER];
        bytes[..COMMON_HEADER]
            .copy_from_slice(&Self::common_header(self.data_len, agreed).encode());
        bytes[COMMON_HEADER..].copy_from_slice(self.sqe.as_bytes());
        bytes
    }
}

/// The completion queue entry of a Response Capsule (TCP 3.6.2.7).
pub fn capsule_resp(header: &[u8; CAPSULE_RESP_HEADER]) -> Cqe {
    Cqe::decode(&array(header, COMMON_HEADER))
}

/// The header of H2CData or C2HData (TCP 3.6.2.8, 3.6.2.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataHeader {
    /// CCCID: the command's identifier.
    pub cccid: u16,
    /// TTAG: the R2T's transfer tag; reserved in C2HData.
    pub ttag: u16,
    /// DATAO: where in the command's data, in bytes.
    pub datao: u32,
    /// DATAL: bytes of data.
    pub datal: u32,
}

impl DataHeader {
    /// The specific part of a header.
    #[inline]
    pub fn decode(header: &[u8; DATA_HEADER]) -> Self {
        Self {
            cccid: u16::from_le_bytes([header[8], header[9]]),
            ttag: u16::from_le_bytes([header[10], header[11]]),
            datao: u32::from_le_bytes([header[12], header[13], header[14], header[15]]),
            datal: u32::from_le_bytes([header[16], header[17], header[18], header[19]]),
        }
    }

    /// An H2CData's header as it is sent, without its digest. `last` if it is the last of its R2T.
    pub fn encode_h2c(&self, last: bool, agreed: &Agreed) -> [u8; DATA_HEADER] {
        let offset = agreed.data_offset(DATA_HEADER);
        let common = CommonHeader {
            pdu_type: PduType::H2CData as u8,
            flags: digests(agreed.header_digest, agreed.data_digest)
                | if last { FLAG_LAST_PDU } else { 0 },
            hlen: DATA_HEADER as u8,
            pdo: offset as u8,
            plen: ((offset + agreed.data_digest_len()) as u32).saturating_add(self.datal),
        };
        let mut bytes = [0; DATA_HEADER];
        bytes[..8].copy_from_slice(&common.encode());
        bytes[8..10].copy_from_slice(&self.cccid.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.ttag.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.datao.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.datal.to_le_bytes());
        bytes
    }
}

/// Ready to Transfer (TCP 3.6.2.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct R2T {
    /// CCCID: the command's identifier.
    pub cccid: u16,
    /// TTAG: what the H2CData that answer it have to carry.
    pub ttag: u16,
    /// R2TO: where in the command's data, in bytes.
    pub r2to: u32,
    /// R2TL: bytes that are asked for.
    pub r2tl: u32,
}

impl R2T {
    /// The specific part of a header.
    #[inline]
    pub fn decode(header: &[u8; R2T_HEADER]) -> Self {
        let DataHeader {
            cccid,
            ttag,
            datao,
            datal,
        } = DataHeader::decode(header);
        Self {
            cccid,
            ttag,
            r2to: datao,
            r2tl: datal,
        }
    }
}
