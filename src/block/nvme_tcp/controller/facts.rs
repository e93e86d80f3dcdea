//! What a controller and its namespace are, as far as it matters here: read once for each association.

use std::time::Instant;

use sha2::{Digest, Sha256};

use super::channel::{Channel, succeeded};
use super::trouble::{Result, gone, later, never};
use super::wait::Waiter;
use crate::block::Limits;
use crate::block::error::ErrorKind;
use crate::block::nvme_tcp::host::uuid_text;
use crate::block::nvme_tcp::link::{ControllerLimits, Geometry};
use crate::block::nvme_tcp::machine::MAX_SEND_BYTES;
use crate::block::nvme_tcp::spec::NamespaceName;
use crate::block::nvme_tcp::wire::command::{CSI_NVM, cns};
use crate::block::nvme_tcp::wire::identify::{
    Controller, DataError, IDENTIFY, Namespace, NamespaceIds, NvmController, active_namespaces,
};
use crate::block::nvme_tcp::wire::{Sqe, Status};

/// Active namespaces that are looked through for an identity, at most.
const MAX_NAMESPACES: usize = 16 << 10;
/// Namespaces that a message lists, at most.
const LISTED: usize = 16;
/// Blocks of one command, at most (NLB).
const MAX_BLOCKS: u64 = 1 << 16;
/// Most bytes of a read or write command, whatever the controller takes: what is sent at one go. It bounds how long
/// others wait behind one command, and with data digests the memory of a queue's copies.
const MAX_TRANSFER: u64 = MAX_SEND_BYTES as u64;
/// Sizes that a namespace likes better than these are not believed, bytes.
const MAX_PHYSICAL: u64 = 1 << 20;

/// Tells namespaces apart, on all paths and over all associations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uuid: Option<[u8; 16]>,
    pub(crate) nguid: Option<[u8; 16]>,
    pub(crate) eui64: Option<[u8; 8]>,
    nsid: u32,
    block: u32,
}

/// A namespace as a controller shows it now.
#[derive(Clone, Debug)]
pub(crate) struct NamespaceFacts {
    pub(crate) nsid: u32,
    pub(crate) identity: Identity,
    pub(crate) geometry: Geometry,
    pub(crate) bytes: u64,
    pub(crate) write_protected: bool,
    /// 0: it is in no group.
    pub(crate) ana_group: u32,
}

/// What it takes to read facts.
pub(crate) struct Reader<'a> {
    pub(crate) channel: &'a mut Channel,
    pub(crate) waiter: &'a mut dyn Waiter,
    pub(crate) deadline: Instant,
}

impl Identity {
    /// Why the two are not the same namespace; none if they are.
    pub(crate) fn differs(&self, other: &Self) -> Option<String> {
        if self.block != other.block {
            return Some(format!(
                "blocks of {} bytes, not of {}",
                other.block, self.block
            ));
        }
        let mut common = false;
        for (ours, theirs) in [
            (self.uuid.as_ref(), other.uuid.as_ref()),
            (self.nguid.as_ref(), other.nguid.as_ref()),
        ] {
            if let (Some(ours), Some(theirs)) = (ours, theirs) {
                common = true;
                if ours != theirs {
                    return Some(format!("{other}, not {self}"));
                }
            }
        }
        if let (Some(ours), Some(theirs)) = (self.eui64, other.eui64) {
            common = true;
            if ours != theirs {
                return Some(format!("{other}, not {self}"));
            }
        }
        let none = |identity: &Self| {
            identity.uuid.is_none() && identity.nguid.is_none() && identity.eui64.is_none()
        };
        match common {
            true => None,
            // A namespace without any identity is told by its number alone.
            false if none(self) && none(other) && self.nsid == other.nsid => None,
            false => Some(format!("{other}, not {self}")),
        }
    }

    fn is(&self, name: &NamespaceName) -> bool {
        match name {
            NamespaceName::Nsid(nsid) => self.nsid == *nsid,
            NamespaceName::Uuid(uuid) => self.uuid.as_ref() == Some(uuid),
            NamespaceName::Nguid(nguid) => self.nguid.as_ref() == Some(nguid),
            NamespaceName::Eui64(eui64) => self.eui64.as_ref() == Some(eui64),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self {
                uuid: Some(uuid), ..
            } => write!(f, "UUID {}", uuid_text(uuid)),
            Self {
                nguid: Some(nguid), ..
            } => write!(f, "NGUID {}", hex(nguid)),
            Self {
                eui64: Some(eui64), ..
            } => write!(f, "EUI64 {}", hex(eui64)),
            Self { nsid, .. } => write!(f, "namespace {nsid} without an identity"),
        }
    }
}

