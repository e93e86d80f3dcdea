//! The journal's memory: where things are in it, and what they may be.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | [`MAGIC`]; 0: nothing is in the journal, whatever the rest holds |
//! | 8 to 47 | whose journal it is ([`Identity`]) |
//! | 128, 192 | head and tail of the log: entries appended, and entries dropped, since its beginning |
//! | 4096 | a slot for each record of an incomplete cluster |
//! | behind that | the log: a ring of entries of 32 bytes |
//!
//! All numbers are of 64 bits, in the machine's byte order. While an image is in use the memory is written and
//! never read; what is read when a journal is opened is checked.

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use super::super::record::{most_records, words_of};
use super::super::units::{Geometry, GuestCluster};
use super::step;
use crate::shared_memory::SharedPart;

/// "vblkjrn", and the version of what is described here.
const MAGIC: u64 = u64::from_le_bytes(*b"vblkjrn\x01");
/// Byte offsets of what comes first.
const IDENTITY: usize = 8;
const SHAPE: usize = IDENTITY + 32;
const HEAD: usize = 128;
const TAIL: usize = 192;
const SLOTS: usize = 4096;
/// Words of a slot before its bits: when the record began, guest cluster, host offset, old entry.
const SLOT_WORDS: usize = 4;
const ENTRY_BYTES: usize = 32;
/// A log with room for less is of no use.
const MIN_ENTRIES: u64 = 4096;
/// Bits of a guest cluster, or of an index into the L1 table, in an entry; above are a count less one, and
/// the kind.
const INDEX_BITS: u32 = 48;
const COUNT_BITS: u32 = 12;
/// Clusters in one entry, at most.
pub(super) const MAX_COUNT: u64 = 1 << COUNT_BITS;

/// Whose journal it is: image and data file (device and inode of each), and what kind of image it is; in the
/// last word's first byte, how many bits a cluster has.
pub(super) type Identity = [u64; 5];

/// What an entry of the log says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// The L1 entry of this index.
    Link { index: u64, raw: u64 },
    /// The L2 entries and bitmaps of `count` clusters. `host_steps`: each is in the host cluster behind that
    /// of the one before; else they are the same.
    Map {
        guest: GuestCluster,
        count: u64,
        raw: u64,
        bitmap: u64,
        host_steps: bool,
    },
}

impl Entry {
    fn words(self) -> [u64; 3] {
        let first = |kind: u64, count: u64, index: u64| {
            kind << (INDEX_BITS + COUNT_BITS) | (count - 1) << INDEX_BITS | index
        };
        match self {
            Self::Link { index, raw } => [first(1, 1, index), raw, 0],
            Self::Map {
                guest,
                count,
                raw,
                bitmap,
                host_steps,
            } => [
                first(if host_steps { 3 } else { 2 }, count, guest.0),
                raw,
                bitmap,
            ],
        }
    }

    fn from_words([first, raw, bitmap]: [u64; 3]) -> Option<Self> {
        let index = first & ((1 << INDEX_BITS) - 1);
        let count = (first >> INDEX_BITS & (MAX_COUNT - 1)) + 1;
        match (first >> (INDEX_BITS + COUNT_BITS), count) {
            (1, 1) if bitmap == 0 => Some(Self::Link { index, raw }),
            (kind @ (2 | 3), _) => Some(Self::Map {
                guest: GuestCluster(index),
                count,
                raw,
                bitmap,
                host_steps: kind == 3,
            }),
            _ => None,
        }
    }
}

/// Ties an entry to its place in the order, and shows whether somebody has written over it.
fn check_word(number: u64, words: [u64; 3]) -> u64 {
    words.into_iter().fold(!number, |sum, word| {
        let sum = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum ^ sum >> 29
    })
}

/// The record of an incomplete cluster, as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    /// Entries that were in the log when it began: what was appended later has replaced it.
    pub(super) since: u64,
    pub(super) guest: GuestCluster,
    /// The new cluster's host offset.
    pub(super) host: u64,
    pub(super) old: u64,
    /// A bit for each sector that is in the new cluster.
    pub(super) written: Vec<u64>,
}

