//! Compressed clusters: deflate and zstd, read, written over, kept and damaged.

use super::*;
use crate::block::qcow2::entry::{Entry, decode};

const KINDS: [&str; 2] = ["zlib", "zstd"];

/// Bytes of which some compress and some do not, so that clusters have any compressed size.
fn mixed(len: usize) -> Vec<u8> {
    let mut raw = noise(7, len);
    for (n, chunk) in raw.chunks_mut(1000).enumerate() {
        let keep = n * 37 % 1000;
        chunk.iter_mut().skip(keep).for_each(|b| *b = n as u8);
    }
    raw
}

fn compressed(images: &Images, raw: &[u8], kind: &str, bits: u32) {
    write_file(&images.path("raw"), raw);
    let options = format!("cluster_size={},compression_type={kind}", 1u64 << bits);
    let (from, to) = (images.name("raw"), images.name("a"));
    run(
        "qemu-img",
        &[
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, &from, &to,
        ],
    );
}

/// Host clusters of the compressed clusters, in the order of the disk.
async fn places(io: &Io, image: &Qcow2) -> Vec<Compressed> {
    let step = image.header.geometry.cluster_size();
    let mut all = Vec::new();
    for offset in (0..image.size()).step_by(step as usize) {
        if let Extent::Compressed { data, .. } = image.map(io, offset, 1).await.expect("map") {
            all.push(data);
        }
    }
    all
}

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

#[test]
fn clusters_that_share_sectors_or_cross_host_clusters_read_and_are_written_over() {
    for kind in KINDS {
        for bits in [9u32, 12, 16, 21] {
            let what = format!("{kind} {bits}");
            let images = Images::new();
            let mut model = mixed(if bits > 16 { 6 << 20 } else { 2 << 20 });
            compressed(&images, &model, kind, bits);
            let io = reactor();
            let storage = sim(images.bytes("a"), Sim::default());
            io.block_on(async {
                let image = open(&io, &storage, WRITE).await.expect("open");
                let got = read_all(&io, &image, &vec![]).await.expect("read");
                assert_same(&got, &model, &what);
                let places = places(&io, &image).await;
                assert!(!places.is_empty(), "{what}: something compressed");
                let g = image.header.geometry;
                let shared = places
                    .windows(2)
                    .any(|p| (p[0].offset.0 + p[0].bytes - 1) / 512 == p[1].offset.0 / 512);
                let crossing = places.iter().any(|p| p.clusters(&g).1 > 1);
                assert!(shared && crossing, "{what}: {shared} {crossing}");

                let mut state = 5;
                for round in 0..60u64 {
                    let len = 1 + random(&mut state) as usize % 20_000;
                    let len = len.next_multiple_of(512);
                    let at = random(&mut state) as usize % (model.len() - len) / 512 * 512;
                    let _pin = io.pin();
                    if round % 3 == 0 {
                        let (at, len) = (at as u64, len as u64);
                        image
                            .write_zeroes(&io, &(), at, len, true)
                            .await
                            .expect("zeroes");
                        model[at as usize..][..len as usize].fill(0);
                    } else {
                        let mut buf = io.buf(len);
                        buf.copy_from_slice(&noise(round, len));
                        image
                            .write(&io, &(), at as u64, buf.sg())
                            .await
                            .expect("write");
                        model[at..at + len].copy_from_slice(&noise(round, len));
                    }
                    if round % 16 == 0 {
                        image.flush(&io, &()).await.expect("flush");
                    }
                }
                let got = read_all(&io, &image, &vec![]).await.expect("read");
                assert_same(&got, &model, &format!("{what}, changed"));
                image.close(&io, &()).await.expect("close");
            });
            io.close();
            write_file(&images.path("a"), &the_sim(&storage).image());
            run("qemu-img", &["check", "-q", &images.name("a")]);
            assert_same(&images.contents("a"), &model, &format!("{what}, by QEMU"));
        }
    }
}

