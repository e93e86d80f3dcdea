//! Submission and completion queue entries (Base 3.3.3), and a builder for every command that is sent.

pub use super::codes::*;
use super::status::Status;
use super::{u16_at, u32_at, u64_at};

/// Bytes of a submission queue entry.
pub const SQE: usize = 64;
/// Bytes of a completion queue entry.
pub const CQE: usize = 16;

/// PSDT: the command's data are described by an SGL (Base 3.3.3.1). Always so over Fabrics.
const PSDT_SGL: u8 = 1 << 6;

/// An SGL descriptor (Base 4.1.2), of the three kinds that NVMe/TCP knows (TCP 3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgl {
    /// No data.
    None,
    /// The data are in the capsule, right behind its header and padding: offset 0, since ICDOFF is zero.
    InCapsule {
        /// Bytes.
        length: u32,
    },
    /// The data are in a Command Data Buffer, and travel in H2CData or C2HData.
    Transport {
        /// Bytes.
        length: u32,
    },
}

impl Sgl {
    /// As it stands in a submission queue entry.
    #[inline]
    pub fn encode(self) -> [u8; 16] {
        // SGL Data Block (0h), offset (1h); and Transport SGL Data Block (5h), Ah.
        let (length, identifier) = match self {
            Self::None => (0, 0x5a),
            Self::InCapsule { length } => (length, 0x01),
            Self::Transport { length } => (length, 0x5a),
        };
        let mut bytes = [0; 16];
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[15] = identifier;
        bytes
    }
}

/// A number of logical blocks, 1 to 65536, as commands carry it: less one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nlb(u16);

impl Nlb {
    /// `None` for no block, and for more than a command can have.
    #[inline]
    pub fn new(blocks: u64) -> Option<Self> {
        Some(Self(u16::try_from(blocks.checked_sub(1)?).ok()?))
    }

    /// How many blocks.
    pub fn blocks(self) -> u32 {
        u32::from(self.0) + 1
    }
}

/// One range of a Dataset Management command (NVM 3.2.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DsmRange {
    /// The first logical block.
    pub slba: u64,
    /// Logical blocks.
    pub blocks: u32,
}

impl DsmRange {
    /// Bytes of a range.
    pub const BYTES: usize = 16;
    /// Ranges of a command.
    pub const MAX: usize = 256;

    /// As it stands in the command's data, with no context attributes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[4..8].copy_from_slice(&self.blocks.to_le_bytes());
        bytes[8..].copy_from_slice(&self.slba.to_le_bytes());
        bytes
    }
}

/// Reservation types (Base 8.19).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ReservationType {
    /// Write Exclusive.
    WriteExclusive = 1,
    /// Exclusive Access.
    ExclusiveAccess = 2,
    /// Write Exclusive, Registrants Only.
    WriteExclusiveRegistrantsOnly = 3,
    /// Exclusive Access, Registrants Only.
    ExclusiveAccessRegistrantsOnly = 4,
    /// Write Exclusive, All Registrants.
    WriteExclusiveAllRegistrants = 5,
    /// Exclusive Access, All Registrants.
    ExclusiveAccessAllRegistrants = 6,
}

/// What a Reservation Register does (Base 7.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RegisterAction {
    /// Register the new key.
    Register = 0,
    /// Give up the current key.
    Unregister = 1,
    /// Put the new key in place of the current one.
    Replace = 2,
}

/// What a Reservation Acquire does (Base 7.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AcquireAction {
    /// Take the reservation.
    Acquire = 0,
    /// Take it from the holder of the preempted key.
    Preempt = 1,
    /// As [`AcquireAction::Preempt`], and abort the holder's commands.
    PreemptAndAbort = 2,
}

/// What a Reservation Release does (Base 7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ReleaseAction {
    /// Give up the reservation.
    Release = 0,
    /// Remove all registrations.
    Clear = 1,
}

/// A submission queue entry (Base 3.3.3.1). The command identifier and the SGL descriptor are filled in by
/// whoever sends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Sqe([u8; SQE]);

impl Sqe {
    /// A command of an I/O queue, or an admin command, all dwords zero.
    #[inline]
    pub fn new(opcode: u8, nsid: u32) -> Self {
        let mut bytes = [0; SQE];
        bytes[0] = opcode;
        bytes[1] = PSDT_SGL;
        bytes[4..8].copy_from_slice(&nsid.to_le_bytes());
        Self(bytes).sgl(Sgl::None)
    }

