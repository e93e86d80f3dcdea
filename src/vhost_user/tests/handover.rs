//! A connection that goes on elsewhere.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use serde::Deserialize;

use super::channel::{Channel, MIB, read_config};
use super::*;
use crate::vhost_user::Connection;
use crate::vhost_user::handover::{ConnectionState, Incoming, KickState, Outgoing, SharedState};

/// The state of a connection as another process gets it.
fn told(connection: &Connection) -> (ConnectionState, Incoming) {
    let mut fds = Outgoing::default();
    let state = connection.export(&mut fds).unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let state = serde_json::from_str(&text).unwrap();
    (state, received(&fds))
}

/// The descriptors as another process gets them.
fn received(fds: &Outgoing) -> Incoming {
    let copies = fds.raw().into_iter().map(|fd| {
        // SAFETY: `fds` keeps it open.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fd.try_clone_to_owned().unwrap()
    });
    Incoming::new(copies.collect())
}

/// The same connection, taken over by another device.
fn successor(bench: &Bench) -> Result<Bench, String> {
    let mut fds = Outgoing::default();
    let state = bench.connection.export(&mut fds)?;
    import(&state, &fds, bench)
}

fn import(state: &ConnectionState, fds: &Outgoing, bench: &Bench) -> Result<Bench, String> {
    let device = FakeDevice::new();
    device.resize(bench.device.size.load(Ordering::Relaxed));
    let connection = Connection::import("disk", device.clone(), state, &mut received(fds))?;
    Ok(Bench {
        client: Client {
            sock: bench.client.sock.try_clone().unwrap(),
        },
        connection,
        device,
    })
}

/// Rings 0 and 2 run, 2 is disabled, 1 is half said.
fn in_use() -> Bench {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    put_to_use(&mut bench);
    bench
}

fn put_to_use(bench: &mut Bench) {
    bench.start_ring(0, 5);
    bench.start_ring(2, 7);
    bench.set(Req::SET_VRING_ENABLE, &state(2, 0), &[]);
    bench.set(Req::SET_VRING_NUM, &state(1, 64), &[]);
    bench.set(Req::SET_VRING_BASE, &state(1, 3), &[]);
    bench.set(Req::SET_STATUS, &words(&[0xb]), &[]);
    bench.device.calls();
}

/// What a VMM has shared besides its guest's memory.
struct Shared {
    inflight: File,
    log: File,
}

/// A session in use, with an inflight region, and logging its writes.
fn in_use_with_shared_memory() -> (Bench, Shared) {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    let (size, inflight) = super::inflight::get(&mut bench, 4, 128);
    assert!(super::inflight::set(&mut bench, size, &inflight));
    put_to_use(&mut bench);
    let log = memfd(log::LOG + 0x1000);
    log::set_log_base(&mut bench, log::LOG, 0x1000, &log);
    assert_eq!(log::features(&mut bench, log::ON), [Asked::Log(true)]);
    bench.set(Req::SET_VRING_ADDR, &log::logged(2, 0x2000), &[]);
    bench.device.calls();
    (bench, Shared { inflight, log })
}

#[test]
fn connection_goes_on_where_it_stopped() {
    let mut old = in_use();
    old.device.fetched.store(40, Ordering::Relaxed);
    let (before, _) = told(&old.connection);
    let mut new = successor(&old).unwrap();
    assert!(
        old.device.calls().is_empty(),
        "nothing is stopped to tell it"
    );
    assert!(new.device.starts().is_empty());
    assert_eq!(
        new.device.calls(),
        [Asked::Features(FEATURES), Asked::SetConfig(32, vec![32])]
    );

    let paused = old.connection.pause();
    assert_eq!(paused.bases, [(0, 40), (2, 40)], "the rings that ran");
    assert_eq!(paused.image, Ok(()));
    assert_eq!(old.device.calls(), [Asked::Pause]);

    new.connection.start_paused(&paused.bases).unwrap();
    assert_eq!(
        new.device.calls(),
        [Asked::Start(0, 40), Asked::Start(2, 40)]
    );
    let starts = new.device.starts();
    for start in &starts {
        assert!(!start.enabled, "nothing is fetched before it is certain");
        assert!(start.kick.is_some() && start.call.is_some());
        assert_eq!(start.features, FEATURES);
        assert_eq!(start.memory.regions().len(), 1);
    }
    new.connection.go_on().unwrap();
    assert_eq!(new.device.calls(), [Asked::Enabled(0, true)]);

    // All that was said is known, and what is said again changes nothing.
    let (mut after, _) = told(&new.connection);
    after.session.rings[0].base = before.session.rings[0].base;
    assert_eq!(after, before);
    assert_eq!(new.get(Req::GET_STATUS), 0xb);
    new.set(Req::SET_VRING_BASE, &state(0, 5), &[]);
    assert_eq!(new.stop_ring(1), 3);
    new.device.fetched.store(50, Ordering::Relaxed);
    assert_eq!(new.stop_ring(0), 50);
}

