//! Requests (section 5.2.6, "Device Operation").
//!
//! A chain is a header of 16 readable bytes, data, and a writable status byte at its very end, cut
//! into descriptors in whatever way the driver likes (section 2.7.4, "Message Framing").

use libc::iovec;
use thiserror::Error;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::features::{DISCARD, WRITE_ZEROES};
use super::{DeviceLimits, SECTOR_SIZE};
use crate::virtio::ring::chain::{ChainBuf, read_pair};

/// The longest read or write in bytes. Linux moves less than 2 GiB in one call and QEMU takes no more
/// in a request; it also keeps `used.len` inside its 32 bits.
pub const MAX_TRANSFER: u64 = i32::MAX as u64 & !(SECTOR_SIZE - 1);

/// Size of `struct virtio_blk_discard_write_zeroes`.
const SEGMENT_SIZE: u64 = 16;

const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// Device or driver error.
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    /// The device does not know this request.
    Unsupp = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What a request asks for, checked against the disk. Offsets and lengths in bytes, multiples of 512.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read into [`Parsed::data`].
    Read {
        /// Offset on the disk.
        offset: u64,
        /// Length; may be 0.
        len: u64,
    },
    /// Write [`Parsed::data`].
    Write {
        /// Offset on the disk.
        offset: u64,
        /// Length; may be 0.
        len: u64,
    },
    /// Everything completed before must be durable before this completes.
    Flush,
    /// Put the device ID into [`Parsed::data`], see [`fill_id`].
    GetId,
    /// Discard [`Parsed::segments`].
    Discard,
    /// Zero [`Parsed::segments`].
    WriteZeroes,
}

/// One range of a discard or write-zeroes request, inside the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Offset on the disk in bytes.
    pub offset: u64,
    /// Length in bytes, not 0.
    pub len: u64,
    /// Write-zeroes may deallocate, as long as zeroes are read afterwards. Never set on a discard.
    pub unmap: bool,
}

/// Where a request is answered: its status byte, and what may be said to have been written.
///
/// It points into guest memory: the [`GuestMemory`](crate::virtio::memory::GuestMemory) that the
/// chain was read with must be kept until the request is finished.
#[derive(Debug, Clone, Copy)]
pub struct Reply {
    status: *mut u8,
    written_ok: u32,
    written_failed: u32,
}

// SAFETY: an address of guest memory and two numbers; nothing is bound to a thread.
unsafe impl Send for Reply {}

impl Reply {
    /// Writes the status byte and gives the length for the used ring.
    ///
    /// `used.len` promises that the *first* that many writable bytes of the chain were written
    /// (section 2.7.8.2), and the status is the last one. So data + 1 when all of it was written.
    /// A failed read has written the status but promises nothing of the data before it, and says 0;
    /// a request with no writable byte but the status says 1, failed or not.
    #[inline]
    pub fn finish(&self, status: Status) -> u32 {
        // SAFETY: `status` is one byte of a writable buffer of the chain, mapped while the snapshot
        // is kept.
        unsafe { self.status.write_volatile(status as u8) };
        if status == Status::Ok {
            self.written_ok
        } else {
            self.written_failed
        }
    }

    /// The status byte's host address, for the dirty log.
    pub fn status_ptr(&self) -> *const u8 {
        self.status
    }
}

/// A request to be executed.
#[derive(Debug, Clone, Copy)]
pub struct Parsed {
    /// What to do.
    pub command: Command,
    /// Where to answer.
    pub reply: Reply,
    data: (u32, u32),
}

impl Parsed {
    /// The data buffers: header and status are not part of them. Empty for flush, discard and
    /// write-zeroes.
    ///
    /// `chain` is the one the request was parsed from; with another one the answer is some other
    /// buffers, or none.
    #[inline]
    pub fn data<'a>(&self, chain: &'a ChainBuf) -> &'a [iovec] {
        chain
            .iovecs
            .get(self.data.0 as usize..self.data.1 as usize)
            .unwrap_or_default()
    }

    /// Whether pieces of memory can be put behind the data: nothing else is there.
    pub fn may_grow(&self, chain: &ChainBuf) -> bool {
        let moves = matches!(self.command, Command::Read { .. } | Command::Write { .. });
        moves && self.data.1 as usize == chain.iovecs.len()
    }

    /// Puts pieces behind the data, that are to be moved with them: only where they [may grow](Parsed::may_grow). They
    /// are guest memory of the same snapshot. Returns where the data ended, for [`Parsed::shrink`]. What was asked for,
    /// [`Parsed::command`], stays as it is.
    pub fn grow(&mut self, chain: &mut ChainBuf, pieces: &[iovec]) -> u32 {
        let end = self.data.1;
        chain.iovecs.extend_from_slice(pieces);
        self.data.1 = chain.iovecs.len() as u32;
        end
    }

    /// Takes away what is behind `end`.
    pub fn shrink(&mut self, chain: &mut ChainBuf, end: u32) {
        chain.iovecs.truncate(end as usize);
        self.data.1 = end;
    }

    /// The ranges of a discard or write-zeroes. They were copied out of guest memory and checked
    /// before the first of them is handed out; ranges of no sectors are left out.
    #[inline]
    pub fn segments<'a>(&self, chain: &'a ChainBuf) -> impl Iterator<Item = Segment> + use<'a> {
        chain.segments.iter().copied()
    }

    /// See [`Reply::finish`].
    #[inline]
    pub fn finish(&self, status: Status) -> u32 {
        self.reply.finish(status)
    }
}

