//! Random requests while everything goes wrong that can: no byte is wrong, and each request ends once.

use std::time::{Duration, Instant};

use nvme_target::{
    AnaState, FatalErrorStatus, Fault, Listening, NamespaceSpec, Notice, On, PortSpec, Rule,
    RuleId, Status, Target,
};
use vhost_user_frontend::Op;
use vhost_user_frontend::blk::status;
use vhost_user_frontend::guest::Random;
use vhost_user_frontend::guest::model::Model;

use crate::common::status_of;
use crate::load::{self, Load, Shape, number_in};
use crate::rig::{MIB, Rig, Setup};

const SIZE: u64 = 8 * MIB;
/// Of an overlay and its base: large, since only what was not yet written is read from the base.
const OVERLAY: u64 = 32 * MIB;

/// Requests of one case; there are eight of them.
const REQUESTS: u64 = 6_500;

/// A combination.
struct Case {
    name: &'static str,
    seed: u64,
    header_digest: bool,
    data_digest: bool,
    paths: usize,
    queues: u16,
    workers: u16,
    block: u32,
    /// Bytes of one R2T, and R2Ts at once.
    r2t: (u32, u32),
    in_capsule: u32,
    overlay: bool,
}

const CASE: Case = Case {
    name: "one path",
    seed: 1,
    header_digest: false,
    data_digest: false,
    paths: 1,
    queues: 1,
    workers: 1,
    block: 512,
    r2t: (128 << 10, 1),
    in_capsule: 8192,
    overlay: false,
};

impl Case {
    fn size(&self) -> u64 {
        if self.overlay { OVERLAY } else { SIZE }
    }

    fn setup(&self) -> Setup {
        let namespace = NamespaceSpec::new(1, self.size()).lba_size(self.block);
        let namespace = namespace.with(|n| n.noiob = (96 << 10 >> 9) as u16);
        let ports = (0..self.paths).map(|_| {
            PortSpec::loopback().with(|t| {
                (t.r2t_size, t.max_r2t) = self.r2t;
                t.max_h2c_data = 32 << 10;
                t.c2h_size = 20 << 10;
                t.c2h_success = self.seed % 2 == 0;
            })
        });
        let mut setup = Setup::new(namespace)
            .ports(ports)
            .queues(self.queues, self.workers)
            .subsystem(|c| (c.mdts, c.in_capsule) = (4, self.in_capsule))
            .args("--nvme-io-timeout 1 --nvme-reconnect-delay 1 --nvme-connect-timeout 2");
        if self.header_digest {
            setup = setup.args("--nvme-header-digest");
        }
        if self.data_digest {
            setup = setup.args("--nvme-data-digest");
        }
        setup.overlay = self.overlay.then_some(OVERLAY);
        setup
    }

