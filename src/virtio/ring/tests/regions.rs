//! Inflight regions that are fresh, of an earlier life, or damaged.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::super::{Ring, RingConfig, RingError};
use super::kills::region;
use crate::kill_point::simulated::killed_after;
use crate::virtio::inflight::{InflightError, QueueRegion};
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::ChainBuf;
use crate::virtio::testing::{
    PackedDriver, PackedRequests, Rng, SplitRequests, memory, read_bytes, read_u16, write_bytes,
    write_u16,
};

const RAM: u64 = 0x20_0000;

/// Byte offsets in a region (vhost-user.rst, "Inflight I/O tracking").
const FEATURES: usize = 0;
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const SPLIT_LAST_BATCH_HEAD: usize = 12;
const SPLIT_USED_IDX: usize = 14;
const PACKED_FREE_HEAD: usize = 12;
const PACKED_OLD_FREE_HEAD: usize = 14;
const PACKED_USED_IDX: usize = 16;
const PACKED_OLD_USED_IDX: usize = 18;

fn u16_of(region: &QueueRegion, at: usize) -> u16 {
    region
        .part
        .atomic::<AtomicU16>(at)
        .unwrap()
        .load(Ordering::Relaxed)
}

fn set_u16(region: &QueueRegion, at: usize, value: u16) {
    let field = region.part.atomic::<AtomicU16>(at).unwrap();
    field.store(value, Ordering::Relaxed);
}

fn set_u64(region: &QueueRegion, at: usize, value: u64) {
    let field = region.part.atomic::<AtomicU64>(at).unwrap();
    field.store(value, Ordering::Relaxed);
}

fn bytes(region: &QueueRegion) -> Vec<u8> {
    let bytes = region
        .part
        .atomics::<AtomicU8>(0, region.part.len())
        .unwrap();
    bytes
        .iter()
        .map(|byte| byte.load(Ordering::Relaxed))
        .collect()
}

/// Bytes of a state, and where the first one is.
fn state(packed: bool, index: u16) -> usize {
    if packed {
        32 + 32 * usize::from(index)
    } else {
        16 + 16 * usize::from(index)
    }
}

fn in_flight(region: &QueueRegion, packed: bool, index: u16) -> bool {
    let flag = region
        .part
        .atomic::<AtomicU8>(state(packed, index))
        .unwrap();
    flag.load(Ordering::Relaxed) != 0
}

const COUNTER: usize = 8;

struct Rig {
    mem: GuestMemory,
    cfg: RingConfig,
    region: QueueRegion,
}

impl Rig {
    /// A ring of eight with four requests available: of slots 5, 0, 3, 6 in a split one, of ids 5, 0, 3, 6 in a
    /// packed one.
    fn new(packed: bool) -> Self {
        let mem = memory(&[(0, RAM)]);
        let cfg = match packed {
            false => {
                let requests = SplitRequests::new(&mem, 8, 65533);
                for head in [5, 0, 3, 6] {
                    requests.driver.direct(head, &[(0x10_0000, 1, true)]);
                    requests.driver.offer(head);
                }
                requests.driver.cfg
            }
            true => {
                let mut driver = PackedDriver::new(&mem, 0x1000, 8, 6, true);
                for id in [5, 0, 3, 6] {
                    driver.offer(id, &[(0x10_0000, 1, 2)]);
                }
                driver.cfg
            }
        };
        let region = region(8, 3).1;
        Self { mem, cfg, region }
    }

    fn ring(&self) -> Result<Ring, RingError> {
        Ring::new(&self.mem, &self.cfg, Some(self.region.clone()))
    }

    fn refused(&self) -> InflightError {
        let before = (bytes(&self.region), read_bytes(&self.mem, 0x1000, 0x1000));
        let refused = match self.ring() {
            Err(RingError::Inflight(why)) => why,
            other => panic!("{other:?}"),
        };
        let after = (bytes(&self.region), read_bytes(&self.mem, 0x1000, 0x1000));
        assert!(before == after, "a region that is refused is left alone");
        refused
    }
}

fn pop(ring: &mut Ring) -> Vec<u16> {
    std::iter::from_fn(|| ring.pop().unwrap()).collect()
}

