//! Changes at the target while a path works: the access to the namespace, its size, its identity.

use nvme_target::{AnaState, Fault, NamespaceSpec, Notice, On, Rule, SubsystemSpec, Target};

use super::*;
use crate::block::nvme_tcp::link::{Access, NamespaceState, PathCommand, PathState};

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
    let (target, namespace, mut worker, _) = served();
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
    let (target, namespace, mut worker, _) = served();
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
