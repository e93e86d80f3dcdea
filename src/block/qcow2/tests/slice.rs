//! Slices by themselves: what goes in comes out, whoever looks meanwhile.

use std::cell::Cell;
use std::sync::atomic::AtomicU64;
use std::thread;

use super::*;
use crate::block::sim::random;
use crate::block::spec::{DiskSpec, Format, Source};

thread_local! {
    /// Chance of a thread that lets others in between its steps.
    static RACES: Cell<u64> = const { Cell::new(0) };
}

/// From here on the thread loses its CPU now and then where that could do harm.
fn let_others_in(seed: u64) {
    RACES.set(seed * 2 + 1);
}

pub(super) fn pause() {
    let mut state = RACES.get();
    if state != 0 {
        if random(&mut state) % 4 == 0 {
            thread::yield_now();
        }
        RACES.set(state);
    }
}

fn shape(cluster_bits: u8, entries: usize, extended: bool) -> Shape {
    Shape {
        cluster_bits,
        entries: u16::try_from(entries).unwrap(),
        extended,
    }
}

/// An entry of any kind: such as there are, and any bits.
fn any_entry(state: &mut u64, bits: u32) -> u64 {
    let number = random(state) << bits;
    match random(state) % 10 {
        0 => 0,
        1 => entry::ZERO,
        2 => number & 0x00ff_ffff_ffff_0000 | entry::COPIED,
        3 => (random(state) & 0xfff_ffff) << bits,
        4 => (random(state) & 0xfff_ffff) << bits | entry::COPIED | entry::ZERO,
        5 => 1 << 62 | random(state) & ((1 << 62) - 1),
        6 => entry::incomplete(random(state) as u32 & entry::MAX_INCOMPLETE),
        7 => entry::BAD,
        _ => random(state) << 32 ^ random(state),
    }
}

#[test]
fn any_sequence_of_entries_comes_back_from_memory_and_goes_to_the_file() {
    let kinds = |seed| {
        [
            (seed, false, false),
            (seed, false, true),
            (seed, true, false),
        ]
    };
    for (seed, extended, row) in (1..40).flat_map(kinds) {
        let mut state = seed * 77;
        let bits = 9 + seed as u32 % 13;
        let entries = 64 << (seed as usize % 4);
        let shape = shape(bits as u8, entries, extended);
        let bitmap = |state: &mut u64| if extended { random(state) } else { 0 };
        let entry = |state: &mut u64, at: u64| match row {
            true => (seed * 5 + at) << bits | entry::COPIED,
            false => any_entry(state, bits),
        };
        let loaded: Vec<(u64, u64)> = (0..entries as u64)
            .map(|at| (entry(&mut state, at), bitmap(&mut state)))
            .collect();
        // Every seventh is not to be used.
        let wrong = |raw: u64| !row && raw % 7 == 3 || entry::is_marker(raw);
        let slice = Slice::new(5, shape, loaded.iter().copied(), |_, raw, _| !wrong(raw));
        assert_eq!(slice.bytes() < shape.bytes(), row);
        for (at, (raw, _)) in loaded.iter().enumerate().filter(|_| row) {
            assert_eq!(slice.get(at), *raw, "seed {seed}");
        }
        // What is in memory, and what belongs into the file.
        let mut memory: Vec<(u64, u64)> = loaded.clone();
        let mut file = loaded.clone();
        for pair in memory.iter_mut().filter(|pair| wrong(pair.0)) {
            pair.0 = entry::BAD;
        }
        let mut taken = slice.bytes();
        for step in 0..600 {
            let at = random(&mut state) as usize % entries;
            let raw = any_entry(&mut state, bits);
            if step % 2 == 0 {
                taken += slice.publish_pair(at, raw, slice.bitmap(at));
                memory[at].0 = raw;
            } else {
                let bitmap = bitmap(&mut state);
                taken += slice.publish_pair(at, raw, bitmap);
                memory[at] = (raw, bitmap);
            }
            file[at] = memory[at];
            if raw == entry::BAD || entry::incomplete_index(raw).is_some() {
                file[at].0 = 0;
            }
            let other = random(&mut state) as usize % entries;
            for at in [at, other] {
                assert_eq!(slice.get(at), memory[at].0, "seed {seed}");
                assert_eq!(slice.bitmap(at), memory[at].1, "seed {seed}");
                assert_eq!(slice.look(at), memory[at], "seed {seed}");
            }
        }
        assert_eq!(slice.bytes(), taken, "memory is accounted for");
        let mut encoded = vec![0; entries * if extended { 16 } else { 8 }];
        slice.encode(&mut encoded, |_| 0);
        let words: Vec<u64> = encoded
            .chunks_exact(8)
            .map(|b| u64::from_be_bytes(b.try_into().unwrap()))
            .collect();
        for (at, (raw, bitmap)) in file.iter().enumerate() {
            if extended {
                assert_eq!(words[at * 2..at * 2 + 2], [*raw, *bitmap], "seed {seed}");
            } else {
                assert_eq!(words[at], *raw, "seed {seed}");
            }
        }
    }
}

