//! Images that nobody trusts: thousands of seeded mutations of images of every kind, each of which must end
//! with a result or an error, in bounded memory and with bounded I/O. `fuzz/` runs the same function on what
//! libFuzzer makes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use virtioblkd::reactor::{Epochs, Io, IoConfig};

#[path = "../fuzz/exercise.rs"]
mod exercise;

use exercise::{Outcome, exercise};

/// Mutations of each image.
const ROUNDS: u64 = 120;
/// Bytes that an image of a few hundred KiB may make us have at a time. L2 cache, tables and a window of
/// reads are in this.
const MOST_MEMORY: usize = 192 << 20;
/// Entries into the kernel that it may cost.
const MOST_ENTERS: u64 = 60_000;

/// Zeroed memory of this size is mapped, and costs nothing before it is touched: the map of a disk's slices.
const MAPPED: usize = 32 << 20;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Counts memory; false if there is far too much of it, which ends the process.
fn add(bytes: usize) -> bool {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
    now < 2 * MOST_MEMORY
}

fn counted(layout: Layout) -> usize {
    // What was allocated zeroed is not told when it is freed, so neither is counted.
    if layout.size() >= MAPPED {
        0
    } else {
        layout.size()
    }
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !add(counted(layout)) || layout.size() >= MAPPED {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !add(counted(layout)) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        NOW.fetch_sub(counted(layout), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// Small images of every kind: (name, bytes).
fn images(dir: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let secret = "secret,id=key,data=very-secret";
    let file = dir.join("data-file");
    let data_file = format!("cluster_size=4k,data_file={}", file.display());
    let kinds = [
        ("512", "cluster_size=512"),
        ("64k", "cluster_size=64k"),
        ("version 2", "cluster_size=4k,compat=0.10"),
        ("refcounts of 1 bit", "cluster_size=4k,refcount_bits=1"),
        ("refcounts of 64 bits", "cluster_size=512,refcount_bits=64"),
        ("extended L2", "cluster_size=16k,extended_l2=on"),
        ("zstd", "cluster_size=4k,compression_type=zstd"),
        ("snapshots", "cluster_size=4k"),
        ("bitmaps", "cluster_size=4k"),
        ("lazy", "cluster_size=4k,lazy_refcounts=on"),
        ("data file", data_file.as_str()),
        (
            "luks",
            "cluster_size=512,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        ),
    ];
    let mut images = Vec::new();
    for (name, options) in kinds {
        let path = dir.join("image");
        let path = path.to_str().expect("text");
        run(
            "qemu-img",
            &[
                "create", "-q", "--object", secret, "-f", "qcow2", "-o", options, path, "1M",
            ],
        );
        if name != "luks" {
            let io = |command: &str| run("qemu-io", &["-f", "qcow2", "-c", command, path]);
            io("write -P 1 0 60k");
            io("write -P 2 500k 10k");
            if !["refcounts of 1 bit", "data file"].contains(&name) {
                io("write -c -P 3 832k 64k");
            }
            if name == "snapshots" {
                run("qemu-img", &["snapshot", "-c", "one", path]);
                io("write -P 4 30k 60k");
            }
            if name == "bitmaps" {
                run("qemu-img", &["bitmap", "--add", path, "one"]);
                io("write -P 4 30k 60k");
            }
        }
        images.push((name, std::fs::read(path).expect("image")));
    }
    images
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
}

/// Changes an image where it hurts: half of the time in its first cluster's fields, else in clusters that
/// look like tables.
fn mutate(seed: &mut u64, bytes: &mut Vec<u8>) {
    let cluster = 1usize << bytes[23];
    let tables: Vec<usize> = (0..bytes.len() / cluster)
        .map(|n| n * cluster)
        .filter(|at| {
            let piece = &bytes[*at..*at + 512];
            piece.iter().any(|b| *b != 0) && piece.iter().filter(|b| **b == 0).count() > 200
        })
        .collect();
    for _ in 0..=random(seed) % 4 {
        let at = match random(seed) % 8 {
            0..3 => random(seed) as usize % 112 / 4 * 4,
            3 => random(seed) as usize % 512 / 4 * 4,
            _ => {
                let table = tables[random(seed) as usize % tables.len()];
                table + random(seed) as usize % 512 / 8 * 8
            }
        };
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        let old = u64::from_be_bytes(word);
        let clusters = (bytes.len() / cluster) as u64 + 2;
        let pointer = (random(seed) % clusters) * cluster as u64;
        let new = match random(seed) % 10 {
            0 => old ^ 1 << (random(seed) % 64),
            1 => old.wrapping_add(1),
            2 => old.wrapping_sub(1),
            3 => u64::MAX,
            4 => 0,
            5 => pointer | (old & 1 << 63),
            6 => pointer | 1 << 63,
            7 => pointer | 1 << 62,
            8 => pointer + 512,
            _ => random(seed) << 11 ^ random(seed),
        };
        // Half of the words are two fields of 32 bits.
        let len = if random(seed) % 3 == 0 { 4 } else { 8 };
        bytes[at..at + len].copy_from_slice(&new.to_be_bytes()[8 - len..]);
    }
    match random(seed) % 16 {
        0 => bytes.truncate(random(seed) as usize % bytes.len()),
        1 => bytes.resize(bytes.len() + random(seed) as usize % 100_000, 0),
        _ => {}
    }
}

#[test]
fn mutated_images_end_with_a_result_or_an_error_in_bounded_memory_and_io() {
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("directory");
    let path = dir.path().join("mutated");
    let io = Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring");
    let mut seed = 0x5eed;
    let mut outcomes: Vec<Outcome> = Vec::new();
    let (mut most_memory, mut most_enters) = (0, 0);
    for (name, good) in images(dir.path()) {
        let sound = exercise(&io, &path, &good);
        assert_eq!(sound.checked, Some(0), "{name}");
        assert_eq!(sound.repaired, Some(0), "{name}");
        for round in 0..ROUNDS {
            let mut bytes = good.clone();
            mutate(&mut seed, &mut bytes);
            let start = NOW.load(Ordering::Relaxed);
            PEAK.store(start, Ordering::Relaxed);
            let enters = io.enters();
            let outcome = exercise(&io, &path, &bytes);
            let memory = PEAK.load(Ordering::Relaxed).saturating_sub(start);
            let enters = io.enters() - enters;
            assert!(memory < MOST_MEMORY, "{name}, {round}: {memory} bytes");
            assert!(
                enters < MOST_ENTERS,
                "{name}, {round}: {enters} entries into the kernel"
            );
            most_memory = most_memory.max(memory);
            most_enters = most_enters.max(enters);
            outcomes.push(outcome);
        }
    }
    let count = |wanted: fn(&Outcome) -> bool| outcomes.iter().filter(|o| wanted(o)).count();
    let (read, written) = (count(|o| o.read.is_some()), count(|o| o.written.is_some()));
    let (refused, damaged) = (
        count(|o| o.checked.is_none()),
        count(|o| o.checked > Some(0)),
    );
    println!(
        "{} images: {refused} refused, {damaged} damaged, {read} read, {written} written to; at most \
         {most_memory} bytes and {most_enters} entries into the kernel",
        outcomes.len()
    );
    // Mutations that are all refused would test the header only.
    let tenth = outcomes.len() / 10;
    assert!(refused > tenth && damaged > tenth && read > tenth && written > tenth);
    io.close();
}
