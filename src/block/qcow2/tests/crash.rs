//! Power loss at any moment: while an image is opened, under concurrent writers, while it is closed, and in
//! the life after.
//!
//! A *life* is one opening of an image: tasks write, zero and flush until they have done their steps, then
//! it is closed. All the while, whenever the storage has done something, the power is cut in thought: any
//! subset of the sectors that were not flushed survives. Each such *state* is judged by a second reader
//! (`judge`), by the code under test, which opens and reads it, and by `qemu-img check`. One of them is what
//! the next life begins with.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::history::{History, SECTOR, Version, run_bytes};
use super::kinds::{Kind, kinds};
use super::*;

/// What a life begins with.
struct Start {
    bytes: Vec<u8>,
    contents: Vec<u8>,
    snapshots: Vec<Vec<u8>>,
    /// Clusters that leak already.
    leaks: u64,
}

impl Start {
    fn of(bytes: Vec<u8>, below: &[u8]) -> Self {
        let judge = judge::Judge::new(&bytes);
        let (leaks, contents) = (judge.check_all(), judge.read_all(below));
        let snapshots = judge.read_snapshots(below);
        Self {
            bytes,
            contents,
            snapshots,
            leaks,
        }
    }
}

/// A disk that tasks write to, each to sectors of its own.
struct World<'a> {
    io: Io,
    kind: &'static Kind,
    cache: u64,
    storage: Arc<Storage>,
    image: OnceCell<Qcow2>,
    below: &'a Vec<u8>,
    history: History,
    tag: Cell<u64>,
    steps: u64,
    seed: u64,
    over: Cell<bool>,
}

const TASKS: u64 = 4;
/// Sectors of a stripe; stripes belong to the tasks in turn, so that clusters have several writers.
const STRIPE: u64 = 4;

impl World<'_> {
    fn image(&self) -> &Qcow2 {
        self.image.get().expect("an open image")
    }

    /// A range of sectors that only `task` changes: in the first half of the disk inside a stripe, in the
    /// second inside a large region.
    fn range(&self, task: u64, state: &mut u64) -> (u64, u64) {
        let half = self.image().size() / SECTOR as u64 / 2;
        let (start, len) = if random(state) % 2 == 0 {
            let stripes = half / (STRIPE * TASKS);
            ((random(state) % stripes * TASKS + task) * STRIPE, STRIPE)
        } else {
            (half + half / TASKS * task, half / TASKS)
        };
        let skip = random(state) % len;
        (start + skip, 1 + random(state) % (len - skip).min(64))
    }

    fn next_tag(&self) -> u64 {
        self.tag.set(self.tag.get() + 1);
        self.tag.get()
    }

    async fn write(&self, first: u64, count: u64) -> Result<()> {
        let tag = self.next_tag();
        let data = run_bytes(first, count, tag);
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(&data);
        self.history.begin(first, count, Version::Written(tag));
        let _pin = self.io.pin();
        self.image()
            .write(&self.io, self.below, first * SECTOR as u64, buf.sg())
            .await?;
        self.history.complete(first, count);
        Ok(())
    }

    async fn zero(&self, first: u64, count: u64, unmap: bool) -> Result<()> {
        self.history.begin(first, count, Version::Zeros);
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let _pin = self.io.pin();
        self.image()
            .write_zeroes(&self.io, self.below, offset, len, unmap)
            .await?;
        self.history.complete(first, count);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        let point = self.history.flush_begins();
        self.image().flush(&self.io, self.below).await?;
        self.history.flush_completed(point);
        Ok(())
    }

    async fn task(&self, task: u64) {
        let mut state = self.seed * 31 + task + 1;
        for _ in 0..self.steps {
            let (first, count) = self.range(task, &mut state);
            match random(&mut state) % 12 {
                10.. => {
                    let copied = copy_some(&self.io, self.image(), self.below, &mut state);
                    copied.await.expect("copy");
                }
                0..6 => self.write(first, count).await.expect("write"),
                6 | 7 => {
                    let unmap = random(&mut state) % 2 == 0;
                    self.zero(first, count, unmap).await.expect("zeroes");
                }
                8 => self.flush().await.expect("flush"),
                _ => self.io.yield_now().await,
            }
        }
    }

    /// From opening to closing.
    async fn live(&self) {
        let image = open(&self.io, &self.storage, self.kind.opened(self.cache)).await;
        let _ = self.image.set(image.expect("open"));
        together((0..TASKS).map(|task| Box::pin(self.task(task)) as _)).await;
        let disk = read_all(&self.io, self.image(), self.below).await;
        self.history.check_now(&disk.expect("read"), "at the end");
        let point = self.history.flush_begins();
        self.image()
            .close(&self.io, self.below)
            .await
            .expect("close");
        self.history.flush_completed(point);
        self.over.set(true);
    }
}

