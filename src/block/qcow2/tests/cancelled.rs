//! Requests that are dropped half-way, as a ring does that stops without waiting for them, and are done again by
//! whoever serves the ring next.

use std::cell::Cell;
use std::rc::Rc;

use super::*;
use crate::reactor::TaskId;

const SIZE: u64 = 1 << 20;
/// Requests do not overlap, but meet in clusters.
const PIECE: u64 = 1536;

#[derive(Clone, Copy, Debug)]
enum What {
    Write(u64),
    Zero { unmap: bool },
    Read,
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    what: What,
    at: u64,
    len: u64,
}

struct Disk {
    image: Qcow2,
    below: Vec<u8>,
}

async fn run_one(io: &Io, disk: &Disk, request: Request) -> Vec<u8> {
    let (image, below) = (&disk.image, &disk.below);
    let Request { what, at, len } = request;
    let _pin = io.pin();
    let mut buf = io.buf(len as usize);
    match what {
        What::Write(seed) => {
            buf.copy_from_slice(&noise(seed, len as usize));
            image.write(io, below, at, buf.sg()).await.expect("write");
        }
        What::Zero { unmap } => {
            let zeroes = image.write_zeroes(io, below, at, len, unmap);
            zeroes.await.expect("write zeroes");
            buf.fill(0);
        }
        What::Read => {
            // The image's own part of a read: loading slices, which others wait for.
            image.map(io, at, len).await.expect("map");
        }
        What::Flush => image.flush(io, below).await.expect("flush"),
    }
    buf.to_vec()
}

fn spawn(io: &Io, disk: &Rc<Disk>, request: Request) -> (TaskId, Rc<Cell<bool>>) {
    let ended = Rc::new(Cell::new(false));
    let task = {
        let (io, disk, ended) = (io.clone(), disk.clone(), ended.clone());
        io.clone().spawn(async move {
            run_one(&io, &disk, request).await;
            ended.set(true);
        })
    };
    (task, ended)
}

fn finish(io: &Io, ended: &[Rc<Cell<bool>>]) {
    io.block_on(async {
        let mut turns = 0u32;
        while !ended.iter().all(|ended| ended.get()) {
            turns += 1;
            assert!(turns < 1_000_000, "requests wait for what was dropped");
            io.yield_now().await;
        }
    });
}

/// Returns how many requests were dropped.
fn play(images: &Images, options: &str, has_backing: bool, seed: u64) -> usize {
    let below = match has_backing {
        true => noise(1, SIZE as usize),
        false => Vec::new(),
    };
    let mut want = below.clone();
    want.resize(SIZE as usize, 0);
    let io = reactor();
    let config = Sim {
        seed,
        delay: 4,
        pieces: true,
        ..Sim::default()
    };
    let storage = sim(images.bytes("a"), config);
    let opened = Options {
        read_only: false,
        l2_cache_bytes: 16 << 10,
        workers: 1,
        has_backing,
        on_dirty: OnDirty::Repair,
    };
    let image = io.block_on(open(&io, &storage, opened)).expect("open");
    let disk = Rc::new(Disk { image, below });
    let mut state = seed.wrapping_mul(977) + 13;
    let mut below_n = |n: u64| random(&mut state) % n;
    let mut dropped = 0;
    for round in 0..40 {
        let first = below_n(SIZE / PIECE - 64);
        let mut under_way = Vec::new();
        for n in 0..8 {
            let at = (first + n * (1 + below_n(7))) * PIECE;
            let what = match below_n(10) {
                0..=5 => What::Write(seed * 1000 + round * 8 + n),
                6 => What::Zero { unmap: true },
                7 => What::Zero { unmap: false },
                8 => What::Read,
                _ => What::Flush,
            };
            let request = Request {
                what,
                at: at / 512 * 512,
                len: PIECE,
            };
            let overlaps = |other: &(Request, _)| other.0.at.abs_diff(request.at) < PIECE;
            if !under_way.iter().any(overlaps) {
                under_way.push((request, spawn(&io, &disk, request)));
            }
        }
        for _ in 0..below_n(40) {
            io.turn();
        }
        // Some are dropped; the others end, although they may have waited for those.
        let mut again = Vec::new();
        for (request, (task, ended)) in &under_way {
            if !ended.get() && below_n(3) > 0 {
                io.hold(*task);
                while !io.is_quiet(*task) {
                    io.turn();
                }
                io.remove(*task);
                ended.set(true);
                again.push(*request);
            }
        }
        let all: Vec<_> = under_way
            .iter()
            .map(|(_, (_, ended))| ended.clone())
            .collect();
        finish(&io, &all);
        let all: Vec<_> = again.iter().map(|r| spawn(&io, &disk, *r).1).collect();
        finish(&io, &all);
        dropped += again.len();
        for (request, _) in &under_way {
            let range = request.at as usize..(request.at + request.len) as usize;
            match request.what {
                What::Write(seed) => want[range].copy_from_slice(&noise(seed, PIECE as usize)),
                What::Zero { .. } => want[range].fill(0),
                What::Read | What::Flush => {}
            }
        }
    }
    io.block_on(disk.image.close(&io, &disk.below))
        .expect("close");
    let bytes = the_sim(&storage).image();
    let judge = judge::Judge::new(&bytes);
    assert_eq!(judge.check(), 0, "seed {seed} {options}: leaks");
    let what = format!("seed {seed} {options}");
    assert_same(&judge.read_all(&disk.below), &want, &what);
    io.close();
    dropped
}

#[test]
fn dropped_requests_leave_the_image_as_failed_ones_do_and_can_be_done_again() {
    let images = Images::new();
    write_file(&images.path("base"), &noise(1, SIZE as usize));
    for options in [
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=16k,extended_l2=on",
    ] {
        images.create_over("a", options, "base", "raw", SIZE);
        let mut dropped = 0;
        for seed in 0..8 {
            dropped += play(&images, options, true, seed);
        }
        images.create("a", options, SIZE);
        for seed in 30..35 {
            dropped += play(&images, options, false, seed);
        }
        assert!(dropped > 200, "{dropped} requests were dropped");
    }
}
