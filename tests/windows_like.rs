//! A driver as unlike Linux's as the specification allows, after what Windows guests, firmware and old drivers
//! do: long chains, odd pieces at odd addresses, no MQ, no EVENT_IDX, resets in between, messages in another
//! order. With split and with packed rings.

mod common;

use common::{Rig, SOON};
use vhost_user_frontend as frontend;

use frontend::blk::{self, CONFIG_WRITEBACK, request_type, status};
use frontend::guest::Random;
use frontend::protocol::feature;
use frontend::ring::RingLayout;
use frontend::{
    Buf, Client, Device, DeviceOptions, Disk, Memory, Notify, PackedQueue, RegionSpec, SplitQueue,
    Virtqueue,
};

const MIB: u64 = 1 << 20;
const SECTOR: usize = 512;

/// What such a driver accepts: one queue, no event index.
const FEATURES: u64 = feature::BLK_SEG_MAX
    | feature::BLK_GEOMETRY
    | feature::BLK_RO
    | feature::BLK_BLK_SIZE
    | feature::BLK_FLUSH
    | feature::BLK_TOPOLOGY
    | feature::BLK_CONFIG_WCE
    | feature::BLK_DISCARD
    | feature::BLK_WRITE_ZEROES
    | feature::INDIRECT_DESC
    | feature::VERSION_1;

/// Three regions, the second next to the first in guest memory and nowhere else.
const BORDER: u64 = 8 * MIB;

fn options(packed: bool, queue_size: u16) -> DeviceOptions {
    DeviceOptions {
        features: FEATURES,
        queue_size,
        packed,
        memory: vec![
            RegionSpec::new(0, BORDER),
            RegionSpec::new(BORDER, 8 * MIB).at_offset(1 << 16),
            RegionSpec::new(1 << 32, 16 * MIB),
        ],
        ..DeviceOptions::default()
    }
}

/// Runs a scenario with either kind of ring.
fn both(mut scenario: impl FnMut(bool)) {
    for packed in [false, true] {
        println!("packed: {packed}");
        scenario(packed);
    }
}

// Buffers in any place.

/// Writes guest memory over the borders of regions.
fn put(memory: &Memory, at: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        memory.write(at + i as u64, &[*byte]);
    }
}

fn get(memory: &Memory, at: u64, len: u32) -> Vec<u8> {
    (0..u64::from(len))
        .map(|i| memory.read_vec(at + i, 1)[0])
        .collect()
}

/// A chain whose pieces have any length and lie anywhere.
struct Chain {
    bufs: Vec<Buf>,
    /// Bytes that the device writes, the status included.
    writable: u32,
}

/// Where pieces are put: one after the other, with gaps of a few bytes, so that no address is aligned.
struct Arena {
    begin: u64,
    next: u64,
    end: u64,
}

impl Arena {
    fn new(begin: u64, len: u64) -> Self {
        Self {
            begin,
            next: begin,
            end: begin + len,
        }
    }

    /// Room for the next piece; from the beginning again where there is none.
    fn place(&mut self, len: u32, gap: u64) -> u64 {
        let at = self.next + gap;
        let at = if at + u64::from(len) > self.end {
            self.begin + gap
        } else {
            at
        };
        self.next = at + u64::from(len);
        at
    }
}

impl Chain {
    /// `out` is what the device reads, header first; it may write `writable` bytes.
    fn new(
        memory: &Memory,
        arena: &mut Arena,
        out: &[u8],
        writable: u32,
        pieces: &mut dyn FnMut(u32) -> (u32, u64),
    ) -> Self {
        let mut bufs = Vec::new();
        for (len, write) in [(out.len() as u32, false), (writable, true)] {
            let mut done = 0;
            while done < len {
                let (piece, gap) = pieces(len - done);
                let piece = piece.clamp(1, len - done);
                let addr = arena.place(piece, gap);
                if write {
                    put(memory, addr, &vec![status::UNTOUCHED; piece as usize]);
                } else {
                    put(memory, addr, &out[done as usize..(done + piece) as usize]);
                }
                bufs.push(Buf {
                    addr,
                    len: piece,
                    write,
                });
                done += piece;
            }
        }
        Self { bufs, writable }
    }

