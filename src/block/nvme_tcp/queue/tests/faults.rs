//! Connections that end, controllers that fail, and answers that do not come.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::all;
use super::peer::Do;
use super::rig::{Rig, Setup, pattern};
use crate::block::nvme_tcp::link::{Access, PathState};
use crate::block::{ErrorKind, Result};

const LEN: usize = 16 << 10;
const DNR: u16 = 1 << 14;

/// Two paths that are both connected, the first one preferred; nothing was seen.
fn first_of_two() -> Rig {
    let rig = Rig::new(Setup {
        paths: 2,
        ..Setup::default()
    });
    for only in [1, 0] {
        rig.paths[1 - only].shared.set_access(Access::Inaccessible);
        rig.paths[only].shared.set_access(Access::Optimized);
        let mut buf = rig.io.buf(LEN);
        let read = rig.storage().read(&rig.io, 0, buf.sg());
        rig.io.block_on(read).unwrap();
    }
    rig.paths[1].shared.set_access(Access::NonOptimized);
    rig.paths.iter().for_each(|path| path.peer.forget());
    rig
}

fn read(rig: &Rig, offset: u64) -> Result<()> {
    let mut buf = rig.io.buf(LEN);
    rig.io
        .block_on(rig.storage().read(&rig.io, offset, buf.sg()))?;
    for (at, byte) in (offset..).zip(&*buf) {
        assert_eq!(*byte, pattern(at), "{at:#x}");
    }
    Ok(())
}

/// 32 requests at once, half of them writes, and all bytes right.
fn round(rig: &Rig, round: u64) {
    let half = 2 << 20;
    rig.io.block_on(async {
        let mut bufs: Vec<_> = (0..32).map(|_| rig.io.buf(LEN)).collect();
        let pending: Vec<_> = (0u64..)
            .zip(&mut bufs)
            .map(|(n, buf)| {
                let place = n * LEN as u64;
                if n % 2 == 0 {
                    return rig.storage().begin_read(&rig.io, place, buf.sg());
                }
                buf.fill((n + round) as u8);
                rig.storage().begin_write(&rig.io, half + place, buf.sg())
            })
            .collect();
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
        for (n, buf) in (0u64..).zip(&bufs).step_by(2) {
            let place = n * LEN as u64;
            assert!((place..).zip(&**buf).all(|(at, b)| *b == pattern(at)));
        }
    });
    rig.peer().with_disk(|disk| {
        for n in (1..32).step_by(2) {
            let at = half as usize + n * LEN;
            let want = (n as u64 + round) as u8;
            assert!(disk[at..at + LEN].iter().all(|b| *b == want), "{n}");
        }
    });
}

#[test]
fn connections_that_are_cut_again_and_again_cost_no_request() {
    for (digests, tls) in [(false, false), (true, false), (false, true)] {
        let rig = Rig::new(Setup {
            tls,
            ..Setup::default().digests(digests, digests)
        });
        rig.fill();
        let mut count = 0;
        rig.peer().script(move |_| {
            count += 1;
            match count % 41 {
                11 => Do::Cut,
                40 => Do::ExecuteAndCut,
                _ => Do::It,
            }
        });
        (0..10).for_each(|n| round(&rig, n));
        assert!(rig.path().told("failed") >= 10);
    }
}

#[test]
fn a_read_that_is_cut_in_the_middle_of_its_data_is_done_again() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    rig.peer().script(|command| match command.number {
        0 => Do::SendHalf,
        _ => Do::It,
    });
    let mut buf = rig.io.buf(LEN);
    buf.fill(0xaa);
    let first = buf.as_ptr();
    let pending = rig.storage().begin_read(&rig.io, 4096, buf.sg());
    // SAFETY: the buffer is alive; only the kernel writes to it.
    rig.until(|| unsafe { first.read_volatile() } == pattern(4096));
    rig.peer().cut();
    rig.io.block_on(pending.finish(&rig.io)).unwrap();
    assert!((4096..).zip(&*buf).all(|(at, byte)| *byte == pattern(at)));
}

#[test]
fn what_a_lost_connection_has_not_sent_never_arrives() {
    let rig = first_of_two();
    rig.peer().script(|_| Do::Stall);
    // In capsules, so nothing has to be asked for; more than the peer's buffer takes while it does not read.
    const WRITES: usize = 64;
    let mut bufs: Vec<_> = (0..WRITES).map(|_| rig.io.buf(8192)).collect();
    let pending: Vec<_> = (0u64..)
        .zip(&mut bufs)
        .map(|(n, buf)| rig.storage().begin_write(&rig.io, n * 8192, buf.sg()))
        .collect();
    rig.until(|| rig.peer().seen().len() == 1);
    // Nobody but the host ends the connection.
    rig.path().lose(PathState::Connecting);
    rig.io.block_on(async {
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
    });
    assert_eq!(rig.paths[1].peer.seen().len(), WRITES);
    // An answer would be told that nobody wants it.
    rig.peer().script(|_| Do::Hold);
    rig.peer().go_on();
    rig.until(|| rig.peer().serving() == 0);
    assert!(rig.peer().seen().len() < WRITES, "all have arrived");
}

