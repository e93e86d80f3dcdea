//! Every message of the protocol, wrong in every way: the connection ends or the message is refused, the daemon
//! lives, the next VM is served, and nothing leaks.
//!
//! The messages are a table (`table.rs`), so that one more is an entry there; whatever the daemon offers is
//! negotiated. `VIRTIOBLKD_NEGATIVE_SEED` and `VIRTIOBLKD_NEGATIVE_MESSAGES` make the random sequences others, or
//! longer.

#[path = "../common/mod.rs"]
mod common;
mod floods;
mod random;
mod rig;
mod table;

use std::os::fd::AsRawFd;

use vhost_user_frontend as frontend;

use frontend::message::header;
use frontend::protocol::flag;

use rig::{Answer, Bad, Stage};
use table::{Carries, MESSAGES};

const STAGES: [Stage; 3] = [Stage::Connected, Stage::Negotiated, Stage::Running];

#[test]
fn table_has_every_message_of_the_protocol_once() {
    let ids: Vec<u32> = MESSAGES.iter().map(|kind| kind.id).collect();
    assert_eq!(ids, (1..=45).collect::<Vec<u32>>());
}

#[test]
fn payload_that_is_too_short_or_too_long_is_refused() {
    let mut bad = Bad::new();
    for kind in MESSAGES {
        let right = {
            let session = bad.session(Stage::Negotiated);
            (kind.payload)(session.device()).len()
        };
        let lengths = (0..right).chain([right + 1, right + 4, right + 8, 1000, 4096]);
        for len in lengths.filter(|len| rig::is_wrong_length(kind.id, *len, right)) {
            for stage in [Stage::Negotiated, Stage::Running] {
                let mut session = bad.session(stage);
                let mut payload = (kind.payload)(session.device());
                payload.resize(len, 0);
                let answer = session.send(kind, &payload);
                assert!(
                    answer.is_refusal(),
                    "{} with {len} bytes, {stage:?}: {answer:?}",
                    kind.name
                );
                bad.end(session);
            }
        }
        bad.nothing_leaks();
    }
}

#[test]
fn header_that_lies_about_size_version_and_flags_ends_the_connection() {
    let mut bad = Bad::new();
    let sizes = [4097, 65_536, 0x7fff_ffff, 0x8000_0000, u32::MAX];
    let wrong_flags = [0, 2, 3, 4, 5, 8, 13, 0x11, 0x8000_0001, u32::MAX];
    for kind in MESSAGES {
        for (n, size) in sizes.into_iter().enumerate() {
            let mut session = bad.session(STAGES[(kind.id as usize + n) % 3]);
            let payload = (kind.payload)(session.device());
            let mut bytes = header(kind.id, flag::VERSION | flag::NEED_REPLY, size).to_vec();
            bytes.extend(payload);
            let answer = session.send_bytes(kind, &bytes);
            assert_eq!(answer, Answer::Ended, "{} of {size} bytes", kind.name);
            bad.end(session);
        }
        for (n, flags) in wrong_flags.into_iter().enumerate() {
            let mut session = bad.session(STAGES[(kind.id as usize + n) % 3]);
            let payload = (kind.payload)(session.device());
            let mut bytes = header(kind.id, flags, payload.len() as u32).to_vec();
            bytes.extend(payload);
            let answer = session.send_bytes(kind, &bytes);
            assert_eq!(answer, Answer::Ended, "{} with flags {flags:#x}", kind.name);
            bad.end(session);
        }
        bad.nothing_leaks();
    }
}

#[test]
fn descriptors_that_are_missing_or_too_many_are_refused() {
    let mut bad = Bad::new();
    for kind in MESSAGES {
        for stage in [Stage::Negotiated, Stage::Running] {
            let right = {
                let session = bad.session(stage);
                session.files(kind).0.len()
            };
            for count in [0, 1, 2, 3, 8, 9, 32, 33, 64] {
                if count == right {
                    continue;
                }
                let mut session = bad.session(stage);
                let payload = (kind.payload)(session.device());
                let event = frontend::sys::EventFd::new().unwrap();
                let answer = session.send_with(kind, &payload, &vec![event.raw(); count]);
                // Without a payload to say how many there are, descriptors that nobody wants are closed; a
                // message that wants some is not done with fewer or more.
                if right != 0 {
                    assert!(
                        answer.is_refusal(),
                        "{} with {count} descriptors, {stage:?}: {answer:?}",
                        kind.name
                    );
                }
                bad.end(session);
            }
        }
        bad.nothing_leaks();
    }
}