    /// What the device wrote: data, and the status in the last byte.
    fn written(&self, memory: &Memory) -> (Vec<u8>, u8) {
        let pieces = self.bufs.iter().filter(|b| b.write);
        let mut all: Vec<u8> = pieces.flat_map(|b| get(memory, b.addr, b.len)).collect();
        let status = all.pop().unwrap();
        (all, status)
    }
}

fn out_bytes(ty: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut out = blk::header(ty, sector).to_vec();
    out.extend_from_slice(data);
    out
}

/// Puts a chain in the ring; by an indirect table if that is wanted or the ring has no room for it.
fn add(device: &mut Device, chain: &Chain, indirect: bool, token: u64) -> bool {
    let (memory, queue) = device.split(0);
    if !indirect && chain.bufs.len() <= usize::from(queue.ring.free_count()) {
        return queue.ring.add(&chain.bufs, token).is_some();
    }
    let table = memory.alloc_in(2, 16 * chain.bufs.len() as u64, 16);
    queue
        .ring
        .add_indirect(memory, table, &chain.bufs, token)
        .is_some()
}

/// One chain from start to end.
fn run(device: &mut Device, chain: &Chain, indirect: bool) -> (Vec<u8>, u8) {
    assert!(add(device, chain, indirect, 1));
    let ring = &mut device.queue(0).ring;
    ring.publish();
    let used = ring.wait_used(SOON).unwrap();
    let (data, answer) = chain.written(&device.memory);
    if answer == status::OK {
        assert_eq!(used.len, chain.writable);
    }
    (data, answer)
}

// Scenarios.

/// Windows makes chains of 515: header, 513 pages or parts of pages, status.
#[test]
fn chains_of_515_descriptors_on_queues_of_128_and_256() {
    both(|packed| {
        for queue_size in [128, 256] {
            let rig = Rig::raw(8 * MIB);
            let mut device = rig.device_with(options(packed, queue_size));
            let mut arena = Arena::new(BORDER - 4 * MIB, 8 * MIB);
            let mut random = Random::new(u64::from(queue_size));
            // 513 pieces that are no sectors: 511 and 513 bytes in turn, the last one a sector.
            let data = random.bytes(513 * SECTOR);
            let shape = |kind: u32| {
                let mut n = 0u32;
                move |left: u32| {
                    n += 1;
                    match (n, left) {
                        // Header and status in one piece each.
                        (1, _) if kind == request_type::OUT => (16, 3),
                        (_, left) if kind == request_type::IN && left <= 513 => (left - 1, 1),
                        (n, _) => (if n % 2 == 0 { 511 } else { 513 }, 1),
                    }
                }
            };
            for round in 0..3 {
                let mut shape = shape(request_type::OUT);
                let out = out_bytes(request_type::OUT, 3 * round, &data);
                let chain = Chain::new(&device.memory, &mut arena, &out, 1, &mut shape);
                assert!(chain.bufs.len() >= 515, "{}", chain.bufs.len());
                assert_eq!(run(&mut device, &chain, true).1, status::OK);
            }
            let mut n = 0;
            let mut shape = |left: u32| {
                n += 1;
                match (n, left) {
                    (1, _) => (16, 5),
                    (_, 1) => (1, 5),
                    (_, left) => ((left - 1).min(if n % 2 == 0 { 511 } else { 513 }), 1),
                }
            };
            let out = out_bytes(request_type::IN, 6, &[]);
            let len = data.len() as u32 + 1;
            let chain = Chain::new(&device.memory, &mut arena, &out, len, &mut shape);
            assert!(chain.bufs.len() >= 515, "{}", chain.bufs.len());
            let (got, answer) = run(&mut device, &chain, true);
            assert_eq!(answer, status::OK);
            assert!(got == data, "queue of {queue_size}");
        }
    });
}

