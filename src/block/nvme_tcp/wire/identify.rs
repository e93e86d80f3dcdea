//! What Identify, log pages and asynchronous events tell (Base 5.17, 5.16, 5.2), as far as a host of disks
//! needs it. All of it is untrusted: nothing here promises more than that the field was read from its place.

use super::{array, u16_at, u32_at, u64_at};

/// Bytes of every Identify data structure.
pub const IDENTIFY: usize = 4096;

/// Data that can not be what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// Fewer bytes than the structure has.
    #[error("{what}: {got} bytes of at least {needed}")]
    TooShort {
        /// The structure.
        what: &'static str,
        /// Bytes that there are.
        got: usize,
        /// Bytes that it needs.
        needed: usize,
    },
    /// A field that can not be so.
    #[error("{what}: {field} {value:#x}: {why}")]
    Field {
        /// The structure.
        what: &'static str,
        /// The field's name in the specification.
        field: &'static str,
        /// What it said.
        value: u64,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn need(what: &'static str, bytes: &[u8], needed: usize) -> Result<(), DataError> {
    if bytes.len() < needed {
        let got = bytes.len();
        return Err(DataError::TooShort { what, got, needed });
    }
    Ok(())
}

/// Text in a field of fixed size: up to a NUL, without blanks around it, and with nothing in it that would
/// disturb a terminal or a log.
fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let field = bytes.get(at..).unwrap_or(&[]);
    let field = field.get(..len).unwrap_or(field);
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    let text = String::from_utf8_lossy(&field[..end]);
    let clean = |c: char| if c.is_control() { '?' } else { c };
    text.trim().chars().map(clean).collect()
}

/// Identify Controller (CNS 01h; Base 5.17.2.1, figure 275; CQT is of Base 2.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Controller {
    /// VID: PCI vendor identifier.
    pub vid: u16,
    /// SN: serial number.
    pub sn: String,
    /// MN: model number.
    pub mn: String,
    /// FR: firmware revision.
    pub fr: String,
    /// RAB: recommended arbitration burst, as a power of two of commands.
    pub rab: u8,
    /// CMIC: multi-path and sharing capabilities.
    pub cmic: u8,
    /// MDTS: most data of a command as a power of two of minimum memory pages; 0: no limit.
    pub mdts: u8,
    /// CNTLID: controller identifier.
    pub cntlid: u16,
    /// VER: version of the Base specification.
    pub ver: u32,
    /// OAES: asynchronous events that can be had.
    pub oaes: u32,
    /// CTRATT: attributes.
    pub ctratt: u32,
    /// CNTRLTYPE: 1 I/O, 2 discovery, 3 administrative; 0 not told.
    pub cntrltype: u8,
    /// CRDT1 to CRDT3: what status CRD means, in units of 100 ms.
    pub crdt: [u16; 3],
    /// OACS: optional admin commands.
    pub oacs: u16,
    /// ACL: Aborts that may be outstanding, less one.
    pub acl: u8,
    /// AERL: Asynchronous Event Requests that may be outstanding, less one.
    pub aerl: u8,
    /// LPA: log page attributes.
    pub lpa: u8,
    /// KAS: granularity of the Keep Alive Timer, in units of 100 ms; 0: there is none.
    pub kas: u16,
    /// ANATT: longest time in ANA transition, in seconds.
    pub anatt: u8,
    /// ANACAP: asymmetric namespace access capabilities.
    pub anacap: u8,
    /// ANAGRPMAX: the highest ANA group identifier.
    pub anagrpmax: u32,
    /// NANAGRPID: number of ANA groups.
    pub nanagrpid: u32,
    /// CQT: Command Quiesce Time, in milliseconds; 0: not told.
    pub cqt: u16,
    /// SQES: sizes of submission queue entries, as powers of two: required in bits 3:0.
    pub sqes: u8,
    /// CQES: the same of completion queue entries.
    pub cqes: u8,
    /// MAXCMD: commands that are handled at a time on a queue; 0: not told.
    pub maxcmd: u16,
    /// NN: the highest namespace identifier.
    pub nn: u32,
    /// ONCS: optional NVM commands.
    pub oncs: u16,
    /// VWC: volatile write cache.
    pub vwc: u8,
    /// AWUN: atomic write unit, normal, in blocks, less one.
    pub awun: u16,
    /// AWUPF: atomic write unit, power fail, in blocks, less one.
    pub awupf: u16,
    /// SGLS: what it can do with SGLs.
    pub sgls: u32,
    /// MNAN: most namespaces; 0: NN says.
    pub mnan: u32,
    /// SUBNQN: the subsystem's name.
    pub subnqn: String,
    /// IOCCSZ: largest command capsule of an I/O queue, in units of 16 bytes.
    pub ioccsz: u32,
    /// IORCSZ: largest response capsule, in units of 16 bytes.
    pub iorcsz: u32,
    /// ICDOFF: offset of in-capsule data, in units of 16 bytes; 0 over TCP (TCP 3.3.1).
    pub icdoff: u16,
    /// FCATT: fabrics controller attributes.
    pub fcatt: u8,
    /// MSDBD: most SGL data block descriptors in a capsule.
    pub msdbd: u8,
    /// OFCS: optional fabrics commands; bit 0 is Disconnect.
    pub ofcs: u16,
}

