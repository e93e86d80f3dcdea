//! What a crash has leaked is given back while the image is in use, and nothing else is.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use super::*;
use crate::block::qcow2::check::{Report, check};

const WRITE: Options = Options {
    read_only: false,
    ..READ
};
const SIZE: u64 = 1 << 20;

fn marked(bytes: &[u8]) -> bool {
    bytes[88] & 0x80 != 0
}

fn checked(io: &Io, bytes: &[u8]) -> Report {
    let storage = sim(bytes.to_vec(), Sim::default());
    io.block_on(check(io, &storage)).expect("check")
}

/// Runs two things side by side, on one reactor.
async fn both<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut one, mut other) = (None, None);
    poll_fn(move |cx| {
        if one.is_none() {
            if let Poll::Ready(done) = a.as_mut().poll(cx) {
                one = Some(done);
            }
        }
        if other.is_none() {
            if let Poll::Ready(done) = b.as_mut().poll(cx) {
                other = Some(done);
            }
        }
        match (one.take(), other.take()) {
            (Some(a), Some(b)) => Poll::Ready((a, b)),
            (a, b) => {
                (one, other) = (a, b);
                Poll::Pending
            }
        }
    })
    .await
}

/// Random requests; `model` follows.
async fn work(io: &Io, image: &Qcow2, seed: &mut u64, count: u64, model: &mut [u8]) {
    for _ in 0..count {
        let offset = random(seed) % (SIZE / 512) * 512;
        let len = (512 + random(seed) % 40 * 512).min(SIZE - offset);
        let range = offset as usize..(offset + len) as usize;
        let pin = io.pin();
        match random(seed) % 8 {
            0 | 1 => {
                image
                    .write_zeroes(io, &(), offset, len, true)
                    .await
                    .expect("zeros");
                model[range].fill(0);
            }
            2 => image.flush(io, &()).await.expect("flush"),
            _ => {
                let mut buf = io.buf(len as usize);
                buf.copy_from_slice(&noise(random(seed), len as usize));
                image.write(io, &(), offset, buf.sg()).await.expect("write");
                model[range].copy_from_slice(&buf);
            }
        }
        drop(pin);
    }
}

/// An image after a loss of power, or after its process was killed, in the middle of its work.
fn crashed(io: &Io, good: &[u8], seed: u64, power: bool) -> Vec<u8> {
    let storage = sim(
        good.to_vec(),
        Sim {
            seed,
            ..Sim::default()
        },
    );
    let mut chance = seed;
    io.block_on(async {
        let image = open(io, &storage, WRITE).await.expect("open");
        work(io, &image, &mut chance, 40, &mut vec![0; SIZE as usize]).await;
    });
    match power {
        true => the_sim(&storage).crash(seed),
        false => the_sim(&storage).image(),
    }
}

#[test]
fn leaks_of_a_crash_are_given_back_beside_requests_and_nothing_else_is() {
    let io = reactor();
    let images = Images::new();
    let (mut leaked, mut rounds) = (0, 0);
    for options in [
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=2",
        "cluster_size=64k",
    ] {
        images.create("a", options, SIZE);
        let good = images.bytes("a");
        for seed in 1..14 {
            let bytes = crashed(&io, &good, seed, seed % 2 == 0);
            let before = checked(&io, &bytes);
            assert_eq!(before.errors, 0, "{before:?}");
            assert!(
                before.leaks == 0 || marked(&bytes),
                "nobody will look for the leaks"
            );
            leaked += before.leaks;
            let storage = sim(
                bytes,
                Sim {
                    seed,
                    delay: 3,
                    pieces: true,
                    ..Sim::default()
                },
            );
            let mut chance = seed + 100;
            io.block_on(async {
                let image = open(&io, &storage, WRITE).await.expect("open");
                let mut model = read_all(&io, &image, &()).await.expect("read");
                if image.has_no_leaks() {
                    return;
                }
                rounds += 1;
                // A request that takes long keeps what is freed meanwhile in limbo, past the search's end.
                let mut long = Some(io.pin());
                // Some work before, some during the search, some after it.
                work(&io, &image, &mut chance, seed % 7 * 4, &mut model).await;
                image.flush(&io, &()).await.expect("flush");
                let search = image.search_leaks(&io);
                let (found, ()) =
                    both(search, work(&io, &image, &mut chance, 60, &mut model)).await;
                found.expect("search");
                while !image.has_no_leaks() {
                    image.write_back_if_due(&io, &()).await.expect("a step");
                    if long.take().is_none() {
                        work(&io, &image, &mut chance, 5, &mut model).await;
                    }
                    io.yield_now().await;
                }
                let all = read_all(&io, &image, &()).await.expect("read");
                assert_same(&all, &model, options);
                image.close(&io, &()).await.expect("close");
            });
            let left = the_sim(&storage).image();
            let report = checked(&io, &left);
            assert!(report.is_clean(), "{options}, {seed}: {report:?}");
            assert!(!marked(&left), "{options}, {seed}");
        }
    }
    println!("{leaked} leaked clusters in {rounds} images");
    assert!(leaked > 300 && rounds > 20, "{leaked} in {rounds}");
    io.close();
}

