//! A daemon that is upgraded, and the load on it.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vhost_user_frontend as frontend;

use frontend::guest::Random;
use frontend::guest::model::{Kind, Model, Pending, SECTOR};
use frontend::{Daemon, Device, DeviceOptions, Disk, Program, SlotOptions, TempDir, qemu};

use crate::common::{SOON, until};

pub const MIB: u64 = 1 << 20;

/// A daemon and those that took its place.
pub struct Rig {
    /// The one that this test has started, while it serves.
    first: Option<Daemon>,
    /// What it serves, unless it was started by hand.
    disk: Option<Disk>,
    pub pid: u32,
    pub dir: TempDir,
}

/// What the next upgrade starts.
pub enum New<'a> {
    /// The same program.
    Good,
    /// The same program with a variable in its environment.
    With(&'a str),
    /// A shell script.
    Script(&'a str),
}

fn binary() -> &'static str {
    env!("CARGO_BIN_EXE_virtioblkd")
}

/// Puts a script in its place at once, since it may be started at any moment.
fn write_script(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&beside, path).unwrap();
}

impl Rig {
    /// A daemon on `disk` in `dir`, whose upgrades have `limit_ms` for each step.
    pub fn start(dir: TempDir, disk: &Disk, limit_ms: u64) -> Self {
        let disk = disk.clone().args(["--pid-file".into(), dir.join("pid")]);
        Self::write_start(&dir, limit_ms, "");
        let program = Program::Virtioblkd(dir.join("start"));
        let first = Daemon::start(&program, &disk, dir.path());
        let mut rig = Self::of(dir, first);
        rig.disk = Some(disk);
        rig
    }

    /// Kills the one that serves.
    pub fn kill(&mut self) {
        match &mut self.first {
            Some(first) => first.kill(),
            None => {
                self.signal(libc::SIGKILL);
                self.wait_killed(self.pid);
            }
        }
    }

