//! A second reader of the format, straight and simple: it judges what the first leaves behind.

use std::collections::HashMap;

/// An image in memory.
pub(super) struct Judge<'a> {
    bytes: &'a [u8],
    bits: u32,
    size: u64,
    l1: Vec<u64>,
    refcount_bits: u64,
}

impl<'a> Judge<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut judge = Self {
            bytes,
            bits: 0,
            size: 0,
            l1: Vec::new(),
            refcount_bits: 16,
        };
        assert_eq!(judge.u32(0), 0x5146_49fb);
        judge.bits = judge.u32(20);
        judge.size = judge.u64(24);
        if judge.u32(4) == 3 {
            judge.refcount_bits = 1 << judge.u32(96);
            assert_eq!(judge.u64(72), 0, "incompatible bits");
        }
        let l1 = judge.u64(40);
        judge.l1 = (0..u64::from(judge.u32(36)))
            .map(|n| judge.u64(l1 + n * 8))
            .collect();
        judge
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

    fn entry(&self, cluster: u64) -> u64 {
        let per_table = self.cluster() / 8;
        let table = Self::offset(self.l1[(cluster / per_table) as usize]);
        if table == 0 {
            return 0;
        }
        self.u64(table + cluster % per_table * 8)
    }

    /// A cluster of the virtual disk; `below` shows where nothing is.
    pub(super) fn read(&self, cluster: u64, below: &[u8]) -> Vec<u8> {
        let len = self.cluster() as usize;
        let entry = self.entry(cluster);
        let from = |bytes: &[u8], at: u64| {
            let mut out = vec![0; len];
            let start = (at as usize).min(bytes.len());
            let end = (start + len).min(bytes.len());
            out[..end - start].copy_from_slice(&bytes[start..end]);
            out
        };
        if entry >> 62 & 1 == 1 {
            let (offset, bytes) = self.deflated(entry);
            let end = (offset + bytes).min(self.bytes.len() as u64);
            let mut out = Vec::with_capacity(len);
            let mut inflate = flate2::Decompress::new(false);
            let input = &self.bytes[offset as usize..end as usize];
            let _ = inflate.decompress_vec(input, &mut out, flate2::FlushDecompress::Finish);
            assert_eq!(out.len(), len, "a damaged compressed cluster");
            out
        } else if entry & 1 == 1 {
            vec![0; len]
        } else if Self::offset(entry) == 0 {
            from(below, cluster << self.bits)
        } else {
            from(self.bytes, Self::offset(entry))
        }
    }

    pub(super) fn read_all(&self, below: &[u8]) -> Vec<u8> {
        let mut all = Vec::new();
        for cluster in 0..self.size.div_ceil(self.cluster()) {
            all.extend(self.read(cluster, below));
        }
        all.truncate(self.size as usize);
        all
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

    /// Panics unless every cluster has at least as many references counted as it has, no two things
    /// share one, and COPIED tells the truth. Returns how many clusters leak.
    pub(super) fn check(&self) -> u64 {
        let mut references: HashMap<u64, (u64, &'static str)> = HashMap::new();
        let mut count = |first: u64, clusters: u64, what: &'static str| {
            for cluster in first..first + clusters {
                let entry = references.entry(cluster).or_insert((0, what));
                assert!(
                    entry.0 == 0 || (entry.1 == "compressed" && what == "compressed"),
                    "cluster {cluster} is {what} and {}",
                    entry.1
                );
                entry.0 += 1;
            }
        };
        let cluster = |offset: u64| {
            assert_eq!(offset % self.cluster(), 0, "{offset:#x} is not a cluster");
            offset >> self.bits
        };
        count(0, 1, "header");
        let l1_clusters = (self.l1.len() as u64 * 8).div_ceil(self.cluster());
        count(cluster(self.u64(40)), l1_clusters, "L1");
        let (table, clusters) = (self.u64(48), u64::from(self.u32(56)));
        count(cluster(table), clusters, "refcount table");
        for n in 0..clusters * self.cluster() / 8 {
            let block = self.u64(table + n * 8);
            if block != 0 {
                count(cluster(block), 1, "refcount block");
            }
        }
        for l1 in self.l1.iter().filter(|l1| **l1 != 0) {
            let table = Self::offset(*l1);
            count(cluster(table), 1, "L2");
            assert_eq!(l1 >> 63, 1, "L1 COPIED");
            for n in 0..self.cluster() / 8 {
                let entry = self.u64(table + n * 8);
                if entry >> 62 & 1 == 1 {
                    let (offset, bytes) = self.deflated(entry);
                    let first = offset >> self.bits;
                    let last = (offset + bytes - 1) >> self.bits;
                    count(first, last - first + 1, "compressed");
                } else if Self::offset(entry) != 0 {
                    count(cluster(Self::offset(entry)), 1, "data");
                    assert_eq!(entry >> 63, 1, "COPIED");
                }
            }
        }
        for (cluster, (references, what)) in &references {
            let counted = self.refcount(*cluster);
            assert!(
                counted >= *references,
                "cluster {cluster} ({what}) has {references} references and refcount {counted}"
            );
        }
        let all = (self.bytes.len() as u64).div_ceil(self.cluster());
        (0..all)
            .map(|n| self.refcount(n) - references.get(&n).map_or(0, |r| r.0.min(self.refcount(n))))
            .filter(|leaked| *leaked > 0)
            .count() as u64
    }
}
