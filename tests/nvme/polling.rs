//! What a worker waits for awake, on a target that takes its time.

use std::time::Duration;

use nvme_target::{Fault, NamespaceSpec, On, Rule};
use vhost_user_frontend::{Notify, Op};

use crate::common::SOON;
use crate::rig::{MIB, Rig, Setup};

const BATCHES: u64 = 60;
/// A thousand times what a worker spins for storage, and a thousandth of the limit below.
const TAKES: Duration = Duration::from_millis(2);

/// The sleeps of the worker while a driver that looks all the time has `depth` reads answered, time and again.
fn sleeps(depth: u16) -> u64 {
    let setup = Setup::new(NamespaceSpec::new(1, MIB)).args("--poll-max-us 1000000");
    let rig = Rig::start(&setup);
    let mut device = rig.device(depth, 4096);
    let queue = device.queue(0);
    queue.ring.set_notify(Notify::Poll);
    rig.target
        .faults()
        .add(Rule::always(On::Io, Fault::Delay(TAKES)));
    for batch in 0..BATCHES {
        for n in 0..u64::from(depth) {
            // Nobody's neighbours: one command each.
            let (sector, len) = (n * 64, 4096);
            queue.submit(Op::Read { sector, len }, batch).unwrap();
        }
        queue.ring.publish();
        for _ in 0..depth {
            let completion = queue.wait(SOON).unwrap();
            queue.release(completion);
        }
    }
    device.shut_down().unwrap();
    let log = rig.daemon.log();
    let line = log.lines().rfind(|line| line.contains(" sleeps")).unwrap();
    let (line, _) = line.rsplit_once(" sleeps").unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_request_of_a_quick_driver_is_waited_for_awake_and_many_are_not() {
    // It sleeps for some of the first, until the driver is known to be quick.
    let one = sleeps(1);
    // Once a batch, unless the whole test was without a processor for as long as the target takes.
    let many = sleeps(32);
    assert!(one < BATCHES / 2 && many > BATCHES / 2, "{one} {many}");
}
