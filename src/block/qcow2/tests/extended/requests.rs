//! One request after another.

use super::*;
use crate::block::qcow2::slice::Slice;

const GARBAGE: Sim = Sim {
    seed: 5,
    delay: 2,
    pieces: true,
    promises_zeros: false,
    discard_garbage: true,
    torn_failures: true,
};

/// Random commands for qemu-io. Compressed clusters come first: qemu-io writes none over others.
fn commands(state: &mut u64, cluster: u64, size: u64, count: u64) -> Vec<String> {
    let mut commands = Vec::new();
    for n in 0..(size / cluster).min(64) {
        if random(state) % 6 == 0 {
            let at = n * cluster;
            commands.push(format!("write -c -P {} {at} {cluster}", n + 1));
        }
    }
    commands.extend((0..count).map(|n| {
        let offset = random(state) % (size / 512) * 512;
        let most = [512, cluster / 8, cluster * 2][(random(state) % 3) as usize];
        let len = (512 + random(state) % most / 512 * 512).min(size - offset);
        match random(state) % 7 {
            0..4 => format!("write -P {} {offset} {len}", n % 250 + 1),
            4 => format!("write -z {offset} {len}"),
            5 => format!("write -z -u {offset} {len}"),
            _ => format!("discard {offset} {len}"),
        }
    }));
    commands
}

fn sizes(cluster: u64) -> u64 {
    if cluster > 65536 {
        9_437_696
    } else {
        2_097_664
    }
}

#[test]
fn images_of_qemu_with_subclusters_read_as_qemu_reads_them() {
    let mut state = 11;
    for cluster in [16384u64, 65536, 2 << 20] {
        for base in BASES {
            let size = sizes(cluster);
            let commands = commands(&mut state, cluster, size, 60);
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            let mut case = Case::new(cluster, base, size, &commands, Sim::default());
            case.options = Options {
                has_backing: case.options.has_backing,
                ..READ
            };
            let io = reactor();
            io.block_on(async {
                let image = case.open(&io).await;
                let all = read_all(&io, &image, &case.below).await.expect("read");
                assert_same(&all, &case.model, &format!("{cluster} {base:?}"));
                for _ in 0..200 {
                    let offset = random(&mut state) % size;
                    let len = (1 + random(&mut state) % (cluster * 3)).min(size - offset);
                    let mut buf = io.buf(len as usize);
                    read(&io, &image, &case.below, offset, buf.sg())
                        .await
                        .expect("read");
                    assert_same(
                        &buf,
                        &case.model[offset as usize..][..len as usize],
                        "a part",
                    );
                }
            });
        }
    }
}

async fn random_step(case: &mut Case, io: &Io, image: &Qcow2, state: &mut u64) {
    let size = case.model.len() as u64;
    let sectors = size / 512;
    let offset = random(state) % sectors;
    let most = match random(state) % 4 {
        0 => 1,
        1 => 16,
        2 => 3 * case.subcluster / 16,
        _ => 512,
    };
    let mut len = (1 + random(state) % most.max(1)).min(sectors - offset) * 512;
    let mut offset = offset * 512;
    if random(state) % 3 == 0 {
        // Of whole subclusters.
        offset = offset / case.subcluster * case.subcluster;
        len = len.next_multiple_of(case.subcluster).min(size - offset);
    }
    match random(state) % 12 {
        0..6 => {
            let data = noise(random(state), len as usize);
            case.write(io, image, offset, &data).await;
        }
        6 => case.discard(io, image, offset, len).await,
        7 | 8 => {
            let unmap = random(state) % 2 == 0;
            case.zero(io, image, offset, len, unmap).await;
        }
        9 => image.flush(io, &()).await.expect("flush"),
        _ => {
            let mut buf = io.buf(len as usize);
            read(io, image, &case.below, offset, buf.sg())
                .await
                .expect("read");
            let want = &case.model[offset as usize..][..len as usize];
            assert_same(&buf, want, "a read");
        }
    }
}

