//! Kills with one right outcome each, and inflight regions that are not what they should be.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::common::{Rig, SOON, program, until};
use crate::frontend::blk::status;
use crate::frontend::guest::Random;
use crate::frontend::message::Inflight;
use crate::frontend::{Daemon, Device, DeviceOptions, Notify, Op, SlotOptions, qemu};

const MIB: u64 = 1 << 20;

fn options(packed: bool) -> DeviceOptions {
    DeviceOptions {
        packed,
        // Nobody looks at the call descriptor here but where a test says so.
        notify: Notify::Poll,
        slots: SlotOptions {
            count: 32,
            ..SlotOptions::default()
        },
        ..DeviceOptions::default()
    }
}

/// The next daemon on the same disk; it ends itself at a place.
fn next(rig: &mut Rig, place: Option<&str>) {
    rig.daemon.kill();
    let disk = match place {
        Some(place) => rig.disk.clone().env("VIRTIOBLKD_KILL_POINT", place),
        None => rig.disk.clone(),
    };
    rig.daemon = Daemon::start(&program(), &disk, rig.dir.path());
}

/// A device on a daemon that ends itself at `place`.
fn doomed(rig: &mut Rig, packed: bool, place: &str) -> Device {
    next(rig, Some(place));
    Device::start(rig.daemon.socket(), options(packed)).unwrap()
}

fn write_of(sector: u64) -> [u8; 512] {
    [(sector as u8).wrapping_add(1); 512]
}

/// Submits writes of these sectors at once.
fn submit_writes(device: &mut Device, sectors: impl IntoIterator<Item = u64>) {
    let queue = device.queue(0);
    for sector in sectors {
        let data = &write_of(sector);
        queue.submit(Op::Write { sector, data }, sector).unwrap();
    }
    queue.ring.publish();
}

/// The tokens of what completes, in order, until `count` have.
fn take(device: &mut Device, count: usize) -> Vec<u64> {
    let queue = device.queue(0);
    (0..count)
        .map(|_| {
            let done = queue.wait(SOON).unwrap();
            assert_eq!(done.status, status::OK);
            queue.release(done);
            done.token
        })
        .collect()
}

#[test]
fn what_was_in_flight_is_taken_up_in_the_order_it_was_submitted() {
    for packed in [false, true] {
        let mut rig = Rig::raw(MIB);
        // Nineteen ids come first. A driver takes the descriptor that it got back last, so that the heads of
        // what follows go down where they went up.
        let mut device = doomed(&mut rig, packed, "pushed:26");
        let get_ids = |device: &mut Device, count: u64| {
            for token in 0..count {
                device.queue(0).submit(Op::GetId, token).unwrap();
            }
            device.queue(0).ring.publish();
        };
        get_ids(&mut device, 19);
        take(&mut device, 19);
        // The ids are written at once, and are shown eight by eight: no one is, when the end comes with the seventh.
        get_ids(&mut device, 16);
        rig.daemon.wait_exit(SOON);
        assert!(device.queue(0).poll().unwrap().is_none());
        next(&mut rig, None);
        device.resume().unwrap();
        let order = take(&mut device, 16);
        assert!(
            order.iter().copied().eq(0..16),
            "packed {packed}: {order:?}"
        );
    }
}

#[test]
fn the_driver_is_told_of_completions_whose_interrupt_was_lost() {
    for packed in [false, true] {
        let mut rig = Rig::raw(MIB);
        let mut device = doomed(&mut rig, packed, "published:1");
        device.queue(0).ring.set_notify(Notify::Call);
        submit_writes(&mut device, 0..1);
        rig.daemon.wait_exit(SOON);
        device.queue(0).ring.call_fd().take();
        next(&mut rig, None);
        device.resume().unwrap();
        let call = device.queue(0).ring.call_fd().clone();
        assert!(call.wait(SOON).unwrap());
        assert!(device.queue(0).poll().unwrap().is_some(), "packed {packed}");
    }
}

#[test]
fn one_batch_is_taken_up_by_daemon_after_daemon_that_are_killed_over_it() {
    for format in ["raw", "qcow2"] {
        for packed in [false, true] {
            let mut rig = Rig::with(format, 16 * MIB, |d| d);
            let mut device = doomed(&mut rig, packed, "executed:1");
            submit_writes(&mut device, 0..32);
            rig.daemon.wait_exit(SOON);
            for round in 0..12u64 {
                // Before the first completion is shown.
                let name = ["fetched", "executed", "pushed"][round as usize % 3];
                next(&mut rig, Some(&format!("{name}:{}", 1 + round / 3)));
                let _ = device.resume();
                rig.daemon.wait_exit(SOON);
            }
            next(&mut rig, None);
            device.resume().unwrap();
            let mut seen = take(&mut device, 32);
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..32), "{format}, packed {packed}");
            for sector in 0..32 {
                assert_eq!(device.read(sector, 512).unwrap(), write_of(sector));
            }
            device.shut_down().unwrap();
        }
    }
}