impl Controller {
    /// From the data of an Identify.
    ///
    /// # Errors
    /// Fewer than 4096 bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        need("Identify Controller", bytes, IDENTIFY)?;
        Ok(Self {
            vid: u16_at(bytes, 0),
            sn: text(bytes, 4, 20),
            mn: text(bytes, 24, 40),
            fr: text(bytes, 64, 8),
            rab: bytes[72],
            cmic: bytes[76],
            mdts: bytes[77],
            cntlid: u16_at(bytes, 78),
            ver: u32_at(bytes, 80),
            oaes: u32_at(bytes, 92),
            ctratt: u32_at(bytes, 96),
            cntrltype: bytes[111],
            crdt: [128, 130, 132].map(|at| u16_at(bytes, at)),
            oacs: u16_at(bytes, 256),
            acl: bytes[258],
            aerl: bytes[259],
            lpa: bytes[261],
            kas: u16_at(bytes, 320),
            anatt: bytes[342],
            anacap: bytes[343],
            anagrpmax: u32_at(bytes, 344),
            nanagrpid: u32_at(bytes, 348),
            cqt: u16_at(bytes, 386),
            sqes: bytes[512],
            cqes: bytes[513],
            maxcmd: u16_at(bytes, 514),
            nn: u32_at(bytes, 516),
            oncs: u16_at(bytes, 520),
            vwc: bytes[525],
            awun: u16_at(bytes, 526),
            awupf: u16_at(bytes, 528),
            sgls: u32_at(bytes, 536),
            mnan: u32_at(bytes, 540),
            subnqn: text(bytes, 768, 256),
            ioccsz: u32_at(bytes, 1792),
            iorcsz: u32_at(bytes, 1796),
            icdoff: u16_at(bytes, 1800),
            fcatt: bytes[1802],
            msdbd: bytes[1803],
            ofcs: u16_at(bytes, 1804),
        })
    }

    /// Most data of one command, in bytes, where a minimum memory page has `page` bytes (4096 shifted by
    /// CAP.MPSMIN); `None`: no limit.
    pub fn max_transfer(&self, page: u64) -> Option<u64> {
        match self.mdts {
            0 => None,
            mdts => Some(
                page.checked_shl(mdts.into())
                    .filter(|n| n >> mdts == page)
                    .unwrap_or(u64::MAX),
            ),
        }
    }

    /// Most in-capsule data of a command on an I/O queue, in bytes.
    pub fn in_capsule(&self) -> u32 {
        self.ioccsz.saturating_mul(16).saturating_sub(64)
    }

    /// CMIC bit 3: it reports asymmetric namespace access.
    pub fn reports_ana(&self) -> bool {
        self.cmic & 1 << 3 != 0
    }

    /// CTRATT.TBKAS: any command counts as a sign of life.
    pub fn traffic_based_keep_alive(&self) -> bool {
        self.ctratt & 1 << 6 != 0
    }

    /// ONCS: Dataset Management.
    pub fn has_dataset_management(&self) -> bool {
        self.oncs & 1 << 2 != 0
    }

    /// ONCS: Write Zeroes.
    pub fn has_write_zeroes(&self) -> bool {
        self.oncs & 1 << 3 != 0
    }

    /// ONCS: reservations.
    pub fn has_reservations(&self) -> bool {
        self.oncs & 1 << 5 != 0
    }

    /// VWC: there is a volatile write cache, and a Flush is needed.
    pub fn has_write_cache(&self) -> bool {
        self.vwc & 1 != 0
    }

    /// OFCS: Disconnect.
    pub fn has_disconnect(&self) -> bool {
        self.ofcs & 1 != 0
    }
}

