//! A connection that goes on elsewhere.

use std::os::fd::BorrowedFd;

use serde::Deserialize;

use super::*;
use crate::vhost_user::Connection;
use crate::vhost_user::handover::{ConnectionState, Incoming, KickState, Outgoing};

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
    bench.start_ring(0, 5);
    bench.start_ring(2, 7);
    bench.set(Req::SET_VRING_ENABLE, &state(2, 0), &[]);
    bench.set(Req::SET_VRING_NUM, &state(1, 64), &[]);
    bench.set(Req::SET_VRING_BASE, &state(1, 3), &[]);
    bench.set(Req::SET_STATUS, &words(&[0xb]), &[]);
    bench.device.calls();
    bench
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
    assert_eq!(new.get(Req::GET_PROTOCOL_FEATURES), PROTOCOL);
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
    ] {
        let mut less = whole.clone();
        let place = less.pointer_mut(path).unwrap().as_object_mut().unwrap();
        place.remove(name).unwrap();
        parse(&less).unwrap_err();
    }
}