const ROUNDS: u64 = 30_000;

/// Publishes by `write` the numbers 1 to [`ROUNDS`] while others see by `read` which is there: none before
/// its time, none after it, and never an older one after a newer.
fn race(write: impl Fn(u64) + Sync, read: impl Fn() -> u64 + Sync) {
    let (begun, ended) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for seed in 0..3 {
            let (begun, ended, read) = (&begun, &ended, &read);
            scope.spawn(move || {
                let_others_in(seed);
                let mut last = 0;
                while last < ROUNDS {
                    let oldest = ended.load(Ordering::SeqCst);
                    let seen = read();
                    let newest = begun.load(Ordering::SeqCst);
                    assert!(oldest <= seen && seen <= newest, "{oldest} {seen} {newest}");
                    assert!(last <= seen, "{seen} after {last}");
                    last = seen;
                }
            });
        }
        let_others_in(7);
        for number in 1..=ROUNDS {
            begun.store(number, Ordering::SeqCst);
            write(number);
            ended.store(number, Ordering::SeqCst);
        }
    });
}

/// An entry that says its number: spilled or not, so that all kinds of changes happen.
fn numbered(number: u64) -> u64 {
    match number % 7 {
        0 | 2 | 3 | 6 => 1 << 62 | number,
        _ => number << 16 | entry::COPIED,
    }
}

fn number_of(raw: u64) -> u64 {
    let number = match raw >> 62 {
        1 => raw & !(1 << 62),
        _ => (raw & !entry::COPIED) >> 16,
    };
    assert_eq!(raw, numbered(number), "nobody published {raw:#x}");
    number
}

#[test]
fn readers_see_what_was_published_and_in_that_order() {
    let first = std::iter::once((numbered(0), 0));
    let slice = Slice::new(0, shape(16, 512, false), first, |_, _, _| true);
    race(
        |number| {
            slice.publish_pair(0, numbered(number), 0);
        },
        || number_of(slice.get(0)),
    );
}

#[test]
fn readers_of_a_row_see_what_was_published_and_in_that_order() {
    for turn in 0..50 {
        // Entry 0 is the number 1.
        let loaded = (1..=512).map(|n| (n << 16 | entry::COPIED, 0));
        let slice = Slice::new(0, shape(16, 512, false), loaded, |_, _, _| true);
        assert!(slice.bytes() < 256);
        thread::scope(|scope| {
            scope.spawn(|| {
                let_others_in(turn);
                let mut last = 1;
                while last < 40 {
                    let seen = number_of(slice.get(0));
                    assert!(last <= seen, "{seen} after {last}");
                    last = seen;
                    assert_eq!(slice.get(511), 512 << 16 | entry::COPIED, "a neighbour");
                }
            });
            // Another writer makes the codes as well.
            scope.spawn(|| {
                let_others_in(turn + 1);
                slice.publish_pair(7, numbered(9), 0);
            });
            let_others_in(turn + 2);
            for number in 2..=40 {
                slice.publish_pair(0, numbered(number), 0);
            }
        });
        assert_eq!(slice.get(7), numbered(9));
    }
}