pub(super) type Boxed<'a> = std::pin::Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Runs futures until all have ended.
pub(super) async fn together<'a>(futures: impl Iterator<Item = Boxed<'a>>) {
    let mut futures: Vec<_> = futures.collect();
    std::future::poll_fn(move |cx| {
        futures.retain_mut(|future| future.as_mut().poll(cx).is_pending());
        match futures.is_empty() {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
}

/// Which of the unflushed sectors survive.
fn crash(sim: &SimStorage, state: &mut u64) -> Vec<u8> {
    let seed = random(state) | 1;
    let mut chance = seed;
    let newest = |versions: usize| versions - 1;
    match random(state) % 8 {
        0 => sim.crash_with(|_, _| 0),
        1 => sim.crash_with(|_, versions| newest(versions)),
        2 | 3 => sim.crash(seed),
        // Stretches share a fate, as what was written at once often does.
        4 => {
            let stretch = 1 << (random(state) % 8);
            sim.crash_with(|sector, versions| {
                let mut fate = (sector / stretch).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed | 1;
                (random(&mut fate) % versions as u64) as usize
            })
        }
        // Few are lost, or few survive.
        rare @ (5 | 6) => sim.crash_with(|_, versions| {
            let usual = if rare == 5 { newest(versions) } else { 0 };
            match random(&mut chance) % 16 {
                0 => (random(&mut chance) % versions as u64) as usize,
                _ => usual,
            }
        }),
        // Metadata without the data, or the other way round.
        _ => {
            let all = sim.crash_with(|_, versions| newest(versions));
            let (metadata, bits) = (judge::Judge::new(&all).metadata(), all[23]);
            let which = seed & 2 == 0;
            sim.crash_with(|sector, versions| {
                let cluster = sector >> (bits - 9);
                match metadata.contains(&cluster) == which {
                    true => newest(versions),
                    false => 0,
                }
            })
        }
    }
}

/// Judges states; one a thread.
struct Bench {
    io: Io,
    /// Where `qemu-img` gets them from: in memory where possible, there are thousands of them.
    file: tempfile::TempPath,
    /// States that `qemu-img` has seen, of this life.
    seen: RefCell<HashSet<u64>>,
}

impl Bench {
    fn new() -> Self {
        let memory = std::path::Path::new("/dev/shm");
        let file = match memory.is_dir() {
            true => tempfile::NamedTempFile::new_in(memory),
            false => tempfile::NamedTempFile::new(),
        };
        Self {
            io: reactor(),
            file: file.expect("file").into_temp_path(),
            seen: RefCell::default(),
        }
    }

    /// Judges a state, whatever it holds; returns true if it is a new one.
    fn judge(&self, kind: &Kind, start: &Start, below: &Vec<u8>, bytes: &[u8]) -> bool {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let new = self.seen.borrow_mut().insert(hasher.finish());
        let judge = judge::Judge::new(bytes);
        let leaks = judge.check();
        if !new {
            return false;
        }
        assert!(judge.read_snapshots(below) == start.snapshots, "snapshots");
        write_file(&self.file, bytes);
        assert_eq!(leaks, check(&self.file), "leaks, as qemu-img counts them");
        // Opened as after a real loss, read, and closed: which must do no harm either.
        let contents = judge.read_all(below);
        let storage = sim(bytes.to_vec(), Sim::default());
        self.io.block_on(async {
            let image = open(&self.io, &storage, kind.opened(0))
                .await
                .expect("open");
            let disk = read_all(&self.io, &image, below).await.expect("read");
            assert_same(&disk, &contents, "as opened after the loss");
            image.close(&self.io, below).await.expect("close");
        });
        let closed = the_sim(&storage).crash_with(|_, _| 0);
        let judge = judge::Judge::new(&closed);
        assert!(judge.check() <= leaks, "opening and closing leaks");
        assert_same(&judge.read_all(below), &contents, "closed after the loss");
        true
    }
}

/// Leaks that `qemu-img check` finds; it must find nothing worse.
pub(super) fn check(path: &Path) -> u64 {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json"])
        .arg(path)
        .output()
        .expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "qemu-img check: {text}{complaint}"
    );
    let json: serde_json::Value = serde_json::from_str(&text).expect("json");
    json["leaks"].as_u64().unwrap_or(0)
}

/// Keeps a bad state, for the one who looks for the reason.
struct Evidence<'a> {
    bytes: &'a [u8],
    what: String,
}

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let path: PathBuf = std::env::temp_dir().join("virtioblkd-crash-state.qcow2");
            let kept = std::fs::write(&path, self.bytes).is_ok();
            eprintln!("{}; kept: {kept}, {}", self.what, path.display());
        }
    }
}