/// A logical block format (NVM 4.1.5.1, figure 98).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LbaFormat {
    /// MS: bytes of metadata a block.
    pub metadata: u16,
    /// LBADS: bytes of data a block, as a power of two.
    pub lbads: u8,
}

/// Identify Namespace (CNS 00h; NVM 4.1.5.1, figure 97).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// NSZE: size, in blocks. 0: there is no such active namespace.
    pub nsze: u64,
    /// NCAP: capacity, in blocks.
    pub ncap: u64,
    /// NUSE: utilization, in blocks.
    pub nuse: u64,
    /// NSFEAT: which fields count.
    pub nsfeat: u8,
    /// FLBAS: the format in use, and where metadata travel.
    pub flbas: u8,
    /// The format in use.
    pub format: LbaFormat,
    /// DPS: protection information; bits 2:0 not zero: in use.
    pub dps: u8,
    /// NMIC: bit 0: several controllers may share it.
    pub nmic: u8,
    /// RESCAP: reservation types that it knows.
    pub rescap: u8,
    /// DLFEAT: what deallocated blocks read as.
    pub dlfeat: u8,
    /// NAWUN: atomic write unit, normal, in blocks, less one.
    pub nawun: u16,
    /// NAWUPF: atomic write unit, power fail, in blocks, less one.
    pub nawupf: u16,
    /// NOIOB: requests should not cross multiples of this many blocks; 0: they may.
    pub noiob: u16,
    /// NPWG: preferred write granularity, in blocks, less one.
    pub npwg: u16,
    /// NPWA: preferred write alignment, in blocks, less one.
    pub npwa: u16,
    /// NPDG: preferred deallocate granularity, in blocks, less one.
    pub npdg: u16,
    /// NPDA: preferred deallocate alignment, in blocks, less one.
    pub npda: u16,
    /// NOWS: optimal write size, in blocks, less one.
    pub nows: u16,
    /// ANAGRPID: the ANA group that it is in; 0: none.
    pub anagrpid: u32,
    /// NSATTR: bit 0: it is write protected.
    pub nsattr: u8,
    /// NGUID; zeros: none.
    pub nguid: [u8; 16],
    /// EUI64; zeros: none.
    pub eui64: [u8; 8],
}

