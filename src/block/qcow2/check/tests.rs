use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::block::sim::{Sim, SimStorage, random};
use crate::reactor::{Epochs, IoConfig};

mod agreement;
mod bounds;
pub(in crate::block::qcow2) mod zoo;

fn reactor() -> Io {
    Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring")
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// Images with data, zeros, holes, compressed clusters and clusters given back.
fn images(dir: &Path) -> Vec<PathBuf> {
    let mut images = Vec::new();
    for (number, options) in [
        "cluster_size=64k",
        "cluster_size=64k,compat=0.10",
        "cluster_size=512,refcount_bits=1",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4096,refcount_bits=4",
        "cluster_size=4096,refcount_bits=16,preallocation=metadata",
        "cluster_size=2M,refcount_bits=32",
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.join(format!("{number}.qcow2"));
        let name = path.to_str().unwrap();
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, name, "8M"],
        );
        let mut commands = vec!["write 0 1M", "write -P 5 3M 123k", "discard 256k 128k"];
        if !options.contains("0.10") {
            commands.extend(["write -z 512k 128k", "write -z -u 700k 64k"]);
        }
        // Compressed clusters share host clusters, which needs refcounts above 1, and replace nothing.
        if !options.contains("refcount_bits=1,")
            && !options.ends_with("refcount_bits=1")
            && !options.contains("prealloc")
        {
            commands.extend(["write -c -P 7 4M 2M", "write -c -P 8 6M 2M"]);
        }
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(name);
        run("qemu-io", &args);
        images.push(path);
    }
    images
}

fn ours(io: &Io, bytes: &[u8]) -> Result<Report> {
    let storage = Storage::Sim(SimStorage::new(bytes.to_vec(), Sim::default()));
    io.block_on(check(io, &storage))
}

/// Errors and leaks by `qemu-img check`; `None` if it could not check.
fn theirs(path: &Path) -> Option<(u64, u64)> {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json"])
        .arg(path)
        .output()
        .expect("qemu-img");
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let count = |key: &str| json[key].as_u64().unwrap_or(0);
    (count("check-errors") == 0).then(|| (count("corruptions"), count("leaks")))
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn images_of_qemu_are_clean_to_both() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    for path in images(dir.path()) {
        let report = ours(&io, &std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(theirs(&path), Some((0, 0)), "{path:?}");
        assert!(report.is_clean(), "{path:?}: {:?}", report.findings);
        assert!(report.allocated > 0);
    }
    io.close();
}

#[test]
fn damaged_refcounts_are_counted_as_qemu_counts_them() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let (mut errors, mut leaks) = (0, 0);
    for path in images(dir.path()) {
        let good = std::fs::read(&path).unwrap();
        let bits = u32::from(good[23]);
        let order = if good[7] == 2 { 4 } else { u32::from(good[99]) };
        let width = Width::new(order).unwrap();
        let clusters = (good.len() as u64).div_ceil(1 << bits);
        let mut seed = 3;
        for round in 0..12 {
            let mut bytes = good.clone();
            for _ in 0..=round % 3 {
                let cluster = random(&mut seed) % clusters;
                let per_block = width.entries_bits(bits);
                let entry = word(&good, 48) + (cluster >> per_block) * 8;
                let block = word(&good, entry) as usize;
                let index = (cluster & ((1 << per_block) - 1)) as usize;
                if block > 0 {
                    let value = random(&mut seed) % 4;
                    let end = good.len().min(block + (1 << bits));
                    width.set(&mut bytes[block..end], index, value.min(width.max()));
                }
            }
            std::fs::write(&path, &bytes).unwrap();
            let report = ours(&io, &bytes).unwrap();
            let counted = Some((report.errors, report.leaks));
            assert_eq!(counted, theirs(&path), "{path:?}: {:?}", report.findings);
            errors += report.errors;
            leaks += report.leaks;
        }
    }
    assert!(errors > 20 && leaks > 5, "{errors} errors, {leaks} leaks");
    io.close();
}

#[test]
fn damaged_entries_are_errors_to_both() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    for path in images(dir.path()) {
        let good = std::fs::read(&path).unwrap();
        let (l1, table) = (word(&good, 40), word(&good, 48));
        let l2 = word(&good, l1) & 0x00ff_ffff_ffff_fe00;
        let cluster = 1u64 << good[23];
        let first = word(&good, l2);
        let offset = first & 0x00ff_ffff_ffff_fe00;
        let far = (good.len() as u64).next_multiple_of(cluster) + 8 * cluster;
        for (what, at, value) in [
            ("COPIED missing in L1", l1, word(&good, l1) & !(1 << 63)),
            ("COPIED missing in L2", l2, first & !(1 << 63)),
            ("data over the L1 table", l2, l1 | 1 << 63),
            ("data over the L2 table", l2, l2 | 1 << 63),
            ("data twice", l2 + 8, offset | 1 << 63),
            ("data beyond the end", l2, far | 1 << 63),
            ("a table beyond the end", l1, far | 1 << 63),
            ("an L2 table over the header", l1, 512 | 1 << 63),
            ("a reserved bit", l2, first | 1 << 57),
            ("a block beyond the end", table, far),
            ("a block askew", table, word(&good, table) + 256),
            ("no block", table, 0),
        ] {
            let mut bytes = good.clone();
            bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
            std::fs::write(&path, &bytes).unwrap();
            let report = ours(&io, &bytes).unwrap();
            assert!(report.errors > 0, "{path:?}: {what}");
            let theirs = theirs(&path);
            assert!(
                theirs.is_none_or(|t| t.0 > 0),
                "{path:?}: {what}: {theirs:?}"
            );
        }
    }
    io.close();
}

#[test]
fn no_bytes_make_the_check_panic() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 17;
    for path in images(dir.path()) {
        let good = std::fs::read(&path).unwrap();
        if good[23] > 16 {
            continue;
        }
        let tables = [
            0,
            word(&good, 40),
            word(&good, 48),
            word(&good, word(&good, 48)),
        ];
        for _ in 0..40 {
            let mut bytes = good.clone();
            for _ in 0..20 {
                let base = tables[random(&mut seed) as usize % 4] + random(&mut seed) % 128;
                let to = base as usize % good.len();
                bytes[to] = random(&mut seed) as u8;
            }
            let _ = ours(&io, &bytes);
        }
    }
    io.close();
}
