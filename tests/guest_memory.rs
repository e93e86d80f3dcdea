//! Guest memory: regions that are wrong, that change under load, and that go away.

mod common;

use std::time::{Duration, Instant};

use common::{Rig, SOON, fill_with_reads, refused, until};
use vhost_user_frontend as frontend;

use frontend::blk::status;
use frontend::message;
use frontend::protocol::request;
use frontend::{Client, Device, DeviceOptions, RegionSpec, process};

const MIB: u64 = 1 << 20;

#[test]
fn overlapping_regions_are_refused() {
    let mut rig = Rig::raw(MIB);
    let size = 2 * MIB;
    let cases = [
        [RegionSpec::new(0, size), RegionSpec::new(0, size)],
        [RegionSpec::new(0, size), RegionSpec::new(size - 4096, size)],
        [RegionSpec::new(MIB, size), RegionSpec::new(0, size)],
    ];
    for specs in cases {
        let memory = frontend::Memory::new(&specs).unwrap();
        refused(&mut rig, "overlap", |c| c.set_mem_table(&memory));
        refused(&mut rig, "overlap by slots", |c| {
            // The table of the handshake covers 0..16 MiB already.
            c.add_mem_reg(&memory.regions()[0])
        });
    }
}

#[test]
fn region_with_hostile_numbers_is_refused() {
    let mut rig = Rig::raw(MIB);
    let memory = frontend::Memory::new(&[RegionSpec::new(1 << 40, MIB)]).unwrap();
    let fd = memory.regions()[0].fd();
    let good = memory.regions()[0].spec();
    let bad = [
        RegionSpec { size: 0, ..good },
        RegionSpec {
            size: u64::MAX,
            ..good
        },
        RegionSpec {
            guest_addr: u64::MAX - 4095,
            ..good
        },
        RegionSpec {
            user_addr: u64::MAX - 4095,
            ..good
        },
        RegionSpec {
            mmap_offset: u64::MAX - 4095,
            ..good
        },
        RegionSpec {
            mmap_offset: 1 << 62,
            ..good
        },
        RegionSpec {
            size: 1 << 62,
            ..good
        },
    ];
    for spec in bad {
        refused(&mut rig, "region", |c| {
            c.tell(request::ADD_MEM_REG, &message::single_region(&spec), &[fd])
        });
        refused(&mut rig, "table", |c| {
            c.tell(
                request::SET_MEM_TABLE,
                &message::memory_table(&[spec]),
                &[fd],
            )
        });
    }
    refused(&mut rig, "no descriptor", |c| {
        c.tell(request::ADD_MEM_REG, &message::single_region(&good), &[])
    });
    refused(&mut rig, "a descriptor too many", |c| {
        c.tell(
            request::SET_MEM_TABLE,
            &message::memory_table(&[good]),
            &[fd, fd],
        )
    });
    let other = RegionSpec {
        size: 2 * MIB,
        ..good
    };
    refused(&mut rig, "removal of what is not there", |c| {
        c.rem_mem_reg(&other)
    });
}

/// Keeps reads running while `change` is called `rounds` times; every read must complete, and rightly.
fn under_load(rig: &Rig, rounds: usize, mut change: impl FnMut(&mut Device, usize)) {
    let mut device = rig.device();
    for i in 0..64u64 {
        device.write(8 * i, &[i as u8 + 1; 4096]).unwrap();
    }
    for round in 0..rounds {
        let n = fill_with_reads(&mut device, 4096);
        change(&mut device, round);
        for _ in 0..n {
            let done = device.queue(0).wait(SOON).unwrap();
            assert_eq!(done.status, status::OK);
            let mut data = vec![0; 4096];
            device.queue(0).copy_data(done.slot, &mut data);
            if done.token < 64 {
                assert!(data.iter().all(|b| u64::from(*b) == done.token + 1));
            }
            device.queue(0).release(done);
        }
    }
    device.shut_down().unwrap();
}

#[test]
fn memory_table_is_replaced_under_load() {
    let rig = Rig::raw(16 * MIB);
    under_load(&rig, 200, |device, _| {
        device
            .client()
            .unwrap()
            .set_mem_table(&device.memory)
            .unwrap();
    });
    assert!(process::mappings_of(rig.daemon.pid(), "guest-memory").unwrap() <= 2);
}