/// As many long chains at once as the queue has descriptors.
#[test]
fn a_queue_full_of_chains_longer_than_itself() {
    both(|packed| {
        let rig = Rig::raw(16 * MIB);
        let mut device = rig.device_with(options(packed, 16));
        let mut arena = Arena::new(0x10_0000, 14 * MIB);
        let mut random = Random::new(5);
        let data: Vec<_> = (0..16).map(|_| random.bytes(40 * SECTOR)).collect();
        for (write, sector) in [(true, 0), (false, 0)] {
            let mut chains = Vec::new();
            for (i, data) in data.iter().enumerate() {
                let ty = [request_type::IN, request_type::OUT][usize::from(write)];
                let payload = if write { &data[..] } else { &[] };
                let out = out_bytes(ty, sector + 100 * i as u64, payload);
                let len = if write { 1 } else { data.len() as u32 + 1 };
                let chain = Chain::new(&device.memory, &mut arena, &out, len, &mut |_| (509, 2));
                assert!(chain.bufs.len() > 40);
                assert!(add(&mut device, &chain, true, i as u64));
                chains.push(chain);
            }
            assert_eq!(device.queue(0).ring.free_count(), 0);
            device.queue(0).ring.publish();
            for _ in 0..16 {
                let used = device.queue(0).ring.wait_used(SOON).unwrap();
                let chain = &chains[used.token as usize];
                assert_eq!(used.len, chain.writable);
                let (got, answer) = chain.written(&device.memory);
                assert_eq!(answer, status::OK);
                assert!(write || got == data[used.token as usize]);
            }
        }
    });
}

/// Random cuts through header, data and status, at any address, in the ring or in a table.
#[test]
fn requests_cut_into_odd_pieces() {
    both(|packed| {
        let rig = Rig::with("qcow2", 4 * MIB, |d| d);
        let mut device = rig.device_with(options(packed, 128));
        let mut arena = Arena::new(BORDER - 2 * MIB, 4 * MIB);
        let mut random = Random::new(7);
        let mut model = vec![0u8; 4 << 20];
        for round in 0..250u64 {
            let sectors = 1 + random.below(40);
            let sector = random.below(model.len() as u64 / 512 - sectors);
            let range = sector as usize * SECTOR..(sector + sectors) as usize * SECTOR;
            let write = round % 2 == 0;
            // The pieces of a status share a descriptor with the end of what was read, as the cuts fall.
            let mut cuts = Random::new(round);
            let coarse = round % 5;
            let mut pieces = |_left: u32| {
                let piece = match cuts.below(6) {
                    0 => 1,
                    1 => 511,
                    2 => 1 + cuts.below(15) as u32,
                    3 => 513,
                    _ => 1 + cuts.below(500 << coarse) as u32,
                };
                (piece, cuts.below(7))
            };
            let indirect = round % 3 > 0;
            if write {
                let data = random.bytes(range.len());
                model[range].copy_from_slice(&data);
                let out = out_bytes(request_type::OUT, sector, &data);
                let chain = Chain::new(&device.memory, &mut arena, &out, 1, &mut pieces);
                assert_eq!(run(&mut device, &chain, indirect).1, status::OK);
            } else {
                let out = out_bytes(request_type::IN, sector, &[]);
                let len = range.len() as u32 + 1;
                let chain = Chain::new(&device.memory, &mut arena, &out, len, &mut pieces);
                let (got, answer) = run(&mut device, &chain, indirect);
                assert_eq!(answer, status::OK, "round {round}");
                assert!(got == model[range], "round {round}");
            }
        }
        device.shut_down().unwrap();
    });
}

/// Every field of a request over the border between two regions of memory.
#[test]
fn buffers_over_the_border_of_two_regions() {
    both(|packed| {
        let rig = Rig::raw(MIB);
        let mut device = rig.device_with(options(packed, 128));
        let data = Random::new(3).bytes(8 * SECTOR);
        for before in [1, 7, 15, 16, 17, 511, 512, 4000] {
            // In one descriptor: header and data, and then data and status.
            let out = out_bytes(request_type::OUT, 8, &data);
            let at = BORDER - before;
            put(&device.memory, at, &out);
            let answer = device.memory.alloc_in(2, 1, 1);
            device.memory.write(answer, &[status::UNTOUCHED]);
            let chain = Chain {
                bufs: vec![
                    Buf::readable(at, out.len() as u32),
                    Buf::writable(answer, 1),
                ],
                writable: 1,
            };
            assert_eq!(run(&mut device, &chain, false).1, status::OK);

            let header = device.memory.alloc_in(2, 16, 1);
            device
                .memory
                .write(header, &blk::header(request_type::IN, 8));
            let len = data.len() as u32 + 1;
            let at = BORDER - u64::from(len) + before.min(u64::from(len) - 1);
            put(&device.memory, at, &vec![status::UNTOUCHED; len as usize]);
            let chain = Chain {
                bufs: vec![Buf::readable(header, 16), Buf::writable(at, len)],
                writable: len,
            };
            let (got, answer) = run(&mut device, &chain, true);
            assert_eq!(answer, status::OK, "{before} bytes before the border");
            assert!(got == data, "{before} bytes before the border");
        }
    });
}

