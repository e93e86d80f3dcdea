//! A disk whose daemon is killed again and again under one driver, and the requests of that driver.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use crate::case::{Case, MAX_SECTORS};
use crate::common::{SOON, program};
use crate::death::{Death, kill_points};
use crate::frontend::guest::Random;
use crate::frontend::guest::model::{Kind, MAX_SEGMENTS, Model, Pending};
use crate::frontend::message::vring_state;
use crate::frontend::protocol::{flag, request};
use crate::frontend::{
    Completion, Daemon, Device, Disk, Error, Notify, Segment, TempDir, process, qemu,
};

/// A daemon that completes nothing for so long has lost a request.
const STUCK: Duration = Duration::from_secs(20);

/// What was done, for the end of a test.
#[derive(Default)]
pub struct Tally {
    pub kills: u64,
    pub by_point: BTreeMap<String, u64>,
    pub not_reached: BTreeMap<String, u64>,
    /// Kills while the daemon that followed a kill was being set up.
    pub in_recovery: u64,
    pub requests: u64,
    pub images: u64,
    /// From the start of a daemon until the rings run again.
    pub starting: Duration,
    /// From there to the death.
    pub living: Duration,
}

/// One driver on one image.
pub struct Run<'a> {
    case: &'a Case,
    random: Random,
    device: Device,
    /// Before its directory: its log is read when it goes.
    daemon: Daemon,
    disk: Disk,
    dir: TempDir,
    model: Model,
    pending: HashMap<u64, Pending>,
    next_token: u64,
    strict_calls: bool,
    last_death: Option<Death>,
    pub tally: Tally,
}

impl<'a> Run<'a> {
    pub fn new(case: &'a Case) -> Self {
        let dir = TempDir::new();
        let model = Model::new(case.make_image(dir.path()));
        let disk = case.disk(dir.path());
        let daemon = Daemon::start(&program(), &disk, dir.path());
        let device = Device::negotiate(daemon.socket(), case.device(Notify::Call)).unwrap();
        Self {
            case,
            random: Random::new(case.seed),
            dir,
            disk,
            daemon,
            device,
            model,
            pending: HashMap::new(),
            next_token: 0,
            strict_calls: true,
            last_death: None,
            tally: Tally::default(),
        }
    }

    fn what(&self) -> String {
        format!(
            "{}, seed {}, {} kills, {} requests, last death {:?}",
            self.case.name, self.case.seed, self.tally.kills, self.next_token, self.last_death
        )
    }

    // Requests.

    fn pick_range(case: &Case, r: &mut Random, model: &mut Model) -> Option<Segment> {
        let (sectors, grain) = (model.sectors(), case.grain);
        let mut len = match r.below(8) {
            0 => 1 + r.below(MAX_SECTORS),
            1 => grain.min(MAX_SECTORS),
            _ => 1 + r.below(12),
        };
        let span = if r.below(3) == 0 {
            sectors / 16
        } else {
            sectors
        };
        let mut sector = r.below(span.max(1));
        if r.below(3) == 0 {
            sector = sector / grain * grain;
            if r.below(2) == 0 {
                len = len.next_multiple_of(grain).min(MAX_SECTORS);
            }
        }
        let len = len.min(sectors - sector);
        model.take(sector, len)
    }

    fn pick(&mut self) -> Option<Pending> {
        let kind = match self.random.below(100) {
            0..=19 => Kind::Read,
            20..=74 => Kind::Write,
            75..=81 => Kind::Zero,
            82..=92 => Kind::Discard,
            _ => Kind::Flush,
        };
        let (case, model) = (self.case, &mut self.model);
        let range = |random: &mut Random| Self::pick_range(case, random, model);
        Pending::pick(kind, &mut self.random, MAX_SEGMENTS, range)
    }

