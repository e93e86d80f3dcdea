//! Live migration between two daemons on one locked image, with this test as the VMM: requests run throughout,
//! memory is copied by what the dirty log says, and the guest knows what its disk must hold.

#[path = "../common/mod.rs"]
mod common;
mod vm;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Random, program};
use vhost_user_frontend as frontend;

use frontend::{Daemon, Disk, Memory, Program, TempDir};
use vm::{DISK, Log, Vm, Vmm};

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
            .queue_size(512);
        let daemon = Daemon::start(program, &disk, dir.path());
        Self { daemon, _dir: dir }
    }

    fn connect(&self, vm: &Vm) -> Vmm {
        Vmm::connect(self.daemon.socket(), vm, 0)
    }

    /// As a source: with the rings started and a region for what is in flight.
    fn boot(&self, vm: &mut Vm) -> Vmm {
        let vmm = self.connect(vm);
        vmm.client.set_inflight_fd(&vmm.new_inflight()).unwrap();
        vmm.start(vm, [0, 0], false).unwrap();
        vmm
    }
}

/// Everything of a migration until the rings of the source are about to stop: the copy.
fn copy_while_running(vm: &mut Vm, source: &Vmm, log: &Log) -> Memory {
    let copy = vm.new_memory();
    source.log_on(vm, log);
    vm.copy(vm.pages(), &copy);
    for _ in 0..4 {
        vm.run(200);
        vm.copy(log.take(), &copy);
    }
    vm.run(200);
    vm.submit();
    copy
}

/// The target's side of the switchover.
fn take_over(vm: &mut Vm, target: &Vmm, copy: Memory, bases: [u32; 2]) {
    vm.move_to(copy);
    target.client.set_mem_table(&vm.memory).unwrap();
    target
        .client
        .set_inflight_fd(&target.new_inflight())
        .unwrap();
    target.start(vm, bases, false).unwrap();
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
        let copy = copy_while_running(&mut vm, &source, &log);
        assert!(!is_free(&image));
        let bases = source.stop();
        assert!(is_free(&image), "released before the last answer");
        vm.copy(log.take(), &copy);
        assert_eq!(vm.stale(&copy), [], "trip {trip}");
        take_over(&mut vm, &target, copy, bases);
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
    let Program::Virtioblkd(path) = program() else {
        return;
    };
    let muted = dir.join("muted");
    let script = format!(
        "#!/bin/sh\nVIRTIOBLKD_MUTE_DIRTY_LOG=1 exec '{}' \"$@\"\n",
        path.display()
    );
    std::fs::write(&muted, script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&muted, mode).unwrap();
    let host = Host::with(&Program::Virtioblkd(muted), &image);
    let source = host.boot(&mut vm);
    let log = Log::new();
    let copy = copy_while_running(&mut vm, &source, &log);
    source.stop();
    vm.copy(log.take(), &copy);
    // Used rings, data and status bytes alike: 4 pages of rings, 32 slots with 5 each.
    let stale = vm.stale(&copy).len();
    if cfg!(debug_assertions) {
        assert!(stale > 100, "{stale} stale pages");
    }
}
