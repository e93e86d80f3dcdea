//! The driver side of a virtqueue, made for measuring: every slot's chain is written once, so that a request
//! costs a sector, a status byte and an entry of the ring, and a batch one fence and one look at whether the
//! backend wants a kick. It keeps the rules of a driver that polls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use vhost_user_frontend::blk::{SECTOR, header, request_type, status};
use vhost_user_frontend::memory::Region;
use vhost_user_frontend::protocol::feature;
use vhost_user_frontend::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY};
use vhost_user_frontend::{BlkQueue, Desc, Memory};

/// Where a slot's control block has its parts; the header is at its start.
const STATUS_AT: usize = 16;
const SECTOR_AT: usize = 8;
const TABLE_AT: usize = 32;
/// Header, data, status.
const CHAIN: usize = 3;

/// A completed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Done {
    /// Which slot is free again.
    pub slot: u16,
    /// Whether its status is OK.
    pub ok: bool,
}

/// One queue of a device, taken over from its usual driver before the first request.
#[derive(Debug)]
pub struct Lane {
    /// Keeps mapped what the pointers below point into.
    _regions: Vec<Arc<Region>>,
    desc: *mut Desc,
    avail: *mut u16,
    used: *mut u16,
    control: *mut u8,
    control_stride: usize,
    data: *mut u8,
    data_stride: usize,
    data_len: u32,
    size: u16,
    depth: u16,
    /// Descriptors of the ring that a chain takes: one with an indirect table.
    stride: u16,
    event_idx: bool,
    avail_idx: u16,
    published: u16,
    last_used: u16,
    /// Which slots the device owns: what it gives back is checked.
    owned: Box<[bool]>,
    kick: Arc<vhost_user_frontend::sys::EventFd>,
    kicks: u64,
}

impl Lane {
    /// Takes a queue of `depth` slots that was started and not used, and makes every slot a request of
    /// `data_len` bytes.
    ///
    /// # Errors
    /// When the backend has no indirect descriptors and the ring is too small for that many chains.
    pub fn new(
        (memory, queue): (&Memory, &mut BlkQueue),
        features: u64,
        depth: u16,
        writes: bool,
        data_len: u32,
    ) -> Result<Self, String> {
        let indirect = features & feature::INDIRECT_DESC != 0;
        let stride = if indirect { 1 } else { CHAIN as u16 };
        let (control_at, data_at) = (queue.control_addr(0), queue.data_addr(0));
        let control_stride = queue.control_addr(1) - control_at;
        let data_stride = queue.data_addr(1) - data_at;
        let data = queue.data_ptr(0, data_len);
        let ring = queue.ring.split();
        let (layout, size) = (ring.layout(), ring.size());
        if u32::from(depth) * u32::from(stride) > u32::from(size) {
            return Err(format!(
                "the backend has no indirect descriptors: {depth} requests do not fit a ring of {size}"
            ));
        }
        assert!(control_stride as usize >= TABLE_AT + 16 * CHAIN);
        let n = u64::from(size);
        let mut regions = Vec::new();
        let mut host = |addr: u64, len: u64| {
            let region = memory.region_of(addr, len).clone();
            let at = region.host(addr, len);
            regions.push(region);
            at
        };
        let mut lane = Self {
            desc: host(layout.desc, 16 * n).cast(),
            avail: host(layout.avail, 6 + 2 * n).cast(),
            used: host(layout.used, 6 + 8 * n).cast(),
            control: host(control_at, control_stride * u64::from(depth)),
            control_stride: control_stride as usize,
            data,
            data_stride: data_stride as usize,
            data_len,
            size,
            depth,
            stride,
            event_idx: features & feature::EVENT_IDX != 0,
            avail_idx: ring.next_avail(),
            published: ring.next_avail(),
            last_used: ring.last_used(),
            owned: vec![false; usize::from(depth)].into(),
            kick: ring.kick_fd().clone(),
            kicks: 0,
            _regions: regions,
        };
        for slot in 0..depth {
            let control = control_at + control_stride * u64::from(slot);
            let data = data_at + data_stride * u64::from(slot);
            lane.make_slot(slot, control, data, writes, indirect);
        }
        Ok(lane)
    }