/// One life; returns how many states were judged, and one of them.
fn life(
    kind: &'static Kind,
    below: &Vec<u8>,
    start: &Start,
    bench: &Bench,
    seed: u64,
) -> (u64, Vec<u8>) {
    let io = reactor();
    let config = Sim {
        seed,
        delay: 4,
        pieces: true,
        promises_zeros: kind.zeros,
        discard_garbage: true,
        torn_failures: false,
    };
    let world = World {
        io: io.clone(),
        kind,
        cache: if seed % 2 == 0 { 1 << 20 } else { 0 },
        storage: sim(start.bytes.clone(), config),
        image: OnceCell::new(),
        below,
        history: History::new(start.contents.clone()),
        tag: Cell::new(seed << 32),
        steps: 40,
        seed,
        over: Cell::new(false),
    };
    bench.seen.borrow_mut().clear();
    let (mut states, mut next) = (0, Vec::new());
    let crasher = async {
        let mut state = seed + 77;
        while !world.over.get() {
            for _ in 0..random(&mut state) % 24 {
                io.yield_now().await;
            }
            for _ in 0..2 {
                let bytes = crash(the_sim(&world.storage), &mut state);
                let what = format!("{}, seed {seed}, state {states}", kind.name);
                let _evidence = Evidence {
                    bytes: &bytes,
                    what: what.clone(),
                };
                let disk = judge::Judge::new(&bytes).read_all(below);
                world.history.check_crash(&disk, &what);
                let new = bench.judge(kind, start, below, &bytes);
                states += u64::from(new);
                if next.is_empty() || random(&mut state) % (states + 1) == 0 {
                    next = bytes.clone();
                }
            }
        }
    };
    io.block_on(together(
        [Box::pin(world.live()) as Boxed<'_>, Box::pin(crasher)].into_iter(),
    ));
    let bytes = the_sim(&world.storage).crash_with(|_, _| 0);
    let disk = judge::Judge::new(&bytes).read_all(below);
    world.history.check_crash(&disk, "closed");
    bench.judge(kind, start, below, &bytes);
    let leaks = judge::Judge::new(&bytes).check_all();
    assert!(leaks <= start.leaks, "a clean close leaks {leaks} clusters");
    drop(world);
    io.close();
    (states, next)
}

/// Three lives, the later ones after a power loss in the one before. Returns how many states were judged, and
/// whether the refcount table has moved.
fn lives(kind: &'static Kind, seed: u64, bench: &Bench) -> (u64, bool) {
    let images = Images::new();
    let below = kind.create(&images);
    let mut bytes = images.bytes("a");
    let table = bytes[48..56].to_vec();
    let mut states = 0;
    for generation in 0..3 {
        let start = Start::of(bytes, &below);
        if generation == 0 {
            let what = "qemu-img and the second reader";
            assert_same(&start.contents, &images.contents("a"), what);
            assert_eq!(start.leaks, 0, "{}", kind.name);
        }
        let (judged, next) = life(kind, &below, &start, bench, seed * 8 + generation);
        states += judged;
        bytes = next;
    }
    (states, bytes[48..56] != table[..])
}

/// A number from the environment.
fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text}")),
    )
}

/// Ends the work of all threads when one has found something.
struct Stop<'a>(&'a AtomicU64);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(u64::MAX / 2, Ordering::Relaxed);
        }
    }
}

/// Judges at least `wanted` states of the kinds whose names contain `which`, on two threads.
fn power_losses(which: &str, wanted: u64) -> u64 {
    let kinds: Vec<&'static Kind> = kinds().filter(|kind| kind.name.contains(which)).collect();
    assert!(!kinds.is_empty(), "no kind of image is called {which}");
    let first = from_environment("VIRTIOBLKD_CRASH_SEED").unwrap_or(1);
    let (jobs, states, grown) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        let (bench, _stop) = (Bench::new(), Stop(&states));
        while states.load(Ordering::Relaxed) < wanted {
            let job = jobs.fetch_add(1, Ordering::Relaxed);
            let kind = kinds[(job % kinds.len() as u64) as usize];
            let seed = first + job / kinds.len() as u64;
            let (judged, moved) = lives(kind, seed, &bench);
            states.fetch_add(judged, Ordering::Relaxed);
            grown.fetch_add(u64::from(moved), Ordering::Relaxed);
        }
        bench.io.close();
    };
    std::thread::scope(|scope| {
        for thread in [scope.spawn(work), scope.spawn(work)] {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    let (jobs, states) = (jobs.into_inner(), states.into_inner());
    println!(
        "{states} states after a power loss were judged, of {} kinds, in {jobs} times three lives",
        kinds.len()
    );
    let grows = |kind: &&Kind| kind.name.ends_with("that grows");
    let may_grow = kinds.iter().copied().any(|kind| grows(&kind)) && jobs >= kinds.len() as u64;
    assert!(
        !may_grow || grown.into_inner() > 0,
        "no refcount table grew"
    );
    states
}

#[test]
fn power_loss_at_any_moment_loses_nothing_flushed_and_invents_nothing() {
    let wanted = from_environment("VIRTIOBLKD_CRASH_STATES").unwrap_or(20_000);
    let which = std::env::var("VIRTIOBLKD_CRASH_KIND").unwrap_or_default();
    assert!(power_losses(&which, wanted) >= wanted);
}
