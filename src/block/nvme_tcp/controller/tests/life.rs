//! What happens to a path that works: changes, losses, its end.

use nvme_target::{
    AnaState, Fault, Listening, NamespaceSpec, Notice, On, Rule, SubsystemSpec, Target,
};

use super::*;
use crate::block::nvme_tcp::controller::mailbox::Heart;
use crate::block::nvme_tcp::controller::setup;
use crate::block::nvme_tcp::controller::wait::{Patience, Waiter, Want};
use crate::block::nvme_tcp::link::{Access, NamespaceState, PathCommand, PathState, SharedPath};

/// Opcode of Get Log Page.
const GET_LOG_PAGE: u8 = 0x02;

fn granting(queues: u16) -> Target {
    let subsystem = SubsystemSpec::new(nvme_target::DEFAULT_NQN)
        .namespace(NamespaceSpec::new(1, 1 << 20))
        .with(|controller| controller.max_io_queues = queues);
    Target::builder().subsystem(subsystem).start().unwrap()
}

#[test]
fn who_finds_no_queue_left_gets_the_next_that_is_free() {
    let target = granting(3);
    let namespace = open(spec(&target)).unwrap();
    let (mut a, mut b) = (Worker::new(&namespace), Worker::new(&namespace));
    let (first, _second) = (a.connected(0), b.connected(0));
    let mut c = Worker::new(&namespace);
    let why = c.refused();
    assert!(why.contains("grants only 3 I/O queues"), "{why}");
    // The last one is for who leaves again soon, whatever workers there are.
    let mut passing = Worker::of(namespace.join_in_passing());
    assert_eq!(passing.connected(0).qid, 3);
    namespace.leave(&passing.member);
    c.refused();
    drop(first);
    namespace.leave(&a.member);
    assert_eq!(c.connected(0).qid, 3);
    close(&namespace, &target);
}

#[test]
fn a_controller_with_one_queue_is_refused() {
    let target = granting(1);
    let error = refused(spec(&target)).to_string();
    assert!(error.contains("grants only 1 I/O queue;"), "{error}");
}

#[test]
fn a_controller_that_takes_transfers_of_any_size_gets_none_above_a_mebibyte() {
    let subsystem = SubsystemSpec::new(nvme_target::DEFAULT_NQN)
        .namespace(NamespaceSpec::new(1, 1 << 20))
        .with(|controller| controller.mdts = 0);
    let target = Target::builder().subsystem(subsystem).start().unwrap();
    let namespace = open(spec(&target)).unwrap();
    let queue = Worker::new(&namespace).connected(0);
    assert_eq!(queue.limits.max_transfer, 1 << 20);
    close(&namespace, &target);
}

#[test]
fn there_are_as_many_queues_as_the_controller_grants() {
    let target = granting(64);
    let namespace = open(spec(&target)).unwrap();
    let mut workers: Vec<_> = (0..20).map(|_| Worker::new(&namespace)).collect();
    workers
        .iter_mut()
        .for_each(|worker| drop(worker.connected(0)));
    close(&namespace, &target);
}

#[test]
fn after_a_loss_all_members_get_new_queues() {
    let target = two_ports();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    let before = worker.both();
    target.drop_connections_of(0);
    assert_eq!(worker.lost(0), before[0].generation);
    let after = worker.connected(0);
    assert!(after.generation > before[0].generation);
    worker.until(|| namespace.paths()[0].state() == PathState::Live);
    assert_eq!(namespace.paths()[1].state(), PathState::Live);
    close(&namespace, &target);
}

#[test]
fn a_queue_that_failed_is_made_again_and_the_others_stay() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let (mut a, mut b) = (Worker::new(&namespace), Worker::new(&namespace));
    let (first, second) = (a.connected(0), b.connected(0));
    let mut c = Worker::new(&namespace);
    let third = c.connected(0);
    namespace.paths()[0].send(PathCommand::QueueFailed {
        member: a.member.number(),
        generation: first.generation,
        why: "the test says so".to_owned(),
    });
    let again = a.connected(0);
    assert_eq!((again.qid, again.generation), (first.qid, first.generation));
    // One that is about an association that is over is nothing.
    namespace.paths()[0].send(PathCommand::QueueFailed {
        member: b.member.number(),
        generation: second.generation - 1,
        why: "the test says so".to_owned(),
    });
    namespace.paths()[0].send(PathCommand::QueueFailed {
        member: c.member.number(),
        generation: third.generation,
        why: "the test says so".to_owned(),
    });
    c.connected(0);
    let events = b.member.take_events();
    let anew = |event: &MemberEvent| matches!(event, MemberEvent::Connected(_));
    assert!(!events.iter().any(anew), "its queue was made anew");
    assert_eq!(target.counters().associations, 1);
    close(&namespace, &target);
}

