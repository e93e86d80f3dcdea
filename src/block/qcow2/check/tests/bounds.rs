//! What a hostile image can make a check spend.

use super::zoo::{run, zoo};
use super::*;

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

fn reads(io: &Io, bytes: Vec<u8>) -> (Result<Report>, u64) {
    let sim = SimStorage::new(bytes, Sim::default());
    let storage = Storage::Sim(sim);
    let result = io.block_on(check(io, &storage));
    let Storage::Sim(sim) = &storage else {
        panic!("simulated")
    };
    (result, sim.operations())
}

#[test]
fn a_table_that_is_pointed_at_often_is_read_once() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let name = path.to_str().unwrap();
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            name,
            "2M",
        ],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write 0 2M", name]);
    let mut bytes = std::fs::read(&path).unwrap();
    let (good, usual) = reads(&io, bytes.clone());
    assert!(good.unwrap().is_clean());
    let l1 = word(&bytes, 40);
    let first = word(&bytes, l1);
    for n in 1..64 {
        put(&mut bytes, l1 + n * 8, first);
    }
    let (bad, spent) = reads(&io, bytes);
    // 63 tables and their 64 clusters each are leaks; the one table has one reference and 63 more.
    let bad = bad.unwrap();
    assert_eq!(bad.leaks, 63 * 65);
    assert!(bad.errors > 64, "{bad:?}");
    assert!(spent <= usual, "{spent} reads instead of {usual}");
    io.close();
}

#[test]
fn tables_askew_do_not_multiply_what_is_read() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let name = path.to_str().unwrap();
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=2M",
            name,
            "16T",
        ],
    );
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.resize(64 << 20, 0);
    let l1 = word(&bytes, 40);
    // 32 tables of 2 MiB in the file; a pointer to each of its sectors.
    for n in 0..32 {
        put(&mut bytes, l1 + n * 8, (48 << 20) + n * 512);
    }
    let (result, _) = reads(&io, bytes.clone());
    assert!(result.unwrap().errors >= 32);
    // The same in the L1 tables of many snapshots, which overlap, too.
    let snapshots = 16 << 20;
    for n in 0..64 {
        let at = snapshots + n * 56;
        put(&mut bytes, at, 32 << 20);
        put(&mut bytes, at + 8, (200 + n) << 32);
        put(&mut bytes, at + 32, 16);
        for k in 0..200 + n {
            put(&mut bytes, (32 << 20) + k * 8, (48 << 20) + (k << 12) + 512);
        }
    }
    bytes[60..64].copy_from_slice(&64u32.to_be_bytes());
    put(&mut bytes, 64, snapshots);
    let (result, _) = reads(&io, bytes);
    let error = result.unwrap_err();
    assert!(error.to_string().contains("tables overlap"), "{error}");
    io.close();
}

#[test]
fn references_all_over_a_sparse_file_do_not_take_all_memory() {
    let mut counts = Counts::new(MEMORY);
    // A pointer every MiB of an exabyte.
    let kept = (0..u64::MAX)
        .take_while(|n| counts.add(n << 20, 1, 1).is_ok())
        .count();
    assert!(kept < 2 << 20, "{kept} pieces");
}

#[test]
fn progress_goes_up_to_the_end() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let animal = &zoo(dir.path())[12];
    let bytes = std::fs::read(&animal.path).unwrap();
    let storage = Storage::Sim(SimStorage::new(bytes, Sim::default()));
    let mut told = Vec::new();
    io.block_on(check_with(&io, &storage, &mut |part| told.push(part)))
        .unwrap();
    assert!(told.is_sorted() && told.last() == Some(&1.0), "{told:?}");
    io.close();
}