#[test]
fn what_is_no_row_is_kept_entry_by_entry() {
    let at = |n: u64| n << 16 | entry::COPIED;
    let whole = shape(16, 512, false).bytes();
    let bytes = |change: &dyn Fn(u64) -> Option<u64>| {
        let raw = |n| change(n).unwrap_or(at(n + 9));
        let slice = Slice::new(
            0,
            shape(16, 512, false),
            (0..512).map(|n| (raw(n), 0)),
            |_, _, _| true,
        );
        for n in 0..512 {
            assert_eq!(slice.get(n as usize), raw(n));
        }
        slice.bytes()
    };
    assert!(bytes(&|_| None) < 256, "a row");
    assert_eq!(bytes(&|n| (n == 511).then_some(0)), whole, "a hole");
    assert_eq!(bytes(&|n| (n == 300).then(|| at(5000))), whole, "elsewhere");
    assert_eq!(bytes(&|n| (n == 0).then_some(9 << 16)), whole, "shared");
    assert_eq!(
        bytes(&|_| Some(0)),
        whole,
        "nothing yet: it is about to be written"
    );
}

#[test]
fn readers_see_an_entry_with_its_own_bitmap() {
    let bitmap = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let first = [(numbered(0), bitmap(0)), (numbered(0), bitmap(0))];
    let slice = Slice::new(0, shape(16, 256, true), first.into_iter(), |_, _, _| true);
    let busy = |number: u64| {
        slice.publish_pair(1, numbered(number), bitmap(number));
    };
    race(
        |number| {
            slice.publish_pair(0, numbered(number), bitmap(number));
            // Neighbours are changed as well, and that is nothing to those who look at this one.
            busy(number);
        },
        || {
            let (raw, found) = slice.look(0);
            assert_eq!(found, bitmap(number_of(raw)));
            number_of(raw)
        },
    );
}

#[test]
fn two_writers_to_one_slice_tear_nothing_even_where_values_come_back() {
    // Each pair has a part in common with another one: comparing what was read twice would not do.
    let pairs =
        |n: u64| [(1 << 16, 7), (2 << 16, 8), (3 << 16, 7), (1 << 62 | 5, 9)][n as usize % 4];
    let slice = Slice::new(
        0,
        shape(16, 256, true),
        std::iter::repeat_n(pairs(0), 2),
        |_, _, _| true,
    );
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        for at in 0..2 {
            let (slice, over) = (&slice, &over);
            scope.spawn(move || {
                let_others_in(at as u64);
                while !over.load(Ordering::Relaxed) {
                    let seen = slice.look(at);
                    assert!((0..4).any(|n| pairs(n) == seen), "{seen:x?}");
                }
            });
        }
        let writers: Vec<_> = (0..2)
            .map(|at| {
                let slice = &slice;
                scope.spawn(move || {
                    let_others_in(at as u64 + 5);
                    for n in 0..ROUNDS {
                        slice.publish_pair(at, pairs(n).0, pairs(n).1);
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn the_default_cache_holds_a_terabyte_in_clusters_of_64_kib() {
    let slices = (1usize << 40) / (64 << 10) / 512;
    // Written in any order; and from front to back, with what else the program takes.
    let plain = shape(16, 512, false).bytes() * slices;
    assert!(plain <= 72 << 20, "{plain}");
    let loaded = (0..512).map(|n| (n + 5) << 16 | entry::COPIED);
    let row = Slice::new(
        0,
        shape(16, 512, false),
        loaded.map(|raw| (raw, 0)),
        |_, _, _| true,
    );
    assert!(row.bytes() * slices <= 8 << 20, "{}", row.bytes());
    let default = DiskSpec::new(Source::Null { size: 512 }, Format::Qcow2).l2_cache_bytes;
    assert!(plain as u64 <= default && default <= 128 << 20);
    // An entry with its bitmap takes what both take in the file, less four bytes, and a header.
    let extended = shape(16, 256, true).bytes();
    assert!(extended <= 256 * 12 + 256, "{extended}");
    // Small tables do not pay for large ones.
    assert!(shape(9, 64, false).bytes() <= 64 * 4 + 128);
}
