//! A kill at any moment: everything that had completed is there when the image is opened with the same memory.
//!
//! A *life* is one opening of an image. Tasks write, zero, discard and flush; all the while, between any two
//! steps of the journal and whenever the storage has done something, the process is killed in thought: the
//! storage as it is, with some of what is under way, and the journal's memory. Each such state is opened again,
//! judged, and some are killed again while they are replayed, or lose their power.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::crash::{Boxed, check, together};
use super::history::{History, SECTOR, Version, run_bytes};
use super::kinds::{Kind, kinds};
use super::*;
use crate::block::qcow2::journal::{self, steps};
use crate::shared_memory::{SharedMemory, SharedPart};

mod kills;
mod limits;

/// A journal's memory: as small as can be, so that it is copied fast.
const BYTES: usize = 320 << 10;

pub(super) fn memory(bytes: usize) -> SharedPart {
    let memory = SharedMemory::create(c"journal", bytes as u64).expect("memory");
    memory.part(0, bytes).expect("all of it")
}

fn words(part: &SharedPart) -> &[AtomicU64] {
    part.atomics(0, part.len() / 8).expect("words")
}

pub(super) fn copy_of(part: &SharedPart) -> SharedPart {
    let copy = memory(part.len());
    for (to, from) in words(&copy).iter().zip(words(part)) {
        let word = from.load(Ordering::Relaxed);
        if word != 0 {
            to.store(word, Ordering::Relaxed);
        }
    }
    copy
}

/// What a killed process leaves.
struct Killed {
    sim: Arc<Storage>,
    memory: SharedPart,
}

impl Killed {
    fn of(storage: &Storage, memory: &SharedPart, seed: u64) -> Self {
        let config = Sim {
            seed,
            ..Sim::default()
        };
        let sim = the_sim(storage).after_kill(seed, config);
        Self {
            sim: Arc::new(Storage::Sim(sim)),
            memory: copy_of(memory),
        }
    }

    fn again(&self, seed: u64) -> Self {
        Self::of(&self.sim, &self.memory, seed)
    }
}

/// A disk that tasks write to, each to sectors of its own.
struct World {
    io: Io,
    /// Of those that judge.
    judging: Io,
    kind: &'static Kind,
    cache: u64,
    storage: Arc<Storage>,
    memory: SharedPart,
    image: OnceCell<Qcow2>,
    below: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    history: History,
    tag: Cell<u64>,
    seed: u64,
    steps: u64,
    chance: Cell<u64>,
    over: Cell<bool>,
    file: PathBuf,
    /// How often each place was judged.
    judged: RefCell<BTreeMap<&'static str, u64>>,
    next: RefCell<Option<Killed>>,
}

const TASKS: u64 = 4;
/// Sectors of a stripe; stripes belong to the tasks in turn, so that clusters have several writers.
const STRIPE: u64 = 4;

impl World {
    fn image(&self) -> &Qcow2 {
        self.image.get().expect("an open image")
    }

    fn random(&self) -> u64 {
        let mut state = self.chance.get();
        let value = random(&mut state);
        self.chance.set(state);
        value
    }

    /// A range of sectors that only `task` changes: in the first half of the disk inside a stripe, in the
    /// second inside a large region.
    fn range(&self, task: u64, state: &mut u64) -> (u64, u64) {
        let half = self.kind.size / SECTOR as u64 / 2;
        let (start, len) = if random(state) % 2 == 0 {
            let stripes = half / (STRIPE * TASKS);
            ((random(state) % stripes * TASKS + task) * STRIPE, STRIPE)
        } else {
            (half + half / TASKS * task, half / TASKS)
        };
        let skip = random(state) % len;
        (start + skip, 1 + random(state) % (len - skip).min(64))
    }

    async fn write(&self, first: u64, count: u64) {
        self.tag.set(self.tag.get() + 1);
        let tag = self.tag.get();
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let _pin = self.io.pin();
        let (at, from) = (first * SECTOR as u64, buf.sg());
        let written = self.image().write(&self.io, &self.below, at, from);
        written.await.expect("write");
        self.history.complete(first, count);
    }

