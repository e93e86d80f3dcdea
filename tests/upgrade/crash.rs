//! What an upgrade leaves behind is killed: the VMM's inflight region, with the journal in it, is all there is.

use crate::frontend::guest::Random;
use crate::frontend::{Device, Disk, TempDir, qemu};
use crate::rig::{Load, MIB, New, Rig};
use crate::{in_memory, make_overlay, packed};

struct Case {
    rig: Rig,
    device: Device,
    load: Load,
}

impl Case {
    /// An overlay, whose writes allocate, under load.
    fn new(of_packed_rings: bool) -> Self {
        let dir: TempDir = in_memory();
        let contents = make_overlay(&dir, 32 * MIB);
        let disk = Disk::new(dir.join("disk"), "qcow2").queues(2).workers(2);
        let rig = Rig::start(dir, &disk, 60_000);
        let mut device = rig.device(packed(of_packed_rings));
        assert!(device.inflight().is_some());
        let mut load = Load::new(11, contents, 2);
        load.go(&mut device, 100);
        Self { rig, device, load }
    }

    /// Kills the daemon, with requests in flight.
    fn kill(&mut self) {
        self.load.begin(&mut self.device);
        self.rig.kill();
    }

    /// Starts it again; the VMM goes on with what it kept.
    fn start_again(&mut self) {
        self.rig.start_again();
        self.device.resume().unwrap();
        self.load.go(&mut self.device, 100);
    }

    /// Every request has completed once, and the disk is what it has to be.
    fn end(self) {
        let Self {
            mut rig,
            mut device,
            mut load,
        } = self;
        load.finish(&mut device);
        device.shut_down().unwrap();
        rig.terminate();
        qemu::check_no_corruption(&rig.image());
        let dump = rig.dir.join("model");
        std::fs::write(&dump, &load.model.bytes).unwrap();
        qemu::assert_equal(&rig.image(), "qcow2", &dump, "raw");
    }
}

#[test]
fn new_process_that_is_killed_after_an_upgrade_loses_nothing() {
    for of_packed_rings in [false, true] {
        let mut case = Case::new(of_packed_rings);
        let mut random = Random::new(3);
        for _ in 0..8 {
            let Case { rig, device, load } = &mut case;
            rig.upgrade_under(|| load.step(device));
            for _ in 0..random.below(40) {
                load.step(device);
            }
            case.kill();
            case.start_again();
        }
        case.end();
    }
}

#[test]
fn new_process_that_is_killed_over_its_first_requests_loses_nothing() {
    for of_packed_rings in [false, true] {
        let mut case = Case::new(of_packed_rings);
        for (point, count) in [
            ("fetched", 1),
            ("fetched", 20),
            ("executed", 1),
            ("pushed", 1),
            ("pushed", 7),
            ("published", 1),
            ("published", 9),
        ] {
            let Case { rig, device, load } = &mut case;
            rig.upgrade_to_one_that_dies(point, count, || load.step(device));
            case.start_again();
        }
        case.end();
    }
}

#[test]
fn old_process_that_is_killed_after_an_upgrade_that_failed_in_the_pause_loses_nothing() {
    for of_packed_rings in [false, true] {
        let mut case = Case::new(of_packed_rings);
        for point in ["upgrade-stopped", "upgrade-started"].repeat(3) {
            let Case { rig, device, load } = &mut case;
            let new = format!("VIRTIOBLKD_KILL_POINT={point}:1");
            let why = rig.fail_under(&New::With(&new), || load.step(device));
            assert!(why.contains("has ended"), "{why}");
            case.kill();
            case.start_again();
        }
        // And one that succeeds is followed by a kill.
        let Case { rig, device, load } = &mut case;
        rig.program(&New::Good);
        rig.upgrade_under(|| load.step(device));
        case.kill();
        case.start_again();
        case.end();
    }
}
