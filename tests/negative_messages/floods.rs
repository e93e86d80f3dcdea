//! VMMs that send without end, read nothing, or come together.

use std::io::Write;
use std::os::fd::AsRawFd;

use vhost_user_frontend as frontend;

use frontend::message::header;
use frontend::protocol::{flag, request};
use frontend::{Client, Device, DeviceOptions, sys};

use crate::common::{SOON, until};
use crate::rig::{Bad, Stage};
use crate::table::MESSAGES;

/// Sends a message over and over until nothing more is taken; returns how often.
fn flood(client: &Client, message: &[u8]) -> usize {
    let mut stream = client.stream();
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let mut refused = 0;
    // The daemon may take some more while this goes on: it is full when it stays full.
    while refused < 50 && sent < 200_000 {
        match stream.write(message) {
            Ok(len) if len == message.len() => (sent, refused) = (sent + 1, 0),
            Ok(_) => break,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                refused += 1;
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
            // It has ended the connection.
            Err(_) => break,
        }
    }
    stream.set_nonblocking(false).unwrap();
    sent
}

#[test]
fn vmm_that_floods_and_reads_nothing_holds_up_nobody_but_itself() {
    let mut bad = Bad::new();
    for kind in MESSAGES {
        let session = bad.session(Stage::Negotiated);
        let payload = (kind.payload)(session.device());
        let flags = flag::VERSION | flag::NEED_REPLY;
        let mut message = header(kind.id, flags, payload.len() as u32).to_vec();
        message.extend(payload);
        let client = session.device().client().unwrap();
        flood(client, &message);
        // While nobody reads others are turned away at once; or served, if the connection has ended over it.
        if let Ok(second) = Client::connect(bad.rig.daemon.socket()) {
            let answer = second.call(request::GET_FEATURES, &[], &[]);
            assert!(
                answer.is_ok() || answer.as_ref().is_err_and(frontend::Error::is_refusal),
                "{}: {answer:?}",
                kind.name
            );
        }
        bad.end(session);
        bad.nothing_leaks();
    }
    // What it asked is answered when it reads at last.
    let mut device = Device::start(bad.rig.daemon.socket(), DeviceOptions::default()).unwrap();
    let message = header(request::GET_QUEUE_NUM, flag::VERSION, 0);
    let sent = flood(device.client().unwrap(), &message);
    assert!(sent > 100);
    for _ in 0..sent {
        let reply = device.client().unwrap().recv().unwrap();
        assert_eq!(reply.u64().unwrap(), 2);
    }
    device.write(0, &[1; 512]).unwrap();
}

#[test]
fn flood_of_descriptors_is_closed_as_it_comes() {
    let mut bad = Bad::new();
    let event = sys::EventFd::new().unwrap();
    for kind in MESSAGES {
        let session = bad.session(Stage::Negotiated);
        let payload = (kind.payload)(session.device());
        let mut message = header(kind.id, flag::VERSION, payload.len() as u32).to_vec();
        message.extend(payload);
        let client = session.device().client().unwrap();
        let fd = client.stream().as_raw_fd();
        for _ in 0..200 {
            let mut poll = libc::pollfd {
                fd,
                events: libc::POLLOUT,
                revents: 0,
            };
            // SAFETY: one valid pollfd, no wait.
            let ready = unsafe { libc::poll(&mut poll, 1, 0) };
            let full = ready != 1 || poll.revents != libc::POLLOUT;
            if full || client.send_raw(&message, &[event.raw(); 30]).is_err() {
                break;
            }
        }
        bad.end(session);
        bad.nothing_leaks();
    }
}

#[test]
fn sigterm_and_sighup_are_heard_in_the_middle_of_a_flood() {
    let mut bad = Bad::new();
    let session = bad.session(Stage::Running);
    let message = header(request::GET_FEATURES, flag::VERSION, 0);
    assert!(flood(session.device().client().unwrap(), &message) > 100);
    bad.rig.daemon.signal(libc::SIGHUP);
    until("it has looked at its disk", || {
        bad.rig.daemon.log().contains("has not changed")
    });
    bad.rig.daemon.terminate();
}

#[test]
fn second_vmm_that_keeps_coming_is_always_turned_away_and_the_first_is_served() {
    let mut bad = Bad::new();
    let socket = bad.rig.daemon.socket().to_owned();
    let mut device = Device::start(&socket, DeviceOptions::default()).unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let seconds: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut turned_away = 0;
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        let Ok(second) = Client::connect(&socket) else {
                            continue;
                        };
                        let _ = second.send(request::GET_FEATURES, flag::VERSION, &[], &[]);
                        assert!(second.closed_within(SOON).unwrap());
                        turned_away += 1;
                    }
                    turned_away
                })
            })
            .collect();
        for n in 0..300 {
            device.write(n, &[n as u8; 512]).unwrap();
            device.client().unwrap().get_features().unwrap();
            assert_eq!(device.read(n, 512).unwrap(), [n as u8; 512]);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        for second in seconds {
            assert!(second.join().unwrap() > 0);
        }
    });
    device.shut_down().unwrap();
    bad.serves();
    bad.nothing_leaks();
}
