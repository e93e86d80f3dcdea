//! Hot upgrade: the daemon is replaced while a VM uses its disk, again and again, also by programs that are none.

#[path = "../common/mod.rs"]
mod common;
mod crash;
mod migration;
mod resize;
mod rig;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};

use common::until;
use rig::{Load, MIB, New, Rig, Watchman, options};
use vhost_user_frontend as frontend;

use frontend::guest::Random;
use frontend::{Client, Device, DeviceOptions, Disk, TempDir, process, qemu};

/// A program that speaks something else. (Only bash can redirect to descriptors above 9.)
const NONSENSE: &str =
    "exec bash -c 'echo a program of another kind >&$VIRTIOBLKD_UPGRADE_FD; exec sleep 1000'";

/// A directory whose files are in memory.
fn in_memory() -> TempDir {
    TempDir::new_in(std::path::Path::new("/dev/shm"))
}

/// An overlay over a base with data in every other stretch of 40 KiB; returns what it reads as.
fn make_overlay(dir: &TempDir, size: u64) -> Vec<u8> {
    let mut contents = vec![0; size as usize];
    let mut random = Random::new(5);
    for stretch in contents.chunks_mut(40 << 10).step_by(2) {
        random.fill(stretch);
    }
    let base = dir.join("base");
    std::fs::write(&base, &contents).unwrap();
    qemu::create_overlay(&dir.join("disk"), size, &base, "raw", "");
    contents
}

/// Two queues, of packed rings or of split ones.
fn packed(packed: bool) -> DeviceOptions {
    DeviceOptions {
        packed,
        ..options(2)
    }
}

fn raw(dir: TempDir, size: u64, limit_ms: u64) -> Rig {
    std::fs::write(dir.join("disk"), vec![0; size as usize]).unwrap();
    let disk = Disk::new(dir.join("disk"), "raw");
    Rig::start(dir, &disk, limit_ms)
}

fn twenty_upgrades(dir: TempDir, disk: &Disk, contents: Vec<u8>, options: DeviceOptions) {
    let format: &'static str = match disk.format.as_str() {
        "raw" => "raw",
        _ => "qcow2",
    };
    let mut rig = Rig::start(dir, disk, 60_000);
    let mut device = rig.device(options);
    assert!(device.inflight().is_some());
    let mut load = Load::new(1, contents, 2);
    load.go(&mut device, 200);
    let watchman = Watchman::watch(&rig.image(), format);
    let resources = |pid| {
        let memory = process::mappings_of(pid, "guest-memory").unwrap();
        (process::fd_count(pid).unwrap(), memory)
    };
    let first = resources(rig.pid);
    for round in 0..20 {
        rig.upgrade_under(|| load.step(&mut device));
        load.go(&mut device, 200);
        // The same connection is spoken on.
        assert_eq!(device.read_config().unwrap(), device.config());
        assert_eq!(resources(rig.pid), first, "round {round}");
    }
    watchman.end();
    for line in rig.log().lines().filter(|line| line.contains("upgraded: ")) {
        println!("{line}");
    }
    load.finish(&mut device);
    assert!(rig.dir.join("s").exists());
    assert_eq!(rig.count("a VMM has connected"), 1);
    assert_eq!(rig.count("the VMM is gone"), 0);
    device.shut_down().unwrap();
    rig.terminate();
    assert!(!rig.dir.join("s").exists(), "the socket file is removed");
    if format == "qcow2" {
        qemu::check_clean(&rig.image());
    }
    let dump = rig.dir.join("model");
    std::fs::write(&dump, &load.model.bytes).unwrap();
    qemu::assert_equal(&rig.image(), format, &dump, "raw");
}

#[test]
fn twenty_upgrades_of_a_qcow2_overlay_under_load() {
    let dir = in_memory();
    let contents = make_overlay(&dir, 32 * MIB);
    let disk = Disk::new(dir.join("disk"), "qcow2").queues(2).workers(2);
    twenty_upgrades(dir, &disk, contents, options(2));
}

