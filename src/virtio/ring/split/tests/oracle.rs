//! The same rings given to this code and to `virtio-queue`: both must see the same.

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::virtio::testing::{Desc, INDIRECT, NEXT, Rng, WRITE, desc, read_bytes, write_bytes};

const TABLES: u64 = 0x4_0000;
/// Two regions that touch, then a hole.
const REGIONS: [(u64, u64); 3] = [(0, 0x10_0000), (0x10_0000, 0x2000), (0x20_0000, 0x1800)];

/// The same memory as `vm-memory` sees it.
fn theirs(mem: &GuestMemory) -> GuestMemoryMmap<()> {
    let ranges = mem.regions().iter().map(|region| {
        let file = region.mapping().region().file_offset().unwrap();
        let file = FileOffset::new(file.file().try_clone().unwrap(), file.start());
        (
            GuestAddress(region.guest_addr),
            region.len as usize,
            Some(file),
        )
    });
    GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()
}

fn queue(cfg: &RingConfig, next_used: u16) -> Queue {
    let mut queue = Queue::new(cfg.size).unwrap();
    queue
        .try_set_desc_table_address(GuestAddress(cfg.desc_table))
        .unwrap();
    queue
        .try_set_avail_ring_address(GuestAddress(cfg.avail_ring))
        .unwrap();
    queue
        .try_set_used_ring_address(GuestAddress(cfg.used_ring))
        .unwrap();
    queue.set_next_avail(cfg.base as u16);
    queue.set_next_used(next_used);
    queue.set_event_idx(cfg.event_idx);
    queue.set_ready(true);
    queue
}

/// A buffer, mostly inside memory.
fn buffer(rng: &mut Rng) -> (u64, u32) {
    let len = rng.pick(&[0, 1, 16, 512, 4096, 5000]);
    let (base, size) = rng.pick(&REGIONS);
    let addr = match rng.below(8) {
        0 => base + size - u64::from(len) / 2,
        1 => rng.below(0x30_0000),
        _ => base + rng.below(size - 5000),
    };
    (addr, len)
}

/// `count` linked descriptors, placed in a table of `size` in random order; where they start.
fn linked(rng: &mut Rng, size: u16, count: u16) -> (Vec<(u16, Desc)>, u16) {
    let mut places: Vec<u16> = (0..size).collect();
    rng.shuffle(&mut places);
    let writable_from = rng.below(u64::from(count) + 1) as u16;
    let list = (0..count)
        .map(|i| {
            let (addr, len) = buffer(rng);
            let write = (i >= writable_from) != rng.once_in(100);
            let flags = if write { WRITE } else { 0 } | if i + 1 < count { NEXT } else { 0 };
            let next = *places
                .get(usize::from(i) + 1)
                .unwrap_or(&rng.pick(&[0, 1, 9999]));
            (places[usize::from(i)], desc(addr, len, flags, next))
        })
        .collect();
    (list, places[0])
}

/// Makes one descriptor wrong somehow.
fn damage(rng: &mut Rng, list: &mut [(u16, Desc)]) {
    let at = rng.below(list.len() as u64) as usize;
    let broken = &mut list[at].1;
    match rng.below(4) {
        0 => broken.flags |= NEXT,
        1 => broken.next = rng.next() as u16,
        2 => broken.addr = rng.next(),
        _ => broken.len = rng.next() as u32,
    }
}

/// What their chain comes to by the rules of this code: (guest address, length) pieces, readable and
/// writable; `None` where the chain is wrong.
type Pieces = Vec<(u64, u64)>;
fn their_pieces(
    mem: &GuestMemoryMmap<()>,
    descs: &[virtio_queue::desc::split::Descriptor],
) -> Option<(Pieces, Pieces)> {
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    // Their iterator ends silently where a chain is wrong; then the last one still has a successor.
    if descs.last()?.has_next() {
        return None;
    }
    for desc in descs {
        if !desc.is_write_only() && !writable.is_empty() {
            return None;
        }
        let (mut addr, mut left) = (desc.addr().0, u64::from(desc.len()));
        while left > 0 {
            let (base, size) = REGIONS
                .into_iter()
                .find(|(base, size)| (*base..base + size).contains(&addr))?;
            assert!(mem.address_in_range(GuestAddress(addr)));
            let part = left.min(base + size - addr);
            let list = if desc.is_write_only() {
                &mut writable
            } else {
                &mut readable
            };
            list.push((addr, part));
            addr += part;
            left -= part;
        }
    }
    Some((readable, writable))
}

fn our_pieces(mem: &GuestMemory, iovecs: &[libc::iovec]) -> Pieces {
    iovecs
        .iter()
        .map(|v| {
            (
                mem.host_to_guest(v.iov_base.cast()).unwrap(),
                v.iov_len as u64,
            )
        })
        .collect()
}

