//! Live migration between two daemons on one locked image, with this test as the VMM: requests run throughout,
//! memory is copied by what the dirty log says, and the guest knows what its disk must hold.

#[path = "../common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{SOON, program, until};
use vhost_user_frontend as frontend;

use frontend::guest::Random;
use frontend::guest::vm::{DISK, Log, QUEUE_SIZE, Vm, Vmm, copy_of, specs};
use frontend::protocol::feature;
use frontend::{Daemon, Device, DeviceOptions, Disk, Program, TempDir, process};

/// An overlay that writes must copy into, and what it shows.
fn image(dir: &TempDir) -> (PathBuf, Vec<u8>) {
    let (base, overlay) = (dir.join("base.raw"), dir.join("overlay.qcow2"));
    let contents = Random::new(7).bytes(DISK as usize);
    std::fs::write(&base, &contents).unwrap();
    qemu_img(
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b"],
        &[&base, &overlay],
    );
    (overlay, contents)
}

fn qemu_img(args: &[&str], paths: &[&Path]) -> bool {
    let mut command = Command::new("qemu-img");
    command.args(args).args(paths);
    let output = command.output().unwrap();
    output.status.success()
}

/// Whether nobody holds the image: `qemu-img` opens it as another user of it would.
fn is_free(image: &Path) -> bool {
    qemu_img(&["info"], &[image])
}

/// A daemon in a directory of its own.
struct Host {
    daemon: Daemon,
    _dir: TempDir,
}

impl Host {
    fn new(image: &Path) -> Self {
        Self::with(&program(), image)
    }

    fn with(program: &Program, image: &Path) -> Self {
        let dir = TempDir::new();
        let disk = Disk::new(image, "qcow2")
            .queues(2)
            .workers(2)
            .queue_size(QUEUE_SIZE);
        let daemon = Daemon::start(program, &disk, dir.path());
        Self { daemon, _dir: dir }
    }

    /// A daemon that a shell has prepared with `words`.
    fn prepared(dir: &TempDir, image: &Path, words: &str) -> Self {
        let Program::Virtioblkd(path) = program() else {
            panic!("a test of virtioblkd");
        };
        let script = dir.join("prepared");
        let text = format!("#!/bin/sh\n{words}\nexec '{}' \"$@\"\n", path.display());
        std::fs::write(&script, text).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&script, mode).unwrap();
        Self::with(&Program::Virtioblkd(script), image)
    }

    fn connect(&self, vm: &Vm) -> Vmm {
        Vmm::connect(self.daemon.socket(), vm)
    }

    /// As a source: with the rings started and a region for what is in flight.
    fn boot(&self, vm: &mut Vm) -> Vmm {
        Vmm::boot(self.daemon.socket(), vm)
    }
}

#[test]
fn round_trips_on_a_locked_image_lose_nothing() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 1);
    let hosts = [Host::new(&image), Host::new(&image)];
    let mut source = hosts[0].boot(&mut vm);
    for trip in 1..=4 {
        vm.run(300);
        // The target has the disk open, and does not know its metadata.
        let target = hosts[trip % 2].connect(&vm);
        let log = Log::new();
        let copy = source.copy_while_running(&mut vm, &log, 4);
        assert!(!is_free(&image));
        let bases = source.stop();
        assert!(is_free(&image), "released before the last answer");
        vm.collect();
        vm.copy(log.take(), &copy);
        assert_eq!(vm.stale(&copy), [], "trip {trip}");
        target.take_over(&mut vm, copy, bases);
        // The source's connection stays open until QEMU ends.
        vm.run(300);
        drop(source);
        source = target;
    }
    vm.check_disk();
    source.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn without_marks_pages_are_stale() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 2);
    let host = Host::prepared(&dir, &image, "export VIRTIOBLKD_MUTE_DIRTY_LOG=1");
    let source = host.boot(&mut vm);
    let log = Log::new();
    let copy = source.copy_while_running(&mut vm, &log, 4);
    source.stop();
    vm.copy(log.take(), &copy);
    // Used rings, data and status bytes alike: 6 pages of rings, 32 slots with 5 each.
    let stale = vm.stale(&copy).len();
    if cfg!(debug_assertions) {
        assert!(stale > 100, "{stale} stale pages");
    }
}