/// VMM and daemon die together, and with them the memory that both shared: what was flushed is there.
#[test]
fn without_the_vmms_memory_what_was_flushed_is_there() {
    for (format, options_of_image) in [("raw", ""), ("qcow2", ""), ("qcow2", "cluster_size=4096")] {
        let mut rig = Rig::with(format, 4 * MIB, |d| d);
        if format == "qcow2" {
            rig.daemon.kill();
            qemu::wait_unlocked(&rig.image(), format);
            qemu::create(&rig.image(), format, 4 * MIB, options_of_image);
        }
        let mut random = Random::new(11);
        // Of each sector: what is durable, and what came later and may be there or not.
        let mut durable = vec![0u8; 512];
        let mut later: Vec<Vec<u8>> = vec![Vec::new(); 512];
        for round in 0..12u8 {
            next(&mut rig, None);
            let mut device = Device::start(rig.daemon.socket(), options(round % 2 == 1)).unwrap();
            for sector in 0..512u64 {
                let at = sector as usize;
                let got = device.read(sector * 16, 512).unwrap();
                assert!(
                    got == [got[0]; 512] && (got[0] == durable[at] || later[at].contains(&got[0])),
                    "{format}, round {round}, sector {sector}: {} where {} was flushed, then {:?}",
                    got[0],
                    durable[at],
                    later[at]
                );
                // It is in the file, and no kill takes it away from there.
                durable[at] = got[0];
                later[at].clear();
            }
            for step in 0..60u64 {
                let at = random.below(512);
                let stamp = round * 20 + 1 + (step % 20) as u8;
                device.write(at * 16, &[stamp; 512]).unwrap();
                later[at as usize].push(stamp);
                if step == 30 {
                    device.flush().unwrap();
                    for (durable, later) in durable.iter_mut().zip(&mut later) {
                        *durable = later.last().copied().unwrap_or(*durable);
                        later.clear();
                    }
                }
            }
            submit_writes(&mut device, 8177..8192);
            rig.daemon.kill();
            drop(device);
            if format == "qcow2" {
                qemu::wait_unlocked(&rig.image(), format);
                qemu::check_no_corruption(&rig.image());
            }
        }
    }
}

// Regions that are not what they should be.

#[test]
fn after_a_reset_nothing_of_the_time_before_is_taken_up() {
    for packed in [false, true] {
        let mut rig = Rig::raw(MIB);
        let mut device = doomed(&mut rig, packed, "executed:3");
        submit_writes(&mut device, 0..16);
        rig.daemon.wait_exit(SOON);
        next(&mut rig, None);
        // The guest resets its device while there is no daemon: QEMU lets go of the region.
        device.reconnect().unwrap();
        device.write(100, &[9; 512]).unwrap();
        assert_eq!(device.read(100, 512).unwrap(), [9; 512]);
        // And while there is one; the driver's check sees what completes and was not asked for.
        for round in 0..10u8 {
            device.reset().unwrap();
            device.start_queues().unwrap();
            device.write(101, &[round; 512]).unwrap();
            assert_eq!(device.read(101, 512).unwrap(), [round; 512]);
        }
    }
}

#[test]
fn a_region_that_is_kept_over_a_reset_with_nothing_in_flight_is_as_good_as_a_fresh_one() {
    // Split rings only: where a packed one goes on is in its region and nowhere else. QEMU never does it.
    let rig = Rig::raw(MIB);
    let mut device = Device::start(rig.daemon.socket(), options(false)).unwrap();
    for round in 0..10u8 {
        for i in 0..u64::from(round) {
            device.write(i, &[round; 512]).unwrap();
        }
        let kept = device.set_inflight(None);
        device.reset().unwrap();
        device.set_inflight(kept);
        device.start_queues().unwrap();
    }
}

fn file_of(region: &Inflight) -> File {
    region.fd.try_clone().unwrap().into()
}

