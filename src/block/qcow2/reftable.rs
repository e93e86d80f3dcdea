//! The refcount table and its blocks (qcow2.rst, "Host cluster management"), with a bounded cache.
//!
//! What may be on disk when:
//!
//! - A new block is written and durable before a table entry points at it; a new table, with the blocks
//!   it adds, before the header does. Both count themselves, so that at any crash they are either not
//!   there at all or referenced exactly once.
//! - The cached counts may be written at any time: they go up before a cluster is handed out and down
//!   only when nothing on disk points at the cluster. Whoever needs them durable calls
//!   [`Refcounts::write_dirty`] and [`Refcounts::sync`].
//! - Dropping a call half-way, or its failure, loses nothing: what may not have reached the disk stays
//!   marked and is written by the next call.

use std::collections::{BTreeSet, HashMap};

use super::header::{Header, MAX_HOST_OFFSET};
use super::refcount::Width;
use super::runs::{Reserved, Run};
use super::units::HostOffset;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Largest refcount table, as QEMU's.
const MAX_TABLE_BYTES: u64 = 8 << 20;
/// Memory for cached blocks, in bytes, and their number at most and at least.
const CACHE_BYTES: u64 = 32 << 20;
const CACHE_BLOCKS: std::ops::RangeInclusive<u64> = 16..=4096;
/// Table bytes read at a time.
const READ_BYTES: usize = 1 << 20;

/// Pieces of a block (of 4 KiB, or the whole of a smaller cluster): one bit each.
type Pieces = [u64; 8];

struct Block {
    data: Box<[u8]>,
    /// Pieces changed since they were written.
    dirty: Pieces,
    /// Pieces written since the last sync.
    unsynced: Pieces,
    used: u64,
}

impl Block {
    fn is_dirty(&self) -> bool {
        self.dirty != Pieces::default()
    }
}

/// Which clusters a scan looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// Blocks that may still be read from disk.
    pub(super) blocks: u64,
    /// Refcounts that may still be looked at.
    pub(super) entries: u64,
}

/// The refcounts of an image.
pub(super) struct Refcounts {
    header: Header,
    width: Width,
    cluster_bits: u32,
    /// log2 of the entries of a block.
    block_bits: u32,
    /// Host offsets of the blocks; 0: there is none, all its refcounts are 0.
    table: Vec<u64>,
    /// Where the table stands.
    place: Run,
    table_dirty: BTreeSet<usize>,
    table_unsynced: BTreeSet<usize>,
    /// The header does not, or not durably, point at `place` yet.
    header_dirty: bool,
    header_unsynced: bool,
    /// Tables that are free once the header's pointer is durable.
    old_tables: Vec<Run>,
    blocks: HashMap<usize, Block>,
    clock: u64,
    max_blocks: usize,
}

