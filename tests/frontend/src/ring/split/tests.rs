use super::*;
use crate::memory::RegionSpec;

fn queue(size: u16) -> (Memory, SplitQueue) {
    let memory = Memory::new(&[RegionSpec::new(0x10_0000, 1 << 20)]).unwrap();
    let queue = SplitQueue::new(&memory, size).unwrap();
    (memory, queue)
}

fn device_uses(q: &mut SplitQueue, id: u32, len: u32) {
    let idx = q.used_idx();
    let at = usize::from(idx % q.size);
    // SAFETY: in the used ring.
    unsafe {
        let entry = q.used.add(2 + 4 * at).cast::<u32>();
        entry.write_volatile(id);
        entry.add(1).write_volatile(len);
    }
    q.set_used_idx(idx.wrapping_add(1));
}

#[test]
fn chains_go_round_the_ring_many_times() {
    let (_memory, mut q) = queue(8);
    q.start_at(65_530);
    for round in 0..100u64 {
        let a = q
            .add(&[Buf::readable(1, 1), Buf::writable(2, 2)], round)
            .unwrap();
        let b = q.add(&[Buf::readable(1, 1); 6], round + 1000).unwrap();
        assert!(q.add(&[Buf::readable(1, 1)], 0).is_none());
        q.publish();
        device_uses(&mut q, u32::from(b), 0);
        device_uses(&mut q, u32::from(a), 3);
        assert_eq!(q.pop_used().unwrap().unwrap().token, round + 1000);
        assert_eq!(q.pop_used().unwrap().unwrap().token, round);
        assert!(q.pop_used().unwrap().is_none());
        assert_eq!(q.free_count(), 8);
    }
}

#[test]
fn a_chain_used_twice_is_reported() {
    let (_memory, mut q) = queue(4);
    let head = q.add(&[Buf::writable(0, 1)], 7).unwrap();
    q.publish();
    device_uses(&mut q, u32::from(head), 1);
    device_uses(&mut q, u32::from(head), 1);
    assert!(q.pop_used().unwrap().is_some());
    assert!(matches!(q.pop_used(), Err(Error::Protocol(_))));
    device_uses(&mut q, 77, 1);
    assert!(matches!(q.pop_used(), Err(Error::Protocol(_))));
}

#[test]
fn kicks_follow_the_event_index() {
    let (_memory, mut q) = queue(8);
    q.set_event_idx(true);
    q.add(&[Buf::writable(0, 1)], 0).unwrap();
    q.publish();
    assert_eq!(q.kicks(), 1, "avail_event 0: the first chain is announced");
    q.add(&[Buf::writable(0, 1)], 0).unwrap();
    q.publish();
    assert_eq!(q.kicks(), 1, "avail_event is behind: no kick");
}

/// One wait on a ring whose device uses the chain a little later and does not signal it.
fn wait_for_a_silent_device() -> Result<Used> {
    let (_memory, mut q) = queue(8);
    let head = q.add(&[Buf::writable(0, 1)], 0).unwrap();
    q.publish();
    std::thread::scope(|s| {
        let used = q.used as usize;
        s.spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            // SAFETY: the ring outlives the scope.
            unsafe {
                let base = used as *mut u16;
                base.add(2).cast::<u32>().write_volatile(u32::from(head));
                AtomicU16::from_ptr(base.add(1)).store(1, Ordering::Release);
            }
        });
        q.wait_used(Duration::from_millis(200))
    })
}

#[test]
fn an_absent_notification_is_found_out() {
    // On a loaded machine the device may come before the wait, or after its end: then once more.
    let seen = (0..100).any(|_| matches!(wait_for_a_silent_device(), Err(Error::LostNotification)));
    assert!(seen);
}
