//! Random bytes as rings, tables and headers: whatever they are, nothing panics, every buffer is
//! guest memory, and work is bounded.

use super::blk::DeviceLimits;
use super::blk::request::{Command, DeviceId, Outcome, Status, fill_id, parse};
use super::memory::GuestMemory;
use super::ring::{ChainBuf, SplitRing};
use super::testing::{Desc, Driver, INDIRECT, NEXT, Rng, WRITE, desc, memory, write_bytes};

mod packed;

const REGIONS: [(u64, u64); 3] = [(0, 0x8000), (0x8000, 0x1001), (0x20_0000, 0x2000)];
const CAPACITY: u64 = 1 << 20;

fn limits(rng: &mut Rng) -> DeviceLimits {
    DeviceLimits {
        capacity_bytes: CAPACITY + rng.below(512),
        read_only: rng.once_in(4),
        block_size: rng.pick(&[512, 4096]),
        max_discard_bytes: rng.pick(&[0, 512, 4096, CAPACITY]),
        max_discard_segments: rng.pick(&[0, 1, 8]),
        discard_alignment: 512,
        max_write_zeroes_bytes: rng.pick(&[0, 512, 4096, CAPACITY]),
        max_write_zeroes_segments: rng.pick(&[0, 1, 8]),
        write_zeroes_may_unmap: true,
    }
}

/// A buffer is whole inside one region.
fn check_buffers(mem: &GuestMemory, buffers: &[libc::iovec]) {
    for buffer in buffers {
        assert!(buffer.iov_len > 0);
        let inside = mem.regions().iter().any(|region| {
            let offset = (buffer.iov_base as u64).wrapping_sub(region.as_ptr() as u64);
            offset < region.len && buffer.iov_len as u64 <= region.len - offset
        });
        assert!(inside, "{buffer:?}");
    }
}

/// Parses, checks what must hold of a request that is to be executed, and answers it.
fn check_request(mem: &GuestMemory, chain: &mut ChainBuf, rng: &mut Rng) -> bool {
    let limits = limits(rng);
    let (readable, writable) = (chain.readable_len(), chain.writable_len());
    let parsed = match parse(chain, &limits, rng.next()) {
        Outcome::Execute(parsed) => parsed,
        Outcome::Finish { status, reply } => {
            assert_ne!(status, Status::Ok);
            assert!(u64::from(reply.finish(status)) <= writable);
            return false;
        }
        Outcome::Broken => {
            assert_eq!(writable, 0);
            return false;
        }
    };
    let data = parsed.data(chain);
    check_buffers(mem, data);
    let total: u64 = data.iter().map(|v| v.iov_len as u64).sum();
    match parsed.command {
        Command::Read { offset, len } => {
            assert_eq!((total, total + 1), (len, writable));
            assert!(len % 512 == 0 && offset + len <= CAPACITY);
        }
        Command::Write { offset, len } => {
            assert_eq!((total, total + 16), (len, readable));
            assert!(!limits.read_only && len % 512 == 0 && offset + len <= CAPACITY);
        }
        Command::Discard | Command::WriteZeroes => {
            assert!(!limits.read_only);
            for segment in parsed.segments(chain) {
                assert!(segment.len > 0 && segment.offset + segment.len <= CAPACITY);
            }
        }
        Command::GetId => fill_id(&parsed, chain, &DeviceId::default()),
        Command::Flush => {}
    }
    let status = rng.pick(&[Status::Ok, Status::IoErr]);
    assert!(u64::from(parsed.finish(status)) <= writable);
    true
}

/// A descriptor that may be anything but is often nearly right.
fn random_desc(rng: &mut Rng, size: u16) -> Desc {
    let (base, len) = rng.pick(&REGIONS);
    let addr = match rng.below(20) {
        0 => rng.next(),
        1..10 => 0x100 * rng.below(0x80),
        _ => base + rng.below(len),
    };
    let len = match rng.below(10) {
        0 => rng.next() as u32,
        1 => 16 * rng.below(64) as u32,
        _ => rng.pick(&[0, 1, 16, 17, 512, 513, 1024]),
    };
    let mut flags = rng.pick(&[0, NEXT, NEXT, NEXT | WRITE, WRITE, WRITE, INDIRECT]);
    if rng.once_in(30) {
        flags = rng.next() as u16;
    }
    let next = if rng.once_in(30) {
        rng.next() as u16
    } else {
        rng.below(u64::from(size)) as u16
    };
    desc(addr, len, flags, next)
}