    /// Waits for the end of a process that gets, or has got, a SIGKILL.
    fn wait_killed(&self, pid: u32) {
        let mut status = 0;
        until("it is killed", || {
            // SAFETY: `status` is writable.
            let ended = unsafe { libc::waitpid(pid as i32, &mut status, libc::WNOHANG) };
            assert!(ended >= 0, "{}", std::io::Error::last_os_error());
            ended > 0
        });
        let signal = libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status));
        assert_eq!(signal, Some(libc::SIGKILL), "{}", self.log());
    }

    /// Upgrades, while `step` goes on, to a process that is killed at the `count`th pass of a place in its source.
    /// It has taken over when it comes there.
    pub fn upgrade_to_one_that_dies(&mut self, point: &str, count: u32, mut step: impl FnMut()) {
        const GOES_ON: &str = "upgrade: process ";
        self.program(&New::With(&format!(
            "VIRTIOBLKD_KILL_POINT={point}:{count}"
        )));
        self.signal(libc::SIGUSR2);
        let started = std::time::Instant::now();
        while !self.has_ended() {
            assert!(started.elapsed() < SOON, "no upgrade\n{}", self.log());
            step();
        }
        let log = self.log();
        let said = log.rsplit(GOES_ON).next().unwrap();
        let pid = said.split(' ').next().unwrap().parse().unwrap();
        self.program(&New::Good);
        self.first = None;
        self.pid = pid;
        let mut status: libc::siginfo_t;
        loop {
            // SAFETY: zeros are a valid value to be written to.
            status = unsafe { std::mem::zeroed() };
            let how = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            // SAFETY: `status` is writable; the process stays to be waited for.
            let result = unsafe { libc::waitid(libc::P_PID, pid, &mut status, how) };
            assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
            // SAFETY: waitid has written it, or left the zeros.
            if unsafe { status.si_pid() } != 0 {
                break;
            }
            assert!(started.elapsed() < SOON, "it lives\n{}", self.log());
            step();
        }
        self.wait_killed(pid);
    }

    /// Starts it again, with the command line of the first.
    pub fn start_again(&mut self) {
        let program = Program::Virtioblkd(self.dir.join("start"));
        let disk = self.disk.as_ref().expect("not started by hand");
        let daemon = Daemon::start(&program, disk, self.dir.path());
        self.pid = daemon.pid();
        self.first = Some(daemon);
        until("the pid file is there", || {
            self.pid_in_file() == Some(self.pid)
        });
    }

    /// A daemon with `arguments`, started by a shell after `before`, which gets `fds` (ours, its).
    pub fn start_by_hand(
        dir: TempDir,
        arguments: &[&str],
        before: &str,
        fds: Vec<(RawFd, RawFd)>,
    ) -> Self {
        Self::write_start(&dir, 60_000, before);
        let mut command = Command::new(dir.join("start"));
        let pid_file = dir.join("pid");
        command.args(arguments).arg("--pid-file").arg(&pid_file);
        // SAFETY: dup2 and fcntl may be called after a fork, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                for (ours, its) in &fds {
                    let failed = match ours == its {
                        true => libc::fcntl(*its, libc::F_SETFD, 0) < 0,
                        false => libc::dup2(*ours, *its) < 0,
                    };
                    if failed {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        let first = Daemon::spawn_command(&mut command, &dir.join("s"), dir.path());
        until("the pid file is there", || pid_file.exists());
        Self::of(dir, first)
    }

    fn write_start(dir: &TempDir, limit_ms: u64, before: &str) {
        // Those whose parents end become this process's children, so that it sees how they end.
        // SAFETY: prctl with integers only.
        let result = unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
        assert_eq!(result, 0);
        let program = dir.join("program");
        let text = format!(
            "export VIRTIOBLKD_UPGRADE_BINARY={} VIRTIOBLKD_UPGRADE_TIMEOUT_MS={limit_ms}\n\
             {before}\nexec {} \"$@\"",
            program.display(),
            binary(),
        );
        write_script(&dir.join("start"), &text);
    }

    fn of(dir: TempDir, first: Daemon) -> Self {
        let rig = Rig {
            pid: first.pid(),
            first: Some(first),
            disk: None,
            dir,
        };
        rig.program(&New::Good);
        rig
    }

    pub fn program(&self, new: &New) {
        let text = match new {
            New::Good => format!("exec {} \"$@\"", binary()),
            New::With(variable) => format!("{variable} exec {} \"$@\"", binary()),
            New::Script(text) => (*text).to_owned(),
        };
        write_script(&self.dir.join("program"), &text);
    }

    pub fn signal(&self, signal: i32) {
        kill(self.pid, signal);
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.dir.join("daemon.log")).unwrap()).into_owned()
    }

    pub fn count(&self, words: &str) -> usize {
        self.log().matches(words).count()
    }

    pub fn device(&self, options: DeviceOptions) -> Device {
        Device::start(&self.dir.join("s"), options).unwrap()
    }

    pub fn image(&self) -> PathBuf {
        self.dir.join("disk")
    }

    fn pid_in_file(&self) -> Option<u32> {
        fs::read_to_string(self.dir.join("pid"))
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    /// Has the process ended? It must not fail.
    pub fn has_ended(&mut self) -> bool {
        if let Some(first) = &mut self.first {
            let Some(status) = first.try_exit() else {
                return false;
            };
            assert!(status.success(), "it ended with {status}\n{}", self.log());
            return true;
        }
        let mut status = 0;
        // SAFETY: `status` is writable.
        let pid = unsafe { libc::waitpid(self.pid as i32, &mut status, libc::WNOHANG) };
        assert!(pid >= 0, "{}", std::io::Error::last_os_error());
        assert!(
            pid == 0 || status == 0,
            "it ended with {status}\n{}",
            self.log()
        );
        pid != 0
    }

    /// Takes note of the process that has taken over.
    pub fn adopt(&mut self) {
        let old = self.pid;
        until("the pid file names the new process", || {
            self.pid_in_file().is_some_and(|pid| pid != old)
        });
        self.pid = self.pid_in_file().unwrap();
        self.first = None;
    }

    /// Upgrades while `step` goes on.
    pub fn upgrade_under(&mut self, mut step: impl FnMut()) {
        self.signal(libc::SIGUSR2);
        self.upgrade_without_signal(&mut step);
    }

    /// Waits, while `step` goes on, for an upgrade that was asked for.
    pub fn upgrade_without_signal(&mut self, mut step: impl FnMut()) {
        let failures = self.count("the upgrade failed");
        let started = std::time::Instant::now();
        while !self.has_ended() {
            assert!(started.elapsed() < SOON, "no upgrade\n{}", self.log());
            assert_eq!(self.count("the upgrade failed"), failures, "{}", self.log());
            step();
        }
        self.adopt();
    }

    /// An upgrade that fails while `step` goes on; returns why.
    pub fn fail_under(&mut self, new: &New, mut step: impl FnMut()) -> String {
        const FAILED: &str = "the upgrade failed, and this process goes on: ";
        self.program(new);
        let before = self.count(FAILED);
        self.signal(libc::SIGUSR2);
        let started = std::time::Instant::now();
        while self.count(FAILED) == before {
            assert!(started.elapsed() < SOON, "it does not fail\n{}", self.log());
            step();
        }
        assert!(!self.has_ended());
        assert_eq!(self.pid_in_file(), Some(self.pid));
        let log = self.log();
        let why = log.rsplit(FAILED).next().unwrap();
        why.lines().next().unwrap().to_owned()
    }

    /// Ends it as an operator does; its files are gone.
    pub fn terminate(&mut self) {
        self.signal(libc::SIGTERM);
        until("it ends", || self.has_ended());
        assert!(!self.dir.join("pid").exists(), "the pid file is removed");
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if self.first.is_none() {
            kill(self.pid, libc::SIGKILL);
        }
        if std::thread::panicking() {
            eprintln!("--- log ---\n{}", self.log());
        }
    }
}

