//! Subsystems, their namespaces and what paths lead to them.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};

use crate::controller::Controller;
use crate::link::Mail;
use crate::options::{ControllerOptions, Identity, NamespaceOptions, NamespaceSpec, SubsystemSpec};
use crate::port::Port;
use crate::reservation::Reservations;
use crate::store::Store;
use crate::sync::{Locked, ReadWrite};
use crate::wire::FatalErrorStatus;

/// The state of an ANA group on a path (base specification, section 8.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AnaState {
    /// Optimized.
    Optimized = 0x1,
    /// Non-optimized.
    NonOptimized = 0x2,
    /// Inaccessible.
    Inaccessible = 0x3,
    /// Persistent loss.
    PersistentLoss = 0x4,
    /// Change: the state is in transition.
    Change = 0xf,
}

/// Whether hosts are told of a change by an asynchronous event (those that asked for it).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// They are.
    Send,
    /// They have to find out.
    Silent,
}

/// Bits of Asynchronous Event Configuration (base specification, section 5.27.1.8) and the result of the event:
/// type in bits 2:0 (2: notice), information in bits 15:8, log page in bits 23:16.
const NOTICE_NAMESPACE: u32 = 1 << 8;
const EVENT_NAMESPACE: u32 = 0x0004_0002;
const NOTICE_ANA: u32 = 1 << 11;
const EVENT_ANA: u32 = 0x000c_0302;

/// A namespace and its memory.
pub struct Namespace {
    nsid: u32,
    lba_shift: u8,
    blocks: AtomicU64,
    identity: Mutex<Identity>,
    /// What one port says of the identifiers instead (for a second path that leads somewhere else).
    port_identity: Mutex<HashMap<u16, Identity>>,
    options: Mutex<NamespaceOptions>,
    write_protected: AtomicBool,
    pub(crate) reservations: Reservations,
    pub(crate) store: Store,
}

impl Namespace {
    pub(crate) fn new(spec: &NamespaceSpec) -> io::Result<Self> {
        let room = spec
            .max_bytes
            .unwrap_or(spec.bytes.saturating_mul(4))
            .max(spec.bytes);
        Ok(Self {
            nsid: spec.nsid,
            lba_shift: spec.lba_shift,
            blocks: AtomicU64::new(spec.bytes >> spec.lba_shift),
            identity: Mutex::new(spec.identity.clone()),
            port_identity: Mutex::default(),
            write_protected: AtomicBool::new(spec.layout.write_protected),
            options: Mutex::new(spec.layout.clone()),
            reservations: Reservations::default(),
            store: Store::new(room)?,
        })
    }

    /// Its number.
    pub fn nsid(&self) -> u32 {
        self.nsid
    }
    /// Bytes of a logical block, as a shift.
    pub fn lba_shift(&self) -> u8 {
        self.lba_shift
    }
    /// Its size in logical blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Acquire)
    }
    /// What it says of itself.
    pub fn options(&self) -> NamespaceOptions {
        self.options.locked().clone()
    }
    pub(crate) fn write_protected(&self) -> bool {
        self.write_protected.load(Ordering::Relaxed)
    }
    pub(crate) fn identity_at(&self, port: u16) -> Identity {
        self.port_identity
            .locked()
            .get(&port)
            .cloned()
            .unwrap_or_else(|| self.identity.locked().clone())
    }

    /// Reads `len` bytes of its memory, past all protocol. Panics where the namespace never was.
    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        self.store.with(offset, len, <[u8]>::to_vec)
    }
    /// Writes its memory, past all protocol. Panics where the namespace never was.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.store.write(offset, data, || true);
    }
}

/// A subsystem: what a host connects to by its NQN.
pub struct Subsystem {
    nqn: String,
    discovery: bool,
    options: Mutex<ControllerOptions>,
    namespaces: RwLock<BTreeMap<u32, Arc<Namespace>>>,
    /// Moves with every change that a connection keeps a copy of.
    generation: AtomicU64,
    ana: Mutex<HashMap<(u16, u32), AnaState>>,
    ana_changes: AtomicU64,
    pub(crate) controllers: Mutex<Vec<Weak<Controller>>>,
    next_controller: AtomicU32,
}