impl Refcounts {
    /// Reads the table and checks every entry. `file_end` is the file's size in clusters, rounded up.
    /// Adds header, table and blocks to `reserved`.
    pub(super) async fn open(
        io: &Io,
        storage: &Storage,
        header: &Header,
        file_end: u64,
        reserved: &mut Reserved,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let path = storage.path();
        let bad = |at: u64, what: String| Error::image(ErrorKind::Corrupt, path, at, what);
        let width = Width::new(geometry.refcount_order)
            .ok_or_else(|| bad(96, "the refcount order is above 6".into()))?;
        let cluster_bits = geometry.cluster_bits;
        let at = header.refcount_table_offset.0;
        let place = Run::new(at >> cluster_bits, header.refcount_table_clusters);
        let bytes = place.count << cluster_bits;
        if !geometry.is_aligned(at) || place.count == 0 || bytes > MAX_TABLE_BYTES {
            return Err(bad(
                48,
                format!("a refcount table at {at:#x}, {bytes} bytes"),
            ));
        }
        if place.end() > file_end {
            return Err(bad(
                at,
                "the refcount table ends beyond the end of the file".into(),
            ));
        }
        let clash = |at, what, there| bad(at, format!("the {what} overlaps the {there}"));
        reserved
            .add(Run::new(0, 1), "header")
            .and_then(|()| reserved.add(place, "refcount table"))
            .map_err(|there| clash(at, "refcount table", there))?;
        let table = read_table(io, storage, at, bytes).await?;
        for (index, &offset) in table.iter().enumerate() {
            let entry = at + index as u64 * 8;
            if offset == 0 {
                continue;
            }
            if !geometry.is_aligned(offset) || offset >= MAX_HOST_OFFSET {
                let what = format!("refcount table entry {index} ({offset:#x}) is not valid");
                return Err(bad(entry, what));
            }
            let block = Run::new(offset >> cluster_bits, 1);
            if block.first >= file_end {
                let what =
                    format!("refcount block {index} at {offset:#x} is beyond the end of the file");
                return Err(bad(entry, what));
            }
            reserved
                .add(block, "refcount block")
                .map_err(|there| clash(entry, "refcount block", there))?;
        }
        let max_blocks =
            (CACHE_BYTES >> cluster_bits).clamp(*CACHE_BLOCKS.start(), *CACHE_BLOCKS.end());
        Ok(Self {
            header: header.clone(),
            width,
            cluster_bits,
            block_bits: width.entries_bits(cluster_bits),
            table,
            place,
            table_dirty: BTreeSet::new(),
            table_unsynced: BTreeSet::new(),
            header_dirty: false,
            header_unsynced: false,
            old_tables: Vec::new(),
            blocks: HashMap::new(),
            clock: 0,
            max_blocks: max_blocks as usize,
        })
    }

    /// log2 of the entries of a block.
    pub(super) fn block_bits(&self) -> u32 {
        self.block_bits
    }

    /// The number after the last cluster that the table can count.
    pub(super) fn covered(&self) -> u64 {
        (self.table.len() as u64) << self.block_bits
    }

    /// True if the block with this index exists.
    pub(super) fn has_block(&self, index: usize) -> bool {
        self.table.get(index).is_some_and(|offset| *offset != 0)
    }

    fn cluster_size(&self) -> usize {
        1 << self.cluster_bits
    }

    fn piece_size(&self) -> usize {
        self.cluster_size().min(4096)
    }

    /// The block, from memory or disk; `None` if the image has none there.
    async fn load(
        &mut self,
        io: &Io,
        storage: &Storage,
        index: usize,
    ) -> Result<Option<&mut Block>> {
        let Some(offset) = self.table.get(index).copied().filter(|offset| *offset != 0) else {
            return Ok(None);
        };
        if !self.blocks.contains_key(&index) {
            self.make_room(io, storage).await?;
            let mut buf = io.buf(self.cluster_size());
            storage.read(io, offset, buf.sg()).await?;
            self.insert(index, (*buf).into());
        }
        self.clock += 1;
        let now = self.clock;
        match self.blocks.get_mut(&index) {
            Some(block) => {
                block.used = now;
                Ok(Some(block))
            }
            None => Ok(None),
        }
    }

    fn insert(&mut self, index: usize, data: Box<[u8]>) {
        self.clock += 1;
        let block = Block {
            data,
            dirty: Pieces::default(),
            unsynced: Pieces::default(),
            used: self.clock,
        };
        self.blocks.insert(index, block);
    }

    /// Forgets the older half of the clean blocks if there are too many; writes the dirty ones if all are.
    async fn make_room(&mut self, io: &Io, storage: &Storage) -> Result<()> {
        if self.blocks.len() < self.max_blocks {
            return Ok(());
        }
        if self.blocks.values().all(Block::is_dirty) {
            self.write_dirty(io, storage).await?;
        }
        let clean = self.blocks.values().filter(|block| !block.is_dirty());
        let mut ages: Vec<u64> = clean.map(|block| block.used).collect();
        ages.sort_unstable();
        if let Some(&middle) = ages.get(ages.len() / 2) {
            self.blocks
                .retain(|_, block| block.is_dirty() || block.used > middle);
        }
        Ok(())
    }

