//! Controllers over their life: Connect and its refusals, properties, timers, events, logs, namespaces.

mod host;

use std::time::{Duration, Instant};

use host::{Ask, HOST_NQN, Host, NQN, rw, sqe};
use virtioblkd_test_target::{
    AnaState, DISCOVERY_NQN, Identity, NamespaceSpec, Notice, PortSpec, SubsystemSpec, Target,
};

fn target() -> Target {
    let namespace = NamespaceSpec::new(1, 8 << 20);
    Target::builder()
        .subsystem(SubsystemSpec::new(NQN).namespace(namespace))
        .port(PortSpec::loopback())
        .port(PortSpec::loopback())
        .start()
        .unwrap()
}

/// Arms one Asynchronous Event Request: its identifier.
fn arm(admin: &mut Host) -> u16 {
    let cid = admin.cid();
    admin.send(&sqe(0x0c, cid, 0, 0), &[]);
    cid
}

/// Asks for namespace and ANA notices, bits 8 and 11.
fn listen_for_events(admin: &mut Host) {
    assert!(admin.simple(0x09, 0, 0x0b, 1 << 8 | 1 << 11).ok());
}

#[test]
fn connect_refuses_what_is_wrong_and_says_where() {
    let target = target();
    target.subsystem(0).configure(|o| o.max_io_queues = 2);
    let refused = |p: host::Pdu| (p.status(), p.u32(8));
    let data = |at: u32| ((1, 0x82, true), 1 << 16 | at);
    let mut host = Host::initialized(target.address(), Ask::default());
    assert_eq!(
        refused(host.connect(0, 0xffff, 31, 0, "nqn.2026-01.org.example:none")),
        data(256)
    );
    assert_eq!(refused(host.connect(0, 3, 31, 0, NQN)), data(16));
    assert_eq!(
        refused(host.connect(0, 0xffff, 0, 0, NQN)),
        ((1, 0x82, true), 44)
    );
    assert_eq!(refused(host.connect(1, 77, 31, 0, NQN)), data(16));
    assert_eq!(
        refused(host.connect_as(0, 0xffff, 31, 0, NQN, "me", [1; 16])),
        data(512)
    );
    // A command before Connect is out of sequence.
    assert_eq!(host.property_get(0, true).status(), (0, 0x0c, true));

    let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let dial = || Host::initialized(target.address(), Ask::default());
    assert_eq!(
        refused(dial().connect(1, cntlid, 1024, 0, NQN)),
        ((1, 0x82, true), 44),
        "above MQES"
    );
    assert_eq!(
        refused(dial().connect(3, cntlid, 31, 0, NQN)),
        ((1, 0x82, true), 42),
        "above the grant"
    );
    assert_eq!(
        refused(dial().connect_as(1, cntlid, 31, 0, NQN, HOST_NQN, [8; 16])),
        data(0)
    );
    let mut elsewhere = Host::initialized(target.port(1).address(), Ask::default());
    assert_eq!(
        refused(elsewhere.connect(1, cntlid, 31, 0, NQN)),
        data(512),
        "another port"
    );
    let _io = Host::io(target.address(), Ask::default(), cntlid, 1);
    assert_eq!(
        dial().connect(1, cntlid, 31, 0, NQN).status(),
        (0, 0x0c, true),
        "the queue exists"
    );
    target
        .subsystem(0)
        .configure(|o| o.allowed_hosts = Some(vec!["nqn.2026-01.org.example:other".into()]));
    assert_eq!(
        dial().connect(0, 0xffff, 31, 0, NQN).status(),
        (1, 0x84, true),
        "not allowed"
    );
}

