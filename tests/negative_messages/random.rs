//! Random sequences of messages, right and wrong, and bytes that are none.

use std::os::fd::AsRawFd;

use vhost_user_frontend as frontend;

use frontend::Error;
use frontend::guest::Random;
use frontend::message::header;
use frontend::protocol::flag;

use crate::rig::{Answer, Bad, Stage, WRONG_FILES};
use crate::table::MESSAGES;

fn number(name: &str, default: u64) -> u64 {
    let set = std::env::var(name).ok();
    set.map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_sequences_of_messages_end_in_answers_or_in_the_end_of_the_connection() {
    let first_seed = number("VIRTIOBLKD_NEGATIVE_SEED", 1);
    let messages = number("VIRTIOBLKD_NEGATIVE_MESSAGES", 4000);
    let mut bad = Bad::new();
    let (mut sent, mut seed) = (0, first_seed);
    while sent < messages {
        let mut random = Random::new(seed);
        let stage = Stage::ALL[random.below(5) as usize];
        let mut session = bad.session(stage);
        for _ in 0..40 {
            let kind = MESSAGES[random.below(MESSAGES.len() as u64) as usize];
            let mut payload = (kind.payload)(session.device());
            let mut files = session.files(&kind).0;
            match random.below(12) {
                0 => payload.resize(random.below(100) as usize, random.next() as u8),
                1 => random.fill(&mut payload),
                2 | 3 if !payload.is_empty() => {
                    let at = random.below(payload.len() as u64) as usize;
                    payload[at] = random.next() as u8;
                }
                4 if payload.len() >= 4 => {
                    // Another ring, or none.
                    payload[..4].copy_from_slice(&(random.below(4) as u32).to_le_bytes());
                }
                5 => files.clear(),
                6 => {
                    let make = WRONG_FILES[random.below(WRONG_FILES.len() as u64) as usize].1;
                    files.extend(make());
                }
                7 => {
                    let make = WRONG_FILES[random.below(WRONG_FILES.len() as u64) as usize].1;
                    files = make();
                    files.truncate(1);
                }
                _ => {}
            }
            let fds: Vec<i32> = files.iter().map(|file| file.as_raw_fd()).collect();
            sent += 1;
            if session.send_with(&kind, &payload, &fds) == Answer::Ended {
                break;
            }
            if random.below(8) == 0 {
                session.use_ring(stage);
            }
        }
        println!("seed {seed}: {stage:?}, {sent} messages");
        bad.end(session);
        seed += 1;
    }
    bad.nothing_leaks();
}

#[test]
fn bytes_that_are_no_messages_end_the_connection_or_wait_for_more() {
    let mut bad = Bad::new();
    let mut random = Random::new(7);
    for round in 0..300 {
        let session = bad.session(Stage::ALL[round % 5]);
        let len = 1 + random.below(300) as usize;
        let mut bytes = random.bytes(len);
        if round % 3 == 0 {
            // A header of this protocol, and what follows it is not.
            let id = random.below(48) as u32;
            let size = random.below(200) as u32;
            bytes.splice(0..0, header(id, flag::VERSION, size));
        }
        let event = frontend::sys::EventFd::new().unwrap();
        let fds = vec![event.raw(); random.below(4) as usize];
        match session.raw_bytes(&bytes, &fds) {
            Ok(()) | Err(Error::Closed) => {}
            Err(error) => panic!("{error}"),
        }
        bad.end(session);
    }
    bad.nothing_leaks();
}
