//! Guest memory and the driver's side of the rings, for tests.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::memory::{GuestMemory, Region};
use super::ring::{ChainBuf, RingConfig};

/// A small deterministic generator (xorshift64*).
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// True once in `n` times.
    pub(crate) fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Puts a list into random order.
    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// An anonymous file of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    // SAFETY: the name is a C string, and the descriptor is new and ours.
    let fd = unsafe {
        let fd = libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        OwnedFd::from_raw_fd(fd)
    };
    let file = File::from(fd);
    file.set_len(size).unwrap();
    file
}

/// VMM addresses in tests are guest addresses plus this.
pub(crate) const USER_BASE: u64 = 0x7f00_0000_0000;

pub(crate) fn region(guest_addr: u64, len: u64) -> Region {
    Region::map(memfd(len), 0, guest_addr, USER_BASE + guest_addr, len).unwrap()
}

/// Memory of the given (guest address, length) regions.
pub(crate) fn memory(regions: &[(u64, u64)]) -> GuestMemory {
    GuestMemory::new(regions.iter().map(|(a, l)| region(*a, *l)).collect()).unwrap()
}

pub(crate) fn write_bytes(mem: &GuestMemory, addr: u64, data: &[u8]) {
    for (i, byte) in data.iter().enumerate() {
        let ptr = mem.host_ptr(addr + i as u64, 1).expect("mapped");
        // SAFETY: one mapped byte.
        unsafe { ptr.write_volatile(*byte) };
    }
}

pub(crate) fn read_bytes(mem: &GuestMemory, addr: u64, len: u64) -> Vec<u8> {
    (0..len)
        .map(|i| {
            let ptr = mem.host_ptr(addr + i, 1).expect("mapped");
            // SAFETY: one mapped byte.
            unsafe { ptr.read_volatile() }
        })
        .collect()
}

pub(crate) fn read_u16(mem: &GuestMemory, addr: u64) -> u16 {
    u16::from_le_bytes(read_bytes(mem, addr, 2).try_into().unwrap())
}

pub(crate) fn read_u32(mem: &GuestMemory, addr: u64) -> u32 {
    u32::from_le_bytes(read_bytes(mem, addr, 4).try_into().unwrap())
}

pub(crate) fn write_u16(mem: &GuestMemory, addr: u64, value: u16) {
    write_bytes(mem, addr, &value.to_le_bytes());
}

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A descriptor as the driver writes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

pub(crate) fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

impl Desc {
    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// The driver's side of a split ring laid out at `base`: descriptors, avail ring, used ring, a page
/// multiple apart.
pub(crate) struct Driver<'a> {
    pub(crate) mem: &'a GuestMemory,
    pub(crate) cfg: RingConfig,
}

impl<'a> Driver<'a> {
    /// Indices start at `index`, as after a migration.
    pub(crate) fn new(mem: &'a GuestMemory, base: u64, size: u16, index: u16) -> Self {
        let cfg = RingConfig {
            size,
            desc_table: base,
            avail_ring: base + 16 * u64::from(size),
            used_ring: (base + 18 * u64::from(size) + 6).next_multiple_of(4),
            event_idx: false,
            indirect: true,
            packed: false,
            base: u32::from(index),
        };
        write_u16(mem, cfg.avail_ring + 2, index);
        write_u16(mem, cfg.used_ring + 2, index);
        Self { mem, cfg }
    }

    pub(crate) fn with_event_idx(mut self) -> Self {
        self.cfg.event_idx = true;
        self
    }

    pub(crate) fn set_desc(&self, index: u16, desc: Desc) {
        write_bytes(
            self.mem,
            self.cfg.desc_table + 16 * u64::from(index),
            &desc.bytes(),
        );
    }

    /// Writes an indirect table.
    pub(crate) fn set_table(&self, addr: u64, table: &[Desc]) {
        for (i, desc) in table.iter().enumerate() {
            write_bytes(self.mem, addr + 16 * i as u64, &desc.bytes());
        }
    }

    pub(crate) fn avail_idx(&self) -> u16 {
        read_u16(self.mem, self.cfg.avail_ring + 2)
    }

    pub(crate) fn set_avail_idx(&self, index: u16) {
        write_u16(self.mem, self.cfg.avail_ring + 2, index);
    }