#[test]
fn random_requests_leave_what_the_model_says_of_every_subcluster() {
    let mut seed = 0;
    for cluster in [16384u64, 65536, 2 << 20] {
        for base in BASES {
            for config in [Sim::default(), GARBAGE] {
                for cache in [0, 1 << 20] {
                    seed += 1;
                    if cluster > 65536 && seed % 3 != 0 {
                        continue;
                    }
                    let what = format!("{cluster} {base:?} {seed}");
                    let size = sizes(cluster);
                    let mut state = seed;
                    let made = commands(&mut state, cluster, size, 12);
                    let made: Vec<&str> = made.iter().map(String::as_str).collect();
                    let mut case = Case::new(cluster, base, size, &made, config.clone());
                    case.options.l2_cache_bytes = cache;
                    let io = reactor();
                    let image = io.block_on(async {
                        let image = case.open(&io).await;
                        for _ in 0..150 {
                            random_step(&mut case, &io, &image, &mut state).await;
                        }
                        image
                    });
                    case.finish(&io, &image, &what);
                    io.close();
                }
            }
        }
    }
}

/// A layer below that counts what is read of it.
struct Counting(Arc<Storage>);

impl Below for Counting {
    async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        self.0.read(io, offset, to).await
    }
}

#[test]
fn a_random_writer_of_whole_subclusters_reads_nothing_from_the_base() {
    let mut case = Case::new(65536, Base::Raw, 8 << 20, &[], Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        let base = Counting(sim(case.below.clone(), Sim::default()));
        let mut state = 3;
        // The table is made and read, and the arena filled.
        let mut buf = io.buf(4096);
        for n in 0..300u64 {
            let at = random(&mut state) % (8 << 20) / 4096 * 4096;
            let data = noise(n, 4096);
            buf.copy_from_slice(&data);
            case.events();
            image.write(&io, &base, at, buf.sg()).await.expect("write");
            case.model[at as usize..][..4096].copy_from_slice(&data);
            let written: u64 = case
                .events()
                .iter()
                .map(|event| match event {
                    // Refcounts go by sectors beside it.
                    Event::Write { len, .. } if *len % 4096 == 0 => *len,
                    _ => 0,
                })
                .sum();
            assert!(n < 40 || written <= 8192, "{written} bytes for 4096");
        }
        assert_eq!(the_sim(&base.0).operations(), 0, "reads of the base");
        // Not so where a subcluster is covered in part: its rest is read, and nothing else.
        let at = (0..8u64 << 20).step_by(4096);
        let mut fresh = at.filter(|at| case.below.len() as u64 > at + 4096);
        let at = loop {
            let at = fresh.next().expect("an unwritten place");
            if matches!(
                image.map(&io, at, 4096).await,
                Ok(Extent::Backing { len: 4096 })
            ) {
                break at;
            }
        };
        image
            .write(&io, &base, at + 512, buf.sg().split_at(512).0)
            .await
            .expect("write");
        let sector = buf[..512].to_vec();
        case.model[at as usize + 512..][..512].copy_from_slice(&sector);
        assert_eq!(the_sim(&base.0).operations(), 1);
        let Ok(Extent::Data { len, .. }) = image.map(&io, at, 4096).await else {
            panic!("data");
        };
        assert_eq!(len, 2048, "one subcluster was filled");
        image
    });
    case.finish(&io, &image, "random writer");
    io.close();
}

#[test]
fn a_large_write_to_subclusters_is_few_writes_to_the_file() {
    for base in [Base::None, Base::Raw] {
        let mut case = Case::new(65536, base, 64 << 20, &[], Sim::default());
        let io = reactor();
        let image = io.block_on(async {
            let image = case.open(&io).await;
            // The arena fills and the table is made.
            case.write(&io, &image, 0, &noise(1, 4096)).await;
            case.write(&io, &image, 1 << 20, &noise(1, 1 << 20)).await;
            case.events();
            case.write(&io, &image, (4 << 20) + 1024, &noise(2, 1 << 20))
                .await;
            let events = case.events();
            let large = |event: &&Event| matches!(event, Event::Write { len, .. } if *len > 4096);
            let writes = events.iter().filter(large).count();
            assert!(writes <= 3, "{events:?}");
            image
        });
        case.finish(&io, &image, "large");
        io.close();
    }
}

