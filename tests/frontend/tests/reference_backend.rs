//! The front end against QEMU's own backend: if these fail, the front end is wrong.

use virtioblkd_test_frontend as frontend;

use std::time::Duration;

use frontend::blk::{Segment, status};
use frontend::protocol::{feature, protocol_feature};
use frontend::{
    Client, Daemon, Device, DeviceOptions, Disk, Notify, Op, Program, SlotOptions, TempDir,
};
use frontend::{process, qemu};

const SIZE: u64 = 16 << 20;

/// A daemon on a fresh image, or nothing where the reference is not installed.
fn reference(format: &str, queues: u16) -> Option<(TempDir, Daemon)> {
    let Some(program) = Program::qemu_storage_daemon() else {
        eprintln!("skipped: qemu-storage-daemon is not installed");
        return None;
    };
    let dir = TempDir::new();
    let image = dir.join("disk");
    qemu::create(&image, format, SIZE, "");
    let disk = Disk::new(&image, format).queues(queues);
    let daemon = Daemon::start(&program, &disk, dir.path());
    Some((dir, daemon))
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ seed ^ (i >> 8) as u8)
        .collect()
}

#[test]
fn config_space_and_features_are_read() {
    let Some((_dir, mut daemon)) = reference("raw", 2) else {
        return;
    };
    let device = Device::negotiate(daemon.socket(), DeviceOptions::default()).unwrap();
    assert_eq!(device.capacity(), SIZE);
    assert_eq!(device.config().blk_size, 512);
    assert_eq!(device.config().num_queues, 2);
    let all = feature::VERSION_1 | feature::BLK_FLUSH | feature::BLK_DISCARD;
    assert_eq!(device.features() & all, all);
    assert_ne!(device.protocol_features() & protocol_feature::CONFIG, 0);
    daemon.assert_alive();
}

#[test]
fn what_is_written_is_read_back_in_each_way_of_waiting_and_laying_out() {
    let Some((dir, mut daemon)) = reference("qcow2", 1) else {
        return;
    };
    let ways = [
        (Notify::Call, feature::LINUX, false, u32::MAX, 0),
        (Notify::Poll, feature::LINUX, true, 4096, 0),
        (
            Notify::Call,
            feature::LINUX & !feature::EVENT_IDX,
            false,
            1000,
            3,
        ),
        (Notify::Poll, feature::VERSION_1, false, 512, 512),
    ];
    for (round, (notify, features, indirect, segment_len, misalign)) in ways.into_iter().enumerate()
    {
        let options = DeviceOptions {
            notify,
            features,
            slots: SlotOptions {
                indirect,
                segment_len,
                misalign,
                ..SlotOptions::default()
            },
            ..DeviceOptions::default()
        };
        let mut device = Device::start(daemon.socket(), options).unwrap();
        let data = pattern(24 << 10, round as u8);
        let sector = 100 + 1000 * round as u64;
        device.write(sector, &data).unwrap();
        device.flush().unwrap();
        assert_eq!(device.read(sector, 24 << 10).unwrap(), data);
        assert_eq!(device.read(sector + 1, 512).unwrap(), data[512..1024]);
        let (done, _) = device.run(Op::Read { sector, len: 4096 }).unwrap();
        assert_eq!((done.status, done.used_len), (status::OK, 4097));
        device.shut_down().unwrap();
    }
    daemon.terminate();
    qemu::check_clean(&dir.join("disk"));
}

