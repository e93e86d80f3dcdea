//! The protocol of an NVMe/TCP queue against a target that may say anything: some ten thousand seeded inputs.
//! `fuzz/` runs the same function on what libFuzzer makes. And that the steady state allocates nothing.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use virtioblkd::block::nvme_tcp::machine::{Data, MAX_IOVECS, Machine, QueueParams};
use virtioblkd::block::nvme_tcp::wire::{Nlb, Sqe};
use virtioblkd::reactor::AlignedBuf;

#[path = "../fuzz/nvme_exercise.rs"]
mod nvme_exercise;

use nvme_exercise::{Outcome, exercise};

const INPUTS: u64 = 10_000;
const LENGTH: usize = 250;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
}

#[test]
fn whatever_a_target_says_every_command_ends_once_and_no_other_memory_is_touched() {
    let mut seed = 0x5eed_0001;
    let mut all = Outcome::default();
    let mut clean = Outcome::default();
    for _ in 0..INPUTS {
        let bytes: Vec<u8> = (0..LENGTH).map(|_| random(&mut seed) as u8).collect();
        let outcome = exercise(&bytes);
        let sum = if bytes[0] & 32 == 0 {
            &mut clean
        } else {
            &mut all
        };
        sum.succeeded += outcome.succeeded;
        sum.failed += outcome.failed;
        sum.abandoned += outcome.abandoned;
        sum.fatal += outcome.fatal;
    }
    println!("mutated: {all:?}\nnot mutated: {clean:?}");
    // Inputs of which nothing comes would test nothing.
    assert_eq!((clean.fatal, clean.abandoned), (0, 0));
    assert!(clean.succeeded > INPUTS && clean.failed > INPUTS / 2);
    assert!(all.fatal > INPUTS / 4 && all.succeeded > INPUTS / 4 && all.abandoned > INPUTS / 2);
}

fn write_to(list: &[libc::iovec], mut bytes: &[u8]) {
    for piece in list {
        let (now, later) = bytes.split_at(piece.iov_len.min(bytes.len()));
        let base: *mut u8 = piece.iov_base.cast();
        // SAFETY: the list names memory of the machine, or of the command that is under way.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), base, now.len()) };
        bytes = later;
    }
}

/// A read with its data in one PDU that says SUCCESS, and a write with one R2T and a response.
fn a_read_and_a_write(machine: &mut Machine, list: &mut Vec<libc::iovec>, data: Data, to: Data) {
    let one = Nlb::new(8).expect("blocks");
    for (sqe, data) in [
        (Sqe::read(1, 0, one), to),
        (Sqe::write(1, 0, one, false), data),
    ] {
        // SAFETY: the buffers outlive the machine.
        let tag = unsafe { machine.begin(sqe, data, 0) }.expect("a free slot");
        let mut ended = 0;
        let send = |machine: &mut Machine, list: &mut Vec<libc::iovec>| {
            let n = machine.send_list(list);
            machine.sent(n, &mut |_| {});
            n
        };
        assert_eq!(send(machine, list), 72);
        let [low, high] = tag.cid().to_le_bytes();
        let mut bytes = [0; 24 + 4096];
        let mut receive = |machine: &mut Machine, list: &mut Vec<libc::iovec>, bytes: &[u8]| {
            machine.recv_list(list);
            write_to(list, bytes);
            let result = machine.received(bytes.len(), &mut |_| ended += 1);
            assert!(result.is_ok());
        };
        if matches!(data, Data::Read(_)) {
            bytes[..10].copy_from_slice(&[7, 12, 24, 24, 24, 16, 0, 0, low, high]);
            bytes[17] = 16;
            receive(machine, list, &bytes);
        } else {
            bytes[..10].copy_from_slice(&[9, 0, 24, 0, 24, 0, 0, 0, low, high]);
            bytes[17] = 16;
            receive(machine, list, &bytes[..24]);
            assert_eq!(send(machine, list), 24 + 4096);
            bytes[..24].copy_from_slice(&[
                5, 0, 24, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, low, high, 0, 0,
            ]);
            receive(machine, list, &bytes[..24]);
        }
        assert_eq!(ended, 1);
    }
}

#[test]
fn a_command_allocates_nothing() {
    let mut machine = Machine::new(QueueParams {
        depth: 128,
        header_digest: false,
        data_digest: false,
        host_pdu_alignment: 4,
        controller_pdu_alignment: 4,
        max_h2c_data: 131_072,
        in_capsule: 0,
        max_r2t: 1,
    });
    let mut list = Vec::with_capacity(MAX_IOVECS);
    // Leaked, so that they outlive everything.
    let from = Box::leak(Box::new(AlignedBuf::new(4096))).sg();
    let to = Box::leak(Box::new(AlignedBuf::new(4096))).sg();
    let before = ALLOCATIONS.get();
    for _ in 0..1000 {
        a_read_and_a_write(&mut machine, &mut list, Data::Write(from), Data::Read(to));
    }
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
