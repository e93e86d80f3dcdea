//! Layouts of the NVMe/TCP transport specification 1.0a (PDUs, section 3.6.2) and of the base specification
//! 2.0 (submission and completion queue entries, section 3.3.3), as byte offsets.

/// PDU types (transport specification, section 3.6.2, figure 15).
pub(crate) mod pdu {
    pub const IC_REQ: u8 = 0x00;
    pub const IC_RESP: u8 = 0x01;
    pub const H2C_TERM_REQ: u8 = 0x02;
    pub const C2H_TERM_REQ: u8 = 0x03;
    pub const CAPSULE_CMD: u8 = 0x04;
    pub const CAPSULE_RESP: u8 = 0x05;
    pub const H2C_DATA: u8 = 0x06;
    pub const C2H_DATA: u8 = 0x07;
    pub const R2T: u8 = 0x09;

    /// FLAGS bits of the common header.
    pub const HDGSTF: u8 = 1 << 0;
    pub const DDGSTF: u8 = 1 << 1;
    pub const LAST: u8 = 1 << 2;
    pub const SUCCESS: u8 = 1 << 3;

    /// Bytes of a header digest and of a data digest.
    pub const DIGEST: usize = 4;
    /// Bytes of the common header.
    pub const COMMON: usize = 8;
    /// HLEN of ICReq and ICResp: the whole PDU.
    pub const IC_LEN: usize = 128;
    /// HLEN of CapsuleCmd.
    pub const CMD_HLEN: usize = 72;
    /// HLEN of CapsuleResp, R2T, H2CData, C2HData and of the termination requests.
    pub const SHORT_HLEN: usize = 24;
}

/// Fatal error status of a termination request (transport specification, section 3.6.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum FatalErrorStatus {
    /// A header field is not valid; the information is its offset.
    InvalidHeaderField = 1,
    /// The PDU was not expected now.
    SequenceError = 2,
    /// The header digest does not match; the information is the digest that was received.
    HeaderDigest = 3,
    /// Data outside the range that was asked for.
    DataOutOfRange = 4,
    /// More data (or more R2T) than the limit allows.
    LimitExceeded = 5,
    /// A parameter that is not supported; the information is its offset.
    UnsupportedParameter = 6,
}

/// Opcodes, and what else commands are told apart by.
pub(crate) mod op {
    pub const FABRICS: u8 = 0x7f;
    // Fabrics command types (base specification, section 6).
    pub const PROPERTY_SET: u8 = 0x00;
    pub const CONNECT: u8 = 0x01;
    pub const PROPERTY_GET: u8 = 0x04;
    pub const AUTH_SEND: u8 = 0x05;
    pub const AUTH_RECEIVE: u8 = 0x06;
    // Admin commands (section 5).
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0a;
    pub const ASYNC_EVENT: u8 = 0x0c;
    pub const KEEP_ALIVE: u8 = 0x18;
    // NVM commands (NVM command set specification, section 3.2) and the I/O commands of the base specification.
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const RESERVATION_REGISTER: u8 = 0x0d;
    pub const RESERVATION_REPORT: u8 = 0x0e;
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    pub const RESERVATION_RELEASE: u8 = 0x15;
}

/// A submission queue entry.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sqe(pub [u8; 64]);

impl Sqe {
    pub fn u8(&self, at: usize) -> u8 {
        self.0[at]
    }
    pub fn u16(&self, at: usize) -> u16 {
        u16_at(&self.0, at)
    }
    pub fn u32(&self, at: usize) -> u32 {
        u32_at(&self.0, at)
    }
    pub fn u64(&self, at: usize) -> u64 {
        u64_at(&self.0, at)
    }
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }
    pub fn fctype(&self) -> u8 {
        self.0[4]
    }
    pub fn cid(&self) -> u16 {
        self.u16(2)
    }
    pub fn nsid(&self) -> u32 {
        self.u32(4)
    }
    /// Command dword `n`, 10 to 15.
    pub fn cdw(&self, n: usize) -> u32 {
        self.u32(n * 4)
    }
    /// The starting LBA of Read, Write and Write Zeroes.
    pub fn slba(&self) -> u64 {
        self.u64(40)
    }
    /// The number of logical blocks of Read, Write and Write Zeroes, one-based.
    pub fn blocks(&self) -> u64 {
        u64::from(self.u16(48)) + 1
    }
    /// The SGL descriptor: type and subtype, and length in bytes.
    pub fn sgl(&self) -> (u8, u32) {
        (self.0[39], self.u32(32))
    }
}

/// SGL descriptor: data block, by offset into the capsule (base specification, section 4.1.2).
pub(crate) const SGL_IN_CAPSULE: u8 = 0x01;
/// SGL descriptor: transport data block, transport-specific subtype Ah.
pub(crate) const SGL_TRANSPORT: u8 = 0x5a;

pub(crate) fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}
pub(crate) fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}
pub(crate) fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}
pub(crate) fn put(b: &mut [u8], at: usize, bytes: &[u8]) {
    b[at..at + bytes.len()].copy_from_slice(bytes);
}
/// Puts `text` at `at`, padded with spaces to `width` (base specification, section 1.4.2).
pub(crate) fn put_text(b: &mut [u8], at: usize, width: usize, text: &str) {
    b[at..at + width].fill(b' ');
    let text = &text.as_bytes()[..text.len().min(width)];
    put(b, at, text);
}
/// Puts a NUL-terminated string.
pub(crate) fn put_nqn(b: &mut [u8], at: usize, width: usize, text: &str) {
    let text = &text.as_bytes()[..text.len().min(width - 1)];
    put(b, at, text);
}
/// The text up to the first NUL; none if there is no NUL or it is not UTF-8.
pub(crate) fn nqn_at(b: &[u8], at: usize, width: usize) -> Option<String> {
    let field = &b[at..at + width];
    let end = field.iter().position(|&c| c == 0)?;
    std::str::from_utf8(&field[..end]).ok().map(str::to_owned)
}
