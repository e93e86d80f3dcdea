//! The journal of other kinds of images, a journal that is full, and what is no journal of this image.

use super::*;
use crate::block::qcow2::tests::data_file::open_pair;

const CACHE: u64 = 64 << 10;

/// What an image is made of.
enum Parts {
    Alone,
    /// A data file.
    Pair(Arc<Storage>),
    /// A key, with the image's directory.
    Locked,
}

/// An image with a journal, and what its disk must hold.
struct Case {
    io: Io,
    images: Images,
    storage: Arc<Storage>,
    parts: Parts,
    memory: SharedPart,
    below: Vec<u8>,
    model: Vec<u8>,
    chance: u64,
}

impl Case {
    fn new(options: &str, below: usize, size: u64) -> Self {
        let images = Images::new();
        let below = noise(7, below);
        if below.is_empty() {
            images.create("a", options, size);
        } else {
            write_file(&images.path("base"), &below);
            images.create_over("a", options, "base", "raw", size);
        }
        let mut model = below.clone();
        model.resize(size as usize, 0);
        Self {
            io: reactor(),
            storage: sim(images.bytes("a"), Sim::default()),
            images,
            parts: Parts::Alone,
            memory: memory(BYTES),
            below,
            model,
            chance: 5,
        }
    }

    fn options(&self) -> Options {
        Options {
            read_only: false,
            l2_cache_bytes: CACHE,
            has_backing: !self.below.is_empty(),
            ..READ
        }
    }

    async fn opened(&self, options: Options) -> Qcow2 {
        match &self.parts {
            Parts::Alone => open(&self.io, &self.storage, options).await.expect("open"),
            Parts::Pair(data) => open_pair(&self.io, &self.storage, data, options)
                .await
                .expect("open"),
            Parts::Locked => {
                let image = open_encrypted(&self.io, &self.storage, &self.images, options);
                image.await.expect("open").0
            }
        }
    }

    async fn start(&self) -> Result<Qcow2> {
        let image = self.opened(self.options()).await;
        let used = image.use_journal(&self.io, &self.below, self.memory.clone());
        used.await.map(|()| image)
    }

    /// One change of the disk, not flushed.
    async fn change(&mut self, image: &Qcow2) {
        let sectors = image.size() / 512;
        let first = random(&mut self.chance) % sectors;
        let count = 1 + random(&mut self.chance) % (sectors - first).min(40);
        let (offset, len) = (first * 512, count * 512);
        let range = offset as usize..(offset + len) as usize;
        let _pin = self.io.pin();
        if random(&mut self.chance) % 4 == 0 {
            let unmap = random(&mut self.chance) % 2 == 0;
            let zeroes = image.write_zeroes(&self.io, &self.below, offset, len, unmap);
            zeroes.await.expect("zeroes");
            self.model[range].fill(0);
        } else {
            let mut buf = self.io.buf(len as usize);
            buf.copy_from_slice(&noise(random(&mut self.chance), len as usize));
            let write = image.write(&self.io, &self.below, offset, buf.sg());
            write.await.expect("write");
            self.model[range].copy_from_slice(&buf);
        }
    }

    /// The process is killed: `image` is gone.
    fn kill(&mut self, image: Qcow2) {
        drop(image);
        let after = |storage: &Storage| {
            let killed = the_sim(storage).after_kill(1, Sim::default());
            Arc::new(Storage::Sim(killed))
        };
        self.storage = after(&self.storage);
        if let Parts::Pair(data) = &mut self.parts {
            *data = after(data);
        }
    }

    async fn check(&self, image: &Qcow2) {
        let disk = read_all(&self.io, image, &self.below).await.expect("read");
        assert_same(&disk, &self.model[..disk.len()], "after a kill");
    }

    /// Changes it, kills it, opens it: again and again.
    fn live(&mut self, rounds: u64) {
        let io = self.io.clone();
        io.block_on(async {
            for round in 0..rounds {
                let image = self.start().await.expect("journal");
                self.check(&image).await;
                for _ in 0..random(&mut self.chance) % 30 {
                    self.change(&image).await;
                    if random(&mut self.chance) % 16 == 0 {
                        image.flush(&io, &self.below).await.expect("flush");
                    }
                }
                if round % 5 == 4 {
                    image.close(&io, &self.below).await.expect("close");
                    assert!(journal::is_empty(&self.memory));
                }
                self.kill(image);
            }
            let image = self.start().await.expect("journal");
            self.check(&image).await;
            image.close(&io, &self.below).await.expect("close");
        });
    }
}

