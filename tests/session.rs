//! The connection between VMM and daemon: messages that are wrong, and connections that end.

mod common;

use std::os::fd::AsRawFd;

use common::{Rig, SOON, fill_with_reads, refused, until};
use vhost_user_frontend as frontend;

use frontend::message;
use frontend::protocol::{flag, request};
use frontend::sys::EventFd;
use frontend::{Client, Device, DeviceOptions, process};

const MIB: u64 = 1 << 20;

// Descriptors and messages.

#[test]
fn descriptors_that_no_message_asked_for_are_closed() {
    let mut rig = Rig::raw(MIB);
    // Once through, so that all is open that stays open.
    rig.assert_serves_a_new_client();
    let idle = process::fd_count(rig.daemon.pid()).unwrap();
    let event = EventFd::new().unwrap();
    let fds = [event.raw(); 8];
    for request in [
        request::GET_FEATURES,
        request::SET_OWNER,
        request::GET_QUEUE_NUM,
        request::SET_VRING_NUM,
        request::GET_CONFIG,
        request::SET_VRING_KICK,
        request::SET_MEM_TABLE,
    ] {
        for _ in 0..5 {
            let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
            client.send(request, flag::VERSION, &[0; 8], &fds).unwrap();
            // Whatever the daemon makes of it: it must have seen it before the connection goes.
            let _ = client.call(request::GET_FEATURES, &[], &fds);
        }
    }
    let pid = rig.daemon.pid();
    until("all descriptors are closed", || {
        process::fd_count(pid).unwrap() <= idle
    });
    rig.assert_serves_a_new_client();
}

#[test]
fn truncated_message_and_then_end_of_file() {
    let mut rig = Rig::raw(MIB);
    let whole = {
        let mut bytes = message::header(request::SET_FEATURES, flag::VERSION, 8).to_vec();
        bytes.extend([0; 8]);
        bytes
    };
    for len in 1..whole.len() {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        client.send_raw(&whole[..len], &[]).unwrap();
        drop(client);
    }
    rig.assert_serves_a_new_client();
}

#[test]
fn message_that_comes_byte_by_byte_is_understood_or_ends_the_connection() {
    let mut rig = Rig::raw(MIB);
    let client = Client::connect(rig.daemon.socket()).unwrap();
    for byte in message::header(request::GET_FEATURES, flag::VERSION, 0) {
        if client.send_raw(&[byte], &[]).is_err() {
            break;
        }
    }
    match client.recv() {
        Ok(reply) => assert_eq!(reply.request, request::GET_FEATURES),
        Err(e) => assert!(e.is_refusal(), "{e}"),
    }
    drop(client);
    rig.assert_serves_a_new_client();
}

#[test]
fn stalled_half_message_does_not_outlive_its_sender() {
    let mut rig = Rig::raw(MIB);
    let client = Client::connect(rig.daemon.socket()).unwrap();
    client
        .send_raw(
            &message::header(request::SET_FEATURES, flag::VERSION, 8),
            &[],
        )
        .unwrap();
    drop(client);
    rig.assert_serves_a_new_client();
}