    /// One cluster's refcount.
    pub(super) async fn get(&mut self, io: &Io, storage: &Storage, cluster: u64) -> Result<u64> {
        let (width, bits) = (self.width, self.block_bits);
        let index = (cluster >> bits) as usize;
        let entry = (cluster & ((1 << bits) - 1)) as usize;
        let block = self.load(io, storage, index).await?;
        Ok(block.map_or(0, |block| width.get(&block.data, entry)))
    }

    /// Gives every count of `part`, clusters of one block, to `change` and takes what it returns.
    /// Without such a block the counts are 0 and stay so.
    pub(super) async fn update(
        &mut self,
        io: &Io,
        storage: &Storage,
        part: Run,
        mut change: impl FnMut(u64, u64) -> u64,
    ) -> Result<()> {
        let (width, bits, piece) = (self.width, self.block_bits, self.piece_size());
        let index = (part.first >> bits) as usize;
        let Some(block) = self.load(io, storage, index).await? else {
            (part.first..part.end()).for_each(|cluster| {
                change(cluster, 0);
            });
            return Ok(());
        };
        for cluster in part.first..part.end() {
            let entry = (cluster & ((1 << bits) - 1)) as usize;
            let before = width.get(&block.data, entry);
            let after = change(cluster, before).min(width.max());
            if after != before {
                width.set(&mut block.data, entry, after);
                let bit = width.byte_of(entry) / piece;
                block.dirty[bit / 64] |= 1 << (bit % 64);
            }
        }
        Ok(())
    }

    /// The first free run in clusters `from..to`, cut at `max` clusters and at the border of a block;
    /// and where to go on. Stops early, with no run, when the budget is spent.
    pub(super) async fn scan(
        &mut self,
        io: &Io,
        storage: &Storage,
        from: u64,
        to: u64,
        max: u64,
        budget: &mut Budget,
    ) -> Result<(Option<Run>, u64)> {
        let (width, bits) = (self.width, self.block_bits);
        let mut at = from;
        while at < to && max > 0 {
            let index = (at >> bits) as usize;
            let end = (((at >> bits) + 1) << bits).min(to);
            if !self.has_block(index) {
                let run = Run::new(at, (end - at).min(max));
                return Ok((Some(run), run.end()));
            }
            if !self.blocks.contains_key(&index) {
                if budget.blocks == 0 {
                    break;
                }
                budget.blocks -= 1;
            }
            let start = (index as u64) << bits;
            let stop = end.min(at.saturating_add(budget.entries));
            if stop == at {
                break;
            }
            let Some(block) = self.load(io, storage, index).await? else {
                break;
            };
            let range = ((at - start) as usize, (stop - start) as usize);
            let max = usize::try_from(max).unwrap_or(usize::MAX);
            let found = width.zero_run(&block.data, range.0, range.1, max);
            let run = found.map(|(first, count)| Run::new(start + first as u64, count as u64));
            let next = run.map_or(stop, Run::end);
            budget.entries -= next - at;
            at = next;
            if run.is_some() {
                return Ok((run, at));
            }
        }
        Ok((None, at))
    }

    /// Makes blocks: (index, cluster to put it in), the cluster being one that the block itself counts.
    /// They are durable when this returns; the table's entries are not.
    pub(super) async fn create_blocks(
        &mut self,
        io: &Io,
        storage: &Storage,
        new: &[(usize, u64)],
    ) -> Result<()> {
        let mut made = Vec::with_capacity(new.len());
        for &(index, cluster) in new {
            let data = self.block_counting(index, Run::new(cluster, 1));
            let mut buf = io.buf(data.len());
            buf.copy_from_slice(&data);
            storage
                .write(io, cluster << self.cluster_bits, buf.sg())
                .await?;
            made.push(data);
        }
        self.sync(io, storage).await?;
        for (&(index, cluster), data) in new.iter().zip(made) {
            if let Some(entry) = self.table.get_mut(index) {
                *entry = cluster << self.cluster_bits;
                self.table_dirty.insert(index * 8 / self.piece_size());
                self.insert(index, data);
            }
        }
        Ok(())
    }