pub fn kill(pid: u32, signal: i32) {
    // SAFETY: kill takes plain integers.
    unsafe { libc::kill(pid as i32, signal) };
}

/// Random requests, and the disk as it must be.
pub struct Load {
    random: Random,
    pub model: Model,
    pending: Vec<Option<Pending>>,
    pub completed: u64,
}

const DEPTH: usize = 32;

pub fn options(queues: u16) -> DeviceOptions {
    DeviceOptions {
        queues,
        queue_size: 128,
        slots: SlotOptions {
            count: DEPTH as u16,
            data_len: 64 * SECTOR as u32,
            ..SlotOptions::default()
        },
        ..DeviceOptions::default()
    }
}

impl Load {
    pub fn new(seed: u64, contents: Vec<u8>, queues: u16) -> Self {
        Load {
            random: Random::new(seed),
            model: Model::new(contents),
            pending: vec![None; DEPTH * usize::from(queues)],
            completed: 0,
        }
    }

    fn submit(&mut self, queue: &mut frontend::BlkQueue) {
        let Some(token) = self.pending.iter().position(Option::is_none) else {
            return;
        };
        let len = 1 + self.random.below(64);
        let sector = self.random.below(self.model.sectors() - len);
        // No discards: they would leave more than one right answer.
        let kind = match self.random.below(20) {
            0 => Kind::Flush,
            1 => Kind::Zero,
            2..8 => Kind::Read,
            _ => Kind::Write,
        };
        let model = &mut self.model;
        let range = |_: &mut Random| model.take(sector, len);
        let Some(request) = Pending::pick(kind, &mut self.random, 1, range) else {
            return;
        };
        let data = request.data();
        queue.submit(request.op(&data), token as u64).unwrap();
        self.pending[token] = Some(request);
    }