#[test]
fn cancelled_midway_the_source_goes_on_and_marks_nothing_more() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 3);
    let (host, other) = (Host::new(&image), Host::new(&image));
    let source = host.boot(&mut vm);
    for _ in 0..3 {
        let target = other.connect(&vm);
        let log = Log::new();
        let copy = source.copy_while_running(&mut vm, &log, 4);
        source.set_logging(&vm, false);
        // All marks were in before that was answered.
        log.take();
        vm.run(200);
        assert_eq!(log.take(), []);
        assert!(!vm.stale(&copy).is_empty());
        // QEMU at the target ends, with no ring ever started.
        drop(target);
    }
    vm.check_disk();
    source.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn the_source_takes_the_disk_back_when_the_target_fails() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 4);
    let host = Host::new(&image);
    let source = host.boot(&mut vm);
    for dies in [false, true, false] {
        let mut other = Host::new(&image);
        let target = other.connect(&vm);
        let log = Log::new();
        let copy = source.copy_while_running(&mut vm, &log, 4);
        let bases = source.stop();
        vm.collect();
        vm.copy(log.take(), &copy);
        assert_eq!(vm.stale(&copy), []);
        if dies {
            other.daemon.kill();
        }
        drop(target);
        // As when a VM that was paused goes on: the rings start where they stopped.
        source.start(&mut vm, bases, true).unwrap();
        assert!(!is_free(&image));
        vm.run(200);
        source.set_logging(&vm, false);
        vm.run(200);
    }
    vm.check_disk();
    source.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn the_source_takes_the_disk_back_from_a_target_that_dies_with_it() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 5);
    let (host, mut other) = (Host::new(&image), Host::new(&image));
    let source = host.boot(&mut vm);
    vm.run(300);
    vm.drain();
    let bases = source.stop();
    // The target has taken the image, and the VM has not run there.
    let target = other.connect(&vm);
    target.start(&mut vm, bases, false).unwrap();
    assert!(!is_free(&image));
    other.daemon.kill();
    source.start(&mut vm, bases, false).unwrap();
    vm.run(300);
    vm.check_disk();
    source.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn a_target_that_comes_a_moment_early_waits_for_the_lock() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 6);
    let (host, other) = (Host::new(&image), Host::new(&image));
    let source = host.boot(&mut vm);
    vm.run(300);
    vm.drain();
    let target = other.connect(&vm);
    let bases = [0, 1].map(|queue| vm.available(queue));
    std::thread::scope(|scope| {
        let begun = scope.spawn(|| target.start(&mut vm, bases, false));
        until("the target has tried", || {
            other.daemon.log().contains("waiting up to")
        });
        assert_eq!(source.stop(), bases);
        begun.join().unwrap().unwrap();
    });
    vm.run(300);
    vm.check_disk();
    target.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn a_target_sees_what_became_of_the_image_since_it_opened_it() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 7);
    let (host, other) = (Host::new(&image), Host::new(&image));
    let source = host.boot(&mut vm);
    let target = other.connect(&vm);
    vm.run(1000);
    vm.drain();
    let bases = source.stop();
    // A new L1 table, every cluster shared, and another backing file.
    assert!(qemu_img(&["snapshot", "-c", "s"], &[&image]));
    let base = dir.join("other.raw");
    std::fs::copy(dir.join("base.raw"), &base).unwrap();
    std::fs::remove_file(dir.join("base.raw")).unwrap();
    assert!(qemu_img(
        &["rebase", "-u", "-F", "raw", "-b"],
        &[&base, &image]
    ));
    target.start(&mut vm, bases, false).unwrap();
    vm.run(1000);
    vm.check_disk();
    target.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

/// Bounds the length of files that a process writes, as a file system without space would.
fn limit_files(pid: u32, bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: one valid rlimit, and nothing asked for.
    let done = unsafe {
        libc::prlimit(
            pid as i32,
            libc::RLIMIT_FSIZE,
            &raw const limit,
            std::ptr::null_mut(),
        )
    };
    assert_eq!(done, 0);
}