    async fn task(&self, task: u64) {
        let mut state = self.seed * 31 + task + 1;
        let image = self.image();
        for _ in 0..self.steps {
            let (first, count) = self.range(task, &mut state);
            let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
            match random(&mut state) % 24 {
                20.. => {
                    let copied = copy_some(&self.io, image, &self.below, &mut state);
                    copied.await.expect("copy");
                }
                0..13 => self.write(first, count).await,
                13..15 => {
                    let unmap = random(&mut state) % 2 == 0;
                    self.history.begin(first, count, Version::Zeros);
                    let _pin = self.io.pin();
                    let zeroes = image.write_zeroes(&self.io, &self.below, offset, len, unmap);
                    zeroes.await.expect("zeroes");
                    self.history.complete(first, count);
                }
                15 | 16 => {
                    // Either of both from now on.
                    self.history.begin(first, count, Version::Zeros);
                    let _pin = self.io.pin();
                    let discard = image.discard(&self.io, offset, len);
                    discard.await.expect("discard");
                }
                17 => {
                    let point = self.history.flush_begins();
                    image.flush(&self.io, &self.below).await.expect("flush");
                    self.history.flush_completed(point);
                }
                18 if random(&mut state) % 4 == 0 => {
                    image.write_back(&self.io).await.expect("write back");
                }
                _ => self.io.yield_now().await,
            }
        }
    }

    /// From opening to closing.
    async fn live(&self) {
        let image = open(&self.io, &self.storage, self.kind.opened(self.cache));
        let image = image.await.expect("open");
        let used = image.use_journal(&self.io, &self.below, self.memory.clone());
        used.await.expect("journal");
        let _ = self.image.set(image);
        together((0..TASKS).map(|task| Box::pin(self.task(task)) as _)).await;
        let disk = read_all(&self.io, self.image(), &self.below).await;
        self.history.check_now(&disk.expect("read"), "at the end");
        let closed = self.image().close(&self.io, &self.below);
        closed.await.expect("close");
        self.over.set(true);
        assert!(
            journal::is_empty(&self.memory),
            "an empty journal at the end"
        );
    }

    /// Opens a killed image and replays its journal.
    async fn reopen(&self, killed: &Killed, cache: u64) -> Result<Qcow2> {
        let image = open(&self.judging, &killed.sim, self.kind.opened(cache)).await?;
        let used = image.use_journal(&self.judging, &self.below, killed.memory.clone());
        used.await?;
        Ok(image)
    }

    /// Kills here, and judges what comes of it.
    fn kill(&self, place: &'static str) {
        *self.judged.borrow_mut().entry(place).or_default() += 1;
        let seed = self.random() | 1;
        let what = format!("{}, seed {}, {place}, {seed}", self.kind.name, self.seed);
        let killed = Killed::of(&self.storage, &self.memory, seed);
        let states = self.judged.borrow().values().sum::<u64>();
        if self.next.borrow().is_none() || self.random() % states == 0 {
            *self.next.borrow_mut() = Some(killed.again(seed));
        }
        match self.random() % 8 {
            // What the life before had completed is durable only when its journal was replayed.
            0 if self.image.get().is_some() => self.lose_power(&killed, seed, &what),
            1 | 2 => self.kill_again(&killed, seed, &what),
            _ => self.recover(&killed, seed, &what),
        }
    }

    /// What a power loss leaves, before or while the journal is replayed.
    fn lose_power(&self, killed: &Killed, seed: u64, what: &str) {
        if seed & 2 == 0 {
            let operations = self.random() % 8;
            the_sim(&killed.sim).cut_power_after(operations);
            let _failed = self.judging.block_on(self.reopen(killed, self.cache));
        }
        let bytes = the_sim(&killed.sim).crash(seed);
        let judge = judge::Judge::new(&bytes);
        judge.check();
        let disk = judge.read_all(&self.below);
        self.history.check_crash(&disk, &format!("{what}, power"));
    }

    /// A kill, or two, while the journal is replayed.
    fn kill_again(&self, killed: &Killed, seed: u64, what: &str) {
        let mut killed = killed.again(seed);
        for _ in 0..1 + self.random() % 2 {
            the_sim(&killed.sim).cut_power_after(self.random() % 12);
            match self.judging.block_on(self.reopen(&killed, self.cache)) {
                // All of it was replayed: nothing is left of the journal.
                Ok(_) => assert!(journal::is_empty(&killed.memory), "{what}, replayed"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Io, "{what}: {error}"),
            }
            killed = killed.again(seed);
        }
        self.recover(&killed, seed, &format!("{what}, again"));
    }

