//! The daemon as a process: how it starts, whom it leaves what to, and how it ends.

mod common;

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use common::{Rig, SOON, fill_with_reads, program, until};
use vhost_user_frontend as frontend;

use frontend::{Client, Daemon, Device, DeviceOptions, Disk, Program, TempDir, process, qemu};

const MIB: u64 = 1 << 20;

/// Runs the daemon on a disk that it must refuse; returns what it said.
fn refuses(dir: &TempDir, disk: &Disk) -> String {
    let mut daemon = Daemon::spawn(&program(), disk, dir.path());
    let status = daemon.wait_exit(SOON);
    assert!(!status.success(), "it was to refuse {disk:?}");
    assert!(status.code().is_some(), "it was killed: {status}");
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
    assert!(!log.trim().is_empty(), "it said nothing");
    log
}

#[test]
fn kill_of_the_client_under_load_lets_go_of_memory_and_lock() {
    let mut rig = Rig::with("qcow2", 64 * MIB, |d| d);
    let pid = rig.daemon.pid();
    for _ in 0..5 {
        let mut device = rig.device();
        device.write(0, &[1; 65536]).unwrap();
        fill_with_reads(&mut device, 65536);
        device.disconnect();
        until("memory is let go", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
        });
        let mut device = rig.device();
        assert_eq!(device.read(0, 512).unwrap(), [1; 512]);
        device.shut_down().unwrap();
    }
    rig.daemon.terminate();
    qemu::check_clean(&rig.image());
}

#[test]
fn image_in_use_is_locked_for_qemu_and_free_after_the_stop() {
    let mut rig = Rig::with("qcow2", 16 * MIB, |d| d);
    let mut device = rig.device();
    device.write(0, &[7; 65536]).unwrap();
    let image = rig.image();
    let resize = || {
        qemu::img([
            "resize".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            image.as_os_str(),
            "+1M".as_ref(),
        ])
    };
    let refused = resize();
    assert!(!refused.status.success(), "qemu-img wrote to a disk in use");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("lock"), "{said}");
    device.shut_down().unwrap();
    until("the lock is released", || resize().status.success());
    rig.daemon.terminate();
}

#[test]
fn daemon_refuses_an_image_that_qemu_has_open() {
    let dir = TempDir::new();
    let image = dir.join("disk");
    qemu::create(&image, "qcow2", 16 * MIB, "");
    let Some(qsd) = Program::qemu_storage_daemon() else {
        println!("skipped: qemu-storage-daemon is not installed");
        return;
    };
    let other = TempDir::new();
    let _holder = Daemon::start(&qsd, &Disk::new(&image, "qcow2"), other.path());
    // At its start, or when a guest starts its ring; never both ways open.
    let mut daemon = Daemon::spawn(&program(), &Disk::new(&image, "qcow2"), dir.path());
    until("it exits or listens", || {
        daemon.try_exit().is_some() || process::is_listening(daemon.socket()).unwrap()
    });
    if daemon.try_exit().is_none() {
        let options = DeviceOptions {
            timeout: Duration::from_secs(5),
            ..DeviceOptions::default()
        };
        let wrote = Device::start(daemon.socket(), options).and_then(|mut d| d.write(0, &[1; 512]));
        assert!(wrote.is_err(), "two writers on one image");
    }
    until("the log says why", || {
        let log = daemon.log().to_lowercase();
        log.contains("in use") || log.contains("lock")
    });
}

#[test]
fn sigterm_with_requests_in_flight_drains_and_exits_with_success() {
    let mut rig = Rig::with("qcow2", 64 * MIB, |d| d);
    let mut device = rig.device();
    for i in 0..16 {
        device.write(128 * i, &[i as u8 + 1; 65536]).unwrap();
    }
    fill_with_reads(&mut device, 65536);
    rig.daemon.terminate();
    qemu::check_clean(&rig.image());
    // Written and completed, though never flushed: a clean end keeps it.
    rig.daemon = Daemon::start(&program(), &rig.disk, rig.dir.path());
    let mut device = rig.device();
    for i in 0..16 {
        assert_eq!(device.read(128 * i, 512).unwrap(), [i as u8 + 1; 512]);
    }
}

#[test]
fn killed_daemon_can_be_started_again_and_keeps_what_was_flushed() {
    let mut rig = Rig::with("qcow2", 64 * MIB, |d| d);
    for round in 0..10u8 {
        let mut device = rig.device();
        for sector in 0..u64::from(round) {
            assert_eq!(
                device.read(1000 * sector, 512).unwrap(),
                [sector as u8; 512]
            );
        }
        device
            .write(1000 * u64::from(round), &[round; 512])
            .unwrap();
        device.flush().unwrap();
        fill_with_reads(&mut device, 65536);
        rig.daemon.kill();
        // The kernel holds the files of a killed process, and with them the lock, until its io_uring is
        // gone: the new one waits for it.
        rig.restart();
    }
    rig.daemon.terminate();
    // The last one that was killed may still be on its way out.
    qemu::wait_unlocked(&rig.image(), "qcow2");
    qemu::check_no_corruption(&rig.image());
}

#[test]
fn sigterm_while_nobody_is_connected() {
    let mut rig = Rig::raw(MIB);
    rig.daemon.terminate();
    assert!(!rig.daemon.socket().exists(), "the socket file is removed");
}

#[test]
fn stale_socket_file_is_taken_over() {
    let mut rig = Rig::raw(MIB);
    rig.daemon.kill();
    assert!(rig.daemon.socket().exists());
    rig.restart();
    rig.assert_serves_a_new_client();
}

