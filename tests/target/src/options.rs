//! What a target can be told about itself, before it starts and while it runs.

use std::time::Duration;

use crate::auth::AuthOptions;
use crate::tls::TlsOptions;

/// How a port speaks the transport. Changes hold for connections made afterwards.
#[derive(Clone, Debug)]
pub struct TransportOptions {
    /// CPDA of ICResp: alignment of the data in PDUs to the controller, in dwords, zero-based.
    pub cpda: u8,
    /// MAXH2CDATA of ICResp, in bytes: a multiple of 4, at least 4096.
    pub max_h2c_data: u32,
    /// Header digests are granted to a host that asks.
    pub header_digest: bool,
    /// Data digests are granted to a host that asks.
    pub data_digest: bool,
    /// Hosts that do not ask for a header digest are sent away with C2HTermReq.
    pub require_header_digest: bool,
    /// Hosts that do not ask for a data digest are sent away with C2HTermReq.
    pub require_data_digest: bool,
    /// Bytes that one R2T asks for at most.
    pub r2t_size: u32,
    /// R2T PDUs outstanding for a command at most (the host's MAXR2T is kept to as well).
    pub max_r2t: u32,
    /// Bytes of data in one C2HData PDU at most; a multiple of 4.
    pub c2h_size: u32,
    /// Successful reads end with the SUCCESS flag of the last C2HData, where no field of the completion is lost.
    pub c2h_success: bool,
    /// Connections are secured by TLS from their first byte.
    pub tls: Option<TlsOptions>,
    /// The size of the socket's send and receive buffers in bytes; none: as the kernel has it.
    pub socket_buffer: Option<u32>,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            cpda: 0,
            max_h2c_data: 128 << 10,
            header_digest: true,
            data_digest: true,
            require_header_digest: false,
            require_data_digest: false,
            r2t_size: 128 << 10,
            max_r2t: 1,
            c2h_size: 128 << 10,
            c2h_success: true,
            tls: None,
            socket_buffer: None,
        }
    }
}

/// What the controllers of a subsystem say of themselves. Most holds for controllers created afterwards.
#[derive(Clone, Debug)]
pub struct ControllerOptions {
    /// CAP.MQES: entries of a queue at most, zero-based.
    pub mqes: u16,
    /// CAP.TO: how long the host shall wait for CSTS.RDY, in units of 500 ms.
    pub timeout_500ms: u8,
    /// CAP.CQR.
    pub contiguous_queues: bool,
    /// How long after CC.EN the controller is ready; none: never.
    pub time_to_ready: Option<Duration>,
    /// Shutdown is reported complete so long after CC.SHN; none: never.
    pub time_to_shutdown: Option<Duration>,
    /// I/O queues that Set Features (Number of Queues) grants at most.
    pub max_io_queues: u16,
    /// Connect of an I/O queue above the granted number is refused.
    pub enforce_queue_grant: bool,
    /// MDTS: a power of two in units of 4096 bytes; 0: no limit.
    pub mdts: u8,
    /// WZSL: what Write Zeroes is limited to, a power of two in units of 4096 bytes; 0: no limit.
    pub wzsl: u8,
    /// DMRL: ranges of a Dataset Management command; 0: not said.
    pub dmrl: u8,
    /// DMRSL: logical blocks of one range; 0: not said.
    pub dmrsl: u32,
    /// DMSL: logical blocks of all ranges of a command; 0: not said.
    pub dmsl: u64,
    /// Bytes of in-capsule data that an I/O queue takes (IOCCSZ); a multiple of 16.
    pub in_capsule: u32,
    /// KAS: granularity of the keep-alive timer in units of 100 ms; 0: keep-alive is not supported.
    pub kas: u16,
    /// The loss of an I/O queue's connection ends the association, as without individual queue deletion.
    pub io_loss_ends_association: bool,
    /// The keep-alive timer ends an association when it expires.
    pub enforce_keep_alive: bool,
    /// CTRATT.TBKAS: any command restarts the keep-alive timer.
    pub traffic_based_keep_alive: bool,
    /// AERL: Asynchronous Event Requests outstanding at most, zero-based.
    pub aerl: u8,
    /// ACL: Abort commands outstanding at most, zero-based.
    pub acl: u8,
    /// Optional NVM commands (ONCS): bit 2 Dataset Management, bit 3 Write Zeroes, bit 5 reservations.
    pub oncs: u16,
    /// CRDT1 to CRDT3, in units of 100 ms.
    pub crdt: [u16; 3],
    /// Volatile write cache present (VWC).
    pub volatile_write_cache: bool,
    /// ANA reporting (CMIC bit 3).
    pub ana: bool,
    /// ANATT in seconds.
    pub anatt_s: u8,
    /// Serial number (20 characters).
    pub serial: String,
    /// Model number (40 characters).
    pub model: String,
    /// Version (VS): 2.0 by default.
    pub version: u32,
    /// Host NQNs that may connect; none: any.
    pub allowed_hosts: Option<Vec<String>>,
    /// Hosts are authenticated in-band before any other command.
    pub auth: Option<AuthOptions>,
    /// MAXCMD: commands outstanding on an I/O queue at most; 0: not said.
    pub maxcmd: u16,
}

impl Default for ControllerOptions {
    fn default() -> Self {
        Self {
            mqes: 1023,
            timeout_500ms: 20,
            contiguous_queues: true,
            time_to_ready: Some(Duration::ZERO),
            time_to_shutdown: Some(Duration::ZERO),
            max_io_queues: 64,
            enforce_queue_grant: true,
            mdts: 8,
            wzsl: 0,
            dmrl: 0,
            dmrsl: 0,
            dmsl: 0,
            in_capsule: 8192,
            kas: 1,
            io_loss_ends_association: false,
            enforce_keep_alive: true,
            traffic_based_keep_alive: false,
            aerl: 3,
            acl: 3,
            oncs: 1 << 2 | 1 << 3 | 1 << 5,
            crdt: [1, 2, 5],
            volatile_write_cache: true,
            ana: true,
            anatt_s: 10,
            serial: "TESTTARGET0001".into(),
            model: "virtioblkd test target".into(),
            version: 0x0002_0000,
            allowed_hosts: None,
            auth: None,
            maxcmd: 0,
        }
    }
}

