//! Tests of the allocator. Images come from `qemu-img`, which also judges the result. No guest data is
//! mapped, so every allocated cluster is a leak to it, and nothing may be more than that.

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::block::error::{ErrorKind, Result};
use crate::block::qcow2::check::check;
use crate::block::qcow2::refcount::Width;
use crate::block::sim::{Kind, Sim, SimStorage, random};
use crate::reactor::{Epochs, Io, IoConfig};

mod basics;
mod crash;
mod faults;
mod limbo;
mod threads;

fn reactor() -> Io {
    reactor_of(&Epochs::new(), 0)
}

fn reactor_of(epochs: &Arc<Epochs>, worker: usize) -> Io {
    Io::new(&IoConfig {
        worker,
        entries: 64,
        epochs: epochs.clone(),
    })
    .expect("io_uring")
}

/// An empty image with these `qemu-img create` options.
fn image(options: &str, size: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("image");
    create(&path, options, size);
    std::fs::read(path).expect("image")
}

fn create(path: &std::path::Path, options: &str, size: u64) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .arg(path)
        .arg(size.to_string())
        .status()
        .expect("qemu-img");
    assert!(made.success(), "{options}");
}

/// What `qemu-img check` counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Judged {
    errors: u64,
    leaks: u64,
}

fn judge(image: &[u8]) -> Judged {
    // In memory where possible: there are thousands of them.
    let memory = std::path::Path::new("/dev/shm");
    let file = match memory.is_dir() {
        true => tempfile::NamedTempFile::new_in(memory),
        false => tempfile::NamedTempFile::new(),
    }
    .expect("file");
    std::fs::write(file.path(), image).expect("write");
    let judged = judge_file(file.path());
    let io = reactor();
    let copy = sim(image.to_vec(), Sim::default());
    let ours = io.block_on(check(&io, &copy)).expect("check");
    let counted = (ours.errors, ours.leaks);
    assert_eq!(counted, (judged.errors, judged.leaks), "{ours:?}");
    judged
}

fn judge_file(path: &std::path::Path) -> Judged {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json"])
        .arg(path)
        .output()
        .expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stdout);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| {
        panic!("{e}: {text}{}", String::from_utf8_lossy(&output.stderr));
    });
    let count = |key: &str| json[key].as_u64().unwrap_or(0);
    Judged {
        errors: count("corruptions") + count("check-errors"),
        leaks: count("leaks"),
    }
}

fn sim(image: Vec<u8>, config: Sim) -> Arc<Storage> {
    Arc::new(Storage::Sim(SimStorage::new(image, config)))
}

fn simulated(storage: &Storage) -> &SimStorage {
    match storage {
        Storage::Sim(sim) => sim,
        _ => panic!("not simulated"),
    }
}

async fn open(io: &Io, storage: &Arc<Storage>, workers: usize) -> Result<Arc<Allocator>> {
    let header = Header::read(io, storage).await?;
    let allocator = Allocator::open(io, storage, &header, workers).await?;
    allocator.reserve_metadata(
        header.geometry.host_cluster(header.l1_offset),
        header.geometry.clusters(header.l1_entries * 8),
        "L1 table",
    )?;
    Ok(Arc::new(allocator))
}

/// Refcounts as an image's bytes have them, found without the allocator.
struct Counts<'a> {
    image: &'a [u8],
    cluster_bits: u32,
    width: Width,
}

impl<'a> Counts<'a> {
    fn of(image: &'a [u8]) -> Self {
        let v2 = image[7] == 2;
        let order = if v2 { 4 } else { u32::from(image[99]) };
        Self {
            image,
            cluster_bits: u32::from(image[23]),
            width: Width::new(order).unwrap(),
        }
    }

    fn word(&self, at: u64) -> u64 {
        let at = at as usize;
        self.image
            .get(at..at + 8)
            .map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
    }

    fn get(&self, cluster: u64) -> u64 {
        let bits = self.width.entries_bits(self.cluster_bits);
        let (table, clusters) = (self.word(48), self.word(56) >> 32);
        let index = cluster >> bits;
        if index >= clusters << (self.cluster_bits - 3) {
            return 0;
        }
        let at = self.word(table + index * 8) as usize;
        if at == 0 {
            return 0;
        }
        let entry = (cluster & ((1 << bits) - 1)) as usize;
        let block = self.image.get(at..).unwrap_or_default();
        let inside = self.width.byte_of(entry + 1) <= block.len();
        assert!(inside, "a refcount block is cut off");
        self.width.get(block, entry)
    }
}

/// Which clusters are whose: the test's own books.
#[derive(Default)]
struct Books(HashMap<u64, ()>);

impl Books {
    fn take(&mut self, first: HostCluster, count: u64) {
        for cluster in first.0..first.0 + count {
            assert!(self.0.insert(cluster, ()).is_none(), "{cluster} twice");
        }
    }

    fn give(&mut self, first: HostCluster, count: u64) {
        for cluster in first.0..first.0 + count {
            assert!(self.0.remove(&cluster).is_some());
        }
    }
}

/// Allocates and keeps `count` clusters, in runs.
async fn take(allocator: &Arc<Allocator>, io: &Io, count: u64) -> Result<Vec<(HostCluster, u64)>> {
    let mut runs = Vec::new();
    let mut left = count;
    while left > 0 {
        let fresh = allocator.allocate(io, left).await?;
        assert!(fresh.count() > 0 && fresh.count() <= left);
        left -= fresh.count();
        runs.push(fresh.keep());
    }
    Ok(runs)
}

/// Frees runs and makes that durable, as a flush does.
async fn free_and_settle(
    allocator: &Arc<Allocator>,
    io: &Io,
    runs: &[(HostCluster, u64)],
) -> Result<()> {
    for (first, count) in runs {
        allocator.free(io, *first, *count);
    }
    let mark = allocator.mark();
    io.yield_now().await;
    allocator.settle(io, mark).await
}