#[test]
fn twenty_upgrades_with_packed_rings_and_an_inflight_region() {
    let dir = in_memory();
    let contents = make_overlay(&dir, 32 * MIB);
    let disk = Disk::new(dir.join("disk"), "qcow2").queues(2).workers(2);
    twenty_upgrades(dir, &disk, contents, packed(true));
}

#[test]
fn twenty_upgrades_of_a_raw_file_under_load() {
    let dir = in_memory();
    std::fs::write(dir.join("disk"), vec![0; 16 << 20]).unwrap();
    let disk = Disk::new(dir.join("disk"), "raw").queues(2);
    twenty_upgrades(dir, &disk, vec![0; 16 << 20], options(2));
}

#[test]
fn program_that_does_not_take_over_changes_nothing() {
    let dir = in_memory();
    let contents = make_overlay(&dir, 32 * MIB);
    let disk = Disk::new(dir.join("disk"), "qcow2").queues(2).workers(2);
    let mut rig = Rig::start(dir, &disk, 60_000);
    let mut device = rig.device(options(2));
    let mut load = Load::new(2, contents, 2);
    load.go(&mut device, 200);
    let watchman = Watchman::watch(&rig.image(), "qcow2");
    let mut resources = None;
    let programs = [
        (New::Script("exit 0"), "has ended"),
        (New::Script("exit 3"), "has ended"),
        (New::Script(NONSENSE), "no message"),
        (
            New::With("VIRTIOBLKD_UPGRADE_VERSION=77"),
            "version 1 of the upgrade's messages, this one version 77",
        ),
        (
            New::With("VIRTIOBLKD_KILL_POINT=upgrade-ready:1"),
            "has ended",
        ),
        (
            New::With("VIRTIOBLKD_KILL_POINT=upgrade-mapped:1"),
            "has ended",
        ),
        (
            New::With("VIRTIOBLKD_KILL_POINT=upgrade-stopped:1"),
            "has ended",
        ),
        (
            New::With("VIRTIOBLKD_KILL_POINT=upgrade-started:1"),
            "has ended",
        ),
    ];
    for (program, words) in programs {
        let why = rig.fail_under(&program, || load.step(&mut device));
        assert!(why.contains(words), "{why}");
        load.go(&mut device, 200);
        assert_eq!(device.read_config().unwrap(), device.config());
        let fds = process::fd_count(rig.pid).unwrap();
        let memory = process::mappings_of(rig.pid, "guest-memory").unwrap();
        assert_eq!(
            *resources.get_or_insert((fds, memory)),
            (fds, memory),
            "{why}"
        );
    }
    std::fs::remove_file(rig.dir.join("program")).unwrap();
    // And after all that, one that works.
    rig.program(&New::Good);
    rig.upgrade_under(|| load.step(&mut device));
    watchman.end();
    load.finish(&mut device);
    device.shut_down().unwrap();
    rig.terminate();
    qemu::check_clean(&rig.image());
}