    fn submit(&mut self, queue: usize) {
        let queue_full = self.device.queue(queue).slots_taken() >= usize::from(self.case.depth);
        if queue_full {
            return;
        }
        let Some(request) = self.pick() else { return };
        let data = request.data();
        let token = self.next_token;
        match self.device.queue(queue).submit(request.op(&data), token) {
            Ok(_) => {
                self.next_token += 1;
                self.pending.insert(token, request);
            }
            Err(Error::Full) => self.model.give_back(&request),
            Err(error) => panic!("{error}; {}", self.what()),
        }
    }

    fn complete(&mut self, queue: usize, done: Completion) {
        let request = self.pending.remove(&done.token);
        let request =
            request.unwrap_or_else(|| panic!("{done:?} completes twice; {}", self.what()));
        let what = format!("{request:?}; {}", self.what());
        let queue = self.device.queue(queue);
        self.model.complete(queue, &request, done, &|| what.clone());
        self.tally.requests += 1;
    }

    /// What the rings look like, for a message about what does not come.
    fn rings(&mut self) -> String {
        let queues = self.device.queues_mut().iter_mut().enumerate();
        let each = queues.map(|(index, queue)| {
            let unseen = queue.poll();
            format!(
                "ring {index}: base {:#x}, {} in flight, unseen {unseen:?}",
                queue.ring.base(),
                queue.ring.in_flight()
            )
        });
        each.collect::<Vec<_>>().join("; ")
    }

    /// Takes what was completed. With interrupts a driver looks only when there was one.
    fn reap(&mut self, wait: Duration) -> u64 {
        let mut count = 0;
        let queues = usize::from(self.case.queues);
        for index in 0..queues {
            let err = self.device.queue(index).ring.err_fd().clone();
            assert!(err.take() == 0, "ring {index} is broken; {}", self.what());
            if self.strict_calls {
                let call = self.device.queue(index).ring.call_fd().clone();
                if !call.wait(wait / queues as u32).unwrap() {
                    continue;
                }
            }
            loop {
                let polled = self.device.queue(index).poll();
                match polled {
                    Ok(Some(done)) => self.complete(index, done),
                    Ok(None) => break,
                    Err(error) => panic!("{error}; {}", self.what()),
                }
                count += 1;
            }
        }
        count
    }

    // Lives.

    /// Runs requests on a daemon that is up until `death` comes. `submit` is whether there are new ones.
    fn run_until(&mut self, death: &Death) {
        let begin = self.tally.requests;
        let mut stuck = Instant::now() + STUCK;
        loop {
            for queue in 0..usize::from(self.case.queues) {
                for _ in 0..1 + self.random.below(12) {
                    self.submit(queue);
                }
                self.device.queue(queue).ring.publish();
            }
            if self.reap(Duration::from_millis(1)) > 0 {
                stuck = Instant::now() + STUCK;
            } else if !self.strict_calls {
                std::thread::yield_now();
            }
            let done = self.tally.requests - begin;
            match death {
                Death::At { point, count } => {
                    // These are passed when the last ring stops.
                    if point.starts_with("stop") && done >= 20 {
                        self.ask_to_stop();
                        let end = Instant::now() + Duration::from_secs(2);
                        while self.daemon.try_exit().is_none() && Instant::now() < end {
                            std::thread::sleep(Duration::from_micros(300));
                        }
                    }
                    if let Some(status) = self.daemon.try_exit() {
                        assert_eq!(status.signal(), Some(libc::SIGKILL), "{}", self.what());
                        *self.tally.by_point.entry(point.clone()).or_default() += 1;
                        return;
                    }
                    // Most places are passed once a request, or more often; once, when it stops.
                    let asked = point.starts_with("stop") && done >= 20;
                    if done >= 40 + 3 * *count || asked {
                        *self.tally.not_reached.entry(point.clone()).or_default() += 1;
                        return self.daemon.kill();
                    }
                }
                Death::Signal { after, spin } if done >= *after => {
                    spin_for(*spin);
                    return self.daemon.kill();
                }
                Death::InStop { after, spin } if done >= *after => {
                    self.ask_to_stop();
                    spin_for(*spin);
                    return self.daemon.kill();
                }
                Death::InTerm { after, spin } if done >= *after => {
                    self.daemon.signal(libc::SIGTERM);
                    spin_for(*spin);
                    return self.daemon.kill();
                }
                _ => self.daemon.assert_alive(),
            }
            if Instant::now() > stuck {
                let (rings, what) = (self.rings(), self.what());
                panic!(
                    "no completion although {} are in flight: {rings}; {what}",
                    self.pending.len()
                );
            }
        }
    }