impl Subsystem {
    pub(crate) fn new(spec: &SubsystemSpec, discovery: bool) -> io::Result<Self> {
        let mut namespaces = BTreeMap::new();
        for ns in &spec.namespaces {
            namespaces.insert(ns.nsid, Arc::new(Namespace::new(ns)?));
        }
        Ok(Self {
            nqn: spec.nqn.clone(),
            discovery,
            options: Mutex::new(spec.options.clone()),
            namespaces: RwLock::new(namespaces),
            generation: AtomicU64::new(1),
            ana: Mutex::default(),
            ana_changes: AtomicU64::new(1),
            controllers: Mutex::default(),
            next_controller: AtomicU32::new(1),
        })
    }

    /// Its NQN.
    pub fn nqn(&self) -> &str {
        &self.nqn
    }
    pub(crate) fn is_discovery(&self) -> bool {
        self.discovery
    }
    /// What its controllers say of themselves.
    pub fn options(&self) -> ControllerOptions {
        self.options.locked().clone()
    }
    /// Changes what its controllers say of themselves; most holds for controllers created afterwards.
    pub fn configure(&self, change: impl FnOnce(&mut ControllerOptions)) {
        change(&mut self.options.locked());
        self.changed();
    }
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// A namespace by its number.
    pub fn namespace(&self, nsid: u32) -> Option<Arc<Namespace>> {
        self.namespaces.reading().get(&nsid).cloned()
    }
    /// All its namespaces, by number.
    pub fn namespaces(&self) -> Vec<Arc<Namespace>> {
        self.namespaces.reading().values().cloned().collect()
    }

    /// The ANA state of a group on a port: optimized if nothing else was set.
    pub fn ana_state(&self, port: u16, group: u32) -> AnaState {
        self.ana
            .locked()
            .get(&(port, group))
            .copied()
            .unwrap_or(AnaState::Optimized)
    }
    /// The ANA groups that its namespaces are in, ascending.
    pub(crate) fn ana_groups(&self) -> Vec<u32> {
        let mut groups: Vec<u32> = self
            .namespaces()
            .iter()
            .map(|ns| ns.options().ana_group)
            .collect();
        groups.sort_unstable();
        groups.dedup();
        groups
    }
    pub(crate) fn ana_changes(&self) -> u64 {
        self.ana_changes.load(Ordering::Relaxed)
    }

