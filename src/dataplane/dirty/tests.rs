use std::sync::atomic::{AtomicU8, Ordering};

use super::*;
use crate::shared_memory::{SharedMemory, SharedPart};
use crate::virtio::dirty::LOG_PAGE;
use crate::virtio::testing::{memory, region};

/// A log of `bytes` bytes, and a look at it.
fn log(bytes: usize) -> (Arc<DirtyLog>, SharedPart) {
    let memory = SharedMemory::create(c"log", bytes.next_multiple_of(4096) as u64).unwrap();
    let part = memory.part(0, bytes).unwrap();
    (Arc::new(DirtyLog::new(part.clone())), part)
}

/// The pages that were marked; they are not any more.
fn taken(log: &SharedPart) -> Vec<u64> {
    let bytes = log.atomics::<AtomicU8>(0, log.len()).unwrap();
    let mut pages = Vec::new();
    for (index, byte) in bytes.iter().enumerate() {
        let bits = byte.swap(0, Ordering::AcqRel);
        pages.extend(
            (0..8)
                .filter(|bit| bits & 1 << bit != 0)
                .map(|bit| index as u64 * 8 + bit),
        );
    }
    pages
}

fn ring(size: u16, packed: bool) -> RingConfig {
    RingConfig {
        size,
        desc_table: 0x10_0000,
        avail_ring: 0x18_0000,
        used_ring: 0x1c_0000,
        event_idx: true,
        indirect: true,
        packed,
        base: 0,
    }
}

const USED: u64 = 0x4_0000;

#[test]
fn every_buffer_of_a_request_and_its_status_are_marked_wherever_they_lie() {
    // Three regions; two of them touch in guest memory, and not here.
    let memory = memory(&[(0, 0x4000), (0x4000, 0x4000), (0x100_0000, 0x4000)]);
    let (log, bits) = log(1024);
    let marks = Marks::new(Some(log), None, &ring(256, false));
    let mut chain = ChainBuf::with_capacity(4);
    chain.push(&memory, 0x1000, 16, false).unwrap();
    chain.push(&memory, 0x3800, 0x1000, true).unwrap();
    chain.push(&memory, 0x100_1ff0, 0x20, true).unwrap();
    chain.push(&memory, 0x6000, 0, true).unwrap();
    let status = memory.host_ptr(0x7001, 1).unwrap();
    marks.request(&memory, &chain, status).unwrap();
    // What was only read is not marked; nor is a buffer of nothing.
    assert_eq!(taken(&bits), [3, 4, 7, 0x1001, 0x1002]);
}

#[test]
fn without_a_log_nothing_is_marked_and_after_its_end_nothing_more() {
    let memory = memory(&[(0, 0x4000)]);
    let (log, bits) = log(1024);
    let marks = Marks::new(None, Some(USED), &ring(256, false));
    let mut chain = ChainBuf::with_capacity(4);
    chain.push(&memory, 0x1000, 512, true).unwrap();
    let status = memory.host_ptr(0x2000, 1).unwrap();
    let all = |marks: &Marks| {
        marks.request(&memory, &chain, status).unwrap();
        marks.completions(0, 1).unwrap();
        marks.notification().unwrap();
    };
    assert!(!marks.are_on());
    all(&marks);
    assert!(taken(&bits).is_empty());
    marks.set_log(Some(log));
    assert!(marks.are_on());
    all(&marks);
    assert_eq!(taken(&bits), [1, 2, USED / LOG_PAGE]);
    // The used ring is logged only where the VMM asks for it.
    marks.set_used(None);
    all(&marks);
    assert_eq!(taken(&bits), [1, 2]);
    marks.set_log(None);
    assert!(!marks.are_on());
    all(&marks);
    assert!(taken(&bits).is_empty());
}

#[test]
fn completions_mark_their_elements_and_the_index_by_log_address() {
    let first = USED / LOG_PAGE;
    let (log, bits) = log(1024);
    // 1024 elements of 8 bytes: three pages, since four bytes are before them.
    let marks = Marks::new(Some(log), Some(USED), &ring(1024, false));
    for (old, new, pages) in [
        (0, 1, vec![first]),
        (600, 601, vec![first, first + 1]),
        (511, 512, vec![first, first + 1]),
        // The last element ends in the third page.
        (1023, 1024, vec![first, first + 1, first + 2]),
        // Round the end of the ring, and of the index.
        (1000, 1030, vec![first, first + 1, first + 2]),
        (65535, 0, vec![first, first + 1, first + 2]),
        // A whole lap.
        (700, 1724, vec![first, first + 1, first + 2]),
    ] {
        marks.completions(old, new).unwrap();
        assert_eq!(taken(&bits), pages, "{old} to {new}");
    }
    // flags are at the front, avail_event is at the end.
    marks.notification().unwrap();
    assert_eq!(taken(&bits), [first, first + 2]);
    marks.whole_ring().unwrap();
    assert_eq!(taken(&bits), [first, first + 1, first + 2]);
}

#[test]
fn a_packed_ring_marks_its_descriptors_and_its_event_area() {
    let (log, bits) = log(1024);
    let event = USED / LOG_PAGE;
    // 300 descriptors of 16 bytes, from page 0x100 on.
    let marks = Marks::new(Some(log), Some(USED), &ring(300, true));
    for (old, new, pages) in [
        (0, 1, vec![event, 0x100]),
        (256, 257, vec![event, 0x101]),
        (0x8000 | 255, 0x8000 | 257, vec![event, 0x100, 0x101]),
        (0x8000 | 299, 0, vec![event, 0x101]),
    ] {
        marks.completions(old, new).unwrap();
        assert_eq!(taken(&bits), pages, "{old:#x} to {new:#x}");
    }
    marks.notification().unwrap();
    assert_eq!(taken(&bits), [event]);
}

#[test]
fn what_does_not_fit_into_the_log_is_an_error() {
    let memory = crate::virtio::memory::GuestMemory::new(vec![region(0x8000, 0x2000)]).unwrap();
    // Eight pages: guest memory begins behind them.
    let (log, bits) = log(1);
    let marks = Marks::new(Some(log), Some(0x7000), &ring(1024, false));
    let mut chain = ChainBuf::with_capacity(1);
    chain.push(&memory, 0x8000, 512, true).unwrap();
    let status = memory.host_ptr(0x9000, 1).unwrap();
    let error = marks.request(&memory, &chain, status).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("does not reach 512 bytes at guest address 0x8000")
    );
    assert!(marks.completions(0, 1).is_ok());
    assert!(marks.completions(1000, 1001).is_err());
    assert!(marks.notification().is_err());
    assert_eq!(taken(&bits), [7]);
    // Memory that is nobody's: a bug, and told.
    let other = [0u8; 1];
    assert!(
        marks
            .request(&memory, &ChainBuf::with_capacity(0), other.as_ptr())
            .is_err()
    );
}
