//! Disks that change their size while a guest has them: by SIGHUP after somebody else resized the image, and by
//! a call of the library.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use common::{Rig, SOON, until};
use vhost_user_frontend as frontend;

use frontend::blk::{SECTOR, status};
use frontend::protocol::protocol_feature;
use frontend::{ConfigWatch, Device, DeviceOptions, Error, Op, TempDir, process, qemu};
use virtioblkd::assembly;
use virtioblkd::cli::{self, Invocation};
use virtioblkd::config::Host;
use virtioblkd::daemon::{Daemon, DiskEndpoint, Options, Signals, Stopper};
use virtioblkd::dataplane::{BlkDevice, Dataplane, DataplaneConfig, PollConfig, PollMode};
use virtioblkd::vhost_user::Listen;

const MIB: u64 = 1 << 20;

fn set_len(path: &Path, len: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

/// Resizes a qcow2 image that nobody uses.
fn resize_by_qemu(path: &Path, size: u64) {
    let size = size.to_string();
    let path = path.to_str().unwrap();
    qemu::img_ok(["resize", "-q", "--shrink", "-f", "qcow2", path, &size]);
}

fn bytes(config: frontend::blk::Config) -> u64 {
    config.capacity * SECTOR
}

/// Sends SIGHUP, and waits until the disk has been looked at.
fn sighup(rig: &mut Rig) {
    let looks = |rig: &Rig| {
        let log = rig.daemon.log();
        ["has not changed", "bytes and is", "looking at the size:"]
            .iter()
            .map(|words| log.matches(words).count())
            .sum::<usize>()
    };
    let before = looks(rig);
    rig.daemon.signal(libc::SIGHUP);
    until("the disk was looked at", || looks(rig) > before);
}

/// The last sector of a disk of `size` bytes can be used, and nothing beyond.
fn ends_at(device: &mut Device, size: u64) {
    let last = size / SECTOR - 1;
    let data = [last as u8 | 1; 512];
    device.write(last, &data).unwrap();
    assert_eq!(device.read(last, 512).unwrap(), data);
    for beyond in [last + 1, 2 * last + 2, 1 << 30, 1 << 40] {
        let refused = device.write(beyond, &data).unwrap_err();
        assert!(matches!(refused, Error::Status(status::IOERR)), "{refused}");
        assert!(device.read(beyond, 512).is_err());
    }
    assert!(device.write(last, &[1; 1024]).is_err(), "across the end");
}

#[test]
fn raw_file_that_grows_and_shrinks_is_noticed_on_sighup_and_told_to_the_guest() {
    for need_reply in [true, false] {
        let mut rig = Rig::raw(16 * MIB);
        let mut options = DeviceOptions::default();
        if !need_reply {
            options.protocol_features &= !protocol_feature::REPLY_ACK;
        }
        let mut device = rig.device_with(options);
        let watch = ConfigWatch::open(&device, need_reply).unwrap();
        // Its ring runs: the size is not what the activation finds.
        device.write(0, &[1; 512]).unwrap();
        for size in [40 * MIB, 2 * MIB, 16 * MIB] {
            set_len(&rig.image(), size);
            rig.daemon.signal(libc::SIGHUP);
            assert_eq!(bytes(watch.wait(&device, SOON).unwrap()), size);
            ends_at(&mut device, size);
            assert_eq!(std::fs::metadata(rig.image()).unwrap().len(), size);
        }
        let log = rig.daemon.log();
        assert!(
            log.contains("was 16777216 bytes and is 41943040 bytes"),
            "{log}"
        );
        // Nothing has changed: nobody is told.
        sighup(&mut rig);
        device.read_config().unwrap();
        assert!(watch.is_silent().unwrap());
        device.shut_down().unwrap();
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn guest_that_is_told_nothing_reads_the_new_capacity_all_the_same() {
    let mut rig = Rig::raw(16 * MIB);
    let mut device = rig.device();
    set_len(&rig.image(), 32 * MIB);
    sighup(&mut rig);
    assert_eq!(bytes(device.read_config().unwrap()), 32 * MIB);
    ends_at(&mut device, 32 * MIB);
}

#[test]
fn capacity_is_whole_blocks_of_4096_bytes_after_every_change() {
    let mut rig = Rig::with("raw", 16 * MIB, |d| d.block_size(4096));
    let mut device = rig.device();
    let watch = ConfigWatch::open(&device, true).unwrap();
    // Less than a block: the guest sees no other size, and is not told of one.
    for extra in [512, 4095] {
        set_len(&rig.image(), 16 * MIB + extra);
        sighup(&mut rig);
        assert_eq!(bytes(device.read_config().unwrap()), 16 * MIB);
        assert!(watch.is_silent().unwrap());
        assert!(device.write(16 * MIB / SECTOR, &[1; 512]).is_err());
    }
    set_len(&rig.image(), 16 * MIB + 4096 + 2048);
    rig.daemon.signal(libc::SIGHUP);
    let config = watch.wait(&device, SOON).unwrap();
    assert_eq!(bytes(config), 16 * MIB + 4096);
    assert_eq!(config.blk_size, 4096);
    assert!(device.write(16 * MIB / SECTOR, &[1; 4096]).is_ok());
    assert!(device.write(16 * MIB / SECTOR + 8, &[1; 512]).is_err());
}

#[test]
fn qcow2_in_use_is_not_looked_at_and_a_resize_while_the_rings_stand_is() {
    let mut rig = Rig::with("qcow2", 16 * MIB, |d| d);
    let mut device = rig.device();
    let watch = ConfigWatch::open(&device, true).unwrap();
    device.write(0, &[5; 512]).unwrap();
    sighup(&mut rig);
    device.read_config().unwrap();
    assert!(watch.is_silent().unwrap());

    // The rings stop, and somebody resizes the image: SIGHUP has it noticed at once.
    device.stop_queue(0).unwrap();
    resize_by_qemu(&rig.image(), 32 * MIB);
    rig.daemon.signal(libc::SIGHUP);
    assert_eq!(bytes(watch.wait(&device, SOON).unwrap()), 32 * MIB);
    // Once more, without SIGHUP: it is noticed when the ring starts.
    resize_by_qemu(&rig.image(), 8 * MIB);
    device.start_queues().unwrap();
    assert_eq!(bytes(watch.wait(&device, SOON).unwrap()), 8 * MIB);
    ends_at(&mut device, 8 * MIB);
    assert_eq!(device.read(0, 512).unwrap(), [5; 512]);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    qemu::check_clean(&rig.image());
}

#[test]
fn image_resized_after_a_migration_target_has_opened_it_is_told_when_it_takes_over() {
    for format in ["raw", "qcow2"] {
        let rig = Rig::with(format, 16 * MIB, |d| d);
        let mut device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
        assert_eq!(device.capacity(), 16 * MIB);
        let watch = ConfigWatch::open(&device, true).unwrap();
        // The source's doing.
        match format {
            "raw" => set_len(&rig.image(), 48 * MIB),
            _ => resize_by_qemu(&rig.image(), 48 * MIB),
        }
        device.start_queues().unwrap();
        assert_eq!(
            bytes(watch.wait(&device, SOON).unwrap()),
            48 * MIB,
            "{format}"
        );
        ends_at(&mut device, 48 * MIB);
        assert!(watch.is_silent().unwrap(), "told once");
    }
}

#[test]
fn image_resized_between_two_vms_has_its_new_size_for_the_second() {
    for format in ["raw", "qcow2"] {
        let mut rig = Rig::with(format, 16 * MIB, |d| d);
        rig.assert_serves_a_new_client();
        match format {
            "raw" => set_len(&rig.image(), 48 * MIB),
            _ => {
                qemu::wait_unlocked(&rig.image(), format);
                resize_by_qemu(&rig.image(), 48 * MIB);
            }
        }
        sighup(&mut rig);
        let mut device = rig.device();
        assert_eq!(device.capacity(), 48 * MIB, "{format}");
        ends_at(&mut device, 48 * MIB);
    }
}

#[test]
fn image_that_cannot_be_looked_at_keeps_its_size() {
    let mut rig = Rig::with("qcow2", 16 * MIB, |d| d);
    let moved = rig.dir.join("moved");
    std::fs::rename(rig.image(), &moved).unwrap();
    sighup(&mut rig);
    assert!(rig.daemon.log().contains("looking at the size:"));
    std::fs::rename(&moved, rig.image()).unwrap();
    assert_eq!(rig.device().capacity(), 16 * MIB);
    rig.assert_serves_a_new_client();
}

#[test]
fn vmm_that_never_answers_on_the_channel_loses_it_and_not_its_disk() {
    let mut rig = Rig::raw(MIB);
    rig.assert_serves_a_new_client();
    let idle = process::fd_count(rig.daemon.pid()).unwrap();
    let mut device = rig.device();
    let watch = ConfigWatch::open(&device, true).unwrap();
    for n in 1..30 {
        set_len(&rig.image(), n * MIB);
        sighup(&mut rig);
        device.write(0, &[n as u8; 512]).unwrap();
        assert_eq!(device.read(0, 512).unwrap(), [n as u8; 512]);
    }
    assert!(rig.daemon.log().contains("unanswered"));
    ends_at(&mut device, 29 * MIB);
    device.shut_down().unwrap();
    drop(watch);
    let pid = rig.daemon.pid();
    until("its descriptors are closed", || {
        process::fd_count(pid).unwrap() <= idle
    });
    rig.assert_serves_a_new_client();
}

// By a call.

/// The whole daemon in this process.
struct Local {
    dir: TempDir,
    device: Arc<BlkDevice>,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Local {
    fn start(format: &str, size: u64) -> Self {
        let dir = TempDir::new();
        let image = dir.join("disk");
        qemu::create(&image, format, size, "");
        let socket = dir.join("s");
        let args = [
            "virtioblkd",
            "--socket-path",
            socket.to_str().unwrap(),
            "--blk-file",
            image.to_str().unwrap(),
            "--format",
            format,
            "--num-queues",
            "2",
        ];
        let Ok(Invocation::Run(config)) = cli::load_from(args, &Host::of_this_process()) else {
            panic!("the command line was refused");
        };
        let poll = PollConfig {
            mode: PollMode::Adaptive,
            max: std::time::Duration::from_micros(50),
        };
        let plane = Dataplane::start(&DataplaneConfig {
            workers: 2,
            cpus: Vec::new(),
            poll,
        });
        let plane = plane.unwrap();
        let device = Arc::new(assembly::open_device(&plane, &config.disks[0]).unwrap());
        let endpoint = DiskEndpoint {
            name: "disk".to_owned(),
            listen: Listen::Path {
                path: socket,
                mode: None,
                group: None,
            },
            device: device.clone(),
        };
        let daemon = Daemon::new(vec![endpoint], &Options::default()).unwrap();
        let stopper = daemon.stopper();
        let thread = std::thread::spawn(move || {
            let signals = Signals::block().unwrap();
            daemon.run(&signals).unwrap();
        });
        Self {
            dir,
            device,
            stopper,
            thread: Some(thread),
        }
    }

    fn image(&self) -> PathBuf {
        self.dir.join("disk")
    }

    fn connect(&self) -> Device {
        let options = DeviceOptions {
            queues: 2,
            ..DeviceOptions::default()
        };
        Device::start(&self.dir.join("s"), options).unwrap()
    }

    fn stop(&mut self) {
        self.stopper.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn disk_is_resized_by_a_call_with_requests_in_flight() {
    for format in ["raw", "qcow2"] {
        let mut local = Local::start(format, 16 * MIB);
        let mut device = local.connect();
        let watch = ConfigWatch::open(&device, true).unwrap();
        device.write(0, &[0x11; 4096]).unwrap();
        device
            .write((16 * MIB - 4096) / SECTOR, &[0x22; 4096])
            .unwrap();
        for size in [64 * MIB, 10 * MIB, 16 * MIB, 4 * MIB, 300 * MIB] {
            let over = AtomicBool::new(false);
            std::thread::scope(|scope| {
                // Requests inside every size and beyond some, on the second queue.
                let queue = &mut device.queues_mut()[1];
                let over = &over;
                let load = scope.spawn(move || {
                    let mut n = 0u64;
                    while !over.load(Ordering::Relaxed) || n < 50 {
                        let inside = Op::Write {
                            sector: 2048 + n % 1000,
                            data: &[n as u8; 512],
                        };
                        assert_eq!(queue.run(inside, SOON).unwrap().0.status, status::OK);
                        let sector = 4 * MIB / SECTOR + n * 37 % 100_000;
                        let beyond = Op::Read { sector, len: 4096 };
                        let answer = queue.run(beyond, SOON).unwrap().0.status;
                        assert!(answer == status::OK || answer == status::IOERR);
                        n += 1;
                    }
                });
                let told = local.device.resize(size).unwrap();
                assert_eq!(told.new, size);
                over.store(true, Ordering::Relaxed);
                load.join().unwrap();
            });
            assert_eq!(bytes(watch.wait(&device, SOON).unwrap()), size, "{format}");
            assert_eq!(local.device.capacity(), size);
            ends_at(&mut device, size);
        }
        assert_eq!(device.read(0, 4096).unwrap(), [0x11; 4096]);
        // What was cut off does not come back.
        let at = (16 * MIB - 4096) / SECTOR;
        assert_eq!(device.read(at, 2048).unwrap(), [0; 2048]);
        device.shut_down().unwrap();
        local.stop();
        let said = qemu::info_json(&local.image(), format);
        assert!(
            said.contains(&format!("\"virtual-size\": {}", 300 * MIB)),
            "{said}"
        );
        if format == "qcow2" {
            qemu::check_clean(&local.image());
        }
    }
}

#[test]
fn disk_that_nobody_uses_is_taken_resized_and_given_back() {
    for format in ["raw", "qcow2"] {
        let mut local = Local::start(format, 16 * MIB);
        let told = local.device.resize(32 * MIB).unwrap();
        assert_eq!((told.old, told.new), (16 * MIB, 32 * MIB));
        // It is not locked: QEMU may write to it.
        let image = local.image();
        let path = image.to_str().unwrap();
        qemu::img_ok(["resize", "-q", "-f", format, path, "33554432"]);
        let mut device = local.connect();
        assert_eq!(device.capacity(), 32 * MIB);
        ends_at(&mut device, 32 * MIB);

        // Connected, with its rings stopped: it is told at once, and again when they start, for it may not have
        // listened.
        let watch = ConfigWatch::open(&device, true).unwrap();
        for index in 0..2 {
            device.stop_queue(index).unwrap();
        }
        local.device.resize(8 * MIB).unwrap();
        let change = watch.channel().recv(SOON).unwrap();
        assert_eq!(change.request, 2);
        device.start_queues().unwrap();
        assert_eq!(bytes(watch.wait(&device, SOON).unwrap()), 8 * MIB);
        ends_at(&mut device, 8 * MIB);
        device.shut_down().unwrap();
        local.stop();
    }
}

#[test]
fn resize_that_is_refused_changes_nothing() {
    let mut local = Local::start("qcow2", 16 * MIB);
    let image = local.image();
    let path = image.to_str().unwrap();
    qemu::img_ok(["snapshot", "-c", "one", path]);
    for running in [false, true] {
        let mut device = running.then(|| local.connect());
        let watch = device.as_ref().map(|d| ConfigWatch::open(d, true).unwrap());
        // No size; more than the image can be; smaller than a snapshot in it.
        for size in [0, 1000, u64::MAX / 512 * 512, 8 * MIB] {
            assert!(local.device.resize(size).is_err(), "{size}");
            assert_eq!(local.device.capacity(), 16 * MIB);
        }
        if let (Some(device), Some(watch)) = (&mut device, &watch) {
            ends_at(device, 16 * MIB);
            device.read_config().unwrap();
            assert!(watch.is_silent().unwrap());
            device.shut_down().unwrap();
        }
    }
    // Somebody else uses it.
    let file = File::open(&image).unwrap();
    let lock = libc::flock {
        l_type: libc::F_RDLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        // As QEMU says that it has the image open for writing, and that others may not (permission 1).
        l_start: 201,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: F_OFD_SETLK reads the structure.
    assert_eq!(0, unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock)
    });
    let refused = local.device.resize(32 * MIB).unwrap_err();
    assert!(refused.to_string().contains("in use"), "{refused}");
    drop(file);
    local.device.resize(32 * MIB).unwrap();
    local.stop();
}
