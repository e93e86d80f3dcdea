//! Admin queues whose controllers say what cannot be, or nothing, and namespaces that become others.

use std::sync::atomic::{AtomicUsize, Ordering};

use nvme_target::{
    AnaState, FatalErrorStatus, Fault, NamespaceSpec, Notice, On, PortSpec, Rule, RuleId,
    SubsystemSpec, Target,
};

use super::relay::{Side, relay};
use super::*;
use crate::block::ErrorKind;
use crate::block::nvme_tcp::discovery;
use crate::block::nvme_tcp::link::{Access, NamespaceState, PathState};

/// The fault has happened: the target counts it behind what the host sees of it.
fn assert_fired(target: &Target, rule: RuleId) {
    let deadline = Instant::now() + PATIENCE;
    while target.faults().fired(rule) == 0 {
        assert!(Instant::now() < deadline, "the fault did not happen");
        thread::yield_now();
    }
}

#[test]
fn a_keep_alive_that_is_not_answered_ends_the_association() {
    let target = one_port();
    // Nothing but the host's own watch can end it.
    target
        .subsystem(0)
        .configure(|controller| controller.enforce_keep_alive = false);
    let spec = spec_of(&[target.address()], |options| {
        options.keep_alive = Duration::from_millis(300);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    let before = worker.connected(0);
    let silent = target.faults().add(Rule::once(
        On::KeepAlive,
        Fault::NoAnswer {
            execute: true,
            abortable: false,
        },
    ));
    assert_eq!(worker.lost(0), before.generation);
    assert_fired(&target, silent);
    assert!(worker.connected(0).generation > before.generation);
    assert_eq!(target.counters().keep_alive_expired, 0);
    close(&namespace, &target);
}

/// What is said where the answer to the first Identify is so.
fn lied(fault: Fault) -> String {
    let target = one_port();
    let rule = target.faults().add(Rule::once(On::Identify, fault));
    let error = refused(spec_of(&[target.address()], |options| {
        options.header_digest = true;
        options.data_digest = true;
    }));
    assert_fired(&target, rule);
    let text = error.to_string();
    text.split("cannot be reached: ").nth(1).unwrap().to_owned()
}

#[test]
fn what_an_admin_queue_says_is_checked() {
    let broke = "the controller broke the protocol: ";
    let cases = [
        (Fault::ResponseUnknownCid, "which is not under way"),
        (Fault::DataUnknownTag, "which is not under way"),
        (Fault::ResponseTwice, "which is not under way"),
        (Fault::DataAfterSuccess, "which is not under way"),
        (Fault::DataOutOfRange, "of 4096"),
        (Fault::DataTwice, broke),
        (Fault::SuccessWithoutLast, "SUCCESS without LAST"),
        (Fault::ResponseBeforeData, "0 bytes"),
        (Fault::DataMissing, "0 bytes"),
        (Fault::WrongPlen(4), broke),
        (Fault::WrongPlen(-4), broke),
        (Fault::WrongPlen(i32::MAX - 8192), broke),
        (Fault::WrongHlen(23), "header length of 23 bytes"),
        (Fault::WrongPdo(20), "data at byte 20"),
        (Fault::WrongType(6), broke),
        (Fault::WrongType(0x55), "unknown type 0x55"),
        (Fault::CorruptHeaderDigest, "header digest of"),
        (Fault::CorruptDataDigest, "data digest does not fit"),
        (Fault::CorruptData, "data digest does not fit"),
        (
            Fault::Terminate(FatalErrorStatus::SequenceError),
            "ended the connection",
        ),
        (Fault::DropMidAnswer(1000), "closed the connection"),
        (Fault::Reset, "reset"),
    ];
    let mut wrong = Vec::new();
    for (fault, why) in cases {
        let text = lied(fault);
        if !text.contains(why) {
            wrong.push((fault, text));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn data_that_begin_elsewhere_are_not_taken() {
    let port = PortSpec::loopback().with(|transport| transport.c2h_size = 1024);
    let target = Target::builder().port(port).start().unwrap();
    let mut first = true;
    let address = relay(target.address(), move |side, pdu| {
        // DATAO of the first C2HData: within the command's data, and not where they begin.
        if side == Side::Controller && pdu[0] == 7 && first {
            pdu[12..16].copy_from_slice(&1024u32.to_le_bytes());
            first = false;
        }
    });
    let text = refused(spec_of(&[address], |_| {})).to_string();
    assert!(text.contains("at offset 1024, not 0"), "{text}");
}

#[test]
fn a_lie_while_a_path_serves_costs_the_association_and_no_more() {
    for fault in [
        Fault::ResponseUnknownCid,
        Fault::ResponseTwice,
        Fault::WrongType(6),
        Fault::WrongPlen(4),
    ] {
        let target = one_port();
        let spec = spec_of(&[target.address()], |options| {
            options.keep_alive = Duration::from_millis(500);
        });
        let namespace = open(spec).unwrap();
        let mut worker = Worker::new(&namespace);
        let before = worker.connected(0);
        let rule = target.faults().add(Rule::once(On::KeepAlive, fault));
        assert_eq!(worker.lost(0), before.generation);
        assert_fired(&target, rule);
        worker.connected(0);
        worker.until(|| namespace.paths()[0].state() == PathState::Live);
        close(&namespace, &target);
    }
}

#[test]
fn a_namespace_that_is_formatted_anew_is_gone() {
    for notice in [Notice::Send, Notice::Silent] {
        let target = one_port();
        let namespace = open(spec(&target)).unwrap();
        let mut worker = Worker::new(&namespace);
        worker.connected(0);
        // The same namespace, by its identity, with other blocks: what a guest was told of is not there.
        let other = NamespaceSpec::new(1, 64 << 20).lba_size(4096);
        target.subsystem(0).add_namespace(&other, notice).unwrap();
        if notice == Notice::Silent {
            target.drop_connections();
        }
        let why = worker.refused();
        assert!(why.contains("blocks of 4096 bytes, not of 512"), "{why}");
        worker.until(|| namespace.state() == NamespaceState::Removed);
        assert_eq!(namespace.paths()[0].state(), PathState::Lost);
        close(&namespace, &target);
    }
}

#[test]
fn a_namespace_that_gets_metadata_is_served_no_more() {
    let (target, namespace, mut worker, _) = served();
    target
        .subsystem(0)
        .configure_namespace(1, Notice::Send, |options| options.metadata_bytes = 8)
        .unwrap();
    let why = worker.refused();
    assert!(why.contains("formatted with 8 bytes of metadata"), "{why}");
    assert_eq!(namespace.paths()[0].state(), PathState::Lost);
    close(&namespace, &target);
}

#[test]
fn access_is_that_of_the_namespaces_own_group() {
    let subsystem = SubsystemSpec::new(nvme_target::DEFAULT_NQN)
        .namespace(NamespaceSpec::new(1, 1 << 20).with(|options| options.ana_group = 5))
        .namespace(NamespaceSpec::new(2, 1 << 20).with(|options| options.ana_group = 3))
        .namespace(NamespaceSpec::new(3, 1 << 20).with(|options| options.ana_group = 9));
    let target = Target::builder().subsystem(subsystem).start().unwrap();
    let subsystem = target.subsystem(0);
    let set = |group, state, notice| subsystem.set_ana_state(target.port(0), group, state, notice);
    set(3, AnaState::Inaccessible, Notice::Silent);
    set(5, AnaState::NonOptimized, Notice::Silent);
    set(9, AnaState::PersistentLoss, Notice::Silent);
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    let path = &namespace.paths()[0];
    assert_eq!(path.access(), Access::NonOptimized);
    // Another group's change is none of it.
    set(3, AnaState::Optimized, Notice::Send);
    set(5, AnaState::Optimized, Notice::Send);
    worker.until(|| path.access() == Access::Optimized);
    // It may come into another group.
    subsystem
        .configure_namespace(1, Notice::Send, |options| options.ana_group = 9)
        .unwrap();
    worker.until(|| path.access() == Access::PersistentLoss);
    close(&namespace, &target);
}

/// The records of a discovery log that changes before each of the first `changes` times that entries are read, and
/// how often the log was asked for.
fn discovered(changes: usize) -> (crate::block::Result<Vec<discovery::Record>>, usize) {
    let target = Arc::new(one_port());
    let asked = Arc::new(AtomicUsize::new(0));
    let (changing, count) = (target.clone(), asked.clone());
    let address = relay(target.address(), move |side, pdu| {
        // Get Log Page.
        if side == Side::Host && pdu[0] == 4 && pdu[8] == 2 {
            let number = count.fetch_add(1, Ordering::SeqCst);
            // A header, the entries, the header again.
            if number % 3 == 1 && number / 3 < changes {
                let state = AnaState::Optimized;
                let port = changing.port(0);
                changing
                    .subsystem(0)
                    .set_ana_state(port, 1, state, Notice::Silent);
            }
        }
    });
    let address = Address {
        host: address.ip().to_string(),
        port: address.port(),
    };
    let records = discovery::discover(&address, &Arc::new(options()));
    (records, asked.load(Ordering::SeqCst))
}

#[test]
fn a_discovery_log_that_changes_while_it_is_read_is_read_again() {
    let (records, asked) = discovered(0);
    let before = records.unwrap();
    assert_eq!(asked, 3);
    let (records, asked) = discovered(2);
    assert_eq!(records.unwrap().len(), before.len());
    assert_eq!(asked, 9);
    let (records, _) = discovered(usize::MAX);
    let error = records.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(
        error.to_string().contains("changes all the time"),
        "{error}"
    );
}

#[test]
fn protection_information_is_refused_by_name() {
    let target = one_port();
    let mut asked = None;
    let address = relay(target.address(), move |side, pdu| match (side, pdu[0]) {
        // Identify Namespace: its command identifier.
        (Side::Host, 4) if pdu[8] == 6 && pdu[48] == 0 => asked = Some([pdu[10], pdu[11]]),
        // DPS of its data, which come behind 24 bytes of header.
        (Side::Controller, 7) if asked == Some([pdu[8], pdu[9]]) => pdu[24 + 29] |= 1,
        _ => {}
    });
    let error = refused(spec_of(&[address], |_| {}));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    assert!(
        text.contains("formatted with protection information"),
        "{text}"
    );
}