#[test]
fn many_in_flight_on_two_queues_complete_each_once() {
    let Some((_dir, mut daemon)) = reference("raw", 2) else {
        return;
    };
    let options = DeviceOptions {
        queues: 2,
        queue_size: 64,
        ..DeviceOptions::default()
    };
    let mut device = Device::start(daemon.socket(), options).unwrap();
    std::thread::scope(|s| {
        for (q, queue) in device.queues_mut().iter_mut().enumerate() {
            s.spawn(move || {
                let (mut next, mut done) = (0u64, vec![false; 3000]);
                while done.iter().any(|d| !d) {
                    while next < 3000 {
                        let data = [next as u8; 512];
                        let sector = q as u64 * 3000 + next;
                        match queue.submit(
                            Op::Write {
                                sector,
                                data: &data,
                            },
                            next,
                        ) {
                            Ok(_) => next += 1,
                            Err(frontend::Error::Full) => break,
                            Err(e) => panic!("{e}"),
                        }
                    }
                    queue.ring.publish();
                    let completion = queue.wait(Duration::from_secs(60)).unwrap();
                    assert_eq!((completion.status, completion.used_len), (status::OK, 1));
                    assert!(!std::mem::replace(
                        &mut done[completion.token as usize],
                        true
                    ));
                    queue.release(completion);
                }
            });
        }
    });
    for sector in [0, 1, 2999, 3000, 5999] {
        assert_eq!(
            device.read(sector, 512).unwrap(),
            [(sector % 3000) as u8; 512]
        );
    }
    daemon.assert_alive();
}

#[test]
fn discard_write_zeroes_and_id_are_understood() {
    let Some((_dir, _daemon)) = reference("qcow2", 1) else {
        return;
    };
    let mut device = Device::start(_daemon.socket(), DeviceOptions::default()).unwrap();
    device.write(0, &[0xaa; 65536]).unwrap();
    device.write_zeroes(&[Segment::new(8, 8).unmap()]).unwrap();
    assert_eq!(device.read(7, 512).unwrap(), [0xaa; 512]);
    assert_eq!(device.read(8, 4096).unwrap(), [0; 4096]);
    device.discard(&[Segment::new(0, 128)]).unwrap();
    assert_eq!(device.get_id().unwrap().len(), 20);
    let odd = Op::Raw {
        request_type: 99,
        sector: 0,
        out: &[],
        in_len: 0,
    };
    assert_eq!(device.run(odd).unwrap().0.status, status::UNSUPP);
    let beyond = Op::Read {
        sector: SIZE / 512,
        len: 512,
    };
    assert_eq!(device.run(beyond).unwrap().0.status, status::IOERR);
}

#[test]
fn rings_stop_and_start_where_they_stood_and_reconnect_works() {
    let Some((_dir, mut daemon)) = reference("raw", 1) else {
        return;
    };
    let mut device = Device::start(daemon.socket(), DeviceOptions::default()).unwrap();
    for i in 0..300u64 {
        device.write(i, &[i as u8; 512]).unwrap();
    }
    let base = device.stop_queue(0).unwrap();
    assert_eq!(base, 300);
    device.start_queue(0, base).unwrap();
    assert_eq!(device.read(299, 512).unwrap(), [299u64 as u8; 512]);
    device.disconnect();
    device.reconnect().unwrap();
    assert_eq!(device.read(17, 512).unwrap(), [17; 512]);
    daemon.assert_alive();
}

#[test]
fn memory_comes_by_slots_too_and_leaves_no_mapping_behind() {
    let Some((_dir, daemon)) = reference("raw", 1) else {
        return;
    };
    let options = DeviceOptions {
        memory_slots: true,
        ..DeviceOptions::default()
    };
    let mut device = Device::start(daemon.socket(), options).unwrap();
    assert!(device.client().unwrap().get_max_mem_slots().unwrap() >= 2);
    device.write(0, &[1; 512]).unwrap();
    assert_eq!(
        process::mappings_of(daemon.pid(), "guest-memory").unwrap(),
        2
    );
    assert!(process::fd_count(daemon.pid()).unwrap() > 3);
    assert!(process::thread_count(daemon.pid()).unwrap() >= 1);
    assert!(process::io_counters(daemon.pid()).unwrap().wchar >= 512);
    let cpu = process::cpu_time(daemon.pid()).unwrap();
    assert!(cpu < Duration::from_secs(60));
}

#[test]
fn a_message_the_backend_does_not_know_ends_the_connection() {
    let Some((_dir, mut daemon)) = reference("raw", 1) else {
        return;
    };
    let client = Client::connect(daemon.socket()).unwrap();
    client.get_features().unwrap();
    client
        .send(0x7777, frontend::protocol::flag::VERSION, &[], &[])
        .unwrap();
    assert!(client.closed_within(Duration::from_secs(30)).unwrap());
    daemon.assert_alive();
}