    pub(crate) fn next_cntlid(&self) -> u16 {
        // Controller ids are 1 to FFEFh (base specification, section 3.1.1).
        (self.next_controller.fetch_add(1, Ordering::Relaxed) % 0xffef) as u16 + 1
    }
    /// Makes a namespace larger or smaller, in bytes. What is cut off reads as zeros if it ever comes back.
    ///
    /// # Errors
    /// There is no such namespace, or it was not made for so much ([`NamespaceSpec::max_bytes`]).
    pub fn resize(&self, nsid: u32, bytes: u64, notice: Notice) -> io::Result<()> {
        let namespace = self.known(nsid)?;
        if bytes > namespace.store.len() {
            let text = format!(
                "namespace {nsid} can hold {} bytes, not {bytes}",
                namespace.store.len()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let (was, blocks) = (namespace.blocks(), bytes >> namespace.lba_shift);
        namespace.blocks.store(blocks, Ordering::Release);
        if blocks < was {
            let shift = namespace.lba_shift;
            namespace
                .store
                .zero(blocks << shift, ((was - blocks) << shift) as usize, || true);
        }
        self.namespace_changed(nsid, notice);
        Ok(())
    }

    /// Adds a namespace, or puts another one in the place of the one with its number.
    ///
    /// # Errors
    /// There is no memory to be had.
    pub fn add_namespace(&self, spec: &NamespaceSpec, notice: Notice) -> io::Result<()> {
        self.namespaces
            .writing()
            .insert(spec.nsid, Arc::new(Namespace::new(spec)?));
        self.namespace_changed(spec.nsid, notice);
        Ok(())
    }

    /// Takes a namespace away; it can be given back with [`Self::restore_namespace`].
    ///
    /// # Errors
    /// There is no such namespace.
    pub fn remove_namespace(&self, nsid: u32, notice: Notice) -> io::Result<Arc<Namespace>> {
        let namespace = self.known(nsid)?;
        self.namespaces.writing().remove(&nsid);
        self.namespace_changed(nsid, notice);
        Ok(namespace)
    }

    /// Gives a namespace back that was taken away.
    pub fn restore_namespace(&self, namespace: Arc<Namespace>, notice: Notice) {
        let nsid = namespace.nsid();
        self.namespaces.writing().insert(nsid, namespace);
        self.namespace_changed(nsid, notice);
    }

    /// Makes a namespace write-protected, or no longer.
    ///
    /// # Errors
    /// There is no such namespace.
    pub fn set_write_protected(
        &self,
        nsid: u32,
        protected: bool,
        notice: Notice,
    ) -> io::Result<()> {
        let namespace = self.known(nsid)?;
        namespace.options.locked().write_protected = protected;
        namespace
            .write_protected
            .store(protected, Ordering::Relaxed);
        self.namespace_changed(nsid, notice);
        Ok(())
    }

    /// Changes what a namespace says of itself. Write protection has a call of its own.
    ///
    /// # Errors
    /// There is no such namespace.
    pub fn configure_namespace(
        &self,
        nsid: u32,
        notice: Notice,
        change: impl FnOnce(&mut NamespaceOptions),
    ) -> io::Result<()> {
        let namespace = self.known(nsid)?;
        change(&mut namespace.options.locked());
        self.namespace_changed(nsid, notice);
        Ok(())
    }

    /// Gives a namespace other identifiers at one port: a second path that leads somewhere else.
    ///
    /// # Errors
    /// There is no such namespace.
    pub fn set_identity_at(&self, port: &Port, nsid: u32, identity: Identity) -> io::Result<()> {
        self.known(nsid)?
            .port_identity
            .locked()
            .insert(port.id(), identity);
        Ok(())
    }

    /// Sets the state of an ANA group on a port.
    pub fn set_ana_state(&self, port: &Port, group: u32, state: AnaState, notice: Notice) {
        self.ana.locked().insert((port.id(), group), state);
        self.ana_changes.fetch_add(1, Ordering::Relaxed);
        self.changed();
        if notice == Notice::Send {
            for controller in self
                .live_controllers()
                .iter()
                .filter(|c| c.port == port.id())
            {
                controller.raise(NOTICE_ANA, EVENT_ANA);
            }
        }
    }

    /// Drops all associations with this subsystem, as a reset of all its controllers does.
    pub fn reset_controllers(&self) {
        for controller in self.live_controllers() {
            controller.shut_down();
        }
    }

    /// Sets CSTS.CFS in all its controllers: they answer no command but Property Get any more.
    pub fn fail_controllers(&self) {
        for controller in self.live_controllers() {
            controller.registers.locked().fatal = true;
        }
    }

    /// Sends C2HTermReq on all connections of its controllers.
    pub fn terminate_connections(&self, status: FatalErrorStatus) {
        for controller in self.live_controllers() {
            for link in controller.links.locked().values() {
                link.send(Mail::Terminate(status));
            }
        }
    }

    fn known(&self, nsid: u32) -> io::Result<Arc<Namespace>> {
        self.namespace(nsid).ok_or_else(|| {
            let text = format!("subsystem {} has no namespace {nsid}", self.nqn);
            io::Error::new(io::ErrorKind::NotFound, text)
        })
    }

    fn namespace_changed(&self, nsid: u32, notice: Notice) {
        self.changed();
        for controller in self.live_controllers() {
            controller.events.locked().changed_namespaces.push(nsid);
            if notice == Notice::Send {
                controller.raise(NOTICE_NAMESPACE, EVENT_NAMESPACE);
            }
        }
    }

    /// Its controllers that are alive.
    pub(crate) fn live_controllers(&self) -> Vec<Arc<Controller>> {
        let mut controllers = self.controllers.locked();
        controllers.retain(|c| c.strong_count() > 0);
        controllers.iter().filter_map(Weak::upgrade).collect()
    }
}