#[test]
fn a_write_of_a_queue_that_failed_alone_waits_for_that_queue_and_a_read_does_not() {
    for connected in [true, false] {
        let rig = first_of_two();
        rig.path().reconnects.store(false, Ordering::SeqCst);
        rig.peer().script(|_| Do::Hold);
        let (mut first, mut second) = (rig.io.buf(LEN), rig.io.buf(LEN));
        let written = rig.storage().begin_write(&rig.io, 0, first.sg());
        let read = rig.storage().begin_read(&rig.io, 0, second.sg());
        rig.until(|| rig.peer().seen().len() == 2);
        rig.peer().cut();
        rig.io.block_on(read.finish(&rig.io)).unwrap();
        rig.until(|| rig.path().told("failed") == 1);
        let elsewhere = || -> Vec<u8> {
            let seen = rig.paths[1].peer.seen();
            seen.iter().map(|command| command.opcode()).collect()
        };
        assert_eq!(elsewhere(), [2], "the write waits");
        rig.peer().script(|_| Do::It);
        if connected {
            rig.path().go_up();
        } else {
            // The association is lost; this member has no queue of it any more.
            rig.path().shared.set_state(PathState::Connecting);
            rig.namespace.tell_all();
        }
        rig.io.block_on(written.finish(&rig.io)).unwrap();
        assert_eq!(elsewhere(), if connected { vec![2] } else { vec![2, 1] });
    }
}

fn with_timeout() -> Rig {
    let rig = Rig::new(Setup {
        io_timeout: Duration::from_millis(80),
        ..Setup::default()
    });
    rig.fill();
    rig
}

#[test]
fn a_command_that_takes_too_long_is_aborted_and_done_again() {
    let rig = with_timeout();
    rig.peer().script(|command| match command.number {
        0 => Do::Hold,
        _ => Do::It,
    });
    read(&rig, 0).unwrap();
    assert_eq!(rig.path().told("abort"), 1);
    assert_eq!(rig.path().told("failed"), 0);
}

#[test]
fn a_command_whose_abort_does_not_help_ends_its_connection() {
    let rig = with_timeout();
    rig.path().aborts.store(false, Ordering::SeqCst);
    rig.peer().script(|command| match command.number {
        0 => Do::Hold,
        _ => Do::It,
    });
    read(&rig, 0).unwrap();
    assert_eq!(rig.path().told("abort"), 1);
    assert_eq!(rig.path().told("failed: a command has got no answer"), 1);
}

#[test]
fn a_command_that_is_never_answered_fails_in_the_end() {
    let rig = with_timeout();
    rig.path().aborts.store(false, Ordering::SeqCst);
    rig.peer().script(|_| Do::Hold);
    let error = read(&rig, 4096).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("read: it got no answer in time"), "{text}");
    assert_eq!(error.offset(), Some(4096));
    assert_eq!(rig.peer().seen().len(), 6);
}

#[test]
fn time_stands_still_when_nothing_is_under_way() {
    let rig = with_timeout();
    read(&rig, 0).unwrap();
    let start = Instant::now();
    // Ticks, if there were any, would come every 10 ms.
    loop {
        assert!(start.elapsed() < Duration::from_secs(20), "it goes on");
        while rig.io.turn() {}
        rig.io.park(Some(Duration::from_millis(100)));
        if !rig.io.turn() {
            break;
        }
    }
    read(&rig, 4096).unwrap();
}

#[test]
fn data_with_a_wrong_digest_are_fetched_again() {
    let rig = Rig::new(Setup::default().digests(false, true));
    rig.fill();
    rig.peer().script(|command| match command.number {
        0 => Do::WrongDigest,
        _ => Do::It,
    });
    read(&rig, 8192).unwrap();
    assert_eq!(rig.peer().seen().len(), 2);
    assert_eq!(
        rig.path().told("failed"),
        0,
        "the connection is as good as it was"
    );
}

#[test]
fn a_failed_command_is_tried_again_unless_the_controller_advises_against_it() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    rig.peer().script(|command| match command.number {
        0..5 => Do::Fail(0x281),
        _ => Do::It,
    });
    read(&rig, 0).unwrap();
    rig.peer().forget();
    rig.peer().script(|_| Do::Fail(0x281));
    let error = read(&rig, 4096).unwrap_err();
    assert_eq!(rig.peer().seen().len(), 6, "once, and five times more");
    assert_eq!((error.kind(), error.offset()), (ErrorKind::Io, Some(4096)));
    let text = error.to_string();
    let want = "nvme+tcp://127.0.0.1/test: at offset 0x1000: read failed: Unrecovered Read Error";
    assert!(text.starts_with(want), "{text}");
    for (status, kind) in [
        (0x083, ErrorKind::Locked),
        (0x080, ErrorKind::OutOfRange),
        (0x286, ErrorKind::NotAllowed),
    ] {
        rig.peer().forget();
        rig.peer().script(move |_| Do::Fail(DNR | status));
        assert_eq!(read(&rig, 0).unwrap_err().kind(), kind);
        assert_eq!(rig.peer().seen().len(), 1);
    }
}