    /// Asks for a stop of all rings, and does not wait for the answers: it may be gone at any moment.
    fn ask_to_stop(&self) {
        let client = self.device.client().unwrap();
        for index in 0..u32::from(self.case.queues) {
            let state = vring_state(index, 0);
            let _ = client.send(request::GET_VRING_BASE, flag::VERSION, &state, &[]);
        }
    }

    /// Starts a daemon that is to die so, and takes the requests up with it. False if it died on the way.
    fn resume(&mut self, death: Option<&Death>) -> bool {
        let disk = match death {
            Some(death) => self.disk_that_dies(death),
            None => self.disk.clone(),
        };
        self.daemon = Daemon::spawn(&program(), &disk, self.dir.path());
        let deadline = Instant::now() + SOON;
        while !process::is_listening(self.daemon.socket()).unwrap() {
            if self.daemon.try_exit().is_some() {
                return self.died_at(death);
            }
            assert!(Instant::now() < deadline, "{}", self.what());
            std::thread::sleep(Duration::from_micros(300));
        }
        match (self.device.resume(), death) {
            (Ok(()), _) => true,
            (Err(error), None) => panic!("{error}; {}", self.what()),
            (Err(error), Some(death)) => {
                self.wait_for_death(death, &error);
                false
            }
        }
    }

    fn disk_that_dies(&self, death: &Death) -> Disk {
        match death {
            Death::At { point, count } => {
                let value = format!("{point}:{count}");
                self.disk.clone().env("VIRTIOBLKD_KILL_POINT", &value)
            }
            _ => self.disk.clone(),
        }
    }

    /// The connection broke while rings were started: the daemon must be on its way out, as it was told to.
    fn wait_for_death(&mut self, death: &Death, error: &Error) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.daemon.try_exit().is_none() {
            assert!(Instant::now() < deadline, "{error}; {}", self.what());
            std::thread::sleep(Duration::from_micros(300));
        }
        self.died_at(Some(death));
    }

    fn died_at(&mut self, death: Option<&Death>) -> bool {
        let Some(Death::At { point, .. }) = death else {
            self.daemon.assert_alive();
            return false;
        };
        let status = self.daemon.try_exit().and_then(|s| s.signal());
        assert_eq!(status, Some(libc::SIGKILL), "{}", self.what());
        *self.tally.by_point.entry(point.clone()).or_default() += 1;
        self.tally.in_recovery += 1;
        false
    }

    /// One life and its end.
    pub fn live_and_die(&mut self, death: Death) {
        self.last_death = Some(death.clone());
        let began = Instant::now();
        let up = self.resume(Some(&death));
        self.tally.starting += began.elapsed();
        if up {
            let began = Instant::now();
            self.run_until(&death);
            self.tally.living += began.elapsed();
        }
        self.tally.kills += 1;
        if self.case.format == "qcow2" && self.tally.kills % 12 == 0 {
            qemu::wait_unlocked(&self.disk_path(), "qcow2");
            qemu::check_no_corruption(&self.disk_path());
        }
    }

    fn disk_path(&self) -> std::path::PathBuf {
        self.dir.join("disk")
    }

    /// A daemon that is not killed completes what is in flight, and the disk is as it must be.
    pub fn settle(&mut self) {
        assert!(self.resume(None), "{}", self.what());
        let deadline = Instant::now() + STUCK;
        while !self.pending.is_empty() {
            self.reap(Duration::from_millis(1));
            self.daemon.assert_alive();
            if Instant::now() > deadline {
                let (rings, what) = (self.rings(), self.what());
                panic!(
                    "{} requests do not complete: {rings}; {what}",
                    self.pending.len()
                );
            }
        }
        let what = self.what();
        let device = &mut self.device;
        self.model.check_all(device, MAX_SECTORS, &|| what.clone());
        self.device.shut_down().unwrap();
        self.daemon.terminate();
        if self.case.format == "qcow2" {
            self.give_leaks_back();
        }
        let dump = self.dir.join("model");
        std::fs::write(&dump, &self.model.bytes).unwrap();
        qemu::assert_equal(&self.disk_path(), self.case.format, &dump, "raw");
        self.tally.images += 1;
    }

    /// What the daemons before leaked is given back a little a second while the image is in use. Here nobody
    /// waits for that: but for leaks the image is whole, and without them it is clean.
    fn give_leaks_back(&self) {
        let path = self.disk_path();
        qemu::check_no_corruption(&path);
        let mut check = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
        check
            .args(["check", "-f", "qcow2", "-r", "leaks"])
            .arg(&path);
        let output = check.output().unwrap();
        assert!(output.status.success(), "{output:?}; {}", self.what());
        qemu::check_clean(&path);
    }

    /// A new image, or the old one, under a new device: a life without a predecessor.
    pub fn next_generation(&mut self, death: Death) {
        if self.random.below(4) > 0 {
            self.model = Model::new(self.case.make_image(self.dir.path()));
        }
        self.strict_calls = self.random.below(2) == 0;
        let notify = match self.strict_calls {
            true => Notify::Call,
            false => Notify::Poll,
        };
        self.daemon.kill();
        let _ = std::fs::remove_file(self.dir.join("daemon.log"));
        self.last_death = Some(death.clone());
        self.daemon = Daemon::start(&program(), &self.disk_that_dies(&death), self.dir.path());
        self.device = Device::negotiate(self.daemon.socket(), self.case.device(notify)).unwrap();
        match self.device.start_queues() {
            Ok(()) => self.run_until(&death),
            Err(error) => self.wait_for_death(&death, &error),
        }
        self.tally.kills += 1;
    }
}