#[test]
fn a_stop_that_can_not_flush_is_not_answered_and_keeps_the_lock() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 8);
    let host = Host::prepared(&dir, &image, "trap '' XFSZ");
    // New clusters, whose mappings are in memory only.
    vm.flushes = false;
    let source = host.boot(&mut vm);
    vm.run(30);
    vm.drain();
    let bases = [0, 1].map(|queue| vm.available(queue));
    limit_files(host.daemon.pid(), 4096);
    let answers = [0, 1].map(|index| source.client.get_vring_base(index));
    assert!(
        answers.iter().any(Result::is_err),
        "{answers:?}\n{}",
        host.daemon.log()
    );
    assert!(source.client.closed_within(SOON).unwrap());
    until("it has tried again", || {
        host.daemon.log().matches("stays locked").count() >= 2
    });
    assert!(!is_free(&image), "nobody goes on with what would be lost");
    // There is space again: a VMM that comes back finds everything.
    limit_files(host.daemon.pid(), libc::RLIM_INFINITY);
    let source = host.connect(&vm);
    source.start(&mut vm, bases, false).unwrap();
    vm.run(500);
    vm.check_disk();
    source.stop();
    assert!(is_free(&image));
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn nothing_stays_behind_of_many_migrations() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 10);
    let host = Host::new(&image);
    let mut counts = Vec::new();
    for _ in 0..4 {
        let source = host.boot(&mut vm);
        source.log_on(&vm, &Log::new());
        vm.run(100);
        vm.drain();
        source.stop();
        drop(source);
        vm.reset();
        let pid = host.daemon.pid();
        until("the daemon has seen the end", || {
            host.daemon.log().matches("the VMM is gone").count() > counts.len()
        });
        counts.push((
            process::fd_count(pid).unwrap(),
            process::mappings_of(pid, "memfd").unwrap(),
        ));
    }
    assert_eq!(counts[1], counts[3]);
    assert_eq!(counts[3].1, 0, "memory of a VMM that is gone");
}

/// Offset of the write cache's mode in the configuration space.
const WRITE_CACHE: u32 = 32;

#[test]
fn the_write_cache_mode_that_the_guest_chose_goes_along() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 11);
    let hosts = [Host::new(&image), Host::new(&image), Host::new(&image)];
    let mode = |vmm: &Vmm| vmm.client.get_config(WRITE_CACHE, 1).unwrap()[0];
    let source = hosts[0].boot(&mut vm);
    assert_eq!(mode(&source), 1);
    source.client.set_config(WRITE_CACHE, 0, &[0]).unwrap();
    vm.run(100);
    vm.drain();
    let bases = source.stop();

    // A VMM that takes the configuration space along.
    let all = source.client.get_config(0, 60).unwrap();
    let target = hosts[1].connect(&vm);
    assert_eq!(mode(&target), 1);
    target.client.set_config(0, 1, &all).unwrap();
    assert_eq!(mode(&target), 0);
    target.start(&mut vm, bases, false).unwrap();
    vm.run(100);
    vm.drain();
    let bases = target.stop();

    // One that asks for the device's state, through pipes of its own.
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let offered = target.client.set_device_state_fd(false, writer.as_raw_fd());
    assert!(offered.unwrap().is_none());
    drop(writer);
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    target.client.check_device_state().unwrap();
    let last = hosts[2].connect(&vm);
    assert_eq!(mode(&last), 1);
    let (reader, mut writer) = UnixStream::pair().unwrap();
    last.client
        .set_device_state_fd(true, reader.as_raw_fd())
        .unwrap();
    writer.write_all(&state).unwrap();
    drop(writer);
    last.client.check_device_state().unwrap();
    assert_eq!(mode(&last), 0);
    last.start(&mut vm, bases, false).unwrap();
    vm.run(100);
    vm.check_disk();
    last.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}