    fn complete(&mut self, queue: &mut frontend::BlkQueue) -> bool {
        let Some(done) = queue.poll().unwrap() else {
            return false;
        };
        self.completed(queue, done);
        true
    }

    fn completed(&mut self, queue: &mut frontend::BlkQueue, done: frontend::Completion) {
        let request = self.pending[done.token as usize].take();
        let request = request.expect("completed once");
        let what = || format!("{request:?}");
        self.model.complete(queue, &request, done, &what);
        self.completed += 1;
    }

    /// Has requests in flight on every queue.
    pub fn begin(&mut self, device: &mut Device) {
        for queue in device.queues_mut() {
            while queue.slots_taken() < DEPTH / 2 {
                self.submit(queue);
            }
            queue.ring.publish();
        }
    }

    /// Keeps every queue full and takes what is completed.
    pub fn step(&mut self, device: &mut Device) {
        let mut any = false;
        for queue in device.queues_mut() {
            for _ in 0..8 {
                if queue.slots_taken() < DEPTH {
                    self.submit(queue);
                }
            }
            queue.ring.publish();
            while self.complete(queue) {
                any = true;
            }
        }
        if !any {
            std::thread::yield_now();
        }
    }

    /// Until `count` more are completed.
    pub fn go(&mut self, device: &mut Device, count: u64) {
        let until = self.completed + count;
        let started = std::time::Instant::now();
        while self.completed < until {
            assert!(started.elapsed() < SOON, "nothing is completed");
            self.step(device);
        }
    }

    /// Takes what is in flight, and reads all of the disk.
    pub fn finish(&mut self, device: &mut Device) {
        for queue in device.queues_mut() {
            while queue.slots_taken() > 0 {
                if !self.complete(queue) {
                    let done = queue.wait(SOON).unwrap();
                    self.completed(queue, done);
                }
            }
        }
        let what = || format!("after {} requests", self.completed);
        self.model.check_all(device, 64, &what);
    }
}

/// Looks all the time whether an image is locked, and tries to write to it with QEMU's tools.
pub struct Watchman {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<u64>>,
}

impl Watchman {
    pub fn watch(image: &Path, format: &'static str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let (over, path) = (stop.clone(), image.to_owned());
        threads.push(std::thread::spawn(move || {
            let file = File::open(&path).unwrap();
            let mut looks = 0;
            while !over.load(Ordering::Relaxed) {
                // Bytes for "used for writing" and "writing is not shared" (QEMU's block/file-posix.c).
                for byte in [101, 201] {
                    assert!(is_locked(&file, byte), "byte {byte} is free, look {looks}");
                }
                looks += 1;
                if looks % 16 == 0 {
                    std::thread::yield_now();
                }
            }
            looks
        }));
        let (over, path) = (stop.clone(), image.to_owned());
        threads.push(std::thread::spawn(move || {
            let path = path.to_str().unwrap();
            let mut looks = 0;
            while !over.load(Ordering::Relaxed) {
                assert!(
                    qemu::img(["info", "-U", "-f", format, path])
                        .status
                        .success()
                );
                let resized = qemu::img(["resize", "-f", format, path, "+1M"]);
                let said = String::from_utf8_lossy(&resized.stderr);
                assert!(!resized.status.success() && said.contains("lock"), "{said}");
                looks += 1;
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            looks
        }));
        Watchman { stop, threads }
    }

    pub fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            assert!(thread.join().unwrap() > 0);
        }
    }
}

fn is_locked(file: &File, byte: i64) -> bool {
    // SAFETY: zeros are a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = byte;
    lock.l_len = 1;
    // SAFETY: the structure lives through the call, which writes to it.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    assert_eq!(result, 0);
    i32::from(lock.l_type) != libc::F_UNLCK
}
