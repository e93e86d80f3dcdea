//! Which path a request takes, and what becomes of it while there is none.

use std::time::Duration;

use super::all;
use super::peer::Do;
use super::rig::{Rig, Setup, io};
use crate::block::nvme_tcp::link::{Access, NamespaceState, PathState};
use crate::block::nvme_tcp::spec::IoPolicy;
use crate::block::{ErrorKind, Pending, Result};

const LEN: usize = 4096;

fn read(rig: &Rig) -> Result<()> {
    let mut buf = rig.io.buf(LEN);
    rig.io.block_on(rig.storage().read(&rig.io, 0, buf.sg()))
}

fn seen(rig: &Rig) -> Vec<usize> {
    let all = rig.paths.iter().map(|path| path.peer.seen().len());
    all.collect()
}

/// With both paths connected, and nothing seen.
fn two_paths(policy: IoPolicy) -> Rig {
    let rig = Rig::new(Setup {
        paths: 2,
        policy,
        ..Setup::default()
    });
    // Both are connected once requests have gone to both.
    for only in [0, 1] {
        rig.paths[1 - only].shared.set_access(Access::Inaccessible);
        read(&rig).unwrap();
        rig.paths[1 - only].shared.set_access(Access::Optimized);
    }
    rig.paths.iter().for_each(|path| path.peer.forget());
    rig
}

#[test]
fn optimized_paths_come_before_others() {
    let rig = two_paths(IoPolicy::RoundRobin);
    rig.paths[0].shared.set_access(Access::NonOptimized);
    (0..6).for_each(|_| read(&rig).unwrap());
    assert_eq!(seen(&rig), [0, 6]);
    rig.paths[1].shared.set_access(Access::Change);
    (0..6).for_each(|_| read(&rig).unwrap());
    assert_eq!(seen(&rig), [6, 6]);
}

#[test]
fn a_flush_is_sent_if_any_path_has_a_write_cache() {
    let mut setup = Setup {
        paths: 2,
        without_cache: Some(1),
        ..Setup::default()
    };
    setup.limits.volatile_write_cache = true;
    let rig = Rig::new(setup);
    for only in [0, 1] {
        rig.paths[1 - only].shared.set_access(Access::Inaccessible);
        rig.paths[only].shared.set_access(Access::Optimized);
        read(&rig).unwrap();
    }
    rig.io.block_on(rig.storage().flush(&rig.io)).unwrap();
    assert_eq!(seen(&rig), [1, 2]);
}

#[test]
fn round_robin_takes_turns() {
    let rig = two_paths(IoPolicy::RoundRobin);
    (0..10).for_each(|_| read(&rig).unwrap());
    assert_eq!(seen(&rig), [5, 5]);
}

#[test]
fn queue_depth_takes_the_path_with_fewer_commands() {
    let rig = two_paths(IoPolicy::QueueDepth);
    rig.paths[0].peer.script(|_| Do::Hold);
    let mut bufs: Vec<_> = (0..2).map(|_| rig.io.buf(LEN)).collect();
    let mut pending: Vec<Pending<'_>> = bufs
        .iter_mut()
        .map(|buf| rig.storage().begin_read(&rig.io, 0, buf.sg()))
        .collect();
    rig.until(|| seen(&rig) == [1, 1]);
    rig.io
        .block_on(pending.pop().unwrap().finish(&rig.io))
        .unwrap();
    // One is under way on the first path, so all others take the second.
    (0..6).for_each(|_| read(&rig).unwrap());
    assert_eq!(seen(&rig), [1, 7]);
    rig.paths[0].peer.answer_held();
    rig.io
        .block_on(pending.pop().unwrap().finish(&rig.io))
        .unwrap();
}