#[test]
fn a_search_is_given_up_when_the_l1_table_moves() {
    let io = reactor();
    let images = Images::new();
    // An L1 table of one cluster of 512 bytes: 64 entries, for 2 MiB.
    images.create("a", "cluster_size=512", 2 << 20);
    let written: Vec<String> = (0..32)
        .map(|n| format!("write -P 7 {}k 8k", n * 64))
        .collect();
    let commands: Vec<&str> = written.iter().map(String::as_str).collect();
    images.qemu_io("a", &commands);
    let mut bytes = images.bytes("a");
    bytes[88] |= 0x80;
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let model = read_all(&io, &image, &()).await.expect("read");
        image.search_leaks(&io).await.expect("a search");
        image.resize(&io, &(), 0, 8 << 20).await.expect("grow");
        for _ in 0..50 {
            image.write_back_if_due(&io, &()).await.expect("a step");
            io.yield_now().await;
        }
        assert!(!image.has_no_leaks(), "given up, and not said to be over");
        let disk = read_all(&io, &image, &()).await.expect("read");
        assert_same(&disk[..2 << 20], &model, "contents");
        image.close(&io, &()).await.expect("close");
    });
    let left = the_sim(&storage).image();
    let report = checked(&io, &left);
    assert!(report.errors == 0 && marked(&left), "{report:?}");
    io.close();
}

#[test]
fn the_thread_finds_them_too_and_requests_do_not_wait_for_it() {
    let io = reactor();
    let images = Images::new();
    images.create("a", "cluster_size=4k", SIZE);
    let bytes = crashed(&io, &images.bytes("a"), 5, false);
    assert!(checked(&io, &bytes).leaks > 0);
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut model = read_all(&io, &image, &()).await.expect("read");
        let mut chance = 3;
        while !image.has_no_leaks() {
            image.write_back_if_due(&io, &()).await.expect("a step");
            work(&io, &image, &mut chance, 1, &mut model).await;
        }
        assert_same(
            &read_all(&io, &image, &()).await.expect("read"),
            &model,
            "contents",
        );
        image.close(&io, &()).await.expect("close");
    });
    let left = the_sim(&storage).image();
    assert!(checked(&io, &left).is_clean() && !marked(&left));
    io.close();
}

#[test]
fn the_mark_comes_with_the_first_clusters_and_goes_with_a_clean_close() {
    let io = reactor();
    let images = Images::new();
    for (options, version) in [("compat=1.1", 3), ("compat=0.10", 2)] {
        images.create("a", options, SIZE);
        let storage = sim(images.bytes("a"), Sim::default());
        let durable = || the_sim(&storage).crash_with(|_, _| 0);
        io.block_on(async {
            let image = open(&io, &storage, WRITE).await.expect("open");
            assert!(!marked(&durable()), "nothing was taken yet");
            let mut buf = io.buf(512);
            buf.fill(1);
            image.write(&io, &(), 0, buf.sg()).await.expect("write");
            assert_eq!(marked(&durable()), version == 3);
            image.close(&io, &()).await.expect("close");
            assert!(!marked(&durable()));
        });
    }
    io.close();
}

#[test]
fn other_programs_that_write_take_the_mark_away() {
    let io = reactor();
    let images = Images::new();
    images.create("a", "cluster_size=4k", SIZE);
    let bytes = crashed(&io, &images.bytes("a"), 5, false);
    assert!(marked(&bytes));
    write_file(&images.path("a"), &bytes);
    run("qemu-img", &["info", &images.name("a")]);
    assert!(marked(&images.bytes("a")), "reading keeps it");
    images.qemu_io("a", &["write 0 4k"]);
    assert!(!marked(&images.bytes("a")));
    io.close();
}

#[test]
fn a_search_that_is_not_over_leaves_the_mark_for_the_next_time() {
    let io = reactor();
    let images = Images::new();
    images.create("a", "cluster_size=4k", SIZE);
    let bytes = crashed(&io, &images.bytes("a"), 5, false);
    let leaks = checked(&io, &bytes).leaks;
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        image.close(&io, &()).await.expect("close");
    });
    let left = the_sim(&storage).image();
    assert!(marked(&left));
    assert_eq!(checked(&io, &left).leaks, leaks);
    io.close();
}