#[test]
fn an_image_with_a_data_file_survives_kills() {
    for (raw, below) in [(false, 0), (true, 0), (false, 300_000)] {
        let mut case = Case::new("cluster_size=4k", below, 512 << 10);
        let data = case.images.name("d");
        let kind = if raw { "on" } else { "off" };
        let options = format!("cluster_size=4k,data_file={data},data_file_raw={kind}");
        match below {
            0 => case.images.create("a", &options, 512 << 10),
            _ => case
                .images
                .create_over("a", &options, "base", "raw", 512 << 10),
        }
        case.storage = sim(case.images.bytes("a"), Sim::default());
        case.parts = Parts::Pair(sim(case.images.bytes("d"), Sim::default()));
        case.live(40);
    }
}

#[test]
fn an_encrypted_image_survives_kills() {
    for base in [None, Some("base")] {
        let below = if base.is_some() { 300_000 } else { 0 };
        let mut case = Case::new("cluster_size=4k", below, 512 << 10);
        case.images
            .create_encrypted("a", "cluster_size=4k", base, 512 << 10);
        case.storage = sim(case.images.bytes("a"), Sim::default());
        case.parts = Parts::Locked;
        let io = case.io.clone();
        io.block_on(async {
            // Unwritten clusters are not zeros on every image of this kind: what there is is what counts.
            let image = case.start().await.expect("journal");
            case.model = read_all(&io, &image, &case.below).await.expect("read");
            image.close(&io, &case.below).await.expect("close");
        });
        // Few: each opening derives the key.
        case.live(5);
    }
}

#[test]
fn a_disk_that_is_resized_survives_kills() {
    for (options, below) in [
        ("cluster_size=4k", 0),
        ("cluster_size=512", 300_000),
        ("cluster_size=16k,extended_l2=on", 300_000),
        ("cluster_size=4k,compat=0.10", 0),
    ] {
        let mut case = Case::new(options, below, 512 << 10);
        let io = case.io.clone();
        io.block_on(async {
            for _ in 0..30 {
                let image = case.start().await.expect("journal");
                case.check(&image).await;
                for _ in 0..6 {
                    case.change(&image).await;
                }
                let size = (64 + random(&mut case.chance) % 1024) * 1024;
                let below_size = case.below.len() as u64;
                let resized = image.resize(&io, &case.below, below_size, size).await;
                resized.expect("resize");
                case.model.resize(size as usize, 0);
                for _ in 0..6 {
                    case.change(&image).await;
                }
                case.kill(image);
            }
            let image = case.start().await.expect("journal");
            case.check(&image).await;
        });
    }
}

#[test]
fn a_full_log_makes_writers_wait_for_mappings_to_be_written_and_nobody_for_himself() {
    for below in [0, 4 << 20] {
        let case = Case::new("cluster_size=512", below, 4 << 20);
        let io = &case.io;
        let written = io.block_on(async {
            let image = case.start().await.expect("journal");
            image.journal.get().expect("journal").leave_only(64);
            let most = Cell::new(0);
            let task = |task: u64| {
                let (case, image, most) = (&case, &image, &most);
                async move {
                    let mut chance = task + 3;
                    let mut model = BTreeMap::new();
                    for _ in 0..60 {
                        let first = (random(&mut chance) % 500) * 16 + task * 4;
                        let count = 1 + random(&mut chance) % 4;
                        let data = run_bytes(first, count, random(&mut chance));
                        let mut buf = case.io.buf(data.len());
                        buf.copy_from_slice(&data);
                        let pin = case.io.pin();
                        let at = first * 512;
                        let write = image.write(&case.io, &case.below, at, buf.sg());
                        write.await.expect("write");
                        drop(pin);
                        for (n, sector) in data.chunks(512).enumerate() {
                            model.insert(first + n as u64, sector.to_vec());
                        }
                        let (used, promised) = image.journal.get().expect("journal").used();
                        most.set((used + promised).max(most.get()));
                        if random(&mut chance) % 20 == 0 {
                            image.flush(&case.io, &case.below).await.expect("flush");
                        }
                        case.io.yield_now().await;
                    }
                    model
                }
            };
            let models = RefCell::new(Vec::new());
            let tasks = (0..4).map(|n| {
                let (models, task) = (&models, task(n));
                Box::pin(async move {
                    let model = task.await;
                    models.borrow_mut().push(model);
                }) as Boxed<'_>
            });
            together(tasks).await;
            assert!(
                (32..=64).contains(&most.get()),
                "{} entries of 64",
                most.get()
            );
            models.into_inner()
        });
        let killed = Killed::of(&case.storage, &case.memory, 1);
        let mut case = case;
        for (sector, data) in written.into_iter().flatten() {
            let at = sector as usize * 512;
            case.model[at..at + 512].copy_from_slice(&data);
        }
        (case.storage, case.memory) = (killed.sim, killed.memory);
        let io = case.io.clone();
        io.block_on(async {
            let image = case.start().await.expect("journal");
            case.check(&image).await;
        });
    }
}

