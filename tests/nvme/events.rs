//! Namespaces that change while a guest has them.

use nvme_target::{AnaState, NamespaceSpec, Notice, PortSpec};
use vhost_user_frontend::blk::{SECTOR, status};
use vhost_user_frontend::{ConfigWatch, Device, Op};

use crate::common::{SOON, status_of, until};
use crate::rig::{MIB, Rig, Setup};

fn rig(paths: usize) -> Rig {
    let namespace = NamespaceSpec::new(1, 16 * MIB).max_bytes(64 * MIB);
    let ports = (0..paths).map(|_| PortSpec::loopback());
    Rig::start(
        &Setup::new(namespace)
            .ports(ports)
            .args("--nvme-reconnect-delay 1"),
    )
}

/// Waits until the guest is told of a size; it may be told of others before.
fn told(watch: &ConfigWatch, device: &Device, size: u64) {
    loop {
        let config = watch.wait(device, SOON).unwrap();
        if config.capacity * SECTOR == size {
            return;
        }
    }
}

/// The last sector can be used, and nothing beyond.
fn ends_at(device: &mut Device, size: u64) {
    let last = size / SECTOR - 1;
    device.write(last, &[last as u8 | 1; 512]).unwrap();
    assert_eq!(device.read(last, 512).unwrap(), [last as u8 | 1; 512]);
    for beyond in [last + 1, 2 * last + 2, 1 << 40] {
        let write = Op::Write {
            sector: beyond,
            data: &[1; 512],
        };
        assert_eq!(status_of(device, write), status::IOERR);
        let read = Op::Read {
            sector: beyond,
            len: 512,
        };
        assert_eq!(status_of(device, read), status::IOERR);
    }
    let across = Op::Write {
        sector: last,
        data: &[1; 1024],
    };
    assert_eq!(status_of(device, across), status::IOERR);
}

#[test]
fn events_of_growth_and_shrinking_reach_the_guest() {
    for paths in [1, 2] {
        let mut rig = rig(paths);
        let mut device = rig.device(8, 64 << 10);
        let watch = ConfigWatch::open(&device, true).unwrap();
        device.write(0, &[3; 512]).unwrap();
        for size in [40 * MIB, 2 * MIB, 16 * MIB, 64 * MIB] {
            rig.target
                .subsystem(0)
                .resize(1, size, Notice::Send)
                .unwrap();
            told(&watch, &device, size);
            ends_at(&mut device, size);
        }
        let log = rig.daemon.log();
        assert!(
            log.contains("was 16777216 bytes and is 41943040 bytes"),
            "{log}"
        );
        assert_eq!(device.read(0, 512).unwrap(), [3; 512]);
        device.shut_down().unwrap();
        rig.daemon.terminate();
        rig.assert_no_violations();
    }
}

#[test]
fn events_of_growth_without_a_word_are_found_out_after_a_reconnect() {
    let mut rig = rig(1);
    let mut device = rig.device(8, 64 << 10);
    let watch = ConfigWatch::open(&device, true).unwrap();
    device.write(0, &[3; 512]).unwrap();
    rig.target
        .subsystem(0)
        .resize(1, 32 * MIB, Notice::Silent)
        .unwrap();
    assert!(device.read(16 * MIB / SECTOR, 512).is_err());
    rig.target.drop_connections();
    told(&watch, &device, 32 * MIB);
    ends_at(&mut device, 32 * MIB);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}

#[test]
fn events_of_a_smaller_namespace_that_nobody_told_of_fail_what_is_beyond() {
    let mut rig = rig(1);
    let mut device = rig.device(8, 64 << 10);
    device.write(0, &[3; 512]).unwrap();
    rig.target
        .subsystem(0)
        .resize(1, 8 * MIB, Notice::Silent)
        .unwrap();
    // The target says LBA Out of Range, and is not asked again and again.
    let before = rig.target.counters().writes();
    let beyond = Op::Write {
        sector: 8 * MIB / SECTOR,
        data: &[1; 512],
    };
    assert_eq!(status_of(&mut device, beyond), status::IOERR);
    assert_eq!(rig.target.counters().writes(), before + 1);
    assert_eq!(device.read(0, 512).unwrap(), [3; 512]);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}

