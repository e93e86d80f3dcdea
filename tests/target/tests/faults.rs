//! Each fault does what it says, and leaves the target well.

mod host;

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use host::{Ask, Host, NQN, Pdu, rw};
use virtioblkd_test_target::{
    FatalErrorStatus, Fault, Listening, NamespaceSpec, On, PortSpec, Rule, RuleId, Status,
    SubsystemSpec, Target,
};

const DIGESTS: Ask = Ask {
    hpda: 0,
    digests: 3,
    max_r2t: 0,
};

/// A target with one rule, and an I/O queue with digests.
fn scene(rule: Rule) -> (Target, RuleId, Host, Host) {
    scene_with(rule, PortSpec::loopback().with(|t| t.c2h_size = 2048))
}

fn scene_with(rule: Rule, port: PortSpec) -> (Target, RuleId, Host, Host) {
    let target = Target::builder().port(port).start().unwrap();
    let (admin, cntlid) = Host::admin(target.address(), DIGESTS, 0);
    let io = Host::io(target.address(), DIGESTS, cntlid, 1);
    let id = target.faults().add(rule);
    (target, id, admin, io)
}

/// What answers a read of 4 KiB, PDU by PDU, up to `pdus` or the end of the stream.
fn answer(io: &mut Host, pdus: usize) -> Vec<Pdu> {
    io.send(&rw(2, 77, 1, 0, 8, 4096), &[]);
    (0..pdus).map_while(|_| io.recv().ok()).collect()
}

fn digest_is_right(p: &Pdu) -> bool {
    p.u32(24) == host::crc32c(&p.0[..24])
}

/// The target serves another host as if nothing had been.
fn still_well(target: &Target) {
    target.faults().clear();
    let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    assert!(io.write_in_capsule(0, 512, &[9; 512]).ok());
    assert_eq!(io.read(0, 1, 512).0, [9; 512]);
}

#[test]
fn a_status_fails_the_chosen_command_only() {
    let status = Status::new(2, 0x81).crd(2).dnr();
    let (target, id, _admin, mut io) = scene(Rule::nth(On::Read, 2, Fault::Status(status)));
    assert_eq!(io.read(0, 1, 512).0.len(), 512);
    let (data, resp) = io.read(0, 1, 512);
    let resp = resp.unwrap();
    assert_eq!(
        (data.len(), resp.status(), resp.u16(22) >> 12 & 3),
        (0, (2, 0x81, true), 2)
    );
    assert_eq!(io.read(0, 1, 512).0.len(), 512);
    assert_eq!(
        (target.faults().fired(id), target.faults().seen(id)),
        (1, 3)
    );
    still_well(&target);
}

#[test]
fn a_write_can_fail_after_its_data_came_and_its_execution() {
    let (target, id, _admin, mut io) = scene(Rule::once(On::Write, Fault::DropAfterExecution));
    let e = rw(1, 5, 1, 0, 128, 65536);
    io.send(&e, &[]);
    let r2t = io.recv_checked();
    io.h2c_data(5, r2t.u16(10), 0, &[3; 65536]);
    assert!(io.rest().is_empty());
    assert_eq!(target.faults().fired(id), 1);
    assert_eq!(
        target.subsystem(0).namespace(1).unwrap().read(0, 65536),
        [3; 65536]
    );
    still_well(&target);
}

#[test]
fn a_dropped_command_is_not_executed_or_cut_off_or_answered() {
    for (fault, bytes, executed) in [
        (Fault::DropBefore, 0, false),
        (Fault::DropMidAnswer(10), 10, true),
        (Fault::DropMidAnswer(1000), 27, true),
        (Fault::DropAfterAnswer, 28, true),
    ] {
        let (target, id, _admin, mut io) = scene(Rule::once(On::Write, fault));
        let mut e = rw(1, 5, 1, 0, 1, 512);
        e[39] = 1;
        io.send(&e, &[4; 512]);
        assert_eq!(io.rest().len(), bytes, "{fault:?}");
        assert_eq!(target.faults().fired(id), 1);
        let expected = if executed { [4; 512] } else { [0; 512] };
        assert_eq!(
            target.subsystem(0).namespace(1).unwrap().read(0, 512),
            expected
        );
        still_well(&target);
    }
}