#[test]
fn a_status_of_the_path_sends_the_command_elsewhere_and_the_path_is_looked_at() {
    // Asymmetric Access Inaccessible, and an Internal Path Error.
    for status in [0x302, 0x300] {
        let rig = two_paths(IoPolicy::QueueDepth);
        let shared = rig.paths[0].shared.clone();
        rig.paths[0].peer.script(move |_| {
            shared.set_access(Access::Inaccessible);
            Do::Fail(status)
        });
        read(&rig).unwrap();
        assert_eq!(seen(&rig), [1, 1]);
        rig.until(|| rig.paths[0].told("look") == 1);
        assert_eq!(rig.paths[0].told("failed"), 0);
    }
}

#[test]
fn a_path_that_seems_good_but_is_not_is_not_asked_in_a_circle() {
    let rig = Rig::new(Setup {
        io_timeout: Duration::from_millis(80),
        ..Setup::default()
    });
    rig.peer().script(|command| match command.number {
        0..10 => Do::Fail(0x303),
        _ => Do::It,
    });
    // More often than a command of its own fault is tried.
    read(&rig).unwrap();
    assert_eq!(seen(&rig), [11]);
}

#[test]
fn a_path_that_never_is_what_it_seems_is_asked_seldom_and_the_request_fails_in_the_end() {
    let rig = Rig::new(Setup {
        io_timeout: Duration::from_millis(80),
        ctrl_loss: Some(Duration::from_millis(300)),
        ..Setup::default()
    });
    // An Internal Path Error, for as long as a request can reasonably last.
    rig.peer().script(|command| match command.number {
        0..1000 => Do::Fail(0x300),
        _ => Do::It,
    });
    let error = read(&rig).unwrap_err();
    assert!(error.to_string().contains("read failed"), "{error}");
    assert!(rig.peer().seen().len() < 100);
}

#[test]
fn a_path_is_looked_at_once_however_many_commands_say_so() {
    let rig = Rig::new(Setup::default());
    rig.peer().script(|_| Do::Hold);
    let mut bufs: Vec<_> = (0..16).map(|_| rig.io.buf(LEN)).collect();
    let pending: Vec<Pending<'_>> = bufs
        .iter_mut()
        .map(|buf| rig.storage().begin_read(&rig.io, 0, buf.sg()))
        .collect();
    rig.until(|| seen(&rig) == [16]);
    rig.peer().script(|_| Do::It);
    // All answers are there before the first one is taken.
    for command in rig.peer().seen() {
        assert!(rig.peer().fail_held(command.cid(), 0x302));
    }
    rig.io.block_on(async {
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
    });
    assert!((1..=3).contains(&rig.path().told("look")));
}

#[test]
fn a_dead_path_leaves_the_other_alone_and_its_commands_go_there() {
    let rig = two_paths(IoPolicy::RoundRobin);
    rig.paths[0].peer.script(|_| Do::Hold);
    rig.io.block_on(async {
        let mut bufs: Vec<_> = (0..32).map(|_| rig.io.buf(LEN)).collect();
        let pending: Vec<_> = bufs
            .iter_mut()
            .map(|buf| rig.storage().begin_read(&rig.io, 0, buf.sg()))
            .collect();
        rig.paths[0].go_down(PathState::Connecting);
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
    });
    assert_eq!(rig.paths[1].peer.seen().len(), 32);
    assert_eq!(rig.paths[1].told("failed"), 0);
}

#[test]
fn requests_wait_for_a_path_and_begin_in_their_order() {
    let rig = Rig::new(Setup {
        up: false,
        ..Setup::default()
    });
    let mut bufs: Vec<_> = (0..40).map(|_| rig.io.buf(LEN)).collect();
    let pending: Vec<_> = (0u64..)
        .zip(&mut bufs)
        .map(|(n, buf)| {
            rig.storage()
                .begin_write(&rig.io, (39 - n) * LEN as u64, buf.sg())
        })
        .collect();
    rig.until(|| rig.path().told("join") == 1);
    rig.path().go_up();
    rig.io.block_on(async {
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
    });
    let order: Vec<u64> = rig.peer().seen().iter().map(|c| c.slba() / 8).collect();
    assert_eq!(order, (0..40).rev().collect::<Vec<_>>());
}