#[test]
fn oversized_message_is_refused() {
    let mut rig = Rig::raw(MIB);
    for size in [4097, 65536, 0x7fff_ffff, u32::MAX] {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        client
            .send_raw(
                &message::header(request::SET_FEATURES, flag::VERSION, size),
                &[],
            )
            .unwrap();
        let _ = client.send_raw(&[0; 4096], &[]);
        assert!(client.closed_within(SOON).unwrap(), "size {size}");
        drop(client);
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn payload_of_the_wrong_size_is_refused() {
    let mut rig = Rig::raw(MIB);
    let cases = [
        (request::SET_FEATURES, 0),
        (request::SET_FEATURES, 7),
        (request::SET_FEATURES, 16),
        (request::SET_VRING_NUM, 4),
        (request::SET_VRING_ADDR, 8),
        (request::SET_MEM_TABLE, 0),
        (request::SET_MEM_TABLE, 39),
        (request::ADD_MEM_REG, 8),
        (request::GET_VRING_BASE, 1),
    ];
    for (request, len) in cases {
        refused(&mut rig, "payload", |c| c.tell(request, &vec![0; len], &[]));
    }
}

#[test]
fn unknown_message_is_refused() {
    let mut rig = Rig::raw(MIB);
    for request in [0, 41, 47, 1000, u32::MAX] {
        refused(&mut rig, "unknown", |c| c.tell(request, &[], &[]));
    }
}

#[test]
fn header_of_another_version_is_refused() {
    let mut rig = Rig::raw(MIB);
    for flags in [0, 2, 3] {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        client.send(request::GET_FEATURES, flags, &[], &[]).unwrap();
        assert!(client.closed_within(SOON).unwrap(), "flags {flags}");
        drop(client);
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn second_client_is_turned_away_at_once_and_the_first_goes_on() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    for _ in 0..3 {
        match Client::connect(rig.daemon.socket()) {
            Ok(second) => {
                let _ = second.send(request::GET_FEATURES, flag::VERSION, &[], &[]);
                assert!(second.closed_within(SOON).unwrap());
            }
            Err(e) => println!("not even accepted: {e}"),
        }
        device.write(0, &[8; 512]).unwrap();
    }
    device.shut_down().unwrap();
    rig.assert_serves_a_new_client();
}

#[test]
fn features_that_were_not_offered_are_refused_or_ignored() {
    let mut rig = Rig::raw(MIB);
    let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    let _ = device.client().unwrap().set_features(u64::MAX);
    drop(device);
    rig.assert_serves_a_new_client();
}

// Ends.

#[test]
fn client_that_vanishes_under_load_is_forgotten_entirely() {
    let mut rig = Rig::with("raw", 64 * MIB, |d| d.queues(2));
    let pid = rig.daemon.pid();
    rig.assert_serves_a_new_client();
    let idle = process::fd_count(pid).unwrap();
    for _ in 0..20 {
        let mut device = rig.device();
        fill_with_reads(&mut device, 65536);
        device.disconnect();
        until("guest memory is unmapped", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
        });
        until("its descriptors are closed", || {
            process::fd_count(pid).unwrap() <= idle
        });
    }
    rig.assert_serves_a_new_client();
}

#[test]
fn killed_client_process_is_forgotten_too() {
    let mut rig = Rig::raw(16 * MIB);
    // A child that holds a copy of the connection: the daemon sees the end of file when it is killed.
    let device = rig.device();
    let fd = device.client().unwrap().stream().as_raw_fd();
    // SAFETY: clearing close-on-exec of our own descriptor.
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    drop(device);
    child.kill().unwrap();
    child.wait().unwrap();
    rig.assert_serves_a_new_client();
}

#[test]
fn many_sessions_leak_nothing() {
    let mut rig = Rig::with("raw", 16 * MIB, |d| d.queues(2));
    let pid = rig.daemon.pid();
    let session = |rig: &Rig| {
        let options = DeviceOptions {
            queues: 2,
            ..DeviceOptions::default()
        };
        let mut device = rig.device_with(options);
        device.write(0, &[1; 512]).unwrap();
        if device.options().queues == 2 {
            device.shut_down().unwrap();
        }
    };
    for _ in 0..3 {
        session(&rig);
    }
    until("idle again", || {
        process::mappings_of(pid, "guest-memory").unwrap() == 0
    });
    let (fds, maps, threads) = (
        process::fd_count(pid).unwrap(),
        process::mapping_count(pid).unwrap(),
        process::thread_count(pid).unwrap(),
    );
    for _ in 0..50 {
        session(&rig);
    }
    until("idle again", || {
        process::mappings_of(pid, "guest-memory").unwrap() == 0
    });
    until("descriptors are back", || {
        process::fd_count(pid).unwrap() <= fds
    });
    assert!(process::mapping_count(pid).unwrap() <= maps + 8);
    assert!(process::thread_count(pid).unwrap() <= threads);
    rig.assert_serves_a_new_client();
}

#[test]
fn target_whose_source_never_hands_over() {
    let mut rig = Rig::with("qcow2", 16 * MIB, |d| d);
    // The handshake and the configuration space, then the end: no ring was ever started.
    let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    assert_eq!(device.capacity(), 16 * MIB);
    drop(device);
    rig.assert_serves_a_new_client();
}