#[test]
fn a_reset_is_seen_as_one() {
    let (target, _, _admin, mut io) = scene(Rule::once(On::Read, Fault::Reset));
    io.send(&rw(2, 1, 1, 0, 1, 512), &[]);
    assert_eq!(io.recv().unwrap_err().kind(), ErrorKind::ConnectionReset);
    still_well(&target);
}

#[test]
fn a_delayed_answer_is_overtaken() {
    let (target, _, _admin, mut io) = scene(Rule::once(
        On::Read,
        Fault::Delay(Duration::from_millis(80)),
    ));
    let start = Instant::now();
    io.send(&rw(2, 1, 1, 0, 1, 512), &[]);
    io.send(&rw(2, 2, 1, 0, 1, 512), &[]);
    assert_eq!(io.recv_checked().u16(8), 2);
    assert_eq!(io.recv_checked().u16(8), 1);
    assert!(start.elapsed() >= Duration::from_millis(80));
    still_well(&target);
}

#[test]
fn a_reordered_answer_comes_behind_the_next_two_or_after_a_while() {
    let (target, _, _admin, mut io) = scene(Rule::once(On::Read, Fault::Reorder(2)));
    for cid in 1..=4 {
        io.send(&rw(2, cid, 1, 0, 1, 512), &[]);
    }
    let order: Vec<u16> = (0..4).map(|_| io.recv_checked().u16(8)).collect();
    assert_eq!(order, [2, 3, 1, 4]);
    target.faults().add(Rule::once(On::Read, Fault::Reorder(2)));
    assert_eq!(io.read(0, 1, 512).0.len(), 512);
    still_well(&target);
}

#[test]
fn a_command_without_an_answer_ends_by_abort_or_does_not() {
    for abortable in [true, false] {
        let fault = Fault::NoAnswer {
            execute: true,
            abortable,
        };
        let (target, _, mut admin, mut io) = scene(Rule::once(On::Write, fault));
        let mut e = rw(1, 5, 1, 0, 1, 512);
        e[39] = 1;
        io.send(&e, &[6; 512]);
        // What comes later is answered.
        assert!(io.simple(0, 1, 0, 0).ok());
        assert_eq!(
            target.subsystem(0).namespace(1).unwrap().read(0, 512),
            [6; 512]
        );
        let aborted = admin.simple(8, 0, 1 | 5 << 16, 0);
        assert!(aborted.ok());
        assert_eq!(aborted.u32(8) & 1 == 0, abortable);
        if abortable {
            let resp = io.recv_checked();
            assert_eq!((resp.cid(), resp.status()), (5, (0, 7, false)));
        }
        assert_eq!(
            admin.simple(8, 0, 1 | 5 << 16, 0).u32(8) & 1,
            1,
            "there is nothing left to abort"
        );
        assert_eq!(target.counters().aborts, 2);
        still_well(&target);
    }
}

#[test]
fn digests_are_wrong_one_at_a_time() {
    let (target, _, _admin, mut io) = scene(Rule::once(On::Read, Fault::CorruptHeaderDigest));
    let pdus = answer(&mut io, 2);
    assert!(!digest_is_right(&pdus[0]) && digest_is_right(&pdus[1]));
    assert_eq!(
        pdus[0].u32(pdus[0].0.len() - 4),
        host::crc32c(pdus[0].data())
    );
    still_well(&target);
    for (fault, zeros) in [
        (Fault::CorruptDataDigest, true),
        (Fault::CorruptData, false),
    ] {
        let (target, _, _admin, mut io) = scene(Rule::once(On::Read, fault));
        let pdus = answer(&mut io, 2);
        assert!(digest_is_right(&pdus[0]));
        assert_ne!(
            pdus[0].u32(pdus[0].0.len() - 4),
            host::crc32c(pdus[0].data())
        );
        assert_eq!(pdus[0].data().iter().all(|&b| b == 0), zeros);
        still_well(&target);
    }
}