    pub(crate) fn set_avail_flags(&self, flags: u16) {
        write_u16(self.mem, self.cfg.avail_ring, flags);
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.cfg.avail_ring + 4 + 2 * u64::from(self.cfg.size);
        write_u16(self.mem, at, index);
    }

    pub(crate) fn avail_event(&self) -> u16 {
        let at = self.cfg.used_ring + 4 + 8 * u64::from(self.cfg.size);
        read_u16(self.mem, at)
    }

    pub(crate) fn set_avail_event(&self, index: u16) {
        let at = self.cfg.used_ring + 4 + 8 * u64::from(self.cfg.size);
        write_u16(self.mem, at, index);
    }

    pub(crate) fn used_flags(&self) -> u16 {
        read_u16(self.mem, self.cfg.used_ring)
    }

    pub(crate) fn used_idx(&self) -> u16 {
        read_u16(self.mem, self.cfg.used_ring + 2)
    }

    /// The used element that `index` (free running) stands for: id and length.
    pub(crate) fn used_elem(&self, index: u16) -> (u32, u32) {
        let at = self.cfg.used_ring + 4 + 8 * u64::from(index % self.cfg.size);
        (read_u32(self.mem, at), read_u32(self.mem, at + 4))
    }

    /// Makes a chain available.
    pub(crate) fn offer(&self, head: u16) {
        let index = self.avail_idx();
        let at = self.cfg.avail_ring + 4 + 2 * u64::from(index % self.cfg.size);
        write_u16(self.mem, at, head);
        self.set_avail_idx(index.wrapping_add(1));
    }

    /// Writes a direct chain of (address, length, writable) into the table from `first` on and
    /// gives its head.
    pub(crate) fn direct(&self, first: u16, parts: &[(u64, u32, bool)]) -> u16 {
        for (i, (addr, len, write)) in parts.iter().enumerate() {
            let index = first + i as u16;
            let last = i + 1 == parts.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.set_desc(index, desc(*addr, *len, flags, index + 1));
        }
        first
    }
}

/// Where [`SplitRequests`] and [`PackedRequests`] have the buffers of their tags.
const TAGS: u64 = 0x10_0000;
/// And the indirect tables.
const TABLES: u64 = 0x8_0000;

/// A tag is the place of the first buffer.
fn tag_of(mem: &GuestMemory, chain: &ChainBuf) -> u16 {
    let base = mem.host_ptr(TAGS, 1).unwrap() as u64;
    ((chain.readable()[0].iov_base as u64 - base) / 16) as u16
}

/// A driver of a split ring with requests of its own: one to three descriptors, or an indirect table.
pub(crate) struct SplitRequests<'a> {
    pub(crate) driver: Driver<'a>,
    free: Vec<u16>,
    taken: Vec<Vec<u16>>,
    seen: u16,
}

impl<'a> SplitRequests<'a> {
    pub(crate) fn new(mem: &'a GuestMemory, size: u16, index: u16) -> Self {
        Self {
            driver: Driver::new(mem, 0x1000, size, index),
            free: (0..size).collect(),
            taken: vec![Vec::new(); size.into()],
            seen: index,
        }
    }

    /// Makes a request available; none if there is no room for it.
    pub(crate) fn offer(&mut self, rng: &mut Rng) -> Option<u16> {
        rng.shuffle(&mut self.free);
        let count = 1 + rng.below(3) as usize;
        let places = self.free.split_off(self.free.len().checked_sub(count)?);
        let head = places[0];
        let buffer = |i: usize, flags, next| match i {
            0 => desc(TAGS + 16 * u64::from(head), 16, flags, next),
            _ => desc(TAGS + 0x8_0000, 8, flags | WRITE, next),
        };
        if count == 1 {
            let table = TABLES + 64 * u64::from(head);
            self.driver
                .set_table(table, &[buffer(0, NEXT, 1), buffer(1, 0, 0)]);
            self.driver.set_desc(head, desc(table, 32, INDIRECT, 0));
        }
        for (i, place) in places.iter().enumerate().filter(|_| count > 1) {
            let next = places.get(i + 1).copied();
            let flags = if next.is_some() { NEXT } else { 0 };
            let next = next.unwrap_or_default();
            self.driver.set_desc(*place, buffer(i, flags, next));
        }
        self.taken[usize::from(head)] = places;
        self.driver.offer(head);
        Some(head)
    }

