use super::*;
use crate::block::qcow2::claim::Attempt;
use crate::block::qcow2::entry;

/// An image under test, and what it must read as.
struct Case {
    images: Images,
    storage: Arc<Storage>,
    below: Vec<u8>,
    options: Options,
    model: Vec<u8>,
    version: u32,
    cluster: u64,
}

impl Case {
    /// Makes an image by `options`, over `below` if there is any, filled by `commands` of qemu-io.
    fn new(options: &str, below: &[u8], size: u64, commands: &[&str], config: Sim) -> Self {
        let images = Images::new();
        if below.is_empty() {
            images.create("a", options, size);
        } else {
            write_file(&images.path("base"), below);
            images.create_over("a", options, "base", "raw", size);
        }
        if !commands.is_empty() {
            images.qemu_io("a", commands);
        }
        let bytes = images.bytes("a");
        let header = Header::parse(Path::new("a"), &bytes, bytes.len() as u64).expect("header");
        Self {
            model: images.contents("a"),
            storage: sim(bytes, config),
            options: Options {
                read_only: false,
                l2_cache_bytes: 1 << 20,
                workers: 2,
                has_backing: !below.is_empty(),
                on_dirty: OnDirty::Repair,
            },
            below: below.to_vec(),
            version: header.version,
            cluster: header.geometry.cluster_size(),
            images,
        }
    }

    async fn open(&self, io: &Io) -> Qcow2 {
        open(io, &self.storage, self.options).await.expect("open")
    }

    async fn write(&mut self, io: &Io, image: &Qcow2, offset: u64, data: &[u8]) {
        let mut buf = io.buf(data.len());
        buf.copy_from_slice(data);
        let pin = io.pin();
        image
            .write(io, &self.below, offset, buf.sg())
            .await
            .expect("write");
        drop(pin);
        self.model[offset as usize..][..data.len()].copy_from_slice(data);
    }

    /// What a discard makes of the model.
    fn model_discard(&mut self, offset: u64, len: u64) {
        if self.version < 3 && self.options.has_backing {
            return;
        }
        let (size, cluster) = (self.model.len() as u64, self.cluster);
        let first = offset.next_multiple_of(cluster);
        let end = offset + len;
        let last = if end == size {
            size
        } else {
            end / cluster * cluster
        };
        if first < last {
            self.model[first as usize..last as usize].fill(0);
        }
    }

    async fn random_step(&mut self, io: &Io, image: &Qcow2, state: &mut u64) {
        let size = self.model.len() as u64;
        let sectors = size / 512;
        let offset = random(state) % sectors;
        let most = match random(state) % 4 {
            0 => 1,
            1 => 16,
            2 => 3 * self.cluster / 512,
            _ => 512,
        };
        let len = (1 + random(state) % most.max(1)).min(sectors - offset) * 512;
        let offset = offset * 512;
        let range = offset as usize..(offset + len) as usize;
        let pin = io.pin();
        match random(state) % 12 {
            0..6 => {
                let data = noise(random(state), len as usize);
                self.write(io, image, offset, &data).await;
            }
            6 => {
                image.discard(io, offset, len).await.expect("discard");
                self.model_discard(offset, len);
            }
            7 | 8 => {
                let unmap = random(state) % 2 == 0;
                image
                    .write_zeroes(io, &self.below, offset, len, unmap)
                    .await
                    .expect("zeroes");
                self.model[range].fill(0);
            }
            9 => {
                drop(pin);
                image.flush(io, &self.below).await.expect("flush");
            }
            _ => {
                let mut buf = io.buf(len as usize);
                read(io, image, &self.below, offset, buf.sg())
                    .await
                    .expect("read");
                assert_same(&buf, &self.model[range], "a read");
            }
        }
    }

    /// Closes the image and lets qemu-img judge it.
    fn finish(&self, io: &Io, image: &Qcow2, what: &str) {
        io.block_on(async {
            let got = read_all(io, image, &self.below).await.expect("read");
            assert_same(&got, &self.model, what);
            image.close(io, &self.below).await.expect("close");
        });
        self.judge(what);
    }

    fn judge(&self, what: &str) {
        let bytes = the_sim(&self.storage).image();
        let leaks = judge::Judge::new(&bytes).check();
        assert_eq!(leaks, 0, "{what}: leaks");
        write_file(&self.images.path("a"), &bytes);
        run("qemu-img", &["check", "-q", &self.images.name("a")]);
        assert_same(&self.images.contents("a"), &self.model, what);
    }
}

const GARBAGE: Sim = Sim {
    seed: 5,
    delay: 2,
    pieces: true,
    promises_zeros: false,
    discard_garbage: true,
    torn_failures: true,
};

