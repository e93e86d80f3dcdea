//! A namespace with paths that do what a test says.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::peer::{Options, Peer};
use super::tls;
use crate::block::nvme_tcp::NvmeStorage;
use crate::block::nvme_tcp::link::{
    Access, ControllerLimits, Geometry, IoConnection, Member, MemberEvent, Namespace, PathCommand,
    PathState, SharedPath, Wire,
};
use crate::block::nvme_tcp::machine::QueueParams;
use crate::block::nvme_tcp::spec::{Address, IoPolicy, NamespaceName, NvmeOptions, NvmeSpec};
use crate::block::{Limits, Storage};
use crate::reactor::{Epochs, Io, IoConfig};

pub const MIB: usize = 1 << 20;
/// Command Abort Requested.
pub const ABORTED: u16 = 0x007;

pub struct Setup {
    pub bytes: usize,
    pub peer: Options,
    pub params: QueueParams,
    pub limits: ControllerLimits,
    pub boundary: u64,
    pub paths: usize,
    /// The controller of this path has no volatile write cache.
    pub without_cache: Option<usize>,
    pub io_timeout: Duration,
    pub ctrl_loss: Option<Duration>,
    pub policy: IoPolicy,
    /// Whether the paths connect before anybody asks.
    pub up: bool,
    pub discard_granularity: u32,
    /// A reservation is wanted, of a host with this identifier.
    pub reserved_for: Option<[u8; 16]>,
    pub tls: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            bytes: 4 * MIB,
            peer: Options::default(),
            params: QueueParams {
                depth: 64,
                header_digest: false,
                data_digest: false,
                host_pdu_alignment: 4,
                controller_pdu_alignment: 4,
                max_h2c_data: 16 << 10,
                in_capsule: 8192,
                max_r2t: 4,
            },
            limits: ControllerLimits {
                max_transfer: 128 << 10,
                discards: true,
                max_discard_ranges: 256,
                max_discard_range_blocks: u32::MAX,
                max_discard_blocks: u64::MAX,
                max_write_zeroes: Some(1 << 20),
                volatile_write_cache: true,
                retry_delays: [0; 3],
            },
            boundary: 0,
            paths: 1,
            without_cache: None,
            io_timeout: Duration::from_secs(30),
            ctrl_loss: None,
            policy: IoPolicy::QueueDepth,
            up: true,
            discard_granularity: 512,
            reserved_for: None,
            tls: false,
        }
    }
}

impl Setup {
    pub fn block(mut self, bytes: usize) -> Self {
        self.peer.block = bytes;
        self
    }

    pub fn digests(mut self, header: bool, data: bool) -> Self {
        (self.peer.header_digest, self.peer.data_digest) = (header, data);
        (self.params.header_digest, self.params.data_digest) = (header, data);
        self
    }
}

/// What plays a path's thread.
pub struct Path {
    pub index: usize,
    pub shared: Arc<SharedPath>,
    pub peer: Peer,
    tls: bool,
    params: QueueParams,
    limits: ControllerLimits,
    members: Mutex<Vec<Arc<Member>>>,
    up: AtomicBool,
    /// Connects again as soon as a queue has failed.
    pub reconnects: AtomicBool,
    /// Has commands aborted that are held.
    pub aborts: AtomicBool,
    generation: AtomicU64,
    /// What it was told, in words.
    told: Mutex<Vec<String>>,
}

impl Path {
    fn connect(&self, member: &Member) {
        let generation = self.generation.fetch_add(1, Ordering::SeqCst) + 1;
        member.send(MemberEvent::Connected(Box::new(IoConnection {
            path: self.index,
            generation,
            qid: 1,
            wire: match self.tls {
                true => tls::connect(&self.peer),
                false => Wire::Plain(self.peer.connect()),
            },
            params: self.params,
            limits: self.limits,
            nsid: 1,
        })));
    }

    /// Connects all members.
    pub fn go_up(&self) {
        self.up.store(true, Ordering::SeqCst);
        self.shared.set_access(Access::Optimized);
        self.shared.set_state(PathState::Live);
        for member in &*self.members.lock().unwrap() {
            self.connect(member);
        }
    }

    pub fn go_down(&self, state: PathState) {
        self.shared.set_state(state);
        self.peer.cut();
        self.lose(state);
    }

    /// As the path's thread does: the peer may not know.
    pub fn lose(&self, state: PathState) {
        self.up.store(false, Ordering::SeqCst);
        self.shared.set_state(state);
        let generation = self.generation.load(Ordering::SeqCst);
        for member in &*self.members.lock().unwrap() {
            let path = self.index;
            member.send(MemberEvent::Lost { path, generation });
        }
    }

    pub fn refuse(&self, why: &str) {
        for member in &*self.members.lock().unwrap() {
            let why = why.to_owned();
            let path = self.index;
            member.send(MemberEvent::Refused { path, why });
        }
    }

    pub fn told(&self, what: &str) -> usize {
        let told = self.told.lock().unwrap();
        told.iter().filter(|one| one.starts_with(what)).count()
    }