#[test]
fn what_shows_zeros_is_written_in_place_as_soon_as_its_cluster_is_there() {
    for base in [Base::None, Base::Raw] {
        let zeros: &[&str] = &["write -z 0 1M"];
        let mut case = Case::new(65536, base, 4 << 20, zeros, Sim::default());
        let io = reactor();
        let image = io.block_on(async {
            let image = case.open(&io).await;
            case.write(&io, &image, 512, &noise(1, 512)).await;
            case.events();
            for n in [3, 9, 77, 100] {
                case.write(&io, &image, n * 512, &noise(n, 512)).await;
                let events = case.events();
                assert_eq!(events.len(), 1, "{events:?}");
                assert!(
                    matches!(events[0], Event::Write { len: 512, .. }),
                    "{events:?}"
                );
            }
            // Nothing of it must wait for data.
            assert!(!image.would_order(&io, || ()));
            image
        });
        case.finish(&io, &image, "zeros");
        io.close();
    }
}

#[test]
fn a_filled_subcluster_is_ordered_behind_its_data() {
    let mut case = Case::new(65536, Base::Raw, 4 << 20, &[], Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        case.write(&io, &image, 512, &noise(1, 512)).await;
        assert!(image.would_order(&io, || ()));
        image.flush(&io, &()).await.expect("flush");
        image
    });
    case.finish(&io, &image, "ordered");
    io.close();
}

/// The entry and the bitmap of one of the first clusters.
fn pair(image: &Qcow2, cluster: u64) -> (u64, u64) {
    let look = |slice: &Slice| slice.look(cluster as usize);
    image.tables.with(0, look).expect("in memory")
}

/// Clusters that entries point at, of the first `count`.
fn hosts(image: &Qcow2, count: u64) -> usize {
    (0..count).filter(|n| pair(image, *n).0 != 0).count()
}

#[test]
fn a_cluster_is_given_back_with_its_last_subcluster_unless_it_is_kept() {
    for base in [Base::None, Base::Raw] {
        let commands = ["write -P 7 0 512k"];
        let mut case = Case::new(65536, base, 1 << 20, &commands, Sim::default());
        let io = reactor();
        let image = io.block_on(async {
            let image = case.open(&io).await;
            case.zero(&io, &image, 0, 4096, true).await;
            case.discard(&io, &image, 8192, 57344).await;
            assert_eq!(hosts(&image, 8), 8);
            case.discard(&io, &image, 4096, 4096).await;
            assert_eq!(hosts(&image, 8), 7, "nothing of the first is left");
            case.zero(&io, &image, 65536, 32768, false).await;
            case.zero(&io, &image, 98304, 32768, false).await;
            assert_eq!(hosts(&image, 8), 7, "the second is kept");
            case.zero(&io, &image, 131_072, 131_072, false).await;
            assert_eq!(hosts(&image, 8), 7, "the third and fourth are kept");
            case.discard(&io, &image, 131_072, 65536).await;
            assert_eq!(hosts(&image, 8), 6, "the third is not any more");
            // What was kept is used as it is.
            let before = case.storage.len();
            case.write(&io, &image, 70_000 / 512 * 512, &noise(1, 512))
                .await;
            assert_eq!(case.storage.len(), before);
            image.flush(&io, &()).await.expect("flush");
            image
        });
        case.finish(&io, &image, "given back");
        io.close();
    }
}

#[test]
fn the_last_cluster_of_the_disk_is_whole_where_the_disk_ends() {
    for commands in [["write -P 7 1M 512"], ["write -c -P 7 1M 512"]] {
        let size = (1 << 20) + 512;
        let mut case = Case::new(65536, Base::None, size, &commands, Sim::default());
        let io = reactor();
        let image = io.block_on(async {
            let image = case.open(&io).await;
            // Allocated up to the cluster's end, which is not the disk's.
            case.zero(&io, &image, (1 << 20) - 512, 1024, true).await;
            case.write(&io, &image, 1 << 20, &noise(1, 512)).await;
            assert_ne!(pair(&image, 16).0, 0);
            case.discard(&io, &image, (1 << 20) - 512, 1024).await;
            assert_eq!(pair(&image, 16).0, 0, "given back");
            image
        });
        case.finish(&io, &image, "the end");
        io.close();
    }
}

