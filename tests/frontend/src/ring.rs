//! Virtqueues, the driver's side: [`split`] and [`packed`], and what they share.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::sys::EventFd;

pub mod packed;
pub mod split;
mod virtqueue;

pub use packed::PackedQueue;
pub use split::SplitQueue;
pub use virtqueue::Virtqueue;

/// Descriptor flag: the chain goes on at `next`.
pub const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer is a table of descriptors.
pub const DESC_F_INDIRECT: u16 = 4;
/// Available ring flag: no interrupts please.
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Used ring flag: no kicks please.
pub const USED_F_NO_NOTIFY: u16 = 1;

/// A descriptor, as it lies in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Desc {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Flags.
    pub flags: u16,
    /// Index of the next descriptor, when the flags say there is one.
    pub next: u16,
}

impl Desc {
    /// The sixteen bytes of the descriptor.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

impl Buf {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            write: false,
        }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self {
            addr,
            len,
            write: true,
        }
    }
}

/// The bytes of an indirect table for `bufs`.
pub fn indirect_table(bufs: &[Buf]) -> Vec<u8> {
    let mut table = Vec::with_capacity(16 * bufs.len());
    for (i, buf) in bufs.iter().enumerate() {
        let last = i + 1 == bufs.len();
        table.extend_from_slice(&chain_desc(buf, (!last).then_some(i as u16 + 1)).to_bytes());
    }
    table
}

fn chain_desc(buf: &Buf, next: Option<u16>) -> Desc {
    Desc {
        addr: buf.addr,
        len: buf.len,
        flags: if next.is_some() { DESC_F_NEXT } else { 0 }
            | if buf.write { DESC_F_WRITE } else { 0 },
        next: next.unwrap_or(0),
    }
}

/// Where the three parts of a ring lie, by guest physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptor table; 16 bytes a descriptor.
    pub desc: u64,
    /// Available ring; 6 bytes and 2 a descriptor.
    pub avail: u64,
    /// Used ring; 6 bytes and 8 a descriptor.
    pub used: u64,
}

/// An entry of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain, as the device wrote it.
    pub id: u32,
    /// Bytes the device says it wrote.
    pub len: u32,
    /// The value given with the chain (zero for chains that went in by the raw calls).
    pub token: u64,
}

/// How completions are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notify {
    /// Spin on the used index; the device is told not to interrupt.
    Poll,
    /// Sleep on the call descriptor; a used buffer without a notification is an error.
    Call,
}

/// What became of a chain that may be too broken to complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// A used entry.
    Used {
        /// Head of the chain.
        id: u32,
        /// Bytes written, by the device's word.
        len: u32,
    },
    /// The queue's error descriptor was signalled.
    Broken,
    /// Neither, in the time given.
    Silence,
}

/// `vring_need_event` of the specification: did the index move past `event` between `old` and `new`?
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The three descriptors between a driver and its device.
#[derive(Debug)]
struct Lines {
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    err: Arc<EventFd>,
    /// Kicks sent.
    kicks: u64,
}

impl Lines {
    fn new() -> Result<Self> {
        Ok(Self {
            kick: Arc::new(EventFd::new()?),
            call: Arc::new(EventFd::new()?),
            err: Arc::new(EventFd::new()?),
            kicks: 0,
        })
    }

    fn kick(&mut self) {
        self.kicks += 1;
        // A full eventfd counter is a kick that is pending already.
        let _ = self.kick.signal();
    }
}

/// What waiting for a used buffer needs of a ring.
trait Driver {
    fn pop(&mut self) -> Result<Option<Used>>;
    fn lines(&self) -> &Lines;
    fn notify(&self) -> Notify;
}

/// Waits for the next used buffer, in the way that the queue was told to.
fn wait_used(queue: &mut impl Driver, timeout: Duration) -> Result<Used> {
    if let Some(used) = queue.pop()? {
        return Ok(used);
    }
    let deadline = Instant::now() + timeout;
    match queue.notify() {
        Notify::Poll => spin(queue, deadline),
        Notify::Call => sleep(queue, deadline),
    }
}

fn spin(queue: &mut impl Driver, deadline: Instant) -> Result<Used> {
    loop {
        for _ in 0..256 {
            if let Some(used) = queue.pop()? {
                return Ok(used);
            }
            std::hint::spin_loop();
        }
        if Instant::now() >= deadline {
            return Err(Error::TimedOut("a used buffer"));
        }
        std::thread::yield_now();
    }
}

fn sleep(queue: &mut impl Driver, deadline: Instant) -> Result<Used> {
    loop {
        // The event index was set when the last buffer was taken, before the ring was last looked at: see the
        // rule at "Used Buffer Notification Suppression".
        fence(Ordering::SeqCst);
        if let Some(used) = queue.pop()? {
            return Ok(used);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if !queue.lines().call.wait(left)? {
            return match queue.pop()? {
                Some(_) => Err(Error::LostNotification),
                None => Err(Error::TimedOut("a used buffer")),
            };
        }
    }
}
