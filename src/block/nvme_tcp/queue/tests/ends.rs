//! Requests that are given up, and threads and storages that end.

use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;

use super::peer::Do;
use super::rig::{Rig, Setup, io, pattern};
use crate::block::Storage;
use crate::reactor::{Io, TaskId};

const LEN: usize = 16 << 10;

#[test]
fn a_request_dropped_in_the_middle_of_its_data_leaves_its_memory_alone() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    rig.peer().script(|command| match command.number {
        0 => Do::Hold,
        1 => Do::SendHalf,
        _ => Do::It,
    });
    let mut other = rig.io.buf(LEN);
    let other_pending = rig.storage().begin_read(&rig.io, 0, other.sg());
    let mut buf = rig.io.buf(LEN);
    buf.fill(0xaa);
    let first = buf.as_ptr();
    let pending = rig.storage().begin_read(&rig.io, 4096, buf.sg());
    // SAFETY: the buffer is alive; only the kernel writes to it.
    rig.until(|| unsafe { first.read_volatile() } == pattern(4096));
    drop(pending);
    buf.fill(0x55);
    // What was under way beside it is done on the next connection.
    rig.io.block_on(other_pending.finish(&rig.io)).unwrap();
    assert!((0..).zip(&*other).all(|(at, byte)| *byte == pattern(at)));
    assert!(buf.iter().all(|byte| *byte == 0x55));
    assert_eq!(rig.path().told("failed: a request was given up"), 1);
}

#[test]
fn a_request_dropped_shortly_before_its_answer_costs_no_connection() {
    let rig = Rig::new(Setup::default());
    rig.peer().script(|_| Do::Hold);
    let mut buf = rig.io.buf(LEN);
    let pending = rig.storage().begin_read(&rig.io, 4096, buf.sg());
    rig.until(|| rig.peer().seen().len() == 1);
    rig.peer().answer_held();
    drop(pending);
    rig.peer().script(|_| Do::It);
    rig.io
        .block_on(rig.storage().read(&rig.io, 0, buf.sg()))
        .unwrap();
    assert_eq!(rig.path().told("failed"), 0);
}

#[test]
fn a_request_dropped_while_it_waits_is_never_sent() {
    let rig = Rig::new(Setup {
        up: false,
        ..Setup::default()
    });
    let mut bufs: Vec<_> = (0..3).map(|_| rig.io.buf(4096)).collect();
    let mut pending: Vec<_> = (0u64..)
        .zip(&mut bufs)
        .map(|(n, buf)| rig.storage().begin_read(&rig.io, n * 4096, buf.sg()))
        .collect();
    drop(pending.remove(1));
    rig.until(|| rig.path().told("join") == 1);
    rig.path().go_up();
    for one in pending {
        rig.io.block_on(one.finish(&rig.io)).unwrap();
    }
    let seen: Vec<u64> = rig.peer().seen().iter().map(|c| c.slba() / 8).collect();
    assert_eq!(seen, [0, 2]);
}

/// A task that reads, and says when it has.
fn reader(rig: &mut Rig, ended: &Rc<Cell<bool>>) -> (TaskId, Arc<Storage>) {
    let storage = Arc::new(rig.storage.take().unwrap());
    let (io, ended, its) = (rig.io.clone(), ended.clone(), storage.clone());
    let task = rig.io.spawn(async move {
        let mut buf = io.buf(4096);
        let _ = its.read(&io, 0, buf.sg()).await;
        ended.set(true);
        pending::<()>().await;
    });
    (task, storage)
}

#[test]
fn a_held_task_is_quiet_at_once_if_its_request_waits_and_it_is_never_sent() {
    let mut rig = Rig::new(Setup {
        up: false,
        ..Setup::default()
    });
    let ended = Rc::new(Cell::new(false));
    let (task, storage) = reader(&mut rig, &ended);
    rig.until(|| rig.path().told("join") == 1);
    assert!(rig.io.is_quiet(task), "nobody works at it");
    rig.io.hold(task);
    rig.path().go_up();
    let mut buf = rig.io.buf(4096);
    rig.io
        .block_on(storage.read(&rig.io, 8192, buf.sg()))
        .unwrap();
    assert_eq!(rig.peer().seen().len(), 1);
    rig.io.remove(task);
    assert!(!ended.get());
}

#[test]
fn a_held_task_whose_request_is_under_way_is_quiet_when_that_has_ended() {
    let mut rig = Rig::new(Setup::default());
    rig.peer().script(|_| Do::Hold);
    let ended = Rc::new(Cell::new(false));
    let (task, _storage) = reader(&mut rig, &ended);
    rig.until(|| rig.peer().seen().len() == 1);
    rig.io.hold(task);
    while rig.io.turn() {}
    assert!(!rig.io.is_quiet(task));
    rig.peer().answer_held();
    rig.until(|| rig.io.is_quiet(task));
    rig.io.remove(task);
    assert!(!ended.get());
}

fn read_with(io: &Io, storage: &Storage) {
    let mut buf = io.buf(4096);
    io.block_on(storage.read(io, 0, buf.sg())).unwrap();
}

#[test]
fn a_reactor_that_ends_leaves_the_namespace_whether_it_was_closed_or_not() {
    let rig = Rig::new(Setup::default());
    let other = io();
    read_with(&other, rig.storage());
    drop(other);
    rig.until(|| rig.path().told("leave") == 1);
    let other = io();
    read_with(&other, rig.storage());
    other.close();
    rig.until(|| rig.path().told("leave") == 2);
    // It can be used on.
    read_with(&other, rig.storage());
    assert_eq!(rig.path().told("join"), 3);
}

#[test]
fn a_reactor_closes_with_requests_under_way() {
    let mut rig = Rig::new(Setup::default());
    rig.peer().script(|_| Do::Hold);
    let ended = Rc::new(Cell::new(false));
    let (_task, _storage) = reader(&mut rig, &ended);
    rig.until(|| rig.peer().seen().len() == 1);
    rig.io.close();
    assert!(!ended.get());
    rig.until(|| rig.path().told("leave") == 1);
}

#[test]
fn a_storage_that_is_dropped_is_left_by_all_threads() {
    let mut rig = Rig::new(Setup::default());
    read_with(&rig.io, rig.storage());
    rig.storage = None;
    rig.until(|| Arc::strong_count(&rig.namespace) == 1 + rig.paths.len());
}

#[test]
fn a_thread_that_takes_no_turn_keeps_no_connection_of_the_past() {
    let rig = Rig::new(Setup::default());
    let member = rig.namespace.join();
    rig.until(|| rig.path().told("join") == 1);
    (0..3).for_each(|_| rig.path().go_up());
    rig.namespace.tell_all();
    rig.namespace.tell_all();
    assert_eq!(member.take_events().len(), 2);
}
