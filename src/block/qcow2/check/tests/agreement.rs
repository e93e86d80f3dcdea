//! Our counts are those of `qemu-img check`, of sound images and of damaged ones.
//!
//! Where the two differ on purpose the finding says so ([`OURS`]); where QEMU gives up (its report has
//! "check-errors", or there is none: a refcount block that is not aligned ends its work, and so does
//! a bitmap or a snapshot table that it can not read), we must find an error or give up, too.

use super::zoo::{Animal, zoo};
use super::*;

/// Errors that QEMU's check does not count: entries that neither its reader nor ours can use.
const OURS: [&str; 2] = [
    "which version 2 does not know",
    "the COPIED flag and no offset",
];

/// What became of a comparison.
#[derive(Debug, Default)]
struct Tally {
    same: u64,
    errors: u64,
    leaks: u64,
    gave_up: u64,
    ours_only: u64,
}

impl Tally {
    fn compare(&mut self, io: &Io, animal: &Animal, bytes: &[u8], what: &str) {
        std::fs::write(&animal.path, bytes).unwrap();
        let (ours, theirs) = (ours(io, bytes), animal.check());
        let name = animal.name;
        let Some(theirs) = theirs else {
            let found = ours.as_ref().map_or(1, |report| report.errors);
            assert!(
                found > 0,
                "{name}, {what}: QEMU gives up, and we find nothing"
            );
            self.gave_up += 1;
            return;
        };
        let ours = match ours {
            Ok(report) => report,
            // Our header is stricter: tables must begin inside the file. QEMU reads zeros there.
            Err(error) => {
                assert_eq!(
                    error.kind(),
                    ErrorKind::InvalidImage,
                    "{name}, {what}: {error}"
                );
                self.gave_up += 1;
                return;
            }
        };
        if ours
            .findings
            .iter()
            .any(|f| OURS.iter().any(|text| f.what.contains(text)))
        {
            assert!(ours.errors > theirs.errors, "{name}, {what}");
            self.ours_only += 1;
            return;
        }
        let counts = [
            (ours.errors, theirs.errors),
            (ours.leaks, theirs.leaks),
            (ours.total, theirs.total),
            (ours.allocated, theirs.allocated),
            (ours.fragmented, theirs.fragmented),
            (ours.compressed, theirs.compressed),
            (ours.image_end, theirs.image_end),
        ];
        let same = counts.iter().all(|(a, b)| a == b);
        assert!(same, "{name}, {what}: {counts:?}: {:#?}", ours.findings);
        self.same += 1;
        self.errors += ours.errors;
        self.leaks += ours.leaks;
    }
}

/// Places of 64-bit words of metadata, by what they are.
struct Map {
    words: Vec<(&'static str, u64)>,
    cluster: u64,
    len: u64,
}

impl Map {
    fn new(bytes: &[u8]) -> Self {
        let cluster = 1 << bytes[23];
        let mut map = Self {
            words: Vec::new(),
            cluster,
            len: bytes.len() as u64,
        };
        let half = |at: u64| word(bytes, at) >> 32;
        let extended = bytes[7] == 3 && bytes[79] & 0x10 != 0;
        let offset = |raw: u64| raw & 0x00ff_ffff_ffff_fe00;
        let mut tables = vec![(word(bytes, 40), half(36))];
        let mut snapshot = word(bytes, 64);
        for _ in 0..half(60) {
            map.add("snapshot table", snapshot, 2);
            tables.push((word(bytes, snapshot), half(snapshot + 8)));
            let extra = half(snapshot + 36);
            let names = half(snapshot + 12);
            snapshot =
                (snapshot + 40 + extra + (names >> 16) + (names & 0xffff)).next_multiple_of(8);
        }
        for (l1, entries) in tables {
            map.add("L1", l1, entries);
            for raw in (0..entries).map(|n| word(bytes, l1 + n * 8)) {
                if offset(raw) != 0 {
                    // The first entries are in use; every image has holes behind them.
                    let name = if extended { "extended L2" } else { "L2" };
                    map.add(name, offset(raw), (cluster / 8).min(96));
                }
            }
        }
        map.add("refcount table", word(bytes, 48), 2);
        map.add("refcounts", word(bytes, word(bytes, 48)), 16);
        for at in (104..512).step_by(8) {
            if half(at) == 0x2385_2875 {
                let directory = word(bytes, at + 24);
                map.add("bitmap directory", directory, 3);
                map.add("bitmap table", word(bytes, directory), 1);
            }
        }
        map
    }