#[test]
fn random_requests_leave_what_the_model_says_in_every_geometry() {
    let mut seed = 0;
    for bits in [9u32, 10, 12, 16, 18, 21] {
        for (compat, refcount) in [("0.10", 16), ("1.1", 1), ("1.1", 16), ("1.1", 64)] {
            for backing in [false, true] {
                for config in [Sim::default(), GARBAGE] {
                    seed += 1;
                    // Every third combination does, of large clusters, which are slow to judge, fewer.
                    if seed % (if bits > 16 { 7 } else { 3 }) != 0 {
                        continue;
                    }
                    let what = format!("{bits} {compat} {refcount} {backing} {seed}");
                    let size = if bits > 16 { 9_437_696 } else { 2_097_664 };
                    let below = if backing {
                        noise(seed, 1_500_003)
                    } else {
                        vec![]
                    };
                    let options = format!(
                        "cluster_size={},compat={compat},refcount_bits={refcount}",
                        1u64 << bits
                    );
                    let mut case =
                        Case::new(&options, &below, size, &["write -P 9 256k 64k"], config);
                    let io = reactor();
                    let image = io.block_on(async {
                        let image = case.open(&io).await;
                        let mut state = seed;
                        for _ in 0..120 {
                            case.random_step(&io, &image, &mut state).await;
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

#[test]
fn a_large_write_to_fresh_space_is_one_run_of_clusters() {
    let mut case = Case::new("cluster_size=64k", &[], 64 << 20, &[], Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        // The arena fills and the table is made.
        case.write(&io, &image, 0, &noise(1, 4096)).await;
        case.write(&io, &image, 1 << 20, &noise(1, 1 << 20)).await;
        the_sim(&case.storage).take_events();
        case.write(&io, &image, 4 << 20, &noise(2, 1 << 20)).await;
        let writes = the_sim(&case.storage)
            .take_events()
            .into_iter()
            .filter(|e| matches!(e, crate::block::sim::Event::Write { .. }))
            .count();
        assert!(writes <= 4, "{writes} writes for one request");
        image
    });
    case.finish(&io, &image, "large");
    io.close();
}

#[test]
fn a_write_to_zeros_in_an_arena_of_zeros_writes_the_guests_bytes_only() {
    let mut case = Case::new("cluster_size=64k", &[], 64 << 20, &[], Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        case.write(&io, &image, 0, &noise(1, 512)).await;
        the_sim(&case.storage).take_events();
        case.write(&io, &image, 65536 + 512, &noise(1, 512)).await;
        let events = the_sim(&case.storage).take_events();
        assert!(
            matches!(events[0], crate::block::sim::Event::Write { len: 512, .. }),
            "{events:?}"
        );
        image
    });
    case.finish(&io, &image, "small");
    io.close();
}

#[test]
fn compressed_clusters_are_written_over_and_their_host_clusters_given_back() {
    for bits in [9u32, 12, 16] {
        let images = Images::new();
        let mut raw = noise(7, 1 << 20);
        for (n, chunk) in raw.chunks_mut(1000).enumerate() {
            chunk
                .iter_mut()
                .skip(n * 37 % 700)
                .for_each(|b| *b = n as u8);
        }
        write_file(&images.path("raw"), &raw);
        let options = format!("cluster_size={}", 1u64 << bits);
        run(
            "qemu-img",
            &[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                &images.name("raw"),
                &images.name("a"),
            ],
        );
        let mut case = Case {
            storage: sim(images.bytes("a"), Sim::default()),
            images,
            below: vec![],
            options: Options {
                read_only: false,
                ..READ
            },
            model: raw,
            version: 3,
            cluster: 1 << bits,
        };
        let io = reactor();
        let image = io.block_on(async {
            let image = case.open(&io).await;
            let mut state = 11;
            for _ in 0..200 {
                case.random_step(&io, &image, &mut state).await;
            }
            image
        });
        case.finish(&io, &image, &format!("{bits}"));
        io.close();
    }
}

#[test]
fn a_write_into_a_reserved_cluster_of_zeros_shows_zeros_around_it() {
    let commands = ["write -P 7 0 256k", "write -z 0 256k"];
    let mut case = Case::new("cluster_size=64k", &[], 1 << 20, &commands, Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        let length = case.storage.len();
        case.write(&io, &image, 70_144, &noise(3, 1024)).await;
        case.write(&io, &image, 130_560, &noise(4, 66_048)).await;
        assert_eq!(case.storage.len(), length, "the reserved clusters are used");
        image
    });
    case.finish(&io, &image, "reserved");
    io.close();
}

#[test]
fn zeros_keep_or_give_back_the_space_as_they_are_told() {
    let mut case = Case::new(
        "cluster_size=64k",
        &[],
        1 << 20,
        &["write -P 7 0 512k"],
        Sim::default(),
    );
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        let allocated = |n: u64| (65536 * n, 65536);
        for (n, unmap) in [(0, false), (1, true)] {
            let (offset, len) = allocated(n);
            image
                .write_zeroes(&io, &(), offset, len, unmap)
                .await
                .expect("zeroes");
            case.model[offset as usize..][..65536].fill(0);
        }
        image.flush(&io, &()).await.expect("flush");
        image
    });
    case.finish(&io, &image, "zeros");
    io.close();
    let map = run(
        "qemu-img",
        &["map", "--output=json", &case.images.name("a")],
    );
    let lines: Vec<&str> = map.lines().collect();
    assert!(lines[0].contains("\"offset\""), "kept: {map}");
    assert!(!lines[1].contains("\"offset\""), "given back: {map}");
}

#[test]
fn read_only_images_refuse_every_change() {
    let case = Case::new(
        "cluster_size=64k",
        &[],
        1 << 20,
        &["write -P 7 0 512k"],
        Sim::default(),
    );
    let io = reactor();
    io.block_on(async {
        let image = open(&io, &case.storage, READ).await.expect("open");
        let mut buf = io.buf(512);
        let results = [
            image.write(&io, &(), 0, buf.sg()).await,
            image.discard(&io, 0, 65536).await,
            image.write_zeroes(&io, &(), 0, 65536, true).await,
        ];
        for result in results {
            assert_eq!(result.expect_err("refused").kind(), ErrorKind::ReadOnly);
        }
        image.flush(&io, &()).await.expect("nothing to flush");
        image.close(&io, &()).await.expect("nothing to close");
    });
    assert!(the_sim(&case.storage).take_events().is_empty());
}

#[test]
fn unknown_autoclear_bits_are_cleared_before_the_first_write() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    let mut bytes = images.bytes("a");
    bytes[88] = 0x40;
    let io = reactor();
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        open(&io, &storage, READ).await.expect("open");
        assert_eq!(the_sim(&storage).image()[88], 0x40, "kept by a reader");
        let write = Options {
            read_only: false,
            ..READ
        };
        open(&io, &storage, write).await.expect("open");
        assert_eq!(
            the_sim(&storage).crash_with(|_, _| 0)[88],
            0,
            "durably cleared"
        );
    });
}

