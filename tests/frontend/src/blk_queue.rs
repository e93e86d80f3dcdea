//! A virtqueue with the buffers of a block driver: request slots that were taken from guest memory once, so
//! that a request in steady state allocates nothing.

use std::sync::Arc;
use std::time::Duration;

use crate::blk::{self, Segment, request_type, status};
use crate::error::{Error, Result};
use crate::memory::{Memory, Region};
use crate::ring::{Buf, DESC_F_INDIRECT, Virtqueue};

/// What a request does. Data is copied into the slot's buffer, but for the `InPlace` writes.
#[derive(Debug, Clone, Copy)]
pub enum Op<'a> {
    /// Read `len` bytes.
    Read {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `data`.
    Write {
        /// First sector.
        sector: u64,
        /// What to write.
        data: &'a [u8],
    },
    /// Write the `len` bytes that the slot's buffer holds already.
    WriteInPlace {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u32,
    },
    /// Flush.
    Flush,
    /// Get the device's ID string (20 bytes).
    GetId,
    /// Discard ranges.
    Discard(&'a [Segment]),
    /// Write zeroes to ranges.
    WriteZeroes(&'a [Segment]),
    /// Anything: a type, the header's sector, what the device reads after the header, and how many bytes it
    /// may write before the status.
    Raw {
        /// The request type.
        request_type: u32,
        /// The header's sector field.
        sector: u64,
        /// Device-readable data.
        out: &'a [u8],
        /// Device-writable bytes.
        in_len: u32,
    },
}

/// A finished request. Its slot stays taken, and its data in place, until [`BlkQueue::release`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The value given at submission.
    pub token: u64,
    /// The status byte; [`status::UNTOUCHED`] when the device wrote none.
    pub status: u8,
    /// Bytes written, by the device's word.
    pub used_len: u32,
    /// The slot.
    pub slot: u16,
}

/// How the slots of a queue are laid out.
#[derive(Debug, Clone, Copy)]
pub struct SlotOptions {
    /// Slots, the most requests in flight.
    pub count: u16,
    /// Bytes of the data buffer of each.
    pub data_len: u32,
    /// Bytes that a data descriptor covers at most.
    pub segment_len: u32,
    /// Bytes by which the data buffers are off a page boundary.
    pub misalign: u32,
    /// Whether requests go in through indirect tables.
    pub indirect: bool,
    /// The memory region of the data buffers; any when absent.
    pub data_region: Option<usize>,
}

impl Default for SlotOptions {
    fn default() -> Self {
        Self {
            count: 64,
            data_len: 64 << 10,
            segment_len: u32::MAX,
            misalign: 0,
            indirect: false,
            data_region: None,
        }
    }
}

/// Offset of the status byte in a slot's control block.
const STATUS_AT: u64 = 16;
/// Offset of the indirect table.
const TABLE_AT: u64 = 32;

/// A block device's virtqueue.
#[derive(Debug)]
pub struct BlkQueue {
    /// The ring below.
    pub ring: Virtqueue,
    control_region: Arc<Region>,
    data_region: Arc<Region>,
    control: u64,
    control_stride: u64,
    data: u64,
    data_stride: u64,
    options: SlotOptions,
    max_bufs: usize,
    free: Vec<u16>,
    tokens: Vec<u64>,
    bufs: Vec<Buf>,
}

impl BlkQueue {
    /// Takes the slots from `memory`.
    ///
    /// # Panics
    /// When the memory is too small for them.
    pub fn new(memory: &Memory, ring: Virtqueue, options: SlotOptions) -> Self {
        let count = u64::from(options.count);
        let segments = options.data_len.div_ceil(options.segment_len).max(1) as usize;
        let max_bufs = segments + 2;
        let control_stride = (TABLE_AT + 16 * max_bufs as u64).next_multiple_of(64);
        let control = memory.alloc(control_stride * count, 64);
        let data_stride =
            (u64::from(options.data_len) + u64::from(options.misalign)).next_multiple_of(4096);
        let data = match options.data_region {
            Some(region) => memory.alloc_in(region, data_stride * count, 4096),
            None => memory.alloc(data_stride * count, 4096),
        };
        Self {
            control_region: memory.region_of(control, control_stride * count).clone(),
            data_region: memory.region_of(data, data_stride * count).clone(),
            ring,
            control,
            control_stride,
            data: data + u64::from(options.misalign),
            data_stride,
            options,
            max_bufs,
            free: (0..options.count).rev().collect(),
            tokens: vec![0; usize::from(options.count)],
            bufs: Vec::with_capacity(max_bufs),
        }
    }

    /// Forgets all requests in flight and clears the ring.
    pub fn reset(&mut self) {
        self.ring.reset();
        self.free.clear();
        self.free.extend((0..self.options.count).rev());
    }

    /// Requests that are submitted and not released.
    pub fn slots_taken(&self) -> usize {
        usize::from(self.options.count) - self.free.len()
    }

    /// Guest address of a slot's data.
    pub fn data_addr(&self, slot: u16) -> u64 {
        self.data + self.data_stride * u64::from(slot)
    }

    /// Guest address of a slot's header.
    pub fn control_addr(&self, slot: u16) -> u64 {
        self.control + self.control_stride * u64::from(slot)
    }

    fn control_ptr(&self, slot: u16) -> *mut u8 {
        self.control_region
            .host(self.control_addr(slot), self.control_stride)
    }

    /// A slot's data buffer.
    ///
    /// # Panics
    /// When `len` is more than the slots were made for.
    pub fn data_ptr(&self, slot: u16, len: u32) -> *mut u8 {
        assert!(
            len <= self.options.data_len,
            "{len} bytes do not fit a slot"
        );
        self.data_region.host(self.data_addr(slot), u64::from(len))
    }

    /// Copies out the start of a slot's data.
    pub fn copy_data(&self, slot: u16, to: &mut [u8]) {
        let from = self.data_ptr(slot, to.len() as u32);
        // SAFETY: `from` is valid for that length, and no Rust reference points into guest memory.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    fn put_data(&self, slot: u16, from: &[u8]) {
        let to = self.data_ptr(slot, from.len() as u32);
        // SAFETY: as in `copy_data`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) };
    }

    fn put_segments(&self, slot: u16, segments: &[Segment]) -> u32 {
        let len = 16 * segments.len() as u32;
        let to = self.data_ptr(slot, len);
        for (i, segment) in segments.iter().enumerate() {
            let bytes = segment.to_bytes();
            // SAFETY: `to` is valid for 16 bytes a segment.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.add(16 * i), 16) };
        }
        len
    }

    /// Puts a request in the ring; it becomes visible to the device with [`Virtqueue::publish`]. Returns its
    /// slot.
    ///
    /// # Errors
    /// `Full` when there is no slot or no descriptor left.
    ///
    /// # Panics
    /// When the data does not fit a slot.
    pub fn submit(&mut self, op: Op<'_>, token: u64) -> Result<u16> {
        let slot = *self.free.last().ok_or(Error::Full)?;
        let (ty, sector, out_len, in_len) = match op {
            Op::Read { sector, len } => (request_type::IN, sector, 0, len),
            Op::Write { sector, data } => {
                self.put_data(slot, data);
                (request_type::OUT, sector, data.len() as u32, 0)
            }
            Op::WriteInPlace { sector, len } => (request_type::OUT, sector, len, 0),
            Op::Flush => (request_type::FLUSH, 0, 0, 0),
            Op::GetId => (request_type::GET_ID, 0, 0, 20),
            Op::Discard(s) => (request_type::DISCARD, 0, self.put_segments(slot, s), 0),
            Op::WriteZeroes(s) => (request_type::WRITE_ZEROES, 0, self.put_segments(slot, s), 0),
            Op::Raw {
                request_type,
                sector,
                out,
                in_len,
            } => {
                self.put_data(slot, out);
                (request_type, sector, out.len() as u32, in_len)
            }
        };
        let head = blk::header(ty, sector);
        let control = self.control_ptr(slot);
        // SAFETY: the control block holds the header, the status byte and the table.
        unsafe {
            std::ptr::copy_nonoverlapping(head.as_ptr(), control, head.len());
            control
                .add(STATUS_AT as usize)
                .write_volatile(status::UNTOUCHED);
        }
        self.enqueue(slot, out_len, in_len)?;
        self.free.pop();
        self.tokens[usize::from(slot)] = token;
        Ok(slot)
    }

    fn enqueue(&mut self, slot: u16, out_len: u32, in_len: u32) -> Result<()> {
        let control = self.control_addr(slot);
        let data = self.data_addr(slot);
        assert!(
            out_len.max(in_len) <= self.options.data_len,
            "data does not fit a slot"
        );
        self.bufs.clear();
        self.bufs.push(Buf::readable(control, 16));
        for (len, write) in [(out_len, false), (in_len, true)] {
            let mut at = 0;
            while at < len {
                let n = (len - at).min(self.options.segment_len);
                self.bufs.push(Buf {
                    addr: data + u64::from(at),
                    len: n,
                    write,
                });
                at += n;
            }
        }
        self.bufs.push(Buf::writable(control + STATUS_AT, 1));
        let added = if self.options.indirect {
            assert!(self.bufs.len() <= self.max_bufs);
            // SAFETY: the control block has the table behind its other parts.
            let table = unsafe { self.control_ptr(slot).add(TABLE_AT as usize) };
            for (i, buf) in self.bufs.iter().enumerate() {
                let entry = self.ring.table_entry(buf, i, i + 1 == self.bufs.len());
                // SAFETY: the table has room for `max_bufs` entries.
                unsafe { std::ptr::copy_nonoverlapping(entry.as_ptr(), table.add(16 * i), 16) };
            }
            let len = 16 * self.bufs.len() as u32;
            self.ring
                .add_one(control + TABLE_AT, len, DESC_F_INDIRECT, u64::from(slot))
        } else {
            self.ring.add(&self.bufs, u64::from(slot))
        };
        added.map(drop).ok_or(Error::Full)
    }

    fn finish(&self, slot: u16, used_len: u32) -> Completion {
        // SAFETY: the status byte is in the control block.
        let status = unsafe {
            self.control_ptr(slot)
                .add(STATUS_AT as usize)
                .read_volatile()
        };
        Completion {
            token: self.tokens[usize::from(slot)],
            status,
            used_len,
            slot,
        }
    }

    /// Takes a completion if there is one.
    ///
    /// # Errors
    /// Those of [`Virtqueue::pop_used`].
    pub fn poll(&mut self) -> Result<Option<Completion>> {
        let used = self.ring.pop_used()?;
        Ok(used.map(|u| self.finish(u.token as u16, u.len)))
    }

    /// Waits for a completion.
    ///
    /// # Errors
    /// Those of [`Virtqueue::wait_used`].
    pub fn wait(&mut self, timeout: Duration) -> Result<Completion> {
        let used = self.ring.wait_used(timeout)?;
        Ok(self.finish(used.token as u16, used.len))
    }

    /// Gives a slot back.
    pub fn release(&mut self, completion: Completion) {
        self.free.push(completion.slot);
    }

    /// One request from submission to completion, with the data that it read. No other may be in flight.
    ///
    /// # Errors
    /// Those of [`BlkQueue::submit`] and [`BlkQueue::wait`].
    pub fn run(&mut self, op: Op<'_>, timeout: Duration) -> Result<(Completion, Vec<u8>)> {
        let in_len = match op {
            Op::Read { len, .. } => len,
            Op::GetId => 20,
            Op::Raw { in_len, .. } => in_len,
            _ => 0,
        };
        self.submit(op, u64::MAX)?;
        self.ring.publish();
        let completion = self.wait(timeout)?;
        let mut data = vec![0; in_len as usize];
        self.copy_data(completion.slot, &mut data);
        self.release(completion);
        Ok((completion, data))
    }
}
