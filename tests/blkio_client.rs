//! libblkio as the client: another reading of both specifications, with habits of its own (no SET_MEM_TABLE,
//! regions that come while rings run, no INDIRECT, no GET_VRING_BASE at the end).

mod common;

use std::mem::MaybeUninit;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use common::{Rig, SOON, file_bytes};
use vhost_user_frontend::guest::Random;

const MIB: u64 = 1 << 20;

/// A started client with one queue, and a region of memory that was added after the start.
fn start(rig: &Rig, poll: bool, region_len: usize) -> (Blkio, Blkioq, MemoryRegion) {
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio
        .set_str("path", rig.daemon.socket().to_str().unwrap())
        .unwrap();
    blkio.connect().unwrap();
    blkio.set_i32("num-queues", i32::from(!poll)).unwrap();
    blkio.set_i32("num-poll-queues", i32::from(poll)).unwrap();
    let mut started = blkio.start().unwrap();
    let queue = if poll {
        started.poll_queues.remove(0)
    } else {
        started.queues.remove(0)
    };
    let region = blkio.alloc_mem_region(region_len).unwrap();
    blkio.map_mem_region(&region).unwrap();
    (blkio, queue, region)
}

/// Waits for `count` completions, all of which must be good.
fn finish(queue: &mut Blkioq, count: usize) -> Vec<usize> {
    let mut users = Vec::new();
    let mut timeout: Duration = SOON;
    while users.len() < count {
        let mut room: [MaybeUninit<Completion>; 16] = [const { MaybeUninit::uninit() }; 16];
        let n = queue
            .do_io(&mut room, 1, Some(&mut timeout), None)
            .expect("completions within the time");
        for completion in &room[..n] {
            // SAFETY: `do_io` filled the first `n`.
            let completion = unsafe { completion.assume_init_ref() };
            assert_eq!(completion.ret, 0, "request {}", completion.user_data);
            users.push(completion.user_data);
        }
    }
    users
}

fn put(region: &MemoryRegion, at: usize, bytes: &[u8]) {
    assert!(at + bytes.len() <= region.len);
    // SAFETY: the region is mapped at `addr` for `len` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), (region.addr + at) as *mut u8, bytes.len());
    }
}

fn get(region: &MemoryRegion, at: usize, len: usize) -> Vec<u8> {
    assert!(at + len <= region.len);
    let mut bytes = vec![0; len];
    // SAFETY: as in `put`.
    unsafe {
        std::ptr::copy_nonoverlapping((region.addr + at) as *const u8, bytes.as_mut_ptr(), len);
    }
    bytes
}

fn write_and_read_back(poll: bool, format: &str) {
    let mut rig = Rig::with(format, 16 * MIB, |d| d);
    {
        let (blkio, mut queue, region) = start(&rig, poll, 2 << 20);
        assert_eq!(blkio.get_u64("capacity").unwrap(), 16 * MIB);
        let data = Random::new(1).bytes(MIB as usize);
        put(&region, 0, &data);
        for i in 0..16 {
            let buffer = (region.addr + i * 65536) as *const u8;
            queue.write(i as u64 * 65536, buffer, 65536, i, ReqFlags::empty());
        }
        let mut users = finish(&mut queue, 16);
        users.sort_unstable();
        assert!(users.into_iter().eq(0..16));
        queue.flush(99, ReqFlags::empty());
        finish(&mut queue, 1);
        for i in 0..16 {
            let buffer = (region.addr + (1 << 20) + i * 65536) as *mut u8;
            queue.read(i as u64 * 65536, buffer, 65536, i, ReqFlags::empty());
        }
        finish(&mut queue, 16);
        assert!(get(&region, 1 << 20, 1 << 20) == data);
        if format == "raw" {
            assert!(file_bytes(&rig.image(), 0, data.len()) == data);
        }
    }
    // It went without a word; the daemon is there for the next.
    rig.assert_serves_a_new_client();
}

#[test]
fn write_flush_and_read_back_by_interrupts() {
    write_and_read_back(false, "raw");
}

#[test]
fn write_flush_and_read_back_by_polling() {
    write_and_read_back(true, "raw");
}

#[test]
fn write_flush_and_read_back_on_qcow2() {
    write_and_read_back(false, "qcow2");
}

#[test]
fn discard_and_write_zeroes() {
    let rig = Rig::raw(16 * MIB);
    let (_blkio, mut queue, region) = start(&rig, false, 1 << 20);
    put(&region, 0, &[0xa7; 1 << 18]);
    queue.write(0, region.addr as *const u8, 1 << 18, 0, ReqFlags::FUA);
    finish(&mut queue, 1);
    queue.write_zeroes(65536, 65536, 1, ReqFlags::empty());
    queue.write_zeroes(131_072, 4096, 2, ReqFlags::NO_UNMAP);
    finish(&mut queue, 2);
    queue.discard(0, 65536, 3, ReqFlags::empty());
    finish(&mut queue, 1);
    queue.read(0, region.addr as *mut u8, 1 << 18, 4, ReqFlags::empty());
    finish(&mut queue, 1);
    let data = get(&region, 0, 1 << 18);
    assert!(data[65536..131_072 + 4096].iter().all(|b| *b == 0));
    assert!(data[131_072 + 4096..].iter().all(|b| *b == 0xa7));
    let head = &data[..65536];
    assert!(head.iter().all(|b| *b == 0) || head.iter().all(|b| *b == 0xa7));
}

#[test]
fn regions_come_and_go_between_requests() {
    let rig = Rig::raw(16 * MIB);
    let (mut blkio, mut queue, first) = start(&rig, false, 65536);
    put(&first, 0, &[0x3c; 65536]);
    queue.write(0, first.addr as *const u8, 65536, 0, ReqFlags::empty());
    finish(&mut queue, 1);
    let align = blkio.get_u64("mem-region-alignment").unwrap() as usize;
    for round in 0..20 {
        let len = (4096usize + round * 512).next_multiple_of(align);
        let region = blkio.alloc_mem_region(len).unwrap();
        blkio.map_mem_region(&region).unwrap();
        queue.read(0, region.addr as *mut u8, 4096, round, ReqFlags::empty());
        finish(&mut queue, 1);
        assert!(get(&region, 0, 4096).iter().all(|b| *b == 0x3c));
        blkio.unmap_mem_region(&region);
        blkio.free_mem_region(&region);
    }
}

#[test]
fn vectors_of_odd_pieces() {
    let rig = Rig::raw(16 * MIB);
    let (_blkio, mut queue, region) = start(&rig, false, 65536);
    let data = Random::new(2).bytes(8192);
    put(&region, 100, &data);
    let piece = |at: usize, len: usize| blkio::iovec {
        iov_base: (region.addr + 100 + at) as *mut _,
        iov_len: len,
    };
    let vector = [piece(0, 512), piece(512, 1024), piece(1536, 6656)];
    queue.writev(512, vector.as_ptr(), 3, 0, ReqFlags::empty());
    finish(&mut queue, 1);
    assert!(file_bytes(&rig.image(), 512, 8192) == data);
}
