//! A VM that can be moved: its guest, which knows what its disk must hold, and its memory, page by page.
//!
//! Who writes to which page is kept apart. What the guest writes (descriptors, available rings, headers, data to be
//! written) a VMM learns from the processor; this one just copies it every time. What the device writes (used
//! rings, data that was read, status bytes) has pages of its own and is copied only where the dirty log says so.

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use super::Random;
use crate::blk::{self, request_type, status};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::memory::{Memory, Region, RegionSpec};
use crate::message::Inflight;
use crate::protocol::{VRING_F_LOG, feature, protocol_feature};
use crate::ring::{Buf, Notify, RingLayout, SplitQueue};

/// Deadline of what should take milliseconds; generous, since tests share processors.
const SOON: Duration = Duration::from_secs(60);

/// Bytes.
pub const PAGE: u64 = 4096;
/// Large enough that a used ring takes three pages: its index in the first, `avail_event` in the last, and the
/// second has nothing but elements.
pub const QUEUE_SIZE: u16 = 1024;
const QUEUES: usize = 2;
const SLOTS: usize = 32;
/// Bytes of the disk that a slot has for itself.
const SLOT_BYTES: u64 = 256 << 10;
const DATA_BYTES: u64 = 4 * PAGE;
/// Bytes of the disk.
pub const DISK: u64 = SLOTS as u64 * SLOT_BYTES;

#[derive(Clone, Copy, Debug)]
enum Running {
    Read { at: u64, len: u64 },
    Write { at: u64, len: u64 },
    Zero { at: u64, len: u64 },
    Flush,
}

/// A request's buffers.
#[derive(Debug)]
struct Slot {
    queue: usize,
    /// Written by the guest: the header, and the data of a write behind it in a page of its own.
    header: u64,
    out: u64,
    /// Written by the device.
    data: u64,
    status: u64,
    running: Option<Running>,
}

/// The VM.
#[derive(Debug)]
pub struct Vm {
    /// Where the guest finds its memory, whatever is behind it.
    view: Memory,
    /// The memory that is there now.
    pub memory: Memory,
    queues: Vec<SplitQueue>,
    slots: Vec<Slot>,
    /// What the disk holds.
    pub model: Vec<u8>,
    random: Random,
    guest_pages: BTreeSet<u64>,
    /// Requests so far.
    pub completed: u64,
    /// The guest flushes now and then.
    pub flushes: bool,
}

/// Below and above the hole under 4 GiB, as a PC has it.
pub fn specs() -> Vec<RegionSpec> {
    vec![
        RegionSpec::new(0, 2 << 20),
        RegionSpec::new(1 << 32, 2 << 20).at_offset(64 << 10),
    ]
}

impl Vm {
    /// A VM whose disk holds `model`.
    pub fn new(model: Vec<u8>, seed: u64) -> Self {
        assert_eq!(model.len() as u64, DISK);
        let view = Memory::new(&specs()).unwrap();
        let mut guest_pages = BTreeSet::new();
        let mut of_guest = |memory: &Memory, region: usize, len: u64| {
            let at = memory.alloc_in(region, len.next_multiple_of(PAGE), PAGE);
            guest_pages.extend((at..at + len).step_by(PAGE as usize).map(|a| a / PAGE));
            at
        };
        let mut queues = Vec::new();
        for region in 0..QUEUES {
            let size = u64::from(QUEUE_SIZE);
            let layout = RingLayout {
                desc: of_guest(&view, region, 16 * size),
                avail: of_guest(&view, region, 6 + 2 * size),
                used: view.alloc_in(region, 3 * PAGE, PAGE),
            };
            let mut ring = SplitQueue::at(&view, QUEUE_SIZE, layout).unwrap();
            ring.set_event_idx(true);
            ring.set_notify(Notify::Poll);
            queues.push(ring);
        }
        let slots = (0..SLOTS)
            .map(|n| Slot {
                queue: n % QUEUES,
                header: of_guest(&view, n % 2, PAGE),
                out: of_guest(&view, n % 2, DATA_BYTES),
                data: view.alloc_in((n + 1) % 2, DATA_BYTES, PAGE),
                status: view.alloc_in(n % 2, PAGE, PAGE),
                running: None,
            })
            .collect();
        Self {
            memory: view.clone(),
            view,
            queues,
            slots,
            model,
            random: Random::new(seed),
            guest_pages,
            completed: 0,
            flushes: true,
        }
    }