#[test]
fn a_fresh_region_has_nothing_in_flight_whatever_else_is_in_it() {
    for packed in [false, true] {
        for filling in [0, u64::MAX, 0x0101_0101_0101_0101] {
            let rig = Rig::new(packed);
            for at in (0..rig.region.part.len()).step_by(8) {
                set_u64(&rig.region, at, filling);
            }
            set_u16(&rig.region, VERSION, 0);
            let mut ring = rig.ring().unwrap();
            assert_eq!((ring.backlog(), ring.base()), (0, rig.cfg.base));
            assert_eq!(u16_of(&rig.region, VERSION), 1);
            assert_eq!(u16_of(&rig.region, DESC_NUM), 8);
            // Slot 0 is among them, and comes once.
            let slots = pop(&mut ring);
            assert_eq!(slots.len(), 4);
            assert!(slots.contains(&0));
            let mut ring = rig.ring().unwrap();
            assert_eq!(ring.backlog(), 4);
            assert_eq!(pop(&mut ring), slots);
        }
    }
}

#[test]
fn a_ring_goes_on_behind_what_is_in_flight_whatever_the_vmm_says() {
    for packed in [false, true] {
        let mut rig = Rig::new(packed);
        let mut ring = rig.ring().unwrap();
        let slots = pop(&mut ring);
        ring.push_used(slots[2], 1);
        ring.publish();
        let base = ring.base();
        drop(ring);
        // QEMU gives the used index of a split ring after a crash, and what it gave before for a packed one.
        rig.cfg.base = if packed { rig.cfg.base } else { 65534 };
        let mut ring = rig.ring().unwrap();
        assert_eq!((ring.base(), ring.backlog()), (base, 3));
        assert!(ring.available() && ring.enable_notification());
        assert_eq!(pop(&mut ring), [slots[0], slots[1], slots[3]]);
        assert!(!ring.available() && !ring.enable_notification());
    }
}

#[test]
fn counters_go_on_above_the_highest_and_garbage_gives_some_order() {
    for packed in [false, true] {
        let rig = Rig::new(packed);
        let slots = pop(&mut rig.ring().unwrap());
        // The first one fetched gets the highest counter.
        let counter = state(packed, slots[0]) + COUNTER;
        set_u64(&rig.region, counter, 1 << 40);
        let mut ring = rig.ring().unwrap();
        let order = pop(&mut ring);
        assert_eq!(order, [slots[1], slots[2], slots[3], slots[0]]);
        ring.push_used(slots[1], 1);
        ring.publish();
        // A new one comes behind it.
        match packed {
            false => {
                let driver = SplitRequests::new(&memory(&[(0, RAM)]), 8, 0).driver.cfg;
                assert_eq!(driver.size, rig.cfg.size);
                let idx = read_u16(&rig.mem, rig.cfg.avail_ring + 2);
                write_u16(&rig.mem, rig.cfg.avail_ring + 4 + 2 * u64::from(idx % 8), 0);
                write_u16(&rig.mem, rig.cfg.avail_ring + 2, idx.wrapping_add(1));
            }
            true => {
                // At index 2 of the lap after.
                let at = 0x1000 + 16 * 2;
                write_u16(&rig.mem, at + 14, 1 << 15);
            }
        }
        let new = pop(&mut ring);
        assert_eq!(new.len(), 1);
        let order = pop(&mut rig.ring().unwrap());
        assert_eq!(order, [slots[2], slots[3], slots[0], new[0]]);
        // All the same, and the highest there is: all are handed out.
        for slot in &order {
            set_u64(&rig.region, state(packed, *slot) + COUNTER, u64::MAX);
        }
        let mut again = pop(&mut rig.ring().unwrap());
        again.sort_unstable();
        let mut order = order.clone();
        order.sort_unstable();
        assert_eq!(again, order);
    }
}

#[test]
fn a_batch_is_settled_whichever_step_was_the_last() {
    for packed in [false, true] {
        for places in 0.. {
            let rig = Rig::new(packed);
            let mut ring = rig.ring().unwrap();
            let slots = pop(&mut ring);
            let whole = killed_after(places, || {
                for slot in [slots[3], slots[1], slots[0]] {
                    ring.push_used(slot, 1);
                }
                ring.publish();
            });
            let shown = match packed {
                false => read_u16(&rig.mem, rig.cfg.used_ring + 2) == 0,
                true => read_u16(&rig.mem, 0x1000 + 16 * 6 + 14) & 0x8080 == 0x8080,
            };
            let mut ring = rig.ring().unwrap();
            if shown {
                assert_eq!(pop(&mut ring), [slots[2]], "{places}");
            } else {
                assert_eq!(pop(&mut ring), slots, "{places}");
            }
            for (slot, index) in slots.iter().zip(0..) {
                let expected = !shown || index == 2;
                assert_eq!(in_flight(&rig.region, packed, *slot), expected);
            }
            if whole.is_some() {
                assert!(shown && places > 10);
                break;
            }
        }
    }
}