#[test]
fn random_chains_are_read_as_virtio_queue_reads_them() {
    let mem = memory(&REGIONS);
    let their_mem = theirs(&mem);
    let mut chain = ChainBuf::with_capacity(8);
    let (mut right, mut wrong) = (0, 0);
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let size = 1u16 << rng.below(7);
        let index = rng.pick(&[0, 1, 65535, 12345]);
        let driver = Driver::new(&mem, 0x1000, size, index);
        let mut ring = ring(&driver);
        let mut queue = queue(&driver.cfg, index);

        let count = 1 + rng.below(u64::from(size)) as u16;
        let (mut list, head) = linked(&mut rng, size, count);
        if rng.once_in(3) {
            // The last one becomes an indirect table.
            let entries = 1 + rng.below(20) as u16;
            let (mut table, _) = linked(&mut rng, entries, entries);
            // A table starts at its first entry.
            table.sort_by_key(|(place, _)| *place);
            if rng.once_in(4) {
                damage(&mut rng, &mut table);
            }
            let place = TABLES + rng.below(64);
            for (i, entry) in &table {
                write_bytes(&mem, place + 16 * u64::from(*i), &entry.bytes());
            }
            let last = list.len() - 1;
            let len = u32::from(entries) * 16 + u32::from(rng.once_in(10));
            list[last].1 = desc(place, len, INDIRECT, 0);
        } else if rng.once_in(4) {
            damage(&mut rng, &mut list);
        }
        for (place, entry) in &list {
            driver.set_desc(*place, *entry);
        }
        driver.offer(head);

        assert_eq!(ring.pop(), Ok(Some(head)));
        let their_chain = queue.iter(&their_mem).unwrap().next().unwrap();
        assert_eq!(their_chain.head_index(), head);
        let descs: Vec<_> = their_chain.collect();
        let expected = their_pieces(&their_mem, &descs);
        let ours = ring.read_chain(&mem, head, &mut chain).map(|()| {
            (
                our_pieces(&mem, chain.readable()),
                our_pieces(&mem, chain.writable()),
            )
        });
        match (&ours, &expected) {
            (Ok(ours), Some(expected)) => {
                assert_eq!(ours, expected, "seed {seed}");
                right += 1;
            }
            (Err(_), None) => wrong += 1,
            // A readable descriptor of no bytes may follow a writable one of no bytes there.
            _ => panic!("seed {seed}: {ours:?} where virtio-queue says {descs:?}"),
        }
        assert_eq!(ring.next_avail(), queue.next_avail());
        assert_eq!(ring.pop(), Ok(None));
    }
    assert!(right > 1000 && wrong > 300, "{right} right, {wrong} wrong");
}

#[test]
fn random_completions_are_published_as_virtio_queue_publishes_them() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let size = 1u16 << rng.below(5);
        let start = rng.pick(&[0, 65520, 65535, 300]);
        let (mem, other) = (memory(&[(0, 0x8000)]), memory(&[(0, 0x8000)]));
        let event_idx = rng.once_in(2);
        let new_driver = |mem| {
            let driver = Driver::new(mem, 0x1000, size, start);
            if event_idx {
                driver.with_event_idx()
            } else {
                driver
            }
        };
        let (driver, twin) = (new_driver(&mem), new_driver(&other));
        let their_mem = theirs(&other);
        let mut ring = ring(&driver);
        let mut queue = queue(&twin.cfg, start);
        for step in 0..200 {
            let before = ring.next_used();
            for _ in 0..rng.below(u64::from(size) + 1) {
                let head = rng.below(u64::from(size)) as u16;
                let written = rng.next() as u32;
                ring.push_used(head, written);
                queue.add_used(&their_mem, head, written).unwrap();
                if rng.once_in(3) {
                    ring.show();
                }
            }
            let pushed = ring.next_used() != before;
            let event = ring.next_used().wrapping_sub(rng.below(6) as u16);
            driver.set_used_event(event);
            twin.set_used_event(event);
            let ours = ring.publish();
            // Theirs asks for an interrupt even when nothing was added, without EVENT_IDX.
            let theirs = queue.needs_notification(&their_mem).unwrap() && pushed;
            if event_idx {
                assert_eq!(ours, theirs, "seed {seed} step {step}");
            }
            match rng.below(3) {
                0 => {
                    ring.disable_notification();
                    queue.disable_notification(&their_mem).unwrap();
                    if event_idx {
                        // Theirs leaves it where it was.
                        twin.set_avail_event(driver.avail_event());
                    }
                }
                1 => assert_eq!(
                    ring.enable_notification(),
                    queue.enable_notification(&their_mem).unwrap()
                ),
                _ => {
                    for driver in [&driver, &twin] {
                        if driver.avail_idx().wrapping_sub(ring.next_avail()) < size {
                            driver.offer(0);
                        }
                    }
                    let theirs = queue.pop_descriptor_chain(&their_mem);
                    assert_eq!(
                        ring.pop(),
                        Ok(theirs.map(|chain| chain.head_index())),
                        "seed {seed} step {step}"
                    );
                }
            }
            let used = 0x1000..0x1000 + 26 * u64::from(size) + 16;
            assert_eq!(
                read_bytes(&mem, used.start, used.end - used.start),
                read_bytes(&other, used.start, used.end - used.start),
                "seed {seed} step {step}"
            );
        }
    }
}