    /// The rules of the target, by chance all the time; those that cost a connection or a timeout each a few times.
    fn misbehave(&self, target: &Target, times: u64) -> Vec<(RuleId, Fault)> {
        let ms = Duration::from_millis;
        // A base gets fewer commands.
        let factor = if self.overlay { 3 } else { 1 };
        let mut rules = Vec::new();
        let retried = [
            (Status::INTERNAL_ERROR, 40),
            (Status::INTERNAL_ERROR.crd(1), 4),
            (Status::NAMESPACE_NOT_READY, 20),
            (Status::NAMESPACE_NOT_READY.crd(2), 4),
            (Status::TRANSIENT_TRANSPORT_ERROR, 20),
            (Status::ABORT_REQUESTED, 20),
            (Status::INTERNAL_PATH_ERROR, 4),
            (Status::ANA_TRANSITION, 2),
            (Status::ANA_INACCESSIBLE, 2),
        ];
        for (status, rate) in retried {
            let fault = Fault::Status(status);
            rules.push((Rule::rate(On::Io, factor * rate, fault), fault));
        }
        let mut often = |on, rate, fault| rules.push((Rule::rate(on, factor * rate, fault), fault));
        often(On::Io, 200, Fault::DelayUpTo(ms(4)));
        often(On::Io, 300, Fault::Reorder(3));
        often(On::Read, 200, Fault::Reorder(1));
        if self.data_digest {
            often(On::Read, 40, Fault::CorruptDataDigest);
            often(On::Read, 40, Fault::CorruptData);
        }
        let held = |execute, abortable| Fault::NoAnswer { execute, abortable };
        let fatal = [
            (On::Io, Fault::DropBefore),
            (On::Io, Fault::DropAfterExecution),
            (On::Write, Fault::DropAfterExecution),
            (On::Io, Fault::DropMidAnswer(3)),
            (On::Io, Fault::DropMidAnswer(23)),
            (On::Read, Fault::DropMidAnswer(1000)),
            (On::Io, Fault::DropAfterAnswer),
            (On::Io, Fault::Reset),
            (
                On::Io,
                Fault::Terminate(FatalErrorStatus::InvalidHeaderField),
            ),
            (On::Io, Fault::CorruptHeaderDigest),
            (On::Io, Fault::WrongPlen(4)),
            (On::Io, Fault::WrongPlen(-4)),
            (On::Io, Fault::WrongHlen(20)),
            (On::Read, Fault::WrongPdo(0xfc)),
            (On::Io, Fault::WrongType(0x0b)),
            (On::Read, Fault::DataOutOfRange),
            (On::Read, Fault::DataUnknownTag),
            (On::Read, Fault::DataTwice),
            (On::Read, Fault::DataAfterSuccess),
            (On::Read, Fault::DataMissing),
            (On::Read, Fault::SuccessWithoutLast),
            (On::Read, Fault::ResponseBeforeData),
            (On::Read, Fault::R2tForRead),
            (On::Write, Fault::R2tUnknownTag),
            (On::Write, Fault::R2tOutOfRange),
            (On::Write, Fault::R2tTwice),
            (On::Write, Fault::R2tEmpty),
            (On::Io, Fault::ResponseUnknownCid),
            (On::Io, Fault::ResponseTwice),
            (On::Io, held(true, true)),
            (On::Io, held(true, false)),
            (On::Io, held(false, true)),
            (On::Io, held(false, false)),
            (On::Io, Fault::Stall(ms(1400))),
            (On::Write, Fault::Stall(ms(2600))),
            (On::Connect, Fault::DropBefore),
            (On::Connect, Fault::Status(Status::CONNECT_BUSY)),
            (On::Identify, Fault::DropMidAnswer(100)),
        ];
        // Queues are connected seldom, and most writes come with their data.
        let rate = |on, fault| match (on, fault) {
            (On::Connect | On::Identify, _) => 2000,
            (
                _,
                Fault::R2tUnknownTag | Fault::R2tOutOfRange | Fault::R2tTwice | Fault::R2tEmpty,
            ) => 40,
            _ => 10 * factor,
        };
        for (on, fault) in fatal {
            // What a command gives no occasion for counts as well.
            let rate = rate(on, fault);
            let times = if rate == 40 { 20 * times } else { times };
            rules.push((Rule::rate(on, rate, fault).times(times), fault));
        }
        target.faults().seed(load::seed(self.seed));
        let add = |(rule, fault)| (target.faults().add(rule), fault);
        rules.into_iter().map(add).collect()
    }
}

/// What happens to paths as a whole, one thing at a time.
struct Weather<'a> {
    target: &'a Target,
    random: Random,
    /// Completed requests before the next change.
    next: u64,
    /// When the change is undone.
    until: Option<Instant>,
    changes: u64,
}

impl<'a> Weather<'a> {
    fn new(target: &'a Target, seed: u64) -> Self {
        Self {
            target,
            random: Random::new(seed ^ 0xfee1),
            next: 200,
            until: None,
            changes: 0,
        }
    }

    fn look(&mut self, completed: u64) {
        if self.until.is_some_and(|until| Instant::now() >= until) {
            self.until = None;
            self.clear();
            self.next = completed + 200 + self.random.below(400);
        } else if self.until.is_none() && completed >= self.next {
            self.change();
            self.changes += 1;
            let time = Duration::from_millis(20 + self.random.below(300));
            self.until = Some(Instant::now() + time);
        }
    }

