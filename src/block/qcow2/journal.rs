//! The crash journal: what is in memory only, kept where it survives this process.
//!
//! What a process has completed and not written when it is killed is its mappings: L2 and L1 entries that were
//! published and wait for a flush, and the records of incomplete clusters ([`super::record`]). Data is in the
//! file when its write completes, refcounts are before a cluster is used. So the journal is a log of entries,
//! and a slot for each record, in memory that the VMM keeps ([`SharedPart`]). It is lost with the power, and
//! promises nothing about that: `flush` does.
//!
//! **Appending** ([`log`]). An entry is appended before it is published. Appending, publishing and marking the
//! slice dirty happen under one lock, that of the log. Only who replaces entries takes it: a request to clusters
//! that are mapped does not come here.
//!
//! **Dropping.** A flush marks the limbo, then the log, and then takes what is dirty. Whatever is in the log at
//! its mark was published and marked dirty before the lock was given up, so the flush writes it, or something
//! newer of the same clusters. When it is durable the log's tail moves to the mark. A flush that fails moves
//! nothing, and what it took is dirty again before the next one begins. From this follows:
//!
//! - The log has every mapping that the file may lack, in the order of their publication. For a cluster with
//!   entries in the log the last one holds, whatever the file has: what it held before, or any of them.
//! - No entry in the log leads to a cluster that was given to somebody else. A cluster is freed after the entry
//!   that replaces it was appended, so a flush whose mark of the limbo covers the free has a mark of the log
//!   behind both entries: it drops them before it lets the cluster out of limbo ([`super::flush`], step 5).
//!   Clusters that come back otherwise (arenas, a [`super::Fresh`] that was dropped) never had an entry. The
//!   search for leaks ([`super::leaks`]) gives back nothing that was handed out since the image was opened.
//!
//! **Records.** A record counts from before its marker is published. Its slot has the log's head of that moment:
//! an entry of its cluster that was appended later has replaced it. The bit of a sector is set in the slot when
//! the sector's data is written, before others see the bit and before the write completes. The entry that
//! replaces the marker is appended first; then the slot is emptied, under the same lock, so that no flush drops
//! the entry while the record seems to count: the guest may write to the cluster in place by then.
//!
//! **Room** is waited for before anything is claimed, by forcing mappings to be written. A record has the room
//! for the entry that will replace it, so completing clusters needs no waiting, and a flush does not wait for
//! itself. Nobody who has room waits for more.
//!
//! **Replaying** ([`replay`]) happens before the first request, and before leaks are searched for. Nothing in
//! the memory is trusted. The image must be the one that the journal is of, and must not have been written to by
//! anybody else: an image of version 3 has its mark ([`super::header::autoclear::ARENAS`]), which any other
//! writer clears; and the clusters that the journal leads to have the one reference that they were handed out
//! with. Else opening fails, and nothing has changed. Then the entries are published, records are completed,
//! and all is flushed, in the order of any other flush. Only then the journal is emptied, by one store. So
//! replaying again after another kill finds the same journal, and an image that has a part of it. What the
//! replaced entries pointed at leaks: it is not known whether the last process has freed it.
//!
//! What the journal does not have: the contents of bitmaps, which stay marked as in use, as after any crash.
//!
//! The last process's I/O has ended before this one holds the image's lock: a ring that has the image's file
//! registered keeps the lock ([`crate::block::ActiveDisk::join`]).

mod log;
mod memory;
mod replay;

/// A place between two steps of which a kill may see only the first.
macro_rules! step {
    ($name:literal) => {
        $crate::kill_point::kill_point!($name);
        #[cfg(test)]
        $crate::block::qcow2::journal::pass($name);
    };
}
pub(super) use step;

use std::future::poll_fn;
use std::task::Poll;

#[cfg(test)]
pub(super) use steps::pass;

pub(super) use log::{Journal, Noted, Room};
pub(super) use memory::Memory;
pub(in crate::block) use memory::is_empty;

use super::Qcow2;
use super::below::Below;
use crate::block::error::{Error, ErrorKind, Result};
use crate::reactor::Io;
use crate::shared_memory::SharedPart;
use log::Ask;
use memory::Identity;