#[test]
fn a_successor_may_be_killed_too() {
    for packed in [false, true] {
        for (first, second) in (0..20).flat_map(|first| (0..20).map(move |second| (first, second)))
        {
            let rig = Rig::new(packed);
            let mut ring = rig.ring().unwrap();
            let slots = pop(&mut ring);
            killed_after(first, || {
                ring.push_used(slots[3], 1);
                ring.push_used(slots[1], 1);
                ring.publish();
            });
            let once = killed_after(second, || rig.ring().unwrap().backlog());
            let mut ring = rig.ring().unwrap();
            let backlog = ring.backlog();
            assert!(once.is_none_or(|once| once == backlog));
            let expected = if backlog == 2 {
                vec![slots[0], slots[2]]
            } else {
                slots
            };
            assert_eq!(pop(&mut ring), expected);
        }
    }
}

#[test]
fn a_region_that_does_not_fit_is_refused_while_requests_are_in_flight() {
    type Damage = (usize, u16, InflightError);
    let split: [Damage; 6] = [
        (
            VERSION,
            2,
            InflightError::Unknown {
                version: 2,
                features: 0,
            },
        ),
        (
            FEATURES,
            3,
            InflightError::Unknown {
                version: 1,
                features: 3,
            },
        ),
        (DESC_NUM, 16, InflightError::Size { found: 16, size: 8 }),
        // A batch of two that never was; of more than the ring has.
        (
            SPLIT_USED_IDX,
            65532,
            InflightError::Batch {
                from: 65532,
                to: 65534,
            },
        ),
        (
            SPLIT_USED_IDX,
            65535,
            InflightError::Batch {
                from: 65535,
                to: 65534,
            },
        ),
        (
            SPLIT_USED_IDX,
            60000,
            InflightError::Batch {
                from: 60000,
                to: 65534,
            },
        ),
    ];
    let packed: [Damage; 9] = [
        (
            VERSION,
            2,
            InflightError::Unknown {
                version: 2,
                features: 0,
            },
        ),
        (
            FEATURES,
            3,
            InflightError::Unknown {
                version: 1,
                features: 3,
            },
        ),
        (DESC_NUM, 16, InflightError::Size { found: 16, size: 8 }),
        (
            PACKED_USED_IDX,
            8,
            InflightError::Used { index: 8, size: 8 },
        ),
        (
            PACKED_OLD_USED_IDX,
            0xffff,
            InflightError::Used {
                index: 0xffff,
                size: 8,
            },
        ),
        // The list begins in a chain that is in flight, or is empty.
        (PACKED_OLD_FREE_HEAD, 0, InflightError::Lists(1)),
        (PACKED_OLD_FREE_HEAD, 8, InflightError::Lists(2)),
        // A chain of none, one with another end.
        (state(true, 3) + 6, 0, InflightError::Lists(3)),
        (state(true, 3) + 4, 7, InflightError::Lists(3)),
    ];
    for (packed, damages) in [(false, &split[..]), (true, &packed[..])] {
        for (at, value, error) in damages {
            let rig = Rig::new(packed);
            let mut ring = rig.ring().unwrap();
            let slots = pop(&mut ring);
            ring.push_used(slots[2], 1);
            ring.publish();
            set_u16(&rig.region, *at, *value);
            assert_eq!(rig.refused(), *error, "{at}");
            assert!(
                rig.ring()
                    .unwrap_err()
                    .to_string()
                    .contains("reset the guest's device")
            );
            // With nothing in flight, nothing is at stake; but a version that is not known is not touched.
            for index in 0..8 {
                set_u16(&rig.region, state(packed, index), 0);
            }
            if matches!(error, InflightError::Unknown { .. }) {
                assert_eq!(rig.refused(), *error);
                continue;
            }
            let ring = rig.ring().unwrap();
            assert_eq!((ring.backlog(), ring.base()), (0, rig.cfg.base), "{at}");
        }
    }
}