/// What to do with a chain.
#[derive(Debug, Clone, Copy)]
pub enum Outcome {
    /// Execute it, then finish it.
    Execute(Parsed),
    /// Finish it with this status, without I/O.
    Finish {
        /// Why.
        status: Status,
        /// Where.
        reply: Reply,
    },
    /// No room for a status: complete it with length 0.
    Broken,
}

/// Finds out what a chain asks for, and checks it.
///
/// In this order: no writable byte is [`Outcome::Broken`]; a header of fewer than 16 bytes is IOERR;
/// an unknown type is UNSUPP; a change of a read-only disk is IOERR, whatever was negotiated; a
/// discard or write-zeroes that was not negotiated is UNSUPP, as is one with an unknown flag or UNMAP
/// on a discard; lengths and ranges that do not fit are IOERR. The specification says nothing of a
/// driver that exceeds `max_*_sectors` or `max_*_seg`: IOERR ("device or driver error"), as QEMU
/// answers for sectors.
#[inline]
pub fn parse(chain: &mut ChainBuf, limits: &DeviceLimits, features: u64) -> Outcome {
    let Some(status) = chain.take_last_writable() else {
        return Outcome::Broken;
    };
    // What is left after the status is taken: a read's data.
    let in_len = chain.writable_len();
    let only_status = u32::from(in_len == 0);
    let mut reply = Reply {
        status,
        written_ok: only_status,
        written_failed: only_status,
    };
    let fail = |status| Outcome::Finish { status, reply };

    let Some(((first, sector), data_start)) = chain.take_first_pair() else {
        return fail(Status::IoErr);
    };
    let readable = (data_start as u32, chain.split as u32);
    let writable = (chain.split as u32, chain.iovecs.len() as u32);

    // The upper half of `first` is reserved (formerly the priority).
    let (command, data) = match first as u32 {
        VIRTIO_BLK_T_IN => {
            let Some(offset) = transfer(limits, sector, in_len) else {
                return fail(Status::IoErr);
            };
            // At most MAX_TRANSFER + 1.
            reply.written_ok = in_len as u32 + 1;
            let len = in_len;
            (Command::Read { offset, len }, writable)
        }
        VIRTIO_BLK_T_OUT => {
            let len = chain.readable_len();
            match transfer(limits, sector, len) {
                Some(offset) if !limits.read_only => (Command::Write { offset, len }, readable),
                _ => return fail(Status::IoErr),
            }
        }
        // The sector must be 0 (a driver's duty); a flush with one is a flush all the same.
        VIRTIO_BLK_T_FLUSH => (Command::Flush, (0, 0)),
        VIRTIO_BLK_T_GET_ID => {
            if in_len == 0 {
                return fail(Status::IoErr);
            }
            reply.written_ok = if in_len <= ID_BYTES as u64 {
                in_len as u32 + 1
            } else {
                // Only the first 20 bytes are written.
                ID_BYTES as u32
            };
            (Command::GetId, writable)
        }
        VIRTIO_BLK_T_DISCARD => {
            let allowed = Ranges {
                negotiated: features & DISCARD != 0,
                known_flags: 0,
                max_segments: limits.max_discard_segments,
                max_bytes: limits.max_discard_bytes,
            };
            match copy_segments(chain, readable, limits, &allowed) {
                Ok(()) => (Command::Discard, (0, 0)),
                Err(status) => return fail(status),
            }
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            let allowed = Ranges {
                negotiated: features & WRITE_ZEROES != 0,
                known_flags: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
                max_segments: limits.max_write_zeroes_segments,
                max_bytes: limits.max_write_zeroes_bytes,
            };
            match copy_segments(chain, readable, limits, &allowed) {
                Ok(()) => (Command::WriteZeroes, (0, 0)),
                Err(status) => return fail(status),
            }
        }
        _ => return fail(Status::Unsupp),
    };
    Outcome::Execute(Parsed {
        command,
        reply,
        data,
    })
}

/// The byte offset of a read or write of `len` bytes, when it lies inside the disk.
#[inline]
fn transfer(limits: &DeviceLimits, sector: u64, len: u64) -> Option<u64> {
    if len % SECTOR_SIZE != 0 || len > MAX_TRANSFER {
        return None;
    }
    inside(limits, sector, len)
}

#[inline]
fn inside(limits: &DeviceLimits, sector: u64, len: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR_SIZE)?;
    let end = offset.checked_add(len)?;
    (end <= limits.usable_capacity()).then_some(offset)
}

