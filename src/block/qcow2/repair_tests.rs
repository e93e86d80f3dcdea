use super::*;
use crate::block::qcow2::check::check;
use crate::block::qcow2::check::tests::zoo::{Animal, zoo};
use crate::block::sim::{Kind, Sim, SimStorage, random};
use crate::reactor::{Epochs, IoConfig};

fn reactor() -> Io {
    Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring")
}

fn storage(bytes: &[u8]) -> Storage {
    Storage::Sim(SimStorage::new(bytes.to_vec(), Sim::default()))
}

fn sim(storage: &Storage) -> &SimStorage {
    match storage {
        Storage::Sim(sim) => sim,
        _ => panic!("not simulated"),
    }
}

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Damage that can be repaired: refcounts, COPIED flags, refcount blocks.
fn damage(seed: &mut u64, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let bits = u32::from(good[23]);
    let width = Width::new(if good[7] == 2 { 4 } else { good[99].into() }).unwrap();
    let cluster = 1u64 << bits;
    let (l1, table) = (word(good, 40), word(good, 48));
    let block = word(good, table);
    for _ in 0..=random(seed) % 4 {
        match random(seed) % 8 {
            0..4 => {
                let covered = (good.len() as u64 / cluster).min(1 << width.entries_bits(bits));
                let index = (random(seed) % covered) as usize;
                let end = (block + cluster) as usize;
                let count = &mut bytes[block as usize..end];
                width.set(count, index, (random(seed) % 4).min(width.max()));
            }
            4 => {
                let raw = word(&bytes, l1);
                put(&mut bytes, l1, raw ^ COPIED);
            }
            5 | 6 => {
                let l2 = word(good, l1) & OFFSET;
                let at = l2 + random(seed) % 16 * 8;
                let raw = word(&bytes, at);
                if raw & OFFSET != 0 && raw & COMPRESSED == 0 {
                    put(&mut bytes, at, raw ^ COPIED);
                }
            }
            _ => {
                let new = [0, block + 512, 1 << 40, l1][random(seed) as usize % 4];
                put(&mut bytes, table, new);
            }
        }
    }
    if good[7] == 3 {
        bytes[79] |= random(seed) as u8 & 3;
    }
    bytes
}

/// What a guest and every snapshot see, by QEMU.
fn contents(animal: &Animal) -> Vec<String> {
    let path = animal.path.to_str().unwrap();
    let checksum = |options: &str| {
        let out = std::process::Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args(options.split_whitespace())
            .args([path, &format!("{path}.raw")])
            .output()
            .unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let raw = std::fs::read(format!("{path}.raw")).unwrap();
        raw.iter()
            .fold(7u64, |n, b| n.wrapping_mul(31) ^ u64::from(*b))
            .to_string()
    };
    let mut all = vec![checksum("")];
    if animal.name.contains("snapshots") {
        all.extend([checksum("-l first"), checksum("-l second")]);
    }
    all
}

fn kinds(dir: &std::path::Path) -> Vec<Animal> {
    let without = ["luks", "data file", "raw data file"];
    let mut animals = zoo(dir);
    animals.retain(|animal| !without.contains(&animal.name));
    animals
}

#[test]
fn what_is_repaired_is_clean_to_qemu_and_holds_what_it_held() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 3;
    let (mut errors, mut leaks, mut left) = (0, 0, 0);
    for animal in kinds(dir.path()) {
        let good = std::fs::read(&animal.path).unwrap();
        let held = contents(&animal);
        for round in 0..12 {
            let bytes = damage(&mut seed, &good);
            let storage = storage(&bytes);
            let done = io.block_on(repair(&io, &storage, Repair::All, &mut |_| {}));
            let done = done.unwrap_or_else(|error| panic!("{} {round}: {error}", animal.name));
            let image = sim(&storage).image();
            std::fs::write(&animal.path, &image).unwrap();
            let said = animal.check().expect("checked");
            let name = animal.name;
            assert_eq!(
                (said.errors, said.leaks),
                (done.after.errors, done.after.leaks),
                "{name}"
            );
            // A COPIED flag that was set on the pointer to nothing is beyond repair; nothing else here is.
            let after = &done.after;
            assert!(
                after.is_clean() || after.lasting > 0,
                "{name} {round}: {after:#?}"
            );
            errors += done.errors_fixed();
            leaks += done.leaks_fixed();
            left += after.errors;
            if after.is_clean() {
                assert_eq!(image[79] & 3, 0, "{name}: still marked");
                assert_eq!(contents(&animal), held, "{name} {round}");
            }
        }
    }
    println!("{errors} errors, {leaks} leaks repaired, {left} left");
    assert!(
        errors > 300 && leaks > 60 && left * 10 < errors,
        "{errors}, {leaks}, {left}"
    );
    io.close();
}

/// Ways in which an image can lose data when it is written to: refcounts too low, shared clusters that
/// say they are not. An unset flag and a leak are harmless.
fn dangers(io: &Io, bytes: &[u8]) -> u64 {
    let report = io.block_on(check(io, &storage(bytes))).unwrap();
    let harmless = report
        .findings
        .iter()
        .filter(|f| f.what.contains("lacks the COPIED"))
        .count();
    report.errors - harmless as u64
}

