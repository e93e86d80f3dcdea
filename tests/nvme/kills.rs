//! The daemon is killed under load, and the next one takes up what was in flight.

use std::time::{Duration, Instant};

use nvme_target::{Fault, NamespaceSpec, On, PortSpec, Rule};
use vhost_user_frontend::guest::Random;
use vhost_user_frontend::guest::model::Model;

use crate::load::{self, Load, Shape};
use crate::rig::{MIB, Rig, Setup};

const SHAPE: Shape = Shape {
    depth: 16,
    max_sectors: 64,
    align: 1,
    grain: 64,
};

/// Kills the daemon so many times, at random moments of the load.
fn run(name: &str, setup: &Setup, size: u64, kills: u64) {
    let target = setup.target();
    let mut contents = vec![0; size as usize];
    if setup.overlay.is_some() {
        Random::new(77).fill(&mut contents);
        let namespace = target.subsystem(0).namespace(1).unwrap();
        namespace.write(0, &contents);
    }
    let mut rig = Rig::on(setup, target);
    rig.target.keep_journal(true);
    // So that requests are in flight at any moment.
    let slow = Fault::DelayUpTo(Duration::from_millis(2));
    rig.target.faults().add(Rule::rate(On::Io, 3000, slow));
    let mut load = Load::new(name, load::seed(31), SHAPE, Model::new(contents));
    let mut device = rig.device(SHAPE.depth, load.bytes());
    let mut in_flight = 0;
    for _ in 0..kills {
        let until = load.completed + load.random.below(200);
        while load.completed < until {
            load.turn(&mut device, u64::MAX);
        }
        let spin = Duration::from_micros(load.random.below(3000));
        let begin = Instant::now();
        while begin.elapsed() < spin {
            std::hint::spin_loop();
        }
        rig.daemon.kill();
        in_flight += load.in_flight();
        rig.start_again();
        device.resume().unwrap();
    }
    let submitted = load.submitted;
    load.go(&mut device, submitted, |_| ());
    println!(
        "{name}: {kills} kills of {} requests, {in_flight} of them in flight",
        load.completed
    );
    assert!(in_flight > 0);
    rig.target.faults().clear();
    load.read_all(&mut device);
    device.shut_down().unwrap();
    drop(device);
    rig.restart();
    let mut device = rig.device(SHAPE.depth, load.bytes());
    load.read_all(&mut device);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    let journal = rig.target.journal();
    if setup.overlay.is_some() {
        assert!(journal.iter().all(|e| e.opcode == 2), "a base is only read");
    } else {
        assert!(rig.stored(0, size as usize) == load.model.bytes);
        load.check_journal(&journal, 512);
    }
}

#[test]
fn kills_over_a_namespace_lose_nothing() {
    let setup = Setup::new(NamespaceSpec::new(1, 8 * MIB)).queues(2, 2);
    run("kills over a namespace", &setup, 8 * MIB, 25);
}

#[test]
fn kills_over_a_namespace_with_two_paths_lose_nothing() {
    let setup = Setup::new(NamespaceSpec::new(1, 8 * MIB))
        .ports([PortSpec::loopback(), PortSpec::loopback()])
        .args("--nvme-data-digest --nvme-io-policy round-robin");
    run("kills over two paths", &setup, 8 * MIB, 25);
}

#[test]
fn kills_over_an_overlay_lose_nothing() {
    let mut setup = Setup::new(NamespaceSpec::new(1, 16 * MIB)).queues(2, 2);
    setup.overlay = Some(16 * MIB);
    run("kills over an overlay", &setup, 16 * MIB, 25);
}