#[test]
fn descriptors_of_the_wrong_kind_end_in_a_refusal_or_do_no_harm() {
    let mut bad = Bad::new();
    for kind in MESSAGES
        .iter()
        .filter(|kind| kind.carries != Carries::Nothing)
    {
        for (what, make) in rig::WRONG_FILES {
            for stage in STAGES {
                let mut session = bad.session(stage);
                let payload = (kind.payload)(session.device());
                let files = make();
                let count = session.files(kind).0.len();
                let fds = vec![files[0].as_raw_fd(); count];
                let answer = session.send_with(kind, &payload, &fds);
                // A device's state goes into whatever can be written to without waiting.
                let takes_state = kind.name == "SET_DEVICE_STATE_FD"
                    && ["/dev/null", "an empty file", "a socket of datagrams"].contains(what);
                let event = kind.carries == Carries::Event || takes_state;
                // What is written to or polled may be anything that can be; what is mapped or spoken to not.
                if stage == Stage::Negotiated && !event {
                    assert!(answer.is_refusal(), "{} with {what}: {answer:?}", kind.name);
                }
                session.use_ring(stage);
                bad.end(session);
            }
        }
        bad.nothing_leaks();
    }
}

#[test]
fn message_cut_off_at_any_byte_ends_with_its_sender() {
    let mut bad = Bad::new();
    for kind in MESSAGES {
        let len = {
            let session = bad.session(Stage::Negotiated);
            12 + (kind.payload)(session.device()).len()
        };
        for cut in 1..len {
            let stage = STAGES[cut % 3];
            let session = bad.session(stage);
            let payload = (kind.payload)(session.device());
            let mut bytes = header(kind.id, flag::VERSION, payload.len() as u32).to_vec();
            bytes.extend(payload);
            let files = session.files(kind);
            session.raw_bytes(&bytes[..cut], &files.raw()).unwrap();
            // And then it hangs up.
            bad.end(session);
        }
        bad.nothing_leaks();
    }
}

#[test]
fn every_word_of_a_payload_may_be_extreme() {
    let extremes = [
        1,
        2,
        0x100,
        0xffff,
        0x1_0000,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX,
    ];
    let mut bad = Bad::new();
    for kind in MESSAGES {
        let words = {
            let session = bad.session(Stage::Negotiated);
            (kind.payload)(session.device()).len() / 4
        };
        for word in 0..words {
            for (n, value) in extremes.iter().enumerate() {
                let mut session = bad.session(STAGES[1 + n % 2]);
                let mut payload = (kind.payload)(session.device());
                payload[4 * word..][..4].copy_from_slice(&value.to_le_bytes());
                session.send(kind, &payload);
                bad.end(session);
            }
        }
        for fill in [0, 0x55, 0xff] {
            for stage in [Stage::Negotiated, Stage::Running] {
                let mut session = bad.session(stage);
                session.send(kind, &vec![fill; 4 * words]);
                bad.end(session);
            }
        }
        bad.nothing_leaks();
    }
}

#[test]
fn message_out_of_order_or_twice_does_no_harm() {
    let mut bad = Bad::new();
    for kind in MESSAGES {
        for stage in Stage::ALL {
            let mut session = bad.session(stage);
            let payload = (kind.payload)(session.device());
            for _ in 0..3 {
                if session.send(kind, &payload) == Answer::Ended {
                    break;
                }
            }
            session.use_ring(stage);
            bad.end(session);
        }
        bad.nothing_leaks();
    }
}

#[test]
fn unknown_messages_are_refused_with_whatever_they_bring() {
    let mut bad = Bad::new();
    for id in [0, 46, 47, 64, 100, 1000, 0x8000_0000, u32::MAX] {
        for len in [0, 1, 8, 40, 4096] {
            let mut session = bad.session(Stage::Running);
            let kind = table::Kind {
                id,
                name: "unknown",
                ..MESSAGES[44]
            };
            let event = frontend::sys::EventFd::new().unwrap();
            let answer = session.send_with(&kind, &vec![1; len], &[event.raw(); 3]);
            assert_eq!(answer, Answer::Refused, "message {id} of {len} bytes");
            session.use_ring(Stage::Running);
            bad.end(session);
        }
    }
    bad.nothing_leaks();
}