#[test]
fn connection_goes_on_here_after_a_pause() {
    let mut bench = in_use();
    let (before, _) = told(&bench.connection);
    bench.device.fetched.store(9, Ordering::Relaxed);
    let paused = bench.connection.pause();
    bench.device.starts();
    bench.device.calls();
    bench.connection.resume(&paused.bases);
    assert_eq!(
        bench.device.calls(),
        [
            Asked::Start(0, 9),
            Asked::Start(2, 9),
            Asked::Enabled(0, true),
            Asked::Resumed
        ]
    );
    let (after, _) = told(&bench.connection);
    assert_eq!(after, before);
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
}

#[test]
fn image_that_could_not_be_given_back_is_told_and_the_rings_go_on() {
    let mut bench = in_use();
    *bench.device.pause_error.lock().unwrap() = Some("no space".to_owned());
    let paused = bench.connection.pause();
    assert_eq!(paused.image, Err("no space".to_owned()));
    bench.connection.resume(&paused.bases);
    assert_eq!(
        bench.device.starts().len(),
        4,
        "two at first, and two again"
    );
}

#[test]
fn negotiation_is_as_far_as_it_was() {
    // Nothing said, features asked, features set without protocol features.
    let bench = Bench::new();
    let (state, _) = told(&bench.connection);
    let mut new = successor(&bench).unwrap();
    assert_eq!(told(&new.connection).0, state);
    new.negotiate(FEATURES | BIT_30);

    let mut bench = Bench::new();
    bench.get(Req::GET_FEATURES);
    let mut new = successor(&bench).unwrap();
    let offered = new.get(Req::GET_PROTOCOL_FEATURES);
    assert_eq!(offered & !PAGEFAULT, PROTOCOL);
    new.client
        .send(Req::SET_PROTOCOL_FEATURES, 0, &words(&[PROTOCOL]), &[]);
    // Replies are acknowledged now, by the crate and by us.
    new.set(Req::SET_FEATURES, &words(&[FEATURES]), &[]);
    new.set(Req::SET_VRING_NUM, &super::state(0, 16), &[]);
    assert!(!new.try_set(Req::SET_VRING_NUM, &super::state(9, 16), &[]));

    let mut bench = Bench::negotiated();
    let mut new = successor(&bench).unwrap();
    new.share_memory();
    assert!(!new.try_set(Req::SET_VRING_ENABLE, &super::state(0, 2), &[]));
    assert_eq!(
        bench.get(Req::GET_QUEUE_NUM),
        4,
        "the other one has the socket too"
    );
}

#[test]
fn state_that_makes_no_sense_is_refused() {
    let bench = in_use();
    type Change = fn(&mut ConnectionState);
    let changes: [(Change, &str); 9] = [
        (|state| state.session.features |= 1 << 34, "not offered"),
        (|state| state.session.features |= 1 << 40, "not all offered"),
        (|state| state.session.protocol |= 1 << 60, "not offered"),
        (|state| state.session.rings.truncate(3), "3 rings"),
        (
            |state| state.session.rings[0].size = Some(512),
            "256 are the most",
        ),
        (
            |state| state.session.rings[0].kick = KickState::Fd(999),
            "descriptor 999",
        ),
        (|state| state.session.memory[0].len = 1 << 40, "memory"),
        (|state| state.session.memory[0].file = 77, "descriptor 77"),
        (|state| state.sock = 500, "descriptor 500"),
    ];
    for (change, words) in changes {
        let mut fds = Outgoing::default();
        let mut state = bench.connection.export(&mut fds).unwrap();
        change(&mut state);
        let error = import(&state, &fds, &bench).err().expect(words);
        assert!(error.contains(words), "{words}: {error}");
    }
    let mut new = successor(&bench).unwrap();
    for bases in [[(1, 0)], [(9, 0)]] {
        new.connection.start_paused(&bases).unwrap_err();
    }
}

