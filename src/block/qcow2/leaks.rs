//! Clusters that a crash has leaked, given back while the image is in use.
//!
//! A process that dies leaves the rest of its arenas, and what it had freed, with refcounts and nobody's.
//! From the first refill to a clean close an image of version 3 carries a mark of ours, an autoclear bit
//! ([`autoclear::ARENAS`]): any other program that writes to the image clears it. Who opens an image for
//! writing and finds the mark looks for such clusters, once, beside the requests.
//!
//! Why nothing that is alive is ever given back, and nothing twice:
//!
//! - **Touched** is every cluster that was handed out, or freed, since the image was opened, and all metadata
//!   that was there then ([`Leaks::touch`]): noted when a refill claims it, under the lock under which its
//!   refcount goes up; when it is freed, before it enters limbo; and at opening. A touched cluster is left
//!   alone, whatever the search says of it.
//! - A cluster that is *not* touched has the references that it had at opening, in the file as in memory:
//!   new references only go to clusters that were handed out, and a reference that goes away is followed by
//!   a free. So the search reads tables in the file, without regard to what is in memory, dirty or being
//!   written: an entry that changes meanwhile only concerns touched clusters, and whether its old or its new
//!   value is read, or anything else, decides nothing. Tables that were there at opening stay where they
//!   are.
//! - A request takes the reference away before it frees. Between the two the search may miss the reference
//!   and not know of the free. So its result is used when every request that was begun before its end has
//!   ended (an epoch, as for limbo): then the frees have been noted. Later requests take away only what
//!   they find in the tables, and the search has found that, too.
//! - What is left is given back like other freed clusters, if its refcount *as of now* is exactly 1.
//!
//! The search runs on a thread of its own: it is the check's walk over all references (snapshots and bitmaps
//! included), and could keep a worker from its rings for long. Memory: a bit a cluster for what was touched,
//! and what the check takes. On anything that is not as it should be nothing is given back.
//!
//! [`autoclear::ARENAS`]: super::header::autoclear::ARENAS

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Qcow2;
use super::alloc::Allocator;
use super::check::{CHUNK, Scope, examine_until};
use super::header::{Header, autoclear};
use super::runs::{Run, merge};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::{Epoch, Epochs, Io, IoConfig};

/// Clusters that are given back at a time, and runs of them.
const STEP: u64 = 4096;
const MOST_RUNS: usize = 256;
/// Runs that are remembered; what is beyond waits for the next time, or for `virtioblkd check -r leaks`.
const MAX_RUNS: usize = 1 << 16;

/// Clusters that were handed out or freed since the image was opened.
#[derive(Debug)]
struct Touched(Box<[AtomicU64]>);

impl Touched {
    fn new(clusters: u64) -> Option<Self> {
        let words = usize::try_from(clusters.div_ceil(64)).ok()?;
        let mut bits = Vec::new();
        bits.try_reserve_exact(words).ok()?;
        bits.resize_with(words, || AtomicU64::new(0));
        Some(Self(bits.into()))
    }

    fn add(&self, run: Run) {
        for cluster in run.first..run.end().min(self.0.len() as u64 * 64) {
            if let Some(word) = self.0.get((cluster / 64) as usize) {
                word.fetch_or(1 << (cluster % 64), Ordering::AcqRel);
            }
        }
    }

    /// Clusters that were not there when the image was opened count as touched.
    fn has(&self, cluster: u64) -> bool {
        let word = self.0.get((cluster / 64) as usize);
        word.is_none_or(|word| word.load(Ordering::Acquire) >> (cluster % 64) & 1 == 1)
    }
}

/// How far it has come.
#[derive(Debug)]
enum State {
    /// Not begun.
    Due,
    /// Under way on its thread.
    Searching,
    /// Something was found, and is being given back.
    Found(Found),
    /// Nothing more to do.
    Done,
    /// It could not be done: the mark stays.
    Failed,
}

/// What a search found.
#[derive(Debug)]
struct Found {
    /// Unreferenced clusters that nobody has taken on yet.
    runs: Vec<Run>,
    /// More has leaked than these: what is left over keeps the mark.
    more: bool,
    /// They are given back when requests of this epoch have ended.
    epoch: Option<Epoch>,
    /// Runs that somebody is giving back.
    in_hand: u32,
}

/// A run that is being given back. Dropped with the run, because the task was dropped, it is found again.
struct InHand<'a> {
    state: &'a Mutex<State>,
    run: Option<Run>,
}