#[test]
fn a_region_of_an_earlier_life_of_the_ring_is_refused() {
    for packed in [false, true] {
        let rig = Rig::new(packed);
        pop(&mut rig.ring().unwrap());
        // The guest has made the ring anew, and nobody has told the region.
        write_bytes(&rig.mem, 0x1000, &[0; 0x1000]);
        match packed {
            false => {
                set_u16(&rig.region, SPLIT_USED_IDX, 0);
                let (in_flight, outstanding) = (4, 0);
                let expected = InflightError::Outstanding {
                    in_flight,
                    outstanding,
                };
                assert_eq!(rig.refused(), expected);
            }
            true => assert_eq!(rig.refused(), InflightError::NotAvailable(6)),
        }
    }
}

#[test]
fn a_batch_whose_heads_the_used_ring_does_not_show_is_not_trusted() {
    for (field, value) in [
        (SPLIT_LAST_BATCH_HEAD, 5),
        (SPLIT_LAST_BATCH_HEAD, 9),
        (state(false, 6) + 6, 6),
    ] {
        let rig = Rig::new(false);
        let mut ring = rig.ring().unwrap();
        pop(&mut ring);
        for head in [3, 0, 6] {
            ring.push_used(head, 1);
        }
        ring.publish();
        set_u16(&rig.region, SPLIT_USED_IDX, 65533);
        set_u16(&rig.region, field, value);
        let (from, to) = (65533, 0);
        assert_eq!(rig.refused(), InflightError::Batch { from, to });
    }
}

#[test]
fn a_region_without_room_for_the_ring_is_refused() {
    for packed in [false, true] {
        let mut rig = Rig::new(packed);
        // A part has room for a packed ring of its size, which a split one twice as large would fit into.
        rig.region = region(3, 1).1;
        assert_eq!(rig.refused(), InflightError::TooSmall(8));
    }
    assert_eq!(u16_of(&region(3, 1).1, PACKED_FREE_HEAD), 0);
}

#[test]
fn random_damage_ends_in_an_error_or_in_requests_of_the_ring() {
    let (mut refused, mut taken) = (0, 0);
    for seed in 0..4000 {
        let mut rng = Rng::new(seed);
        let mem = memory(&[(0, RAM)]);
        let size = 1 << rng.below(4);
        let (mut split, mut packed) = (None, None);
        let cfg = match rng.once_in(2) {
            true => {
                split
                    .insert(SplitRequests::new(&mem, size, 65530))
                    .driver
                    .cfg
            }
            false => {
                packed
                    .insert(PackedRequests::new(&mem, size, 0, true))
                    .driver
                    .cfg
            }
        };
        let region = region(size, 1).1;
        let mut chain = ChainBuf::with_capacity(4);
        for life in 0..4 {
            for _ in 0..4 {
                let (split, packed) = (split.as_mut(), packed.as_mut());
                split.and_then(|requests| requests.offer(&mut rng));
                packed.and_then(|requests| requests.offer(&mut rng));
            }
            let places = rng.below(40);
            killed_after(places, || {
                match Ring::new(&mem, &cfg, Some(region.clone())) {
                    Ok(mut ring) => {
                        taken += u32::from(life > 0);
                        let mut slots = Vec::new();
                        while let Ok(Some(slot)) = ring.pop() {
                            assert!(slot < size);
                            slots.push(slot);
                            // Damaged descriptors name any place; only what is memory comes out.
                            let _ = ring.read_chain(&mem, slot, &mut chain);
                            assert!(slots.len() <= 2 * usize::from(size), "seed {seed}");
                        }
                        rng.shuffle(&mut slots);
                        for slot in slots.into_iter().skip(1) {
                            ring.push_used(slot, 1);
                            if rng.once_in(2) {
                                ring.publish();
                            }
                        }
                        ring.publish();
                    }
                    Err(RingError::Inflight(_)) => refused += 1,
                    Err(other) => panic!("{other:?}"),
                }
            });
            // The driver lets go of what came back, and the VMM writes where it likes.
            split.as_mut().map(|requests| requests.reap());
            packed.as_mut().map(|requests| requests.reap());
            for _ in 0..rng.below(4) {
                let at = rng.below(region.part.len() as u64) as usize;
                let value = rng.pick(&[0, 1, size as u8, size as u8 + 1, 0xff]);
                let byte = region.part.atomic::<AtomicU8>(at).unwrap();
                // The version would only say the same again and again.
                if !(8..10).contains(&at) {
                    byte.store(value, Ordering::Relaxed);
                }
            }
        }
    }
    assert!(
        refused > 500 && taken > 500,
        "{refused} refused, {taken} taken"
    );
}
