//! Real kills of a real process: several threads write to one image on a real file until `SIGKILL`.
//!
//! The child is this test binary, told by the environment to be it. Parent and child share the journal's memory
//! and a table of what was begun and what had completed, by sector.

use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use super::*;
use crate::block::file::{FileOptions, FileStorage};
use crate::block::lock::Role;

const SIZE: u64 = 8 << 20;
const SECTORS: u64 = SIZE / 512;
const THREADS: usize = 3;
const CHILD: &str = "VIRTIOBLKD_KILLED_CHILD";
const BELOW: usize = 5 << 20;

fn mapped(path: &Path, bytes: u64) -> SharedPart {
    let file = std::fs::OpenOptions::new();
    let file = file
        .clone()
        .read(true)
        .write(true)
        .open(path)
        .expect("file");
    let memory = SharedMemory::map(file, 0, bytes).expect("memory");
    memory.part(0, bytes as usize).expect("all of it")
}

/// What is in a sector, by the number of its version; version 0 is what is below.
fn contents(sector: u64, version: u64, below: &[u8]) -> Vec<u8> {
    match version {
        0 => {
            let at = sector as usize * 512;
            let mut bytes = below[at.min(below.len())..(at + 512).min(below.len())].to_vec();
            bytes.resize(512, 0);
            bytes
        }
        zeros if zeros % 8 == 0 => vec![0; 512],
        _ => super::super::history::sector_bytes(sector, version),
    }
}

struct Files {
    images: PathBuf,
    options: Options,
}

impl Files {
    fn storage(&self) -> Arc<Storage> {
        let options = FileOptions {
            read_only: false,
            direct: false,
        };
        let file = FileStorage::open(self.images.join("a"), options).expect("open");
        Arc::new(Storage::File(file))
    }

    fn journal(&self) -> SharedPart {
        mapped(
            &self.images.join("journal"),
            crate::block::JOURNAL_BYTES as u64,
        )
    }

    /// Versions begun and completed: two numbers for each sector.
    fn table(&self) -> SharedPart {
        mapped(&self.images.join("table"), SECTORS * 16)
    }
}

