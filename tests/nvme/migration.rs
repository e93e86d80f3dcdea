//! Live migration between two daemons on one namespace: the source has flushed before it lets go, and with
//! reservations there is one writer at any moment.

use nvme_target::{Execution, NamespaceSpec, PortSpec, Target};
use vhost_user_frontend::blk::status;
use vhost_user_frontend::guest::Random;
use vhost_user_frontend::guest::vm::{DISK, Log, QUEUE_SIZE, Vm, Vmm};
use vhost_user_frontend::{Daemon, Device, Disk, Op, TempDir};

use crate::common::{SOON, program, status_of, until};
use crate::rig::{self, Setup, host, subsystem_uri};

fn setup() -> Setup {
    Setup::new(NamespaceSpec::new(1, DISK)).ports([PortSpec::loopback(), PortSpec::loopback()])
}

/// A namespace with random contents.
fn target() -> (Target, Vec<u8>) {
    let target = setup().target();
    let contents = Random::new(7).bytes(DISK as usize);
    let namespace = target.subsystem(0).namespace(1).unwrap();
    namespace.write(0, &contents);
    target.keep_journal(true);
    (target, contents)
}

/// A daemon in a directory of its own, as a host with a number.
struct Host {
    daemon: Daemon,
    _dir: TempDir,
}

impl Host {
    fn new(target: &Target, number: u8, args: &[&str]) -> Self {
        let dir = TempDir::new();
        let uri = format!("{}?nsid=1", subsystem_uri(target));
        let disk = Disk::new(uri, "raw")
            .queues(2)
            .workers(2)
            .queue_size(QUEUE_SIZE)
            .args(host(number))
            .args(args);
        let daemon = Daemon::start(&program(), &disk, dir.path());
        Self { daemon, _dir: dir }
    }

    fn connect(&self, vm: &Vm) -> Vmm {
        Vmm::connect(self.daemon.socket(), vm)
    }

    /// As a source: with the rings started and a region for what is in flight.
    fn boot(&self, vm: &mut Vm) -> Vmm {
        Vmm::boot(self.daemon.socket(), vm)
    }
}

/// All that was written has been flushed, and the flush answered, before now.
fn assert_flushed(journal: &[Execution]) {
    let changes = |e: &Execution| matches!(e.opcode, 0x01 | 0x08 | 0x09);
    let last = journal.iter().rposition(changes).expect("writes");
    let flush = |e: &Execution| e.opcode == 0 && e.answered;
    assert!(journal[last..].iter().any(flush), "{:?}", &journal[last..]);
}

fn round_trips(seed: u64, args: &[&str]) {
    let (target, contents) = target();
    let mut vm = Vm::new(contents, seed);
    // What is flushed is flushed by the daemons alone.
    vm.flushes = false;
    let mut hosts = [Host::new(&target, 1, args), Host::new(&target, 2, args)];
    let mut source = hosts[0].boot(&mut vm);
    for trip in 1..=4 {
        vm.run(300);
        let next = hosts[trip % 2].connect(&vm);
        let log = Log::new();
        let copy = source.copy_while_running(&mut vm, &log, 3);
        let bases = source.stop();
        let journal = target.journal();
        assert_flushed(&journal);
        vm.collect();
        vm.copy(log.take(), &copy);
        assert_eq!(vm.stale(&copy), [], "trip {trip}");
        // Nothing comes of the source any more, whatever it still has open.
        next.take_over(&mut vm, copy, bases);
        vm.run(300);
        let (before, after) = (&journal, &target.journal()[journal.len()..]);
        let of_source = before.last().unwrap().cntlid;
        let writes = |e: &Execution| e.opcode == 1;
        let writer = before.iter().rfind(|e| writes(e)).unwrap().cntlid;
        assert!(after.iter().any(writes));
        let late = after
            .iter()
            .filter(|e| [of_source, writer].contains(&e.cntlid));
        assert_eq!(late.collect::<Vec<_>>(), Vec::<&Execution>::new());
        drop(source);
        source = next;
    }
    vm.check_disk();
    source.stop();
    drop(source);
    for host in &mut hosts {
        host.daemon.terminate();
    }
    let namespace = target.subsystem(0).namespace(1).unwrap();
    assert!(namespace.read(0, DISK as usize) == vm.model);
    assert_eq!(target.violations(), Vec::<String>::new());
}

#[test]
fn migration_between_two_daemons_on_one_namespace_loses_nothing() {
    round_trips(1, &[]);
}

#[test]
fn migration_with_reservations_loses_nothing() {
    round_trips(2, &["--nvme-reservations"]);
}

#[test]
fn migration_target_that_comes_early_waits_for_the_reservation() {
    let (target, contents) = target();
    let mut vm = Vm::new(contents, 3);
    let args = ["--nvme-reservations"];
    let (host, other) = (Host::new(&target, 1, &args), Host::new(&target, 2, &args));
    let source = host.boot(&mut vm);
    vm.run(300);
    vm.drain();
    let next = other.connect(&vm);
    let bases = [0, 1].map(|queue| vm.available(queue));
    std::thread::scope(|scope| {
        let begun = scope.spawn(|| next.start(&mut vm, bases, false));
        until("the target has tried", || {
            other.daemon.log().contains("waiting up to")
        });
        assert_eq!(source.stop(), bases);
        begun.join().unwrap().unwrap();
    });
    vm.run(300);
    vm.check_disk();
    next.stop();
    assert_eq!(target.violations(), Vec::<String>::new());
}

#[test]
fn migration_source_fences_hosts_that_take_no_reservation() {
    let (target, contents) = target();
    let mut vm = Vm::new(contents, 4);
    let host = Host::new(&target, 1, &["--nvme-reservations"]);
    let stranger = Host::new(&target, 3, &[]);
    let source = host.boot(&mut vm);
    vm.run(100);
    let mut options = rig::options(&setup(), 8, 64 << 10);
    (options.queues, options.timeout) = (1, SOON);
    let mut device = Device::start(stranger.daemon.socket(), options).unwrap();
    let write = Op::Write {
        sector: 0,
        data: &[1; 512],
    };
    assert_eq!(status_of(&mut device, write), status::IOERR);
    assert!(stranger.daemon.log().contains("Reservation Conflict"));
    // Reading is open to all.
    assert!(device.read(0, 512).is_ok());
    vm.run(100);
    vm.check_disk();
    source.stop();
    // Nobody holds it any more.
    assert_eq!(status_of(&mut device, write), status::OK);
    device.shut_down().unwrap();
    assert_eq!(target.violations(), Vec::<String>::new());
}
