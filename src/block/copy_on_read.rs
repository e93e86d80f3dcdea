//! Copy-on-read: what a guest reads through a hole of the top image becomes the image's own, so that a base that
//! is far away is read once.
//!
//! A read that meets a hole reads what the guest asked for into a buffer, gives it to the guest, and is done. A
//! task of the same worker then reads what is missing of the units around it (clusters, or subclusters), and
//! stores all of it by [`super::qcow2::Qcow2::store_copy`]. Not the guest's memory is what is stored: the guest
//! may have changed it by then, or have read several things into one page that it does not want.
//!
//! A copy is a favour, and gives way to everything else:
//!
//! - Copies under way, and their memory, are bounded for each worker. Who finds no room, or the unit in the
//!   hands of another copy, reads past it.
//! - Layers below are read with nothing held: no claim, no pin. The top is looked at again before anything is
//!   stored there, see `qcow2/copied.rs`.
//! - Who wants to change the disk's size, to give the image back, or has the guest migrated waits for the storing
//!   only, which is local. A copy that still reads is let go of: its read ends when it ends, and nothing is stored.
//!   Cancelling it would mean to wait for a base that is far away, or to cut the connection that others use.
//! - An error is counted, logged, and keeps copies from being begun for [`PAUSE`]; the guest does not learn of it.
//!   So a full file system is asked for space, and complained about, once in that time.

use std::fmt;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::reactor::{AlignedBuf, Io, Sg};

use super::active::ActiveDisk;
use super::error::{Error, Result};
use super::stack::read_chain;

/// Copies under way of one worker, and their bytes, at most.
const MAX_COPIES: usize = 8;
const MAX_BYTES: u64 = 4 << 20;
/// Bytes of one copy, if a unit is not larger.
const MAX_COPY: u64 = 1 << 20;
/// How long nothing is copied after an error.
pub(super) const PAUSE: Duration = Duration::from_secs(30);

/// What copy-on-read has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyStats {
    /// Bytes of the layers below that the top image has got.
    pub stored_bytes: u64,
    /// Reads of holes of which no copy was made: too many were under way, or somebody was in the way.
    pub passed_over: u64,
    /// Copies that failed.
    pub failed: u64,
}

impl fmt::Display for CopyStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} KiB stored, {} reads passed over, {} copies failed",
            self.stored_bytes >> 10,
            self.passed_over,
            self.failed
        )
    }
}

/// The copies of one disk in use.
#[derive(Debug)]
pub(super) struct Copies {
    /// Bytes that are copied as a whole, a power of two.
    unit: u64,
    disk: OnceLock<Weak<ActiveDisk>>,
    book: Mutex<Book>,
    stored_bytes: AtomicU64,
    passed_over: AtomicU64,
    failed: AtomicU64,
}

#[derive(Debug, Default)]
struct Book {
    under_way: Vec<Held>,
    /// Those that nobody waits for any more; they still have their memory.
    let_go: Vec<Held>,
    next: u64,
    /// Who does not want copies now.
    stopped: u32,
    /// After an error.
    not_before: Option<Instant>,
    /// Who waits until none is under way.
    waiters: Vec<Waker>,
}

#[derive(Debug)]
struct Held {
    number: u64,
    worker: usize,
    /// Bytes of the disk, whole units.
    range: Range<u64>,
    /// Nothing is to be stored.
    cancelled: bool,
    /// It reads what the guest has not asked for.
    reads_ahead: bool,
}

/// What is to become of a read of a hole.
pub(super) enum Plan {
    /// The first so many bytes of it are read with a copy.
    Copy(Copy, u64),
    /// The first so many bytes of it are read as they are.
    Pass(u64),
}

/// A copy under way. Dropped, it is not.
#[derive(Debug)]
pub(super) struct Copy {
    copies: Arc<Copies>,
    disk: Arc<ActiveDisk>,
    number: u64,
    range: Range<u64>,
}

/// As long as it is there no copy is begun.
#[derive(Debug)]
pub(super) struct Stopped<'a>(&'a Copies);