/// Locks the image when the one before has let go.
fn lock_image(storage: &Storage) {
    let end = Instant::now() + Duration::from_secs(60);
    while let Err(error) = storage.lock(Role::ImageWriter) {
        assert!(Instant::now() < end, "{error}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn work(files: &Files, image: &Qcow2, io: &Io, thread: usize, seed: u64, below: &Vec<u8>) {
    let table = files.table();
    let table = words(&table);
    let own = |n: u64| (n * THREADS as u64 + thread as u64) * 8;
    io.block_on(async {
        image.join(io);
        let task = |task: u64| async move {
            let mut chance = seed * 100 + thread as u64 * 10 + task + 1;
            for _ in 0u64.. {
                // Runs of eight sectors, of which this thread's tasks have every other.
                let runs = SECTORS / 8 / THREADS as u64;
                let run = random(&mut chance) % (runs / 2) * 2 + task;
                let skip = random(&mut chance) % 8;
                let first = own(run) + skip;
                let count = 1 + random(&mut chance) % (8 - skip);
                let zeros = random(&mut chance) % 6 == 0;
                let version = |n: u64| {
                    let next = table[n as usize * 2].load(SeqCst) + 1;
                    match zeros {
                        true => next.next_multiple_of(8),
                        false => next + u64::from(next % 8 == 0),
                    }
                };
                let versions: Vec<u64> = (first..first + count).map(version).collect();
                let all = || (first..first + count).zip(&versions);
                all().for_each(|(n, version)| table[n as usize * 2].store(*version, SeqCst));
                let (offset, len) = (first * 512, count * 512);
                let pin = io.pin();
                if zeros {
                    let zeroes = image.write_zeroes(io, below, offset, len, true);
                    zeroes.await.expect("zeroes");
                } else {
                    let bytes: Vec<u8> = all().flat_map(|(n, v)| contents(n, *v, below)).collect();
                    let mut buf = io.buf(bytes.len());
                    buf.copy_from_slice(&bytes);
                    image
                        .write(io, below, offset, buf.sg())
                        .await
                        .expect("write");
                }
                drop(pin);
                all().for_each(|(n, version)| table[n as usize * 2 + 1].store(*version, SeqCst));
                if random(&mut chance) % 300 == 0 {
                    image.flush(io, below).await.expect("flush");
                }
                io.yield_now().await;
            }
        };
        together((0..2).map(|n| Box::pin(task(n)) as Boxed<'_>)).await;
    });
}

fn options(below: bool) -> Options {
    Options {
        read_only: false,
        l2_cache_bytes: 32 << 10,
        workers: THREADS,
        has_backing: below,
        ..READ
    }
}

/// What the child does until it is killed. As a test of its own it is nothing.
#[test]
fn child_that_is_killed() {
    let Ok(text) = std::env::var(CHILD) else {
        return;
    };
    let (seed, path) = text.split_once(':').expect("seed:path");
    let seed: u64 = seed.parse().expect("seed");
    let images = PathBuf::from(path);
    let below = std::fs::read(images.join("base")).unwrap_or_default();
    let files = Files {
        options: options(!below.is_empty()),
        images,
    };
    let storage = files.storage();
    lock_image(&storage);
    storage.refresh().expect("size");
    let epochs = Epochs::new();
    let io = reactor_of(&epochs, 0);
    let image = io.block_on(async {
        let image = open(&io, &storage, files.options).await.expect("open");
        let used = image.use_journal(&io, &below, files.journal());
        used.await.expect("journal");
        image
    });
    std::fs::write(files.images.join("ready"), b"").expect("ready");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (files, image, epochs, below) = (&files, &image, &epochs, &below);
            scope.spawn(move || {
                let io = reactor_of(epochs, thread + 1);
                work(files, image, &io, thread, seed, below);
            });
        }
    });
}

fn judge_killed(files: &Files, below: &Vec<u8>, what: &str) {
    let storage = files.storage();
    lock_image(&storage);
    storage.refresh().expect("size");
    let io = reactor();
    io.block_on(async {
        let options = Options {
            workers: 0,
            ..files.options
        };
        let image = open(&io, &storage, options).await.expect("open");
        let used = image.use_journal(&io, below, copy_of(&files.journal()));
        used.await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let disk = read_all(&io, &image, below).await.expect("read");
        let table = files.table();
        let table = words(&table);
        for (n, got) in disk.chunks(512).enumerate() {
            let (begun, done) = (table[n * 2].load(SeqCst), table[n * 2 + 1].load(SeqCst));
            // What was under way at an earlier kill may have happened.
            let found = (done..=begun).find(|v| contents(n as u64, *v, below) == got);
            let Some(found) = found else {
                panic!("{what}: sector {n} is none of the versions {done} to {begun}");
            };
            // From here on it stays.
            table[n * 2].store(found, SeqCst);
            table[n * 2 + 1].store(found, SeqCst);
        }
        image.close(&io, below).await.expect("close");
    });
    storage.unlock();
    let bytes = std::fs::read(files.images.join("a")).expect("image");
    judge::Judge::new(&bytes).check();
    check(&files.images.join("a"));
    words(&files.journal())
        .iter()
        .for_each(|word| word.store(0, SeqCst));
}

#[test]
fn a_process_of_several_threads_that_is_killed_has_lost_nothing_that_had_completed() {
    for (options_of, below) in [
        ("cluster_size=4k", BELOW),
        ("cluster_size=4k", 0),
        ("cluster_size=64k,extended_l2=on", BELOW),
        ("cluster_size=4k,compat=0.10", BELOW),
    ] {
        let images = Images::new();
        let below = noise(3, below);
        match below.is_empty() {
            true => images.create("a", options_of, SIZE),
            false => {
                write_file(&images.path("base"), &below);
                images.create_over("a", options_of, "base", "raw", SIZE);
            }
        }
        write_file(
            &images.path("journal"),
            &vec![0; crate::block::JOURNAL_BYTES],
        );
        write_file(&images.path("table"), &vec![0; SECTORS as usize * 16]);
        let files = Files {
            images: images.0.path().to_owned(),
            options: options(!below.is_empty()),
        };
        for round in 1..=6u64 {
            let _old = std::fs::remove_file(images.path("ready"));
            let name = "block::qcow2::tests::journal::kills::child_that_is_killed";
            let mut child = Command::new(std::env::current_exe().expect("this"))
                .args(["--exact", name, "--nocapture"])
                .env(CHILD, format!("{round}:{}", images.0.path().display()))
                .stdout(Stdio::null())
                .spawn()
                .expect("child");
            let completed = || {
                let table = files.table();
                let table = words(&table);
                table
                    .iter()
                    .skip(1)
                    .step_by(2)
                    .filter(|w| w.load(SeqCst) > 0)
                    .count() as u64
            };
            // Until it has done some work: where in it the kill falls is chance.
            let before = completed();
            let enough = before + 200 + round * 150;
            let end = Instant::now() + Duration::from_secs(60);
            while completed() < enough.min(SECTORS / 2) && Instant::now() < end {
                assert!(child.try_wait().expect("child").is_none(), "it ended");
                std::thread::sleep(Duration::from_millis(1));
            }
            child.kill().expect("kill");
            assert_eq!(child.wait().expect("child").signal(), Some(libc::SIGKILL));
            assert!(completed() > before, "it has done nothing");
            // Every other kill is replayed by the next child, whose own kill comes on top.
            if round % 2 == 0 {
                judge_killed(&files, &below, &format!("{options_of}, kill {round}"));
            }
        }
    }
}