#[test]
fn pieces_of_a_cluster_read_in_turn_decompress_it_once() {
    for kind in KINDS {
        let images = Images::new();
        let model = mixed(1 << 20);
        compressed(&images, &model, kind, 16);
        let io = reactor();
        io.block_on(async {
            let storage = sim(images.bytes("a"), Sim::default());
            let image = open(&io, &storage, WRITE).await.expect("open");
            let clusters = places(&io, &image).await.len() as u64;
            for at in (0..1 << 20).step_by(4096) {
                let mut buf = io.buf(4096);
                read(&io, &image, &(), at, buf.sg()).await.expect("read");
                assert_same(&buf, &model[at as usize..][..4096], "piece");
            }
            assert_eq!(image.inflated.decompressed(), clusters);
            assert_eq!(image.inflated.kept(), 16, "no more than that is kept");

            // Written over, a cluster is not kept any more, and its copy-on-write decompresses nothing.
            let mut buf = io.buf(512);
            buf.fill(1);
            image.write(&io, &(), 4096, buf.sg()).await.expect("write");
            let mut all = io.buf(65536);
            read(&io, &image, &(), 0, all.sg()).await.expect("read");
            assert!(all[4096..4608] == [1; 512] && all[..4096] == model[..4096]);
            image.flush(&io, &()).await.expect("flush");
            let before = image.inflated.decompressed();
            assert_eq!(image.inflated.kept(), 15);
            let mut last = io.buf(4096);
            read(&io, &image, &(), (1 << 20) - 4096, last.sg())
                .await
                .expect("read");
            assert_eq!(image.inflated.decompressed(), before);
        });
    }
}

#[test]
fn readers_of_one_cluster_at_the_same_time_decompress_it_once() {
    let images = Images::new();
    let model = mixed(1 << 20);
    compressed(&images, &model, "zstd", 16);
    let io = reactor();
    let config = Sim {
        delay: 5,
        ..Sim::default()
    };
    let storage = sim(images.bytes("a"), config);
    let image = io.block_on(open(&io, &storage, READ)).expect("open");
    let image = std::rc::Rc::new(image);
    let left = std::rc::Rc::new(std::cell::Cell::new(16));
    for n in 0..16u64 {
        let (io, image, left) = (io.clone(), image.clone(), left.clone());
        let want = model[n as usize * 4096..][..4096].to_vec();
        io.clone().spawn(async move {
            let mut buf = io.buf(4096);
            read(&io, &image, &(), n * 4096, buf.sg())
                .await
                .expect("read");
            assert_same(&buf, &want, "piece");
            left.set(left.get() - 1);
        });
    }
    io.block_on(async {
        while left.get() > 0 {
            io.yield_now().await;
        }
    });
    assert_eq!(image.inflated.decompressed(), 1);
    drop(image);
    io.close();
}

/// The first compressed cluster's entry and place, in an image's bytes.
fn first_entry(bytes: &[u8]) -> (usize, Compressed) {
    let header = Header::parse(Path::new("a"), bytes, bytes.len() as u64).expect("header");
    let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("entry"));
    let l2 = (u64_at(header.l1_offset.0 as usize) & !(1 << 63)) as usize;
    (0..512)
        .map(|n| l2 + n * 8)
        .find_map(|at| match decode(u64_at(at), &header.geometry) {
            Entry::Compressed(data) => Some((at, data)),
            _ => None,
        })
        .expect("compressed")
}