/// A killed image with something in its journal.
fn killed(options: &str, below: usize) -> Case {
    let mut case = Case::new(options, below, 512 << 10);
    let io = case.io.clone();
    io.block_on(async {
        let image = case.start().await.expect("journal");
        for _ in 0..20 {
            case.change(&image).await;
        }
        case.kill(image);
    });
    case
}

fn refused(case: &Case, why: &str) -> String {
    let before = the_sim(&case.storage).image();
    let error = case.io.block_on(case.start()).map(|_| ());
    let error = error.expect_err(why);
    assert_eq!(error.kind(), ErrorKind::InvalidImage, "{why}: {error}");
    let text = error.to_string();
    assert!(text.contains("end the VM and start it anew"), "{text}");
    let same = the_sim(&case.storage).image() == before;
    assert!(same, "{why}: the image has changed");
    text
}

#[test]
fn the_journal_of_another_image_is_refused_and_an_empty_one_is_not() {
    let mut case = killed("cluster_size=4k", 300_000);
    let other = Case::new("cluster_size=64k", 0, 512 << 10);
    let own = case.storage.clone();
    case.storage = other.storage.clone();
    refused(&case, "clusters of another size");
    let copy = SimStorage::new(the_sim(&own).image(), Sim::default()).with_inode(2);
    case.storage = Arc::new(Storage::Sim(copy));
    refused(&case, "another file");
    case.storage = own;
    let io = case.io.clone();
    io.block_on(async {
        let image = case.start().await.expect("its own");
        case.check(&image).await;
        // Killed when nothing was in the journal.
        case.kill(image);
        case.storage = other.storage.clone();
        case.start().await.expect("an empty journal");
    });
}

#[test]
fn an_image_that_somebody_else_has_written_to_meanwhile_is_refused() {
    let case = killed("cluster_size=4k", 300_000);
    let file = case.images.name("a");
    std::fs::write(&file, the_sim(&case.storage).image()).expect("image");
    case.images.qemu_io("a", &["write 0 512"]);
    let mut changed = killed("cluster_size=4k", 300_000);
    changed.storage = sim(std::fs::read(&file).expect("image"), Sim::default());
    let text = refused(&changed, "QEMU has written to it");
    assert!(text.contains("its mark is gone"), "{text}");
    // Version 2 has no mark: the refcounts tell.
    let case = killed("cluster_size=4k,compat=0.10", 0);
    std::fs::write(&file, the_sim(&case.storage).image()).expect("image");
    let line = ["check", "-q", "-r", "leaks", &file];
    let _leaks = Command::new("qemu-img")
        .args(line)
        .output()
        .expect("qemu-img");
    let mut changed = killed("cluster_size=4k,compat=0.10", 0);
    changed.storage = sim(std::fs::read(&file).expect("image"), Sim::default());
    let text = refused(&changed, "its leaks were given back");
    assert!(text.contains("has refcount 0"), "{text}");
}

