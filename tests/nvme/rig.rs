//! A target, and a daemon on one of its namespaces.

use nvme_target::{NamespaceSpec, PortSpec, SubsystemSpec, Target};
use vhost_user_frontend::{Daemon, Device, DeviceOptions, Disk, SlotOptions, TempDir, qemu};

use crate::common::{SOON, program};

pub const NQN: &str = "nqn.2026-01.org.example:disk";
pub const MIB: u64 = 1 << 20;

/// How a namespace is served, by the target and by the daemon.
#[derive(Clone)]
pub struct Setup {
    pub namespace: NamespaceSpec,
    pub subsystem: SubsystemSpec,
    pub ports: Vec<PortSpec>,
    pub queues: u16,
    pub workers: u16,
    pub args: Vec<String>,
    /// The disk is a qcow2 overlay of this size in bytes over the namespace.
    pub overlay: Option<u64>,
}

impl Setup {
    /// A namespace over one path, with one queue and one worker.
    pub fn new(namespace: NamespaceSpec) -> Self {
        Self {
            namespace,
            subsystem: SubsystemSpec::new(NQN),
            ports: vec![PortSpec::loopback()],
            queues: 1,
            workers: 1,
            args: Vec::new(),
            overlay: None,
        }
    }

    pub fn ports(mut self, ports: impl IntoIterator<Item = PortSpec>) -> Self {
        self.ports = ports.into_iter().collect();
        self
    }

    pub fn queues(mut self, queues: u16, workers: u16) -> Self {
        (self.queues, self.workers) = (queues, workers);
        self
    }

    /// Further arguments of the daemon, separated by spaces.
    pub fn args(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(str::to_owned));
        self
    }

    pub fn subsystem(mut self, change: impl FnOnce(&mut nvme_target::ControllerOptions)) -> Self {
        self.subsystem = self.subsystem.with(change);
        self
    }

    pub fn target(&self) -> Target {
        let subsystem = self.subsystem.clone().namespace(self.namespace.clone());
        let builder = Target::builder().subsystem(subsystem);
        let ports = self.ports.iter().cloned();
        ports.fold(builder, |b, port| b.port(port)).start().unwrap()
    }
}

/// `nvme+tcp://…` up to and with the NQN.
pub fn subsystem_uri(target: &Target) -> String {
    let ports = target.ports().iter().map(|p| p.address().to_string());
    format!("nvme+tcp://{}/{NQN}", ports.collect::<Vec<_>>().join(","))
}

/// Arguments that say who the host is, so that nothing is looked up or kept elsewhere.
pub fn host(number: u8) -> [String; 4] {
    let uuid = format!("00000000-0000-4000-8000-0000000000{number:02x}");
    [
        "--nvme-host-nqn".into(),
        format!("nqn.2014-08.org.nvmexpress:uuid:{uuid}"),
        "--nvme-host-id".into(),
        uuid,
    ]
}

/// Everything of a test. What is used by another comes first, so that it goes first.
pub struct Rig {
    pub daemon: Daemon,
    pub disk: Disk,
    pub dir: TempDir,
    pub target: Target,
    pub setup: Setup,
}

impl Rig {
    pub fn start(setup: &Setup) -> Self {
        Self::on(setup, setup.target())
    }

    pub fn on(setup: &Setup, target: Target) -> Self {
        let dir = TempDir::new();
        let disk = disk(setup, &target, &dir);
        Self {
            daemon: Daemon::start(&program(), &disk, dir.path()),
            disk,
            dir,
            target,
            setup: setup.clone(),
        }
    }

    /// A driver with slots for requests of up to `bytes`, `depth` of them in each queue.
    pub fn device(&self, depth: u16, bytes: u32) -> Device {
        Device::start(self.daemon.socket(), options(&self.setup, depth, bytes)).unwrap()
    }

    /// The same disk under a new process.
    pub fn restart(&mut self) {
        self.daemon.terminate();
        self.daemon = Daemon::start(&program(), &self.disk, self.dir.path());
    }

    /// The same after the old process was killed, or has ended.
    pub fn start_again(&mut self) {
        self.daemon.kill();
        self.daemon = Daemon::start(&program(), &self.disk, self.dir.path());
    }

    /// Bytes of the namespace, as the target has them.
    pub fn stored(&self, offset: u64, len: usize) -> Vec<u8> {
        let namespace = self.target.subsystem(0).namespace(1).unwrap();
        namespace.read(offset, len)
    }

    /// The daemon has kept to the specifications.
    pub fn assert_no_violations(&self) {
        assert_eq!(self.target.violations(), Vec::<String>::new());
    }
}

pub fn options(setup: &Setup, depth: u16, bytes: u32) -> DeviceOptions {
    DeviceOptions {
        queues: setup.queues,
        queue_size: 256,
        slots: SlotOptions {
            count: depth,
            data_len: bytes,
            ..SlotOptions::default()
        },
        timeout: SOON,
        ..DeviceOptions::default()
    }
}

/// The disk of a daemon in `dir`; the overlay is made if there is to be one.
pub fn disk(setup: &Setup, target: &Target, dir: &TempDir) -> Disk {
    let subsystem = subsystem_uri(target);
    let uri = format!("{subsystem}?nsid=1");
    let disk = match setup.overlay {
        None => Disk::new(&uri, "raw"),
        Some(size) => {
            let image = dir.join("disk");
            let (path, size) = (image.to_str().unwrap(), size.to_string());
            let (from, to) = (["create", "-q", "-u", "-f", "qcow2"], [path, &size]);
            qemu::img_ok(from.iter().chain(&["-F", "raw", "-b", &uri]).chain(&to));
            Disk::new(&image, "qcow2").args(["--allow-remote", &subsystem])
        }
    };
    disk.queues(setup.queues)
        .workers(setup.workers)
        .args(host(1))
        .args(setup.args.iter().cloned())
}