#[test]
fn regions_come_and_go_under_load() {
    let rig = Rig::raw(16 * MIB);
    under_load(&rig, 200, |device, round| {
        let spec = RegionSpec::new((1 << 34) + ((round as u64 % 7) << 24), MIB);
        let extra = frontend::memory::Region::new(spec).unwrap();
        let client = device.client().unwrap();
        client.add_mem_reg(&extra).unwrap();
        client.rem_mem_reg(&spec).unwrap();
    });
}

#[test]
fn region_that_was_added_can_be_used_and_one_that_was_removed_cannot() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[0x6b; 512]).unwrap();
    let spec = RegionSpec::new(1 << 34, 2 * MIB);
    let extra = device.memory.add(spec).unwrap();
    device.client().unwrap().add_mem_reg(&extra).unwrap();
    let raw = common::Raw::new(&device.memory, 0, 0, 512);
    let bufs = [
        raw.header_buf(),
        frontend::Buf::writable(1 << 34, 512),
        raw.status_buf(),
    ];
    assert_eq!(common::run_chain(&mut device, &bufs), 513);
    assert_eq!(device.memory.read_vec(1 << 34, 512), [0x6b; 512]);
    device.client().unwrap().rem_mem_reg(&spec).unwrap();
    device.memory.fill(raw.status, 1, status::UNTOUCHED);
    let ring = &mut device.queue(0).ring;
    ring.add(&bufs, 0).unwrap();
    ring.publish();
    let outcome = ring.wait_outcome(common::silence()).unwrap();
    assert_ne!(outcome, frontend::Outcome::Silence);
    let answer = device.memory.read_vec(raw.status, 1)[0];
    assert!(outcome == frontend::Outcome::Broken || answer != status::OK);
}

#[test]
fn all_memory_slots_that_are_promised_can_be_used() {
    let rig = Rig::raw(MIB);
    let options = DeviceOptions {
        memory_slots: true,
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    let slots = device.client().unwrap().get_max_mem_slots().unwrap();
    assert!(slots >= 8);
    let start = device.memory.regions().len() as u64;
    for i in start..slots.min(64) {
        let spec = RegionSpec::new((1 << 36) + (i << 20), 4096);
        let region = device.memory.add(spec).unwrap();
        device.client().unwrap().add_mem_reg(&region).unwrap();
    }
    device.write(0, &[1; 512]).unwrap();
}

#[test]
fn truncated_guest_memory_does_not_take_the_daemon_down_silently() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    let spec = RegionSpec::new(1 << 34, 2 * MIB);
    let extra = device.memory.add(spec).unwrap();
    device.client().unwrap().add_mem_reg(&extra).unwrap();
    extra.truncate(0).unwrap();
    // A header in memory that is mapped and not there: reading it raises SIGBUS.
    let raw = common::Raw::new(&device.memory, 0, 0, 512);
    let ring = &mut device.queue(0).ring;
    let bufs = [
        frontend::Buf::readable(1 << 34, 16),
        frontend::Buf::writable(raw.data, 512),
        raw.status_buf(),
    ];
    ring.add(&bufs, 0).unwrap();
    ring.publish();
    let deadline = Instant::now() + SOON;
    loop {
        let outcome = device
            .queue(0)
            .ring
            .wait_outcome(Duration::from_millis(5))
            .unwrap();
        let gone = device
            .client()
            .unwrap()
            .closed_within(Duration::ZERO)
            .unwrap();
        if gone || outcome != frontend::Outcome::Silence {
            break;
        }
        assert!(Instant::now() < deadline, "neither an answer nor an end");
    }
    device.disconnect();
    until("it serves again, or has ended", || {
        rig.daemon.try_exit().is_some()
            || Client::connect(rig.daemon.socket()).is_ok_and(|c| c.get_features().is_ok())
    });
    if rig.daemon.try_exit().is_some() {
        let log = rig.daemon.log().to_lowercase();
        assert!(
            log.contains("sigbus") || log.contains("guest memory"),
            "it died without a word:\n{log}"
        );
    } else {
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn guest_memory_file_shorter_than_its_region_is_refused() {
    let mut rig = Rig::raw(MIB);
    let region = frontend::memory::Region::new(RegionSpec::new(1 << 34, 2 * MIB)).unwrap();
    region.truncate(MIB).unwrap();
    refused(&mut rig, "short file", |c| c.add_mem_reg(&region));
}
