//! Status of a command (Base 3.3.3.2.1): what it means, what is done about it, and what people are told.

use std::fmt;

use crate::block::ErrorKind;

/// The status field of a completion queue entry without the phase bit: SC in bits 7:0, SCT in 10:8, CRD in
/// 12:11, M in 13 and DNR in 14.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Status(u16);

/// What is done with a command that ended so: what Linux does, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It succeeded.
    Ok,
    /// The path failed, not the command: it is sent again on another path, or on this one later.
    PathError,
    /// As [`Class::PathError`], because the namespace's access state is another than we thought: the ANA log
    /// has to be read again before this path is used for it.
    AnaChange,
    /// Sent again, after the Command Retry Delay Time with this number, 1 to 3; 0: at once. Up to the
    /// host's limit of retries.
    Retry {
        /// CRD.
        crd: u8,
    },
    /// The queue or the controller wants authentication first: the path is connected anew.
    Authenticate,
    /// Sending it again does not help.
    Fail,
}

/// The parts of a status that say what happened: SCT and SC.
const CODE: u16 = 0x7ff;
const MORE: u16 = 1 << 13;
const DNR: u16 = 1 << 14;

/// Status Code Type of path related errors.
const SCT_PATH: u8 = 3;

macro_rules! statuses {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        impl Status {
            $(#[doc = $text] pub const $name: Self = Self($code);)*
        }

        /// The specification's name of a status code.
        fn name(code: u16) -> Option<&'static str> {
            Some(match code {
                $($code => $text,)*
                _ => return None,
            })
        }
    };
}