    /// Writes the header and the chain of a slot.
    fn make_slot(&mut self, slot: u16, control: u64, data: u64, writes: bool, indirect: bool) {
        let (ty, data_flag) = match writes {
            true => (request_type::OUT, 0),
            false => (request_type::IN, DESC_F_WRITE),
        };
        let part = |addr, len, flags| Desc {
            addr,
            len,
            flags,
            next: 0,
        };
        let mut chain = [
            part(control, 16, DESC_F_NEXT),
            part(data, self.data_len, DESC_F_NEXT | data_flag),
            part(control + STATUS_AT as u64, 1, DESC_F_WRITE),
        ];
        let head = slot * self.stride;
        let first = if indirect { 0 } else { head };
        chain[0].next = first + 1;
        chain[1].next = first + 2;
        let block = self.control_of(slot);
        // SAFETY: the control block has `control_stride` bytes, enough for its three parts, and the ring has
        // `size` descriptors, enough for every slot's (both as `BlkQueue` laid them out, and checked in
        // `new`); nothing is in flight.
        unsafe {
            block.cast::<[u8; 16]>().write_unaligned(header(ty, 0));
            let table = if indirect {
                self.desc.add(usize::from(head)).write(part(
                    control + TABLE_AT as u64,
                    16 * CHAIN as u32,
                    DESC_F_INDIRECT,
                ));
                block.add(TABLE_AT).cast::<Desc>()
            } else {
                self.desc.add(usize::from(head))
            };
            table.cast::<[Desc; CHAIN]>().write(chain);
        }
    }

    fn control_of(&self, slot: u16) -> *mut u8 {
        assert!(slot < self.depth, "no slot {slot}");
        // SAFETY: the slot exists, and the blocks lie one after the other in one region.
        unsafe { self.control.add(usize::from(slot) * self.control_stride) }
    }