    fn fabrics(fctype: u8) -> Self {
        let mut sqe = Self::new(fabrics::OPCODE, 0);
        sqe.0[4] = fctype;
        sqe
    }

    /// Command dword `n`, 10 to 15; others stay as they are.
    #[inline]
    #[must_use]
    pub fn cdw(mut self, n: usize, value: u32) -> Self {
        if (10..16).contains(&n) {
            self.0[n * 4..n * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        self
    }

    /// Command dwords `n` and `n + 1`.
    #[inline]
    fn cdw64(self, n: usize, value: u64) -> Self {
        self.cdw(n, value as u32).cdw(n + 1, (value >> 32) as u32)
    }

    /// The entry with this command identifier.
    #[inline]
    #[must_use]
    pub fn cid(mut self, cid: u16) -> Self {
        self.0[2..4].copy_from_slice(&cid.to_le_bytes());
        self
    }

    /// The entry with this SGL descriptor.
    #[inline]
    #[must_use]
    pub fn sgl(mut self, sgl: Sgl) -> Self {
        self.0[24..40].copy_from_slice(&sgl.encode());
        self
    }

    /// The entry as it is sent.
    #[inline]
    pub fn as_bytes(&self) -> &[u8; SQE] {
        &self.0
    }

    /// The opcode.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// Read (NVM 3.2.4).
    #[inline]
    pub fn read(nsid: u32, slba: u64, blocks: Nlb) -> Self {
        Self::new(nvm::READ, nsid)
            .cdw64(10, slba)
            .cdw(12, blocks.0.into())
    }

    /// Write (NVM 3.2.6). `fua`: it is durable when it ends.
    #[inline]
    pub fn write(nsid: u32, slba: u64, blocks: Nlb, fua: bool) -> Self {
        Self::new(nvm::WRITE, nsid)
            .cdw64(10, slba)
            .cdw(12, u32::from(blocks.0) | u32::from(fua) << 30)
    }

    /// Flush (Base 7.1).
    #[inline]
    pub fn flush(nsid: u32) -> Self {
        Self::new(nvm::FLUSH, nsid)
    }

    /// Write Zeroes (NVM 3.2.8). `deallocate`, DEAC: the blocks may be deallocated, where they then still
    /// read as zeros. `fua` as in [`Sqe::write`].
    #[inline]
    pub fn write_zeroes(nsid: u32, slba: u64, blocks: Nlb, deallocate: bool, fua: bool) -> Self {
        let flags = u32::from(fua) << 30 | u32::from(deallocate) << 25;
        Self::new(nvm::WRITE_ZEROES, nsid)
            .cdw64(10, slba)
            .cdw(12, u32::from(blocks.0) | flags)
    }

    /// Dataset Management that deallocates (NVM 3.2.3); the data are `ranges` encoded [`DsmRange`]s, 1 to
    /// 256 of them. `None` for another number.
    #[inline]
    pub fn deallocate(nsid: u32, ranges: usize) -> Option<Self> {
        let number = u8::try_from(ranges.checked_sub(1)?).ok()?;
        Some(
            Self::new(nvm::DATASET_MANAGEMENT, nsid)
                .cdw(10, number.into())
                .cdw(11, 1 << 2),
        )
    }

    /// Reservation Register (Base 7.3); the data are [`reservation_keys`] of the current and the new key.
    /// `ignore_existing_key`: IEKEY. Persistence through power loss stays as it is.
    pub fn reservation_register(
        nsid: u32,
        action: RegisterAction,
        ignore_existing_key: bool,
    ) -> Self {
        let iekey = u32::from(ignore_existing_key) << 3;
        Self::new(nvm::RESERVATION_REGISTER, nsid).cdw(10, action as u32 | iekey)
    }

    /// Reservation Acquire (Base 7.2); the data are [`reservation_keys`] of the current and the preempted
    /// key.
    pub fn reservation_acquire(nsid: u32, action: AcquireAction, rtype: ReservationType) -> Self {
        Self::new(nvm::RESERVATION_ACQUIRE, nsid).cdw(10, action as u32 | (rtype as u32) << 8)
    }

    /// Reservation Release (Base 7.4); the data are the current key, 8 bytes.
    pub fn reservation_release(nsid: u32, action: ReleaseAction, rtype: ReservationType) -> Self {
        Self::new(nvm::RESERVATION_RELEASE, nsid).cdw(10, action as u32 | (rtype as u32) << 8)
    }

    /// Reservation Report in the extended format (Base 7.5), `bytes` of it, a multiple of 4.
    pub fn reservation_report(nsid: u32, bytes: u32) -> Self {
        Self::new(nvm::RESERVATION_REPORT, nsid)
            .cdw(10, dwords(bytes))
            .cdw(11, 1)
    }

    /// Identify (Base 5.17); 4096 bytes come. `cns` is one of [`cns`], `csi` counts where it asks for a
    /// command set's.
    pub fn identify(cns: u8, nsid: u32, csi: u8) -> Self {
        Self::new(admin::IDENTIFY, nsid)
            .cdw(10, cns.into())
            .cdw(11, u32::from(csi) << 24)
    }

    /// Get Log Page (Base 5.16): `bytes` (a multiple of 4) from `offset` on. `retain`: the event that said
    /// to read it is not cleared (RAE). `specific` is the log specific parameter (LSP).
    pub fn get_log_page(
        lid: u8,
        nsid: u32,
        offset: u64,
        bytes: u32,
        retain: bool,
        specific: u8,
    ) -> Self {
        let number = dwords(bytes);
        Self::new(admin::GET_LOG_PAGE, nsid)
            .cdw(
                10,
                u32::from(lid)
                    | u32::from(specific & 0x7f) << 8
                    | u32::from(retain) << 15
                    | (number & 0xffff) << 16,
            )
            .cdw(11, number >> 16)
            .cdw64(12, offset)
    }

    /// Set Features (Base 5.27) with dword 11.
    pub fn set_features(feature: u8, value: u32) -> Self {
        Self::new(admin::SET_FEATURES, NO_NAMESPACE)
            .cdw(10, feature.into())
            .cdw(11, value)
    }

    /// Get Features (Base 5.15): the current value comes as the result.
    pub fn get_features(feature: u8) -> Self {
        Self::new(admin::GET_FEATURES, NO_NAMESPACE).cdw(10, feature.into())
    }

    /// Keep Alive (Base 5.18).
    pub fn keep_alive() -> Self {
        Self::new(admin::KEEP_ALIVE, NO_NAMESPACE)
    }

    /// Asynchronous Event Request (Base 5.2).
    pub fn async_event_request() -> Self {
        Self::new(admin::ASYNC_EVENT_REQUEST, NO_NAMESPACE)
    }

    /// Abort (Base 5.1) of the command `cid` on queue `sqid`. Bit 0 of the result is 0 if it was aborted.
    pub fn abort(sqid: u16, cid: u16) -> Self {
        Self::new(admin::ABORT, NO_NAMESPACE).cdw(10, u32::from(sqid) | u32::from(cid) << 16)
    }

    /// Connect (Base 6.3); the data are [`ConnectData`], in the capsule. `entries` of the submission
    /// queue, 2 to 65536 (one is always left free); `kato_ms` is the Keep Alive Timeout, for the admin
    /// queue, 0 for none. `None` for a number of entries that can not be.
    pub fn connect(qid: u16, entries: u32, attributes: u8, kato_ms: u32) -> Option<Self> {
        let sqsize = u16::try_from(entries.checked_sub(1)?).ok()?;
        if sqsize == 0 {
            return None;
        }
        // RECFMT 0 and QID; SQSIZE and CATTR; KATO.
        Some(
            Self::fabrics(fabrics::CONNECT)
                .cdw(10, u32::from(qid) << 16)
                .cdw(11, u32::from(sqsize) | u32::from(attributes) << 16)
                .cdw(12, kato_ms),
        )
    }

    /// Property Get (Base 6.4) of 4 or 8 bytes: they come as the result.
    pub fn property_get(offset: u32, eight_bytes: bool) -> Self {
        Self::fabrics(fabrics::PROPERTY_GET)
            .cdw(10, eight_bytes.into())
            .cdw(11, offset)
    }

    /// Property Set (Base 6.5) of a property of 4 bytes.
    pub fn property_set(offset: u32, value: u32) -> Self {
        Self::fabrics(fabrics::PROPERTY_SET)
            .cdw(11, offset)
            .cdw(12, value)
    }

    /// Authentication Send (Base 6.2) of `length` bytes of an NVMe authentication protocol.
    pub fn authentication_send(length: u32) -> Self {
        Self::fabrics(fabrics::AUTHENTICATION_SEND)
            .cdw(10, AUTHENTICATION)
            .cdw(11, length)
    }

    /// Authentication Receive (Base 6.1) of at most `length` bytes.
    pub fn authentication_receive(length: u32) -> Self {
        Self::fabrics(fabrics::AUTHENTICATION_RECEIVE)
            .cdw(10, AUTHENTICATION)
            .cdw(11, length)
    }

    /// Disconnect (Base 6.6) of the I/O queue that it is sent on. RECFMT is 0.
    pub fn disconnect() -> Self {
        Self::fabrics(fabrics::DISCONNECT)
    }
}

/// SPSP0 and SPSP1 1, SECP E9h: the protocol of NVMe (Base 6.2).
const AUTHENTICATION: u32 = 1 << 8 | 1 << 16 | 0xe9 << 24;

/// Connect: SQ flow control is not used (DISSQFC, Base 6.3).
pub const CATTR_DISABLE_SQ_FLOW_CONTROL: u8 = 1 << 2;

/// Number of dwords, less one.
fn dwords(bytes: u32) -> u32 {
    (bytes / 4).saturating_sub(1)
}

/// The data of a Reservation Register (current key, new key) or Acquire (current key, preempted key).
pub fn reservation_keys(current: u64, other: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&current.to_le_bytes());
    bytes[8..].copy_from_slice(&other.to_le_bytes());
    bytes
}

/// The data of a Connect (Base 6.3, figure 386).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectData {
    /// HOSTID.
    pub host_id: [u8; 16],
    /// CNTLID: which controller; [`ConnectData::ANY_CONTROLLER`] for the admin queue of any.
    pub cntlid: u16,
    /// SUBNQN: the subsystem's name.
    pub subnqn: String,
    /// HOSTNQN: the host's.
    pub hostnqn: String,
}

