//! The same for packed rings, and for a VMM that writes into the inflight region of any ring.

use std::sync::atomic::{AtomicU8, Ordering};

use super::*;
use crate::shared_memory::SharedMemory;
use crate::virtio::inflight::InflightLayout;
use crate::virtio::ring::{Ring, RingConfig};
use crate::virtio::testing::{AVAIL, PackedDriver, USED};

/// A ring of descriptors of which most look available, somewhere in a lap.
fn random_ring(mem: &GuestMemory, rng: &mut Rng, size: u16) -> RingConfig {
    let index = rng.below(size.into()) as u16;
    let mut driver = PackedDriver::new(mem, 0x1000, size, index, rng.once_in(2));
    driver.cfg.event_idx = rng.once_in(2);
    driver.cfg.indirect = !rng.once_in(4);
    driver.set_event(rng.next() as u16, rng.pick(&[0, 1, 2, 3, 0xffff]));
    for i in 0..size {
        let random = random_desc(rng, size);
        let lap = driver.next_avail.wrap == (i >= index);
        let available = if lap { AVAIL } else { USED };
        let mut flags = random.flags & !(AVAIL | USED) | available;
        if rng.once_in(4) {
            flags &= !NEXT;
        }
        if rng.once_in(20) {
            flags = rng.next() as u16;
        }
        driver.set_desc(i, random.addr, random.len, rng.next() as u16, flags);
    }
    driver.cfg
}

#[test]
fn random_packed_rings_end_in_values() {
    let mem = memory(&REGIONS);
    let mut chain = ChainBuf::with_capacity(4);
    let (mut served, mut refused, mut broken, mut region_refused) = (0, 0, 0, 0);
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let size = 1 + rng.below(70) as u16;
        let cfg = random_ring(&mem, &mut rng, size);
        let layout = InflightLayout {
            queues: 1,
            queue_size: size,
        };
        let memory = SharedMemory::create(c"inflight", layout.rest_at() as u64).unwrap();
        let region = layout.queue(&memory, 0).filter(|_| !rng.once_in(3));
        for _ in 0..3 {
            let Ok(mut ring) = Ring::new(&mem, &cfg, region.clone()) else {
                region_refused += 1;
                break;
            };
            let mut held = Vec::new();
            for _ in 0..4 {
                loop {
                    match ring.pop() {
                        Ok(Some(slot)) => {
                            assert!(slot < size && !held.contains(&slot), "seed {seed}");
                            held.push(slot);
                        }
                        Ok(None) => break,
                        Err(_) => {
                            assert!(ring.available() && ring.pop().is_err());
                            broken += 1;
                            break;
                        }
                    }
                    assert!(held.len() <= usize::from(size));
                }
                for slot in &held {
                    match ring.read_chain(&mem, *slot, &mut chain) {
                        Ok(()) => {
                            check_buffers(&mem, chain.readable());
                            check_buffers(&mem, chain.writable());
                            served += 1;
                        }
                        Err(_) => refused += 1,
                    }
                }
                rng.shuffle(&mut held);
                for slot in held.split_off(held.len() / 2) {
                    ring.push_used(slot, rng.next() as u32);
                    // Of one that is not in flight nothing becomes of a second.
                    ring.push_used(slot, 1);
                }
                ring.publish();
                ring.enable_notification();
                ring.disable_notification();
                // The driver scribbles on.
                let at = cfg.desc_table + 16 * rng.below(size.into()) + 14;
                write_bytes(&mem, at, &rng.next().to_le_bytes()[..2]);
            }
            // And so does the VMM.
            if let Some(region) = region.as_ref().filter(|_| rng.once_in(2)) {
                for _ in 0..rng.below(6) {
                    let at = rng.below(region.part.len() as u64) as usize;
                    let byte = region.part.atomic::<AtomicU8>(at).unwrap();
                    byte.store(rng.next() as u8, Ordering::Relaxed);
                }
            }
        }
    }
    // The noise reaches every part.
    assert!(
        served > 3000 && refused > 3000 && broken > 300 && region_refused > 300,
        "{served} served, {refused} refused, {broken} broken, {region_refused} regions refused"
    );
}