/// A namespace to be.
#[derive(Clone, Debug)]
pub struct NamespaceSpec {
    pub(crate) nsid: u32,
    pub(crate) bytes: u64,
    pub(crate) max_bytes: Option<u64>,
    pub(crate) lba_shift: u8,
    pub(crate) identity: Identity,
    pub(crate) layout: NamespaceOptions,
}

/// The identifiers of a namespace (Namespace Identification Descriptor list).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// NGUID; zeros: none.
    pub nguid: [u8; 16],
    /// EUI-64; zeros: none.
    pub eui64: [u8; 8],
    /// UUID; zeros: none.
    pub uuid: [u8; 16],
}

/// What a namespace says of itself; can be changed while it is used.
#[derive(Clone, Debug)]
pub struct NamespaceOptions {
    /// Metadata bytes a block; a host without protection information refuses a namespace that has any.
    pub metadata_bytes: u16,
    /// ANAGRPID.
    pub ana_group: u32,
    /// NSFEAT: bit 4 says that NPWG, NPWA, NPDG, NPDA and NOWS are given.
    pub nsfeat: u8,
    /// NOIOB in logical blocks.
    pub noiob: u16,
    /// NAWUPF, zero-based, in logical blocks.
    pub nawupf: u16,
    /// NPWG, NPWA, NPDG, NPDA, NOWS: zero-based, in logical blocks.
    pub preferred: [u16; 5],
    /// DLFEAT: bits 2:0 what deallocated blocks read as (1: zeros), bit 3 DEAC of Write Zeroes.
    pub dlfeat: u8,
    /// Write protected (NSATTR bit 0): writes fail with Namespace is Write Protected.
    pub write_protected: bool,
    /// RESCAP; 0: no reservations.
    pub rescap: u8,
    /// Bit 0 of NMIC: may be attached to several controllers.
    pub shared: bool,
}

impl NamespaceSpec {
    /// A namespace of `bytes` with blocks of 512 bytes, zeros all over, its identifiers made of its number.
    pub fn new(nsid: u32, bytes: u64) -> Self {
        let mut nguid = *b"\x5a\x0b\x1c\x2d\x3e\x4f\x50\x61\x72\x83\x94\xa5\0\0\0\0";
        nguid[12..].copy_from_slice(&nsid.to_be_bytes());
        let mut uuid = *b"\xc0\x1d\xc0\xff\xee\x00\x40\x00\x80\x00\x11\x22\0\0\0\0";
        uuid[12..].copy_from_slice(&nsid.to_be_bytes());
        Self {
            nsid,
            bytes,
            max_bytes: None,
            lba_shift: 9,
            identity: Identity {
                nguid,
                eui64: [0; 8],
                uuid,
            },
            layout: NamespaceOptions {
                metadata_bytes: 0,
                ana_group: 1,
                nsfeat: 0,
                noiob: 0,
                nawupf: 0,
                preferred: [0; 5],
                dlfeat: 0x09,
                write_protected: false,
                rescap: 0xff,
                shared: true,
            },
        }
    }

    /// The size of a logical block in bytes: a power of two, at least 512.
    pub fn lba_size(mut self, bytes: u32) -> Self {
        self.lba_shift = bytes.max(512).trailing_zeros() as u8;
        self
    }

    /// How far the namespace can be grown later, in bytes (four times its size if not said).
    pub fn max_bytes(mut self, bytes: u64) -> Self {
        self.max_bytes = Some(bytes);
        self
    }

    /// Other identifiers.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = identity;
        self
    }

    /// Changes what the namespace says of itself.
    pub fn with(mut self, change: impl FnOnce(&mut NamespaceOptions)) -> Self {
        change(&mut self.layout);
        self
    }
}

/// A subsystem to be.
#[derive(Clone, Debug)]
pub struct SubsystemSpec {
    pub(crate) nqn: String,
    pub(crate) namespaces: Vec<NamespaceSpec>,
    pub(crate) options: ControllerOptions,
}

impl SubsystemSpec {
    /// A subsystem without namespaces.
    pub fn new(nqn: impl Into<String>) -> Self {
        Self {
            nqn: nqn.into(),
            namespaces: Vec::new(),
            options: ControllerOptions::default(),
        }
    }

    /// Adds a namespace.
    pub fn namespace(mut self, namespace: NamespaceSpec) -> Self {
        self.namespaces.push(namespace);
        self
    }

    /// Changes what its controllers say of themselves.
    pub fn with(mut self, change: impl FnOnce(&mut ControllerOptions)) -> Self {
        change(&mut self.options);
        self
    }
}

/// A port to be: an address that all subsystems are reached at.
#[derive(Clone, Debug)]
pub struct PortSpec {
    pub(crate) listen: String,
    pub(crate) transport: TransportOptions,
}

impl PortSpec {
    /// A port at an address such as `127.0.0.1:0` (0: any free port).
    pub fn new(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            transport: TransportOptions::default(),
        }
    }

    /// A free port of 127.0.0.1.
    pub fn loopback() -> Self {
        Self::new("127.0.0.1:0")
    }

    /// Changes how the port speaks the transport.
    pub fn with(mut self, change: impl FnOnce(&mut TransportOptions)) -> Self {
        change(&mut self.transport);
        self
    }
}
