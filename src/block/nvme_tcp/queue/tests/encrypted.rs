//! LUKS in a namespace, as QEMU makes it.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::rig::{Rig, Setup};
use crate::block::crypt::key::{KeySource, KeySpec};
use crate::block::crypt::luks::Place;
use crate::block::crypt::{CryptStorage, Keys, Unlocked};
use crate::block::tests::{dir, pattern};
use crate::block::{ErrorKind, Storage};

const LEN: usize = 1 << 20;
const IMAGE: &str = "driver=luks,key-secret=s,file.driver=file,file.filename=a.luks";

/// Runs qemu-img in a directory with the passphrase.
fn qemu_img(dir: &Path, command: &str, line: &[&str]) {
    let mut qemu_img = Command::new("qemu-img");
    qemu_img
        .args([command, "-q", "--object", "secret,id=s,file=key"])
        .args(line)
        .current_dir(dir);
    let output = qemu_img.output().expect("qemu-img");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line:?}: {text}");
}

#[test]
fn a_luks_image_in_a_namespace_is_read_and_written_as_qemu_does() {
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("key"), "correct horse").unwrap();
    let data = pattern(LEN, 1);
    std::fs::write(at("fill.raw"), &data).unwrap();
    let options = "key-secret=s,iter-time=10";
    let line = ["-f", "luks", "-o", options, "a.luks", "1M"];
    qemu_img(dir.path(), "create", &line);
    let line = ["-f", "raw", "-n", "fill.raw", "--target-image-opts", IMAGE];
    qemu_img(dir.path(), "convert", &line);

    let file = std::fs::read(at("a.luks")).unwrap();
    let keys = Keys::load(&[KeySpec {
        image: None,
        source: KeySource::File(at("key")),
    }])
    .unwrap();
    // The key is derived once, which takes its time.
    let mut key = None;
    for block in [512, 4096] {
        key = Some(there_and_back(block, dir.path(), &file, &data, &keys, key));
    }
}

fn there_and_back(
    block: usize,
    dir: &Path,
    file: &[u8],
    data: &[u8],
    keys: &Keys,
    known: Option<Arc<Unlocked>>,
) -> Arc<Unlocked> {
    let mut model = data.to_vec();
    let setup = Setup {
        bytes: file.len().next_multiple_of(4096),
        ..Setup::default()
    };
    let mut rig = Rig::new(setup.block(block));
    rig.peer()
        .with_disk(|disk| disk[..file.len()].copy_from_slice(file));
    let below = Arc::new(rig.storage.take().unwrap());
    let place = Place {
        offset: 0,
        len: below.len(),
    };
    let key = Unlocked::open(&rig.io, &below, place, keys, known);
    let key = rig.io.block_on(key).unwrap();
    let payload = key.payload();
    let plain = CryptStorage::new(below.clone(), key.clone(), payload);
    let plain = Storage::Crypt(Box::new(plain));
    assert!(plain.len() >= LEN as u64);

    let read = |offset: u64, len: usize| {
        let mut buf = rig.io.buf(len);
        buf.fill(0xee);
        let read = plain.read(&rig.io, offset, buf.sg());
        rig.io.block_on(read).map(|()| buf.to_vec())
    };
    assert!(read(0, LEN).unwrap() == model, "what QEMU wrote");
    for (offset, len) in [(0, 4096), (4608, 512), (70_000, 3), (8192, 600 << 10)] {
        let part = pattern(len, offset as u64 + 7);
        let mut buf = rig.io.buf(len);
        buf.copy_from_slice(&part);
        let written = plain.write(&rig.io, offset as u64, buf.sg());
        rig.io.block_on(written).unwrap();
        model[offset..offset + len].copy_from_slice(&part);
        assert!(read(offset as u64, len).unwrap() == part, "{offset}");
    }
    let zeroed = plain.write_zeroes(&rig.io, 900 << 10, 8192 + 512, true);
    rig.io.block_on(zeroed).unwrap();
    model[900 << 10..][..8704].fill(0);
    rig.io.block_on(plain.flush(&rig.io)).unwrap();
    assert!(read(0, LEN).unwrap() == model, "{block}");

    let bytes = rig.peer().with_disk(|disk| disk[..file.len()].to_vec());
    std::fs::write(dir.join("a.luks"), bytes).unwrap();
    let line = ["--image-opts", IMAGE, "-O", "raw", "out.raw"];
    qemu_img(dir, "convert", &line);
    assert!(
        std::fs::read(dir.join("out.raw")).unwrap() == model,
        "{block}: what was written"
    );

    // What was lost is no zeros here, either.
    let half = payload + LEN as u64 / 2;
    rig.namespace.set_bytes(half);
    let error = read(LEN as u64 / 2, 4096).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    assert!(read(LEN as u64 / 2 - 4096, 4096).is_ok());
    key
}
