//! Disks that change their size while other threads use them.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::sim::random;
use super::super::tests::pattern;
use super::tests::Folder;
use super::*;
use crate::reactor::IoConfig;

/// Bytes that the disk always has.
const KEPT: usize = 192 << 10;

/// Two threads write, and read back, while this one changes the size. Returns what the first [`KEPT`] bytes
/// hold then, and the size at last.
fn resize_under_load(f: &Folder, disk: &Disk, rounds: u64) -> (Vec<u8>, u64) {
    let active = f.io.block_on(disk.activate(&f.io, 2)).unwrap();
    let over = AtomicBool::new(false);
    let mut kept = f.read(&active, 0, KEPT).unwrap();
    let stripes: Vec<Vec<(usize, Vec<u8>)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..3usize)
            .map(|worker| {
                let (active, over, epochs) = (active.clone(), &over, f.io.epochs().clone());
                scope.spawn(move || {
                    let io = Io::new(&IoConfig {
                        worker,
                        entries: 64,
                        epochs,
                    })
                    .unwrap();
                    let mut state = worker as u64 * 17;
                    let mut last = Vec::new();
                    io.block_on(async {
                        while !over.load(Ordering::Relaxed) || last.len() < 40 {
                            let low = random(&mut state) % 2 == 0;
                            let at = match low {
                                true => random(&mut state) as usize % 48 * 4096,
                                false => KEPT + random(&mut state) as usize % 6000 * 512,
                            };
                            let at = if low { at + (worker - 1) * 2048 } else { at };
                            let data = pattern(2048, state);
                            let mut buf = io.buf(2048);
                            buf.copy_from_slice(&data);
                            match active.write(&io, at as u64, buf.sg()).await {
                                Ok(()) if low => {
                                    active.read(&io, at as u64, buf.sg()).await.unwrap();
                                    assert!(buf[..] == data[..], "at {at}");
                                    last.push((at, data));
                                }
                                Ok(()) => {}
                                Err(e) => {
                                    assert!(!low && e.kind() == ErrorKind::OutOfRange, "{e}");
                                }
                            }
                            if random(&mut state) % 20 == 0 {
                                active.flush(&io).await.unwrap();
                            }
                        }
                    });
                    io.close();
                    last
                })
            })
            .collect();
        let mut state = rounds;
        for _ in 0..rounds {
            let size = KEPT as u64 + random(&mut state) % 6000 * 512;
            f.io.block_on(active.resize(&f.io, size)).unwrap();
            assert_eq!(active.size(), size);
        }
        over.store(true, Ordering::Relaxed);
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for (at, data) in stripes.into_iter().flatten() {
        kept[at..at + data.len()].copy_from_slice(&data);
    }
    f.io.block_on(active.resize(&f.io, KEPT as u64)).unwrap();
    let end = (KEPT + 100 * 512) as u64;
    f.io.block_on(active.resize(&f.io, end)).unwrap();
    let all = f.read(&active, 0, end as usize).unwrap();
    assert!(all[..KEPT] == kept, "what was written is there");
    assert!(all[KEPT..].iter().all(|b| *b == 0), "what came is zeros");
    let refused = f.read(&active, end - 512, 1024).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::OutOfRange);
    f.deactivate(active).unwrap();
    (kept, end)
}

#[test]
fn a_raw_disk_changes_its_size_under_load() {
    let f = Folder::new();
    for cache in [CacheMode::None, CacheMode::Writeback] {
        let path = f.put("a.img", &pattern(1 << 20, 5));
        let mut spec = f.spec("a.img", Format::Raw);
        spec.cache = cache;
        let disk = f.open(&spec).unwrap();
        let (kept, end) = resize_under_load(&f, &disk, 40);
        let file = std::fs::read(&path).unwrap();
        assert_eq!(file.len() as u64, end);
        assert!(file[..KEPT] == kept && file[KEPT..].iter().all(|b| *b == 0));
    }
}

#[test]
fn a_qcow2_overlay_changes_its_size_under_load() {
    let f = Folder::new();
    f.put("base.img", &pattern(900_000, 6));
    for cluster in ["512", "4096", "65536"] {
        let options = format!("cluster_size={cluster}");
        f.tool(&[
            "qemu-img", "create", "-q", "-f", "qcow2", "-o", &options, "-b", "base.img", "-F",
            "raw", "a.qcow2", "1M",
        ]);
        let disk = f.open_qcow2("a.qcow2").unwrap();
        let (kept, end) = resize_under_load(&f, &disk, 25);
        f.tool(&["qemu-img", "check", "-q", "a.qcow2"]);
        let all = f.by_qemu("a.qcow2");
        assert_eq!(all.len() as u64, end);
        assert!(all[..KEPT] == kept && all[KEPT..].iter().all(|b| *b == 0));
    }
}

#[test]
fn what_cannot_be_a_size_or_a_writable_disk_is_refused() {
    let f = Folder::new();
    f.put("a.img", &[1; 8192]);
    let mut spec = f.spec("a.img", Format::Raw);
    let resize = |spec: &DiskSpec, size: u64| {
        let disk = f.open(spec).unwrap();
        let active = f.activate(&disk).unwrap();
        let error = f.io.block_on(active.resize(&f.io, size)).unwrap_err();
        assert_eq!(active.size(), 8192);
        assert_eq!(f.read(&active, 7680, 512).unwrap(), [1; 512]);
        f.deactivate(active).unwrap();
        error.kind()
    };
    for size in [0, 1000, u64::MAX] {
        assert_eq!(resize(&spec, size), ErrorKind::OutOfRange);
    }
    spec.read_only = true;
    assert_eq!(resize(&spec, 4096), ErrorKind::ReadOnly);
}