#[test]
fn one_part_of_a_request_that_fails_fails_it_and_the_queue_goes_on() {
    let mut setup = Setup::default();
    setup.limits.max_transfer = 4096;
    setup.params.depth = 2;
    let rig = Rig::new(setup);
    rig.fill();
    rig.peer().script(|command| match command.slba() {
        16 => Do::Fail(DNR | 0x281),
        _ => Do::It,
    });
    let error = read(&rig, 0).unwrap_err();
    assert_eq!(error.offset(), Some(8192), "{error}");
    read(&rig, 16384).unwrap();
}

#[test]
fn a_retry_waits_as_long_as_the_controller_asks() {
    let mut setup = Setup::default();
    setup.limits.retry_delays = [0, 2, 0];
    let rig = Rig::new(setup);
    rig.fill();
    // Command Interrupted, CRD 2.
    rig.peer().script(|command| match command.number {
        0 => Do::Fail(0x021 | 2 << 11),
        _ => Do::It,
    });
    let start = Instant::now();
    read(&rig, 0).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[test]
fn a_retry_waits_no_longer_than_a_command_may_take() {
    let mut setup = Setup {
        io_timeout: Duration::from_millis(80),
        ..Setup::default()
    };
    setup.limits.retry_delays = [u16::MAX; 3];
    let rig = Rig::new(setup);
    rig.fill();
    rig.peer().script(|command| match command.number {
        0 => Do::Fail(0x021 | 1 << 11),
        _ => Do::It,
    });
    let start = Instant::now();
    read(&rig, 0).unwrap();
    assert!(start.elapsed() < Duration::from_secs(6553));
}

#[test]
fn a_controller_that_breaks_the_protocol_is_told_so_and_connected_anew() {
    for tls in [false, true] {
        breaks_the_protocol(tls);
    }
}

fn breaks_the_protocol(tls: bool) {
    let rig = Rig::new(Setup {
        tls,
        ..Setup::default()
    });
    rig.fill();
    rig.peer().script(|command| match command.number {
        // A response to a command that nobody sent.
        0 => {
            let mut pdu = vec![0; 24];
            (pdu[0], pdu[2], pdu[4]) = (0x05, 24, 24);
            pdu[20..22].copy_from_slice(&(command.cid() ^ 1).to_le_bytes());
            Do::Say(pdu)
        }
        _ => Do::It,
    });
    read(&rig, 0).unwrap();
    assert_eq!(rig.path().told("failed: protocol error"), 1);
    rig.until(|| rig.peer().terminated() == 1);
}

#[test]
fn a_command_that_makes_the_controller_break_the_protocol_fails_in_the_end() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    // A success without any data.
    rig.peer().script(|command| match command.slba() {
        0 => Do::Fail(0),
        _ => Do::It,
    });
    let error = read(&rig, 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(error.to_string().contains("breaks the protocol"), "{error}");
    assert_eq!(rig.peer().seen().len(), 6);
    read(&rig, 8192).unwrap();
}

/// Reads at once, one for each result: all bytes of those that succeed are right.
fn reads(rig: &Rig, count: usize) -> Vec<Result<()>> {
    let mut bufs: Vec<_> = (0..count).map(|_| rig.io.buf(LEN)).collect();
    let place = |n: usize| (n * LEN) as u64;
    let results = rig.io.block_on(async {
        let pending: Vec<_> = (0..)
            .zip(&mut bufs)
            .map(|(n, buf)| rig.storage().begin_read(&rig.io, place(n), buf.sg()))
            .collect();
        all(pending.into_iter().map(|one| one.finish(&rig.io))).await
    });
    for (n, result) in results.iter().enumerate() {
        let right = |(at, byte): (u64, &u8)| *byte == pattern(at);
        assert!(
            result.is_err() || (place(n)..).zip(&*bufs[n]).all(right),
            "{n}"
        );
    }
    results
}

#[test]
fn a_command_that_makes_the_controller_break_the_protocol_takes_no_other_along() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    // A success without any data. What was sent behind it gets no answer.
    rig.peer().script(|command| match command.slba() {
        0 => Do::Fail(0),
        _ => Do::It,
    });
    let results = reads(&rig, 32);
    let error = results[0].as_ref().unwrap_err();
    assert!(error.to_string().contains("breaks the protocol"), "{error}");
    for result in &results[1..] {
        result.as_ref().unwrap();
    }
}

#[test]
fn a_controller_that_breaks_the_protocol_now_and_then_costs_no_request() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    let mut count = 0;
    rig.peer().script(move |_| {
        count += 1;
        match count % 7 {
            0 => Do::Fail(0),
            _ => Do::It,
        }
    });
    for result in reads(&rig, 64) {
        result.unwrap();
    }
    assert!(rig.path().told("failed: protocol error") > 6);
}

#[test]
fn a_command_that_is_refused_for_want_of_authentication_fails_in_the_end() {
    let rig = Rig::new(Setup::default());
    rig.peer().script(|_| Do::Fail(0x191));
    let error = read(&rig, 0).unwrap_err();
    assert!(error.to_string().contains("read failed"), "{error}");
    assert_eq!(rig.peer().seen().len(), 6);
}