#[test]
fn a_queue_with_flow_control_tells_its_head_and_never_uses_success() {
    let target = target();
    let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::initialized(target.address(), Ask::default());
    let mut e = [0; 64];
    e[0] = 0x7f;
    e[1] = 0x40;
    e[4] = 1;
    e[32..36].copy_from_slice(&1024u32.to_le_bytes());
    e[39] = 1;
    e[42] = 1;
    e[44] = 3;
    let mut data = [0; 1024];
    data[..16].copy_from_slice(&[7; 16]);
    data[16..18].copy_from_slice(&cntlid.to_le_bytes());
    data[256..256 + NQN.len()].copy_from_slice(NQN.as_bytes());
    data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
    io.send(&e, &data);
    let mut heads = vec![io.recv_checked().u16(16)];
    for _ in 0..4 {
        heads.push(
            io.read(0, 1, 512)
                .1
                .expect("a completion of its own")
                .u16(16),
        );
    }
    assert_eq!(heads, [1, 2, 3, 0, 1], "SQHD in a queue of 4 entries");
}

#[test]
fn a_controller_is_ready_when_it_was_told_to_be() {
    let target = target();
    target.subsystem(0).configure(|o| o.time_to_ready = None);
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    assert_eq!(admin.property_get(0x1c, false).u32(8), 0);
    assert_eq!(admin.identify(1, 0).1.status(), (0, 0x0c, true));
    let mut io = Host::initialized(target.address(), Ask::default());
    assert_eq!(io.connect(1, cntlid, 31, 0, NQN).status(), (0, 0x0c, true));
    target
        .subsystem(0)
        .configure(|o| o.time_to_ready = Some(Duration::ZERO));
    assert_eq!(admin.property_get(0x1c, false).u32(8), 1);
    // A normal shutdown: SHST becomes complete (10b).
    assert!(admin.property_set(0x14, 0x0046_4001).ok());
    assert_eq!(admin.property_get(0x1c, false).u32(8) >> 2 & 3, 2);
}

#[test]
fn an_association_ends_when_its_host_falls_silent() {
    let target = target();
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 300);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    let start = Instant::now();
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(100));
        assert!(admin.simple(0x18, 0, 0, 0).ok());
    }
    assert_eq!(target.counters().keep_alive_expired, 0);
    assert!(
        admin.rest().is_empty() && io.rest().is_empty(),
        "both connections end"
    );
    assert!(start.elapsed() >= Duration::from_millis(700));
    assert_eq!(
        (
            target.counters().keep_alive_expired,
            target.counters().keep_alives()
        ),
        (1, 4)
    );
}

#[test]
fn events_are_told_once_until_their_log_page_is_read() {
    let target = target();
    let subsystem = target.subsystem(0);
    let (mut admin, _) = Host::admin(target.address(), Ask::default(), 0);
    let first = arm(&mut admin);
    // Not asked for yet.
    subsystem.resize(1, 4 << 20, Notice::Send).unwrap();
    listen_for_events(&mut admin);
    subsystem.resize(1, 16 << 20, Notice::Send).unwrap();
    let event = admin.recv_checked();
    // Type 2 (notice), information 0, log page 04h.
    assert_eq!((event.cid(), event.u32(8)), (first, 0x0004_0002));
    let second = arm(&mut admin);
    subsystem
        .set_write_protected(1, true, Notice::Send)
        .unwrap();
    let (log, _) = admin.log_page(0x04, 4096, 0);
    assert_eq!(
        log[..8],
        [1, 0, 0, 0, 0, 0, 0, 0],
        "namespace 1 has changed"
    );
    // Reading the page lets the event through that came meanwhile.
    let event = admin.recv_checked();
    assert_eq!((event.cid(), event.u32(8)), (second, 0x0004_0002));
    assert_eq!(admin.log_page(0x04, 4096, 0).0[..4], [0; 4]);
    let third = arm(&mut admin);
    subsystem.set_ana_state(target.port(0), 1, AnaState::Inaccessible, Notice::Send);
    let event = admin.recv_checked();
    assert_eq!((event.cid(), event.u32(8)), (third, 0x000c_0302));
    // One more than AERL allows (four are held).
    for _ in 0..4 {
        arm(&mut admin);
    }
    arm(&mut admin);
    assert_eq!(admin.recv_checked().status(), (1, 5, true));
}

