//! Disks whose top image is qcow2, written to; qemu-img looks at the result.

use super::super::sim;
use super::super::tests::pattern;
use super::tests::Folder;
use super::*;

/// Requests of chance from eight tasks at once, each on its own part of the disk; what the disk shows
/// afterwards, here and by qemu-img, is what was written, and the image is clean.
fn storm(f: &Folder, name: &str, seed: u64, cache: CacheMode) {
    const TASKS: u64 = 8;
    let mut spec = f.spec(name, Format::Qcow2);
    spec.cache = cache;
    let disk = f.open(&spec).unwrap();
    let mut model = f.contents(name, Format::Qcow2);
    let active = f.activate(&disk).unwrap();
    let part = active.size() / TASKS / 512 * 512;
    let parts: Vec<_> = (0..TASKS)
        .map(|task| {
            let (io, disk) = (f.io.clone(), active.clone());
            let start = (task * part) as usize;
            let shown = std::rc::Rc::new(std::cell::RefCell::new(
                model[start..start + part as usize].to_vec(),
            ));
            let result = shown.clone();
            let done = std::rc::Rc::new(std::cell::Cell::new(false));
            let ended = done.clone();
            io.clone().spawn(async move {
                let result_of_task = shown;
                let mut shown = result_of_task.take();
                let mut rng = seed * 100 + task + 1;
                for _ in 0..60 {
                    let mut pick = |n: u64| sim::random(&mut rng) % n;
                    let at = pick(part / 512) * 512;
                    let most = if pick(8) == 0 { 600 } else { 20 };
                    let len = (1 + pick(most)) * 512;
                    let len = len.min(part - at);
                    let kind = pick(10);
                    let place = at as usize..(at + len) as usize;
                    let offset = start as u64 + at;
                    let mut buf = io.buf(len as usize);
                    match kind {
                        0 => disk.flush(&io).await.unwrap(),
                        1 | 2 => {
                            let unmap = kind == 1;
                            disk.write_zeroes(&io, offset, len, unmap).await.unwrap();
                            shown[place].fill(0);
                        }
                        3 => {
                            disk.discard(&io, offset, len).await.unwrap();
                            // Whatever it shows now, it goes on showing.
                            disk.read(&io, offset, buf.sg()).await.unwrap();
                            shown[place].copy_from_slice(&buf);
                        }
                        4 | 5 => {
                            disk.read(&io, offset, buf.sg()).await.unwrap();
                            assert!(shown[place] == buf[..], "read at {offset}");
                        }
                        _ => {
                            buf.copy_from_slice(&pattern(len as usize, rng));
                            disk.write(&io, offset, buf.sg()).await.unwrap();
                            shown[place].copy_from_slice(&buf);
                        }
                    }
                }
                result_of_task.replace(shown);
                ended.set(true);
            });
            (result, done)
        })
        .collect();
    while !parts.iter().all(|(_, done)| done.get()) {
        if !f.io.turn() {
            f.io.park(None);
        }
    }
    for (n, (shown, _)) in parts.iter().enumerate() {
        let start = n * part as usize;
        model[start..start + part as usize].copy_from_slice(&shown.borrow());
    }
    assert!(f.read(&active, 0, active.size() as usize).unwrap() == model);
    f.deactivate(active).unwrap();
    f.tool(&["qemu-img", "check", "-q", name]);
    assert!(f.by_qemu(name) == model);
    assert!(f.contents(name, Format::Qcow2) == model);
}

#[test]
fn a_qcow2_overlay_is_written_as_qemu_would_and_is_clean_afterwards() {
    let f = Folder::new();
    let base = pattern(3_000_001, 8);
    f.put("base.img", &base);
    for (n, options) in [
        "cluster_size=65536",
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=2M",
        "compat=0.10",
        "refcount_bits=1",
    ]
    .iter()
    .enumerate()
    {
        let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options];
        f.tool(
            &[
                &create[..],
                &["-b", "base.img", "-F", "raw", "a.qcow2", "4M"],
            ]
            .concat(),
        );
        storm(&f, "a.qcow2", n as u64 + 1, CacheMode::None);
        storm(&f, "a.qcow2", n as u64 + 20, CacheMode::Writeback);
        f.tool(&[&create[..], &["b.qcow2", "4M"]].concat());
        storm(&f, "b.qcow2", n as u64 + 40, CacheMode::None);
    }
    assert!(
        std::fs::read(f.at("base.img")).unwrap() == base,
        "the base is never written"
    );
}

#[test]
fn compressed_clusters_are_overwritten() {
    let f = Folder::new();
    f.put(
        "plain.img",
        &pattern(2 << 20, 9)
            .iter()
            .map(|b| b & 3)
            .collect::<Vec<_>>(),
    );
    f.tool(&[
        "qemu-img",
        "convert",
        "-c",
        "-f",
        "raw",
        "-O",
        "qcow2",
        "plain.img",
        "a.qcow2",
    ]);
    assert!(f.contents("a.qcow2", Format::Qcow2) == std::fs::read(f.at("plain.img")).unwrap());
    storm(&f, "a.qcow2", 70, CacheMode::None);
}

#[test]
fn a_disk_that_writes_through_has_everything_durable_at_once() {
    let f = Folder::new();
    f.tool(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "4M"]);
    let mut spec = f.spec("a.qcow2", Format::Qcow2);
    spec.cache = CacheMode::Writethrough;
    let disk = f.open(&spec).unwrap();
    let active = f.activate(&disk).unwrap();
    f.write(&active, 1 << 20, &[6; 4096]).unwrap();
    // The mapping is in the file, though nobody has flushed.
    f.tool(&[
        "qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", "a.qcow2", "out.raw",
    ]);
    let seen = std::fs::read(f.at("out.raw")).unwrap();
    f.deactivate(active).unwrap();
    assert!(seen[1 << 20..][..4096] == [6; 4096]);
    storm(&f, "a.qcow2", 80, CacheMode::Writethrough);
}

#[test]
fn space_reserved_while_in_use_is_given_back() {
    let f = Folder::new();
    f.tool(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1G"]);
    let disk = f.open_qcow2("a.qcow2").unwrap();
    for n in 0..10 {
        let active = f.activate(&disk).unwrap();
        f.write(&active, n << 24, &[1; 512]).unwrap();
        f.deactivate(active).unwrap();
        f.tool(&["qemu-img", "check", "-q", "a.qcow2"]);
    }
    let len = std::fs::metadata(f.at("a.qcow2")).unwrap().len();
    assert!(len < 2 << 20, "{len} bytes for ten clusters");
}