#[test]
fn unknown_and_missing_state_is_an_error() {
    let bench = in_use();
    let (state, _) = told(&bench.connection);
    let whole = serde_json::to_value(&state).unwrap();
    let parse = |value: &serde_json::Value| ConnectionState::deserialize(value).map(drop);
    parse(&whole).unwrap();
    for path in ["", "/session", "/session/rings/0", "/session/memory/0"] {
        let mut more = whole.clone();
        let place = more.pointer_mut(path).unwrap().as_object_mut().unwrap();
        place.insert("what a later version knows".to_owned(), 1.into());
        parse(&more).unwrap_err();
    }
    for (path, name) in [
        ("", "messages"),
        ("/session", "status"),
        ("/session/memory/0", "offset"),
        ("/session", "inflight"),
        ("/session", "log"),
        ("/session", "channel"),
        ("/session", "capacity_told"),
        ("/session/rings/0", "used_log"),
    ] {
        let mut less = whole.clone();
        let place = less.pointer_mut(path).unwrap().as_object_mut().unwrap();
        place.remove(name).unwrap();
        parse(&less).unwrap_err();
    }
}

#[test]
fn region_and_log_go_along_and_are_the_same_memory() {
    let (mut old, shared) = in_use_with_shared_memory();
    let (before, _) = told(&old.connection);
    let mut new = successor(&old).unwrap();
    assert!(
        old.device.calls().is_empty(),
        "nothing is taken from the one that serves"
    );
    let journal = Asked::Journal(Some(super::inflight::JOURNAL));
    assert_eq!(
        new.device.calls(),
        [
            Asked::Features(FEATURES),
            Asked::SetConfig(32, vec![32]),
            journal,
            Asked::Log(true)
        ]
    );
    new.device.log().unwrap().mark(0x9000, 1).unwrap();
    let mut bits = [0; 2];
    shared.log.read_exact_at(&mut bits, 0x1000).unwrap();
    assert_eq!(bits, [0, 2], "page 9");

    old.device.fetched.store(40, Ordering::Relaxed);
    let paused = old.connection.pause();
    new.connection.start_paused(&paused.bases).unwrap();
    for (start, index) in new.device.starts().into_iter().zip([0u64, 2]) {
        assert_eq!(start.used_log, (index == 2).then_some(0x2000));
        assert_eq!(start.features, FEATURES, "LOG_ALL is the session's");
        let part = start.inflight.expect("the ring's part of the region");
        let mark = part.part.atomic::<std::sync::atomic::AtomicU64>(0).unwrap();
        mark.store(0x77 + index, Ordering::Relaxed);
        let mut theirs = [0; 8];
        let at = index * super::inflight::LAYOUT.queue_bytes() as u64;
        shared.inflight.read_exact_at(&mut theirs, at).unwrap();
        assert_eq!(u64::from_ne_bytes(theirs), 0x77 + index);
    }
    new.connection.go_on().unwrap();
    let (mut after, _) = told(&new.connection);
    after.session.rings[0].base = before.session.rings[0].base;
    assert_eq!(after, before);

    // What is said of them later is said of what is there: the same region, the end of the migration.
    new.device.calls();
    let size = shared.inflight.metadata().unwrap().len();
    assert!(super::inflight::set(&mut new, size, &shared.inflight));
    assert!(new.device.calls().is_empty());
    assert_eq!(log::features(&mut new, log::OFF), [Asked::Log(false)]);
    assert_eq!(log::features(&mut new, log::ON), [Asked::Log(true)]);
    drop(new.connection);
    let end = [Asked::Reset, Asked::Journal(None), Asked::Log(false)];
    assert_eq!(new.device.calls(), end);
}