#[test]
fn a_namespace_grows_shrinks_is_protected_and_vanishes() {
    let target = target();
    let subsystem = target.subsystem(0);
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    let last = (8 << 20) / 512 - 1;
    assert!(io.write_in_capsule(last, 512, &[5; 512]).ok());
    assert_eq!(
        io.read(last + 1, 1, 512).1.unwrap().status(),
        (0, 0x80, true)
    );
    subsystem.resize(1, 16 << 20, Notice::Silent).unwrap();
    assert_eq!(io.read(last, 2, 512).0, [[5; 512], [0; 512]].concat());
    let size =
        |admin: &mut Host| u64::from_le_bytes(admin.identify(0, 1).0[..8].try_into().unwrap());
    assert_eq!(size(&mut admin), (16 << 20) / 512);
    subsystem.resize(1, 4 << 20, Notice::Silent).unwrap();
    assert_eq!(io.read(last, 1, 512).1.unwrap().status(), (0, 0x80, true));
    subsystem.resize(1, 8 << 20, Notice::Silent).unwrap();
    assert_eq!(io.read(last, 1, 512).0, [0; 512]);
    subsystem.resize(1, 1 << 40, Notice::Silent).unwrap_err();
    subsystem
        .set_write_protected(1, true, Notice::Silent)
        .unwrap();
    assert_eq!(
        io.write_in_capsule(0, 512, &[1; 512]).status(),
        (0, 0x20, true)
    );
    assert_eq!(admin.identify(0, 1).0[99], 1, "NSATTR");
    let namespace = subsystem.remove_namespace(1, Notice::Silent).unwrap();
    assert_eq!(io.read(0, 1, 512).1.unwrap().status(), (0, 0x0b, true));
    assert_eq!(admin.identify(2, 0).0[..4], [0; 4]);
    assert_eq!(admin.identify(0, 1).0, [0; 4096]);
    assert_eq!(admin.identify(3, 1).1.status(), (0, 0x0b, true));
    subsystem.restore_namespace(namespace, Notice::Silent);
    assert_eq!(io.read(0, 1, 512).0, [0; 512]);
}

#[test]
fn paths_have_ana_states_of_their_own() {
    let target = target();
    let subsystem = target.subsystem(0);
    let mut paths: Vec<_> = (0..2)
        .map(|port| {
            let address = target.port(port).address();
            let (admin, cntlid) = Host::admin(address, Ask::default(), 0);
            (admin, Host::io(address, Ask::default(), cntlid, 1))
        })
        .collect();
    for (state, code, status) in [
        (AnaState::NonOptimized, 2, None),
        (AnaState::Inaccessible, 3, Some((3, 2, false))),
        (AnaState::PersistentLoss, 4, Some((3, 1, false))),
        (AnaState::Change, 15, Some((3, 3, false))),
    ] {
        subsystem.set_ana_state(target.port(1), 1, state, Notice::Silent);
        let (log, _) = paths[1].0.log_page(0x0c, 16 + 36, 0);
        // One group: its number, one namespace, the state, and the namespace's number.
        assert_eq!(
            (log[8], log[16], log[20], log[32], log[48]),
            (1, 1, 1, code, 1)
        );
        assert_eq!(
            paths[0].0.log_page(0x0c, 52, 0).0[32],
            1,
            "the other path stays optimized"
        );
        assert_eq!(paths[1].1.read(0, 1, 512).1.map(|p| p.status()), status);
        assert!(paths[0].1.read(0, 1, 512).1.is_none());
    }
    let (id, _) = paths[0].0.identify(1, 0);
    assert_eq!(
        (id[76] >> 3 & 1, id[342], id[344], id[348]),
        (1, 10, 1, 1),
        "CMIC, ANATT, ANAGRPMAX, NANAGRPID"
    );
    let other = Identity {
        nguid: [9; 16],
        eui64: [0; 8],
        uuid: [8; 16],
    };
    subsystem.set_identity_at(target.port(1), 1, other).unwrap();
    let first = paths[0].0.identify(3, 1).0;
    let second = paths[1].0.identify(3, 1).0;
    // NGUID (2) of 16 bytes, UUID (3), CSI (4) of one byte, and the end.
    assert_eq!(second[..4], [2, 16, 0, 0]);
    assert_eq!(second[4..24], [[9; 16].as_slice(), &[3, 16, 0, 0]].concat());
    assert_eq!(second[40..46], [4, 1, 0, 0, 0, 0]);
    assert_ne!(first, second);
}