impl ConnectData {
    /// Bytes of it.
    pub const BYTES: usize = 1024;
    /// The controller identifier that means "any", of subsystems that make controllers as needed.
    pub const ANY_CONTROLLER: u16 = 0xffff;
    /// The longest NQN, in bytes (Base 4.5).
    pub const MAX_NQN: usize = 223;

    /// As it is sent; `None` if a name is longer than an NQN can be, or has a zero byte in it.
    pub fn encode(&self) -> Option<[u8; Self::BYTES]> {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.host_id);
        bytes[16..18].copy_from_slice(&self.cntlid.to_le_bytes());
        for (at, name) in [(256, &self.subnqn), (512, &self.hostnqn)] {
            if name.len() > Self::MAX_NQN || name.contains('\0') {
                return None;
            }
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
        Some(bytes)
    }
}

/// A completion queue entry (Base 3.3.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cqe {
    /// Dwords 0 and 1: what the command gives as its result.
    pub result: u64,
    /// SQHD: how far the controller has come in the submission queue.
    pub sqhd: u16,
    /// SQID; reserved over Fabrics.
    pub sqid: u16,
    /// CID: which command.
    pub cid: u16,
    /// The status.
    pub status: Status,
}

impl Cqe {
    /// From its bytes.
    #[inline]
    pub fn decode(bytes: &[u8; CQE]) -> Self {
        Self {
            result: u64_at(bytes, 0),
            sqhd: u16_at(bytes, 8),
            sqid: u16_at(bytes, 10),
            cid: u16_at(bytes, 12),
            status: Status::from_cqe((u32_at(bytes, 12) >> 16) as u16),
        }
    }

    /// As it is sent.
    pub fn encode(&self) -> [u8; CQE] {
        let mut bytes = [0; CQE];
        bytes[..8].copy_from_slice(&self.result.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.sqhd.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.sqid.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.cid.to_le_bytes());
        bytes[14..].copy_from_slice(&(self.status.raw() << 1).to_le_bytes());
        bytes
    }
}

/// What a Connect gives as its result (Base 6.3, figure 387).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectResult {
    /// CNTLID: the controller that was connected to.
    pub cntlid: u16,
    /// ATR: in-band authentication is required.
    pub authentication_required: bool,
    /// ASCR: in-band authentication that ends in a secure channel is required.
    pub secure_channel_required: bool,
}

impl ConnectResult {
    /// From [`Cqe::result`] of a Connect that succeeded.
    pub fn from_result(result: u64) -> Self {
        Self {
            cntlid: result as u16,
            authentication_required: result >> 17 & 1 != 0,
            secure_channel_required: result >> 18 & 1 != 0,
        }
    }
}