    fn change(&mut self) {
        let index = self.random.below(self.target.ports().len() as u64) as usize;
        let (port, subsystem) = (self.target.port(index), self.target.subsystem(0));
        let notice = match self.random.below(2) {
            0 => Notice::Send,
            _ => Notice::Silent,
        };
        let ana = |state| subsystem.set_ana_state(port, 1, state, notice);
        let closed = |state| {
            port.set_listening(state).unwrap();
            self.target.drop_connections_of(index);
        };
        match self.random.below(10) {
            0 => ana(AnaState::NonOptimized),
            1 => ana(AnaState::Inaccessible),
            2 => ana(AnaState::Change),
            3 => ana(AnaState::PersistentLoss),
            4 => closed(Listening::Refuse),
            5 => closed(Listening::Close),
            6 => closed(Listening::Hang),
            7 => self.target.drop_connections(),
            8 => subsystem.reset_controllers(),
            _ => subsystem.terminate_connections(FatalErrorStatus::SequenceError),
        }
    }

    fn clear(&mut self) {
        for port in self.target.ports() {
            port.set_listening(Listening::Serve).unwrap();
            let subsystem = self.target.subsystem(0);
            if subsystem.ana_state(port.id(), 1) != AnaState::Optimized {
                subsystem.set_ana_state(port, 1, AnaState::Optimized, Notice::Send);
            }
        }
    }
}

fn run(case: &Case) {
    let seed = load::seed(case.seed);
    let requests = number_in("VIRTIOBLKD_NVME_REQUESTS").unwrap_or(REQUESTS);
    let align = u64::from(case.block) / 512;
    let shape = Shape {
        depth: 16,
        max_sectors: 256,
        // An overlay has blocks of its own.
        align: if case.overlay { 1 } else { align },
        grain: 128,
    };
    let setup = case.setup();
    let target = setup.target();
    let mut contents = vec![0; case.size() as usize];
    if case.overlay {
        Random::new(seed).fill(&mut contents);
        let namespace = target.subsystem(0).namespace(1).unwrap();
        namespace.write(0, &contents);
    }
    let mut rig = Rig::on(&setup, target);
    rig.target.keep_journal(true);
    let name = format!("{}, {requests} requests", case.name);
    let mut load = Load::new(&name, seed, shape, Model::new(contents));
    let mut device = rig.device(shape.depth, load.bytes());

    let begin = Instant::now();
    let rules = case.misbehave(&rig.target, requests.div_ceil(REQUESTS));
    let mut weather = Weather::new(&rig.target, seed);
    load.go(&mut device, requests, |load| weather.look(load.completed));
    weather.clear();
    let changes = weather.changes;
    let faults = rig.target.faults();
    let fired = faults.fired_in_all();
    let idle = rules.iter().filter(|(id, _)| faults.fired(*id) == 0);
    let idle: Vec<&Fault> = idle.map(|(_, fault)| fault).collect();
    let counters = rig.target.counters();
    println!(
        "{name}: {} faults, {changes} changes of paths, {} connections, {} aborts, {:.1} s; not met: {idle:?}",
        fired,
        counters.connections,
        counters.aborts,
        begin.elapsed().as_secs_f64()
    );
    if requests >= REQUESTS {
        assert!(fired >= 100, "{fired} faults");
        assert!(
            counters.connections >= 20,
            "{} connections",
            counters.connections
        );
    }

    // The weather is good again: everything is there, to this daemon and to the next.
    faults.clear();
    load.read_all(&mut device);
    device.shut_down().unwrap();
    drop(device);
    rig.restart();
    let mut device = rig.device(shape.depth, load.bytes());
    load.read_all(&mut device);
    let next = load.submitted + 200;
    load.go(&mut device, next, |_| ());
    load.read_all(&mut device);
    device.shut_down().unwrap();
    rig.daemon.terminate();

    let journal = rig.target.journal();
    if case.overlay {
        assert!(journal.iter().all(|e| e.opcode == 2), "a base is only read");
    } else {
        assert!(rig.stored(0, SIZE as usize) == load.model.bytes, "{name}");
        let again = load.check_journal(&journal, case.block as usize);
        println!("{name}: {again} writes were executed more than once");
    }
}