pub(crate) fn name_text(name: &NamespaceName) -> String {
    match name {
        NamespaceName::Nsid(nsid) => format!("namespace {nsid}"),
        NamespaceName::Uuid(uuid) => format!("the namespace with UUID {}", uuid_text(uuid)),
        NamespaceName::Nguid(nguid) => format!("the namespace with NGUID {}", hex(nguid)),
        NamespaceName::Eui64(eui64) => format!("the namespace with EUI64 {}", hex(eui64)),
    }
}

fn wrong_data(error: DataError) -> super::trouble::Trouble {
    later(format!("the controller's answer makes no sense: {error}"))
}

/// An identity that is not all zeros: zeros mean that there is none.
fn present<const N: usize>(id: [u8; N]) -> Option<[u8; N]> {
    (id != [0; N]).then_some(id)
}

impl Reader<'_> {
    /// Identify, whole.
    pub(crate) fn identify(
        &mut self,
        cns: u8,
        nsid: u32,
        what: &str,
    ) -> Result<std::result::Result<Vec<u8>, Status>> {
        let sqe = Sqe::identify(cns, nsid, CSI_NVM);
        let (end, data) = self
            .channel
            .run_for(sqe, IDENTIFY as u32, self.deadline, self.waiter)
            .map_err(|trouble| trouble.during(what))?;
        if end.status.is_success() && data.len() != IDENTIFY {
            let text = format!("{what}: {} bytes came, not {IDENTIFY}", data.len());
            return Err(later(text));
        }
        Ok(match end.status.is_success() {
            true => Ok(data),
            false => Err(end.status),
        })
    }

    /// Identify Controller.
    pub(crate) fn controller(&mut self) -> Result<Controller> {
        const WHAT: &str = "Identify Controller";
        let sqe = Sqe::identify(cns::CONTROLLER, 0, CSI_NVM);
        let ran = self
            .channel
            .run_for(sqe, IDENTIFY as u32, self.deadline, self.waiter);
        let (end, data) = ran.map_err(|trouble| trouble.during(WHAT))?;
        succeeded(end, WHAT)?;
        Controller::parse(&data).map_err(wrong_data)
    }

    /// What the controller takes. `page` is its smallest memory page, `block` the namespace's block, bytes.
    pub(crate) fn limits(
        &mut self,
        controller: &Controller,
        page: u64,
        block: u32,
        retry_delays: [u16; 3],
        ask: bool,
    ) -> Result<ControllerLimits> {
        let by_blocks = MAX_BLOCKS * u64::from(block);
        let transfer = controller
            .max_transfer(page)
            .unwrap_or(u64::MAX)
            .min(by_blocks);
        let more = match ask {
            true => self.identify(
                cns::COMMAND_SET_CONTROLLER,
                0,
                "Identify Controller for NVM",
            )?,
            false => Err(Status::INVALID_FIELD),
        };
        // Controllers before version 2.0 do not know it; then there are no such limits.
        let more = match more {
            Ok(data) => NvmController::parse(&data).map_err(wrong_data)?,
            Err(_) => NvmController::default(),
        };
        let zeroes = match more.wzsl {
            // No limit is given. MDTS is not one for Write Zeroes, but like Linux we stay below it.
            0 => transfer,
            wzsl => page
                .checked_shl(wzsl.into())
                .unwrap_or(u64::MAX)
                .min(by_blocks),
        };
        let or_most = |limit: u64, most: u64| if limit == 0 { most } else { limit.min(most) };
        Ok(ControllerLimits {
            max_transfer: transfer.min(MAX_TRANSFER) as u32,
            discards: controller.has_dataset_management(),
            max_discard_ranges: or_most(more.dmrl.into(), 256) as u16,
            max_discard_range_blocks: or_most(more.dmrsl.into(), u32::MAX.into()) as u32,
            max_discard_blocks: or_most(more.dmsl, u64::MAX),
            max_write_zeroes: controller.has_write_zeroes().then_some(zeroes),
            volatile_write_cache: controller.has_write_cache(),
            retry_delays,
        })
    }

    /// Finds the namespace that is asked for.
    pub(crate) fn find(
        &mut self,
        name: &NamespaceName,
        controller: &Controller,
    ) -> Result<NamespaceFacts> {
        if let NamespaceName::Nsid(nsid) = name {
            return match self.namespace(*nsid, controller)? {
                Some(facts) => Ok(facts),
                None => Err(self.not_there(name)?),
            };
        }
        for nsid in self.active()? {
            let ids = self.ids(nsid)?;
            let told = Identity {
                uuid: ids.uuid,
                nguid: ids.nguid,
                eui64: ids.eui64,
                nsid,
                block: 0,
            };
            // Controllers without descriptors tell NGUID and EUI64 in the namespace's data only.
            if (told.is(name) || ids == NamespaceIds::default())
                && let Some(facts) = self.namespace(nsid, controller)?
                && facts.identity.is(name)
            {
                return Ok(facts);
            }
        }
        Err(self.not_there(name)?)
    }

    /// The numbers of all namespaces that are attached, in ascending order.
    fn active(&mut self) -> Result<Vec<u32>> {
        let mut all: Vec<u32> = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(0);
            let data =
                match self.identify(cns::ACTIVE_NAMESPACES, after, "Active Namespace ID list")? {
                    Ok(data) => data,
                    Err(status) => {
                        return Err(later(format!("Active Namespace ID list: {status}")));
                    }
                };
            let some = active_namespaces(&data).map_err(wrong_data)?;
            if some.first().is_some_and(|first| *first <= after) {
                return Err(later(
                    "the Active Namespace ID list does not go on where it ended",
                ));
            }
            let whole = some.len() == IDENTIFY / 4;
            all.extend(some);
            // FFFFFFFEh is the highest, behind which nothing may be asked for.
            if !whole || all.len() >= MAX_NAMESPACES || all.last() >= Some(&0xffff_fffe) {
                return Ok(all);
            }
        }
    }

    fn ids(&mut self, nsid: u32) -> Result<NamespaceIds> {
        const WHAT: &str = "Namespace Identification Descriptor list";
        let mut ids = match self.identify(cns::NAMESPACE_DESCRIPTORS, nsid, WHAT)? {
            Ok(data) => NamespaceIds::parse(&data).map_err(wrong_data)?,
            // Not before version 1.3.
            Err(_) => NamespaceIds::default(),
        };
        ids.uuid = ids.uuid.and_then(present);
        ids.nguid = ids.nguid.and_then(present);
        ids.eui64 = ids.eui64.and_then(present);
        Ok(ids)
    }

    /// A namespace by its number; none if it is not there.
    pub(crate) fn namespace(
        &mut self,
        nsid: u32,
        controller: &Controller,
    ) -> Result<Option<NamespaceFacts>> {
        if nsid == 0 || nsid == u32::MAX {
            return Ok(None);
        }
        let data = match self.identify(cns::NAMESPACE, nsid, "Identify Namespace")? {
            Ok(data) => data,
            Err(status) if matches!(Status::from_raw(status.code()), Status::INVALID_NAMESPACE) => {
                return Ok(None);
            }
            Err(status) if Status::from_raw(status.code()) == Status::COMMAND_SET_NOT_SUPPORTED => {
                return Err(another_command_set(nsid, "another command set"));
            }
            Err(status) => return Err(later(format!("Identify Namespace {nsid}: {status}"))),
        };
        let data = Namespace::parse(&data).map_err(wrong_data)?;
        let ids = self.ids(nsid)?;
        match ids.csi {
            None | Some(CSI_NVM) => {}
            Some(1) => return Err(another_command_set(nsid, "the Key Value command set")),
            Some(2) => return Err(another_command_set(nsid, "the Zoned Namespace command set")),
            Some(csi) => {
                return Err(another_command_set(
                    nsid,
                    &format!("command set {csi:#04x}"),
                ));
            }
        }
        if data.nsze == 0 {
            return Ok(None);
        }
        if data.format.metadata != 0 {
            return Err(never(
                ErrorKind::Unsupported,
                format!(
                    "namespace {nsid} is formatted with {} bytes of metadata a block, which is not supported; format \
                     it without metadata (nvme format with an LBA format of ms:0)",
                    data.format.metadata
                ),
            ));
        }
        if data.dps & 7 != 0 {
            return Err(never(
                ErrorKind::Unsupported,
                format!(
                    "namespace {nsid} is formatted with protection information, which is not supported"
                ),
            ));
        }
        let block = data.block_size();
        if block > MAX_PHYSICAL {
            return Err(never(
                ErrorKind::Unsupported,
                format!(
                    "namespace {nsid} has blocks of {block} bytes; up to {MAX_PHYSICAL} are supported"
                ),
            ));
        }
        let identity = Identity {
            uuid: ids.uuid,
            nguid: ids.nguid.or(present(data.nguid)),
            eui64: ids.eui64.or(present(data.eui64)),
            nsid,
            block: block as u32,
        };
        Ok(Some(NamespaceFacts {
            nsid,
            identity,
            geometry: geometry(&data, controller, &identity),
            bytes: data.size(),
            write_protected: data.is_write_protected(),
            ana_group: data.anagrpid,
        }))
    }

    fn not_there(&mut self, name: &NamespaceName) -> Result<super::trouble::Trouble> {
        let active = self.active()?;
        let mut those = Vec::new();
        for nsid in active.iter().take(LISTED) {
            let ids = self.ids(*nsid)?;
            let identity = match ids {
                NamespaceIds {
                    uuid: Some(uuid), ..
                } => format!(" (UUID {})", uuid_text(&uuid)),
                NamespaceIds {
                    nguid: Some(nguid), ..
                } => format!(" (NGUID {})", hex(&nguid)),
                NamespaceIds {
                    eui64: Some(eui64), ..
                } => format!(" (EUI64 {})", hex(&eui64)),
                _ => String::new(),
            };
            those.push(format!("{nsid}{identity}"));
        }
        if active.len() > LISTED {
            those.push(format!("and {} more", active.len() - LISTED));
        }
        let those = match those.is_empty() {
            true => "none is attached to this host".to_owned(),
            false => format!("those that are: {}", those.join(", ")),
        };
        Ok(gone(format!("{} is not there; {those}", name_text(name))))
    }
}

