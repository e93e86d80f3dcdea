//! Identify Controller, of all command sets and of the NVM command set.

use super::super::{u16_at, u32_at, u64_at};
use super::{DataError, IDENTIFY, need, text};

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