#[test]
fn what_was_under_way_begins_again_before_what_waited() {
    let mut setup = Setup::default();
    setup.params.depth = 4;
    let rig = Rig::new(setup);
    rig.peer().script(|command| match command.number {
        0..4 => Do::Hold,
        _ => Do::It,
    });
    let mut bufs: Vec<_> = (0..8).map(|_| rig.io.buf(LEN)).collect();
    let pending: Vec<_> = (0u64..)
        .zip(&mut bufs)
        .map(|(n, buf)| rig.storage().begin_read(&rig.io, n * LEN as u64, buf.sg()))
        .collect();
    rig.until(|| seen(&rig) == [4]);
    rig.peer().cut();
    rig.io.block_on(async {
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
    });
    let order: Vec<u64> = rig.peer().seen().iter().map(|c| c.slba() / 8).collect();
    assert_eq!(order, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn a_request_fails_when_no_path_is_going_to_be_usable() {
    for state in [PathState::FailingFast, PathState::Lost] {
        let rig = Rig::new(Setup {
            paths: 2,
            up: false,
            ..Setup::default()
        });
        let mut buf = rig.io.buf(LEN);
        let pending = rig.storage().begin_read(&rig.io, 8192, buf.sg());
        rig.until(|| rig.paths.iter().all(|path| path.told("join") == 1));
        rig.paths[0].go_down(state);
        rig.namespace.tell_all();
        while rig.io.turn() {}
        rig.paths[1].shared.set_state(PathState::Live);
        rig.paths[1].refuse("no queue is left");
        let error = rig.io.block_on(pending.finish(&rig.io)).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.offset(), Some(8192));
        assert!(text.contains("127.0.0.1:4421: no queue is left"), "{text}");
        // The next one need not wait.
        assert!(read(&rig).is_err());
        rig.paths[1].go_up();
        let other = io();
        let mut buf = other.buf(LEN);
        other
            .block_on(rig.storage().read(&other, 0, buf.sg()))
            .unwrap();
    }
}

#[test]
fn a_refusal_of_an_association_that_is_over_fails_nothing() {
    let rig = Rig::new(Setup {
        up: false,
        ..Setup::default()
    });
    let mut buf = rig.io.buf(LEN);
    let pending = rig.storage().begin_read(&rig.io, 0, buf.sg());
    rig.until(|| rig.path().told("join") == 1);
    rig.path().refuse("no queue is left");
    rig.namespace.tell_all();
    while rig.io.turn() {}
    rig.path().go_up();
    rig.io.block_on(pending.finish(&rig.io)).unwrap();
}

#[test]
fn a_request_is_held_no_longer_than_the_controller_loss_time() {
    let rig = Rig::new(Setup {
        up: false,
        io_timeout: Duration::from_millis(80),
        ctrl_loss: Some(Duration::from_millis(100)),
        ..Setup::default()
    });
    let error = read(&rig).unwrap_err();
    assert!(error.to_string().contains("ctrl-loss-tmo"), "{error}");
}

#[test]
fn a_namespace_that_was_removed_or_protected_says_so() {
    let rig = two_paths(IoPolicy::QueueDepth);
    rig.namespace.set_state(NamespaceState::WriteProtected);
    read(&rig).unwrap();
    let mut buf = rig.io.buf(LEN);
    let write = rig.storage().write(&rig.io, 0, buf.sg());
    let error = rig.io.block_on(write).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(rig.storage().read_only());

    rig.paths
        .iter()
        .for_each(|path| path.peer.script(|_| Do::Hold));
    let mut buf = rig.io.buf(LEN);
    let pending = rig.storage().begin_read(&rig.io, 0, buf.sg());
    rig.namespace.set_state(NamespaceState::Removed);
    assert_eq!(read(&rig).unwrap_err().kind(), ErrorKind::NotFound);
    rig.paths.iter().for_each(|path| path.peer.cut());
    let error = rig.io.block_on(pending.finish(&rig.io)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}