#[test]
fn wrong_refcounts_stop_all_writes_and_mark_the_image_corrupt() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    images.qemu_io("a", &["write -P 1 0 64k"]);
    let mut bytes = images.bytes("a");
    let at = |place: usize| u64::from_be_bytes(bytes[place..place + 8].try_into().expect("8"));
    let block = at(at(48) as usize) as usize;
    let l2 = (at(at(40) as usize) & 0x00ff_ffff_ffff_fe00) >> 16;
    bytes[block + 2 * l2 as usize..][..2].fill(0);
    let io = reactor();
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let write = Options {
            read_only: false,
            ..READ
        };
        let image = open(&io, &storage, write).await.expect("open");
        let mut buf = io.buf(65536);
        buf.fill(7);
        let result = image.write(&io, &(), 131_072, buf.sg()).await;
        assert_eq!(result.expect_err("in use").kind(), ErrorKind::Corrupt);
        // Also what would go in place.
        let result = image.write(&io, &(), 0, buf.sg()).await;
        let error = result.expect_err("refused");
        assert!(error.to_string().contains("check -r all"), "{error}");
        let mut back = io.buf(65536);
        read(&io, &image, &(), 0, back.sg())
            .await
            .expect("reading goes on");
        assert!(back.iter().all(|b| *b == 1));
        let durable = the_sim(&storage).crash_with(|_, _| 0);
        assert_eq!(durable[79] & 2, 2, "the corrupt bit");
        let error = open(&io, &storage, write).await.expect_err("marked");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    });
    io.close();
}