/// The serial number is asked for before anything else; the write cache is switched while the disk is used.
#[test]
fn serial_number_first_and_the_write_cache_switched_to_and_fro() {
    both(|packed| {
        let rig = Rig::with("qcow2", 4 * MIB, |d| d.serial("WIN-LIKE-0123456789X"));
        let mut device = rig.device_with(options(packed, 128));
        assert_eq!(device.get_id().unwrap(), *b"WIN-LIKE-0123456789X");
        for round in 0..6u8 {
            let client = device.client().unwrap();
            client
                .set_config(CONFIG_WRITEBACK, 0, &[round % 2])
                .unwrap();
            assert_eq!(device.read_config().unwrap().writeback, round % 2);
            device.write(u64::from(round), &[round; 512]).unwrap();
            device.flush().unwrap();
        }
        for round in 0..6u8 {
            assert_eq!(device.read(u64::from(round), 512).unwrap(), [round; 512]);
        }
    });
}

fn ring_at(memory: &Memory, packed: bool, size: u16, at: u64) -> Virtqueue {
    let n = u64::from(size);
    if packed {
        let layout = RingLayout {
            desc: at,
            avail: at + 16 * n,
            used: at + 16 * n + 4,
        };
        Virtqueue::Packed(PackedQueue::at(memory, size, layout).unwrap())
    } else {
        // As a legacy driver lays it out: the used ring on the page behind.
        let layout = RingLayout {
            desc: at,
            avail: at + 16 * n,
            used: (at + 18 * n + 6).next_multiple_of(4096),
        };
        Virtqueue::Split(SplitQueue::at(memory, size, layout).unwrap())
    }
}

/// Firmware, boot loader, crash kernel, driver: each resets the device and puts the ring somewhere else, of
/// another size.
#[test]
fn resets_in_between_with_the_ring_at_another_place() {
    both(|packed| {
        let rig = Rig::raw(MIB);
        let mut device = rig.device_with(options(packed, 128));
        for round in 0..30u64 {
            let sector = round % 16;
            device
                .write(sector, &[round as u8; SECTOR])
                .unwrap_or_else(|e| panic!("round {round}: {e}"));
            for _ in 0..round % 7 {
                assert_eq!(device.read(sector, 512).unwrap(), [round as u8; SECTOR]);
            }
            device.reset().unwrap();
            let size = [128, 16, 64, 8][round as usize % 4];
            let at = 0x40_0000 + (round % 5) * 0x1_0000;
            device.memory.fill(at, 0x1_0000, 0xff);
            let ring = ring_at(&device.memory, packed, size, at);
            device.replace_ring(0, ring);
            device.start_queues().unwrap();
        }
    });
}

/// The kind of ring changes at a reset too: firmware has no packed ones.
#[test]
fn firmware_with_a_split_ring_and_a_driver_with_a_packed_one() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device_with(options(false, 128));
    for round in 0..8u8 {
        device.write(0, &[round; SECTOR]).unwrap();
        device.reset().unwrap();
        let packed = round % 2 == 0;
        let kind = if packed { feature::RING_PACKED } else { 0 };
        let accepted = device.features() & !feature::RING_PACKED | kind;
        device.client().unwrap().set_features(accepted).unwrap();
        let ring = ring_at(&device.memory, packed, 64, 0x40_0000);
        device.replace_ring(0, ring);
        device.start_queues().unwrap();
        assert_eq!(device.read(0, 512).unwrap(), [round; SECTOR]);
    }
}