#[test]
fn random_rings_and_headers_end_in_values() {
    let mem = memory(&REGIONS);
    let mut chain = ChainBuf::with_capacity(4);
    let (mut served, mut executed, mut refused) = (0, 0, 0);
    for seed in 0..1500 {
        let mut rng = Rng::new(seed);
        let size = 1u16 << rng.below(7);
        // Everything is noise, headers now and then look like some.
        let noise: Vec<u8> = (0..0x2000).map(|_| rng.next() as u8).collect();
        write_bytes(&mem, rng.below(0x7000), &noise);
        for i in 0..128 {
            let at = 0x100 * (i % 0x80);
            let kind = rng.pick(&[0u8, 1, 4, 8, 11, 13, 3]);
            let sector = rng.pick(&[0, 1, 2047, 2048, 1 << 40, u64::MAX]);
            write_bytes(&mem, at, &[kind, 0, 0, 0, 0, 0, 0, 0]);
            write_bytes(&mem, at + 8, &sector.to_le_bytes());
        }
        let mut driver = Driver::new(&mem, 0, size, rng.next() as u16);
        driver.cfg.event_idx = rng.once_in(2);
        driver.cfg.indirect = !rng.once_in(4);
        for i in 0..size {
            driver.set_desc(i, random_desc(&mut rng, size));
        }
        for i in 0..u64::from(size) {
            let head = rng.below(u64::from(size)) as u16 + 100 * u16::from(rng.once_in(50));
            write_bytes(&mem, driver.cfg.avail_ring + 4 + 2 * i, &head.to_le_bytes());
        }
        // An indirect table somewhere.
        let table: Vec<_> = (0..16).map(|_| random_desc(&mut rng, 16)).collect();
        driver.set_table(16 * rng.below(0x7e0), &table);

        let mut ring = SplitRing::new(&mem, &driver.cfg).unwrap();
        for _ in 0..3 {
            // Mostly a plausible number of chains.
            let ahead = if rng.once_in(10) {
                rng.next() as u16
            } else {
                rng.below(u64::from(size) + 2) as u16
            };
            driver.set_avail_idx(ring.next_avail().wrapping_add(ahead));
            let mut steps = 0;
            while let Ok(Some(head)) = ring.pop() {
                steps += 1;
                assert!(
                    steps <= u32::from(size),
                    "seed {seed}: more chains than the ring has"
                );
                assert!(head < size);
                let written = match ring.read_chain(&mem, head, &mut chain) {
                    Ok(()) => {
                        check_buffers(&mem, chain.readable());
                        check_buffers(&mem, chain.writable());
                        served += 1;
                        executed += u32::from(check_request(&mem, &mut chain, &mut rng));
                        1
                    }
                    Err(_) => {
                        refused += 1;
                        0
                    }
                };
                ring.push_used(head, written);
                if rng.once_in(3) {
                    ring.publish();
                }
            }
            ring.publish();
            ring.enable_notification();
            ring.disable_notification();
            assert!(ring.pending() <= size);
        }
    }
    // The noise reaches every part.
    assert!(
        served > 5000 && executed > 100 && refused > 5000,
        "{served} served, {executed} executed, {refused} refused"
    );
}

#[test]
fn random_chains_of_a_plausible_shape_are_parsed_or_refused() {
    let mem = memory(&REGIONS);
    let mut chain = ChainBuf::with_capacity(4);
    let mut executed = [0; 2];
    for seed in 0..20_000 {
        let mut rng = Rng::new(seed);
        let kind = rng.pick(&[0u8, 1, 4, 8, 11, 13, 14, 255]);
        write_bytes(&mem, 0, &[kind, 0, 0, 0, 0, 0, 0, 0]);
        let sector = rng.pick(&[0, 5, 2047, 2048, u64::MAX / 512, u64::MAX]);
        write_bytes(&mem, 8, &sector.to_le_bytes());
        for i in 0..8 {
            write_bytes(&mem, 16 + 16 * i, &rng.below(2050).to_le_bytes());
            let sectors = rng.pick(&[0, 1, 8, u32::MAX]);
            write_bytes(&mem, 24 + 16 * i, &sectors.to_le_bytes());
            let flags = rng.pick(&[0, 0, 0, 1, 2]);
            write_bytes(&mem, 28 + 16 * i, &u32::to_le_bytes(flags));
        }
        chain.clear();
        // The readable part from 0 on, the writable one elsewhere, both cut at random.
        let cut = |rng: &mut Rng, chain: &mut ChainBuf, mut at: u64, total: u64, write| {
            let end = at + total;
            while at < end {
                let len = rng.pick(&[0, 1, 15, 16, 17, 512, 4096]).min(end - at);
                chain.push(&mem, at, len as u32, write).unwrap();
                at += len;
            }
        };
        let readable = rng.pick(&[0, 15, 16, 16, 32, 48, 16 + 512, 16 + 1024, 100]);
        let writable = rng.pick(&[0, 1, 1, 21, 20, 513, 1025, 4097, 77]);
        cut(&mut rng, &mut chain, 0, readable, false);
        // Across the border of two regions.
        cut(&mut rng, &mut chain, 0x7f00, writable, true);
        executed[usize::from(check_request(&mem, &mut chain, &mut rng))] += 1;
    }
    assert!(executed[0] > 2000 && executed[1] > 2000, "{executed:?}");
}