impl Qcow2 {
    /// Makes good what a process that was killed left in `memory`, and keeps there from now on what it would
    /// leave itself. Before the first request. An image that was opened read-only is only looked at.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] for what is not this image's journal, or does not fit the image any more:
    /// nothing has changed then. Those of the storage: the journal is as it was.
    pub async fn use_journal<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        memory: SharedPart,
    ) -> Result<()> {
        if self.alloc.is_none() {
            return match is_empty(&memory) {
                true => Ok(()),
                false => Err(self.not_replayed("has changes, and it was opened read-only")),
            };
        }
        let g = &self.tables.geometry;
        let too_small = || self.not_replayed("is too small, or not aligned");
        let memory = Memory::new(memory, g).ok_or_else(too_small)?;
        let identity = self.identity();
        let found = memory.read(&identity);
        let found = found.map_err(|what| self.not_replayed(&what))?;
        if !found.is_empty() {
            self.replay(io, below, found).await?;
        }
        memory.begin(&identity);
        self.records.keep_in(memory.clone());
        let _first = self.journal.set(Journal::new(memory, g.cluster_bits));
        Ok(())
    }

    fn identity(&self) -> Identity {
        let g = &self.tables.geometry;
        let image = self.storage.identity();
        let data = match self.has_data_file() {
            true => self.data.identity(),
            false => (0, 0),
        };
        let flags = u64::from(g.extended_l2) | u64::from(g.data_file) << 1;
        let shape = u64::from(g.cluster_bits) | flags << 8 | u64::from(self.header.version) << 16;
        [image.0, image.1, data.0, data.1, shape]
    }

    fn not_replayed(&self, what: &str) -> Error {
        let what = format!("the memory that the VMM keeps for changes of the image {what}");
        Error::image(ErrorKind::InvalidImage, &self.header.path, None, what).hint(
            "start the disk with the image, and the version of this program, that it had before; or end the \
             VM and start it anew, which loses what was not flushed",
        )
    }

    /// Room in the log to change up to `want` clusters, or L1 entries: at least one ([`Room::limit`]). To be
    /// asked for with nothing held that somebody may wait for: no claim, no other room.
    ///
    /// # Errors
    /// Those of writing mappings back.
    pub(super) async fn log_room(&self, io: &Io, want: u64) -> Result<Room<'_>> {
        let Some(journal) = self.journal.get() else {
            return Ok(Room::none());
        };
        if let Some(room) = self.log_room_at_once(want) {
            return Ok(room);
        }
        // Boxed: rare, and not to make every write's future larger.
        Box::pin(self.wait_for_room(io, journal, want)).await
    }

    /// As [`Qcow2::log_room`], where nothing has to be waited for.
    #[inline]
    pub(super) fn log_room_at_once(&self, want: u64) -> Option<Room<'_>> {
        let Some(journal) = self.journal.get() else {
            return Some(Room::none());
        };
        match journal.is_marked().then(|| journal.ask(want, None))? {
            Ask::Room(room) => Some(room),
            Ask::WriteBack | Ask::Wait => None,
        }
    }

    /// As [`Qcow2::log_room`], for who can do without: none if there is no room now.
    ///
    /// # Errors
    /// Those of marking the image as in use.
    pub(super) async fn spare_log_room(&self, io: &Io, want: u64) -> Result<Option<Room<'_>>> {
        let Some(journal) = self.journal.get() else {
            return Ok(Some(Room::none()));
        };
        if !journal.is_marked() {
            self.allocator()?.mark_in_use(io).await?;
            journal.set_marked();
        }
        Ok(match journal.ask(want, None) {
            Ask::Room(room) => Some(room),
            Ask::WriteBack | Ask::Wait => None,
        })
    }

    async fn wait_for_room<'a>(
        &'a self,
        io: &Io,
        journal: &'a Journal,
        want: u64,
    ) -> Result<Room<'a>> {
        if !journal.is_marked() {
            // Before anything is in the log: a replay looks for the mark.
            self.allocator()?.mark_in_use(io).await?;
            journal.set_marked();
        }
        loop {
            let asked = poll_fn(|cx| match journal.ask(want, Some(cx.waker())) {
                Ask::Wait => Poll::Pending,
                other => Poll::Ready(other),
            });
            if let Ask::Room(room) = asked.await {
                return Ok(room);
            }
            self.write_back_unless(io, || journal.has_room(want))
                .await?;
        }
    }

    /// Appends that the slice's L1 entry is going to lead to `table`, and has it do so. `ordered`: the entry
    /// may go to the file only after a flush of data.
    pub(super) fn log_and_link(
        &self,
        room: &mut Room<'_>,
        slice: u64,
        table: super::HostOffset,
        ordered: bool,
    ) {
        let mut log = room.log();
        log.note_link(self.tables.l1_index(slice), table);
        let _noted = log.commit();
        self.tables.link_table(slice, table, ordered);
    }
}

#[cfg(test)]
pub(super) mod steps {
    //! Stops at steps, for tests.

    use std::cell::RefCell;

    type Watch = Box<dyn FnMut(&'static str)>;
    thread_local! {
        static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
    }

    /// Calls `watch` at each step of this thread; while it runs steps are not watched.
    pub(in crate::block::qcow2) fn watch(watch: Option<Watch>) {
        WATCH.set(watch);
    }

    /// Does something that is not watched.
    pub(in crate::block::qcow2) fn unwatched<R>(what: impl FnOnce() -> R) -> R {
        let watch = WATCH.take();
        let result = what();
        WATCH.set(watch);
        result
    }

    pub(in crate::block::qcow2) fn pass(name: &'static str) {
        if let Some(mut watch) = WATCH.take() {
            watch(name);
            WATCH.set(Some(watch));
        }
    }
}
