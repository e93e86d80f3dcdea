//! A second reader of the format, straight and simple: it judges what the first leaves behind.
//!
//! `docs/interop/qcow2.rst`. It knows internal snapshots, extended L2 entries and bitmaps, also where
//! the first reader does not.

use std::collections::{HashMap, HashSet};
use std::io::Read;

/// Incompatible feature: compressed otherwise than by deflate, here by zstd.
const COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: extended L2 entries.
const EXTENDED_L2: u64 = 1 << 4;
/// The bitmaps extension, and the autoclear bit that says that it holds.
const BITMAPS: u32 = 0x2385_2875;
const BITMAPS_HOLD: u64 = 1;

/// An image in memory.
pub(super) struct Judge<'a> {
    bytes: &'a [u8],
    bits: u32,
    size: u64,
    /// Bytes of an L2 entry.
    entry_bytes: u64,
    zstd: bool,
    refcount_bits: u64,
    active: Table,
    snapshots: Vec<Table>,
    /// Of the snapshot table.
    snapshot_bytes: u64,
}

/// An L1 table.
struct Table {
    offset: u64,
    l1: Vec<u64>,
    /// Bytes of the disk that it maps.
    size: u64,
}

/// References as they are counted: how many, and what the cluster is.
#[derive(Default)]
struct References(HashMap<u64, (u64, &'static str)>);

impl References {
    fn count(&mut self, first: u64, clusters: u64, what: &'static str, may_share: bool) {
        for cluster in first..first + clusters {
            let entry = self.0.entry(cluster).or_insert((0, what));
            assert!(
                entry.0 == 0 || (may_share && entry.1 == what),
                "cluster {cluster} is {what} and {}",
                entry.1
            );
            entry.0 += 1;
        }
    }
}

impl<'a> Judge<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut judge = Self {
            bytes,
            bits: 0,
            size: 0,
            entry_bytes: 8,
            zstd: false,
            refcount_bits: 16,
            active: Table {
                offset: 0,
                l1: Vec::new(),
                size: 0,
            },
            snapshots: Vec::new(),
            snapshot_bytes: 0,
        };
        assert_eq!(judge.u32(0), 0x5146_49fb);
        judge.bits = judge.u32(20);
        judge.size = judge.u64(24);
        if judge.u32(4) == 3 {
            judge.refcount_bits = 1 << judge.u32(96);
            let features = judge.u64(72);
            let unknown = features & !(EXTENDED_L2 | COMPRESSION);
            assert_eq!(unknown, 0, "incompatible bits");
            judge.zstd = features & COMPRESSION != 0;
            if features & EXTENDED_L2 != 0 {
                judge.entry_bytes = 16;
            }
        }
        judge.active = judge.table(judge.u64(40), judge.u32(36), judge.size);
        let first = judge.u64(64);
        let mut at = first;
        for _ in 0..judge.u32(60) {
            let (id, name) = (judge.u32(at + 12) >> 16, judge.u32(at + 12) & 0xffff);
            let extra = judge.u32(at + 36);
            let size = match extra {
                16.. => judge.u64(at + 48),
                _ => judge.size,
            };
            let table = judge.table(judge.u64(at), judge.u32(at + 8), size);
            judge.snapshots.push(table);
            at += (40 + u64::from(extra) + u64::from(id) + u64::from(name)).next_multiple_of(8);
        }
        judge.snapshot_bytes = at - first;
        judge
    }

    fn table(&self, offset: u64, entries: u32, size: u64) -> Table {
        let entry = |n| self.u64(offset + n * 8);
        Table {
            offset,
            l1: (0..u64::from(entries)).map(entry).collect(),
            size,
        }
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        let at = at as usize;
        for (n, byte) in out.iter_mut().enumerate() {
            *byte = self.bytes.get(at + n).copied().unwrap_or(0);
        }
        out
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(self.get(at))
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.get(at))
    }

    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    /// The cluster that begins at an offset.
    fn at(&self, offset: u64) -> u64 {
        assert_eq!(offset % self.cluster(), 0, "{offset:#x} is not a cluster");
        offset >> self.bits
    }

    fn offset(entry: u64) -> u64 {
        entry & 0x00ff_ffff_ffff_fe00
    }

    /// (offset, bytes) of a compressed cluster.
    fn deflated(&self, entry: u64) -> (u64, u64) {
        let x = 62 - (self.bits - 8);
        let offset = entry & ((1 << x) - 1);
        let sectors = ((entry & !(1 << 62)) >> x) + 1;
        (offset, sectors * 512 - offset % 512)
    }

    fn unpack(&self, input: &[u8], len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        if self.zstd {
            let decoder = zstd::Decoder::new(input).expect("a decoder");
            let read = decoder.single_frame().read_exact(&mut out);
            read.expect("a damaged compressed cluster");
        } else {
            let mut inflate = flate2::Decompress::new(false);
            let _ = inflate.decompress(input, &mut out, flate2::FlushDecompress::Finish);
            let whole = inflate.total_out() == len as u64;
            assert!(whole, "a damaged compressed cluster");
        }
        out
    }

    /// An L2 entry, and its bitmap where entries are extended.
    fn entry(&self, table: &Table, cluster: u64) -> (u64, u64) {
        let per_table = self.cluster() / self.entry_bytes;
        let l1 = table.l1.get((cluster / per_table) as usize);
        match Self::offset(l1.copied().unwrap_or(0)) {
            0 => (0, 0),
            l2 => self.entry_at(l2, cluster % per_table),
        }
    }

    fn entry_at(&self, l2: u64, n: u64) -> (u64, u64) {
        let at = l2 + n * self.entry_bytes;
        let bitmap = match self.entry_bytes {
            16 => self.u64(at + 8),
            _ => 0,
        };
        (self.u64(at), bitmap)
    }

    /// A cluster of a disk; `below` shows where nothing is.
    fn read(&self, table: &Table, cluster: u64, below: &[u8]) -> Vec<u8> {
        let (entry, bitmap) = self.entry(table, cluster);
        let len = self.cluster() as usize;
        let from = |source: &[u8], at: u64, len: usize| {
            let mut out = vec![0; len];
            let start = (at as usize).min(source.len());
            let end = (start + len).min(source.len());
            out[..end - start].copy_from_slice(&source[start..end]);
            out
        };
        if entry >> 62 & 1 == 1 {
            let (offset, bytes) = self.deflated(entry);
            let end = (offset + bytes).min(self.bytes.len() as u64);
            self.unpack(&self.bytes[offset as usize..end as usize], len)
        } else if self.entry_bytes == 16 {
            let part = len / 32;
            let piece = |n: u64| {
                let at = n * part as u64;
                match (bitmap >> n & 1, bitmap >> (32 + n) & 1) {
                    (0, 0) => from(below, (cluster << self.bits) + at, part),
                    (0, 1) => vec![0; part],
                    (1, 0) => from(self.bytes, Self::offset(entry) + at, part),
                    _ => panic!("a subcluster is allocated and zero"),
                }
            };
            (0..32).flat_map(piece).collect()
        } else if entry & 1 == 1 {
            vec![0; len]
        } else if Self::offset(entry) == 0 {
            from(below, cluster << self.bits, len)
        } else {
            from(self.bytes, Self::offset(entry), len)
        }
    }

    fn read_table(&self, table: &Table, below: &[u8]) -> Vec<u8> {
        let mut all = Vec::with_capacity(table.size as usize);
        for cluster in 0..table.size.div_ceil(self.cluster()) {
            all.extend(self.read(table, cluster, below));
        }
        all.truncate(table.size as usize);
        all
    }

    /// The disk.
    pub(super) fn read_all(&self, below: &[u8]) -> Vec<u8> {
        self.read_table(&self.active, below)
    }

    /// The disks of the internal snapshots.
    pub(super) fn read_snapshots(&self, below: &[u8]) -> Vec<Vec<u8>> {
        let read = |table| self.read_table(table, below);
        self.snapshots.iter().map(read).collect()
    }

    pub(super) fn refcount(&self, cluster: u64) -> u64 {
        let per_block = self.cluster() * 8 / self.refcount_bits;
        let (table, clusters) = (self.u64(48), u64::from(self.u32(56)));
        if cluster / per_block >= clusters * self.cluster() / 8 {
            return 0;
        }
        let block = self.u64(table + cluster / per_block * 8) & !511;
        if block == 0 {
            return 0;
        }
        let index = cluster % per_block;
        if self.refcount_bits >= 8 {
            let bytes = self.refcount_bits / 8;
            (0..bytes).fold(0, |value, n| {
                value << 8 | u64::from(self.get::<1>(block + index * bytes + n)[0])
            })
        } else {
            let byte = self.get::<1>(block + index * self.refcount_bits / 8)[0];
            let shift = index * self.refcount_bits % 8;
            u64::from(byte) >> shift & ((1 << self.refcount_bits) - 1)
        }
    }

    /// The clusters of one disk: tables, and what they point at. Each once, but for compressed ones.
    fn count_disk(&self, table: &Table, references: &mut References) {
        let l1_clusters = (table.l1.len() as u64 * 8).div_ceil(self.cluster());
        references.count(self.at(table.offset), l1_clusters, "L1", false);
        let mut own = HashSet::new();
        let mut once = |cluster, what| assert!(own.insert(cluster), "{what} {cluster} twice");
        for l1 in table.l1.iter().filter(|l1| **l1 != 0) {
            let l2 = Self::offset(*l1);
            once(self.at(l2), "L2");
            references.count(self.at(l2), 1, "L2", true);
            for n in 0..self.cluster() / self.entry_bytes {
                let (entry, bitmap) = self.entry_at(l2, n);
                assert_eq!(bitmap & bitmap >> 32 & 0xffff_ffff, 0, "{bitmap:#x}");
                if entry >> 62 & 1 == 1 {
                    let (offset, bytes) = self.deflated(entry);
                    let first = offset >> self.bits;
                    let last = (offset + bytes - 1) >> self.bits;
                    references.count(first, last - first + 1, "compressed", true);
                    assert_eq!(bitmap, 0, "compressed, with a bitmap");
                } else if Self::offset(entry) != 0 {
                    once(self.at(Self::offset(entry)), "data");
                    references.count(self.at(Self::offset(entry)), 1, "data", true);
                } else {
                    assert_eq!(bitmap & 0xffff_ffff, 0, "subclusters of no cluster");
                }
            }
        }
    }

    /// COPIED is set in the active tables where a cluster is referenced once, and only there.
    fn check_copied(&self) {
        let exact = |entry: u64, what: &str| {
            let (cluster, copied) = (self.at(Self::offset(entry)), entry >> 63 == 1);
            let refcount = self.refcount(cluster);
            assert_eq!(
                copied,
                refcount == 1,
                "COPIED of {what} {cluster}: {refcount}"
            );
            assert!(copied || !self.snapshots.is_empty(), "{what} COPIED");
        };
        for l1 in self.active.l1.iter().filter(|l1| **l1 != 0) {
            exact(*l1, "L2");
            for n in 0..self.cluster() / self.entry_bytes {
                let entry = self.entry_at(Self::offset(*l1), n).0;
                if entry >> 62 & 1 == 0 && Self::offset(entry) != 0 {
                    exact(entry, "data");
                }
            }
        }
    }

    fn count_bitmaps(&self, references: &mut References) {
        if self.u32(4) < 3 || self.u64(88) & BITMAPS_HOLD == 0 {
            return;
        }
        let mut at = u64::from(self.u32(100));
        while self.u32(at) != 0 && self.u32(at) != BITMAPS {
            at += 8 + u64::from(self.u32(at + 4)).next_multiple_of(8);
        }
        let (count, bytes, directory) = (self.u32(at + 8), self.u64(at + 16), self.u64(at + 24));
        let clusters = bytes.div_ceil(self.cluster());
        references.count(self.at(directory), clusters, "bitmap directory", false);
        let mut at = directory;
        for _ in 0..count {
            let (table, entries) = (self.u64(at), u64::from(self.u32(at + 8)));
            let clusters = (entries * 8).div_ceil(self.cluster());
            references.count(self.at(table), clusters, "bitmap table", false);
            for n in 0..entries {
                match Self::offset(self.u64(table + n * 8)) {
                    0 => {}
                    bits => references.count(self.at(bits), 1, "bitmap", false),
                }
            }
            let name = u64::from(self.u32(at + 16) & 0xffff);
            at += (24 + name + u64::from(self.u32(at + 20))).next_multiple_of(8);
        }
    }

    fn references(&self) -> References {
        let mut references = References::default();
        references.count(0, 1, "header", false);
        let (table, clusters) = (self.u64(48), u64::from(self.u32(56)));
        references.count(self.at(table), clusters, "refcount table", false);
        for n in 0..clusters * self.cluster() / 8 {
            let block = self.u64(table + n * 8);
            if block != 0 {
                references.count(self.at(block), 1, "refcount block", false);
            }
        }
        if self.snapshot_bytes > 0 {
            let clusters = self.snapshot_bytes.div_ceil(self.cluster());
            references.count(self.at(self.u64(64)), clusters, "snapshot table", false);
        }
        for table in std::iter::once(&self.active).chain(&self.snapshots) {
            self.count_disk(table, &mut references);
        }
        self.count_bitmaps(&mut references);
        references
    }

    /// Host clusters that hold no guest data.
    pub(super) fn metadata(&self) -> HashSet<u64> {
        let all = self.references().0.into_iter();
        all.filter(|(_, (_, what))| *what != "data" && *what != "compressed")
            .map(|(cluster, _)| cluster)
            .collect()
    }

    /// Panics unless every cluster has at least as many references counted as it has, nothing shares
    /// one with anything but another disk's same thing, and COPIED tells the truth. Returns how many
    /// clusters leak.
    pub(super) fn check(&self) -> u64 {
        let references = self.references().0;
        for (cluster, (references, what)) in &references {
            let counted = self.refcount(*cluster);
            assert!(
                counted >= *references,
                "cluster {cluster} ({what}) has {references} references and refcount {counted}"
            );
        }
        self.check_copied();
        let all = (self.bytes.len() as u64).div_ceil(self.cluster());
        (0..all).filter(|n| self.leaks(*n, &references)).count() as u64
    }

    fn leaks(&self, cluster: u64, references: &HashMap<u64, (u64, &'static str)>) -> bool {
        self.refcount(cluster) > references.get(&cluster).map_or(0, |r| r.0)
    }

    /// As [`Judge::check`], and counts also clusters behind the end of the file that have refcounts: they
    /// leak when the file has grown.
    pub(super) fn check_all(&self) -> u64 {
        self.check();
        let references = self.references().0;
        let per_block = self.cluster() * 8 / self.refcount_bits;
        let (table, clusters) = (self.u64(48), u64::from(self.u32(56)));
        (0..clusters * self.cluster() / 8)
            .filter(|n| self.u64(table + n * 8) != 0)
            .flat_map(|n| n * per_block..(n + 1) * per_block)
            .filter(|n| self.leaks(*n, &references))
            .count() as u64
    }
}
