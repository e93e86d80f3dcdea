//! Paths that go away under load, for a moment and for good.

use std::time::{Duration, Instant};

use nvme_target::{Listening, NamespaceSpec, PortSpec, SubsystemSpec, Target};
use vhost_user_frontend::blk::status;
use vhost_user_frontend::guest::Random;
use vhost_user_frontend::guest::model::Model;
use vhost_user_frontend::{Daemon, Device, Op};

use crate::common::{SOON, status_of, until};
use crate::load::{self, HANG, Load, Shape};
use crate::rig::{self, MIB, NQN, Rig, Setup};

const SIZE: u64 = 8 * MIB;

const SHAPE: Shape = Shape {
    depth: 16,
    max_sectors: 64,
    align: 1,
    grain: 64,
};

/// What the load has seen of pauses.
#[derive(Default)]
struct Pauses {
    longest: Duration,
    all: Duration,
    count: u32,
}

impl Pauses {
    fn add(&mut self, pause: Duration) {
        self.longest = self.longest.max(pause);
        self.all += pause;
        self.count += 1;
    }
}

/// Runs the load until so many more requests have completed; how long the longest wait for one was.
fn advance(load: &mut Load, device: &mut Device, requests: u64) -> Duration {
    let until = load.completed + requests;
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    while load.completed < until {
        if load.turn(device, u64::MAX) > 0 {
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    }
    longest
}

/// One random cut of a path: at once for good or for a moment, with connections refused, closed or left hanging.
fn cut(target: &Target, random: &mut Random, index: usize) {
    let how = [
        Listening::Serve,
        Listening::Refuse,
        Listening::Close,
        Listening::Hang,
    ];
    let port = target.port(index);
    port.set_listening(how[random.below(4) as usize]).unwrap();
    match random.below(4) {
        0 => target.subsystem(0).reset_controllers(),
        _ => target.drop_connections_of(index),
    }
}

fn heal(target: &Target) {
    for port in target.ports() {
        port.set_listening(Listening::Serve).unwrap();
    }
}

/// Several daemons at once, each with its share of a hundred cuts: mostly they wait for a path.
fn shares(each: impl Fn(u64, u64) + Sync) {
    const DAEMONS: u64 = 4;
    std::thread::scope(|scope| {
        let start = |seed| {
            scope.spawn({
                let each = &each;
                move || each(seed, 100 / DAEMONS)
            })
        };
        let threads: Vec<_> = (1..=DAEMONS).map(start).collect();
        let failed = threads.into_iter().filter_map(|t| t.join().err()).next();
        if let Some(failed) = failed {
            std::panic::resume_unwind(failed);
        }
    });
}

#[test]
fn cuts_of_the_only_path_fail_no_request() {
    shares(cut_the_only_path);
}

fn cut_the_only_path(seed: u64, cuts: u64) {
    let setup = Setup::new(NamespaceSpec::new(1, SIZE))
        .queues(2, 1)
        .args("--nvme-reconnect-delay 1 --nvme-connect-timeout 1");
    let mut rig = Rig::start(&setup);
    rig.target.keep_journal(true);
    let model = Model::new(vec![0; SIZE as usize]);
    let mut load = Load::new("cuts of one path", load::seed(seed), SHAPE, model);
    let mut device = rig.device(SHAPE.depth, load.bytes());
    let mut pauses = Pauses::default();
    for _ in 0..cuts {
        // At any moment of the load, and for up to as long as a host needs to notice.
        for _ in 0..load.random.below(60) {
            load.turn(&mut device, u64::MAX);
        }
        let begin = Instant::now();
        cut(&rig.target, &mut load.random, 0);
        let time = Duration::from_millis(load.random.below(30));
        while begin.elapsed() < time {
            load.turn(&mut device, u64::MAX);
        }
        heal(&rig.target);
        pauses.add(advance(&mut load, &mut device, 20));
    }
    let submitted = load.submitted;
    load.go(&mut device, submitted, |_| ());
    println!(
        "cuts of one path: {} requests, pause {:?} on average, {:?} at most",
        load.completed,
        pauses.all / pauses.count,
        pauses.longest
    );
    assert!(pauses.longest < HANG);
    load.read_all(&mut device);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    assert!(rig.stored(0, SIZE as usize) == load.model.bytes);
    load.check_journal(&rig.target.journal(), 512);
    rig.assert_no_violations();
}

#[test]
fn cuts_of_one_of_two_paths_leave_requests_going() {
    shares(cut_one_of_two_paths);
}

fn cut_one_of_two_paths(seed: u64, cuts: u64) {
    let setup = Setup::new(NamespaceSpec::new(1, SIZE))
        .queues(2, 2)
        .ports([PortSpec::loopback(), PortSpec::loopback()])
        .args("--nvme-reconnect-delay 1 --nvme-connect-timeout 1 --nvme-io-policy round-robin");
    let mut rig = Rig::start(&setup);
    rig.target.keep_journal(true);
    let model = Model::new(vec![0; SIZE as usize]);
    let mut load = Load::new("cuts of two paths", load::seed(100 + seed), SHAPE, model);
    let mut device = rig.device(SHAPE.depth, load.bytes());
    let mut pauses = Pauses::default();
    let mut away = 0;
    for round in 0..cuts {
        let index = round as usize % 2;
        // The other one has to be there.
        let other = rig.target.port(1 - index).address().to_string();
        let ready = Instant::now();
        while !is_connected(&rig.daemon, &other) {
            assert!(ready.elapsed() < SOON, "{}", rig.daemon.log());
            load.turn(&mut device, u64::MAX);
            std::thread::sleep(Duration::from_millis(10));
        }
        for _ in 0..load.random.below(60) {
            load.turn(&mut device, u64::MAX);
        }
        // Nobody comes back on this path while it is away.
        rig.target
            .port(index)
            .set_listening(Listening::Refuse)
            .unwrap();
        rig.target.drop_connections_of(index);
        let before = load.completed;
        pauses.add(advance(&mut load, &mut device, 40));
        away += load.completed - before;
        heal(&rig.target);
        advance(&mut load, &mut device, 20);
    }
    let submitted = load.submitted;
    load.go(&mut device, submitted, |_| ());
    println!(
        "cuts of two paths: {away} of {} requests while one was away, pause {:?} on average, {:?} at most",
        load.completed,
        pauses.all / pauses.count,
        pauses.longest
    );
    assert!(away >= 40 * cuts);
    assert!(pauses.longest < HANG);
    load.read_all(&mut device);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    assert!(rig.stored(0, SIZE as usize) == load.model.bytes);
    load.check_journal(&rig.target.journal(), 512);
    rig.assert_no_violations();
}

/// Whether the last word of the log on the path to an address is that it is connected.
fn is_connected(daemon: &Daemon, address: &str) -> bool {
    let via = format!("via {address}: ");
    let log = daemon.log();
    let said = log.lines().filter_map(|line| line.split_once(&via));
    let mut said = said.filter(|(_, s)| s.starts_with("connected:") || s.starts_with("lost:"));
    said.next_back()
        .is_some_and(|(_, s)| s.starts_with("connected:"))
}

/// Waits until a read fails; it must not hang.
fn fails(device: &mut Device) {
    let read = Op::Read {
        sector: 0,
        len: 512,
    };
    until("requests fail", || status_of(device, read) == status::IOERR);
    for _ in 0..20 {
        assert_eq!(status_of(device, read), status::IOERR);
    }
    let write = Op::Write {
        sector: 0,
        data: &[1; 512],
    };
    assert_eq!(status_of(device, write), status::IOERR);
    assert_eq!(status_of(device, Op::Flush), status::IOERR);
}

#[test]
fn cuts_beyond_fast_io_fail_tmo_fail_requests_until_a_path_is_back() {
    let setup = Setup::new(NamespaceSpec::new(1, SIZE))
        .ports([PortSpec::loopback(), PortSpec::loopback()])
        .args("--nvme-reconnect-delay 1 --nvme-fast-io-fail-tmo 1 --nvme-ctrl-loss-tmo 600");
    let mut rig = Rig::start(&setup);
    let mut device = rig.device(8, 64 << 10);
    let data = Random::new(4).bytes(4096);
    device.write(8, &data).unwrap();
    for port in rig.target.ports() {
        port.set_listening(Listening::Refuse).unwrap();
    }
    rig.target.drop_connections();
    fails(&mut device);
    rig.daemon.assert_alive();
    rig.target.port(1).set_listening(Listening::Serve).unwrap();
    let read = Op::Read {
        sector: 8,
        len: 512,
    };
    until("requests go on", || {
        status_of(&mut device, read) == status::OK
    });
    assert!(device.read(8, 4096).unwrap() == data);
    device.write(8, &data).unwrap();
    device.flush().unwrap();
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}

#[test]
fn cuts_beyond_ctrl_loss_tmo_fail_requests_until_all_is_started_again() {
    let setup = Setup::new(NamespaceSpec::new(1, SIZE))
        .args("--nvme-reconnect-delay 1 --nvme-fast-io-fail-tmo off --nvme-ctrl-loss-tmo 1");
    let mut rig = Rig::start(&setup);
    let mut device = rig.device(8, 64 << 10);
    let data = Random::new(4).bytes(SIZE as usize);
    device.write(0, &data[..4096]).unwrap();
    rig.target.port(0).set_listening(Listening::Refuse).unwrap();
    rig.target.drop_connections();
    fails(&mut device);
    assert!(
        rig.daemon.log().contains("given up:"),
        "{}",
        rig.daemon.log()
    );
    rig.daemon.assert_alive();
    // Given up is given up: a target that comes back is not looked for.
    rig.target.port(0).set_listening(Listening::Serve).unwrap();
    fails(&mut device);
    assert!(rig.target.counters().associations_open == 0);
    // What was written can not be flushed, so that no stop of a ring is answered.
    drop(device);

    // A new target at the same address with the same namespace, and a new daemon.
    let address = rig.target.address().to_string();
    let setup = setup.ports([PortSpec::new(&address)]);
    rig.daemon.signal(libc::SIGTERM);
    rig.daemon.wait_exit(SOON);
    let other = Target::builder().subsystem(SubsystemSpec::new(NQN)).start();
    drop(std::mem::replace(&mut rig.target, other.unwrap()));
    rig.target = setup.target();
    let namespace = rig.target.subsystem(0).namespace(1).unwrap();
    namespace.write(0, &data);
    rig.start_again();
    let mut device = Device::start(rig.daemon.socket(), rig::options(&setup, 8, 64 << 10)).unwrap();
    assert!(device.read(0, 64 << 10).unwrap() == data[..64 << 10]);
    device.write(0, &[9; 512]).unwrap();
    device.flush().unwrap();
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}
