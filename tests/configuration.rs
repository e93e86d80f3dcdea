//! The configuration space and what stands behind it.

mod common;

use common::{Rig, dirty_pages};
use vhost_user_frontend as frontend;

use frontend::blk::{CONFIG_WRITEBACK, Config};
use frontend::message::config_payload;
use frontend::protocol::{feature, flag, request};
use frontend::{Daemon, Device, DeviceOptions, Disk, TempDir, qemu};

const MIB: u64 = 1 << 20;

fn negotiated(rig: &Rig, features: u64) -> Device {
    let options = DeviceOptions {
        features,
        ..DeviceOptions::default()
    };
    rig.device_with(options)
}

fn writeback(device: &Device) -> u8 {
    device.read_config().unwrap().writeback
}

/// Pages of the image that are in the kernel's hands only, after a write of 4 MiB.
fn dirty_after_writing(rig: &Rig, device: &mut Device) -> Option<u64> {
    for i in 0..64 {
        device.write(128 * i, &[0x99; 65536]).unwrap();
    }
    dirty_pages(&rig.image())
}

#[test]
fn write_cache_is_switched_both_ways() {
    let rig = Rig::with("raw", 16 * MIB, |d| d.args(["--cache", "writeback"]));
    let mut device = rig.device();
    assert_ne!(device.features() & feature::BLK_CONFIG_WCE, 0);
    for value in [0u8, 1, 0] {
        device
            .client()
            .unwrap()
            .set_config(CONFIG_WRITEBACK, 0, &[value])
            .unwrap();
        assert_eq!(writeback(&device), value);
    }
    // It is off: a write that is completed is durable.
    match dirty_after_writing(&rig, &mut device) {
        Some(dirty) => assert_eq!(dirty, 0, "write-through leaves nothing dirty"),
        None => println!("skipped in part: this kernel has no cachestat(2)"),
    }
}

#[test]
fn write_to_anything_but_the_cache_mode_is_refused() {
    let rig = Rig::raw(16 * MIB);
    let before = rig.device().config();
    let cases: [(u32, &[u8]); 9] = [
        (0, &[0xff; 8]),
        (0, &[0xff; 60]),
        (20, &[0, 16, 0, 0]),
        (31, &[0, 0]),
        (32, &[0, 0]),
        (32, &[0, 0, 0, 0]),
        (34, &[9, 0]),
        (60, &[1]),
        (0xffff_ffff, &[1]),
    ];
    for (offset, bytes) in cases {
        let device = rig.device();
        let answer = device.client().unwrap().set_config(offset, 0, bytes);
        assert!(
            answer.as_ref().is_err_and(frontend::Error::is_refusal),
            "{} bytes at {offset}: {answer:?}",
            bytes.len()
        );
        drop(device);
        assert_eq!(rig.device().config(), before);
    }
}

#[test]
fn cache_mode_other_than_0_and_1_is_refused() {
    let rig = Rig::raw(16 * MIB);
    for value in [2u8, 0x80, 0xff] {
        let device = rig.device();
        let answer = device
            .client()
            .unwrap()
            .set_config(CONFIG_WRITEBACK, 0, &[value]);
        assert!(answer.is_err_and(|e| e.is_refusal()));
    }
}

#[test]
fn set_config_whose_size_does_not_match_its_payload() {
    let mut rig = Rig::raw(16 * MIB);
    for (size, sent) in [(1u32, 0usize), (1, 2), (60, 1), (u32::MAX, 1), (0, 0)] {
        let device = rig.device();
        let payload = config_payload(CONFIG_WRITEBACK, size, 0, &vec![0; sent]);
        let client = device.client().unwrap();
        let answer = client.tell(request::SET_CONFIG, &payload, &[]);
        if size != 0 {
            assert!(
                answer.is_err_and(|e| e.is_refusal()),
                "size {size}, {sent} bytes"
            );
        }
    }
    rig.assert_serves_a_new_client();
}

