//! Appending to the log: room first, then entries, then what they are about.
//!
//! The types keep the order: entries are published with a [`Noted`], which only [`Log::commit`] gives, which
//! needs [`Room`], which was waited for before anything was claimed. Without a journal all of them are empty
//! and cost a test for that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::task::Waker;

use super::super::tables::lock;
use super::super::units::{GuestCluster, HostOffset};
use super::memory::{Entry, MAX_COUNT, Memory};
use super::step;

/// The journal of an image in use.
#[derive(Debug)]
pub(in crate::block::qcow2) struct Journal {
    memory: Memory,
    cluster_bits: u32,
    book: Mutex<Book>,
    /// The image says that it is in use ([`super::Qcow2::log_room`]).
    is_marked: AtomicBool,
}

/// Numbers of entries, counted from the journal's beginning.
#[derive(Debug, Default)]
struct Book {
    /// Appended.
    head: u64,
    /// Dropped, since the file has what they say.
    tail: u64,
    /// Entries that may still be appended by who has room: see [`Room`].
    promised: u64,
    /// Entries that there may be of both kinds.
    most: u64,
    /// Who waits for room.
    waiters: Vec<Waker>,
}

/// What there is for somebody who wants room.
pub(super) enum Ask<'a> {
    Room(Room<'a>),
    /// Entries can be dropped.
    WriteBack,
    /// All there is was promised; the waker is called when some of it comes back.
    Wait,
}

impl Book {
    fn has_room(&self, want: u64) -> bool {
        self.head - self.tail + self.promised + want <= self.most
    }

    /// Nobody gets more than a part of what there is.
    fn share(&self, want: u64) -> u64 {
        want.min(self.most / 4).max(1)
    }
}

impl Journal {
    pub(super) fn new(memory: Memory, cluster_bits: u32) -> Self {
        let book = Book {
            most: memory.capacity(),
            ..Book::default()
        };
        Self {
            memory,
            cluster_bits,
            book: Mutex::new(book),
            is_marked: AtomicBool::new(false),
        }
    }

    pub(super) fn is_marked(&self) -> bool {
        self.is_marked.load(Ordering::Relaxed)
    }

    pub(super) fn set_marked(&self) {
        self.is_marked.store(true, Ordering::Relaxed);
    }

    /// Room for `want` entries, if there is; else what to do about it.
    pub(super) fn ask(&self, want: u64, waker: Option<&Waker>) -> Ask<'_> {
        let mut book = lock(&self.book);
        let want = book.share(want);
        let used = book.head - book.tail;
        if book.has_room(want) {
            book.promised += want;
            return Ask::Room(Room {
                journal: Some(self),
                left: want,
            });
        }
        if used > 0 {
            return Ask::WriteBack;
        }
        if let Some(waker) = waker {
            book.waiters.push(waker.clone());
        }
        Ask::Wait
    }

    /// True if [`Journal::ask`] would give room.
    pub(super) fn has_room(&self, want: u64) -> bool {
        let book = lock(&self.book);
        book.has_room(book.share(want))
    }

    /// The entries so far. A flush takes it after it has marked the limbo, and before it takes what is dirty.
    pub(in crate::block::qcow2) fn mark(&self) -> u64 {
        lock(&self.book).head
    }

    /// The file has, as durably as a flush makes it, what the entries before `mark` say.
    pub(in crate::block::qcow2) fn drop_before(&self, mark: u64) {
        step!("journal-before-drop");
        let mut book = lock(&self.book);
        book.tail = mark;
        self.memory.set_tail(mark);
        step!("journal-dropped");
        let waiters = std::mem::take(&mut book.waiters);
        drop(book);
        waiters.into_iter().for_each(Waker::wake);
    }

    /// True if so much is in the log that it should be written back without being asked.
    pub(in crate::block::qcow2) fn is_much(&self) -> bool {
        let book = lock(&self.book);
        book.head - book.tail > book.most / 2
    }

    /// Ends the journal, if nothing is in it. No request runs and none comes.
    pub(in crate::block::qcow2) fn end(&self) {
        let book = lock(&self.book);
        // What was promised is for records: a cluster could not be completed.
        if book.head == book.tail && book.promised == 0 {
            self.memory.clear();
        }
    }

    /// The room that records had for the entries that replace them.
    fn room_of_records(&self, count: u64) -> Room<'_> {
        Room {
            journal: Some(self),
            left: count,
        }
    }

    /// Entries that are in the log, and that were promised.
    #[cfg(test)]
    pub(in crate::block::qcow2) fn used(&self) -> (u64, u64) {
        let book = lock(&self.book);
        (book.head - book.tail, book.promised)
    }

    /// Takes room away, for tests that want little.
    #[cfg(test)]
    pub(in crate::block::qcow2) fn leave_only(&self, entries: u64) {
        lock(&self.book).most = entries;
    }
}

/// The right to append so many entries. What is not used is given back when it is dropped.
///
/// Each record of an incomplete cluster has the room for one entry, the one that will replace it: so who
/// completes clusters, as a flush does, never waits for room.
#[derive(Debug)]
#[must_use = "entries are appended with it"]
pub(in crate::block::qcow2) struct Room<'a> {
    journal: Option<&'a Journal>,
    left: u64,
}

impl<'a> Room<'a> {
    /// Without a journal.
    pub(super) fn none() -> Self {
        Self {
            journal: None,
            left: 0,
        }
    }