statuses! {
    SUCCESS = 0x000, "Successful Completion";
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    COMMAND_ID_CONFLICT = 0x003, "Command ID Conflict";
    DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
    POWER_LOSS = 0x005, "Commands Aborted due to Power Loss Notification";
    INTERNAL_ERROR = 0x006, "Internal Error";
    ABORT_REQUESTED = 0x007, "Command Abort Requested";
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    FAILED_FUSED = 0x009, "Command Aborted due to Failed Fused Command";
    MISSING_FUSED = 0x00a, "Command Aborted due to Missing Fused Command";
    INVALID_NAMESPACE = 0x00b, "Invalid Namespace or Format";
    SEQUENCE_ERROR = 0x00c, "Command Sequence Error";
    INVALID_SGL_SEGMENT = 0x00d, "Invalid SGL Segment Descriptor";
    INVALID_SGL_COUNT = 0x00e, "Invalid Number of SGL Descriptors";
    SGL_LENGTH_INVALID = 0x00f, "Data SGL Length Invalid";
    METADATA_SGL_LENGTH_INVALID = 0x010, "Metadata SGL Length Invalid";
    SGL_TYPE_INVALID = 0x011, "SGL Descriptor Type Invalid";
    INVALID_CMB_USE = 0x012, "Invalid Use of Controller Memory Buffer";
    PRP_OFFSET_INVALID = 0x013, "PRP Offset Invalid";
    ATOMIC_WRITE_UNIT_EXCEEDED = 0x014, "Atomic Write Unit Exceeded";
    OPERATION_DENIED = 0x015, "Operation Denied";
    SGL_OFFSET_INVALID = 0x016, "SGL Offset Invalid";
    HOST_ID_FORMAT = 0x018, "Host Identifier Inconsistent Format";
    KEEP_ALIVE_EXPIRED = 0x019, "Keep Alive Timer Expired";
    KEEP_ALIVE_INVALID = 0x01a, "Keep Alive Timeout Invalid";
    ABORTED_PREEMPT = 0x01b, "Command Aborted due to Preempt and Abort";
    SANITIZE_FAILED = 0x01c, "Sanitize Failed";
    SANITIZE_IN_PROGRESS = 0x01d, "Sanitize In Progress";
    SGL_GRANULARITY_INVALID = 0x01e, "SGL Data Block Granularity Invalid";
    NOT_SUPPORTED_IN_CMB = 0x01f, "Command Not Supported for Queue in CMB";
    NAMESPACE_WRITE_PROTECTED = 0x020, "Namespace is Write Protected";
    COMMAND_INTERRUPTED = 0x021, "Command Interrupted";
    TRANSIENT_TRANSPORT_ERROR = 0x022, "Transient Transport Error";
    PROHIBITED_BY_LOCKDOWN = 0x023, "Command Prohibited by Command and Feature Lockdown";
    MEDIA_NOT_READY = 0x024, "Admin Command Media Not Ready";
    INVALID_KEY_TAG = 0x025, "Invalid Key Tag";
    DISPERSED_NAMESPACE = 0x026, "Host Dispersed Namespace Support Not Enabled";
    HOST_ID_NOT_INITIALIZED = 0x027, "Host Identifier Not Initialized";
    INCORRECT_KEY = 0x028, "Incorrect Key";
    LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
    CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
    NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
    RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
    FORMAT_IN_PROGRESS = 0x084, "Format In Progress";
    INVALID_QUEUE_ID = 0x101, "Invalid Queue Identifier";
    INVALID_QUEUE_SIZE = 0x102, "Invalid Queue Size";
    ABORT_LIMIT = 0x103, "Abort Command Limit Exceeded";
    ASYNC_EVENT_LIMIT = 0x105, "Asynchronous Event Request Limit Exceeded";
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    INVALID_FORMAT = 0x10a, "Invalid Format";
    FEATURE_NOT_SAVEABLE = 0x10d, "Feature Identifier Not Saveable";
    FEATURE_NOT_CHANGEABLE = 0x10e, "Feature Not Changeable";
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10f, "Feature Not Namespace Specific";
    NAMESPACE_NOT_ATTACHED = 0x11a, "Namespace Not Attached";
    INVALID_CONTROLLER_ID = 0x11f, "Invalid Controller Identifier";
    COMMAND_SET_NOT_SUPPORTED = 0x129, "I/O Command Set Not Supported";
    COMMAND_SET_NOT_ENABLED = 0x12a, "I/O Command Set Not Enabled";
    // What 180h to 185h mean depends on the command set: these are of Fabrics where the name says so.
    CONFLICTING_ATTRIBUTES = 0x180, "Conflicting Attributes, or Connect Incompatible Format";
    CONTROLLER_BUSY = 0x181, "Connect Controller Busy, or Invalid Protection Information";
    CONNECT_INVALID_PARAMETERS = 0x182, "Connect Invalid Parameters, or Attempted Write to Read Only Range";
    CONNECT_RESTART_DISCOVERY = 0x183, "Connect Restart Discovery, or Command Size Limit Exceeded";
    CONNECT_INVALID_HOST = 0x184, "Connect Invalid Host";
    INVALID_QUEUE_TYPE = 0x185, "Invalid Queue Type";
    DISCOVERY_RESTART = 0x190, "Discover Restart";
    AUTHENTICATION_REQUIRED = 0x191, "Authentication Required";
    WRITE_FAULT = 0x280, "Write Fault";
    UNRECOVERED_READ_ERROR = 0x281, "Unrecovered Read Error";
    GUARD_CHECK = 0x282, "End-to-end Guard Check Error";
    APPLICATION_TAG_CHECK = 0x283, "End-to-end Application Tag Check Error";
    REFERENCE_TAG_CHECK = 0x284, "End-to-end Reference Tag Check Error";
    COMPARE_FAILURE = 0x285, "Compare Failure";
    ACCESS_DENIED = 0x286, "Access Denied";
    DEALLOCATED_BLOCK = 0x287, "Deallocated or Unwritten Logical Block";
    STORAGE_TAG_CHECK = 0x288, "End-to-End Storage Tag Check Error";
    INTERNAL_PATH_ERROR = 0x300, "Internal Path Error";
    ANA_PERSISTENT_LOSS = 0x301, "Asymmetric Access Persistent Loss";
    ANA_INACCESSIBLE = 0x302, "Asymmetric Access Inaccessible";
    ANA_TRANSITION = 0x303, "Asymmetric Access Transition";
    CONTROLLER_PATH_ERROR = 0x360, "Controller Pathing Error";
    HOST_PATH_ERROR = 0x370, "Host Pathing Error";
    ABORTED_BY_HOST = 0x371, "Command Aborted By Host";
}

/// Status code 82h of a Write or the like: the same number is another status of a Connect.
const READ_ONLY_RANGE: u16 = 0x182;

impl Status {
    /// From the upper half of a completion queue entry's dword 3: the phase bit is bit 0.
    #[inline]
    pub fn from_cqe(field: u16) -> Self {
        Self(field >> 1)
    }

    /// From SCT and SC in their places, and the flags in theirs.
    pub fn from_raw(raw: u16) -> Self {
        Self(raw & 0x7fff)
    }

    /// The field without the phase bit.
    pub fn raw(self) -> u16 {
        self.0
    }

    /// SCT and SC: what happened, without what to do about it.
    pub fn code(self) -> u16 {
        self.0 & CODE
    }

    /// SCT: Status Code Type.
    pub fn sct(self) -> u8 {
        (self.0 >> 8 & 7) as u8
    }