    fn begin(&mut self, index: usize) {
        let random = &mut self.random;
        let at = index as u64 * SLOT_BYTES + random.below(SLOT_BYTES / 512 - 32) * 512;
        let len = 512 * (1 + random.below(DATA_BYTES / 512));
        let slot = &mut self.slots[index];
        let kind = random.below(15 + u64::from(self.flushes));
        let (ty, running, out, data) = match kind {
            0..=7 => (request_type::IN, Running::Read { at, len }, 0, len),
            8..=13 => {
                let bytes = random.bytes(len as usize);
                self.view.write(slot.out, &bytes);
                (request_type::OUT, Running::Write { at, len }, len, 0)
            }
            14 => {
                let segment = blk::Segment::new(at / 512, (len / 512) as u32);
                self.view.write(slot.out, &segment.to_bytes());
                (request_type::WRITE_ZEROES, Running::Zero { at, len }, 16, 0)
            }
            _ => (request_type::FLUSH, Running::Flush, 0, 0),
        };
        let sector = if kind < 14 { at / 512 } else { 0 };
        self.view.write(slot.header, &blk::header(ty, sector));
        self.view.write(slot.status + 8, &[status::UNTOUCHED]);
        let mut bufs = vec![Buf::readable(slot.header, 16)];
        if out > 0 {
            bufs.push(Buf::readable(slot.out, out as u32));
        }
        if data > 0 {
            // Cut, so that one of the pieces is not at the start of a page.
            let cut = (len / 2).max(100).min(len);
            bufs.push(Buf::writable(slot.data, cut as u32));
            bufs.push(Buf::writable(slot.data + cut, (len - cut) as u32));
        }
        bufs.push(Buf::writable(slot.status + 8, 1));
        let ring = &mut self.queues[slot.queue];
        ring.add(&bufs, index as u64).expect("room in the ring");
        slot.running = Some(running);
    }

    fn end(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let running = slot.running.take().expect("a request that was begun");
        let said = self.view.read_vec(slot.status + 8, 1)[0];
        assert_eq!(said, status::OK, "{running:?}");
        let range = |at: u64, len: u64| at as usize..(at + len) as usize;
        match running {
            Running::Read { at, len } => {
                let found = self.view.read_vec(slot.data, len as usize);
                let same = found == self.model[range(at, len)];
                assert!(same, "{len} bytes at {at:#x} read wrong");
            }
            Running::Write { at, len } => {
                let wrote = self.view.read_vec(slot.out, len as usize);
                self.model[range(at, len)].copy_from_slice(&wrote);
            }
            Running::Zero { at, len } => self.model[range(at, len)].fill(0),
            Running::Flush => {}
        }
        self.completed += 1;
    }

    /// Keeps every slot busy until `count` more requests have completed.
    pub fn run(&mut self, count: u64) {
        let until = self.completed + count;
        self.turn_until(true, |vm| vm.completed >= until);
    }

    /// Begins requests that nobody may have fetched yet.
    pub fn submit(&mut self) {
        for index in 0..self.slots.len() {
            if self.slots[index].running.is_none() {
                self.begin(index);
            }
        }
        self.queues.iter_mut().for_each(SplitQueue::publish);
    }

    /// Where a ring goes on when all that was made available has completed.
    pub fn available(&self, queue: usize) -> u32 {
        u32::from(self.queues[queue].next_avail())
    }

    /// The guest's driver begins anew.
    pub fn reset(&mut self) {
        assert_eq!(self.running(), 0);
        self.queues.iter_mut().for_each(SplitQueue::reset);
    }

    /// Begins nothing more, and waits for all that was begun.
    pub fn drain(&mut self) {
        self.turn_until(false, |vm| vm.running() == 0);
    }

    /// Requests that were begun and have not completed.
    pub fn running(&self) -> usize {
        self.slots.iter().filter(|s| s.running.is_some()).count()
    }

    fn turn_until(&mut self, begin: bool, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + SOON;
        while !done(self) {
            if begin {
                self.submit();
            }
            let before = self.completed;
            self.collect();
            if self.completed == before {
                assert!(
                    Instant::now() < deadline,
                    "{} requests hang",
                    self.running()
                );
                std::thread::yield_now();
            }
        }
    }

    /// Takes what has completed.
    pub fn collect(&mut self) {
        for queue in 0..self.queues.len() {
            while let Some(used) = self.queues[queue].pop_used().unwrap() {
                self.end(used.token as usize);
            }
        }
    }

    /// Reads the whole disk and compares it.
    pub fn check_disk(&mut self) {
        self.drain();
        for at in (0..DISK).step_by(DATA_BYTES as usize) {
            let slot = &mut self.slots[0];
            let header = blk::header(request_type::IN, at / 512);
            self.view.write(slot.header, &header);
            let bufs = [
                Buf::readable(slot.header, 16),
                Buf::writable(slot.data, DATA_BYTES as u32),
                Buf::writable(slot.status + 8, 1),
            ];
            slot.running = Some(Running::Read {
                at,
                len: DATA_BYTES,
            });
            let queue = &mut self.queues[slot.queue];
            queue.add(&bufs, 0).expect("room in the ring");
            queue.publish();
            self.drain();
        }
    }