#[test]
fn a_damaged_journal_is_refused_or_replayed_and_never_believed() {
    let good = killed("cluster_size=4k", 300_000);
    let (image, memory) = (the_sim(&good.storage).image(), good.memory.clone());
    let used: Vec<usize> = (0..words(&memory).len())
        .filter(|n| words(&memory)[*n].load(Ordering::Relaxed) != 0)
        .collect();
    let (mut chance, mut refusals) = (9, 0);
    for round in 0..400 {
        let mut case = Case::new_like(&good, image.clone());
        case.memory = copy_of(&memory);
        let word = used[random(&mut chance) as usize % used.len()];
        let value = match random(&mut chance) % 4 {
            0 => 0,
            1 => random(&mut chance) << 32 | random(&mut chance),
            2 => u64::MAX,
            _ => words(&memory)[word].load(Ordering::Relaxed) ^ 1 << (random(&mut chance) % 64),
        };
        words(&case.memory)[word].store(value, Ordering::Relaxed);
        let before = the_sim(&case.storage).image();
        match case.io.block_on(case.start()) {
            Ok(_) => {}
            Err(error) => {
                refusals += 1;
                assert_eq!(error.kind(), ErrorKind::InvalidImage, "{round}: {error}");
                assert!(the_sim(&case.storage).image() == before, "{round}: {error}");
            }
        }
        let bytes = the_sim(&case.storage).image();
        judge::Judge::new(&bytes).check();
    }
    assert!(refusals > 200, "{refusals} of 400");
}

impl Case {
    /// Another process with the same image and memory.
    fn new_like(other: &Self, image: Vec<u8>) -> Self {
        Self {
            io: other.io.clone(),
            images: Images::new(),
            storage: sim(image, Sim::default()),
            parts: Parts::Alone,
            memory: other.memory.clone(),
            below: other.below.clone(),
            model: other.model.clone(),
            chance: 1,
        }
    }
}

#[test]
fn changes_that_wait_are_not_passed_over_by_opening_the_image_otherwise() {
    let case = killed("cluster_size=4k", 0);
    let io = &case.io;
    let error = io.block_on(async {
        let read_only = Options {
            read_only: true,
            ..case.options()
        };
        let image = case.opened(read_only).await;
        image.use_journal(io, &(), case.memory.clone()).await
    });
    let error = error.expect_err("read-only");
    assert!(error.to_string().contains("read-only"), "{error}");
    let raw = crate::block::Raw::new(case.storage.clone(), 512);
    let raw = crate::block::Layer::Raw(raw);
    let error = io.block_on(raw.use_journal(io, &[], case.memory.clone()));
    assert_eq!(error.expect_err("raw").kind(), ErrorKind::InvalidImage);
    let fresh = memory(BYTES);
    io.block_on(raw.use_journal(io, &[], fresh)).expect("fresh");
    let small = io.block_on(async {
        let image = case.opened(case.options()).await;
        image.use_journal(io, &(), memory(4096)).await
    });
    assert_eq!(small.expect_err("small").kind(), ErrorKind::InvalidImage);
}

#[test]
fn writes_in_place_do_not_come_to_the_journal() {
    let case = Case::new("cluster_size=4k", 300_000, 512 << 10);
    let io = &case.io;
    io.block_on(async {
        let image = case.start().await.expect("journal");
        let mut buf = io.buf(4096);
        image
            .write(io, &case.below, 0, buf.sg())
            .await
            .expect("write");
        let passed = Rc::new(Cell::new(0));
        let count = passed.clone();
        steps::watch(Some(Box::new(move |_| count.set(count.get() + 1))));
        let before: Vec<u64> = words(&case.memory)
            .iter()
            .map(|w| w.load(Ordering::Relaxed))
            .collect();
        for n in 0..64 {
            let part = buf.sg().slice(0, 512);
            let write = image.write(io, &case.below, n % 8 * 512, part);
            write.await.expect("in place");
        }
        let mut zeros = io.buf(512);
        read(io, &image, &case.below, 0, zeros.sg())
            .await
            .expect("read");
        steps::watch(None);
        assert_eq!(passed.get(), 0);
        let same = words(&case.memory).iter().zip(&before);
        assert!(
            same.into_iter()
                .all(|(now, was)| now.load(Ordering::Relaxed) == *was)
        );
    });
}