#[test]
fn a_cluster_that_may_be_shared_is_copied_as_far_as_it_is_allocated() {
    let commands = ["write -P 1 4k 8k", "write -z 20k 4k", "write -P 2 64k 64k"];
    let mut case = Case::new(65536, Base::Raw, 1 << 20, &commands, Sim::default());
    let mut bytes = case.images.bytes("a");
    let at = |place: usize| u64::from_be_bytes(bytes[place..place + 8].try_into().expect("8"));
    let l2 = (at(at(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // The first two entries are no longer the image's alone, as far as they say.
    for n in 0..2 {
        assert_eq!(bytes[l2 + 16 * n] & 0x80, 0x80);
        bytes[l2 + 16 * n] &= 0x7f;
    }
    case.storage = sim(bytes, Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        let before = image.map(&io, 4096, 512).await.expect("map");
        case.write(&io, &image, 3584, &noise(1, 5120)).await;
        let after = image.map(&io, 4096, 512).await.expect("map");
        assert_ne!(before, after);
        assert_eq!(pair(&image, 0).1, 0x0c00 << 32 | 0x3e, "as they were");
        // Subclusters of a shared cluster become zeros in the image's own entry.
        case.zero(&io, &image, 65536, 4096, false).await;
        case.zero(&io, &image, 65536 + 4096, 61440, false).await;
        assert_eq!(hosts(&image, 2), 1, "what is shared is not kept");
        image
    });
    case.finish(&io, &image, "shared");
    io.close();
}

#[test]
fn bitmaps_that_contradict_their_entries_are_never_used() {
    let commands = ["write -P 1 0 256k", "write -c -P 3 256k 64k"];
    let case = Case::new(65536, Base::None, 1 << 20, &commands, Sim::default());
    let good = case.images.bytes("a");
    let word = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().expect("8"));
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    for (cluster, entry, bitmap) in [
        (1, None, 1 << 32 | 1),
        (1, None, u64::MAX),
        (1, Some(0), 1),
        (1, Some(0), 1 << 33 | 1),
        (4, None, 1),
        (4, None, 1 << 32),
        // The flag that ordinary entries have.
        (1, Some(word(l2 + 16) | 1), 0),
    ] {
        let mut bytes = good.clone();
        if let Some(entry) = entry {
            bytes[l2 + 16 * cluster..][..8].copy_from_slice(&u64::to_be_bytes(entry));
        }
        bytes[l2 + 16 * cluster + 8..][..8].copy_from_slice(&u64::to_be_bytes(bitmap));
        let io = reactor();
        let storage = sim(bytes.clone(), Sim::default());
        io.block_on(async {
            let image = open(&io, &storage, case.options).await.expect("open");
            let at = cluster as u64 * 65536;
            let error = image.map(&io, at, 512).await.expect_err("bad");
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            let mut buf = io.buf(512);
            buf.fill(9);
            let written = image.write(&io, &(), at, buf.sg()).await;
            assert_eq!(written.expect_err("bad").kind(), ErrorKind::Corrupt);
            let zeroed = image.write_zeroes(&io, &(), at + 512, 512, true).await;
            assert_eq!(zeroed.expect_err("bad").kind(), ErrorKind::Corrupt);
            // The image is not written to any more; what is good is read, and what is bad stays in the file.
            let discarded = image.discard(&io, at, 65536).await;
            assert_eq!(discarded.expect_err("stopped").kind(), ErrorKind::Corrupt);
            read(&io, &image, &(), 0, buf.sg()).await.expect("read");
            image.close(&io, &()).await.expect("close");
        });
        let after = the_sim(&storage).image();
        let place = l2 + 16 * cluster..l2 + 16 * cluster + 16;
        assert_eq!(after[place.clone()], bytes[place]);
        io.close();
    }
}