impl Namespace {
    /// From the data of an Identify.
    ///
    /// # Errors
    /// Fewer than 4096 bytes, or blocks whose size can not be (of a namespace that exists).
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "Identify Namespace";
        need(WHAT, bytes, IDENTIFY)?;
        let flbas = bytes[26];
        // Bits 6:5 are the upper bits of the index where there are more than 16 formats (NVM 4.1.5.1).
        let mut index = usize::from(flbas & 0xf);
        if bytes[25] > 15 {
            index |= usize::from(flbas >> 5 & 3) << 4;
        }
        let at = 128 + index * 4;
        let format = LbaFormat {
            metadata: u16_at(bytes, at),
            lbads: bytes[at + 2],
        };
        let namespace = Self {
            nsze: u64_at(bytes, 0),
            ncap: u64_at(bytes, 8),
            nuse: u64_at(bytes, 16),
            nsfeat: bytes[24],
            flbas,
            format,
            dps: bytes[29],
            nmic: bytes[30],
            rescap: bytes[31],
            dlfeat: bytes[33],
            nawun: u16_at(bytes, 34),
            nawupf: u16_at(bytes, 36),
            noiob: u16_at(bytes, 46),
            npwg: u16_at(bytes, 64),
            npwa: u16_at(bytes, 66),
            npdg: u16_at(bytes, 68),
            npda: u16_at(bytes, 70),
            nows: u16_at(bytes, 72),
            anagrpid: u32_at(bytes, 92),
            nsattr: bytes[99],
            nguid: array(bytes, 104),
            eui64: array(bytes, 120),
        };
        let lbads = namespace.format.lbads;
        if namespace.nsze > 0 && !(9..=31).contains(&lbads) {
            return Err(DataError::Field {
                what: WHAT,
                field: "LBADS",
                value: lbads.into(),
                why: "blocks have 512 bytes to 2 GiB",
            });
        }
        if namespace.nsze > u64::MAX >> lbads {
            return Err(DataError::Field {
                what: WHAT,
                field: "NSZE",
                value: namespace.nsze,
                why: "more bytes than 64 bits can count",
            });
        }
        Ok(namespace)
    }

    /// Bytes of a logical block.
    pub fn block_size(&self) -> u64 {
        1 << (self.format.lbads & 63)
    }

    /// Bytes of the namespace.
    pub fn size(&self) -> u64 {
        self.nsze.saturating_mul(self.block_size())
    }

    /// NSFEAT.NSABP: NAWUN and NAWUPF count, and not the controller's.
    pub fn has_own_atomicity(&self) -> bool {
        self.nsfeat & 1 << 1 != 0
    }

    /// NSFEAT.OPTPERF: NPWG, NPWA, NPDG, NPDA and NOWS count. (Two bits since Base 2.1.)
    pub fn has_optimal_sizes(&self) -> bool {
        self.nsfeat & 3 << 4 != 0
    }

    /// NSATTR: it is write protected now.
    pub fn is_write_protected(&self) -> bool {
        self.nsattr & 1 != 0
    }

    /// DLFEAT: deallocated blocks read as zeros (bits 2:0 are 1).
    pub fn deallocated_reads_zeros(&self) -> bool {
        self.dlfeat & 7 == 1
    }

    /// DLFEAT: the DEAC bit of Write Zeroes is honoured.
    pub fn write_zeroes_deallocates(&self) -> bool {
        self.dlfeat & 1 << 3 != 0
    }
}

/// The Namespace Identification Descriptor list (CNS 03h; Base 5.17.2.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceIds {
    /// EUI64.
    pub eui64: Option<[u8; 8]>,
    /// NGUID.
    pub nguid: Option<[u8; 16]>,
    /// UUID.
    pub uuid: Option<[u8; 16]>,
    /// CSI: the command set; 0 is NVM.
    pub csi: Option<u8>,
}

impl NamespaceIds {
    /// From the data of an Identify. Types that are not known are passed over.
    ///
    /// # Errors
    /// Fewer than 4096 bytes, or a descriptor of a length that its type can not have.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "Namespace Identification Descriptor list";
        need(WHAT, bytes, IDENTIFY)?;
        let mut ids = Self::default();
        let mut rest = &bytes[..IDENTIFY];
        while let [nidt, nidl, _, _, tail @ ..] = rest {
            if *nidl == 0 {
                break;
            }
            let expected = match nidt {
                1 => Some(8),
                2 | 3 => Some(16),
                4 => Some(1),
                _ => None,
            };
            let len = usize::from(*nidl);
            if expected.is_some_and(|expected| expected != len) || len > tail.len() {
                return Err(DataError::Field {
                    what: WHAT,
                    field: "NIDL",
                    value: (*nidl).into(),
                    why: "not a length that its type has",
                });
            }
            match nidt {
                1 => ids.eui64 = Some(array(tail, 0)),
                2 => ids.nguid = Some(array(tail, 0)),
                3 => ids.uuid = Some(array(tail, 0)),
                4 => ids.csi = Some(tail[0]),
                _ => {}
            }
            rest = &tail[len..];
        }
        Ok(ids)
    }
}