impl Drop for InHand<'_> {
    fn drop(&mut self) {
        if let State::Found(found) = &mut *lock(self.state) {
            found.in_hand -= 1;
            found.runs.extend(self.run.take());
        }
    }
}

/// The search for leaked clusters of an image that is open for writing.
#[derive(Debug)]
pub(super) struct Leaks {
    /// None: nothing is searched for.
    touched: Option<Touched>,
    state: Arc<Mutex<State>>,
    cancelled: Arc<AtomicBool>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leaks {
    /// A search is due if the mark is there.
    pub(super) fn new(header: &Header, storage: &Storage) -> Self {
        let due = header.autoclear & autoclear::ARENAS != 0;
        let clusters = header.geometry.clusters(storage.len());
        let touched = if due { Touched::new(clusters) } else { None };
        let state = match (due, touched.is_some()) {
            (false, _) => State::Done,
            (true, true) => State::Due,
            (true, false) => State::Failed,
        };
        Self {
            touched,
            state: Arc::new(Mutex::new(state)),
            cancelled: Arc::default(),
        }
    }

    /// Notes clusters that are handed out or freed.
    #[inline]
    pub(super) fn touch(&self, run: Run) {
        if let Some(touched) = &self.touched {
            touched.add(run);
        }
    }

    /// Ends a search under way; nothing is given back from here on.
    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Ends a search for good, if it is not over: the tables may no longer be where it reads them.
    pub(super) fn give_up(&self) {
        self.cancel();
        let mut state = lock(&self.state);
        if !matches!(*state, State::Done) {
            *state = State::Failed;
        }
    }

    /// Keeps the mark: there may be clusters that nothing points at and nobody knows of.
    pub(super) fn keep_mark(&self) {
        self.cancel();
        *lock(&self.state) = State::Failed;
    }

    /// True if all that had leaked was given back, or nothing was looked for.
    pub(super) fn is_done(&self) -> bool {
        matches!(*lock(&self.state), State::Done)
    }
}

impl Drop for Leaks {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// Clusters with refcount 1 in the file and no reference; and whether other refcounts are too high.
async fn search(
    io: &Io,
    storage: &Storage,
    header: &Header,
    cancelled: &AtomicBool,
) -> Result<Found> {
    // What the process before this one wrote may be in the page cache only. A loss of power must not bring an
    // entry back that points at what is free by then.
    storage.flush(io).await?;
    let found = examine_until(io, storage, header, Scope::InUse, &mut |_| {}, cancelled).await?;
    if found.report.lasting > 0 {
        let first = found.report.findings.into_iter().next();
        let what = first.map_or(String::new(), |finding| finding.to_string());
        let at = None;
        return Err(Error::image(ErrorKind::Corrupt, storage.path(), at, what));
    }
    let mut runs: Vec<Run> = Vec::new();
    let mut more = false;
    for piece in found.refcounts.pieces() {
        for cluster in piece..piece + CHUNK {
            let (count, references) = (found.refcounts.get(cluster), found.references.get(cluster));
            if count != 1 || references > 0 {
                // A cluster that a snapshot has, too: one reference of several has leaked.
                more |= count > references;
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.end() == cluster => last.count += 1,
                _ => runs.push(Run::new(cluster, 1)),
            }
        }
        if runs.len() >= MAX_RUNS {
            more = true;
            break;
        }
    }
    Ok(Found {
        runs,
        more,
        epoch: None,
        in_hand: 0,
    })
}

impl Qcow2 {
    /// Does a little of what there is to do for leaked clusters; to be called from a timer. Never long.
    pub(super) async fn give_leaks_back(&self, io: &Io) {
        let mut clusters = 0;
        for _ in 0..MOST_RUNS {
            match self.give_run_back(io).await {
                Some(count) if clusters + count < STEP => clusters += count,
                _ => return,
            }
        }
    }