    fn recover(&self, killed: &Killed, seed: u64, what: &str) {
        let sim = the_sim(&killed.sim);
        let bytes = sim.image();
        let _evidence = Evidence(&bytes, &killed.memory);
        let io = &self.judging;
        let cache = if seed & 4 == 0 { 0 } else { 1 << 20 };
        let replayed = !journal::is_empty(&killed.memory);
        let image = io.block_on(self.reopen(killed, cache));
        let image = image.unwrap_or_else(|error| panic!("{what}: {error}"));
        let disk = io.block_on(read_all(io, &image, &self.below));
        let disk = disk.expect("read");
        self.history.check_now(&disk, what);
        // It is in the file; if there was something to replay, durably.
        let bytes = match replayed {
            true => sim.crash_with(|_, _| 0),
            false => sim.image(),
        };
        let judge = judge::Judge::new(&bytes);
        let leaks = judge.check();
        assert_same(&judge.read_all(&self.below), &disk, what);
        assert!(
            judge.read_snapshots(&self.below) == self.snapshots,
            "{what}"
        );
        if seed & 0x70 == 0 {
            write_file(&self.file, &bytes);
            assert_eq!(
                leaks,
                check(&self.file),
                "{what}: leaks, as qemu-img counts them"
            );
        }
        let searched = seed & 0x180 == 0 && self.kind.opened(0).has_backing == (seed & 8 == 0);
        let searched = searched && image.header.autoclear & header::autoclear::ARENAS != 0;
        io.block_on(async {
            if searched {
                image.search_leaks(io).await.expect("search");
                while !image.leaks_were_given_back() {
                    image.give_leaks_back(io).await;
                    io.yield_now().await;
                }
            }
            image.close(io, &self.below).await.expect("close");
        });
        assert!(journal::is_empty(&killed.memory), "{what}: closed");
        let closed = sim.crash_with(|_, _| 0);
        let judge = judge::Judge::new(&closed);
        let left = judge.check();
        assert!(left <= leaks, "{what}: closing leaks");
        assert!(
            !searched || left == 0 || self.kind.may_keep_leaks(),
            "{what}: {left} leak"
        );
        assert_same(&judge.read_all(&self.below), &disk, what);
        assert!(
            judge.read_snapshots(&self.below) == self.snapshots,
            "{what}"
        );
    }
}

impl Kind {
    /// Leaks of clusters with several references are not given back without a repair, nor is anything in
    /// version 2.
    fn may_keep_leaks(&self) -> bool {
        let shares = self.name.contains("snapshots") || self.name.contains("compressed");
        shares || self.name.contains("version 2") || self.name.contains("base")
    }
}

/// Keeps a bad state, for the one who looks for the reason.
struct Evidence<'a>(&'a [u8], &'a SharedPart);

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let path = std::env::temp_dir().join("virtioblkd-killed.qcow2");
            let kept = std::fs::write(&path, self.0).is_ok();
            eprintln!(
                "kept: {kept}, {}; {} bytes of journal",
                path.display(),
                self.1.len()
            );
        }
    }
}

/// What a life begins with.
struct Start {
    killed: Killed,
    contents: Vec<u8>,
}

