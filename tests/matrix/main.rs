//! The matrix of images: whatever `qemu-img` makes is read as `qemu-img` reads it, and written to so that it
//! stays what it is.
//!
//! Every pair of properties that an image can have together is in one of the images at least. Each is made
//! with random contents, compared, changed by random requests beside a model in memory, closed and opened
//! again in between, and judged by `qemu-img`: clean, with the model's contents, snapshots and bitmaps intact.

mod axes;
mod image;

use std::sync::atomic::{AtomicUsize, Ordering};

use axes::{Case, Plan};
use image::Image;
use vhost_user_frontend::guest::Random;
use virtioblkd::block::crypt::{KeySource, KeySpec};
use virtioblkd::block::{ActiveDisk, Disk, DiskSpec, Error, Format, Source};
use virtioblkd::reactor::{Epochs, Io, IoConfig};

/// Images, at least; requests to each, in two sessions.
const IMAGES: usize = 200;
const REQUESTS: usize = 40;
fn open(io: &Io, image: &Image) -> Result<std::sync::Arc<ActiveDisk>, Error> {
    let path = image.path();
    let mut spec = DiskSpec::new(Source::File { path }, Format::Qcow2);
    if let Some(key) = image.key_file() {
        spec.keys.push(KeySpec {
            image: None,
            source: KeySource::File(key),
        });
    }
    io.block_on(async { Disk::open(io, spec).await?.activate(io, 0).await })
}

fn read(io: &Io, disk: &ActiveDisk, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = io.buf(len);
    let done = io.block_on(disk.read(io, offset, buf.sg()));
    done.unwrap_or_else(|error| panic!("reading {len} bytes at {offset}: {error}"));
    buf.to_vec()
}

/// Compares all of the disk with the model, without printing megabytes.
fn compare(io: &Io, disk: &ActiveDisk, model: &[u8], when: &str) {
    assert_eq!(disk.size(), model.len() as u64, "{when}");
    for (n, want) in model.chunks(1 << 20).enumerate() {
        let got = read(io, disk, (n as u64) << 20, want.len());
        if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
            let at = at + (n << 20);
            panic!(
                "{when}: byte {at:#x} is {:#x}, not {:#x}",
                got[at & 0xf_ffff],
                model[at]
            );
        }
    }
}

fn request(io: &Io, disk: &ActiveDisk, model: &mut [u8], cluster: u64, random: &mut Random) {
    let sectors = model.len() as u64 / 512;
    let first = random.below(sectors);
    let most = [1, 8, 200, 2 * cluster / 512][random.below(4) as usize].clamp(1, 1024);
    let count = (1 + random.below(most)).min(sectors - first);
    let (offset, len) = (first * 512, count * 512);
    let part = &mut model[offset as usize..(offset + len) as usize];
    let done = match random.below(8) {
        0..4 => {
            random.fill(part);
            let mut buf = io.buf(part.len());
            buf.copy_from_slice(part);
            io.block_on(disk.write(io, offset, buf.sg()))
        }
        4 => {
            part.fill(0);
            io.block_on(disk.write_zeroes(io, offset, len, random.below(2) == 0))
        }
        5 => {
            let done = io.block_on(disk.discard(io, offset, len));
            // Sectors read as zeros then, or as before.
            let after = read(io, disk, offset, part.len());
            for (after, before) in after.chunks(512).zip(part.chunks(512)) {
                let known = after == before || after.iter().all(|byte| *byte == 0);
                assert!(
                    known,
                    "a discard of {len} bytes at {offset} left something else"
                );
            }
            part.copy_from_slice(&after);
            done
        }
        6 => io.block_on(disk.flush(io)),
        _ => {
            let got = read(io, disk, offset, part.len());
            assert!(got == part, "{len} bytes at {offset} are not the model's");
            Ok(())
        }
    };
    done.unwrap_or_else(|error| panic!("{len} bytes at {offset}: {error}"));
}

fn try_image(io: &Io, case: Case, random: &mut Random) {
    let image = Image::new(case, random);
    let mut model = image.contents.clone();
    for session in 0..2 {
        let disk = open(io, &image).unwrap_or_else(|error| panic!("refused: {error}"));
        compare(
            io,
            &disk,
            &model,
            &format!("at the beginning of session {session}"),
        );
        for _ in 0..REQUESTS / 2 {
            request(io, &disk, &mut model, 1 << case.cluster_bits, random);
        }
        compare(
            io,
            &disk,
            &model,
            &format!("at the end of session {session}"),
        );
        let closed = io.block_on(disk.deactivate(io));
        closed.unwrap_or_else(|error| panic!("closing: {error}"));
    }
    image.judge(&model);
}

/// Says which image it was, if one fails.
struct Told<'a>(usize, &'a Case);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("image {} of the matrix: {:?}", self.0, self.1);
        }
    }
}

/// Tries all cases on two threads. Each has its own random numbers, whoever takes it.
fn try_all(cases: &[Case]) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let config = IoConfig {
                    worker: 0,
                    entries: 64,
                    epochs: Epochs::new(),
                };
                let io = Io::new(&config).expect("io_uring");
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    let Some(case) = cases.get(n) else {
                        break;
                    };
                    let _told = Told(n, case);
                    try_image(&io, *case, &mut Random::new(n as u64 + 1));
                }
                io.close();
            });
        }
    });
}

#[test]
fn every_image_is_read_as_qemu_reads_it_and_stays_whole_when_written_to() {
    let plan = Plan::new(1, IMAGES);
    println!(
        "{} images; {} pairs of properties are never together; combinations left out, by reason:",
        plan.cases.len(),
        plan.impossible_pairs
    );
    for (why, count) in &plan.skipped {
        println!("{count:6} {why}");
    }
    assert!(plan.cases.len() >= IMAGES, "{}", plan.cases.len());
    try_all(&plan.cases);
}