#[test]
fn damaged_data_is_an_error_that_names_the_offset_and_never_a_panic() {
    for kind in KINDS {
        let images = Images::new();
        let model = mixed(256 << 10);
        compressed(&images, &model, kind, 16);
        let good = images.bytes("a");
        let (entry, data) = first_entry(&good);
        let attempt = |bytes: Vec<u8>| {
            let io = reactor();
            io.block_on(async {
                let storage = sim(bytes, Sim::default());
                let image = open(&io, &storage, READ).await.expect("open");
                let result = read_all(&io, &image, &vec![]).await;
                if let Err(error) = &result {
                    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                    let again = read_all(&io, &image, &vec![]).await;
                    assert!(again.is_err(), "an error is not kept as contents");
                }
                result
            })
        };
        let start = data.offset.0 as usize;
        let mut state = 9;
        let mut failed = 0;
        for _ in 0..300 {
            let mut bytes = good.clone();
            for _ in 0..=random(&mut state) % 4 {
                let near = [32, 4000][random(&mut state) as usize % 2];
                let at = start + random(&mut state) as usize % near;
                bytes[at] = random(&mut state) as u8;
            }
            match attempt(bytes) {
                Ok(got) => assert_eq!(got.len(), model.len()),
                Err(_) => failed += 1,
            }
        }
        assert!(failed > 10, "{kind}: {failed}");

        // All of it gone; the first sector's bytes alone; more bytes than there are.
        let mut gone = good.clone();
        gone[start..start + 8].fill(0xff);
        let error = attempt(gone).expect_err("no frame");
        assert_eq!(error.offset(), Some(data.offset.0), "{error}");
        assert!(error.to_string().contains("qemu-img check"), "{error}");
        let x = 62 - 8;
        let raw = u64::from_be_bytes(good[entry..entry + 8].try_into().expect("entry"));
        let mut cut = good.clone();
        let one_sector = raw & !(0xff << x);
        cut[entry..entry + 8].copy_from_slice(&one_sector.to_be_bytes());
        assert!(attempt(cut).is_err());
        let mut long = good.clone();
        let most = raw | 0xff << x;
        long[entry..entry + 8].copy_from_slice(&most.to_be_bytes());
        assert_same(
            &attempt(long).expect("padding does not count"),
            &model,
            kind,
        );
    }
}

#[test]
fn a_zstd_frame_is_taken_as_qemu_takes_it() {
    let images = Images::new();
    let model = mixed(64 << 10);
    compressed(&images, &model, "zstd", 16);
    let good = images.bytes("a");
    let (_, data) = first_entry(&good);
    let start = data.offset.0 as usize;
    let contents = vec![5u8; 64 << 10];
    let pack = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).expect("compress");
    let whole = pack(&contents);
    let halves = [pack(&contents[..30_000]), pack(&contents[30_000..])].concat();
    // A frame whose header asks for a window of 2 GiB: nothing is allocated for it.
    let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x03, 0x00, 0x10, 5].to_vec();
    let empty = pack(&[]);
    for (name, frames, good_one) in [
        ("one frame", whole.clone(), true),
        ("two frames", halves, true),
        ("an empty one first", [empty.clone(), whole].concat(), true),
        ("too little", pack(&contents[1..]), false),
        ("too much", pack(&vec![5; (64 << 10) + 1]), false),
        ("a large window", [window, empty].concat(), false),
    ] {
        let mut bytes = good.clone();
        let end = start + data.bytes as usize;
        bytes[start..end].fill(0);
        bytes[start..start + frames.len()].copy_from_slice(&frames);
        write_file(&images.path("a"), &bytes);
        let io = reactor();
        io.block_on(async {
            let storage = sim(bytes, Sim::default());
            let image = open(&io, &storage, READ).await.expect("open");
            let mine = read_all(&io, &image, &vec![]).await;
            let to = images.name("contents.raw");
            let status = Command::new("qemu-img")
                .args(["convert", "-O", "raw", &images.name("a"), &to])
                .output()
                .expect("qemu-img")
                .status;
            assert_eq!(mine.is_ok(), good_one, "{name}");
            assert_eq!(status.success(), good_one, "{name}, QEMU");
            if let Ok(mine) = mine {
                assert_same(&mine, &contents, name);
            }
        });
    }
}