/// What a journal holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The number of the first entry.
    pub(super) first: u64,
    pub(super) entries: Vec<Entry>,
    pub(super) records: Vec<Kept>,
}

impl Contents {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.records.is_empty()
    }
}

/// The memory of one image's journal.
#[derive(Clone, Debug)]
pub(in crate::block::qcow2) struct Memory {
    part: SharedPart,
    slots: usize,
    /// Of a slot's bits.
    words: usize,
    log: usize,
    capacity: u64,
}

impl Memory {
    /// None: the memory is too small, or not aligned.
    pub(super) fn new(part: SharedPart, g: &Geometry) -> Option<Self> {
        Self::of_clusters(part, g.cluster_bits)
    }

    fn of_clusters(part: SharedPart, cluster_bits: u32) -> Option<Self> {
        let (slots, words) = (2 * most_records(cluster_bits), words_of(cluster_bits));
        let log = SLOTS + slots * (SLOT_WORDS + words) * 8;
        let log = log.next_multiple_of(ENTRY_BYTES);
        let capacity = part.len().checked_sub(log)? / ENTRY_BYTES;
        let memory = Self {
            slots,
            words,
            log,
            capacity: capacity as u64,
            part,
        };
        memory.part.atomics::<AtomicU64>(0, log / 8)?;
        (memory.capacity >= MIN_ENTRIES).then_some(memory)
    }

