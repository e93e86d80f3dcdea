use super::*;
use crate::memory::RegionSpec;

/// The device's side, as section 2.8 has it, in the plainest way.
struct FakeDevice {
    next_avail: Position,
    next_used: Position,
}

impl FakeDevice {
    fn new(start: Position) -> Self {
        Self {
            next_avail: start,
            next_used: start,
        }
    }

    /// Takes the next chain: its id and its number of descriptors.
    fn take(&mut self, q: &PackedQueue) -> Option<(u16, u16)> {
        let mut count = 0;
        loop {
            let at = self.next_avail;
            let flags = u16::from_le(q.flags_at(at.index).load(Ordering::Acquire));
            let (avail, used) = (flags & DESC_F_AVAIL != 0, flags & DESC_F_USED != 0);
            if avail == used || avail != at.wrap {
                assert_eq!(count, 0, "a chain is visible in part");
                return None;
            }
            self.next_avail = at.advanced(1, q.size);
            count += 1;
            if flags & DESC_F_NEXT == 0 {
                // SAFETY: in the ring.
                let id = unsafe { q.desc.add(16 * usize::from(at.index) + 12).cast::<u16>() };
                // SAFETY: as above, aligned to 2.
                return Some((u16::from_le(unsafe { id.read_volatile() }), count));
            }
        }
    }

    fn put_used(&mut self, q: &mut PackedQueue, id: u16, count: u16, len: u32) {
        let at = self.next_used;
        q.put(at.index, 0, len, id);
        let flags = if at.wrap {
            DESC_F_AVAIL | DESC_F_USED
        } else {
            0
        };
        q.flags_at(at.index).store(flags.to_le(), Ordering::Release);
        self.next_used = at.advanced(count, q.size);
    }
}

fn queue(size: u16) -> (Memory, PackedQueue) {
    let memory = Memory::new(&[RegionSpec::new(0x10_0000, 1 << 20)]).unwrap();
    let queue = PackedQueue::new(&memory, size).unwrap();
    (memory, queue)
}

#[test]
fn chains_go_round_rings_of_any_size_and_complete_in_any_order() {
    for size in [5u16, 7, 8, 100, 129] {
        let (_memory, mut q) = queue(size);
        for start in [
            Position::START,
            Position {
                index: size - 1,
                wrap: false,
            },
            Position {
                index: 2,
                wrap: true,
            },
        ] {
            q.start_at(start);
            let mut device = FakeDevice::new(start);
            assert!(device.take(&q).is_none() && q.pop_used().unwrap().is_none());
            for round in 0..5 * u64::from(size) {
                let a = q.add(&[Buf::readable(1, 1), Buf::writable(2, 2)], round);
                let b = q.add(&[Buf::readable(1, 1); 3], round + 1000);
                assert!(device.take(&q).is_none(), "not published yet");
                q.publish();
                assert_eq!(device.take(&q), Some((a.unwrap(), 2)));
                assert_eq!(device.take(&q), Some((b.unwrap(), 3)));
                assert!(device.take(&q).is_none());
                assert!(q.pop_used().unwrap().is_none());
                device.put_used(&mut q, b.unwrap(), 3, 0);
                device.put_used(&mut q, a.unwrap(), 2, 3);
                let first = q.pop_used().unwrap().unwrap();
                assert_eq!((first.token, first.len), (round + 1000, 0));
                let second = q.pop_used().unwrap().unwrap();
                assert_eq!((second.token, second.len), (round, 3));
                assert!(q.pop_used().unwrap().is_none());
                assert_eq!(q.free_count(), size);
            }
        }
    }
}

#[test]
fn a_full_ring_is_full() {
    let (_memory, mut q) = queue(3);
    let mut device = FakeDevice::new(Position::START);
    for round in 0..10 {
        for i in 0..3 {
            assert!(q.add(&[Buf::writable(0, 1)], 3 * round + i).is_some());
        }
        assert!(q.add(&[Buf::writable(0, 1)], 0).is_none());
        q.publish();
        for i in 0..3 {
            let (id, count) = device.take(&q).unwrap();
            device.put_used(&mut q, id, count, 1);
            assert_eq!(q.pop_used().unwrap().unwrap().token, 3 * round + i);
        }
    }
}

#[test]
fn a_buffer_used_twice_is_reported() {
    let (_memory, mut q) = queue(4);
    let mut device = FakeDevice::new(Position::START);
    let id = q.add(&[Buf::writable(0, 1)], 7).unwrap();
    q.publish();
    device.put_used(&mut q, id, 1, 1);
    device.put_used(&mut q, id, 1, 1);
    assert!(q.pop_used().unwrap().is_some());
    assert!(matches!(q.pop_used(), Err(Error::Protocol(_))));
}

#[test]
fn kicks_follow_the_devices_event_suppression() {
    let (_memory, mut q) = queue(8);
    q.set_event_idx(true);
    let say = |q: &PackedQueue, place: Position, flags: u16| {
        q.event_word(true, 0)
            .store(place.bits().to_le(), Ordering::Relaxed);
        q.event_word(true, 1)
            .store(flags.to_le(), Ordering::Relaxed);
    };
    let add = |q: &mut PackedQueue, n: usize| {
        let before = q.lines.kicks;
        for _ in 0..n {
            q.add(&[Buf::writable(0, 1)], 0).unwrap();
        }
        q.publish();
        q.lines.kicks - before
    };
    assert_eq!(add(&mut q, 1), 1, "enabled");
    say(&q, Position::START, EVENT_DISABLE);
    assert_eq!(add(&mut q, 1), 0);
    let place = |index, wrap| Position { index, wrap };
    say(&q, place(4, true), EVENT_DESC);
    assert_eq!(add(&mut q, 2), 0, "descriptors 2 and 3");
    assert_eq!(add(&mut q, 1), 1, "descriptor 4");
    assert_eq!(add(&mut q, 1), 0, "descriptor 5 is past it");
    // The device uses all that, and waits for what comes after the wrap.
    let mut device = FakeDevice::new(Position::START);
    for _ in 0..6 {
        let (id, count) = device.take(&q).unwrap();
        device.put_used(&mut q, id, count, 1);
        q.pop_used().unwrap().unwrap();
    }
    say(&q, place(1, false), EVENT_DESC);
    assert_eq!(add(&mut q, 3), 0, "descriptors 6, 7 and 0");
    assert_eq!(add(&mut q, 1), 1, "descriptor 1 of the next lap");
}