#[test]
fn program_that_hangs_or_is_missing_changes_nothing() {
    let mut rig = raw(TempDir::new(), 4 * MIB, 500);
    let mut device = rig.device(options(1));
    let mut load = Load::new(3, vec![0; 4 << 20], 1);
    let hangs = New::Script("echo $$ >\"$(dirname \"$0\")/hung\"; exec sleep 1000");
    let why = rig.fail_under(&hangs, || load.step(&mut device));
    assert!(why.contains("did not answer in time"), "{why}");
    let hung = std::fs::read_to_string(rig.dir.join("hung")).unwrap();
    let proc = std::path::PathBuf::from("/proc").join(hung.trim());
    assert!(!proc.exists(), "the process that hung is gone");
    rig.program(&New::Good);
    std::fs::rename(rig.dir.join("program"), rig.dir.join("elsewhere")).unwrap();
    rig.signal(libc::SIGUSR2);
    until("it fails", || rig.count("the upgrade failed") == 2);
    assert!(rig.log().contains("No such file"), "{}", rig.log());
    load.finish(&mut device);
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn program_that_would_serve_another_disk_is_refused_by_name() {
    let mut rig = raw(TempDir::new(), 4 * MIB, 60_000);
    let mut device = rig.device(options(1));
    let binary = env!("CARGO_BIN_EXE_virtioblkd");
    for (change, words) in [
        ("--num-queues 4 \"$@\"", "error"),
        (
            "$(echo \"$@\" | sed 's/--num-queues 1/--num-queues 2/')",
            "number of queues 1 would become 2",
        ),
        ("\"$@\" --queue-size 128", "queue size"),
        ("\"$@\" --read-only", "read-only"),
        ("\"$@\" --name other", "does not have it"),
        (
            "$(echo \"$@\" | sed 's,/s ,/t ,')",
            "knows it somewhere else",
        ),
    ] {
        let script = format!("exec {binary} {change}");
        let why = rig.fail_under(&New::Script(&script), || {});
        device.write(0, &[7; 512]).unwrap();
        let log = rig.log();
        assert!(
            why.contains(words) || log.contains(words),
            "{words}: {why}\n{log}"
        );
        assert!(rig.dir.join("s").exists() && !rig.dir.join("t").exists());
    }
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn sigterm_during_an_upgrade_ends_both() {
    let mut rig = raw(TempDir::new(), 4 * MIB, 60_000);
    let mut device = rig.device(options(1));
    device.write(0, &[9; 512]).unwrap();
    rig.program(&New::Script(
        "echo $$ >\"$(dirname \"$0\")/hung\"; exec sleep 1000",
    ));
    rig.signal(libc::SIGUSR2);
    let hung = rig.dir.join("hung");
    until("the new one runs", || {
        std::fs::read_to_string(&hung).is_ok_and(|pid| pid.ends_with('\n'))
    });
    rig.terminate();
    let pid = std::fs::read_to_string(&hung).unwrap();
    assert!(!std::path::PathBuf::from("/proc").join(pid.trim()).exists());
}

#[test]
fn second_signal_while_an_upgrade_is_under_way_is_nothing() {
    let mut rig = raw(TempDir::new(), 4 * MIB, 60_000);
    let mut device = rig.device(options(1));
    let mut load = Load::new(4, vec![0; 4 << 20], 1);
    let gate = rig.dir.join("gate");
    let waits = format!(
        "while [ ! -e {} ]; do sleep 0.01; done; exec {} \"$@\"",
        gate.display(),
        env!("CARGO_BIN_EXE_virtioblkd")
    );
    rig.program(&New::Script(&waits));
    rig.signal(libc::SIGUSR2);
    until("it has begun", || rig.count("upgrade: starting") == 1);
    rig.signal(libc::SIGUSR2);
    until("it is noticed", || {
        rig.count("one is under way already") == 1
    });
    std::fs::write(&gate, "").unwrap();
    let old = rig.pid;
    rig.signal(0);
    rig.upgrade_without_signal(|| load.step(&mut device));
    assert_ne!(rig.pid, old);
    assert_eq!(rig.count("upgraded: "), 1);
    load.finish(&mut device);
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn upgrade_without_a_vmm_and_between_two() {
    let mut rig = raw(TempDir::new(), 4 * MIB, 60_000);
    rig.upgrade_under(|| {});
    let mut device = rig.device(options(1));
    device.write(8, &[3; 512]).unwrap();
    device.shut_down().unwrap();
    rig.upgrade_under(|| {});
    let mut device = rig.device(options(1));
    assert_eq!(device.read(8, 512).unwrap(), [3; 512]);
    // Connected, with its ring stopped; it goes on after the upgrade.
    let base = device.stop_queue(0).unwrap();
    rig.upgrade_under(|| {});
    device.start_queue(0, base).unwrap();
    assert_eq!(device.read(8, 512).unwrap(), [3; 512]);
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn ring_that_is_disabled_stays_so_and_the_write_cache_stays_as_it_was_set() {
    let dir = TempDir::new();
    std::fs::write(dir.join("disk"), vec![0; 4 << 20]).unwrap();
    let disk = Disk::new(dir.join("disk"), "raw").queues(2);
    let mut rig = Rig::start(dir, &disk, 60_000);
    let mut device = rig.device(options(2));
    let client = device.client().unwrap();
    client
        .set_config(frontend::blk::CONFIG_WRITEBACK, 0, &[0])
        .unwrap();
    client.set_vring_enable(0, false).unwrap();
    rig.upgrade_under(|| {});
    assert_eq!(device.read_config().unwrap().writeback, 0);
    let queue = device.queue(0);
    let write = frontend::Op::Write {
        sector: 0,
        data: &[5; 512],
    };
    queue.submit(write, 0).unwrap();
    queue.ring.publish();
    queue.ring.kick();
    // The worker of both rings has its chances to look at the first one.
    for _ in 0..100 {
        let read = frontend::Op::Read {
            sector: 8,
            len: 512,
        };
        device.run_on(1, read).unwrap();
    }
    assert!(
        device.queue(0).poll().unwrap().is_none(),
        "a disabled ring was served"
    );
    device.client().unwrap().set_vring_enable(0, true).unwrap();
    let done = device.queue(0).wait(common::SOON).unwrap();
    device.queue(0).release(done);
    assert_eq!(common::file_bytes(&rig.image(), 0, 512), [5; 512]);
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn vmm_that_hangs_up_during_an_upgrade_is_followed_by_the_next() {
    let mut rig = raw(TempDir::new(), 4 * MIB, 60_000);
    for round in 0..8u8 {
        let mut device = rig.device(options(1));
        let mut load = Load::new(
            round.into(),
            common::file_bytes(&rig.image(), 0, 4 << 20),
            1,
        );
        load.go(&mut device, 50);
        let mut device = Some(device);
        let mut steps = u32::from(round) * 40;
        rig.upgrade_under(|| {
            if let Some(mut here) = device.take() {
                load.step(&mut here);
                steps = steps.saturating_sub(1);
                if steps > 0 {
                    device = Some(here);
                }
            }
        });
        drop(device);
        let pid = rig.pid;
        until("memory is let go", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
        });
    }
    let mut device = rig.device(DeviceOptions::default());
    device.write(0, &[1; 512]).unwrap();
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn keys_and_sockets_that_were_given_by_descriptor_are_handed_on() {
    let dir = TempDir::new();
    let key = dir.join("key");
    std::fs::write(&key, "open sesame").unwrap();
    let image = dir.join("disk");
    let secret = format!("secret,id=s,file={}", key.display());
    let luks = "key-secret=s,iter-time=1";
    let path = image.to_str().unwrap();
    qemu::img_ok([
        "create", "-q", "--object", &secret, "-f", "luks", "-o", luks, path, "4M",
    ]);
    let listener = UnixListener::bind(dir.join("s")).unwrap();
    // What systemd would do, and a key that can be read once.
    let before = format!(
        "export LISTEN_PID=$$ LISTEN_FDS=1\nexec 7<{0}\nrm {0}",
        key.display()
    );
    let arguments = ["--blk-file", path, "--format", "luks", "--key-fd", "7"];
    let fds = vec![(listener.as_raw_fd(), 3)];
    let mut rig = Rig::start_by_hand(dir, &arguments, &before, fds);
    // Only the daemon has it from now on.
    drop(listener);
    let mut device = rig.device(options(1));
    device.write(8, &[3; 512]).unwrap();
    for _ in 0..2 {
        rig.upgrade_under(|| {});
        assert_eq!(device.read(8, 512).unwrap(), [3; 512]);
    }
    device.shut_down().unwrap();
    let mut device = rig.device(options(1));
    assert_eq!(device.read(8, 512).unwrap(), [3; 512]);
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn connection_that_was_given_by_descriptor_is_handed_on() {
    let dir = TempDir::new();
    let image = dir.join("disk");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let arguments = [
        "--blk-file",
        image.to_str().unwrap(),
        "--format",
        "raw",
        "--fd",
        "9",
    ];
    let mut rig = Rig::start_by_hand(dir, &arguments, "", vec![(theirs.as_raw_fd(), 9)]);
    drop(theirs);
    let client = Client::from_stream(ours).unwrap();
    for _ in 0..3 {
        let features = client.get_features().unwrap();
        client.set_features(features).unwrap();
        rig.upgrade_under(|| {});
    }
    // The one connection is over, and with it the process.
    drop(client);
    until("it ends", || rig.has_ended());
}

#[test]
fn disks_are_taken_over_together_with_and_without_a_vmm() {
    let dir = in_memory();
    let mut text = format!("pid-file = {:?}\n[workers]\ncount = 2\n", dir.join("pid"));
    for name in ["a", "b", "c"] {
        std::fs::write(dir.join(name), vec![0; 4 << 20]).unwrap();
        text += &format!(
            "[[disk]]\nname = {name:?}\nblk-file = {:?}\nformat = \"raw\"\nsocket-path = {:?}\n",
            dir.join(name),
            dir.join(format!("{name}.s")),
        );
    }
    let config = dir.join("config.toml");
    std::fs::write(&config, text).unwrap();
    let arguments = ["--config", config.to_str().unwrap()];
    let mut rig = Rig::start_by_hand(dir, &arguments, "", Vec::new());
    let start = |rig: &Rig, name: &str| {
        Device::start(&rig.dir.join(format!("{name}.s")), options(1)).unwrap()
    };
    let mut a = start(&rig, "a");
    let mut b = start(&rig, "b");
    let mut loads = [1, 2].map(|seed| Load::new(seed, vec![0; 4 << 20], 1));
    for _ in 0..5 {
        rig.upgrade_under(|| {
            loads[0].step(&mut a);
            loads[1].step(&mut b);
        });
        loads[0].go(&mut a, 50);
        loads[1].go(&mut b, 50);
    }
    let why = rig.fail_under(
        &New::With("VIRTIOBLKD_KILL_POINT=upgrade-started:1"),
        || {
            loads[0].step(&mut a);
            loads[1].step(&mut b);
        },
    );
    assert!(why.contains("has ended"), "{why}");
    let mut c = start(&rig, "c");
    rig.program(&New::Good);
    rig.upgrade_under(|| {});
    c.write(0, &[1; 512]).unwrap();
    loads[0].finish(&mut a);
    loads[1].finish(&mut b);
    for device in [&mut a, &mut b, &mut c] {
        device.shut_down().unwrap();
    }
    rig.terminate();
}

#[test]
fn old_process_that_is_killed_in_the_pause_is_succeeded() {
    let dir = TempDir::new();
    let image = dir.join("disk");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let socket = dir.join("s");
    let arguments = [
        "--blk-file",
        image.to_str().unwrap(),
        "--format",
        "raw",
        "--socket-path",
        socket.to_str().unwrap(),
    ];
    let before = "export VIRTIOBLKD_KILL_POINT=upgrade-stopped-sent:1";
    let mut rig = Rig::start_by_hand(dir, &arguments, before, Vec::new());
    rig.program(&New::With("VIRTIOBLKD_KILL_POINT=none:1"));
    let mut device = rig.device(options(1));
    let mut load = Load::new(8, vec![0; 4 << 20], 1);
    load.go(&mut device, 100);
    rig.signal(libc::SIGUSR2);
    until("the new one serves", || rig.count("upgraded: ") == 1);
    rig.adopt();
    load.go(&mut device, 100);
    load.finish(&mut device);
    device.shut_down().unwrap();
    rig.terminate();
}