#[test]
fn copying_that_is_put_off_is_done_while_writes_are_logged() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let host = Host::new(&image);
    let mut options = DeviceOptions {
        memory: specs(),
        ..DeviceOptions::default()
    };
    options.slots.count = 4;
    let mut device = Device::start(host.daemon.socket(), options).unwrap();
    // What a write of the first sector of a cluster leaves to be copied.
    const CLUSTER: usize = 64 << 10;
    let copied = |cluster: usize| {
        let around = &contents[cluster * CLUSTER + 512..][..512];
        let file = std::fs::read(&image).unwrap();
        file.chunks(512).any(|sector| sector == around)
    };
    let write = |device: &mut Device, cluster: usize| {
        let sector = (cluster * CLUSTER / 512) as u64;
        device.write(sector, &[0x5a; 512]).unwrap();
    };
    write(&mut device, 3);
    assert!(!copied(3), "put off");
    let log = Log::new();
    let client = device.client().unwrap();
    client.set_log_base(log.size(), 0, log.fd()).unwrap();
    client
        .set_features(device.features() | feature::LOG_ALL)
        .unwrap();
    until("what was put off is done", || copied(3));
    write(&mut device, 5);
    assert!(copied(5), "done at once");
    let client = device.client().unwrap();
    client.set_features(device.features()).unwrap();
    // A turn of the worker's later.
    device.get_id().unwrap();
    write(&mut device, 7);
    assert!(!copied(7), "put off again");
}

#[cfg(debug_assertions)]
#[test]
fn a_source_that_is_killed_while_it_hands_over_leaves_all_that_was_completed() {
    for point in ["stop-flushed", "stop-released"] {
        let dir = TempDir::new();
        let (image, contents) = image(&dir);
        let mut vm = Vm::new(contents, 12);
        vm.flushes = false;
        let words = format!("export VIRTIOBLKD_KILL_POINT={point}:1");
        let (mut host, other) = (Host::prepared(&dir, &image, &words), Host::new(&image));
        let source = host.boot(&mut vm);
        let target = other.connect(&vm);
        vm.run(100);
        vm.drain();
        let bases = [0, 1].map(|queue| vm.available(queue));
        let answers = [0, 1].map(|index| source.client.get_vring_base(index));
        assert!(answers.iter().any(Result::is_err), "{point}");
        host.daemon.kill();
        target.start(&mut vm, bases, false).unwrap();
        vm.run(100);
        vm.check_disk();
        target.stop();
        assert!(
            qemu_img(&["check", "-q", "-r", "leaks"], &[&image]),
            "{point}"
        );
    }
}

#[test]
fn requests_in_flight_are_taken_along_to_the_target() {
    let dir = TempDir::new();
    let (image, contents) = image(&dir);
    let mut vm = Vm::new(contents, 9);
    let hosts = [Host::new(&image), Host::new(&image)];
    let mut source = hosts[0].connect(&vm);
    let mut region = source.new_inflight();
    source.client.set_inflight_fd(&region).unwrap();
    source.start(&mut vm, [0, 0], false).unwrap();
    let mut taken_along = 0;
    for trip in 1..=8 {
        let target = hosts[trip % 2].connect(&vm);
        let log = Log::new();
        let copy = source.copy_while_running(&mut vm, &log, 4);
        let bases = source.stop_undrained();
        assert!(is_free(&image));
        // What completed is shown; the rest is neither lost nor done.
        vm.collect();
        taken_along += vm.running();
        vm.copy(log.take(), &copy);
        let undefined = vm.in_flight_pages();
        let stale = vm.stale(&copy).into_iter();
        assert_eq!(
            stale.filter(|p| !undefined.contains(p)).collect::<Vec<_>>(),
            []
        );
        vm.move_to(copy);
        region = copy_of(&region);
        target.client.set_mem_table(&vm.memory).unwrap();
        target.client.set_inflight_fd(&region).unwrap();
        target.start(&mut vm, bases, false).unwrap();
        vm.drain();
        source = target;
    }
    assert!(taken_along > 0, "nothing was in flight");
    vm.check_disk();
    source.stop();
    assert!(qemu_img(&["check", "-q"], &[&image]));
}
