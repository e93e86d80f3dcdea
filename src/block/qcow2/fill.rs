//! Completing incomplete clusters: what the guest has not written is copied from where it was.
//!
//! Each flush does it for all that there are when it begins, the housekeeping for those that are old, and a
//! task of its own, one run at a time, for the older half when records get scarce. Neighbouring clusters are
//! read from below at one go, and written together where their new clusters are neighbours, too. What is zeros,
//! where the new cluster reads as zeros, is not written.
//!
//! A fill that fails leaves the cluster as incomplete as it was: the sectors it has written are not marked.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::Range;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use super::Qcow2;
use super::below::Below;
use super::claim::Attempt;
use super::entry::{self, Entry, decode};
use super::record::Closing;
use super::units::GuestCluster;
use crate::block::error::Result;
use crate::block::stack::Window;
use crate::reactor::{AlignedBuf, Io, Sg};

/// Neighbouring clusters are completed together up to this many bytes.
const MAX_RUN: u64 = 256 << 10;
/// Bytes of clusters that are being completed at a time, and runs of them.
const MAX_BYTES: u64 = 4 << 20;
const DEPTH: u64 = 16;
/// A cluster with more gaps than this is read back, to be written at one go.
const MAX_GAPS: usize = 8;

/// A piece to be written: where it is in the buffer, and in the file.
struct Gap {
    at: Range<usize>,
    host: u64,
}