#[test]
fn socket_of_a_living_daemon_is_not_taken_away() {
    let dir = TempDir::new();
    let image = dir.join("disk");
    std::fs::write(&image, vec![0; MIB as usize]).unwrap();
    let _listener = UnixListener::bind(dir.join("s")).unwrap();
    let log = refuses(&dir, &Disk::new(&image, "raw"));
    assert!(log.contains("/s"), "{log}");
    UnixListener::bind(dir.join("s")).expect_err("the other's socket is still there");
}

#[test]
fn once_ends_after_one_client() {
    let mut rig = Rig::with("raw", MIB, |d| d.args(["--once"]));
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    device.shut_down().unwrap();
    assert!(rig.daemon.wait_exit(SOON).success());
}

#[test]
fn pid_file_holds_the_process_id_and_goes_with_the_process() {
    let dir = TempDir::new();
    let pid_file = dir.join("pid");
    let image = dir.join("disk");
    std::fs::write(&image, vec![0; MIB as usize]).unwrap();
    let disk = Disk::new(&image, "raw").args(["--pid-file".as_ref(), pid_file.as_os_str()]);
    let mut rig = Rig::start(dir, disk);
    let text = std::fs::read_to_string(&pid_file).unwrap();
    assert_eq!(text.trim(), rig.daemon.pid().to_string());
    rig.daemon.terminate();
    assert!(!pid_file.exists());
}

#[test]
fn what_cannot_be_opened_is_refused_by_name() {
    let dir = TempDir::new();
    let log = refuses(&dir, &Disk::new(dir.join("absent"), "raw"));
    assert!(log.contains("absent"), "{log}");
    let log = refuses(&dir, &Disk::new(dir.path(), "raw"));
    assert!(log.contains(&dir.path().display().to_string()), "{log}");
    let text = dir.join("text");
    std::fs::write(&text, "no image at all").unwrap();
    let log = refuses(&dir, &Disk::new(&text, "qcow2"));
    assert!(log.contains("text"), "{log}");
}

#[test]
fn backing_file_outside_the_allowed_directories_is_refused_by_name() {
    let dir = TempDir::new();
    let elsewhere = TempDir::new();
    let base: PathBuf = elsewhere.join("base");
    qemu::create(&base, "raw", MIB, "");
    let image = dir.join("disk");
    qemu::create_overlay(&image, MIB, &base, "raw", "");
    let disk = Disk::new(&image, "qcow2").args(["--allow-path".as_ref(), dir.path().as_os_str()]);
    let log = refuses(&dir, &disk);
    assert!(log.contains("base") && log.contains("allow-path"), "{log}");
}

#[test]
fn null_disk_reads_zeros_and_takes_writes() {
    let dir = TempDir::new();
    let rig = Rig::start(dir, Disk::new("null:1G", "raw"));
    let mut device = rig.device();
    assert_eq!(device.capacity(), 1 << 30);
    device.write(1000, &[1; 4096]).unwrap();
    device.flush().unwrap();
    assert_eq!(device.read(1000, 4096).unwrap(), [0; 4096]);
}

#[test]
fn idle_daemon_uses_next_to_no_processor() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    let pid = rig.daemon.pid();
    // Polling may go on for a while after the last request. It must end: a whole second of no more than a
    // tenth of a processor has to come.
    until("a calm second", || {
        let before = process::cpu_time(pid).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        process::cpu_time(pid).unwrap() - before < Duration::from_millis(100)
    });
    device.write(1, &[2; 512]).unwrap();
    assert_eq!(device.read(1, 512).unwrap(), [2; 512]);
}

#[test]
fn each_polling_mode_serves() {
    for mode in ["adaptive", "always", "never"] {
        let mut rig = Rig::with("raw", 16 * MIB, |d| d.args(["--poll", mode]));
        let mut device = rig.device();
        for i in 0..500 {
            device.write(i, &[i as u8; 512]).unwrap();
        }
        device.shut_down().unwrap();
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn connection_is_possible_again_at_once_after_the_end_of_the_last() {
    let rig = Rig::raw(MIB);
    for _ in 0..200 {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        drop(client);
    }
    assert_eq!(rig.device().capacity(), MIB);
}

#[test]
fn full_disk_under_the_log_keeps_nobody_from_being_served() {
    let dir = TempDir::new();
    let image = dir.join("disk");
    qemu::create(&image, "qcow2", 16 * MIB, "");
    let socket = dir.join("s");
    let mut shell = std::process::Command::new("sh");
    shell
        .args(["-c", "exec \"$@\" >/dev/full 2>&1", "sh"])
        .arg(env!("CARGO_BIN_EXE_virtioblkd"))
        .args(["--format", "qcow2", "--log-level", "trace", "--socket-path"])
        .arg(&socket)
        .arg("--blk-file")
        .arg(&image);
    let mut daemon = Daemon::spawn_command(&mut shell, &socket, dir.path());
    daemon.wait_listening(SOON);
    for round in 1..4 {
        let mut device = Device::start(&socket, DeviceOptions::default()).unwrap();
        device.write(0, &[round; 4096]).unwrap();
        assert_eq!(device.read(0, 4096).unwrap(), [round; 4096]);
        // Each is a line in the log: a request that fails, a client that is refused, a ring that stops.
        let beyond = device.capacity() / 512;
        assert!(device.write(beyond, &[1; 512]).is_err());
        drop(Client::connect(&socket).unwrap());
        device.shut_down().unwrap();
    }
    daemon.terminate();
    assert!(daemon.log().is_empty());
    qemu::check_clean(&image);
}