    fn serve(&self, namespace: &Namespace) {
        loop {
            let mut poll = libc::pollfd {
                fd: std::os::fd::AsRawFd::as_raw_fd(self.shared.wake()),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, valid through the call.
            unsafe { libc::poll(&raw mut poll, 1, -1) };
            for command in self.shared.take_commands() {
                let say = |what: String| self.told.lock().unwrap().push(what);
                match command {
                    PathCommand::Join(member) => {
                        // Whoever knows of it finds it here.
                        let mut members = self.members.lock().unwrap();
                        say("join".into());
                        if self.up.load(Ordering::SeqCst) {
                            self.connect(&member);
                        }
                        members.push(member);
                    }
                    PathCommand::Leave { member } => {
                        let mut members = self.members.lock().unwrap();
                        members.retain(|other| other.number() != member);
                        say("leave".into());
                    }
                    PathCommand::QueueFailed { member, why, .. } => {
                        say(format!("failed: {why}"));
                        if self.reconnects.load(Ordering::SeqCst) {
                            let members = self.members.lock().unwrap();
                            let it = members.iter().find(|other| other.number() == member);
                            self.connect(it.expect("a member"));
                        }
                    }
                    PathCommand::Abort { cid, .. } => {
                        say("abort".into());
                        if self.aborts.load(Ordering::SeqCst) {
                            assert!(self.peer.fail_held(cid, ABORTED), "it is held");
                        }
                    }
                    PathCommand::LookAtAccess { .. } => {
                        say("look".into());
                        namespace.tell_all();
                    }
                    PathCommand::Close => return,
                }
            }
        }
    }
}

pub struct Rig {
    pub io: Io,
    pub storage: Option<Storage>,
    pub namespace: Arc<Namespace>,
    pub paths: Vec<Arc<Path>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Rig {
    pub fn new(setup: Setup) -> Self {
        let block = setup.peer.block;
        let shared: Vec<_> = (0..setup.paths)
            .map(|_| Arc::new(SharedPath::new().unwrap()))
            .collect();
        let spec = NvmeSpec {
            addresses: (0..setup.paths)
                .map(|index| Address {
                    host: "127.0.0.1".into(),
                    port: 4420 + index as u16,
                })
                .collect(),
            subsystem: "nqn.2014-08.org.example:test".into(),
            namespace: NamespaceName::Nsid(1),
            read_only: false,
            options: Arc::new(NvmeOptions {
                io_timeout: setup.io_timeout,
                ctrl_loss: setup.ctrl_loss,
                policy: setup.policy,
                reservations: setup.reserved_for.is_some(),
                host_id: setup.reserved_for,
                ..NvmeOptions::default()
            }),
        };
        let geometry = Geometry {
            block: block as u32,
            limits: Limits {
                io_align: block,
                logical_block: block as u32,
                physical_block: block as u32,
                discard_granularity: setup.discard_granularity,
                ..Limits::default()
            },
            boundary: setup.boundary,
            deallocated_reads_zero: true,
            identity: *b"sixteen bytes: 1",
        };
        let name = PathBuf::from("nvme+tcp://127.0.0.1/test");
        let namespace = Arc::new(Namespace::new(
            spec,
            name,
            geometry,
            setup.bytes as u64,
            shared.clone().into(),
        ));
        let one = Peer::new(setup.bytes, setup.peer);
        let paths: Vec<Arc<Path>> = shared
            .into_iter()
            .enumerate()
            .map(|(index, shared)| {
                if setup.up {
                    shared.set_state(PathState::Live);
                    shared.set_access(Access::Optimized);
                }
                Arc::new(Path {
                    index,
                    shared,
                    peer: if index == 0 {
                        one.clone()
                    } else {
                        one.sibling()
                    },
                    tls: setup.tls,
                    params: setup.params,
                    limits: ControllerLimits {
                        volatile_write_cache: setup.limits.volatile_write_cache
                            && setup.without_cache != Some(index),
                        ..setup.limits
                    },
                    members: Mutex::new(Vec::new()),
                    up: AtomicBool::new(setup.up),
                    reconnects: AtomicBool::new(true),
                    aborts: AtomicBool::new(true),
                    generation: AtomicU64::new(0),
                    told: Mutex::new(Vec::new()),
                })
            })
            .collect();
        let threads = paths
            .iter()
            .map(|path| {
                let (path, namespace) = (path.clone(), namespace.clone());
                std::thread::spawn(move || path.serve(&namespace))
            })
            .collect();
        let storage = Storage::Nvme(Box::new(NvmeStorage::new(namespace.clone())));
        Self {
            io: io(),
            storage: Some(storage),
            namespace,
            paths,
            threads,
        }
    }

    pub fn storage(&self) -> &Storage {
        self.storage.as_ref().unwrap()
    }

    pub fn peer(&self) -> &Peer {
        &self.paths[0].peer
    }

    pub fn path(&self) -> &Path {
        &self.paths[0]
    }

    /// Bytes that tell where they belong, on the disk.
    pub fn fill(&self) {
        self.peer().with_disk(|disk| {
            for (at, byte) in disk.iter_mut().enumerate() {
                *byte = pattern(at as u64);
            }
        });
    }

    /// Takes turns until it is so.
    pub fn until(&self, done: impl Fn() -> bool) {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "it never is so");
            if !self.io.turn() {
                self.io.park(Some(Duration::from_millis(1)));
            }
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.storage = None;
        self.namespace.close();
        self.threads.drain(..).for_each(|t| drop(t.join()));
    }
}

pub fn io() -> Io {
    Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring")
}

pub fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}