#[test]
fn a_cluster_that_may_be_shared_is_copied_before_it_is_changed() {
    let mut case = Case::new(
        "cluster_size=4k",
        &[],
        1 << 20,
        &["write -P 1 0 64k"],
        Sim::default(),
    );
    let mut bytes = case.images.bytes("a");
    let at = |place: usize| u64::from_be_bytes(bytes[place..place + 8].try_into().expect("8"));
    let l2 = (at(at(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    // The third and fourth cluster.
    bytes[l2 + 16] &= 0x7f;
    bytes[l2 + 24] &= 0x7f;
    case.storage = sim(bytes, Sim::default());
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        let Ok(Extent::Data { host: before, .. }) = image.map(&io, 8192, 512).await else {
            panic!("data");
        };
        case.write(&io, &image, 9216, &noise(1, 4096)).await;
        let Ok(Extent::Data { host, .. }) = image.map(&io, 8192, 512).await else {
            panic!("data");
        };
        assert_eq!(
            host, before,
            "what was not written is still read from there"
        );
        image.flush(&io, &()).await.expect("flush");
        let Ok(Extent::Data { host: after, .. }) = image.map(&io, 8192, 512).await else {
            panic!("data");
        };
        assert_ne!(before, after);
        image
    });
    case.finish(&io, &image, "copied");
    io.close();
}

#[test]
fn the_timer_lets_clusters_out_of_limbo_that_a_request_held_there() {
    let case = Case::new(
        "cluster_size=4k",
        &[],
        1 << 20,
        &["write -P 1 0 64k"],
        Sim::default(),
    );
    let io = reactor();
    io.block_on(async {
        let image = case.open(&io).await;
        let slow_request = io.pin();
        image.discard(&io, 0, 65536).await.expect("discard");
        image.flush(&io, &()).await.expect("flush");
        let alloc = image.alloc.clone().expect("writable");
        assert_eq!(alloc.in_limbo(), 16, "the slow request may still read them");
        drop(slow_request);
        io.yield_now().await;
        image.write_back_if_due(&io, &()).await.expect("write back");
        assert_eq!(alloc.in_limbo(), 0);
        image.close(&io, &()).await.expect("close");
    });
    io.close();
}

#[test]
fn mappings_are_written_back_when_they_are_many() {
    let mut case = Case::new("cluster_size=512", &[], 4 << 20, &[], Sim::default());
    case.options.l2_cache_bytes = 64 << 10;
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        case.write(&io, &image, 0, &noise(1, 512)).await;
        image.write_back_if_due(&io, &()).await.expect("write back");
        assert_eq!(image.tables.dirty().0, 1, "not due");
        for n in 0..image.tables.write_back_threshold() as u64 {
            case.write(&io, &image, n * 32768, &noise(n, 512)).await;
        }
        image.write_back_if_due(&io, &()).await.expect("write back");
        assert_eq!(image.tables.dirty(), (0, None));
        image
    });
    case.finish(&io, &image, "written back");
    io.close();
}

#[test]
fn many_dirty_slices_in_a_small_cache_are_written_to_make_room() {
    let mut case = Case::new("cluster_size=512", &[], 4 << 20, &[], Sim::default());
    case.options.l2_cache_bytes = 0;
    let io = reactor();
    let image = io.block_on(async {
        let image = case.open(&io).await;
        for n in 0..128 {
            case.write(&io, &image, n * 32768, &noise(n, 512)).await;
            assert!(image.tables.loaded() <= 16, "{}", image.tables.loaded());
        }
        image
    });
    case.finish(&io, &image, "small cache");
    io.close();
}

#[test]
fn a_flush_between_publication_and_mark_waits_for_the_data_all_the_same() {
    let io = reactor();
    let base = vec![7; 1 << 20];
    let case = Case::new("cluster_size=4k", &base, 1 << 20, &[], Sim::default());
    io.block_on(async {
        let image = case.open(&io).await;
        // The slice is dirty already, by a change that needs no order.
        image.discard(&io, 0, 4096).await.expect("discard");
        assert!(!image.would_order(&io, || ()));
        let second = GuestCluster(1);
        let Attempt::Claimed(claim) = image.tables.try_claim(second, 1, |_, _| true) else {
            panic!("no claim");
        };
        // A writer on another thread gets as far as this while the flush takes its snapshot.
        let mut room = image.log_room(&io, 2).await.expect("room");
        assert!(image.would_order(&io, || {
            claim.slice().note_order(true);
            let new = |_| entry::data(HostOffset(1 << 20));
            claim.publish(&claim.note(&mut room, 0..1, new), 0, new(0));
        }));
        claim.publish(&claim.note(&mut room, 0..1, |_| 0), 0, 0);
        drop(claim);
        image.close(&io, &()).await.expect("close");
    });
}

#[test]
fn a_new_table_that_is_not_zeros_yet_orders_the_snapshot_that_has_it() {
    let io = reactor();
    let case = Case::new("cluster_size=4k", &[], 8 << 20, &[], Sim::default());
    io.block_on(async {
        let image = case.open(&io).await;
        image.tables.link_table(0, HostOffset(1 << 20), false);
        assert!(!image.would_order(&io, || ()));
        // Linked while the flush takes its snapshot, in the same piece of the L1 table.
        let link = || image.tables.link_table(1 << 9, HostOffset(2 << 20), true);
        assert!(image.would_order(&io, link));
    });
}