    fn add(&mut self, name: &'static str, at: u64, count: u64) {
        self.words.extend((0..count).map(|n| (name, at + n * 8)));
    }

    /// A word of one kind, kinds being equally likely, and another value for it.
    fn damage(&self, seed: &mut u64, bytes: &mut [u8]) -> String {
        let mut names: Vec<&str> = self.words.iter().map(|(name, _)| *name).collect();
        names.dedup();
        let name = names[random(seed) as usize % names.len()];
        let of_kind: Vec<u64> = self
            .words
            .iter()
            .filter(|w| w.0 == name)
            .map(|w| w.1)
            .collect();
        let at = of_kind[random(seed) as usize % of_kind.len()];
        let old = word(bytes, at);
        let flags = old & 0xff00_0000_0000_01ff;
        let clusters = self.len / self.cluster;
        let (how, new) = match random(seed) % 8 {
            0 => ("COPIED flipped", old ^ 1 << 63),
            1 => ("a bit flipped", old ^ 1 << (random(seed) % 64)),
            2 => ("moved", flags | ((random(seed) % clusters) * self.cluster)),
            3 => (
                "moved beyond the end",
                flags | ((clusters + random(seed) % 3) * self.cluster),
            ),
            4 => ("moved far away", flags | (1 << (40 + random(seed) % 16))),
            5 => (
                "moved askew",
                flags | ((random(seed) % clusters) * self.cluster + 512),
            ),
            6 => ("zero", 0),
            _ => ("one more", old.wrapping_add(1)),
        };
        bytes[at as usize..at as usize + 8].copy_from_slice(&new.to_be_bytes());
        format!("{name} at {at:#x} {how}: {old:#x} to {new:#x}")
    }
}

#[test]
fn images_of_every_kind_are_clean_to_both() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let mut tally = Tally::default();
    let animals = zoo(dir.path());
    for animal in &animals {
        tally.compare(&io, animal, &std::fs::read(&animal.path).unwrap(), "sound");
    }
    assert_eq!(tally.same, animals.len() as u64, "{tally:?}");
    assert_eq!((tally.errors, tally.leaks), (0, 0));
    io.close();
}

#[test]
fn damage_of_every_field_is_counted_as_qemu_counts_it() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let mut tally = Tally::default();
    let mut seed = 5;
    for animal in zoo(dir.path()) {
        let good = std::fs::read(&animal.path).unwrap();
        let map = Map::new(&good);
        for round in 0..30 {
            let mut bytes = good.clone();
            let mut what = Vec::new();
            for _ in 0..=round % 3 {
                what.push(map.damage(&mut seed, &mut bytes));
            }
            tally.compare(&io, &animal, &bytes, &what.join("; "));
        }
        for _ in 0..4 {
            let len = random(&mut seed) % good.len() as u64;
            let len = if seed % 2 == 0 {
                len
            } else {
                len / map.cluster * map.cluster
            };
            let what = format!("cut to {len} bytes");
            tally.compare(&io, &animal, &good[..len as usize], &what);
        }
    }
    println!("{tally:?}");
    assert!(
        tally.same > 300 && tally.errors > 500 && tally.leaks > 100,
        "{tally:?}"
    );
    assert!(
        tally.gave_up * 2 < tally.same && tally.ours_only * 8 < tally.same,
        "{tally:?}"
    );
    io.close();
}

#[test]
fn marked_images_are_checked_like_others() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let animal = &zoo(dir.path())[0];
    let good = std::fs::read(&animal.path).unwrap();
    // Dirty; corrupt; both.
    for bits in [1, 2, 3] {
        let mut bytes = good.clone();
        bytes[79] |= bits;
        let mut tally = Tally::default();
        tally.compare(&io, animal, &bytes, "marked");
        assert_eq!((tally.same, tally.errors), (1, 0));
    }
    io.close();
}