#[test]
fn log_of_a_migration_that_is_over_does_not_stand_in_the_way_of_memory_plugged_since() {
    let (mut old, shared) = in_use_with_shared_memory();
    log::features(&mut old, log::OFF);
    let plugged = memfd(MEMORY_SIZE);
    let region = add_region(MEMORY_SIZE, MEMORY_SIZE, USER_BASE + MEMORY_SIZE, 0);
    old.set(Req::ADD_MEM_REG, &region, &[plugged.as_raw_fd()]);
    let mut new = successor(&old).unwrap();
    assert!(new.device.log().is_none(), "it is not in use");
    // As in the process before, it is in use again when the VMM says so, also if it says nothing better.
    assert_eq!(log::features(&mut new, log::ON), [Asked::Log(true)]);
    new.device.log().unwrap().mark(0, 1).unwrap();
    let mut bits = [0; 1];
    shared.log.read_exact_at(&mut bits, 0x1000).unwrap();
    assert_eq!(bits, [1]);
    successor(&new).unwrap();
}

/// A session in use whose VMM has read a capacity of 1 MiB, and has been told of 2 MiB and not answered.
fn told_and_not_answered() -> (Bench, Channel) {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.device.resize(MIB);
    read_config(&mut bench, 0, 60);
    let mut channel = Channel::open(&mut bench);
    put_to_use(&mut bench);
    assert_eq!(channel.next(), None, "it has read the capacity");
    bench.device.resize(2 * MIB);
    bench.connection.tell_change();
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    (bench, channel)
}

#[test]
fn channel_goes_along_with_what_is_unanswered_and_what_was_told() {
    let (mut old, mut channel) = told_and_not_answered();
    // Half of an answer has been read.
    let answer = Channel::answer_of(0);
    channel.send(&answer[..7]);
    assert_eq!(old.get(Req::GET_QUEUE_NUM), 4);
    let (state, _) = told(&old.connection);
    let unanswered = state.session.channel.as_ref().unwrap();
    assert_eq!(unanswered.unanswered, 1);
    assert_eq!(unanswered.partial, answer[..7]);
    let capacities = (state.session.capacity_read, state.session.capacity_told);
    assert_eq!(capacities, (Some(MIB), Some(2 * MIB)));

    let mut new = successor(&old).unwrap();
    let paused = old.connection.pause();
    new.connection.start_paused(&paused.bases).unwrap();
    assert_eq!(
        channel.next(),
        None,
        "nobody is to see it before it goes on"
    );
    new.connection.go_on().unwrap();
    assert_eq!(channel.next(), None, "it has been told");
    drop(old);
    assert!(!channel.is_hung_up());

    channel.send(&answer[7..]);
    assert_eq!(new.get(Req::GET_QUEUE_NUM), 4);
    let (state, _) = told(&new.connection);
    let channel_state = state.session.channel.unwrap();
    assert_eq!(
        (channel_state.unanswered, channel_state.partial),
        (0, vec![])
    );

    // It works, and what the VMM has not read is told again when its rings have stood.
    new.device.resize(3 * MIB);
    new.connection.tell_change();
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    channel.answer(0);
    for ring in [0, 2] {
        new.stop_ring(ring);
    }
    new.start_ring(0, 0);
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    channel.answer(0);
    assert_eq!(new.get(Req::GET_QUEUE_NUM), 4);
    assert!(!channel.is_hung_up());
}

#[test]
fn capacity_that_changed_on_the_way_is_told_by_the_one_that_goes_on_and_by_nobody_before() {
    let (mut old, mut channel) = told_and_not_answered();
    channel.answer(0);
    let mut new = successor(&old).unwrap();
    new.device.resize(5 * MIB);
    let paused = old.connection.pause();
    new.connection.start_paused(&paused.bases).unwrap();
    assert_eq!(channel.next(), None);
    new.connection.go_on().unwrap();
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    assert_eq!(told(&new.connection).0.session.capacity_told, Some(5 * MIB));
}