#[test]
fn discovery_tells_all_subsystems_at_all_ports() {
    let target = target();
    let (mut admin, _) = Host::admin_of(target.address(), Ask::default(), 0, DISCOVERY_NQN);
    let (id, _) = admin.identify(1, 0);
    assert_eq!(id[111], 2, "CNTRLTYPE");
    let (header, _) = admin.log_page(0x70, 1024, 0);
    assert_eq!(header[8], 3, "NUMREC");
    let (log, _) = admin.log_page(0x70, 4096, 0);
    let entries: Vec<_> = (1..4)
        .map(|i| {
            let e = &log[1024 * i..1024 * (i + 1)];
            let text = |at: usize, len: usize| {
                let field = std::str::from_utf8(&e[at..at + len]).unwrap();
                field.trim_end_matches([' ', '\0']).to_owned()
            };
            assert_eq!((e[0], e[1], &e[6..8]), (3, 1, &[0xff, 0xff][..]));
            (e[2], text(256, 256), text(512, 256), text(32, 32))
        })
        .collect();
    let entry = |kind, nqn: &str, port: usize| {
        (
            kind,
            nqn.to_owned(),
            "127.0.0.1".to_owned(),
            target.port(port).address().port().to_string(),
        )
    };
    assert_eq!(
        entries,
        [
            entry(3, DISCOVERY_NQN, 0),
            entry(2, NQN, 0),
            entry(2, NQN, 1)
        ]
    );
    let (part, _) = admin.log_page(0x70, 512, 1024 + 256);
    assert_eq!(part, log[1280..1792], "an offset is kept to");
}

#[test]
fn queues_are_granted_up_to_the_limit() {
    let target = target();
    let (mut admin, _) = Host::admin(target.address(), Ask::default(), 0);
    target.subsystem(0).configure(|o| o.max_io_queues = 3);
    assert_eq!(admin.simple(0x09, 0, 0x07, 7 | 7 << 16).u32(8), 2 | 2 << 16);
    assert_eq!(admin.simple(0x0a, 0, 0x07, 0).u32(8), 2 | 2 << 16);
    target.subsystem(0).configure(|o| o.max_io_queues = 0);
    assert!(!admin.simple(0x09, 0, 0x07, 7 | 7 << 16).ok());
}

