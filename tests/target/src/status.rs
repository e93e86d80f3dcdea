//! Status codes (base specification, section 3.3.3.2; NVM command set specification, section 3.1).

use std::fmt;

/// The status field of a completion without the phase bit: status code in bits 7:0, status code type in
/// bits 10:8, command retry delay in bits 12:11, more in bit 13, do not retry in bit 14.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// Successful Completion.
    pub const SUCCESS: Self = Self::new(0, 0);
    /// Invalid Command Opcode.
    pub const INVALID_OPCODE: Self = Self::new(0, 0x01);
    /// Invalid Field in Command.
    pub const INVALID_FIELD: Self = Self::new(0, 0x02);
    /// Data Transfer Error.
    pub const DATA_TRANSFER_ERROR: Self = Self::new(0, 0x04);
    /// Internal Error.
    pub const INTERNAL_ERROR: Self = Self::new(0, 0x06);
    /// Command Abort Requested.
    pub const ABORT_REQUESTED: Self = Self::new(0, 0x07);
    /// Invalid Namespace or Format.
    pub const INVALID_NAMESPACE: Self = Self::new(0, 0x0b);
    /// Command Sequence Error.
    pub const COMMAND_SEQUENCE_ERROR: Self = Self::new(0, 0x0c);
    /// Data SGL Length Invalid.
    pub const DATA_SGL_LENGTH_INVALID: Self = Self::new(0, 0x0f);
    /// SGL Descriptor Type Invalid.
    pub const SGL_TYPE_INVALID: Self = Self::new(0, 0x11);
    /// SGL Offset Invalid.
    pub const SGL_OFFSET_INVALID: Self = Self::new(0, 0x16);
    /// Host Identifier Inconsistent Format.
    pub const HOST_ID_FORMAT: Self = Self::new(0, 0x18);
    /// Keep Alive Timeout Invalid.
    pub const KATO_INVALID: Self = Self::new(0, 0x1a);
    /// Namespace is Write Protected.
    pub const WRITE_PROTECTED: Self = Self::new(0, 0x20);
    /// Transient Transport Error.
    pub const TRANSIENT_TRANSPORT_ERROR: Self = Self::new(0, 0x22);
    /// LBA Out of Range.
    pub const LBA_OUT_OF_RANGE: Self = Self::new(0, 0x80);
    /// Capacity Exceeded.
    pub const CAPACITY_EXCEEDED: Self = Self::new(0, 0x81);
    /// Namespace Not Ready.
    pub const NAMESPACE_NOT_READY: Self = Self::new(0, 0x82);
    /// Reservation Conflict.
    pub const RESERVATION_CONFLICT: Self = Self::new(0, 0x83);
    /// Asynchronous Event Request Limit Exceeded.
    pub const AER_LIMIT: Self = Self::new(1, 0x05);
    /// Invalid Log Page.
    pub const INVALID_LOG_PAGE: Self = Self::new(1, 0x09);
    /// Feature Not Changeable.
    pub const FEATURE_NOT_CHANGEABLE: Self = Self::new(1, 0x0e);
    /// Connect: Incompatible Format.
    pub const CONNECT_FORMAT: Self = Self::new(1, 0x80);
    /// Connect: Controller Busy.
    pub const CONNECT_BUSY: Self = Self::new(1, 0x81);
    /// Connect Invalid Parameters.
    pub const CONNECT_INVALID_PARAMETERS: Self = Self::new(1, 0x82);
    /// Connect Restart Discovery.
    pub const CONNECT_RESTART_DISCOVERY: Self = Self::new(1, 0x83);
    /// Connect Invalid Host.
    pub const CONNECT_INVALID_HOST: Self = Self::new(1, 0x84);
    /// Authentication Required.
    pub const AUTHENTICATION_REQUIRED: Self = Self::new(1, 0x91);
    /// Attempted Write to Read Only Range.
    pub const READ_ONLY_RANGE: Self = Self::new(1, 0x82);
    /// Write Fault.
    pub const WRITE_FAULT: Self = Self::new(2, 0x80);
    /// Unrecovered Read Error.
    pub const UNRECOVERED_READ_ERROR: Self = Self::new(2, 0x81);
    /// Internal Path Error.
    pub const INTERNAL_PATH_ERROR: Self = Self::new(3, 0x00);
    /// Asymmetric Access Persistent Loss.
    pub const ANA_PERSISTENT_LOSS: Self = Self::new(3, 0x01);
    /// Asymmetric Access Inaccessible.
    pub const ANA_INACCESSIBLE: Self = Self::new(3, 0x02);
    /// Asymmetric Access Transition.
    pub const ANA_TRANSITION: Self = Self::new(3, 0x03);

    /// A status code type and a status code.
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self((sct as u16 & 7) << 8 | sc as u16)
    }
    /// The same with Do Not Retry.
    pub const fn dnr(self) -> Self {
        Self(self.0 | 1 << 14)
    }
    /// The same with a command retry delay index, 0 to 3.
    pub const fn crd(self, index: u8) -> Self {
        Self(self.0 & !(3 << 11) | (index as u16 & 3) << 11)
    }
    /// Whether the command succeeded.
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sct, sc) = (self.0 >> 8 & 7, self.0 & 0xff);
        write!(f, "Status({sct:x}/{sc:02x}")?;
        if self.0 >> 11 & 3 != 0 {
            write!(f, " crd {}", self.0 >> 11 & 3)?;
        }
        if self.0 >> 14 & 1 != 0 {
            write!(f, " dnr")?;
        }
        write!(f, ")")
    }
}