    /// SC: Status Code.
    pub fn sc(self) -> u8 {
        self.0 as u8
    }

    /// CRD: which of the controller's Command Retry Delay Times to wait, 1 to 3; 0: none.
    pub fn crd(self) -> u8 {
        (self.0 >> 11 & 3) as u8
    }

    /// DNR: sending the command again will fail again.
    pub fn do_not_retry(self) -> bool {
        self.0 & DNR != 0
    }

    /// M: there is more in the Error Information log page.
    pub fn more(self) -> bool {
        self.0 & MORE != 0
    }

    /// The same status with DNR set.
    #[must_use]
    pub fn with_do_not_retry(self) -> Self {
        Self(self.0 | DNR)
    }

    /// True if the command succeeded.
    #[inline]
    pub fn is_success(self) -> bool {
        self.0 & CODE == 0
    }

    /// What is done about it: as Linux's nvme_decide_disposition() and nvme_failover_req().
    #[inline]
    pub fn class(self) -> Class {
        if self.is_success() {
            return Class::Ok;
        }
        self.class_of_failure()
    }

    #[cold]
    fn class_of_failure(self) -> Class {
        if self.do_not_retry() {
            return Class::Fail;
        }
        let code = Self(self.code());
        match code {
            Self::AUTHENTICATION_REQUIRED => Class::Authenticate,
            Self::ANA_PERSISTENT_LOSS | Self::ANA_INACCESSIBLE | Self::ANA_TRANSITION => {
                Class::AnaChange
            }
            _ if self.sct() == SCT_PATH => Class::PathError,
            _ => Class::Retry { crd: self.crd() },
        }
    }

    /// The kind of error that a failed I/O command is reported as. Of success: [`ErrorKind::Io`].
    pub fn kind(self) -> ErrorKind {
        match Self(self.code()) {
            Self::CAPACITY_EXCEEDED => ErrorKind::NoSpace,
            Self::NAMESPACE_WRITE_PROTECTED | Self(READ_ONLY_RANGE) => ErrorKind::ReadOnly,
            Self::LBA_OUT_OF_RANGE => ErrorKind::OutOfRange,
            Self::RESERVATION_CONFLICT => ErrorKind::Locked,
            Self::INVALID_OPCODE | Self::INVALID_FIELD => ErrorKind::Unsupported,
            Self::INVALID_NAMESPACE | Self::NAMESPACE_NOT_ATTACHED => ErrorKind::NotFound,
            Self::ACCESS_DENIED | Self::OPERATION_DENIED | Self::AUTHENTICATION_REQUIRED => {
                ErrorKind::NotAllowed
            }
            _ => ErrorKind::Io,
        }
    }

    /// What a user can do about it, where something helps: a sentence's rest, for `Error::hint`.
    pub fn advice(self) -> Option<&'static str> {
        Some(match Self(self.code()) {
            Self::CAPACITY_EXCEEDED => "free space on the target, or enlarge its pool",
            Self::NAMESPACE_WRITE_PROTECTED | Self(READ_ONLY_RANGE) => {
                "the target protects it from writing: attach the disk read-only, or lift the protection"
            }
            Self::LBA_OUT_OF_RANGE => "the namespace has shrunk, or is not the one it was",
            Self::RESERVATION_CONFLICT => {
                "another host holds a reservation on the namespace: release it there first"
            }
            Self::INVALID_NAMESPACE | Self::NAMESPACE_NOT_ATTACHED => {
                "the namespace was removed, or is not attached to this host: look at the target"
            }
            Self::AUTHENTICATION_REQUIRED => {
                "the target wants authentication: give it a host secret (DHHC-1)"
            }
            Self::NAMESPACE_NOT_READY | Self::FORMAT_IN_PROGRESS | Self::SANITIZE_IN_PROGRESS => {
                "the target is not done with the namespace: wait and try again"
            }
            Self::ANA_INACCESSIBLE | Self::ANA_PERSISTENT_LOSS | Self::ANA_TRANSITION => {
                "this path does not reach the namespace: give the address of another one"
            }
            _ => return None,
        })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match name(self.code()) {
            // Where the number means two things, I/O commands are what most messages are about.
            Some(text) => write!(f, "{text}")?,
            None if self.sct() == 7 => write!(f, "a vendor's own status")?,
            None => write!(f, "unknown status")?,
        }
        write!(f, " (SCT {:x}h, SC {:02x}h", self.sct(), self.sc())?;
        if self.do_not_retry() {
            write!(f, ", DNR")?;
        }
        write!(f, ")")
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Status({:#06x}: {self})", self.0)
    }
}