fn spin_for(microseconds: u32) {
    let end = Instant::now() + Duration::from_micros(microseconds.into());
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// All kills of a case.
pub fn run(case: &Case) {
    let wanted = std::env::var("VIRTIOBLKD_KILLS")
        .map_or(1000, |n| n.parse().expect("VIRTIOBLKD_KILLS is a number"));
    let wanted = (wanted * case.share / 100).max(4);
    let began = Instant::now();
    let mut run = Run::new(case);
    let mut nth = 0;
    while run.tally.kills < wanted {
        for life in 0..25 {
            match life {
                0 => {
                    let (random, tally) = (&mut run.random, &run.tally);
                    let death = Death::pick_first(case, random, tally, nth);
                    run.next_generation(death);
                }
                _ => {
                    let (random, tally) = (&mut run.random, &run.tally);
                    let last = run.last_death.as_ref();
                    let death = Death::pick(case, random, tally, last, nth);
                    run.live_and_die(death);
                }
            }
            nth += 1;
            if run.tally.kills >= wanted {
                break;
            }
        }
        run.settle();
    }
    let t = &run.tally;
    if t.kills >= 100 {
        let kind = if case.packed {
            "ring-packed"
        } else {
            "ring-split"
        };
        let own: Vec<_> = kill_points()
            .iter()
            .filter(|p| p.starts_with(kind))
            .collect();
        let reached = own.iter().filter(|p| t.by_point.contains_key(**p)).count();
        assert!(2 * reached >= own.len(), "of {own:?} only {:?}", t.by_point);
    }
    println!(
        "{}: {} kills ({} in recovery) of {} requests on {} images in {:.1} s ({:.1} s starting, {:.1} s \
         living); by place {:?}; not reached {:?}",
        case.name,
        t.kills,
        t.in_recovery,
        t.requests,
        t.images,
        began.elapsed().as_secs_f64(),
        t.starting.as_secs_f64(),
        t.living.as_secs_f64(),
        t.by_point,
        t.not_reached
    );
}