    /// The room of so many records that are going to be replaced.
    pub(in crate::block::qcow2) fn of_records(journal: Option<&'a Journal>, count: usize) -> Self {
        journal.map_or_else(Self::none, |it| it.room_of_records(count as u64))
    }

    /// How many of `want` clusters may be changed with this.
    pub(in crate::block::qcow2) fn limit(&self, want: u64) -> u64 {
        self.journal.map_or(want, |_| want.min(self.left))
    }

    /// Takes over the room of a record that is going to be replaced.
    pub(in crate::block::qcow2) fn take_over(&mut self, records: usize) {
        if self.journal.is_some() {
            self.left += records as u64;
        }
    }

    /// Begins to append. Locks the log: between two awaits only.
    pub(in crate::block::qcow2) fn log(&mut self) -> Log<'_, 'a> {
        Log {
            book: self.journal.map(|journal| lock(&journal.book)),
            room: self,
            new: 0,
            last: None,
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let Some(journal) = self.journal.filter(|_| self.left > 0) else {
            return;
        };
        let mut book = lock(&journal.book);
        book.promised -= self.left.min(book.promised);
        let waiters = std::mem::take(&mut book.waiters);
        drop(book);
        waiters.into_iter().for_each(Waker::wake);
    }
}

/// Entries that are being appended: they count when all of them are there ([`Log::commit`]).
pub(in crate::block::qcow2) struct Log<'r, 'a> {
    room: &'r mut Room<'a>,
    book: Option<MutexGuard<'a, Book>>,
    /// Entries behind the head.
    new: u64,
    /// The next one, which may still become longer.
    last: Option<Entry>,
}

impl<'r, 'a> Log<'r, 'a> {
    /// Notes what an L2 entry and its bitmap are going to be.
    pub(in crate::block::qcow2) fn note(&mut self, guest: GuestCluster, raw: u64, bitmap: u64) {
        let Some(journal) = self.room.journal else {
            return;
        };
        if let Some(Entry::Map {
            guest: first,
            count,
            raw: begin,
            bitmap: same,
            host_steps,
        }) = &mut self.last
        {
            let next = begin.wrapping_add(*count << journal.cluster_bits);
            let follows = first.0 + *count == guest.0 && *same == bitmap && *count < MAX_COUNT;
            let stays = raw == *begin && !*host_steps;
            let steps = raw == next && (*host_steps || *count == 1);
            if follows && (stays || steps) {
                *host_steps = steps;
                *count += 1;
                return;
            }
        }
        self.put(Entry::Map {
            guest,
            count: 1,
            raw,
            bitmap,
            host_steps: false,
        });
    }

    /// Notes what an L1 entry is going to be.
    pub(in crate::block::qcow2) fn note_link(&mut self, index: u64, table: HostOffset) {
        if self.room.journal.is_some() {
            let raw = super::super::entry::data(table);
            self.put(Entry::Link { index, raw });
        }
    }

    fn put(&mut self, next: Entry) {
        if let Some(entry) = self.last.replace(next) {
            self.write(entry);
        }
    }

    fn write(&mut self, entry: Entry) {
        if let (Some(journal), Some(book)) = (self.room.journal, &mut self.book) {
            let used = book.head + self.new - book.tail;
            debug_assert!(
                self.room.left > 0 && used < book.most,
                "an entry without room"
            );
            journal.memory.put(book.head + self.new, entry);
            self.new += 1;
            self.room.left = self.room.left.saturating_sub(1);
            book.promised = book.promised.saturating_sub(1);
        }
    }

    /// Has the entries count. Nobody else appends, and no flush looks at the log, as long as what it returns
    /// is held: until what was noted is published, and marked dirty.
    pub(in crate::block::qcow2) fn commit(mut self) -> Noted<'r, 'a> {
        if let Some(entry) = self.last.take() {
            self.write(entry);
        }
        if let (Some(journal), Some(book)) = (self.room.journal, &mut self.book) {
            step!("journal-written");
            book.head += self.new;
            journal.memory.set_head(book.head);
            step!("journal-appended");
        }
        Noted {
            room: self.room,
            book: self.book,
        }
    }
}

/// What was noted is in the log, and may be published.
#[must_use = "what was noted is to be published and marked dirty before this is dropped"]
pub(in crate::block::qcow2) struct Noted<'r, 'a> {
    room: &'r mut Room<'a>,
    book: Option<MutexGuard<'a, Book>>,
}

impl Noted<'_, '_> {
    /// Has a record count from here on. It takes the room for the entry that will replace it.
    pub(in crate::block::qcow2) fn begin_record(&mut self, index: u32) {
        if let (Some(journal), Some(book)) = (self.room.journal, &self.book) {
            debug_assert!(self.room.left > 0, "a record that there is no room for");
            self.room.left = self.room.left.saturating_sub(1);
            journal.memory.begin_record(index, book.head);
            step!("journal-record-begun");
        }
    }

    /// Has a record count no more.
    pub(in crate::block::qcow2) fn end_record(&mut self, index: u32) {
        if let Some(journal) = self.room.journal {
            step!("journal-record-ending");
            journal.memory.end_record(index);
            step!("journal-record-ended");
        }
    }
}

impl Drop for Noted<'_, '_> {
    fn drop(&mut self) {
        if self.book.is_some() {
            step!("journal-published");
        }
    }
}