/// What a discard or a write-zeroes may be.
struct Ranges {
    negotiated: bool,
    known_flags: u32,
    max_segments: u32,
    max_bytes: u64,
}

/// Copies the segments of a discard or write-zeroes out of guest memory and checks all of them.
fn copy_segments(
    chain: &mut ChainBuf,
    data: (u32, u32),
    limits: &DeviceLimits,
    allowed: &Ranges,
) -> Result<(), Status> {
    if limits.read_only {
        return Err(Status::IoErr);
    }
    if !allowed.negotiated {
        return Err(Status::Unsupp);
    }
    let len = chain.readable_len();
    let count = len / SEGMENT_SIZE;
    if len % SEGMENT_SIZE != 0 || count == 0 || count > u64::from(allowed.max_segments) {
        return Err(Status::IoErr);
    }
    let (segments, iovecs) = (&mut chain.segments, &chain.iovecs);
    segments
        .try_reserve(count as usize)
        .map_err(|_| Status::IoErr)?;
    let mut cursor = Cursor {
        buffers: &iovecs[data.0 as usize..data.1 as usize],
        used: 0,
    };
    // An unknown flag anywhere is UNSUPP by a MUST of the specification, so a bad range is only
    // reported once all the flags were seen.
    let mut outside = false;
    for _ in 0..count {
        let (sector, rest) = cursor.next_pair();
        let sectors = u64::from(rest as u32);
        let flags = (rest >> 32) as u32;
        if flags & !allowed.known_flags != 0 {
            return Err(Status::Unsupp);
        }
        let len = sectors * SECTOR_SIZE;
        match inside(limits, sector, len) {
            Some(offset) if len <= allowed.max_bytes => {
                if len > 0 {
                    segments.push(Segment {
                        offset,
                        len,
                        unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
                    });
                }
            }
            _ => outside = true,
        }
    }
    if outside {
        segments.clear();
        return Err(Status::IoErr);
    }
    Ok(())
}

/// Reads guest buffers from front to end, each byte once.
struct Cursor<'a> {
    buffers: &'a [iovec],
    used: usize,
}

impl Cursor<'_> {
    /// The next 16 bytes. The caller has checked that there are so many.
    fn next_pair(&mut self) -> (u64, u64) {
        if let Some(buffer) = self.buffers.first() {
            if buffer.iov_len - self.used >= 16 {
                // SAFETY: 16 bytes of guest memory inside this buffer.
                let pair = unsafe { read_pair(buffer.iov_base.cast::<u8>().add(self.used)) };
                self.used += 16;
                return pair;
            }
        }
        let mut bytes = [0u8; 16];
        for byte in &mut bytes {
            while self.buffers.first().is_some_and(|b| b.iov_len == self.used) {
                self.buffers = &self.buffers[1..];
                self.used = 0;
            }
            if let Some(buffer) = self.buffers.first() {
                // SAFETY: `used < iov_len`: a byte of guest memory inside this buffer.
                *byte = unsafe { buffer.iov_base.cast::<u8>().add(self.used).read_volatile() };
                self.used += 1;
            }
        }
        let all = u128::from_le_bytes(bytes);
        (all as u64, (all >> 64) as u64)
    }
}

/// Why a serial cannot be the device ID.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SerialError {
    /// More than 20 bytes.
    #[error("serial {0:?} has more than {ID_BYTES} bytes; choose a shorter one")]
    TooLong(String),
    /// Something else than printable ASCII.
    #[error("serial {0:?} may only have printable ASCII characters")]
    NotAscii(String),
}

/// The device ID: a string of up to 20 bytes, padded with NUL, not terminated when it has 20.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceId([u8; ID_BYTES]);

impl DeviceId {
    /// The ID that is this serial. The empty serial is an ID of NULs.
    ///
    /// # Errors
    /// The serial is too long, or not printable ASCII.
    pub fn new(serial: &str) -> Result<Self, SerialError> {
        if serial.len() > ID_BYTES {
            return Err(SerialError::TooLong(serial.to_owned()));
        }
        if !serial.bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Err(SerialError::NotAscii(serial.to_owned()));
        }
        let mut id = [0; ID_BYTES];
        id[..serial.len()].copy_from_slice(serial.as_bytes());
        Ok(Self(id))
    }

    /// All 20 bytes.
    pub fn as_bytes(&self) -> &[u8; ID_BYTES] {
        &self.0
    }
}

/// Writes the device ID into the data of a [`Command::GetId`]: as much of its 20 bytes as there is
/// room for. What a driver asks beyond 20 bytes is left alone.
pub fn fill_id(request: &Parsed, chain: &ChainBuf, id: &DeviceId) {
    let mut left = id.0.as_slice();
    for buffer in request.data(chain) {
        let part = buffer.iov_len.min(left.len());
        for (i, byte) in left[..part].iter().enumerate() {
            // SAFETY: a byte of guest memory inside this buffer.
            unsafe { buffer.iov_base.cast::<u8>().add(i).write_volatile(*byte) };
        }
        left = &left[part..];
    }
}

#[cfg(test)]
mod tests;