#[test]
fn cache_mode_is_kept_over_a_reset_of_the_device() {
    let rig = Rig::raw(16 * MIB);
    let device = rig.device();
    let client = device.client().unwrap();
    client.set_config(CONFIG_WRITEBACK, 0, &[0]).unwrap();
    client.reset_device().unwrap();
    client.set_features(device.features()).unwrap();
    assert_eq!(writeback(&device), 0);
}

#[test]
fn cache_mode_comes_along_in_a_migration() {
    let rig = Rig::raw(16 * MIB);
    let device = rig.device();
    let client = device.client().unwrap();
    // What QEMU brings over: the one byte.
    client.set_config(CONFIG_WRITEBACK, 1, &[0]).unwrap();
    assert_eq!(writeback(&device), 0);
    // The whole space may be refused; if it is taken, the capacity of this disk stays what it is.
    let mut space = client.get_config(0, 60).unwrap();
    space[..8].copy_from_slice(&99u64.to_le_bytes());
    let _ = client.set_config(0, 1, &space);
    drop(device);
    assert_eq!(rig.device().config().capacity, 16 * MIB / 512);
}

#[test]
fn guest_without_flush_and_config_wce_gets_write_through() {
    let rig = Rig::with("raw", 16 * MIB, |d| d.args(["--cache", "writeback"]));
    let features = feature::LINUX & !feature::BLK_FLUSH & !feature::BLK_CONFIG_WCE;
    let mut device = negotiated(&rig, features);
    match dirty_after_writing(&rig, &mut device) {
        Some(dirty) => assert_eq!(dirty, 0),
        None => println!("skipped in part: this kernel has no cachestat(2)"),
    }
}

#[test]
fn guest_with_config_wce_but_no_flush_starts_in_write_through() {
    let rig = Rig::raw(16 * MIB);
    let device = negotiated(&rig, feature::LINUX & !feature::BLK_FLUSH);
    assert_eq!(writeback(&device), 0);
}

#[test]
fn reply_has_exactly_the_size_asked_for() {
    let rig = Rig::raw(16 * MIB);
    let device = rig.device();
    let client = device.client().unwrap();
    let whole = client.get_config(0, 60).unwrap();
    assert_eq!(whole.len(), 60);
    for size in [1, 2, 4, 8, 20, 24, 32, 36, 56, 57, 60] {
        assert_eq!(client.get_config(0, size).unwrap(), whole[..size as usize]);
    }
    for (offset, size) in [(8, 4), (20, 4), (32, 1), (34, 2), (36, 24)] {
        let part = &whole[offset as usize..(offset + size) as usize];
        assert_eq!(client.get_config(offset, size).unwrap(), part);
    }
}

#[test]
fn reads_past_the_fields_are_answered_in_full_or_by_the_protocols_error() {
    let mut rig = Rig::raw(16 * MIB);
    let device = rig.device();
    let client = device.client().unwrap();
    // QEMU asks for its own idea of the length; some front ends count offsets from 0x100, as the PCI
    // transport's registers do.
    for (offset, size) in [
        (0, 64),
        (0, 96),
        (0, 256),
        (0x100, 60),
        (0x100, 8),
        (60, 4),
        (255, 1),
    ] {
        let got = client.get_config(offset, size).unwrap();
        assert!(got.is_empty() || got.len() == size as usize);
    }
    let whole = client.get_config(0, 256).unwrap();
    assert!(whole.is_empty() || Config::parse(&whole) == device.config());
    drop(device);
    rig.assert_serves_a_new_client();
}

#[test]
fn get_config_with_a_hostile_size_is_refused() {
    let mut rig = Rig::raw(16 * MIB);
    for (offset, size) in [
        (0u32, 257u32),
        (0, u32::MAX),
        (u32::MAX, 8),
        (u32::MAX, u32::MAX),
    ] {
        let device = rig.device();
        let client = device.client().unwrap();
        let payload = config_payload(offset, size, 0, &[0; 60]);
        client
            .send(request::GET_CONFIG, flag::VERSION, &payload, &[])
            .unwrap();
        match client.recv() {
            Ok(reply) => assert!(reply.payload.len() <= 12, "{} bytes", reply.payload.len()),
            Err(e) => assert!(e.is_refusal(), "{e}"),
        }
    }
    rig.assert_serves_a_new_client();
}