    /// Fresh memory for this VM, to be filled.
    pub fn new_memory(&self) -> Memory {
        Memory::new(&specs()).unwrap()
    }

    /// All pages of the VM.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        let range = |s: RegionSpec| s.guest_addr / PAGE..(s.guest_addr + s.size) / PAGE;
        specs().into_iter().flat_map(range)
    }

    /// Copies pages, and those that the guest writes to: its own, and where it expects a status.
    pub fn copy(&self, pages: impl IntoIterator<Item = u64>, to: &Memory) {
        let running = self.slots.iter().filter(|slot| slot.running.is_some());
        let expected = running.map(|slot| slot.status / PAGE);
        let guest = self.guest_pages.iter().copied().chain(expected);
        for page in pages.into_iter().chain(guest) {
            to.write(page * PAGE, &self.view.read_vec(page * PAGE, PAGE as usize));
        }
    }

    /// Pages that requests in flight may be writing to: what is there is not defined before they complete.
    pub fn in_flight_pages(&self) -> BTreeSet<u64> {
        let running = self.slots.iter().filter(|slot| slot.running.is_some());
        let pages = |slot: &Slot| (slot.data..slot.data + DATA_BYTES).step_by(PAGE as usize);
        running.flat_map(pages).map(|at| at / PAGE).collect()
    }

    /// Pages of a copy that are not what they should be.
    pub fn stale(&self, copy: &Memory) -> Vec<u64> {
        let differs = |page: &u64| {
            let at = page * PAGE;
            self.view.read_vec(at, PAGE as usize) != copy.read_vec(at, PAGE as usize)
        };
        self.pages().filter(differs).collect()
    }

    /// Goes on in another memory: it appears where the guest has its own.
    pub fn move_to(&mut self, memory: Memory) {
        for (old, new) in self.view.regions().iter().zip(memory.regions()) {
            let spec = old.spec();
            let len = (spec.size + spec.mmap_offset) as usize;
            let start = old.host(spec.guest_addr, spec.size);
            let start = start.wrapping_sub(spec.mmap_offset as usize);
            // SAFETY: this takes the place of the mapping that `old` made, of the same length; nobody holds a
            // reference into it.
            let mapped = unsafe {
                libc::mmap(
                    start.cast(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    new.fd(),
                    0,
                )
            };
            assert_eq!(mapped, start.cast());
        }
        self.memory = memory;
    }
}

/// What a VMM does with an inflight region that is to be at the target too.
pub fn copy_of(region: &Inflight) -> Inflight {
    let len = region.mmap_offset + region.mmap_size;
    let copy = Region::new(RegionSpec::new(0, len)).unwrap();
    let mut bytes = vec![0; len as usize];
    let from = std::fs::File::from(region.fd.try_clone().unwrap());
    std::os::unix::fs::FileExt::read_exact_at(&from, &mut bytes, 0).unwrap();
    // SAFETY: a fresh mapping of this length, which nobody else has.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy.host(0, len), bytes.len()) };
    // SAFETY: the descriptor is open as long as the region lives.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(copy.fd()) };
    Inflight {
        fd: fd.try_clone_to_owned().unwrap(),
        ..*region
    }
}

/// The dirty log as a VMM keeps it.
#[derive(Debug)]
pub struct Log(Region);

impl Default for Log {
    fn default() -> Self {
        Self::new()
    }
}

impl Log {
    /// With no page marked.
    pub fn new() -> Self {
        let end = specs().iter().map(|s| s.guest_addr + s.size).max().unwrap();
        let bytes = (end / PAGE).div_ceil(64) * 8;
        Self(Region::new(RegionSpec::new(0, bytes)).unwrap())
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.0.spec().size
    }

    /// Its file.
    pub fn fd(&self) -> RawFd {
        self.0.fd()
    }

    /// The pages that were marked; they are not any more.
    pub fn take(&self) -> Vec<u64> {
        let host = self.0.host(0, self.size());
        let mut pages = Vec::new();
        for index in 0..self.size() {
            // SAFETY: a byte of the mapping, which both sides access as an atomic.
            let byte = unsafe { AtomicU8::from_ptr(host.add(index as usize)) };
            let bits = byte.swap(0, Ordering::AcqRel);
            pages.extend((0..8).filter(|b| bits & 1 << b != 0).map(|b| index * 8 + b));
        }
        pages
    }
}

/// A VMM's connection with a daemon, as QEMU has it.
#[derive(Debug)]
pub struct Vmm {
    /// The connection.
    pub client: Client,
    features: u64,
    protocol: u64,
}