/// A list of namespace identifiers, ended by a zero or the end (Base 4.4.2): the active namespaces (CNS
/// 02h) of a controller, 1024 at a time, in ascending order.
///
/// # Errors
/// Fewer than 4096 bytes, or identifiers that do not ascend.
pub fn active_namespaces(bytes: &[u8]) -> Result<Vec<u32>, DataError> {
    const WHAT: &str = "Active Namespace ID list";
    need(WHAT, bytes, IDENTIFY)?;
    let list = namespace_list(&bytes[..IDENTIFY]);
    if let Some(pair) = list.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(DataError::Field {
            what: WHAT,
            field: "NSID",
            value: pair[1].into(),
            why: "not more than the one before",
        });
    }
    Ok(list)
}

fn namespace_list(bytes: &[u8]) -> Vec<u32> {
    bytes
        .chunks_exact(4)
        .map(|chunk| u32_at(chunk, 0))
        .take_while(|nsid| *nsid != 0)
        .collect()
}

/// The Changed Namespace List log page (Base 5.16.1.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangedNamespaces {
    /// These.
    These(Vec<u32>),
    /// More than a list can have: look at all of them.
    TooMany,
}

impl ChangedNamespaces {
    /// From the log page.
    ///
    /// # Errors
    /// Fewer than 4096 bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        need("Changed Namespace List", bytes, IDENTIFY)?;
        Ok(match namespace_list(&bytes[..IDENTIFY]) {
            list if list.first() == Some(&u32::MAX) => Self::TooMany,
            list => Self::These(list),
        })
    }
}

/// Identify Controller of the NVM command set (CNS 06h, CSI 00h; NVM 4.1.5.2): limits that MDTS does not
/// give. 0 in each: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NvmController {
    /// WZSL: most blocks of a Write Zeroes, as a power of two of minimum memory pages.
    pub wzsl: u8,
    /// DMRL: most ranges of a Dataset Management.
    pub dmrl: u8,
    /// DMRSL: most blocks of one range.
    pub dmrsl: u32,
    /// DMSL: most blocks of a Dataset Management.
    pub dmsl: u64,
}

impl NvmController {
    /// From the data of an Identify.
    ///
    /// # Errors
    /// Fewer than 4096 bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        need(
            "Identify Controller for the NVM Command Set",
            bytes,
            IDENTIFY,
        )?;
        Ok(Self {
            wzsl: bytes[1],
            dmrl: bytes[3],
            dmrsl: u32_at(bytes, 4),
            dmsl: u64_at(bytes, 8),
        })
    }
}

/// Asymmetric namespace access state (Base 8.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AnaState {
    /// The best path.
    Optimized = 1,
    /// A path that works, less well.
    NonOptimized = 2,
    /// No I/O on this path now.
    Inaccessible = 3,
    /// No I/O on this path ever again.
    PersistentLoss = 4,
    /// About to become another.
    Change = 0xf,
}

/// One group of the ANA log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaGroup {
    /// The group's identifier.
    pub id: u32,
    /// Change count of the group; 0: not told.
    pub change_count: u64,
    /// The state of its namespaces on this controller.
    pub state: AnaState,
    /// Its namespaces. Empty if the log was asked for without them (RGO).
    pub namespaces: Vec<u32>,
}

/// The Asymmetric Namespace Access log page (Base 5.16.1.13).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnaLog {
    /// Change count of the whole.
    pub change_count: u64,
    /// The groups.
    pub groups: Vec<AnaGroup>,
}

impl AnaLog {
    /// Bytes of the log's header.
    pub const HEADER: usize = 16;
    /// Bytes of a group, without its namespaces.
    pub const GROUP: usize = 32;

    /// Most bytes of the log of a controller, as Linux computes them; `None` if that is more than 16 MiB,
    /// which nobody needs.
    pub fn size(controller: &Controller) -> Option<u32> {
        let groups = u64::from(controller.nanagrpid) * Self::GROUP as u64;
        let namespaces = match controller.mnan {
            0 => controller.nn,
            mnan => mnan,
        };
        let size = Self::HEADER as u64 + groups + u64::from(namespaces) * 4;
        u32::try_from(size).ok().filter(|size| *size <= 16 << 20)
    }