impl Qcow2 {
    /// From now on copies at once what must be copied, or, if not `eager`, puts it off again. Being eager
    /// begins with completing what was put off.
    ///
    /// # Errors
    /// Those of reading below and writing; what could not be completed is tried again by the next flush.
    pub async fn set_eager<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        eager: bool,
    ) -> Result<()> {
        self.records.set_eager(eager);
        if !eager {
            return Ok(());
        }
        self.fill_older(io, below, Duration::ZERO).await
    }

    /// Completes some clusters if there are many. What [`Qcow2::when_scarce`] calls for.
    pub async fn fill_ahead<B: Below + ?Sized>(&self, io: &Io, below: &B) {
        let Some(over) = self.records.filling.try_lock() else {
            return;
        };
        if *over {
            return;
        }
        // Again as long as it is needed: who finds no record free does not call for this.
        loop {
            let clusters = self.records.older_half();
            if clusters.is_empty() {
                return;
            }
            if let Err(error) = self.fill(io, below, &clusters, 1).await {
                // The guest learns of it by its next flush.
                log::warn!("completing clusters ahead of a flush: {error}");
                return;
            }
        }
    }

    /// Says what to call when it is time for [`Qcow2::fill_ahead`]; it must not do that itself. Once.
    pub fn when_scarce(&self, ahead: impl Fn(&Io) + Send + Sync + 'static) {
        self.records.set_ahead(Box::new(ahead));
    }

    /// Ends [`Qcow2::fill_ahead`]: none is under way any more, and none will be.
    pub(super) async fn end_fill_ahead(&self) {
        *self.records.filling.lock().await = true;
    }

    /// Completes all clusters that are incomplete now and were for at least `age`.
    pub(super) async fn fill_older<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        age: Duration,
    ) -> Result<()> {
        let clusters = self.records.list(age);
        self.fill(io, below, &clusters, DEPTH).await
    }

    /// Completes clusters, given ascending; up to `depth` runs of neighbours at a time.
    async fn fill<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        clusters: &[GuestCluster],
        depth: u64,
    ) -> Result<()> {
        if clusters.is_empty() {
            return Ok(());
        }
        let cluster = self.tables.geometry.cluster_size();
        let most = (MAX_RUN / cluster).max(1) as usize;
        let runs = clusters
            .chunk_by(|a, b| a.0 + 1 == b.0)
            .flat_map(|run| run.chunks(most));
        let runs = RefCell::new(runs);
        let result = Cell::new(Ok(()));
        let one_by_one = || async {
            loop {
                let Some(run) = runs.borrow_mut().next() else {
                    return;
                };
                let filled = self.fill_neighbours(io, below, run).await;
                result.set(result.replace(Ok(())).and(filled));
                // Where no I/O is waited for, requests come in between all the same.
                io.yield_now().await;
            }
        };
        let most = (MAX_BYTES / MAX_RUN.max(cluster)).clamp(2, DEPTH);
        let depth = depth.min(most).min(clusters.len() as u64);
        all((0..depth).map(|_| one_by_one()).collect()).await;
        result.into_inner()
    }

    async fn fill_neighbours<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        run: &[GuestCluster],
    ) -> Result<()> {
        let mut rest = run;
        while let Some(first) = rest.first() {
            let done = self.fill_run(io, below, *first, rest.len() as u64).await?;
            rest = &rest[done..];
        }
        Ok(())
    }

    /// Completes `first` and as many incomplete clusters behind it, `count` altogether at most, as can be
    /// claimed together. How many there is nothing left to do for; 0: `first` was somebody else's, look again.
    pub(super) async fn fill_run<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        first: GuestCluster,
        count: u64,
    ) -> Result<usize> {
        let attempt = self.tables.try_claim(first, count, |_, raw| {
            entry::incomplete_index(raw).is_some()
        });
        let claim = match attempt {
            Attempt::Claimed(claim) => claim,
            Attempt::Busy => {
                self.tables.unclaimed(first).await;
                return Ok(0);
            }
            // A record is only in a table that is ours.
            Attempt::Unwanted | Attempt::Missing | Attempt::Shared => return Ok(1),
        };
        let mut closed = Vec::with_capacity(claim.count());
        for n in 0..claim.count() {
            if let Some(index) = entry::incomplete_index(claim.get(n)) {
                closed.push(self.records.close(index).await);
            }
        }
        let g = &self.tables.geometry;
        let mut buf = io.buf(closed.len() << g.cluster_bits);
        let mut gaps = Vec::new();
        self.read_missing(io, below, first, &closed, &mut buf)
            .await?;
        for (n, record) in closed.iter().enumerate() {
            self.find_gaps(io, n, record, &mut buf, &mut gaps).await?;
        }
        self.write_gaps(io, &gaps, buf.sg()).await?;
        let count = closed.len();
        self.publish_filled(io, claim, closed);
        Ok(count)
    }

    /// True if what was not written needs no filling: it was zeros and is.
    fn stays_zero(&self, record: &Closing<'_>) -> bool {
        record.is_zeroed() && self.reads_zero(record.old())
    }

    /// Reads the old content of closed clusters, where something of it is needed, to their places in `buf`.
    async fn read_missing<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        first: GuestCluster,
        closed: &[Closing<'_>],
        buf: &mut AlignedBuf,
    ) -> Result<()> {
        let g = &self.tables.geometry;
        let base = first.0 << g.cluster_bits;
        let all = buf.sg();
        // What is to be read from below, as far as it is known.
        let mut from_below: Option<Range<u64>> = None;
        for (n, record) in closed.iter().enumerate() {
            let Some(range) = needed(record).filter(|_| !self.stays_zero(record)) else {
                continue;
            };
            let start = (n as u64) << g.cluster_bits;
            let range = start + range.start..start + range.end;
            let old = record.old();
            if self.has_backing && decode(old, g) == Entry::Unallocated {
                match &mut from_below {
                    Some(known) if known.end + g.cluster_size() > range.start => {
                        known.end = range.end;
                    }
                    known => {
                        if let Some(range) = known.replace(range) {
                            read_part(io, below, base, range, all).await?;
                        }
                    }
                }
            } else {
                let part = all.slice(range.start as usize, (range.end - range.start) as usize);
                self.read_old(io, below, old, base + range.start, part)
                    .await?;
            }
        }
        match from_below {
            Some(range) => read_part(io, below, base, range, all).await,
            None => Ok(()),
        }
    }

    /// Adds what has to be written of the `n`th cluster.
    async fn find_gaps(
        &self,
        io: &Io,
        n: usize,
        record: &Closing<'_>,
        buf: &mut AlignedBuf,
        gaps: &mut Vec<Gap>,
    ) -> Result<()> {
        if self.stays_zero(record) {
            return Ok(());
        }
        let start = n << self.tables.geometry.cluster_bits;
        let place = |(at, len): (u64, u64)| start + at as usize..start + (at + len) as usize;
        let is_needed =
            |range: &Range<usize>| !(record.is_zeroed() && is_zero(&buf[range.clone()]));
        let cluster = self.tables.geometry.cluster_size();
        let end = start + self.fill_len(record.host().0, cluster) as usize;
        let inside = |range: Range<usize>| range.start..range.end.min(end);
        let mut ranges: Vec<Range<usize>> = record.missing().map(place).map(inside).collect();
        ranges.retain(|range| !range.is_empty() && is_needed(range));
        if ranges.len() > MAX_GAPS {
            ranges = vec![inside(self.read_back(io, start, record, buf).await?)];
        }
        for at in ranges {
            let host = record.host().0 + (at.start - start) as u64;
            match gaps.last_mut() {
                Some(last)
                    if last.at.end == at.start && last.host + last.at.len() as u64 == host =>
                {
                    last.at.end = at.end;
                }
                _ => gaps.push(Gap { at, host }),
            }
        }
        Ok(())
    }

    /// Puts what the guest has written between the parts that are missing; the range of all of it in `buf`.
    async fn read_back(
        &self,
        io: &Io,
        start: usize,
        record: &Closing<'_>,
        buf: &mut AlignedBuf,
    ) -> Result<Range<usize>> {
        let Some(range) = needed(record) else {
            return Ok(start..start);
        };
        let mut new = io.buf((range.end - range.start) as usize);
        self.data
            .read(io, record.host().0 + range.start, new.sg())
            .await?;
        let mut at = range.start;
        for (missing, len) in record.missing() {
            let between = (at - range.start) as usize..(missing - range.start) as usize;
            let to = start + at as usize..start + missing as usize;
            buf[to].copy_from_slice(&new[between]);
            at = missing + len;
        }
        Ok(start + range.start as usize..start + range.end as usize)
    }

    /// Writes the gaps from their places in `all`. As in [`Qcow2::write`], nothing is under way while a write
    /// of a part of a block waits for its turn.
    async fn write_gaps(&self, io: &Io, gaps: &[Gap], all: Sg<'_>) -> Result<()> {
        let align = self.data.limits().io_align as u64;
        let mut window = Window::default();
        let mut result = Ok(());
        for gap in gaps {
            let part = all.slice(gap.at.start, gap.at.len());
            let aligned = (gap.host | part.len() as u64) & (align - 1) == 0;
            result = if aligned {
                window.make_room(io).await
            } else {
                window.finish_all(io).await
            };
            if result.is_err() {
                break;
            }
            if aligned {
                window.push(self.data.begin_write(io, gap.host, part));
            } else {
                result = self.data.write(io, gap.host, part).await;
            }
            if result.is_err() {
                break;
            }
        }
        let ended = window.finish_all(io).await;
        result.and(ended)
    }
}

async fn read_part<B: Below + ?Sized>(
    io: &Io,
    below: &B,
    base: u64,
    range: Range<u64>,
    all: Sg<'_>,
) -> Result<()> {
    let part = all.slice(range.start as usize, (range.end - range.start) as usize);
    below.read(io, base + range.start, part).await
}

/// From the first byte of a cluster that was not written to behind the last one.
fn needed(record: &Closing<'_>) -> Option<Range<u64>> {
    let (first, len) = record.missing().next()?;
    let end = record
        .missing()
        .last()
        .map_or(first + len, |(at, len)| at + len);
    Some(first..end)
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(64)
        .all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Runs futures until all have ended.
async fn all<F: Future<Output = ()>>(futures: Vec<F>) {
    let mut futures: Vec<Pin<Box<F>>> = futures.into_iter().map(Box::pin).collect();
    poll_fn(|cx| {
        futures.retain_mut(|future| future.as_mut().poll(cx).is_pending());
        if futures.is_empty() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}
