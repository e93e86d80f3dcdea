//! Guest memory: regions that are wrong, that change under load, and that go away.

mod common;

use common::{Rig, SOON, fill_with_reads, refused, until};
use vhost_user_frontend as frontend;

use frontend::blk::{request_type::GET_ID, status};
use frontend::message;
use frontend::protocol::request;
use frontend::{Device, DeviceOptions, RegionSpec, process};

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

/// Reads into one region that came by hotplug, four at a time.
struct Visitor {
    raws: Vec<common::Raw>,
    id: common::Raw,
}

impl Visitor {
    const READS: u64 = 4;
    const LEN: u64 = 8192;

    fn new(device: &Device) -> Self {
        // Read `n` reads the sectors that were filled with `n + 1`.
        let raws = (0..Self::READS).map(|n| common::Raw::new(&device.memory, 0, 16 * n, 1));
        Self {
            raws: raws.collect(),
            id: common::Raw::new(&device.memory, GET_ID, 0, 20),
        }
    }

    /// Submits the reads into `region`, each off a page boundary by another amount, and returns when they have been
    /// fetched: with them, and before them, goes a request that needs no storage.
    fn submit(&self, device: &mut Device, region: &frontend::memory::Region) {
        let id = [
            self.id.header_buf(),
            frontend::Buf::writable(self.id.data, 20),
            self.id.status_buf(),
        ];
        let ring = &mut device.queue(0).ring;
        ring.add(&id, u64::MAX).expect("room in the ring");
        for (n, raw) in (0u64..).zip(&self.raws) {
            let at = region.spec().guest_addr + n * 3 * 4096 + n * 512;
            let bufs = [
                raw.header_buf(),
                frontend::Buf::writable(at, Self::LEN as u32),
                raw.status_buf(),
            ];
            ring.add(&bufs, n).expect("room in the ring");
        }
        ring.publish();
        let first = ring.wait_used(SOON).unwrap();
        assert_eq!((first.token, first.len), (u64::MAX, 21));
    }

    /// Waits for the reads, each of which must have put its data into the file of the region.
    fn check(&self, device: &mut Device, region: &frontend::memory::Region) {
        for _ in 0..Self::READS {
            let used = device.queue(0).ring.wait_used(SOON).unwrap();
            assert_eq!(u64::from(used.len), Self::LEN + 1);
        }
        for (n, raw) in (0u64..).zip(&self.raws) {
            assert_eq!(raw.status(&device.memory), status::OK);
            device.memory.fill(raw.status, 1, status::UNTOUCHED);
            let at = region.spec().guest_addr + n * 3 * 4096 + n * 512;
            let host = region.host(at, Self::LEN);
            // SAFETY: `host` is valid for that length, and nobody writes there any more.
            let data = unsafe { std::slice::from_raw_parts(host, Self::LEN as usize) };
            assert!(
                data.iter().all(|byte| u64::from(*byte) == n + 1),
                "read {n}"
            );
        }
    }
}

/// The place of a plugged region: a few that are used again and again.
fn plugged(round: u64) -> RegionSpec {
    RegionSpec::new((1 << 34) + ((round % 7) << 24), MIB).at_offset(4096 * (round % 3))
}

#[test]
fn requests_into_regions_that_come_and_go_complete_in_them() {
    const ROUNDS: u64 = 3000;
    let rig = Rig::raw(16 * MIB);
    let mut device = rig.device();
    for n in 0..Visitor::READS {
        device
            .write(16 * n, &[n as u8 + 1; Visitor::LEN as usize])
            .unwrap();
    }
    let visitor = Visitor::new(&device);
    let mappings = process::mapping_count(rig.daemon.pid()).unwrap();
    let descriptors = process::fd_count(rig.daemon.pid()).unwrap();
    let mut in_flight = 0;
    for round in 0..ROUNDS {
        let region = frontend::memory::Region::new(plugged(round)).unwrap();
        device.client().unwrap().add_mem_reg(&region).unwrap();
        visitor.submit(&mut device, &region);
        let ring = device.queue(0).ring.split();
        let done = ring.used_idx().wrapping_sub(ring.last_used());
        in_flight += u64::from(round % 3 < 2 && u64::from(done) < Visitor::READS);
        match round % 3 {
            // The region goes while requests run into it.
            0 => device
                .client()
                .unwrap()
                .rem_mem_reg(&region.spec())
                .unwrap(),
            // The whole table is replaced by one without it, as a VMM without memory slots does.
            1 => device
                .client()
                .unwrap()
                .set_mem_table(&device.memory)
                .unwrap(),
            _ => {}
        }
        visitor.check(&mut device, &region);
        if round % 3 == 2 {
            device
                .client()
                .unwrap()
                .rem_mem_reg(&region.spec())
                .unwrap();
        }
    }
    println!("{in_flight} of {ROUNDS} regions were taken away with reads in flight");
    // The last request may still be giving back its share in the last region.
    until("no mapping is left over", || {
        process::mapping_count(rig.daemon.pid()).unwrap() <= mappings + 1
            && process::fd_count(rig.daemon.pid()).unwrap() <= descriptors
    });
    assert_eq!(
        process::mappings_of(rig.daemon.pid(), "guest-memory").unwrap(),
        2
    );
    device.shut_down().unwrap();
}