    /// Gives one run back: how many clusters that were, or `None` if there is nothing to give back now.
    async fn give_run_back(&self, io: &Io) -> Option<u64> {
        let alloc = self.alloc.as_ref()?;
        let leaks = alloc.leaks();
        if leaks.cancelled.load(Ordering::SeqCst) || self.refuse_writes.load(Ordering::SeqCst) {
            return None;
        }
        let mut in_hand = {
            let mut state = lock(&leaks.state);
            match &mut *state {
                State::Due => {
                    *state = State::Searching;
                    drop(state);
                    self.start_search(leaks);
                    return None;
                }
                State::Searching | State::Done | State::Failed => return None,
                State::Found(found) => {
                    let epoch = *found.epoch.get_or_insert_with(|| io.epochs().retire());
                    if !io.epochs().passed(epoch) {
                        return None;
                    }
                    let Some(run) = found.runs.pop() else {
                        match (found.in_hand, found.more) {
                            (0, true) => *state = State::Failed,
                            (0, false) => *state = State::Done,
                            _ => {}
                        }
                        return None;
                    };
                    if run.count > STEP {
                        let rest = Run::new(run.first + STEP, run.count - STEP);
                        found.runs.push(rest);
                    }
                    found.in_hand += 1;
                    InHand {
                        state: &leaks.state,
                        run: Some(Run::new(run.first, run.count.min(STEP))),
                    }
                }
            }
        };
        match give_back(alloc, io, &mut in_hand).await {
            Ok(count) => {
                if count > 0 {
                    log::debug!(
                        "{}: {count} clusters that a crash had leaked are free again",
                        self.header.path.display()
                    );
                }
                Some(count)
            }
            Err(error) => {
                log::warn!("giving leaked clusters back: {error}");
                *lock(&leaks.state) = State::Failed;
                None
            }
        }
    }

    fn start_search(&self, leaks: &Leaks) {
        let (storage, header) = (self.storage.clone(), self.header.clone());
        let (state, cancelled) = (leaks.state.clone(), leaks.cancelled.clone());
        let run = move || {
            let config = IoConfig {
                worker: 0,
                entries: 64,
                epochs: Epochs::new(),
            };
            let found = match Io::new(&config) {
                Ok(io) => {
                    let found = io.block_on(search(&io, &storage, &header, &cancelled));
                    io.close();
                    found
                }
                Err(error) => Err(Error::io(storage.path(), "set up io_uring", None, error)),
            };
            let mut state = lock(&state);
            *state = match found {
                // Not if it was given up meanwhile.
                Ok(found) if !cancelled.load(Ordering::SeqCst) => State::Found(found),
                Ok(_) => State::Failed,
                Err(error) => {
                    if !cancelled.load(Ordering::SeqCst) {
                        log::warn!("leaked clusters are not given back: {error}");
                    }
                    State::Failed
                }
            };
        };
        let thread = std::thread::Builder::new().name("leaks".into()).spawn(run);
        if let Err(error) = thread {
            log::warn!("leaked clusters are not looked for: {error}");
            *lock(&leaks.state) = State::Failed;
        }
    }
}

/// Gives back those clusters of a run that were not touched.
async fn give_back(alloc: &Allocator, io: &Io, in_hand: &mut InHand<'_>) -> Result<u64> {
    let (Some(touched), Some(run)) = (&alloc.leaks().touched, in_hand.run) else {
        return Ok(0);
    };
    let mut runs = Vec::new();
    for cluster in run.first..run.end() {
        if !touched.has(cluster) && alloc.refcount(io, super::HostCluster(cluster)).await? == 1 {
            runs.push(Run::new(cluster, 1));
        }
    }
    merge(&mut runs);
    let count = runs.iter().map(|run| run.count).sum();
    // What is not released from here on is the allocator's to know.
    in_hand.run = None;
    alloc.release(io, runs).await?;
    Ok(count)
}

#[cfg(test)]
impl Qcow2 {
    /// Searches here and now, on this reactor, as the thread does.
    pub(super) async fn search_leaks(&self, io: &Io) -> Result<()> {
        let leaks = self.allocator()?.leaks();
        *lock(&leaks.state) = State::Searching;
        let found = search(io, &self.storage, &self.header, &leaks.cancelled).await?;
        *lock(&leaks.state) = State::Found(found);
        Ok(())
    }

    /// True if all was given back that can be.
    pub(super) fn leaks_were_given_back(&self) -> bool {
        let alloc = self.alloc.as_ref();
        alloc.is_none_or(|alloc| matches!(*lock(&alloc.leaks().state), State::Done | State::Failed))
    }

    /// True if nothing is left to be given back.
    pub(super) fn has_no_leaks(&self) -> bool {
        self.alloc
            .as_ref()
            .is_none_or(|alloc| alloc.leaks().is_done())
    }
}