    /// The tags of what came back.
    pub(crate) fn reap(&mut self) -> Vec<u16> {
        let mut tags = Vec::new();
        while self.seen != self.driver.used_idx() {
            let head = self.driver.used_elem(self.seen).0 as u16;
            self.free.append(&mut self.taken[usize::from(head)]);
            self.seen = self.seen.wrapping_add(1);
            tags.push(head);
        }
        tags
    }

    /// The tag of a request, as the device sees it.
    pub(crate) fn tag_of(&self, chain: &ChainBuf) -> u16 {
        tag_of(self.driver.mem, chain)
    }
}

/// `VIRTQ_DESC_F_AVAIL` and `VIRTQ_DESC_F_USED`.
pub(crate) const AVAIL: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;

/// A place in a packed ring and a wrap counter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl Place {
    pub(crate) fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn skip(&mut self, count: u16, size: u16) {
        self.index += count;
        if self.index >= size {
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }
}

/// The driver's side of a packed ring laid out at `base`, as section 2.8 has it.
pub(crate) struct PackedDriver<'a> {
    pub(crate) mem: &'a GuestMemory,
    pub(crate) cfg: RingConfig,
    pub(crate) next_avail: Place,
    pub(crate) next_used: Place,
    /// Descriptors of each buffer id.
    counts: Vec<u16>,
}

impl<'a> PackedDriver<'a> {
    /// Both sides begin at `index` of a lap with this wrap counter; a new ring at 0, true.
    pub(crate) fn new(mem: &'a GuestMemory, base: u64, size: u16, index: u16, wrap: bool) -> Self {
        let start = Place { index, wrap };
        // As the lap before has left it.
        for i in 0..u64::from(size) {
            let wrap = wrap == (i < u64::from(index));
            let flags = if wrap { AVAIL | USED } else { 0 };
            write_u16(mem, base + 16 * i + 14, flags);
        }
        let events = base + 16 * u64::from(size);
        let base = u32::from(start.bits());
        Self {
            mem,
            cfg: RingConfig {
                size,
                desc_table: events - 16 * u64::from(size),
                avail_ring: events,
                used_ring: events + 4,
                event_idx: false,
                indirect: true,
                packed: true,
                base: base | base << 16,
            },
            next_avail: start,
            next_used: start,
            counts: vec![0; 1 << 16],
        }
    }

    pub(crate) fn set_desc(&self, index: u16, addr: u64, len: u32, id: u16, flags: u16) {
        // The layout of a split ring's descriptor, with id and flags in other places.
        let at = self.cfg.desc_table + 16 * u64::from(index);
        let bytes = desc(addr, len, id, flags).bytes();
        write_bytes(self.mem, at, &bytes);
    }

    /// Makes a chain of (address, length, flags) available; its first descriptor's flags come last.
    pub(crate) fn offer(&mut self, id: u16, parts: &[(u64, u32, u16)]) {
        let first = self.next_avail;
        let mut first_flags = 0;
        for (i, (addr, len, flags)) in parts.iter().enumerate() {
            let at = self.next_avail;
            let more = if i + 1 < parts.len() { NEXT } else { 0 };
            let flags = flags | more | if at.wrap { AVAIL } else { USED };
            // The id counts in the last one only.
            let shown_id = if more == 0 { id } else { !id };
            if i == 0 {
                first_flags = flags;
                let old = self.flags(at.index);
                self.set_desc(at.index, *addr, *len, shown_id, old);
            } else {
                self.set_desc(at.index, *addr, *len, shown_id, flags);
            }
            self.next_avail.skip(1, self.cfg.size);
        }
        self.counts[usize::from(id)] = parts.len() as u16;
        self.set_flags(first.index, first_flags);
    }

    pub(crate) fn flags(&self, index: u16) -> u16 {
        read_u16(self.mem, self.cfg.desc_table + 16 * u64::from(index) + 14)
    }

    pub(crate) fn set_flags(&self, index: u16, flags: u16) {
        let at = self.cfg.desc_table + 16 * u64::from(index) + 14;
        write_u16(self.mem, at, flags);
    }

    /// The next buffer that came back: its id, and the length if the device has written.
    pub(crate) fn used(&mut self) -> Option<(u16, Option<u32>)> {
        let at = self.next_used;
        let flags = self.flags(at.index);
        let wanted = if at.wrap { AVAIL | USED } else { 0 };
        if flags & (AVAIL | USED) != wanted {
            return None;
        }
        let desc = self.cfg.desc_table + 16 * u64::from(at.index);
        let len = read_u32(self.mem, desc + 8);
        let id = read_u16(self.mem, desc + 12);
        // An id that is not under way is the device's fault.
        let count = std::mem::take(&mut self.counts[usize::from(id)]);
        if count == 0 {
            return None;
        }
        self.next_used.skip(count, self.cfg.size);
        Some((id, (flags & WRITE != 0).then_some(len)))
    }