/// Cases at once: mostly they wait for paths.
fn run_all(cases: &[Case]) {
    std::thread::scope(|scope| {
        let run = |case| scope.spawn(move || run(case));
        let threads: Vec<_> = cases.iter().map(run).collect();
        let failed = threads.into_iter().filter_map(|t| t.join().err()).next();
        if let Some(failed) = failed {
            std::panic::resume_unwind(failed);
        }
    });
}

#[test]
fn faults_on_one_path_are_hidden() {
    run_all(&[
        CASE,
        Case {
            name: "one path, digests, two workers, R2T of 4 KiB",
            seed: 2,
            header_digest: true,
            data_digest: true,
            queues: 2,
            workers: 2,
            r2t: (4096, 2),
            ..CASE
        },
        Case {
            name: "one path, blocks of 4096, data digest, nothing in capsules",
            seed: 3,
            data_digest: true,
            block: 4096,
            in_capsule: 0,
            ..CASE
        },
        Case {
            name: "overlay, one path, digests",
            seed: 4,
            header_digest: true,
            data_digest: true,
            overlay: true,
            ..CASE
        },
    ]);
}

#[test]
fn faults_on_two_paths_are_hidden() {
    run_all(&[
        Case {
            name: "two paths, one worker",
            seed: 5,
            paths: 2,
            in_capsule: 0,
            r2t: (10_000, 4),
            ..CASE
        },
        Case {
            name: "two paths, two workers, digests",
            seed: 6,
            header_digest: true,
            data_digest: true,
            paths: 2,
            queues: 2,
            workers: 2,
            ..CASE
        },
        Case {
            name: "two paths, two workers, blocks of 4096, header digest",
            seed: 7,
            header_digest: true,
            paths: 2,
            queues: 4,
            workers: 2,
            block: 4096,
            r2t: (8192, 1),
            ..CASE
        },
        Case {
            name: "overlay, two paths, two workers",
            seed: 8,
            paths: 2,
            queues: 2,
            workers: 2,
            overlay: true,
            ..CASE
        },
    ]);
}

#[test]
fn faults_that_no_retry_may_hide_fail_one_request() {
    let setup =
        Setup::new(NamespaceSpec::new(1, SIZE)).ports([PortSpec::loopback(), PortSpec::loopback()]);
    let mut rig = Rig::start(&setup);
    let mut device = rig.device(8, 64 << 10);
    device.write(0, &[7; 4096]).unwrap();
    let statuses = [
        Status::INTERNAL_ERROR.dnr(),
        Status::NAMESPACE_NOT_READY.dnr(),
        Status::WRITE_FAULT.dnr(),
        Status::UNRECOVERED_READ_ERROR.dnr(),
        Status::WRITE_PROTECTED.dnr(),
    ];
    for wrong in statuses {
        let rule = rig
            .target
            .faults()
            .add(Rule::once(On::Io, Fault::Status(wrong)));
        let read = Op::Read {
            sector: 0,
            len: 512,
        };
        assert_eq!(status_of(&mut device, read), status::IOERR, "{wrong:?}");
        assert_eq!(rig.target.faults().fired(rule), 1, "it is not sent again");
        assert_eq!(device.read(0, 4096).unwrap(), [7; 4096]);
    }
    // Without DNR it is sent again, and not for ever.
    let rule = rig
        .target
        .faults()
        .add(Rule::always(On::Io, Fault::Status(Status::INTERNAL_ERROR)));
    let write = Op::Write {
        sector: 0,
        data: &[8; 512],
    };
    assert_eq!(status_of(&mut device, write), status::IOERR);
    assert!((2..20).contains(&rig.target.faults().fired(rule)));
    rig.target.faults().clear();
    assert_eq!(device.read(0, 4096).unwrap(), [7; 4096]);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}