    /// From the log page.
    ///
    /// # Errors
    /// Groups or namespaces that are not all there, a state that does not exist, or a group or namespace
    /// identifier of 0.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "ANA log";
        need(WHAT, bytes, Self::HEADER)?;
        let field = |field, value: u64, why| DataError::Field {
            what: WHAT,
            field,
            value,
            why,
        };
        let count = u16_at(bytes, 8);
        let mut at = Self::HEADER;
        let mut groups = Vec::new();
        for _ in 0..count {
            need(WHAT, bytes, at + Self::GROUP)?;
            let group = &bytes[at..];
            at += Self::GROUP;
            let id = u32_at(group, 0);
            let number = u32_at(group, 4);
            let state = match group[16] & 0xf {
                1 => AnaState::Optimized,
                2 => AnaState::NonOptimized,
                3 => AnaState::Inaccessible,
                4 => AnaState::PersistentLoss,
                0xf => AnaState::Change,
                other => return Err(field("ANA state", other.into(), "no such state")),
            };
            if id == 0 {
                return Err(field("ANA group", 0, "groups begin with 1"));
            }
            let len = usize::try_from(u64::from(number) * 4).unwrap_or(usize::MAX);
            let end = at.saturating_add(len);
            need(WHAT, bytes, end)?;
            let namespaces: Vec<u32> = bytes[at..end]
                .chunks_exact(4)
                .map(|chunk| u32_at(chunk, 0))
                .collect();
            if namespaces.contains(&0) {
                return Err(field("NSID", 0, "namespaces begin with 1"));
            }
            at = end;
            groups.push(AnaGroup {
                id,
                change_count: u64_at(group, 8),
                state,
                namespaces,
            });
        }
        Ok(Self {
            change_count: u64_at(bytes, 0),
            groups,
        })
    }

    /// The state of a namespace: by its own mention, or else by its group's (Identify Namespace,
    /// ANAGRPID).
    pub fn state_of(&self, nsid: u32, anagrpid: u32) -> Option<AnaState> {
        let named = |group: &&AnaGroup| group.namespaces.contains(&nsid);
        let group = self.groups.iter().find(named);
        group
            .or_else(|| self.groups.iter().find(|group| group.id == anagrpid))
            .map(|group| group.state)
    }
}

/// The header of the Discovery log page (Base 5.16.1.23).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscoveryHeader {
    /// GENCTR: another number when the log has changed.
    pub generation: u64,
    /// NUMREC: entries.
    pub entries: u64,
}

impl DiscoveryHeader {
    /// Bytes of it; the first entry follows.
    pub const BYTES: usize = 1024;

    /// From the first bytes of the log page: 18 are enough.
    ///
    /// # Errors
    /// Fewer than that, or a format of records that is not known.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "Discovery log";
        need(WHAT, bytes, 18)?;
        let format = u16_at(bytes, 16);
        if format != 0 {
            return Err(DataError::Field {
                what: WHAT,
                field: "RECFMT",
                value: format.into(),
                why: "only format 0 is known",
            });
        }
        Ok(Self {
            generation: u64_at(bytes, 0),
            entries: u64_at(bytes, 8),
        })
    }
}

/// TRTYPE: TCP.
pub const TRTYPE_TCP: u8 = 3;

/// What an entry of the Discovery log stands for (SUBTYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubsystemType {
    /// Another discovery subsystem.
    Referral,
    /// An NVM subsystem.
    Nvm,
    /// The discovery subsystem that was asked.
    CurrentDiscovery,
    /// Something else.
    Unknown(u8),
}

/// Whether a secure channel is needed (TREQ bits 1:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecureChannel {
    /// Not told.
    Unspecified,
    /// It is.
    Required,
    /// It is not.
    NotRequired,
}

/// What the port speaks (TSAS.SECTYPE; TCP 3.6.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecurityType {
    /// Plain TCP.
    None,
    /// TLS 1.2, which no host should use any more.
    Tls12,
    /// TLS 1.3.
    Tls13,
    /// Something else.
    Unknown(u8),
}