/// Without protocol features rings are enabled from the start, and nothing is acknowledged. The descriptors
/// come before the ring's place, its size last of all, the memory after the features.
#[test]
fn messages_in_the_order_of_an_old_vmm() {
    both(|packed| {
        let rig = Rig::raw(MIB);
        let memory = Memory::new(&[RegionSpec::new(0, 16 * MIB)]).unwrap();
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        let kind = if packed { feature::RING_PACKED } else { 0 };
        let features = client.get_features().unwrap() & (FEATURES | kind);
        assert_eq!(features & kind, kind, "packed rings are not offered");
        client.set_owner().unwrap();
        client.set_features(features).unwrap();
        let mut ring = Virtqueue::new(&memory, 128, packed).unwrap();
        ring.set_notify(Notify::Call);
        client
            .set_vring_call(0, Some(ring.call_fd().raw()))
            .unwrap();
        client.set_mem_table(&memory).unwrap();
        client.set_vring_num(0, 128).unwrap();
        client.set_vring_addr(0, &ring.vring_addr(0)).unwrap();
        client.set_vring_base(0, ring.base()).unwrap();
        client
            .set_vring_kick(0, Some(ring.kick_fd().raw()))
            .unwrap();
        let mut arena = Arena::new(8 * MIB, 4 * MIB);
        for round in 0..20u8 {
            let data = vec![round; SECTOR];
            let out = out_bytes(request_type::OUT, u64::from(round), &data);
            let chain = Chain::new(&memory, &mut arena, &out, 1, &mut |_| (600, 1));
            assert!(ring.add(&chain.bufs, 0).is_some());
            ring.publish();
            ring.wait_used(SOON).unwrap();
            assert_eq!(chain.written(&memory).1, status::OK);
        }
        let base = client.get_vring_base(0).unwrap();
        assert_eq!(base, ring.base());
    });
}

/// A queue of one descriptor, of two, of many; all of it in flight at once.
#[test]
fn queues_of_1_2_1024_and_32768_entries_and_odd_ones_are_used_in_full() {
    let sizes: [(u16, bool); 9] = [
        (1, false),
        (2, false),
        (1024, false),
        (32768, false),
        (1, true),
        (2, true),
        (100, true),
        (129, true),
        (32768, true),
    ];
    for (size, packed) in sizes {
        let rig = Rig::with("raw", 64 * MIB, |d: Disk| {
            d.queue_size(size.next_power_of_two().max(2))
        });
        let mut device = rig.device_with(DeviceOptions {
            queue_size: size,
            packed,
            memory: vec![RegionSpec::new(0, 256 * MIB)],
            slots: frontend::SlotOptions {
                count: size,
                data_len: 512,
                indirect: true,
                ..Default::default()
            },
            ..DeviceOptions::default()
        });
        for round in 0..2u64 {
            for i in 0..u64::from(size) {
                let stamp = (round << 32 | i).to_le_bytes().repeat(64);
                let op = match (i + round) % 2 {
                    0 => frontend::Op::Write {
                        sector: i,
                        data: &stamp,
                    },
                    _ => frontend::Op::Read {
                        sector: i,
                        len: 512,
                    },
                };
                device.queue(0).submit(op, i).unwrap();
            }
            let queue = device.queue(0);
            assert_eq!(queue.ring.free_count(), 0);
            queue.ring.publish();
            let mut seen = vec![false; usize::from(size)];
            for _ in 0..size {
                let done = queue.wait(SOON).unwrap();
                assert_eq!(done.status, status::OK, "size {size}, packed {packed}");
                assert!(!std::mem::replace(&mut seen[done.token as usize], true));
                // What is read was written in the round before.
                if (done.token + round) % 2 == 1 && round > 0 {
                    let mut got = vec![0; 512];
                    queue.copy_data(done.slot, &mut got);
                    let wanted = (round - 1) << 32 | done.token;
                    assert_eq!(got, wanted.to_le_bytes().repeat(64));
                }
                queue.release(done);
            }
        }
        device.shut_down().unwrap();
    }
}