fn another_command_set(nsid: u32, which: &str) -> super::trouble::Trouble {
    never(
        ErrorKind::Unsupported,
        format!(
            "namespace {nsid} has {which}, which is not supported; only the NVM command set is"
        ),
    )
}

fn geometry(data: &Namespace, controller: &Controller, identity: &Identity) -> Geometry {
    let block = data.block_size();
    // Of these, 0 based values count only with OPTPERF (NVM section 5.8.2.1).
    let sized = |blocks: u16| match data.has_optimal_sizes() {
        true => block * (u64::from(blocks) + 1),
        false => block,
    };
    let fits = |bytes: u64, or: u64| match bytes.is_power_of_two() && bytes <= MAX_PHYSICAL {
        true => bytes as u32,
        false => or as u32,
    };
    let atomic = match data.has_own_atomicity() {
        true => data.nawupf,
        false => controller.awupf,
    };
    // What is written as one may be torn beyond its atomic unit: no more is promised to the guest.
    let physical = sized(data.npwg).min(block * (u64::from(atomic) + 1));
    let optimal = match data.has_optimal_sizes() {
        true => sized(data.nows),
        false => 0,
    };
    Geometry {
        block: block as u32,
        limits: Limits {
            mem_align: 1,
            io_align: block as usize,
            logical_block: block as u32,
            physical_block: fits(physical, block),
            optimal_io: u32::try_from(optimal).unwrap_or(0),
            discard_granularity: match controller.has_dataset_management() {
                true => u32::try_from(sized(data.npdg)).unwrap_or(block as u32),
                false => 0,
            },
        },
        boundary: u64::from(data.noiob) * block,
        // As Linux: DEAC is used only where both are told.
        deallocated_reads_zero: data.deallocated_reads_zeros() && data.write_zeroes_deallocates(),
        identity: identity_bytes(identity, controller),
    }
}

/// Sixteen bytes that stay the same as long as it is the same namespace.
fn identity_bytes(identity: &Identity, controller: &Controller) -> [u8; 16] {
    if let Some(id) = identity.uuid.or(identity.nguid) {
        return id;
    }
    let mut hash = Sha256::new();
    hash.update(identity.eui64.unwrap_or_default());
    if identity.eui64.is_none() {
        hash.update(&controller.sn);
        hash.update([0]);
        hash.update(&controller.subnqn);
        hash.update(identity.nsid.to_le_bytes());
    }
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(hash.finalize()) {
        *to = from;
    }
    id
}