    /// Entries that the log has room for.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity
    }

    fn load(&self, at: usize) -> u64 {
        let word = self.part.atomic::<AtomicU64>(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn store(&self, at: usize, value: u64) {
        if let Some(word) = self.part.atomic::<AtomicU64>(at) {
            word.store(value, Ordering::Release);
        }
    }

    // ---- as a whole ----

    /// What a process has left; the error says what is wrong with it.
    pub(super) fn read(&self, identity: &Identity) -> Result<Contents, String> {
        match self.load(0) {
            0 => return Ok(Contents::default()),
            MAGIC => {}
            _ => {
                return Err("holds no journal, or one of another version of this program".into());
            }
        }
        let (head, tail) = (self.load(HEAD), self.load(TAIL));
        let is_ours = (0..identity.len()).all(|n| self.load(IDENTITY + n * 8) == identity[n]);
        if !is_ours {
            return match is_empty(&self.part) {
                true => Ok(Contents::default()),
                false => Err("holds the journal of another image".into()),
            };
        }
        if tail > head || head - tail > self.capacity {
            return Err(format!("is damaged: entries {tail} to {head}"));
        }
        let mut entries = Vec::new();
        for number in tail..head {
            let entry = self.entry(number);
            let damaged = || format!("is damaged: entry {number} of {tail} to {head}");
            entries.push(entry.ok_or_else(damaged)?);
        }
        let slots = (0..self.slots).map(|index| self.slot_at(index));
        let begun = slots.filter(|at| self.load(*at) != 0);
        let records: Vec<Kept> = begun.map(|at| self.record(at)).collect();
        if let Some(record) = records.iter().find(|record| record.since > head) {
            return Err(format!("is damaged: a record of {}", record.since));
        }
        Ok(Contents {
            first: tail,
            entries,
            records,
        })
    }

    /// Says that nothing is in the journal. One store: it is in force at once, or not at all.
    pub(super) fn clear(&self) {
        step!("journal-clearing");
        self.store(0, 0);
        compiler_fence(Ordering::SeqCst);
    }

    /// Makes it an empty journal of an image.
    pub(super) fn begin(&self, identity: &Identity) {
        self.clear();
        for (n, word) in identity.iter().enumerate() {
            self.store(IDENTITY + n * 8, *word);
        }
        self.store(HEAD, 0);
        self.store(TAIL, 0);
        (0..self.slots).for_each(|index| self.store(self.slot_at(index), 0));
        compiler_fence(Ordering::SeqCst);
        self.store(0, MAGIC);
    }

    // ---- the log ----

    fn entry_at(&self, number: u64) -> usize {
        self.log + (number % self.capacity) as usize * ENTRY_BYTES
    }

    /// Puts an entry in its place. It counts when the head is behind it.
    pub(super) fn put(&self, number: u64, entry: Entry) {
        let (at, words) = (self.entry_at(number), entry.words());
        for (n, word) in words.into_iter().enumerate() {
            self.store(at + n * 8, word);
        }
        self.store(at + 24, check_word(number, words));
    }

    fn entry(&self, number: u64) -> Option<Entry> {
        let at = self.entry_at(number);
        let words = [self.load(at), self.load(at + 8), self.load(at + 16)];
        (self.load(at + 24) == check_word(number, words)).then_some(())?;
        Entry::from_words(words)
    }

    /// Says that all entries before `head` are there.
    pub(super) fn set_head(&self, head: u64) {
        compiler_fence(Ordering::SeqCst);
        self.store(HEAD, head);
        compiler_fence(Ordering::SeqCst);
    }

    /// Drops all entries before `tail`.
    pub(super) fn set_tail(&self, tail: u64) {
        compiler_fence(Ordering::SeqCst);
        self.store(TAIL, tail);
        compiler_fence(Ordering::SeqCst);
    }

    // ---- records ----

    fn slot_at(&self, index: usize) -> usize {
        SLOTS + index * (SLOT_WORDS + self.words) * 8
    }

    fn record(&self, at: usize) -> Kept {
        let bits = (0..self.words).map(|n| self.load(at + (SLOT_WORDS + n) * 8));
        Kept {
            since: self.load(at) - 1,
            guest: GuestCluster(self.load(at + 8)),
            host: self.load(at + 16),
            old: self.load(at + 24),
            written: bits.collect(),
        }
    }

    /// Readies the slot of a record that does not count yet.
    pub(in crate::block::qcow2) fn prepare(&self, index: u32, guest: u64, host: u64, old: u64) {
        let at = self.slot_at(index as usize);
        self.store(at + 8, guest);
        self.store(at + 16, host);
        self.store(at + 24, old);
        (0..self.words).for_each(|n| self.store(at + (SLOT_WORDS + n) * 8, 0));
    }

    /// Has a record count from entry `since` of the log on.
    pub(super) fn begin_record(&self, index: u32, since: u64) {
        step!("journal-record-ready");
        compiler_fence(Ordering::SeqCst);
        self.store(self.slot_at(index as usize), since + 1);
        compiler_fence(Ordering::SeqCst);
    }

    /// Notes sectors of a record that are in the new cluster.
    pub(in crate::block::qcow2) fn mark(&self, index: u32, word: usize, mask: u64) {
        let at = self.slot_at(index as usize) + (SLOT_WORDS + word) * 8;
        if let Some(word) = self.part.atomic::<AtomicU64>(at) {
            word.fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Has a record count no more: an entry of the log says what has become of its cluster.
    pub(super) fn end_record(&self, index: u32) {
        compiler_fence(Ordering::SeqCst);
        self.store(self.slot_at(index as usize), 0);
        compiler_fence(Ordering::SeqCst);
    }
}

/// True unless there is something in the memory that a process has left, of whatever image.
pub(in crate::block) fn is_empty(part: &SharedPart) -> bool {
    let word = |at: usize| {
        let word = part.atomic::<AtomicU64>(at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    };
    if word(0) == 0 {
        return true;
    }
    // Where its records are depends on the size of its clusters.
    let bits = word(SHAPE) as u8;
    let is_known = word(0) == MAGIC && (9..=21).contains(&bits);
    let Some(memory) = is_known
        .then(|| Memory::of_clusters(part.clone(), bits.into()))
        .flatten()
    else {
        return false;
    };
    let records = (0..memory.slots).all(|index| memory.load(memory.slot_at(index)) == 0);
    records && word(HEAD) == word(TAIL)
}