#[test]
fn size_max_is_not_offered_as_zero() {
    let rig = Rig::raw(16 * MIB);
    let device = rig.device();
    if device.offered() & feature::BLK_SIZE_MAX != 0 {
        assert!(device.config().size_max >= 4096);
    }
    assert_ne!(device.offered() & feature::BLK_SEG_MAX, 0);
    assert!(device.config().seg_max >= 1);
    assert!(u32::from(device.options().queue_size) >= device.config().seg_max.min(126));
}

#[test]
fn capacity_that_is_no_multiple_of_the_block_is_refused_or_rounded_with_a_word() {
    for (size, block) in [(MIB + 100, 512u32), (MIB + 512, 4096)] {
        let dir = TempDir::new();
        let image = dir.join("disk");
        std::fs::write(&image, vec![1; size as usize]).unwrap();
        let disk = Disk::new(&image, "raw").block_size(block);
        let mut daemon = Daemon::spawn(&common::program(), &disk, dir.path());
        let refused = loop {
            if let Some(status) = daemon.try_exit() {
                assert!(!status.success());
                break true;
            }
            if frontend::process::is_listening(daemon.socket()).unwrap() {
                break false;
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        if !refused {
            let device = Device::start(daemon.socket(), DeviceOptions::default()).unwrap();
            assert_eq!(device.capacity(), MIB, "rounded down");
        }
        let log = daemon.log();
        assert!(
            log.contains(&size.to_string()),
            "the log names the size:\n{log}"
        );
    }
}

#[test]
fn block_size_and_topology_are_told() {
    for (block, format) in [
        (512u32, "raw"),
        (4096, "raw"),
        (512, "qcow2"),
        (4096, "qcow2"),
    ] {
        let rig = Rig::with(format, 16 * MIB, |d| d.block_size(block));
        let device = rig.device();
        let config = device.config();
        assert_ne!(device.offered() & feature::BLK_BLK_SIZE, 0);
        assert_ne!(device.offered() & feature::BLK_TOPOLOGY, 0);
        assert_eq!(config.blk_size, block);
        let physical = block << config.physical_block_exp;
        assert!((512..=65536).contains(&physical), "{config:?}");
        assert!(config.min_io_size >= 1, "{config:?}");
        assert_eq!(config.capacity, 16 * MIB / 512);
    }
}

#[test]
fn requests_off_the_block_size_are_refused_or_served_right() {
    let rig = Rig::with("raw", 16 * MIB, |d| d.block_size(4096));
    let mut device = rig.device();
    device.write(0, &[3; 8192]).unwrap();
    match device.write(1, &[4; 512]) {
        Ok(()) => {
            let got = device.read(0, 8192).unwrap();
            assert!(got[..512].iter().all(|b| *b == 3));
            assert!(got[512..1024].iter().all(|b| *b == 4));
            assert!(got[1024..].iter().all(|b| *b == 3));
        }
        Err(frontend::Error::Status(1)) => assert_eq!(device.read(0, 8192).unwrap(), [3; 8192]),
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn serial_is_what_the_user_chose() {
    let rig = Rig::with("raw", MIB, |d| d.serial("vm42-root"));
    let id = rig.device().get_id().unwrap();
    assert_eq!(id.split(|b| *b == 0).next().unwrap(), b"vm42-root");
}

#[test]
fn number_of_queues_is_told_in_both_places() {
    for n in [1u16, 2, 5] {
        let rig = Rig::with("raw", MIB, |d| d.queues(n));
        let device = rig.device();
        assert_eq!(device.config().num_queues, n);
        let client = device.client().unwrap();
        assert_eq!(client.get_queue_num().unwrap(), u64::from(n));
    }
}

#[test]
fn capacity_of_a_qcow2_image_is_its_virtual_size() {
    let dir = TempDir::new();
    let image = dir.join("disk");
    qemu::create(&image, "qcow2", 5 * MIB + 512, "cluster_size=512");
    let rig = Rig::start(dir, Disk::new(&image, "qcow2"));
    assert_eq!(rig.device().capacity(), 5 * MIB + 512);
}