#[test]
fn events_of_removal_fail_requests_for_good() {
    for paths in [1, 2] {
        for notice in [Notice::Send, Notice::Silent] {
            let mut rig = rig(paths);
            let mut device = rig.device(8, 64 << 10);
            device.write(8, &[4; 512]).unwrap();
            let gone = rig.target.subsystem(0).remove_namespace(1, notice).unwrap();
            let read = Op::Read {
                sector: 8,
                len: 512,
            };
            until("requests fail", || {
                status_of(&mut device, read) == status::IOERR
            });
            let write = Op::Write {
                sector: 8,
                data: &[1; 512],
            };
            assert_eq!(status_of(&mut device, write), status::IOERR);
            if notice == Notice::Send {
                until("the log says so", || {
                    rig.daemon.log().contains("the namespace is gone")
                });
            }
            rig.daemon.assert_alive();
            drop(device);

            // The namespace is there again, and a new daemon finds what it held.
            rig.target
                .subsystem(0)
                .restore_namespace(gone, Notice::Send);
            rig.start_again();
            let mut device = rig.device(8, 64 << 10);
            assert_eq!(device.read(8, 512).unwrap(), [4; 512]);
            device.shut_down().unwrap();
            rig.daemon.terminate();
            rig.assert_no_violations();
        }
    }
}

#[test]
fn events_of_write_protection_fail_writes_until_it_is_lifted() {
    let mut rig = rig(2);
    let mut device = rig.device(8, 64 << 10);
    device.write(8, &[5; 512]).unwrap();
    let subsystem = rig.target.subsystem(0).clone();
    subsystem
        .set_write_protected(1, true, Notice::Send)
        .unwrap();
    until("the log says so", || {
        rig.daemon.log().contains("is write-protected now")
    });
    let write = Op::Write {
        sector: 8,
        data: &[6; 512],
    };
    assert_eq!(status_of(&mut device, write), status::IOERR);
    assert_eq!(device.read(8, 512).unwrap(), [5; 512]);
    subsystem
        .set_write_protected(1, false, Notice::Send)
        .unwrap();
    until("writes go on", || {
        status_of(&mut device, write) == status::OK
    });
    assert_eq!(device.read(8, 512).unwrap(), [6; 512]);

    // Nobody tells of it: the target refuses.
    subsystem
        .set_write_protected(1, true, Notice::Silent)
        .unwrap();
    let write = Op::Write {
        sector: 8,
        data: &[7; 512],
    };
    assert_eq!(status_of(&mut device, write), status::IOERR);
    assert_eq!(device.read(8, 512).unwrap(), [6; 512]);
    subsystem
        .set_write_protected(1, false, Notice::Send)
        .unwrap();
    until("writes go on", || {
        status_of(&mut device, write) == status::OK
    });
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}

#[test]
fn events_of_access_states_choose_the_path() {
    let mut rig = rig(2);
    rig.target.keep_journal(true);
    let mut device = rig.device(8, 64 << 10);
    let subsystem = rig.target.subsystem(0).clone();
    let states = [
        AnaState::Inaccessible,
        AnaState::PersistentLoss,
        AnaState::NonOptimized,
        AnaState::Change,
    ];
    for state in states {
        for away in [0, 1] {
            // Both are there before one of them is changed.
            let (here, there) = (rig.target.port(1 - away), rig.target.port(away));
            subsystem.set_ana_state(here, 1, AnaState::Optimized, Notice::Send);
            subsystem.set_ana_state(there, 1, state, Notice::Send);
            // Once the daemon knows, all requests take the other path.
            let mut answered = 0;
            until("one path is used", || {
                device.write(answered, &[1; 512]).unwrap();
                answered += 1;
                let journal = rig.target.journal();
                let last = &journal[journal.len().saturating_sub(20)..];
                last.len() == 20 && last.iter().all(|e| e.port == here.id())
            });
        }
    }
    // None is left, for a moment.
    for port in rig.target.ports() {
        subsystem.set_ana_state(port, 1, AnaState::Inaccessible, Notice::Send);
    }
    std::thread::scope(|scope| {
        let write = scope.spawn(|| device.write(5, &[9; 512]));
        subsystem.set_ana_state(rig.target.port(0), 1, AnaState::NonOptimized, Notice::Send);
        write.join().unwrap().unwrap();
    });
    assert_eq!(device.read(5, 512).unwrap(), [9; 512]);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}
