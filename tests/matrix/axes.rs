//! What images differ in, which combinations there are, and which of them are tried.

use std::collections::{BTreeMap, BTreeSet};

use vhost_user_frontend::guest::Random;

/// What is below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    None,
    Raw,
    /// Of an odd number of bytes, and ending inside the image.
    ShortRaw,
    /// A compressed image that is longer.
    LongQcow2,
    /// Four images, each of another size.
    Deep,
}

/// How some of the clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Zlib,
    Zstd,
}

/// Where guest data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataFile {
    None,
    External,
    /// A raw image by itself.
    Raw,
}

/// One image of the matrix.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub backing: Backing,
    pub compression: Compression,
    pub extended_l2: bool,
    pub data_file: DataFile,
    pub luks: bool,
    pub snapshots: usize,
    pub bitmaps: usize,
}

/// A value of each axis, by number.
pub type Choice = [usize; 10];

/// How many values each axis has, in the order of [`Case`]'s fields.
const VALUES: Choice = [2, 13, 7, 5, 3, 2, 3, 2, 4, 3];

impl Case {
    pub fn of(choice: Choice) -> Self {
        let [
            version,
            cluster,
            refcount,
            backing,
            compression,
            extended,
            data,
            luks,
            s,
            b,
        ] = choice;
        Self {
            version: version as u32 + 2,
            cluster_bits: cluster as u32 + 9,
            refcount_bits: 1 << refcount,
            backing: [
                Backing::None,
                Backing::Raw,
                Backing::ShortRaw,
                Backing::LongQcow2,
                Backing::Deep,
            ][backing],
            compression: [Compression::None, Compression::Zlib, Compression::Zstd][compression],
            extended_l2: extended == 1,
            data_file: [DataFile::None, DataFile::External, DataFile::Raw][data],
            luks: luks == 1,
            snapshots: s,
            bitmaps: b,
        }
    }

    /// Why QEMU makes no such image, if it makes none.
    pub fn impossible(&self) -> Option<&'static str> {
        let old = self.version == 2;
        let compressed = self.compression != Compression::None;
        let external = self.data_file != DataFile::None;
        // One reference of each snapshot and one of the active disk.
        let counts = self.refcount_bits >= 8 || self.snapshots < (1 << self.refcount_bits) - 1;
        [
            (
                old && self.refcount_bits != 16,
                "version 2 has refcounts of 16 bits",
            ),
            (
                old && self.extended_l2,
                "version 2 has no extended L2 entries",
            ),
            (old && external, "version 2 has no external data file"),
            (
                old && self.compression == Compression::Zstd,
                "version 2 has no zstd",
            ),
            (old && self.bitmaps > 0, "version 2 has no bitmaps"),
            (
                self.extended_l2 && self.cluster_bits < 14,
                "extended L2 entries need clusters of 16 KiB",
            ),
            (
                external && compressed,
                "an external data file has no compressed clusters",
            ),
            (
                external && self.snapshots > 0,
                "no snapshots with an external data file",
            ),
            (
                self.data_file == DataFile::Raw && self.backing != Backing::None,
                "a raw external data file has no backing file",
            ),
            (
                self.data_file == DataFile::Raw && self.luks,
                "a raw external data file is not encrypted",
            ),
            (!counts, "narrow refcounts do not count that many snapshots"),
            (
                compressed && self.snapshots > 0 && self.refcount_bits < 16,
                "compressed clusters in one cluster, times the snapshots, need wide refcounts",
            ),
        ]
        .into_iter()
        .find(|(holds, _)| *holds)
        .map(|(_, why)| why)
    }
}

/// The combinations to try, and how many were left out, by reason.
#[derive(Debug, Default)]
pub struct Plan {
    pub cases: Vec<Case>,
    pub skipped: BTreeMap<&'static str, u64>,
    /// Pairs of values that are in no possible combination that is served.
    pub impossible_pairs: usize,
}

/// Combinations drawn before it is believed that there is no other.
const DRAWS: usize = 20_000;

type Pair = (usize, usize, usize, usize);

fn pairs(choice: &Choice) -> impl Iterator<Item = Pair> + '_ {
    (0..choice.len())
        .flat_map(move |a| (a + 1..choice.len()).map(move |b| (a, choice[a], b, choice[b])))
}

impl Plan {
    /// Every pair of values that can be together is together in one case at least; then more, by chance,
    /// up to `count`.
    pub fn new(seed: u64, count: usize) -> Self {
        let mut random = Random::new(seed);
        let mut plan = Self::default();
        let mut missing: BTreeSet<Pair> = BTreeSet::new();
        for (a, xs) in VALUES.into_iter().enumerate() {
            for (b, ys) in VALUES.into_iter().enumerate().skip(a + 1) {
                let values = (0..xs).flat_map(|x| (0..ys).map(move |y| (x, y)));
                missing.extend(values.map(|(x, y)| (a, x, b, y)));
            }
        }
        let mut draw = |fixed: Option<&Pair>, skipped: &mut BTreeMap<&'static str, u64>| {
            for _ in 0..DRAWS {
                let mut choice = VALUES.map(|n| random.below(n as u64) as usize);
                if let Some((a, x, b, y)) = fixed {
                    (choice[*a], choice[*b]) = (*x, *y);
                }
                let case = Case::of(choice);
                match case.impossible() {
                    None => return Some(choice),
                    Some(why) => *skipped.entry(why).or_default() += 1,
                }
            }
            None
        };
        while let Some(pair) = missing.first().copied() {
            let Some(first) = draw(Some(&pair), &mut plan.skipped) else {
                missing.remove(&pair);
                plan.impossible_pairs += 1;
                continue;
            };
            // The best of a few that have the pair.
            let more = (0..12).filter_map(|_| draw(Some(&pair), &mut plan.skipped));
            let new = |c: &Choice| pairs(c).filter(|pair| missing.contains(pair)).count();
            let best = std::iter::once(first).chain(more).max_by_key(new);
            let best = best.unwrap_or(first);
            pairs(&best).for_each(|pair| {
                missing.remove(&pair);
            });
            plan.cases.push(Case::of(best));
        }
        while plan.cases.len() < count {
            let Some(choice) = draw(None, &mut plan.skipped) else {
                break;
            };
            plan.cases.push(Case::of(choice));
        }
        plan
    }
}