#[test]
fn a_digest_fault_without_digests_does_not_count() {
    let target = Target::builder().start().unwrap();
    let id = target
        .faults()
        .add(Rule::always(On::Read, Fault::CorruptDataDigest));
    let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    assert_eq!(io.read(0, 1, 512).0, [0; 512]);
    assert_eq!(
        (target.faults().seen(id), target.faults().fired(id)),
        (1, 0)
    );
}

#[test]
fn header_fields_are_wrong_and_the_digest_right() {
    for (fault, at, value) in [
        (Fault::WrongPlen(-4), 4, 2048 + 32 - 4),
        (Fault::WrongPlen(4), 4, 2048 + 32 + 4),
        (Fault::WrongPdo(60), 3, 60),
        (Fault::WrongType(8), 0, 8),
    ] {
        let (target, id, _admin, mut io) = scene(Rule::once(On::Read, fault));
        let first = &answer(&mut io, 1)[0];
        let found = if at == 4 {
            first.u32(4)
        } else {
            u32::from(first.0[at])
        };
        assert_eq!(found, value, "{fault:?}");
        assert!(digest_is_right(first), "{fault:?}");
        assert_eq!(target.faults().fired(id), 1);
        still_well(&target);
    }
    let (target, _, _admin, mut io) = scene(Rule::once(On::Read, Fault::WrongHlen(20)));
    assert_eq!(answer(&mut io, 1)[0].0[2], 20);
    still_well(&target);
}

#[test]
fn data_is_not_where_it_should_be() {
    let read = |fault, pdus| {
        let (target, id, _admin, mut io) = scene(Rule::once(On::Read, fault));
        let got = answer(&mut io, pdus);
        assert!(
            got.iter().all(|p| p.kind() == 3 || digest_is_right(p)),
            "{fault:?}"
        );
        assert_eq!(
            (got.len(), target.faults().fired(id)),
            (pdus, 1),
            "{fault:?}"
        );
        still_well(&target);
        got
    };
    // Two C2HData of 2 KiB answer the read; the last has LAST (4) and SUCCESS (8).
    let got = read(Fault::DataOutOfRange, 2);
    assert_eq!((got[0].u32(12), got[1].u32(12)), (4096, 2048));
    let got = read(Fault::DataUnknownTag, 2);
    assert!(got[0].u16(8) != 77 && got[1].u16(8) == 77);
    let got = read(Fault::DataTwice, 3);
    assert_eq!(
        [got[0].u32(12), got[1].u32(12), got[2].u32(12)],
        [0, 0, 2048]
    );
    let got = read(Fault::DataAfterSuccess, 3);
    assert_eq!(
        (got[1].flags() & 12, got[2].flags() & 12, got[2].u32(12)),
        (12, 12, 2048)
    );
    let got = read(Fault::DataMissing, 2);
    assert_eq!(
        (got[0].u32(12), got[0].flags() & 12, got[1].kind()),
        (2048, 4, 5)
    );
    let got = read(Fault::SuccessWithoutLast, 2);
    assert_eq!(got[1].flags() & 12, 8);
    let got = read(Fault::ResponseBeforeData, 3);
    assert_eq!(
        [
            got[0].kind(),
            got[1].kind(),
            got[2].kind(),
            got[2].flags() & 12
        ],
        [5, 7, 7, 4]
    );
    let got = read(Fault::ResponseTwice, 4);
    assert_eq!((got[2].cid(), got[3].cid(), got[3].kind()), (77, 77, 5));
    let got = read(Fault::ResponseUnknownCid, 3);
    assert!(got[2].kind() == 5 && got[2].cid() != 77);
    let got = read(Fault::R2tForRead, 3);
    assert_eq!(
        (got[0].kind(), got[0].u16(8), got[0].u32(16), got[1].kind()),
        (9, 77, 4096, 7)
    );
    let got = read(Fault::Terminate(FatalErrorStatus::DataOutOfRange), 1);
    assert_eq!((got[0].kind(), got[0].u16(8)), (3, 4));
}