/// Whether a daemon serves a device after a resume; it must live in any case, and say so if it does not.
fn is_served(rig: &mut Rig, device: &mut Device) -> bool {
    let served = device.resume().is_ok() && {
        let deadline = Instant::now() + SOON;
        loop {
            match device.queue(0).poll() {
                Ok(Some(_)) => break true,
                // It completed what was not asked for: it believed the region.
                Err(_) => break true,
                Ok(None) => {}
            }
            let err = device.queue(0).ring.err_fd().clone();
            let closed = device.client().unwrap();
            if err.wait(Duration::from_millis(1)).unwrap()
                || closed.closed_within(Duration::ZERO).unwrap()
            {
                break false;
            }
            assert!(Instant::now() < deadline, "neither served nor refused");
        }
    };
    rig.daemon.assert_alive();
    assert!(!rig.daemon.log().contains("panicked"));
    served
}

/// A device whose daemon was killed with sixteen writes in flight: when the first of them was done, and before
/// anything of it was shown.
fn interrupted(rig: &mut Rig, packed: bool) -> Device {
    let mut device = doomed(rig, packed, "executed:31");
    for sector in 0..30 {
        device.write(sector, &write_of(sector)).unwrap();
    }
    submit_writes(&mut device, new_clusters());
    rig.daemon.wait_exit(SOON);
    next(rig, None);
    device
}

/// Sectors of sixteen clusters that nothing was written to before: a journal has the first at least, whatever
/// was written back meanwhile.
fn new_clusters() -> impl Iterator<Item = u64> {
    (4096..4096 + 16 * 128).step_by(128)
}

#[test]
fn a_region_that_contradicts_its_split_ring_is_refused() {
    // Offset in the queue's part (QueueRegionSplit in the vhost-user document), and what is put there.
    let all_in_flight: Vec<u8> = (0..128u64)
        .flat_map(|n| {
            let mut state = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            state[8..].copy_from_slice(&n.to_le_bytes());
            state
        })
        .collect();
    let cases: [(&str, u64, &[u8]); 5] = [
        ("features", 0, &[1]),
        ("version", 8, &[7]),
        ("size", 10, &[64, 0]),
        ("used index", 14, &[0xff, 0x7f]),
        ("more in flight than the driver has", 16, &all_in_flight),
    ];
    for (what, at, bytes) in cases {
        let mut rig = Rig::raw(16 * MIB);
        let mut device = interrupted(&mut rig, false);
        let region = device.inflight().unwrap();
        let file = file_of(region);
        file.write_all_at(bytes, region.mmap_offset + at).unwrap();
        assert!(!is_served(&mut rig, &mut device), "{what}");
        until("the log says why", || {
            let log = rig.daemon.log();
            log.contains("ring 0 cannot start") && log.contains("inflight region")
        });
        device.reconnect().unwrap();
        device.write(0, &[1; 512]).unwrap();
    }
}

#[test]
fn any_bytes_in_the_region_leave_the_daemon_alive_and_the_image_whole() {
    let mut random = Random::new(77);
    for (format, packed) in [
        ("raw", false),
        ("raw", true),
        ("qcow2", false),
        ("qcow2", true),
    ] {
        let mut rig = Rig::with(format, 16 * MIB, |d| d);
        for round in 0..12 {
            let mut device = interrupted(&mut rig, packed);
            let region = device.inflight().unwrap();
            let file = file_of(region);
            // The ring's part, or the rest of it.
            let span = match round % 3 {
                0 => 32,
                1 => 4096,
                _ => region.mmap_size,
            };
            for _ in 0..1 + random.below(64) {
                let at = region.mmap_offset + random.below(span);
                file.write_all_at(&[random.next() as u8], at).unwrap();
            }
            is_served(&mut rig, &mut device);
            device.disconnect();
            device.reconnect().unwrap();
            device.write(0, &write_of(0)).unwrap();
            device.shut_down().unwrap();
            if format == "qcow2" {
                qemu::check_no_corruption(&rig.image());
            }
        }
    }
}

#[test]
fn the_region_of_another_image_is_refused_and_the_image_is_left_as_it_was() {
    let mut other = Rig::with("qcow2", 16 * MIB, |d| d);
    let mut foreign = interrupted(&mut other, false);
    let mut rig = Rig::with("qcow2", 16 * MIB, |d| d);
    let mut device = interrupted(&mut rig, false);
    let own = device.set_inflight(foreign.set_inflight(None));
    assert!(!is_served(&mut rig, &mut device));
    until("the log says why", || {
        rig.daemon.log().contains("another image")
    });
    // With its own region all goes on.
    device.set_inflight(own);
    device.resume().unwrap();
    let mut seen = take(&mut device, 16);
    seen.sort_unstable();
    assert!(seen.into_iter().eq(new_clusters()));
    for sector in (0..30).chain(new_clusters()) {
        assert_eq!(device.read(sector, 512).unwrap(), write_of(sector));
    }
    device.shut_down().unwrap();
    rig.daemon.terminate();
    qemu::check_no_corruption(&rig.image());
}
