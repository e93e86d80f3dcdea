//! The queues that a path's members get, and the commands on them that are to be aborted.

use nvme_target::{Fault, NamespaceSpec, On, Rule, SubsystemSpec, Target};

use super::*;
use crate::block::nvme_tcp::link::PathCommand;

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
    let (target, namespace, mut worker, first) = served();
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
fn aborts_that_wait_do_not_outlive_the_queue() {
    let (target, namespace, mut worker, queue) = served();
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