#[test]
fn r2ts_are_wrong() {
    for (fault, pdus) in [
        (Fault::R2tUnknownTag, 1),
        (Fault::R2tOutOfRange, 1),
        (Fault::R2tEmpty, 1),
        (Fault::R2tTwice, 2),
    ] {
        let (target, id, _admin, mut io) = scene(Rule::once(On::Write, fault));
        io.send(&rw(1, 77, 1, 0, 128, 65536), &[]);
        let got: Vec<Pdu> = (0..pdus).map(|_| io.recv_checked()).collect();
        let fields = (got[0].u16(8) == 77, got[0].u32(12), got[0].u32(16));
        match fault {
            Fault::R2tUnknownTag => assert_eq!(fields, (false, 0, 65536)),
            Fault::R2tOutOfRange => assert_eq!(fields, (true, 65536, 65536)),
            Fault::R2tEmpty => assert_eq!(fields, (true, 0, 0)),
            _ => assert_eq!(got[0].0, got[1].0),
        }
        assert_eq!(target.faults().fired(id), 1);
        still_well(&target);
    }
}

#[test]
fn a_stall_leaves_the_socket_alone() {
    let (target, _, _admin, mut io) = scene(Rule::once(
        On::Read,
        Fault::Stall(Duration::from_millis(100)),
    ));
    let start = Instant::now();
    assert_eq!(io.read(0, 1, 512).0.len(), 512);
    assert!(start.elapsed() >= Duration::from_millis(100));
    // A target that stalls for ever still ends at once.
    target.stall(Duration::from_secs(3600));
    io.stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    io.send(&rw(2, 9, 1, 0, 1, 512), &[]);
    assert_eq!(io.recv().unwrap_err().kind(), ErrorKind::WouldBlock);
    drop(target);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_fatal_controller_answers_property_get_only() {
    let (target, _, mut admin, mut io) = scene(Rule::once(On::Flush, Fault::Fatal));
    io.send(&host::sqe(0, 1, 1, 0), &[]);
    // The two connections have threads of their own.
    let start = Instant::now();
    while admin.property_get(0x1c, false).u32(8) & 2 == 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "CSTS.CFS");
    }
    assert_eq!(admin.simple(0x18, 0, 0, 0).status(), (0, 0x0c, true));
    still_well(&target);
}