#[test]
fn a_queue_that_fails_as_soon_as_it_is_made_again_ends_the_association() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    let first = worker.connected(0);
    // Each time as soon as it is connected.
    let next = loop {
        let member = worker.member.number();
        namespace.paths()[0].send(PathCommand::QueueFailed {
            member,
            generation: first.generation,
            why: "the test says so".to_owned(),
        });
        let next = worker.connected(0);
        if next.generation > first.generation {
            break next;
        }
    };
    assert_eq!(next.generation, first.generation + 1);
    assert_eq!(target.counters().associations, 2);
    close(&namespace, &target);
}

#[test]
fn a_path_that_stays_away_is_failing_fast_and_then_lost() {
    let target = one_port();
    let spec = spec_of(&[target.address()], |options| {
        options.fast_io_fail = Some(Duration::from_millis(100));
        options.ctrl_loss = Some(Duration::from_millis(600));
        options.reconnect_delay = Duration::from_millis(50);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target.port(0).set_listening(Listening::Refuse).unwrap();
    target.drop_connections();
    worker.lost(0);
    let path = &namespace.paths()[0];
    worker.until(|| matches!(path.state(), PathState::FailingFast | PathState::Lost));
    assert_eq!(path.state(), PathState::FailingFast);
    let why = worker.refused();
    assert!(
        why.contains("given up") && why.contains("connection refused"),
        "{why}"
    );
    assert_eq!(path.state(), PathState::Lost);
    // Who comes later is told as well.
    let why = Worker::new(&namespace).refused();
    assert!(why.contains("given up"), "{why}");
    assert_eq!(namespace.state(), NamespaceState::Present);
    close(&namespace, &target);
}

#[test]
fn a_path_that_comes_back_is_not_failing_fast_any_more() {
    let target = one_port();
    let spec = spec_of(&[target.address()], |options| {
        options.fast_io_fail = Some(Duration::from_millis(300));
        options.keep_alive = Duration::from_millis(500);
        options.ctrl_loss = None;
        options.reconnect_delay = Duration::from_millis(50);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target.port(0).set_listening(Listening::Refuse).unwrap();
    target.drop_connections();
    let path = &namespace.paths()[0];
    worker.until(|| path.state() == PathState::FailingFast);
    target.port(0).set_listening(Listening::Serve).unwrap();
    worker.connected(0);
    worker.until(|| path.state() == PathState::Live);
    // Nor is it once the time is over that it would have had.
    outlive(&target, 4);
    assert_eq!(path.state(), PathState::Live);
    close(&namespace, &target);
}

/// Waits until so many Keep Alives have come.
fn outlive(target: &Target, keep_alives: u64) {
    let enough = target.counters().keep_alives() + keep_alives;
    let deadline = Instant::now() + PATIENCE;
    while target.counters().keep_alives() < enough {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}

#[test]
fn the_times_that_a_path_is_given_begin_with_its_loss_and_end_with_its_return() {
    let target = one_port();
    let spec = spec_of(&[target.address()], |options| {
        options.fast_io_fail = Some(Duration::from_millis(500));
        options.ctrl_loss = Some(Duration::from_secs(2));
        options.keep_alive = Duration::from_secs(1);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    // More than two seconds.
    outlive(&target, 6);
    target.drop_connections();
    worker.lost(0);
    worker.connected(0);
    // More than half a second.
    outlive(&target, 3);
    assert_eq!(namespace.paths()[0].state(), PathState::Live);
    close(&namespace, &target);
}

#[test]
fn a_subsystem_that_refuses_for_good_is_not_tried_again() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target
        .subsystem(0)
        .configure(|controller| controller.allowed_hosts = Some(vec![]));
    target.drop_connections();
    let why = worker.refused();
    assert!(why.contains("does not allow this host"), "{why}");
    assert_eq!(namespace.paths()[0].state(), PathState::Lost);
    close(&namespace, &target);
}

#[test]
fn a_controller_that_fails_is_connected_anew() {
    let target = one_port();
    let spec = spec_of(&[target.address()], |options| {
        options.keep_alive = Duration::from_millis(200);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    let before = worker.connected(0);
    target.subsystem(0).fail_controllers();
    worker.lost(0);
    assert!(worker.connected(0).generation > before.generation);
    close(&namespace, &target);
}

#[test]
fn keep_alives_keep_an_association_that_does_nothing_else() {
    let target = one_port();
    let spec = spec_of(&[target.address()], |options| {
        options.keep_alive = Duration::from_millis(500);
    });
    let namespace = open(spec).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Two whole timeouts: without them the target would have ended the association.
    while target.counters().keep_alives() < 5 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    assert_eq!(target.counters().associations, 1);
    assert_eq!(target.counters().keep_alive_expired, 0);
    close(&namespace, &target);
}

#[test]
fn ana_changes_reach_the_path_with_an_event_and_without() {
    let target = two_ports();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    let queues = worker.both();
    let path = &namespace.paths()[0];
    let subsystem = target.subsystem(0);
    for (state, access) in [
        (AnaState::NonOptimized, Access::NonOptimized),
        (AnaState::Inaccessible, Access::Inaccessible),
        (AnaState::PersistentLoss, Access::PersistentLoss),
        (AnaState::Change, Access::Change),
        (AnaState::Optimized, Access::Optimized),
    ] {
        subsystem.set_ana_state(target.port(0), 1, state, Notice::Send);
        worker.until(|| path.access() == access);
        assert_eq!(namespace.paths()[1].access(), Access::Optimized);
    }
    // A status of a command may tell it as well.
    subsystem.set_ana_state(target.port(0), 1, AnaState::Inaccessible, Notice::Silent);
    let generation = queues[0].generation;
    path.send(PathCommand::LookAtAccess { generation });
    worker.until(|| path.access() == Access::Inaccessible);
    close(&namespace, &target);
}

#[test]
fn a_change_of_access_that_takes_too_long_resets_the_controller() {
    let subsystem = SubsystemSpec::new(nvme_target::DEFAULT_NQN)
        .namespace(NamespaceSpec::new(1, 1 << 20))
        .with(|controller| controller.anatt_s = 1);
    let target = Target::builder().subsystem(subsystem).start().unwrap();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    let before = worker.connected(0);
    target
        .subsystem(0)
        .set_ana_state(target.port(0), 1, AnaState::Change, Notice::Send);
    assert_eq!(worker.lost(0), before.generation);
    close(&namespace, &target);
}

#[test]
fn a_namespace_that_grows_or_shrinks_is_told() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let changed = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    namespace.on_change(changed.try_clone().unwrap());
    let told = || {
        let deadline = Instant::now() + PATIENCE;
        while changed.read().is_err() {
            assert!(Instant::now() < deadline, "no change was told");
            thread::yield_now();
        }
    };
    let subsystem = target.subsystem(0);
    for mib in [128, 32] {
        subsystem.resize(1, mib << 20, Notice::Send).unwrap();
        told();
        assert_eq!(namespace.bytes(), mib << 20);
    }
    subsystem
        .set_write_protected(1, true, Notice::Send)
        .unwrap();
    told();
    assert_eq!(namespace.state(), NamespaceState::WriteProtected);
    subsystem
        .set_write_protected(1, false, Notice::Send)
        .unwrap();
    told();
    assert_eq!(namespace.state(), NamespaceState::Present);
    close(&namespace, &target);
}

#[test]
fn a_change_that_nobody_told_is_found_after_the_next_loss() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target
        .subsystem(0)
        .resize(1, 128 << 20, Notice::Silent)
        .unwrap();
    target.drop_connections();
    worker.lost(0);
    worker.connected(0);
    assert_eq!(namespace.bytes(), 128 << 20);
    close(&namespace, &target);
}

#[test]
fn a_namespace_that_is_removed_or_replaced_is_gone() {
    for replaced in [false, true] {
        let target = two_ports();
        let namespace = open(spec(&target)).unwrap();
        let mut worker = Worker::new(&namespace);
        let _queues = worker.both();
        match replaced {
            true => {
                let other = NamespaceSpec::new(1, 1 << 20).identity(nvme_target::Identity {
                    nguid: [9; 16],
                    eui64: [0; 8],
                    uuid: [0; 16],
                });
                target
                    .subsystem(0)
                    .add_namespace(&other, Notice::Send)
                    .unwrap();
            }
            false => drop(
                target
                    .subsystem(0)
                    .remove_namespace(1, Notice::Send)
                    .unwrap(),
            ),
        }
        worker.until(|| namespace.state() == NamespaceState::Removed);
        for path in namespace.paths() {
            assert_eq!(path.state(), PathState::Lost);
        }
        close(&namespace, &target);
    }
}

#[test]
fn another_namespace_after_a_loss_is_not_served() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    let other = NamespaceSpec::new(1, 64 << 20).identity(nvme_target::Identity {
        nguid: [9; 16],
        eui64: [0; 8],
        uuid: [0; 16],
    });
    target
        .subsystem(0)
        .add_namespace(&other, Notice::Silent)
        .unwrap();
    target.drop_connections();
    let why = worker.refused();
    assert!(why.contains("another namespace"), "{why}");
    assert_eq!(namespace.paths()[0].state(), PathState::Lost);
    assert_eq!(namespace.state(), NamespaceState::Removed);
    close(&namespace, &target);
}

#[test]
fn a_command_is_aborted_on_the_controller() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let queue = Worker::new(&namespace).connected(0);
    for cid in 0..10 {
        namespace.paths()[0].send(PathCommand::Abort {
            generation: queue.generation,
            qid: queue.qid,
            cid,
        });
    }
    let deadline = Instant::now() + PATIENCE;
    while target.counters().aborts < 10 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    close(&namespace, &target);
}

#[test]
fn no_more_aborts_are_sent_than_the_controller_takes() {
    let target = one_port();
    let limit = u64::from(target.subsystem(0).options().acl) + 1;
    let spec = spec_of(&[target.address()], |options| {
        options.keep_alive = Duration::from_millis(500);
    });
    let namespace = open(spec).unwrap();
    let queue = Worker::new(&namespace).connected(0);
    let held = target.faults().add(Rule::always(
        On::Abort,
        Fault::NoAnswer {
            execute: false,
            abortable: false,
        },
    ));
    for cid in 0..10 {
        namespace.paths()[0].send(PathCommand::Abort {
            generation: queue.generation,
            qid: queue.qid,
            cid,
        });
    }
    // Keep Alives go the same way, behind whatever was sent.
    outlive(&target, 3);
    assert_eq!(target.faults().seen(held), limit);
    close(&namespace, &target);
}

#[test]
fn a_path_can_be_closed_at_any_time() {
    // While it connects, and its peer says nothing.
    let target = two_ports();
    target.port(1).set_listening(Listening::Hang).unwrap();
    let spec = spec_of(
        &[target.port(0).address(), target.port(1).address()],
        |options| {
            options.connect_timeout = Duration::from_secs(3600);
        },
    );
    let namespace = open(spec).unwrap();
    close(&namespace, &target);
    // While it waits for the next attempt.
    let spec = spec_of(&[target.address()], |options| {
        options.reconnect_delay = Duration::from_secs(3600);
    });
    let namespace = open(spec).unwrap();
    target.port(0).set_listening(Listening::Refuse).unwrap();
    let mut worker = Worker::new(&namespace);
    target.drop_connections();
    worker.until(|| namespace.paths()[0].state() == PathState::Connecting);
    close(&namespace, &target);
}

#[test]
fn a_member_whose_neighbour_got_no_queue_at_a_reconnect_gets_one_at_the_next() {
    let target = one_port();
    let spec = spec_of(&[target.address()], |options| {
        options.reconnect_delay = Duration::from_millis(50);
    });
    let namespace = open(spec).unwrap();
    let (mut a, mut b) = (Worker::new(&namespace), Worker::new(&namespace));
    let (first, _second) = (a.connected(0), b.connected(0));
    let faults = target.faults();
    let dropped = faults.add(Rule::once(On::Connect, Fault::DropBefore).queue(2));
    target.drop_connections();
    // The first attempt fails when the first of them has a queue already.
    let again = b.connected(0);
    assert_eq!(faults.fired(dropped), 1);
    assert_eq!(again.generation, first.generation + 2);
    while a.connected(0).generation < again.generation {}
    close(&namespace, &target);
}

#[test]
fn an_event_that_comes_behind_an_answer_is_seen_at_once() {
    let target = one_port();
    // No keep-alive wakes the path up.
    let spec = spec_of(&[target.address()], |options| {
        options.keep_alive = Duration::ZERO;
    });
    let namespace = open(spec).unwrap();
    let queue = Worker::new(&namespace).connected(0);
    let faults = target.faults();
    // The answer leaves together with the event that happened meanwhile.
    let stall = Fault::Stall(Duration::from_millis(200));
    let stalled = faults.add(Rule::once(On::AdminOpcode(GET_LOG_PAGE), stall));
    namespace.paths()[0].send(PathCommand::LookAtAccess {
        generation: queue.generation,
    });
    eventually(|| faults.fired(stalled) == 1);
    let subsystem = target.subsystem(0);
    subsystem.resize(1, 128 << 20, Notice::Send).unwrap();
    eventually(|| namespace.bytes() == 128 << 20);
    close(&namespace, &target);
}

#[test]
fn a_keep_alive_that_was_answered_while_nobody_looked_is_no_failure() {
    let target = one_port();
    let kato = Duration::from_millis(100);
    let options = Arc::new(NvmeOptions {
        keep_alive: kato,
        ..options()
    });
    let it = setup::Target::new(nvme_target::DEFAULT_NQN.to_owned(), options).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // The target's own timer is longer: only this side's is looked at.
    let mut ready = it
        .admin(&[target.address()], PATIENCE, deadline, &mut Patience)
        .unwrap();
    let mut heart = Heart::new(kato);
    heart.beat(&mut ready.channel).unwrap();
    let due = heart.due().unwrap();
    assert!(
        Patience
            .wait(Want::Read(ready.channel.fd()), deadline)
            .unwrap()
    );
    thread::sleep(due.saturating_duration_since(Instant::now()));
    heart.beat(&mut ready.channel).unwrap();
    assert_eq!(target.violations(), Vec::<String>::new());
}

#[test]
fn a_path_that_never_was_connected_is_failing_fast_as_well() {
    let target = two_ports();
    target.port(1).set_listening(Listening::Refuse).unwrap();
    let addresses = [target.port(0).address(), target.port(1).address()];
    let spec = spec_of(&addresses, |options| {
        options.fast_io_fail = Some(Duration::from_millis(100));
        options.ctrl_loss = None;
        options.reconnect_delay = Duration::from_millis(50);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target.port(0).set_listening(Listening::Refuse).unwrap();
    target.drop_connections();
    let failing = |path: &Arc<SharedPath>| path.state() == PathState::FailingFast;
    worker.until(|| namespace.paths().iter().all(failing));
    close(&namespace, &target);
}

#[test]
fn times_to_give_up_of_nothing_and_of_ages_let_a_path_connect() {
    for (fast, loss) in [(0, 0), (u64::MAX, u64::MAX)] {
        let target = one_port();
        let spec = spec_of(&[target.address()], |options| {
            options.fast_io_fail = Some(Duration::from_secs(fast));
            options.ctrl_loss = Some(Duration::from_secs(loss));
            options.reconnect_delay = Duration::from_millis(50);
        });
        let namespace = open(spec).unwrap();
        let mut worker = Worker::new(&namespace);
        worker.connected(0);
        target.drop_connections();
        match loss {
            0 => assert!(worker.refused().contains("given up")),
            _ => drop(worker.connected(0)),
        }
        close(&namespace, &target);
    }
}

#[test]
fn a_path_that_knows_a_smaller_size_takes_nothing_from_another() {
    let target = two_ports();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.both();
    let subsystem = target.subsystem(0);
    let full = namespace.bytes();
    subsystem.resize(1, full / 2, Notice::Silent).unwrap();
    for (port, bytes) in [(0, full), (1, full / 2)] {
        target.drop_connections_of(port);
        worker.lost(port);
        worker.connected(port);
        worker.until(|| namespace.paths()[port].state() == PathState::Live);
        assert_eq!(namespace.bytes(), bytes);
    }
    // What is more is served by whoever has it.
    subsystem.resize(1, full * 2, Notice::Silent).unwrap();
    target.drop_connections_of(1);
    worker.lost(1);
    worker.connected(1);
    assert_eq!(namespace.bytes(), full * 2);
    close(&namespace, &target);
}

#[test]
fn aborts_that_wait_do_not_outlive_the_queue() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    let queue = worker.connected(0);
    let (generation, qid) = (queue.generation, queue.qid);
    let faults = target.faults();
    let late = Fault::Delay(Duration::from_millis(200));
    let busy = faults.add(Rule::once(On::AdminOpcode(GET_LOG_PAGE), late));
    let path = &namespace.paths()[0];
    path.send(PathCommand::LookAtAccess { generation });
    eventually(|| faults.seen(busy) == 1);
    // The path takes all of these together, once it has its answer.
    for cid in 0..10 {
        path.send(PathCommand::Abort {
            generation,
            qid,
            cid,
        });
    }
    path.send(PathCommand::QueueFailed {
        member: worker.member.number(),
        generation,
        why: "the test says so".to_owned(),
    });
    assert_eq!(worker.connected(0).qid, qid);
    close(&namespace, &target);
    assert_eq!(target.counters().aborts, 0);
}