/// One entry of the Discovery log page (Base 5.16.1.23, figure 294).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryEntry {
    /// TRTYPE: [`TRTYPE_TCP`], or another transport.
    pub trtype: u8,
    /// ADRFAM: 1 IPv4, 2 IPv6.
    pub adrfam: u8,
    /// SUBTYPE.
    pub subtype: SubsystemType,
    /// TREQ: secure channel.
    pub secure_channel: SecureChannel,
    /// TREQ bit 2: SQ flow control may be disabled.
    pub can_disable_sq_flow_control: bool,
    /// PORTID.
    pub portid: u16,
    /// CNTLID; FFFFh: the subsystem makes controllers as needed.
    pub cntlid: u16,
    /// ASQSZ: most entries of the admin submission queue.
    pub asqsz: u16,
    /// EFLAGS: bit 0: other entries tell the same; bit 1: explicit persistent connections.
    pub eflags: u16,
    /// TRSVCID: the TCP port, in decimal; `None` if it is not one, and then the entry is not used (TCP
    /// 3.1.2).
    pub port: Option<u16>,
    /// SUBNQN.
    pub subnqn: String,
    /// TRADDR: the address.
    pub traddr: String,
    /// TSAS.SECTYPE.
    pub security: SecurityType,
}

impl DiscoveryEntry {
    /// Bytes of an entry.
    pub const BYTES: usize = 1024;

    /// From an entry's bytes.
    ///
    /// # Errors
    /// Fewer than 1024.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        need("Discovery log entry", bytes, Self::BYTES)?;
        Ok(Self {
            trtype: bytes[0],
            adrfam: bytes[1],
            subtype: match bytes[2] {
                1 => SubsystemType::Referral,
                2 => SubsystemType::Nvm,
                3 => SubsystemType::CurrentDiscovery,
                other => SubsystemType::Unknown(other),
            },
            secure_channel: match bytes[3] & 3 {
                1 => SecureChannel::Required,
                2 => SecureChannel::NotRequired,
                _ => SecureChannel::Unspecified,
            },
            can_disable_sq_flow_control: bytes[3] & 1 << 2 != 0,
            portid: u16_at(bytes, 4),
            cntlid: u16_at(bytes, 6),
            asqsz: u16_at(bytes, 8),
            eflags: u16_at(bytes, 10),
            port: text(bytes, 32, 32).parse().ok().filter(|port| *port != 0),
            subnqn: text(bytes, 256, 256),
            traddr: text(bytes, 512, 256),
            security: match bytes[768] {
                0 => SecurityType::None,
                1 => SecurityType::Tls12,
                2 => SecurityType::Tls13,
                other => SecurityType::Unknown(other),
            },
        })
    }
}

/// The result of an Asynchronous Event Request (Base 5.2, figure 146).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent {
    /// What happened.
    pub kind: AsyncEventKind,
    /// The log page to read; it is what makes the controller tell the next event of this type.
    pub log_page: u8,
}

/// What an asynchronous event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsyncEventKind {
    /// Namespaces have changed, come or gone.
    NamespaceChanged,
    /// The ANA log has changed.
    AnaChanged,
    /// The Discovery log has changed.
    DiscoveryChanged,
    /// Something of a reservation, or another event of the NVM command set, with its information.
    CommandSet(u8),
    /// The controller failed for good (Base 5.2: Persistent Internal Error): it has to be reset.
    PersistentInternalError,
    /// Another event: type and information.
    Other {
        /// Its type.
        event: u8,
        /// Its information.
        information: u8,
    },
}

impl AsyncEvent {
    /// From a command's result, [`super::Cqe::result`].
    pub fn from_result(result: u64) -> Self {
        let event = (result & 7) as u8;
        let information = (result >> 8) as u8;
        let kind = match (event, information) {
            (0, 0x03) => AsyncEventKind::PersistentInternalError,
            (2, 0x00) => AsyncEventKind::NamespaceChanged,
            (2, 0x03) => AsyncEventKind::AnaChanged,
            (2, 0xf0) => AsyncEventKind::DiscoveryChanged,
            (6, _) => AsyncEventKind::CommandSet(information),
            _ => AsyncEventKind::Other { event, information },
        };
        Self {
            kind,
            log_page: (result >> 16) as u8,
        }
    }
}
