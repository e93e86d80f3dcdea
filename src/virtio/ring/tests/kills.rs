//! A device that is killed between any two steps, and its successor on the same memory and region.

use std::collections::VecDeque;
use std::sync::Arc;

use super::super::{Ring, RingConfig};
use crate::kill_point::simulated::killed_after;
use crate::shared_memory::SharedMemory;
use crate::virtio::inflight::{InflightLayout, QueueRegion};
use crate::virtio::memory::GuestMemory;
use crate::virtio::ring::ChainBuf;
use crate::virtio::testing::{PackedRequests, Rng, SplitRequests, memory};

const RAM: u64 = 0x20_0000;

/// A driver that names its requests by tags, which the device finds as the first buffer's address.
trait Requests {
    fn config(&self) -> RingConfig;
    /// Makes a request available; none if there is no room.
    fn offer(&mut self, rng: &mut Rng) -> Option<u16>;
    /// Tags that came back, in order.
    fn reap(&mut self) -> Vec<u16>;
    fn tag_of(&self, chain: &ChainBuf) -> u16;
}

macro_rules! requests {
    ($of:ident) => {
        impl Requests for $of<'_> {
            fn config(&self) -> RingConfig {
                self.driver.cfg
            }
            fn offer(&mut self, rng: &mut Rng) -> Option<u16> {
                $of::offer(self, rng)
            }
            fn reap(&mut self) -> Vec<u16> {
                $of::reap(self)
            }
            fn tag_of(&self, chain: &ChainBuf) -> u16 {
                $of::tag_of(self, chain)
            }
        }
    };
}
requests!(SplitRequests);
requests!(PackedRequests);

struct Bench<'a, R> {
    mem: &'a GuestMemory,
    region: Option<QueueRegion>,
    requests: R,
    /// Tags that the driver made available and did not get back, in order.
    outstanding: VecDeque<u16>,
    rng: Rng,
    completed: u64,
}

impl<R: Requests> Bench<'_, R> {
    fn offer(&mut self) {
        for _ in 0..self.rng.below(6) {
            if let Some(tag) = self.requests.offer(&mut self.rng) {
                assert!(!self.outstanding.contains(&tag));
                self.outstanding.push_back(tag);
            }
        }
    }

    /// Each request comes back once.
    fn reap(&mut self) {
        for tag in self.requests.reap() {
            let place = self.outstanding.iter().position(|t| *t == tag);
            let place = place.unwrap_or_else(|| panic!("request {tag} came back twice"));
            self.outstanding.remove(place);
            self.completed += 1;
        }
    }

    /// One life of a device. What it is handed out must be what the driver waits for, in the driver's order:
    /// first what a predecessor had fetched, then what it had not.
    fn live(&mut self, turns: u64, drain: bool) {
        self.reap();
        let mut expected = self.outstanding.clone();
        let config = self.requests.config();
        let mut ring = Ring::new(self.mem, &config, self.region.clone()).unwrap();
        let mut chain = ChainBuf::with_capacity(4);
        let mut held = Vec::new();
        for turn in 0..turns {
            let before = self.outstanding.len();
            self.offer();
            expected.extend(self.outstanding.range(before..));
            let budget = if drain { 1000 } else { self.rng.below(8) };
            for _ in 0..budget {
                let Some(slot) = ring.pop().unwrap() else {
                    break;
                };
                ring.read_chain(self.mem, slot, &mut chain).unwrap();
                let tag = self.requests.tag_of(&chain);
                assert_eq!(Some(tag), expected.pop_front(), "turn {turn}");
                held.push(slot);
            }
            self.rng.shuffle(&mut held);
            let done = match drain && turn + 1 == turns {
                true => held.len() as u64,
                false => self.rng.below(held.len() as u64 + 1),
            };
            for _ in 0..done {
                if let Some(slot) = held.pop() {
                    ring.push_used(slot, 1);
                }
                if self.rng.once_in(4) {
                    match self.rng.once_in(2) {
                        true => ring.show(),
                        false => drop(ring.publish()),
                    }
                    self.reap();
                }
            }
            if drain || !self.rng.once_in(3) {
                ring.publish();
                self.reap();
            }
        }
        if drain {
            assert!(expected.is_empty() && held.is_empty() && !ring.available());
            assert!(self.outstanding.is_empty(), "{:?}", self.outstanding);
        }
    }
}

/// Lives of devices, each killed after more and more steps.
fn lives<R: Requests>(mem: &GuestMemory, requests: R, seed: u64) -> u64 {
    let size = requests.config().size;
    let mut bench = Bench {
        mem,
        region: Some(region(size, 1).1),
        requests,
        outstanding: VecDeque::new(),
        rng: Rng::new(seed),
        completed: 0,
    };
    for _ in 0..12 {
        let places = bench.rng.pick(&[3, 10, 30, 100]);
        let places = bench.rng.below(places);
        let turns = 1 + bench.rng.below(8);
        killed_after(places, || bench.live(turns, false));
    }
    bench.live(4, true);
    bench.completed
}

/// A fresh region, and its part for the last of `queues`.
pub(super) fn region(size: u16, queues: u16) -> (Arc<SharedMemory>, QueueRegion) {
    let layout = InflightLayout {
        queues,
        queue_size: size,
    };
    let memory = SharedMemory::create(c"inflight", layout.rest_at() as u64).unwrap();
    let part = layout.queue(&memory, queues - 1).unwrap();
    (memory, part)
}

#[test]
fn a_split_ring_killed_anywhere_loses_and_repeats_nothing() {
    let mut completed = 0;
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let mem = memory(&[(0, RAM)]);
        let size = 1 << rng.below(6);
        let start = rng.pick(&[0, 7, 65500, 65533, 65535]);
        let requests = SplitRequests::new(&mem, size, start);
        completed += lives(&mem, requests, seed);
    }
    assert!(completed > 20_000, "{completed}");
}

#[test]
fn a_packed_ring_killed_anywhere_loses_and_repeats_nothing() {
    let mut completed = 0;
    for seed in 0..3000 {
        let mut rng = Rng::new(seed);
        let mem = memory(&[(0, RAM)]);
        let size = rng.pick(&[1, 2, 3, 5, 8, 13, 16, 31, 33]);
        let start = rng.below(size.into()) as u16;
        let requests = PackedRequests::new(&mem, size, start, rng.once_in(2));
        completed += lives(&mem, requests, seed);
    }
    assert!(completed > 20_000, "{completed}");
}