#[test]
fn regions_come_and_go_under_load() {
    const ROUNDS: usize = 2000;
    let rig = Rig::raw(16 * MIB);
    under_load(&rig, ROUNDS, |device, round| {
        let extra = frontend::memory::Region::new(plugged(round as u64)).unwrap();
        let client = device.client().unwrap();
        client.add_mem_reg(&extra).unwrap();
        client.rem_mem_reg(&extra.spec()).unwrap();
    });
    until("memory is let go", || {
        process::mappings_of(rig.daemon.pid(), "guest-memory").unwrap() == 0
    });
}

#[test]
fn several_regions_in_one_file_are_apart() {
    let rig = Rig::raw(16 * MIB);
    let mut device = rig.device();
    for n in 0..Visitor::READS {
        device
            .write(16 * n, &[n as u8 + 1; Visitor::LEN as usize])
            .unwrap();
    }
    let visitor = Visitor::new(&device);
    let first = frontend::memory::Region::new(RegionSpec::new(1 << 34, 3 * MIB)).unwrap();
    // Neighbours in the file are far from each other in the guest, and the other way round.
    for (n, guest) in [(2u64, (1 << 34) + 0x1000_0000), (1, 1 << 35), (0, 1 << 34)] {
        let spec = RegionSpec::new(guest, MIB).at_offset(n * MIB);
        let region = frontend::memory::Region::of(first.file().unwrap(), spec).unwrap();
        device.client().unwrap().add_mem_reg(&region).unwrap();
        visitor.submit(&mut device, &region);
        visitor.check(&mut device, &region);
        // In the file, where it belongs: the same bytes through the other mapping.
        let whole = first.host((1 << 34) + n * MIB, 1);
        // SAFETY: one readable byte.
        assert_eq!(unsafe { whole.read() }, 1, "region {n}");
    }
    device.shut_down().unwrap();
}

#[test]
fn guest_memory_in_huge_pages_whose_regions_begin_and_end_inside_them() {
    let Some(_pages) = frontend::memory::HugePages::reserve(24) else {
        return;
    };
    let rig = Rig::raw(16 * MIB);
    let options = DeviceOptions {
        huge_pages: true,
        memory: vec![
            RegionSpec::new(0, 16 * MIB + 0x3000).at_offset(0x5000),
            RegionSpec::new(1 << 32, 8 * MIB + 0x1234).at_offset(MIB),
        ],
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    for n in 0..Visitor::READS {
        device
            .write(16 * n, &[n as u8 + 1; Visitor::LEN as usize])
            .unwrap();
    }
    let visitor = Visitor::new(&device);
    let whole = frontend::memory::Region::huge(RegionSpec::new(1 << 34, 4 * MIB)).unwrap();
    for (round, offset) in [0x1000, MIB, 2 * MIB - 0x1000, 2 * MIB]
        .into_iter()
        .enumerate()
    {
        let spec = RegionSpec::new(1 << (34 + round), MIB + 0x345).at_offset(offset);
        let region = frontend::memory::Region::of(whole.file().unwrap(), spec).unwrap();
        device.client().unwrap().add_mem_reg(&region).unwrap();
        visitor.submit(&mut device, &region);
        visitor.check(&mut device, &region);
    }
    device.shut_down().unwrap();
    until("memory is let go", || {
        process::mappings_of(rig.daemon.pid(), "guest-memory").unwrap() == 0
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
    let ring = device.queue(0).ring.split();
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
fn guest_memory_file_shorter_than_its_region_is_refused() {
    let mut rig = Rig::raw(MIB);
    let region = frontend::memory::Region::new(RegionSpec::new(1 << 34, 2 * MIB)).unwrap();
    region.truncate(MIB).unwrap();
    refused(&mut rig, "short file", |c| c.add_mem_reg(&region));
}
