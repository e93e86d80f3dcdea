//! Copy-on-read over a namespace.

use std::process::Command;
use std::sync::Arc;

use super::peer::Do;
use super::rig::{Rig, Setup, pattern};
use crate::block::active::{ActiveDisk, Locks};
use crate::block::layer::{Layer, Raw};
use crate::block::qcow2::{Header, OnDirty, Options, Qcow2};
use crate::block::sim::{Sim, SimStorage};
use crate::block::tests::dir;
use crate::block::{DiskSpec, Format, Source, Storage};

/// A disk with copy-on-read, of an overlay in memory over the namespace.
fn overlay(rig: &Rig, base: &Arc<Storage>) -> Arc<ActiveDisk> {
    let dir = dir();
    let line = [
        "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "base", "top", "4M",
    ];
    let made = Command::new("qemu-img")
        .args(line)
        .current_dir(dir.path())
        .status();
    assert!(made.expect("qemu-img").success());
    let bytes = std::fs::read(dir.path().join("top")).unwrap();
    let top = Arc::new(Storage::Sim(SimStorage::new(bytes, Sim::default())));
    let options = Options {
        read_only: false,
        l2_cache_bytes: 1 << 20,
        workers: 0,
        has_backing: true,
        on_dirty: OnDirty::Repair,
    };
    let image = rig.io.block_on(async {
        let header = Header::read(&rig.io, &top).await.unwrap();
        let image = Qcow2::open(&rig.io, top.clone(), header, options);
        image.await.unwrap()
    });
    let mut spec = DiskSpec::new(Source::Null { size: 0 }, Format::Qcow2);
    spec.copy_on_read = true;
    let size = image.size();
    let layers = vec![
        Layer::Qcow2(Box::new(image)),
        Layer::Raw(Raw::new(base.clone(), base.len())),
    ];
    let disk = ActiveDisk::new(layers, Vec::new(), Locks::default(), size, &spec);
    let disk = Arc::new(disk);
    disk.copy_by_tasks();
    disk
}

#[test]
fn a_disk_is_given_back_while_a_copy_reads_and_the_queue_stays_as_it_is() {
    let mut rig = Rig::new(Setup::default());
    rig.fill();
    let base = Arc::new(rig.storage.take().unwrap());
    let disk = overlay(&rig, &base);
    rig.peer().script(|command| match command.number {
        0 => Do::It,
        _ => Do::Hold,
    });
    let read = |at: u64| {
        let mut buf = rig.io.buf(4096);
        let read = base.read(&rig.io, at, buf.sg());
        rig.io.block_on(read).unwrap();
        assert!((at..).zip(&*buf).all(|(at, byte)| *byte == pattern(at)));
    };
    rig.io.block_on(async {
        let mut buf = rig.io.buf(4096);
        disk.read(&rig.io, 65536, buf.sg()).await.unwrap();
        assert!((65536..).zip(&*buf).all(|(at, byte)| *byte == pattern(at)));
    });
    // The rest of the cluster is being read.
    rig.until(|| rig.peer().seen().len() == 2);
    let closed = disk.clone().deactivate(&rig.io);
    rig.io.block_on(closed).unwrap();
    assert_eq!(rig.path().told("failed"), 0);
    rig.peer().script(|_| Do::It);
    read(0);
    rig.peer().answer_held();
    rig.until(|| disk.copy_stats().passed_over == 1);
    assert_eq!(disk.copy_stats().stored_bytes, 0);
    read(4096);
    assert_eq!(rig.path().told("failed"), 0);
}