    /// A block's bytes where just the clusters of `run` that it covers have refcount 1.
    fn block_counting(&self, index: usize, run: Run) -> Box<[u8]> {
        let mut data = vec![0; self.cluster_size()].into_boxed_slice();
        let first = (index as u64) << self.block_bits;
        let end = first + (1 << self.block_bits);
        for cluster in run.first.max(first)..run.end().min(end) {
            self.width.set(&mut data, (cluster - first) as usize, 1);
        }
        data
    }

    /// Makes a larger table, at clusters from `first` on, which the present one does not cover; returns
    /// where the new table and the blocks that count it are. They are durable when this returns; the
    /// header's pointer is written by the next [`Refcounts::write_dirty`].
    pub(super) async fn grow(
        &mut self,
        io: &Io,
        storage: &Storage,
        first: u64,
    ) -> Result<(Run, Run)> {
        let per_cluster = 1u64 << (self.cluster_bits - 3);
        let block_index = |cluster: u64| cluster >> self.block_bits;
        let (mut clusters, mut blocks) = (0, 0);
        loop {
            // More table makes more clusters to count, makes more table.
            let last = block_index(first + clusters + blocks);
            let entries = (last + 1).max((self.table.len() as u64).saturating_mul(3) / 2);
            let limit = MAX_TABLE_BYTES >> self.cluster_bits;
            let mut needs = entries.div_ceil(per_cluster);
            if needs > limit {
                needs = (last + 1).div_ceil(per_cluster);
            }
            let counts = block_index(first + needs + blocks - u64::from(blocks > 0))
                - block_index(first)
                + 1;
            if needs > limit || first + needs + counts > MAX_HOST_OFFSET >> self.cluster_bits {
                let what =
                    "the image can not grow: its refcount table has reached the largest size";
                return Err(Error::image(ErrorKind::NoSpace, storage.path(), None, what));
            }
            if (needs, counts) == (clusters, blocks) {
                break;
            }
            (clusters, blocks) = (needs, counts);
        }
        let place = Run::new(first, clusters);
        let made = Run::new(place.end(), blocks);
        let all = Run::new(first, clusters + blocks);
        let mut table = self.table.clone();
        table.resize((clusters * per_cluster) as usize, 0);
        let mut data = Vec::with_capacity(blocks as usize);
        for (cluster, index) in (made.first..made.end()).zip(block_index(first) as usize..) {
            let block = self.block_counting(index, all);
            let mut buf = io.buf(block.len());
            buf.copy_from_slice(&block);
            storage
                .write(io, cluster << self.cluster_bits, buf.sg())
                .await?;
            table[index] = cluster << self.cluster_bits;
            data.push((index, block));
        }
        let mut at = first << self.cluster_bits;
        for part in table.chunks(READ_BYTES / 8) {
            let mut buf = io.buf(part.len() * 8);
            for (to, entry) in buf.chunks_exact_mut(8).zip(part) {
                to.copy_from_slice(&entry.to_be_bytes());
            }
            storage.write(io, at, buf.sg()).await?;
            at += part.len() as u64 * 8;
        }
        // Whatever the old table still lacked on disk is in the new one.
        self.sync(io, storage).await?;
        self.old_tables.push(self.place);
        self.table = table;
        self.place = place;
        self.table_dirty.clear();
        self.table_unsynced.clear();
        self.header_dirty = true;
        for (index, block) in data {
            self.insert(index, block);
        }
        Ok((place, made))
    }