    /// The data of a slot, `data_len` bytes.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn data_of(&self, slot: u16) -> *mut u8 {
        assert!(slot < self.depth, "no slot {slot}");
        // SAFETY: as for the control blocks.
        unsafe { self.data.add(usize::from(slot) * self.data_stride) }
    }

    fn word(&self, ring: *mut u16, at: usize) -> &AtomicU16 {
        // SAFETY: callers pass positions in that ring, which is aligned and mapped; both sides reach these
        // words through atomics.
        unsafe { AtomicU16::from_ptr(ring.add(at)) }
    }

    /// Puts a request for the bytes from `offset` on in the ring; the device sees it with [`Lane::publish`].
    #[inline]
    pub fn submit(&mut self, slot: u16, offset: u64) {
        let control = self.control_of(slot);
        // SAFETY: both are in the control block.
        unsafe {
            let sector = control.add(SECTOR_AT).cast::<u64>();
            sector.write((offset / SECTOR).to_le());
            control.add(STATUS_AT).write_volatile(status::UNTOUCHED);
        }
        self.owned[usize::from(slot)] = true;
        let at = 2 + usize::from(self.avail_idx & (self.size - 1));
        let head = slot * self.stride;
        self.word(self.avail, at)
            .store(head.to_le(), Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Shows the device what was submitted, and kicks it if it asks for that.
    #[inline]
    pub fn publish(&mut self) {
        let (old, new) = (self.published, self.avail_idx);
        if self.event_idx {
            // As far behind as can be: no interrupt for 65535 completions, and it moves on with each batch.
            let behind = self.last_used.wrapping_sub(1);
            let used_event = self.word(self.avail, 2 + usize::from(self.size));
            used_event.store(behind.to_le(), Ordering::Relaxed);
        }
        if old == new {
            return;
        }
        self.word(self.avail, 1)
            .store(new.to_le(), Ordering::Release);
        self.published = new;
        // Against the device's "publish avail_event, look at avail.idx, sleep".
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let at = 2 + 4 * usize::from(self.size);
            let event = u16::from_le(self.word(self.used, at).load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(self.word(self.used, 0).load(Ordering::Relaxed));
            flags & USED_F_NO_NOTIFY == 0
        };
        if wanted {
            self.kicks += 1;
            // A full counter is a kick that is pending already.
            let _ = self.kick.signal();
        }
    }

    /// Completions that are there.
    #[inline]
    pub fn ready(&self) -> u16 {
        let used = u16::from_le(self.word(self.used, 1).load(Ordering::Acquire));
        used.wrapping_sub(self.last_used)
    }

    /// Takes the next of the [`Lane::ready`] completions.
    ///
    /// # Errors
    /// When the device gives back what it does not own.
    #[inline]
    pub fn take(&mut self) -> Result<Done, String> {
        let at = 2 + 4 * usize::from(self.last_used & (self.size - 1));
        // SAFETY: the entry is in the used ring, which is 4-byte aligned from its fourth byte on.
        let id = unsafe { u32::from_le(self.used.add(at).cast::<u32>().read_volatile()) };
        self.last_used = self.last_used.wrapping_add(1);
        let slot = id / u32::from(self.stride);
        match self.owned.get_mut(slot as usize) {
            Some(owned) if *owned => *owned = false,
            _ => {
                return Err(format!(
                    "the device gave chain {id} back, which it does not own"
                ));
            }
        }
        let slot = slot as u16;
        // SAFETY: the status byte is in the control block.
        let byte = unsafe { self.control_of(slot).add(STATUS_AT).read_volatile() };
        Ok(Done {
            slot,
            ok: byte == status::OK,
        })
    }

    /// Turns slot 0 into a flush for good. Nothing may be in flight.
    pub fn make_flush(&mut self) {
        let control = self.control_of(0);
        // SAFETY: as in `make_slot`: the header, and the first descriptor of the chain, which then leads past
        // the data to the status.
        unsafe {
            control
                .cast::<[u8; 16]>()
                .write_unaligned(header(request_type::FLUSH, 0));
            let first = if self.stride == 1 {
                control.add(TABLE_AT).cast::<Desc>()
            } else {
                self.desc
            };
            (*first).next = 2;
        }
    }

    /// Slots.
    pub fn depth(&self) -> u16 {
        self.depth
    }

    /// Kicks sent.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost_user_frontend::{Notify, RegionSpec, SlotOptions, Virtqueue};

    const DEPTH: u16 = 4;
    const SIZE: u16 = 16;

    /// A descriptor: address, length, flags, next.
    type Fields = (u64, u32, u16, u16);

    /// A lane, and the memory with which a test plays its device.
    struct Rig {
        memory: Memory,
        queue: BlkQueue,
        lane: Lane,
        seen: u16,
        used: u16,
    }

    impl Rig {
        fn new(features: u64, writes: bool) -> Self {
            let memory = Memory::new(&[RegionSpec::new(0, 1 << 20)]).unwrap();
            let mut ring = Virtqueue::new(&memory, SIZE, false).unwrap();
            ring.set_event_idx(features & feature::EVENT_IDX != 0);
            ring.set_notify(Notify::Poll);
            let slots = SlotOptions {
                count: DEPTH,
                data_len: 4096,
                ..SlotOptions::default()
            };
            let mut queue = BlkQueue::new(&memory, ring, slots);
            let lane = Lane::new((&memory, &mut queue), features, DEPTH, writes, 4096).unwrap();
            Self {
                memory,
                queue,
                lane,
                seen: 0,
                used: 0,
            }
        }

        fn bytes<const N: usize>(&self, addr: u64) -> [u8; N] {
            let mut bytes = [0; N];
            self.memory.read(addr, &mut bytes);
            bytes
        }

        fn desc(&self, addr: u64) -> Fields {
            let b: [u8; 16] = self.bytes(addr);
            (
                u64::from_le_bytes(b[..8].try_into().unwrap()),
                u32::from_le_bytes(b[8..12].try_into().unwrap()),
                u16::from_le_bytes(b[12..14].try_into().unwrap()),
                u16::from_le_bytes(b[14..].try_into().unwrap()),
            )
        }

        /// The next chain that the device can see: its head, and its descriptors.
        fn pop(&mut self) -> Option<(u16, Vec<Fields>)> {
            let layout = self.queue.ring.split().layout();
            if u16::from_le_bytes(self.bytes(layout.avail + 2)) == self.seen {
                return None;
            }
            let at = layout.avail + 4 + 2 * u64::from(self.seen % SIZE);
            self.seen = self.seen.wrapping_add(1);
            let head = u16::from_le_bytes(self.bytes(at));
            let first = self.desc(layout.desc + 16 * u64::from(head));
            let (table, mut index) = match first.2 & DESC_F_INDIRECT {
                0 => (layout.desc, head),
                _ => (first.0, 0),
            };
            let mut chain = Vec::new();
            loop {
                let desc = self.desc(table + 16 * u64::from(index));
                chain.push(desc);
                if desc.2 & DESC_F_NEXT == 0 {
                    return Some((head, chain));
                }
                index = desc.3;
            }
        }

        fn push(&mut self, id: u32) {
            let layout = self.queue.ring.split().layout();
            let at = layout.used + 4 + 8 * u64::from(self.used % SIZE);
            self.memory.write(at, &id.to_le_bytes());
            self.used = self.used.wrapping_add(1);
            self.memory.write(layout.used + 2, &self.used.to_le_bytes());
        }
    }

    #[test]
    fn requests_are_chains_of_header_data_and_status_and_come_back_with_it() {
        for features in [0, feature::INDIRECT_DESC | feature::EVENT_IDX] {
            for writes in [false, true] {
                let mut rig = Rig::new(features, writes);
                // Often enough for the ring to go round.
                for round in 0..3 * u64::from(SIZE) {
                    for slot in 0..DEPTH {
                        rig.lane.submit(slot, 4096 * (round + u64::from(slot)));
                    }
                    assert!(rig.pop().is_none(), "not published yet");
                    rig.lane.publish();
                    for slot in 0..DEPTH {
                        let (head, chain) = rig.pop().unwrap();
                        let data_flags = if writes {
                            DESC_F_NEXT
                        } else {
                            DESC_F_NEXT | DESC_F_WRITE
                        };
                        let shape: Vec<_> = chain.iter().map(|desc| (desc.1, desc.2)).collect();
                        assert_eq!(
                            shape,
                            [(16, DESC_F_NEXT), (4096, data_flags), (1, DESC_F_WRITE)]
                        );
                        let sector = 8 * (round + u64::from(slot));
                        assert_eq!(rig.bytes(chain[0].0), header(u32::from(writes), sector));
                        assert_eq!(rig.bytes(chain[2].0), [status::UNTOUCHED]);
                        // One of them fails.
                        let end = if slot == 2 { status::IOERR } else { status::OK };
                        rig.memory.write(chain[2].0, &[end]);
                        rig.push(u32::from(head));
                    }
                    assert_eq!(rig.lane.ready(), DEPTH);
                    for slot in 0..DEPTH {
                        let ok = slot != 2;
                        assert_eq!(rig.lane.take(), Ok(Done { slot, ok }));
                    }
                    assert_eq!(rig.lane.ready(), 0);
                }
            }
        }
    }

    #[test]
    fn what_the_device_does_not_own_is_an_error() {
        let mut rig = Rig::new(feature::INDIRECT_DESC, false);
        rig.lane.submit(1, 0);
        rig.lane.publish();
        rig.push(1);
        assert!(rig.lane.take().unwrap().slot == 1);
        for id in [1, 3, u32::from(DEPTH), u32::MAX] {
            rig.push(id);
            assert!(rig.lane.take().is_err(), "{id}");
        }
    }

    #[test]
    fn a_kick_is_sent_only_where_it_is_asked_for() {
        let mut rig = Rig::new(feature::INDIRECT_DESC | feature::EVENT_IDX, false);
        let event = rig.queue.ring.split().layout().used + 4 + 8 * u64::from(SIZE);
        let submit = |rig: &mut Rig, asks: u16| {
            rig.memory.write(event, &asks.to_le_bytes());
            rig.lane.submit(0, 0);
            rig.lane.publish();
            rig.push(0);
            rig.lane.take().unwrap();
            rig.lane.kicks()
        };
        // It asks for one at the first, and then no more.
        assert_eq!(submit(&mut rig, 0), 1);
        assert_eq!(submit(&mut rig, 0), 1);
        assert_eq!(submit(&mut rig, 2), 2);
    }

    #[test]
    fn a_flush_is_a_header_and_a_status() {
        for features in [0, feature::INDIRECT_DESC] {
            let mut rig = Rig::new(features, true);
            rig.lane.make_flush();
            rig.lane.submit(0, 0);
            rig.lane.publish();
            let (_, chain) = rig.pop().unwrap();
            assert_eq!(rig.bytes(chain[0].0), header(request_type::FLUSH, 0));
            let shape: Vec<_> = chain.iter().map(|desc| (desc.1, desc.2)).collect();
            assert_eq!(shape, [(16, DESC_F_NEXT), (1, DESC_F_WRITE)]);
        }
    }

    #[test]
    fn too_many_requests_for_a_ring_without_indirect_tables_are_refused() {
        let memory = Memory::new(&[RegionSpec::new(0, 1 << 20)]).unwrap();
        let ring = Virtqueue::new(&memory, SIZE, false).unwrap();
        let slots = SlotOptions {
            count: 8,
            data_len: 4096,
            ..SlotOptions::default()
        };
        let mut queue = BlkQueue::new(&memory, ring, slots);
        assert!(Lane::new((&memory, &mut queue), 0, 8, false, 4096).is_err());
    }
}