#[test]
fn a_reset_drops_all_connections_of_the_association() {
    let target = target();
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    target.subsystem(0).reset_controllers();
    assert!(admin.rest().is_empty() && io.rest().is_empty());
    let (admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    drop(admin);
    assert!(io.rest().is_empty(), "without its admin queue it is over");
}

#[test]
fn ranges_are_deallocated_and_zeroed() {
    let target = target();
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    assert_eq!(
        admin.identify(1, 0).0[520],
        1 << 2 | 1 << 3 | 1 << 5,
        "ONCS"
    );
    let namespace = target.subsystem(0).namespace(1).unwrap();
    namespace.write(0, &vec![7; 2 << 20]);
    // Two ranges, one of them whole pages and more: context attributes, blocks, first block.
    let mut ranges = vec![0; 32];
    ranges[4] = 3;
    ranges[8] = 2;
    ranges[16 + 4..16 + 8].copy_from_slice(&1001u32.to_le_bytes());
    ranges[16 + 8] = 101;
    let mut e = sqe(9, 1, 1, 32);
    e[39] = 1;
    e[40] = 1;
    io.send(&e, &ranges);
    assert!(io.recv_checked().ok());
    assert_eq!(
        namespace.read(0, 2 << 20),
        vec![7; 2 << 20],
        "without AD nothing is deallocated"
    );
    e[44] = 4;
    io.send(&e, &ranges);
    assert!(io.recv_checked().ok());
    let mut expected = vec![7; 2 << 20];
    expected[2 * 512..5 * 512].fill(0);
    expected[101 * 512..1102 * 512].fill(0);
    assert!(namespace.read(0, 2 << 20) == expected);
    let e = rw(8, 2, 1, 2000, 100, 0);
    io.send(&e, &[]);
    assert!(io.recv_checked().ok());
    expected[2000 * 512..2100 * 512].fill(0);
    assert!(namespace.read(0, 2 << 20) == expected);
    ranges[16 + 4..16 + 8].copy_from_slice(&0xffff_ffffu32.to_le_bytes());
    let mut e = sqe(9, 1, 1, 32);
    e[39] = 1;
    e[40] = 1;
    e[44] = 4;
    io.send(&e, &ranges);
    assert_eq!(io.recv_checked().status(), (0, 0x80, true));
}

#[test]
fn reservations_keep_others_out() {
    let target = target();
    let mut hosts: Vec<Host> = [[1; 16], [2; 16]]
        .into_iter()
        .map(|id| {
            let mut admin = Host::initialized(target.address(), Ask::default());
            let resp = admin.connect_as(0, 0xffff, 31, 0, NQN, HOST_NQN, id);
            assert!(admin.property_set(0x14, 0x0046_0001).ok());
            let mut io = Host::initialized(target.address(), Ask::default());
            assert!(io.connect_as(1, resp.u16(8), 31, 0, NQN, HOST_NQN, id).ok());
            // The association lives as long as its admin queue, here as long as the test.
            std::mem::forget(admin);
            io
        })
        .collect();
    let reserve = |host: &mut Host, opcode: u8, cdw10: u32, keys: &[u64]| {
        let data: Vec<u8> = keys.iter().flat_map(|k| k.to_le_bytes()).collect();
        let mut e = sqe(opcode, 40, 1, data.len() as u32);
        e[39] = 1;
        e[40..44].copy_from_slice(&cdw10.to_le_bytes());
        host.send(&e, &data);
        host.recv_checked().status()
    };
    const OK: (u8, u8, bool) = (0, 0, false);
    const CONFLICT: (u8, u8, bool) = (0, 0x83, true);
    let access = |host: &mut Host| {
        let read = host.read(0, 1, 512).1.is_none();
        (
            read,
            host.write_in_capsule(0, 512, &[1; 512]).status() == OK,
        )
    };
    let [a, b] = &mut hosts[..] else {
        unreachable!()
    };
    assert_eq!(
        reserve(a, 0x11, 1 << 8, &[10, 0]),
        CONFLICT,
        "not registered"
    );
    assert_eq!(reserve(a, 0x0d, 0, &[0, 10]), OK);
    assert_eq!(
        reserve(a, 0x0d, 0, &[0, 11]),
        CONFLICT,
        "registered with another key"
    );
    // Write exclusive (1), exclusive access (2), the same for registrants only (3, 4).
    for (kind, stranger, registrant) in [
        (1, (true, false), (true, false)),
        (2, (false, false), (false, false)),
        (3, (true, false), (true, true)),
        (4, (false, false), (true, true)),
    ] {
        assert_eq!(reserve(a, 0x11, kind << 8, &[10, 0]), OK);
        assert_eq!(access(a), (true, true));
        assert_eq!(access(b), stranger, "type {kind}");
        assert_eq!(reserve(b, 0x0d, 0, &[0, 20]), OK);
        assert_eq!(access(b), registrant, "type {kind}");
        assert_eq!(reserve(b, 0x11, kind << 8, &[20, 0]), CONFLICT);
        assert_eq!(
            reserve(b, 0x15, kind << 8, &[20]),
            OK,
            "nothing of its own to release"
        );
        assert_eq!(access(b), registrant);
        assert_eq!(reserve(b, 0x0d, 1, &[20, 0]), OK, "unregister");
        assert_eq!(reserve(a, 0x15, kind << 8, &[10]), OK);
        assert_eq!(access(b), (true, true));
    }
    // Preemption: the new holder takes over and the old one is no registrant any more.
    assert_eq!(reserve(a, 0x11, 1 << 8, &[10, 0]), OK);
    assert_eq!(reserve(b, 0x0d, 0, &[0, 20]), OK);
    assert_eq!(reserve(b, 0x11, 1 | 1 << 8, &[20, 10]), OK);
    assert_eq!((access(a), access(b)), ((true, false), (true, true)));
    let mut e = sqe(0x0e, 41, 1, 128);
    e[40] = 31;
    e[44] = 1;
    let (report, _) = b.fetch(&e);
    // Type 1, one registrant: it holds, its key and its host.
    assert_eq!(
        (report[4], report[5], report[64 + 2], report[64 + 8]),
        (1, 1, 1, 20)
    );
    assert_eq!(report[64 + 16..64 + 32], [2; 16]);
}

#[test]
fn what_a_host_must_not_do_is_kept_in_mind() {
    let target = target();
    let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    // A write that waits for its data, and its identifier again.
    io.send(&rw(1, 5, 1, 0, 128, 65536), &[]);
    assert_eq!(io.recv_checked().kind(), 9);
    io.send(&rw(2, 5, 1, 0, 1, 512), &[]);
    io.collect();
    assert!(
        target.violations().iter().any(|v| v.contains("used twice")),
        "{:?}",
        target.violations()
    );
    // Data for a tag that was never given.
    io.h2c_data(5, 0x1234, 0, &[0; 512]);
    let term = io.recv().unwrap();
    assert_eq!((term.kind(), term.u16(8), term.u32(10)), (3, 1, 10));
    assert_eq!(term.0[24], 6, "the header in error");
    assert!(io.rest().is_empty());
}

#[test]
fn data_that_was_not_asked_for_ends_the_connection() {
    let target = target();
    target.port(0).configure(|t| {
        t.r2t_size = 16384;
        t.max_r2t = 2;
    });
    let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let ask = Ask {
        max_r2t: 1,
        ..Ask::default()
    };
    for (qid, (offset, len, fes)) in [(8192, 16384, 4), (0, 20480, 4), (u32::MAX, 512, 4)]
        .into_iter()
        .enumerate()
    {
        let mut io = Host::io(target.address(), ask, cntlid, qid as u16 + 1);
        io.send(&rw(1, 5, 1, 0, 128, 65536), &[]);
        let (first, second) = (io.recv_checked(), io.recv_checked());
        assert_eq!(
            (first.u32(12), second.u32(12)),
            (0, 16384),
            "two R2Ts are outstanding"
        );
        assert_ne!(first.u16(10), second.u16(10), "each has a tag of its own");
        io.h2c_data(5, first.u16(10), offset, &vec![1; len]);
        let term = io.recv().unwrap();
        assert_eq!(
            (term.kind(), term.u16(8)),
            (3, fes),
            "{len} bytes at {offset}"
        );
        assert!(io.rest().is_empty());
    }
    assert_eq!(
        target.subsystem(0).namespace(1).unwrap().read(0, 65536),
        vec![0; 65536]
    );
}
