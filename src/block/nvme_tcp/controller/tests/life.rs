//! What happens to a path that works: losses, keep-alives, the times after which it is given up, its end.

use nvme_target::Listening;

use super::*;
use crate::block::nvme_tcp::controller::mailbox::Heart;
use crate::block::nvme_tcp::controller::setup;
use crate::block::nvme_tcp::controller::wait::{Patience, Waiter, Want};
use crate::block::nvme_tcp::link::{NamespaceState, PathState, SharedPath};

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
    let (target, namespace, mut worker, _) = served();
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