/// One life. Returns how often each place was judged, and what the next one begins with.
fn life(
    kind: &'static Kind,
    below: &[u8],
    snapshots: &[Vec<u8>],
    start: Start,
    seed: u64,
    file: &Path,
) -> (BTreeMap<&'static str, u64>, Start) {
    let io = reactor();
    let config = Sim {
        seed,
        delay: 4,
        pieces: true,
        promises_zeros: kind.zeros,
        discard_garbage: true,
        torn_failures: false,
    };
    let storage = the_sim(&start.killed.sim).after_kill(seed, config);
    let world = Rc::new(World {
        io: io.clone(),
        judging: reactor(),
        kind,
        cache: if seed % 2 == 0 { 1 << 20 } else { 0 },
        storage: Arc::new(Storage::Sim(storage)),
        memory: start.killed.memory,
        image: OnceCell::new(),
        below: below.to_vec(),
        snapshots: snapshots.to_vec(),
        history: History::new(start.contents),
        tag: Cell::new(seed << 32),
        seed,
        steps: 40,
        chance: Cell::new(seed * 77 + 5),
        over: Cell::new(false),
        file: file.to_owned(),
        judged: RefCell::default(),
        next: RefCell::default(),
    });
    let watched = world.clone();
    steps::watch(Some(Box::new(move |place| {
        // Often passed ones less often.
        let before = watched.judged.borrow().get(place).copied().unwrap_or(0);
        // A life begins with one replay at most.
        let rare = place.starts_with("journal-replay") && before < 2;
        if rare || before < 8 && watched.random() % (4 + before * 8) == 0 {
            watched.kill(place);
        }
    })));
    let killer = async {
        while !world.over.get() {
            for _ in 0..world.random() % 64 {
                io.yield_now().await;
            }
            let before = world.judged.borrow().get("storage").copied().unwrap_or(0);
            if world.random() % (1 + before / 8) == 0 {
                steps::unwatched(|| world.kill("storage"));
            }
        }
    };
    io.block_on(together(
        [Box::pin(world.live()) as Boxed<'_>, Box::pin(killer)].into_iter(),
    ));
    steps::watch(None);
    let judged = world.judged.take();
    let killed = world.next.take().expect("a state");
    let recovered = killed.again(seed);
    let contents = world.judging.block_on(async {
        let image = world.reopen(&recovered, 0).await.expect("open");
        read_all(&world.judging, &image, &world.below).await
    });
    let contents = contents.expect("read");
    world.judging.close();
    drop(world);
    io.close();
    (judged, Start { killed, contents })
}

/// Three lives, the later ones after a kill in the one before.
fn lives(kind: &'static Kind, seed: u64, file: &Path) -> BTreeMap<&'static str, u64> {
    let images = Images::new();
    let below = kind.create(&images);
    let bytes = images.bytes("a");
    let judge = judge::Judge::new(&bytes);
    let snapshots = judge.read_snapshots(&below);
    let contents = judge.read_all(&below);
    let killed = Killed {
        sim: sim(bytes.clone(), Sim::default()),
        memory: memory(BYTES),
    };
    let mut start = Start { killed, contents };
    let mut all = BTreeMap::new();
    for generation in 0..3 {
        let life = life(kind, &below, &snapshots, start, seed * 8 + generation, file);
        for (place, count) in life.0 {
            *all.entry(place).or_default() += count;
        }
        start = life.1;
    }
    all
}

/// Places between whose steps a kill must have been judged.
const PLACES: &[&str] = &[
    "journal-written",
    "journal-appended",
    "journal-published",
    "journal-record-begun",
    "journal-record-marked",
    "journal-record-ending",
    "journal-record-ended",
    "journal-before-drop",
    "journal-dropped",
    "journal-clearing",
    "journal-replay-checked",
    "journal-replay-copied",
    "journal-replay-applied",
    "journal-replay-flushed",
    "storage",
];

#[test]
fn a_kill_at_any_moment_loses_nothing_that_had_completed() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let wanted: u64 = number("VIRTIOBLKD_JOURNAL_KILLS").unwrap_or(4_000);
    let first: u64 = number("VIRTIOBLKD_JOURNAL_SEED").unwrap_or(1);
    let which = std::env::var("VIRTIOBLKD_JOURNAL_KIND").unwrap_or_default();
    let kinds: Vec<&'static Kind> = kinds().filter(|kind| kind.name.contains(&which)).collect();
    let jobs = AtomicU64::new(0);
    let all = std::sync::Mutex::new(BTreeMap::<&'static str, u64>::new());
    let total = || all.lock().expect("judged").values().sum::<u64>();
    let work = || {
        let memory = Path::new("/dev/shm");
        let file = match memory.is_dir() {
            true => tempfile::NamedTempFile::new_in(memory),
            false => tempfile::NamedTempFile::new(),
        };
        let file = file.expect("file").into_temp_path();
        loop {
            let job = jobs.fetch_add(1, Ordering::Relaxed);
            let (round, kind) = (job / kinds.len() as u64, job % kinds.len() as u64);
            if round > 0 && total() >= wanted {
                return;
            }
            let judged = lives(kinds[kind as usize], first + round, &file);
            let mut all = all.lock().expect("judged");
            for (place, count) in judged {
                *all.entry(place).or_default() += count;
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in [scope.spawn(work), scope.spawn(work)] {
            if let Err(panic) = thread.join() {
                jobs.store(u64::MAX / 2, Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
    });
    let all = all.into_inner().expect("judged");
    println!("{} kills were judged: {all:?}", all.values().sum::<u64>());
    if which.is_empty() {
        for place in PLACES {
            assert!(all.contains_key(place), "no kill at {place}");
        }
    }
}