    /// What this driver wants to hear: an event as [`Place::bits`], and flags.
    pub(crate) fn set_event(&self, event: u16, flags: u16) {
        write_u16(self.mem, self.cfg.avail_ring, event);
        write_u16(self.mem, self.cfg.avail_ring + 2, flags);
    }

    /// What the device wants to hear.
    pub(crate) fn device_event(&self) -> (u16, u16) {
        let at = self.cfg.used_ring;
        (read_u16(self.mem, at), read_u16(self.mem, at + 2))
    }
}

/// As [`SplitRequests`], of a packed ring. Buffer ids are the tags.
pub(crate) struct PackedRequests<'a> {
    pub(crate) driver: PackedDriver<'a>,
    free: u16,
    free_ids: Vec<u16>,
    taken: Vec<u16>,
}

impl<'a> PackedRequests<'a> {
    pub(crate) fn new(mem: &'a GuestMemory, size: u16, index: u16, wrap: bool) -> Self {
        Self {
            driver: PackedDriver::new(mem, 0x1000, size, index, wrap),
            free: size,
            free_ids: (0..size).collect(),
            taken: vec![0; size.into()],
        }
    }

    /// Makes a request available; none if there is no room for it.
    pub(crate) fn offer(&mut self, rng: &mut Rng) -> Option<u16> {
        rng.shuffle(&mut self.free_ids);
        let count = 1 + rng.below(4) as u16;
        self.free = self.free.checked_sub(count)?;
        let tag = self.free_ids.pop()?;
        self.taken[usize::from(tag)] = count;
        let buffer = |i: u16| match i {
            0 => (TAGS + 16 * u64::from(tag), 16, 0),
            _ => (TAGS + 0x8_0000, 8, WRITE),
        };
        if count == 1 {
            let table = TABLES + 64 * u64::from(tag);
            for i in 0..2 {
                let (addr, len, flags) = buffer(i);
                // Flags other than WRITE mean nothing here, and neither does the id.
                let flags = flags | rng.pick(&[0, NEXT, INDIRECT, AVAIL | USED]);
                let desc = desc(addr, len, rng.next() as u16, flags);
                write_bytes(self.driver.mem, table + 16 * u64::from(i), &desc.bytes());
            }
            let flags = INDIRECT | rng.pick(&[0, WRITE]);
            self.driver.offer(tag, &[(table, 32, flags)]);
        } else {
            let parts: Vec<_> = (0..count).map(buffer).collect();
            self.driver.offer(tag, &parts);
        }
        Some(tag)
    }

    /// The tags of what came back.
    pub(crate) fn reap(&mut self) -> Vec<u16> {
        let mut tags = Vec::new();
        while let Some((id, _)) = self.driver.used() {
            self.free += self.taken[usize::from(id)];
            self.free_ids.push(id);
            tags.push(id);
        }
        tags
    }

    /// The tag of a request, as the device sees it.
    pub(crate) fn tag_of(&self, chain: &ChainBuf) -> u16 {
        tag_of(self.driver.mem, chain)
    }
}

/// Only for a failing run: a lost notification would wait for ever.
const GIVE_UP: Duration = Duration::from_secs(20);

/// An eventfd without the system call: a thread that waits for one is soon back, so that the two
/// threads meet in the few instructions that matter.
#[derive(Default)]
pub(crate) struct Bell(AtomicU32);

impl Bell {
    pub(crate) fn ring(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    /// Waits until it rang after `heard`.
    pub(crate) fn wait(&self, heard: &mut u32, what: &str) {
        let (start, mut spins) = (Instant::now(), 0u32);
        while self.0.load(Ordering::Acquire) == *heard {
            spins += 1;
            if spins % 256 == 0 {
                assert!(start.elapsed() < GIVE_UP, "{what} was lost");
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        *heard = self.0.load(Ordering::Acquire);
    }
}

/// A short time, never the same.
pub(crate) fn dawdle(rng: &mut Rng) {
    for _ in 0..rng.below(40) {
        std::hint::spin_loop();
    }
}