#[test]
fn ports_refuse_hang_and_close() {
    let target = Target::builder().start().unwrap();
    let address = target.address();
    target.port(0).set_listening(Listening::Refuse).unwrap();
    assert_eq!(
        TcpStream::connect(address).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    target.port(0).set_listening(Listening::Hang).unwrap();
    let mut host = Host::dial(address);
    host.stream
        .write_all(&Host::ic_req(Ask::default()))
        .unwrap();
    host.stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    assert_eq!(host.recv().unwrap_err().kind(), ErrorKind::WouldBlock);
    target.port(0).set_listening(Listening::Close).unwrap();
    host.stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    assert!(host.rest().is_empty(), "what hung was let go");
    assert!(Host::dial(address).rest().is_empty());
    target.port(0).set_listening(Listening::Serve).unwrap();
    still_well(&target);
}

#[test]
fn connect_is_refused_with_a_status() {
    let target = Target::builder().start().unwrap();
    let busy = Status::CONNECT_BUSY;
    let id = target
        .faults()
        .add(Rule::once(On::Connect, Fault::Status(busy)).queue(0));
    let mut host = Host::initialized(target.address(), Ask::default());
    assert_eq!(
        host.connect(0, 0xffff, 31, 0, NQN).status(),
        (1, 0x81, false)
    );
    assert_eq!(
        (
            target.faults().fired(id),
            target.counters().connects_refused
        ),
        (1, 1)
    );
    assert!(host.connect(0, 0xffff, 31, 0, NQN).ok());
}

#[test]
fn the_same_seed_chooses_the_same_commands() {
    let choose = |seed| {
        let target = Target::builder().start().unwrap();
        target.faults().seed(seed);
        target.faults().add(Rule::rate(
            On::Read,
            2500,
            Fault::Status(Status::INTERNAL_ERROR),
        ));
        let (_admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
        let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
        (0..200)
            .map(|_| io.read(0, 1, 512).0.is_empty())
            .collect::<Vec<_>>()
    };
    let first = choose(1);
    let failed = first.iter().filter(|&&failed| failed).count();
    assert!(
        (25..=75).contains(&failed),
        "{failed} of 200 at a rate of a quarter"
    );
    assert_eq!(first, choose(1));
    assert_ne!(first, choose(2));
}

#[test]
fn rules_keep_to_their_port_queue_and_number() {
    let target = Target::builder()
        .port(PortSpec::loopback())
        .port(PortSpec::loopback())
        .start()
        .unwrap();
    let fault = Fault::Status(Status::INTERNAL_ERROR);
    target
        .faults()
        .add(Rule::always(On::Read, fault).port(2).queue(2).times(1));
    for (port, qid, failures) in [(0, 1, 0), (0, 2, 0), (1, 1, 0), (1, 2, 1), (1, 2, 0)] {
        let address = target.port(port).address();
        let (_admin, cntlid) = Host::admin(address, Ask::default(), 0);
        let mut io = Host::io(address, Ask::default(), cntlid, qid);
        let failed = (0..3).filter(|_| io.read(0, 1, 512).0.is_empty()).count();
        assert_eq!(failed, failures, "port {port} queue {qid}");
    }
}

#[test]
fn the_journal_tells_what_was_executed_and_answered() {
    let (target, _, _admin, mut io) = scene(Rule::nth(On::Write, 2, Fault::DropAfterExecution));
    target.keep_journal(true);
    assert!(io.write_in_capsule(3, 512, &[1; 512]).ok());
    assert_eq!(io.read(3, 1, 512).0, [1; 512]);
    let mut e = rw(1, 50, 1, 4, 1, 512);
    e[39] = 1;
    io.send(&e, &[2; 512]);
    assert!(io.rest().is_empty());
    let journal = target.journal();
    let told: Vec<_> = journal
        .iter()
        .map(|e| (e.opcode, e.slba, e.blocks, e.crc, e.answered))
        .collect();
    let (ones, twos) = (host::crc32c(&[1; 512]), host::crc32c(&[2; 512]));
    assert_eq!(
        told,
        [
            (1, 3, 1, ones, true),
            (2, 3, 1, ones, true),
            (1, 4, 1, twos, false)
        ]
    );
    assert_eq!(
        (journal[2].cid, journal[2].qid, journal[2].port),
        (50, 1, 1)
    );
}

#[test]
fn a_target_under_fire_ends_when_dropped() {
    let namespace = NamespaceSpec::new(1, 16 << 20);
    let subsystem = SubsystemSpec::new(NQN).namespace(namespace);
    let target = Target::builder().subsystem(subsystem).start().unwrap();
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 60_000);
    // Hosts that send without reading, half a PDU, and garbage.
    let mut flood = Host::io(target.address(), Ask::default(), cntlid, 1);
    flood
        .stream
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let read = flood.capsule(&rw(2, 1, 1, 0, 2048, 1 << 20), &[]);
    while flood.stream.write_all(&read).is_ok() {}
    let mut half = Host::io(target.address(), Ask::default(), cntlid, 2);
    half.stream.write_all(&read[..40]).unwrap();
    let mut garbage = Host::dial(target.address());
    garbage.stream.write_all(&[0xff; 4096]).unwrap();
    assert_eq!(garbage.recv().unwrap().kind(), 3, "C2HTermReq");
    assert!(admin.simple(0x18, 0, 0, 0).ok());
    let start = Instant::now();
    drop(target);
    assert!(start.elapsed() < Duration::from_secs(5));
}