impl Copies {
    /// Copies of units of `unit` bytes.
    pub(super) fn new(unit: u64) -> Self {
        Self {
            unit,
            disk: OnceLock::new(),
            book: Mutex::default(),
            stored_bytes: AtomicU64::new(0),
            passed_over: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Says whose they are. None is made before.
    pub(super) fn belong_to(&self, disk: Weak<ActiveDisk>) {
        let _first = self.disk.set(disk);
    }

    pub(super) fn stats(&self) -> CopyStats {
        CopyStats {
            stored_bytes: self.stored_bytes.load(Ordering::Relaxed),
            passed_over: self.passed_over.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to become of a read of `len` bytes of a hole at `offset`.
    pub(super) fn plan(self: &Arc<Self>, io: &Io, offset: u64, len: u64) -> Plan {
        let Some(disk) = self.disk.get().and_then(Weak::upgrade) else {
            return Plan::Pass(len);
        };
        if disk.top().0.is_eager() {
            return Plan::Pass(len);
        }
        let worker = io.worker();
        let start = offset & !(self.unit - 1);
        let mut book = self.book();
        if book.stopped > 0 || !book.is_over_error() {
            return Plan::Pass(len);
        }
        let all = book.under_way.iter().chain(&book.let_go);
        let mine = all.filter(|held| held.worker == worker);
        let (count, bytes) = mine.fold((0, 0), |(count, bytes), held| {
            (count + 1, bytes + held.range.end - held.range.start)
        });
        // A unit may be larger than what there is for all.
        let room = match bytes {
            0 => MAX_BYTES.max(self.unit),
            _ => MAX_BYTES.saturating_sub(bytes),
        };
        let most = room.min(MAX_COPY.max(self.unit)) & !(self.unit - 1);
        let mut end = offset.saturating_add(len).next_multiple_of(self.unit);
        for held in &book.under_way {
            if held.range.contains(&start) {
                // The rest may be nobody's.
                self.passed_over.fetch_add(1, Ordering::Relaxed);
                return Plan::Pass(len.min(held.range.end - offset));
            }
            if held.range.start > start {
                end = end.min(held.range.start);
            }
        }
        end = end.min(start + most);
        if count >= MAX_COPIES || end <= start {
            self.passed_over.fetch_add(1, Ordering::Relaxed);
            return Plan::Pass(len);
        }
        let number = book.next;
        book.next += 1;
        book.under_way.push(Held {
            number,
            worker,
            range: start..end,
            cancelled: false,
            reads_ahead: false,
        });
        let copy = Copy {
            copies: self.clone(),
            disk,
            number,
            range: start..end,
        };
        Plan::Copy(copy, len.min(end - offset))
    }

    /// Has no copy begun until what it returns is dropped, and has those store nothing that have not begun to. Waits
    /// for the others, and for the guest's reads.
    pub(super) async fn stop(&self) -> Stopped<'_> {
        let stopped = Stopped(self);
        {
            let mut book = self.book();
            book.stopped += 1;
            let (let_go, mut left): (Vec<_>, Vec<_>) = std::mem::take(&mut book.under_way)
                .into_iter()
                .partition(|held| held.reads_ahead);
            left.iter_mut().for_each(|held| held.cancelled = true);
            book.under_way = left;
            book.let_go.extend(let_go);
        }
        poll_fn(|cx| {
            let mut book = self.book();
            if book.under_way.is_empty() {
                return Poll::Ready(());
            }
            book.waiters.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        stopped
    }

    fn note_failure(&self, disk: &ActiveDisk, error: &Error) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut book = self.book();
        if !book.is_over_error() {
            // One of several that were under way.
            return;
        }
        book.not_before = Some(Instant::now() + PAUSE);
        drop(book);
        log::warn!(
            "{}: copy-on-read: {error}; the guest is served, and nothing is copied for {} s",
            disk.name().display(),
            PAUSE.as_secs()
        );
    }

    /// As if [`PAUSE`] had passed.
    #[cfg(test)]
    pub(super) fn end_pause(&self) {
        self.book().not_before = None;
    }

    /// Copies under way.
    #[cfg(test)]
    pub(super) fn under_way(&self) -> usize {
        self.book().under_way.len()
    }
}

impl Book {
    fn is_over_error(&mut self) -> bool {
        if self.not_before.is_some_and(|then| Instant::now() >= then) {
            self.not_before = None;
        }
        self.not_before.is_none()
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.book().stopped -= 1;
    }
}

impl Copy {
    /// Reads what the layers below show at `offset`, the beginning of what the copy was planned for, and has a task
    /// do the rest. Fills `to`.
    ///
    /// # Errors
    /// Those of the layers below, for the guest: it is what it asked for.
    pub(super) async fn read(self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        let mut buf = io.buf((self.range.end - self.range.start) as usize);
        let at = (offset - self.range.start) as usize;
        let known = at..at + to.len();
        let (_, below) = self.disk.top();
        let part = buf.sg().slice(at, to.len());
        read_chain(below, io, offset, part).await?;
        to.copy_from(&buf[known.clone()]);
        let task_io = io.clone();
        let _task = io.spawn(async move {
            let (copies, disk) = (self.copies.clone(), self.disk.clone());
            match self.finish(&task_io, buf, known).await {
                Ok(0) => {
                    copies.passed_over.fetch_add(1, Ordering::Relaxed);
                }
                Ok(stored) => {
                    copies.stored_bytes.fetch_add(stored, Ordering::Relaxed);
                }
                Err(error) => copies.note_failure(&disk, &error),
            }
        });
        Ok(())
    }

    /// Reads what is not `known` of `buf`, and stores it. Bytes stored.
    async fn finish(self, io: &Io, mut buf: AlignedBuf, known: Range<usize>) -> Result<u64> {
        let (top, below) = self.disk.top();
        let start = self.range.start;
        let len = buf.len();
        if !top.wants_copy(start, len as u64) {
            return Ok(0);
        }
        for missing in [0..known.start, known.end..len] {
            if missing.is_empty() {
                continue;
            }
            let offset = start + missing.start as u64;
            let part = buf.sg().slice(missing.start, missing.len());
            if !self.goes_on(true) {
                return Ok(0);
            }
            let read = read_chain(below, io, offset, part).await;
            if !self.goes_on(false) {
                return Ok(0);
            }
            read?;
        }
        if !self.goes_on(false) || !top.wants_copy(start, len as u64) {
            return Ok(0);
        }
        top.store_copy(io, start, &mut buf).await
    }

    /// False if nobody wants the copy any more. Else it goes on, by reading ahead or by something else, which is
    /// waited for.
    fn goes_on(&self, reads_ahead: bool) -> bool {
        let mut book = self.copies.book();
        let mut all = book.under_way.iter_mut();
        let Some(held) = all.find(|held| held.number == self.number) else {
            return false;
        };
        held.reads_ahead = reads_ahead;
        !held.cancelled
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let mut book = self.copies.book();
        book.let_go.retain(|held| held.number != self.number);
        book.under_way.retain(|held| held.number != self.number);
        if book.under_way.is_empty() {
            let waiters = std::mem::take(&mut book.waiters);
            drop(book);
            waiters.into_iter().for_each(Waker::wake);
        }
    }
}