    /// Writes what changed: table, header, blocks. Nothing of it is durable before [`Refcounts::sync`].
    pub(super) async fn write_dirty(&mut self, io: &Io, storage: &Storage) -> Result<()> {
        let piece = self.piece_size();
        while let Some(&index) = self.table_dirty.first() {
            let mut buf = io.buf(piece);
            let entries = &self.table[index * piece / 8..(index + 1) * piece / 8];
            for (to, entry) in buf.chunks_exact_mut(8).zip(entries) {
                to.copy_from_slice(&entry.to_be_bytes());
            }
            let at = (self.place.first << self.cluster_bits) + (index * piece) as u64;
            self.table_unsynced.insert(index);
            storage.write(io, at, buf.sg()).await?;
            self.table_dirty.remove(&index);
        }
        if self.header_dirty {
            let at = HostOffset(self.place.first << self.cluster_bits);
            let clusters = self.place.count as u32;
            self.header_unsynced = true;
            self.header
                .write_refcount_table(io, storage, at, clusters)
                .await?;
            self.header_dirty = false;
        }
        let pieces = self.cluster_size() / piece;
        for (&index, block) in &mut self.blocks {
            if !block.is_dirty() {
                continue;
            }
            let Some(&offset) = self.table.get(index) else {
                continue;
            };
            let mut from = 0;
            while from < pieces {
                let is_dirty = |bit: usize| block.dirty[bit / 64] >> (bit % 64) & 1 == 1;
                if !is_dirty(from) {
                    from += 1;
                    continue;
                }
                let to = (from..pieces).find(|bit| !is_dirty(*bit)).unwrap_or(pieces);
                let bytes = &block.data[from * piece..to * piece];
                let mut buf = io.buf(bytes.len());
                buf.copy_from_slice(bytes);
                storage
                    .write(io, offset + (from * piece) as u64, buf.sg())
                    .await?;
                for bit in from..to {
                    block.dirty[bit / 64] &= !(1 << (bit % 64));
                    block.unsynced[bit / 64] |= 1 << (bit % 64);
                }
                from = to;
            }
        }
        Ok(())
    }

    /// Makes durable what was written. After a failure the kernel may have dropped it: all of it counts
    /// as not written.
    pub(super) async fn sync(&mut self, io: &Io, storage: &Storage) -> Result<()> {
        let result = storage.flush(io).await;
        for block in self.blocks.values_mut() {
            if result.is_err() {
                for (dirty, lost) in block.dirty.iter_mut().zip(block.unsynced) {
                    *dirty |= lost;
                }
            }
            block.unsynced = Pieces::default();
        }
        let table = std::mem::take(&mut self.table_unsynced);
        let header = std::mem::take(&mut self.header_unsynced);
        if result.is_err() {
            self.table_dirty.extend(table);
            self.header_dirty |= header;
        }
        result
    }

    /// True if there is something for [`Refcounts::write_dirty`].
    pub(super) fn is_dirty(&self) -> bool {
        self.header_dirty
            || !self.table_dirty.is_empty()
            || self.blocks.values().any(Block::is_dirty)
    }

    /// Tables that nothing on disk points at any more; they are the caller's to free.
    pub(super) fn take_old_tables(&mut self) -> Vec<Run> {
        if self.header_dirty || self.header_unsynced {
            return Vec::new();
        }
        std::mem::take(&mut self.old_tables)
    }
}

/// Reads `bytes` of table at host offset `at`.
pub(super) async fn read_table(
    io: &Io,
    storage: &Storage,
    at: u64,
    bytes: u64,
) -> Result<Vec<u64>> {
    let mut table = Vec::with_capacity(bytes as usize / 8);
    let mut done = 0;
    while done < bytes {
        let mut buf = io.buf(READ_BYTES.min((bytes - done) as usize));
        storage.read(io, at + done, buf.sg()).await?;
        let words = buf.chunks_exact(8).filter_map(|b| b.try_into().ok());
        table.extend(words.map(u64::from_be_bytes));
        done += buf.len() as u64;
    }
    Ok(table)
}
