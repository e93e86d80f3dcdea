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

fn refresh(f: &Folder, active: &ActiveDisk) -> u64 {
    f.io.block_on(active.refresh(&f.io)).unwrap()
}

fn set_len(path: &std::path::Path, len: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

#[test]
fn a_raw_file_that_others_resize_is_noticed_while_it_is_in_use() {
    let f = Folder::new();
    for cache in [CacheMode::None, CacheMode::Writeback] {
        let path = f.put("a.img", &pattern(1 << 20, 5));
        let mut spec = f.spec("a.img", Format::Raw);
        spec.cache = cache;
        let disk = f.open(&spec).unwrap();
        let active = f.activate(&disk).unwrap();
        assert_eq!(refresh(&f, &active), 1 << 20, "nothing has changed");
        for size in [4 << 20, 64 << 10, 1 << 20] {
            set_len(&path, size);
            assert_eq!(refresh(&f, &active), size);
            assert_eq!(active.size(), size);
            let data = pattern(4096, size);
            f.write(&active, size - 4096, &data).unwrap();
            assert_eq!(f.read(&active, size - 4096, 4096).unwrap(), data);
            for beyond in [size - 512, size, 2 << 20] {
                let refused = f.write(&active, beyond.max(size - 512), &data).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::OutOfRange);
            }
            assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
        }
        // Without a byte it is no disk: nothing is served, and nothing grows.
        set_len(&path, 0);
        assert_eq!(refresh(&f, &active), 0);
        assert!(f.read(&active, 0, 512).is_err() && f.write(&active, 0, &[1; 512]).is_err());
        set_len(&path, 8192);
        assert_eq!(refresh(&f, &active), 8192);
        f.write(&active, 0, &[1; 512]).unwrap();
        f.deactivate(active).unwrap();
    }
}

#[test]
fn a_part_of_a_block_at_the_end_of_a_file_is_used_and_its_growth_is_no_other_size() {
    let f = Folder::new();
    let path = f.put("a.img", &pattern(1 << 20, 5));
    let disk = f.open(&f.spec("a.img", Format::Raw)).unwrap();
    let active = f.activate(&disk).unwrap();
    let align = disk.links[0].storage.limits().io_align as u64;
    for extra in [1, 511, 512, 513, 4095] {
        let size = (1 << 20) + extra / 512 * 512;
        set_len(&path, (1 << 20) + extra);
        assert_eq!(refresh(&f, &active), size, "{extra}");
        f.write(&active, size - 512, &[7; 512]).unwrap();
        // The write may have completed the file's last block, and nothing but that.
        let len = std::fs::metadata(&path).unwrap().len();
        assert!(len >= size && len <= ((1 << 20) + extra).next_multiple_of(align));
        assert_eq!(refresh(&f, &active), size, "{extra}");
    }
    let size = active.size();
    f.deactivate(active).unwrap();
    assert_eq!(f.io.block_on(disk.refresh(&f.io)).unwrap(), size);
    let active = f.activate(&disk).unwrap();
    assert_eq!(active.size(), size);
    f.deactivate(active).unwrap();
}

#[test]
fn an_image_that_was_resized_while_nobody_used_it_is_noticed_before_and_at_activation() {
    let f = Folder::new();
    let raw = f.put("a.img", &pattern(1 << 20, 5));
    f.tool(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let look = |disk: &Disk| f.io.block_on(disk.refresh(&f.io));
    let at_activation = |disk: &Disk| {
        let active = f.activate(disk).unwrap();
        assert_eq!(active.size(), disk.size());
        f.write(&active, active.size() - 512, &[7; 512]).unwrap();
        f.deactivate(active).unwrap();
        disk.size()
    };
    for (name, format) in [("a.img", Format::Raw), ("a.qcow2", Format::Qcow2)] {
        let disk = f.open(&f.spec(name, format)).unwrap();
        assert_eq!(look(&disk).unwrap(), 1 << 20);
        let said = format.to_string();
        for (size, looks) in [
            (3 << 20, true),
            (5 << 20, false),
            (2 << 20, true),
            (1 << 20, false),
        ] {
            let bytes = format!("{size}");
            f.tool(&[
                "qemu-img", "resize", "-q", "--shrink", "-f", &said, name, &bytes,
            ]);
            if looks {
                assert_eq!(look(&disk).unwrap(), size);
                assert_eq!(disk.size(), size);
            }
            assert_eq!(at_activation(&disk), size);
        }
    }
    f.tool(&["qemu-img", "check", "-q", "a.qcow2"]);

    // Another file in its place; none; one that is no disk.
    let disk = f.open(&f.spec("a.img", Format::Raw)).unwrap();
    f.put("b.img", &[1; 8192]);
    std::fs::rename(f.at("b.img"), &raw).unwrap();
    assert_eq!(look(&disk).unwrap(), 8192);
    assert_eq!(at_activation(&disk), 8192);
    std::fs::remove_file(&raw).unwrap();
    assert!(look(&disk).is_err());
    f.put("a.img", &[1; 511]);
    assert!(look(&disk).is_err());
    assert_eq!(disk.size(), 8192, "an error changes nothing");
}

#[test]
fn a_qcow2_image_in_use_keeps_its_size_whatever_its_file_says() {
    let f = Folder::new();
    f.tool(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    let disk = f.open_qcow2("a.qcow2").unwrap();
    let active = f.activate(&disk).unwrap();
    let refused = f.run(&["qemu-img", "resize", "-f", "qcow2", "a.qcow2", "2M"]);
    assert!(refused.unwrap_err().contains("lock"));
    set_len(&f.at("a.qcow2"), 8 << 20);
    assert_eq!(refresh(&f, &active), 1 << 20);
    f.deactivate(active).unwrap();
}

#[test]
fn a_luks_file_that_grew_is_noticed_by_its_payload() {
    let f = Folder::new();
    f.put("key", b"secret");
    f.tool(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "luks",
        "--object",
        "secret,id=k,file=key",
        "-o",
        "key-secret=k,iter-time=10",
        "a.luks",
        "1M",
    ]);
    let mut spec = f.spec("a.luks", Format::Luks);
    spec.keys = vec![crate::block::crypt::KeySpec {
        image: None,
        source: crate::block::crypt::KeySource::File(f.at("key")),
    }];
    let disk = f.open(&spec).unwrap();
    assert_eq!(disk.size(), 1 << 20);
    let file = std::fs::metadata(f.at("a.luks")).unwrap().len();
    set_len(&f.at("a.luks"), file + (1 << 20));
    assert_eq!(f.io.block_on(disk.refresh(&f.io)).unwrap(), 2 << 20);
    let active = f.activate(&disk).unwrap();
    set_len(&f.at("a.luks"), file + (3 << 20));
    assert_eq!(refresh(&f, &active), 4 << 20);
    f.write(&active, (4 << 20) - 4096, &[9; 4096]).unwrap();
    assert_eq!(f.read(&active, (4 << 20) - 4096, 4096).unwrap(), [9; 4096]);
    f.deactivate(active).unwrap();
}