#[test]
fn a_loss_of_power_at_any_moment_of_a_repair_makes_nothing_worse() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 11;
    let mut crashes = 0;
    for animal in kinds(dir.path()) {
        let good = std::fs::read(&animal.path).unwrap();
        if good.len() > 3 << 20 {
            continue;
        }
        for _ in 0..3 {
            let bytes = damage(&mut seed, &good);
            let before = dangers(&io, &bytes);
            for cut in 0.. {
                let storage = storage(&bytes);
                sim(&storage).cut_power_after(cut);
                let done = io.block_on(repair(&io, &storage, Repair::All, &mut |_| {}));
                let crashed = sim(&storage).crash(random(&mut seed));
                let after = dangers(&io, &crashed);
                assert!(
                    after <= before,
                    "{}: {after} instead of {before} at {cut}",
                    animal.name
                );
                // And another attempt comes to the end.
                let again = self::storage(&crashed);
                let end = io
                    .block_on(repair(&io, &again, Repair::All, &mut |_| {}))
                    .unwrap();
                assert!(
                    end.after.is_clean() || end.after.lasting > 0,
                    "{:?}",
                    end.after
                );
                crashes += 1;
                if done.is_ok() {
                    break;
                }
            }
        }
    }
    println!("{crashes} losses of power");
    assert!(crashes > 200, "{crashes}");
    io.close();
}

#[test]
fn an_error_of_the_storage_at_any_moment_of_a_repair_is_told_and_the_next_one_works() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 23;
    let mut failures = 0;
    for animal in kinds(dir.path()).into_iter().take(7) {
        let good = std::fs::read(&animal.path).unwrap();
        let bytes = damage(&mut seed, &good);
        let before = dangers(&io, &bytes);
        for nth in 1.. {
            let storage = storage(&bytes);
            let kind = [Kind::Write, Kind::Flush, Kind::Read][nth as usize % 3];
            sim(&storage).fail(kind, nth / 3 + 1, libc::EIO, false);
            let failed = io
                .block_on(repair(&io, &storage, Repair::All, &mut |_| {}))
                .is_err();
            failures += u64::from(failed);
            assert!(dangers(&io, &sim(&storage).image()) <= before);
            sim(&storage).heal();
            let end = io
                .block_on(repair(&io, &storage, Repair::All, &mut |_| {}))
                .unwrap();
            assert!(end.after.is_clean() || end.after.lasting > 0);
            if !failed && nth > 30 {
                break;
            }
        }
    }
    assert!(failures > 50, "{failures}");
    io.close();
}

#[test]
fn leaks_are_given_back_and_errors_left_alone() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let animal = &zoo(dir.path())[0];
    let good = std::fs::read(&animal.path).unwrap();
    let mut bytes = good.clone();
    let block = word(&good, word(&good, 48)) as usize;
    // One reference too few, one too many, and a free cluster that is not.
    let low = good.len() as u64 >> 16;
    bytes[block + 2 * 4 + 1] += 1;
    bytes[block + 2 * (low as usize + 3) + 1] = 1;
    bytes.resize(good.len() + (4 << 16), 0);
    let storage = storage(&bytes);
    let done = io
        .block_on(repair(&io, &storage, Repair::Leaks, &mut |_| {}))
        .unwrap();
    assert_eq!(
        (done.before.leaks, done.after.leaks, done.leaks_fixed()),
        (2, 0, 2)
    );
    assert_eq!(
        sim(&storage).image()[..good.len()].to_vec()[block..block + 64],
        good[block..block + 64]
    );
    io.close();
}

#[test]
fn nothing_is_freed_while_a_pointer_leads_nowhere() {
    let io = reactor();
    let dir = tempfile::tempdir().unwrap();
    let animal = &zoo(dir.path())[0];
    let good = std::fs::read(&animal.path).unwrap();
    let l2 = word(&good, word(&good, 40)) & OFFSET;
    let lost = word(&good, l2) & OFFSET;
    for wild in [
        1 << 45 | COPIED,
        (lost + 512) | COPIED,
        word(&good, 40) | COPIED,
    ] {
        let mut bytes = good.clone();
        put(&mut bytes, l2, wild);
        bytes[79] |= 2;
        let storage = storage(&bytes);
        let done = io
            .block_on(repair(&io, &storage, Repair::All, &mut |_| {}))
            .unwrap();
        assert!(done.after.lasting > 0, "{:?}", done.after);
        let image = sim(&storage).image();
        assert_eq!(word(&image, l2), wild, "the pointer");
        assert_eq!(image[79] & 2, 2, "the corrupt bit");
        let block = word(&image, word(&image, 48));
        let at = (block + (lost >> 16) * 2) as usize;
        assert_eq!(image[at..at + 2], [0, 1], "what it may have meant");
        let error = io
            .block_on(repair(&io, &storage, Repair::Leaks, &mut |_| {}))
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    io.close();
}