#[test]
fn rings_that_go_on_here_after_a_pause_are_no_reason_to_tell_the_capacity_again() {
    let (mut bench, mut channel) = told_and_not_answered();
    let paused = bench.connection.pause();
    bench.connection.resume(&paused.bases);
    assert_eq!(channel.next(), None);
}

#[test]
fn session_is_not_handed_over_while_memory_comes_later() {
    let Some(mut bench) = super::postcopy::bench() else {
        return;
    };
    let _userfault = bench.listen();
    let error = successor(&bench).err().unwrap();
    assert!(error.contains("migrated"), "{error}");
    bench.end();
    successor(&bench).unwrap();
}

#[test]
fn session_is_not_handed_over_between_a_transfer_of_state_and_its_check() {
    use super::state::{LOAD, SAVE, begin, pipe};
    for direction in [SAVE, LOAD] {
        let mut bench = Bench::negotiated();
        let (reader, writer) = pipe();
        let file = if direction == SAVE { &writer } else { &reader };
        assert_eq!(begin(&mut bench, direction, file), NOFD);
        let error = successor(&bench).err().unwrap();
        assert!(error.contains("migrated"), "{error}");
        drop(writer);
        bench.get(Req::CHECK_DEVICE_STATE);
        successor(&bench).unwrap();

        // A VMM whose migration has failed does not ask, and goes on.
        let (reader, writer) = pipe();
        let file = if direction == SAVE { &writer } else { &reader };
        assert_eq!(begin(&mut bench, direction, file), NOFD);
        bench.share_memory();
        bench.start_ring(0, 0);
        successor(&bench).unwrap();
    }
}

#[test]
fn shared_memory_that_makes_no_sense_is_refused() {
    let (mut bench, _shared) = in_use_with_shared_memory();
    let mut channel = Channel::open(&mut bench);
    bench.device.resize(MIB);
    bench.connection.tell_change();
    assert!(channel.next().is_some());
    fn region(state: &mut ConnectionState) -> &mut SharedState {
        &mut state.session.inflight.as_mut().unwrap().memory
    }
    fn log(state: &mut ConnectionState) -> &mut SharedState {
        state.session.log.as_mut().unwrap()
    }
    type Change = fn(&mut ConnectionState);
    let changes: [(Change, &str); 12] = [
        (|state| region(state).file = 99, "descriptor 99"),
        // Spoken of twice.
        (
            |state| region(state).file = state.session.memory[0].file,
            "is missing",
        ),
        (|state| region(state).len = 64, "no room"),
        (
            |state| region(state).len <<= 8,
            "inflight region cannot be used",
        ),
        (
            |state| region(state).offset = 8,
            "inflight region cannot be used",
        ),
        (
            |state| state.session.inflight.as_mut().unwrap().queues = 5,
            "at most 4",
        ),
        (
            |state| state.session.inflight.as_mut().unwrap().queue_size = 0,
            "0 entries",
        ),
        (|state| log(state).file = 98, "descriptor 98"),
        (|state| log(state).len = 1 << 30, "dirty log cannot be used"),
        (|state| log(state).len = 0, "dirty log cannot be used"),
        (
            |state| state.session.channel.as_mut().unwrap().sock = 97,
            "descriptor 97",
        ),
        (
            |state| state.session.channel.as_mut().unwrap().partial = vec![0; 20],
            "more than an answer",
        ),
    ];
    for (change, words) in changes {
        let mut fds = Outgoing::default();
        let mut state = bench.connection.export(&mut fds).unwrap();
        change(&mut state);
        let error = import(&state, &fds, &bench).err().expect(words);
        assert!(error.contains(words), "{words}: {error}");
    }
    let (state, _) = told(&bench.connection);
    let whole = serde_json::to_value(&state).unwrap();
    for path in [
        "/session/inflight",
        "/session/inflight/memory",
        "/session/log",
        "/session/channel",
    ] {
        let names: Vec<String> = whole
            .pointer(path)
            .unwrap()
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        for name in names {
            let mut less = whole.clone();
            let place = less.pointer_mut(path).unwrap().as_object_mut().unwrap();
            place.remove(&name).unwrap();
            ConnectionState::deserialize(&less).unwrap_err();
        }
    }
}
