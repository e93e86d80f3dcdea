//! Identify Namespace, and lists of namespaces and of their names.

use super::super::{array, u16_at, u32_at, u64_at};
use super::{DataError, IDENTIFY, need};

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
        let wrong = |field, value, why| DataError::Field {
            what: WHAT,
            field,
            value,
            why,
        };
        if namespace.nsze > 0 && !(9..=31).contains(&lbads) {
            let why = "blocks have 512 bytes to 2 GiB";
            return Err(wrong("LBADS", lbads.into(), why));
        }
        if namespace.nsze > 0 && namespace.nsze > u64::MAX >> lbads {
            let why = "more bytes than 64 bits can count";
            return Err(wrong("NSZE", namespace.nsze, why));
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