impl Vmm {
    /// The handshake: everything but the rings.
    pub fn connect(socket: &Path, vm: &Vm) -> Self {
        let deadline = Instant::now() + SOON;
        let (mut client, offered) = loop {
            let client = Client::connect_within(socket, SOON).unwrap();
            match client.get_features() {
                Ok(offered) => break (client, offered),
                // It has not noticed the end of the connection before.
                Err(Error::Closed) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => panic!("{error}"),
            }
        };
        let usual = protocol_feature::USUAL & !protocol_feature::BACKEND_REQ;
        let wanted =
            usual | protocol_feature::DEVICE_STATE | protocol_feature::GET_VRING_BASE_SKIP_DRAIN;
        let protocol = client.get_protocol_features().unwrap() & wanted;
        client.set_protocol_features(protocol).unwrap();
        client.set_owner().unwrap();
        let features = offered & (feature::LINUX | feature::PROTOCOL_FEATURES);
        client.set_features(features).unwrap();
        assert_eq!(client.get_config(0, 60).unwrap().len(), 60);
        client.set_mem_table(&vm.memory).unwrap();
        Self {
            client,
            features,
            protocol,
        }
    }

    /// As the source of a migration: with the rings started and a region for what is in flight.
    pub fn boot(socket: &Path, vm: &mut Vm) -> Self {
        let vmm = Self::connect(socket, vm);
        vmm.client.set_inflight_fd(&vmm.new_inflight()).unwrap();
        vmm.start(vm, [0, 0], false).unwrap();
        vmm
    }

    /// Everything of a migration until the rings of this source are about to stop: the copy. The guest is busy
    /// throughout, and memory is copied `rounds` times by what was marked.
    pub fn copy_while_running(&self, vm: &mut Vm, log: &Log, rounds: u32) -> Memory {
        let copy = vm.new_memory();
        self.log_on(vm, log);
        vm.copy(vm.pages(), &copy);
        for _ in 0..rounds {
            vm.run(200);
            vm.copy(log.take(), &copy);
        }
        vm.run(200);
        vm.submit();
        copy
    }

    /// This target's side of the switchover: the VM goes on in its copy, with the rings where the source stopped.
    pub fn take_over(&self, vm: &mut Vm, copy: Memory, bases: [u32; QUEUES]) {
        vm.move_to(copy);
        self.client.set_mem_table(&vm.memory).unwrap();
        let inflight = self.new_inflight();
        self.client.set_inflight_fd(&inflight).unwrap();
        self.start(vm, bases, false).unwrap();
    }

    /// Asks for an inflight region of this VM's shape.
    pub fn new_inflight(&self) -> Inflight {
        let client = &self.client;
        client.get_inflight_fd(QUEUES as u16, QUEUE_SIZE).unwrap()
    }

    /// Starts the rings where they are to go on.
    pub fn start(&self, vm: &mut Vm, bases: [u32; QUEUES], log: bool) -> Result<()> {
        for (index, base) in bases.into_iter().enumerate() {
            let i = index as u32;
            let ring = &mut vm.queues[index];
            let client = &self.client;
            client.set_vring_num(i, u32::from(ring.size()))?;
            client.set_vring_base(i, base)?;
            let flags = if log { VRING_F_LOG } else { 0 };
            client.set_vring_addr(i, &ring.vring_addr(flags))?;
            client.set_vring_kick(i, Some(ring.kick_fd().raw()))?;
            client.set_vring_call(i, Some(ring.call_fd().raw()))?;
            client.set_vring_enable(i, true)?;
            ring.kick();
        }
        Ok(())
    }

    /// Turns logging on as QEMU does.
    pub fn log_on(&self, vm: &Vm, log: &Log) {
        self.client.set_log_base(log.size(), 0, log.fd()).unwrap();
        self.set_logging(vm, true);
    }

    /// Turns logging on or off.
    pub fn set_logging(&self, vm: &Vm, on: bool) {
        let bit = if on { feature::LOG_ALL } else { 0 };
        self.client.set_features(self.features | bit).unwrap();
        for (index, ring) in vm.queues.iter().enumerate() {
            let flags = if on { VRING_F_LOG } else { 0 };
            let addr = ring.vring_addr(flags);
            self.client.set_vring_addr(index as u32, &addr).unwrap();
        }
    }

    /// Stops the rings with what is in flight left to the target; where they would go on.
    pub fn stop_undrained(&self) -> [u32; QUEUES] {
        let bit = protocol_feature::GET_VRING_BASE_SKIP_DRAIN;
        assert_ne!(self.protocol & bit, 0);
        let stop = |index| self.client.get_vring_base_skip_drain(index as u32);
        std::array::from_fn(|index| stop(index).unwrap())
    }

    /// Stops the rings; where they would go on.
    pub fn stop(&self) -> [u32; QUEUES] {
        std::array::from_fn(|index| self.client.get_vring_base(index as u32).unwrap())
    }
}
