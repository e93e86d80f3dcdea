//! Encrypted qcow2 images as disks, by themselves and in chains.

use super::*;
use crate::block::error::ErrorKind;
use crate::block::sim::random;
use crate::block::tests::pattern;

fn qcow2(name: &str) -> String {
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={name}")
}

/// An encrypted image, over another if `options` beside the encryption's say so.
fn create(f: &Folder, name: &str, more: &[&str]) {
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let line = ["create", "-q", "-f", "qcow2", "-o", options];
    f.tool("qemu-img", &[&line, more, &[name, "4M"]].concat());
}

fn check(f: &Folder, image: &str) {
    f.tool("qemu-img", &["check", "-q", "--image-opts", image]);
}

/// Requests of chance against a model, then QEMU's opinion.
fn storm(f: &Folder, disk: &Disk, model: &mut [u8], seed: u64) {
    let size = model.len();
    let active = f.activate(disk).unwrap();
    let mut rng = seed;
    for n in 0..250 {
        let mut pick = |n: usize| (random(&mut rng) % n as u64) as usize;
        let offset = pick(size / 512) * 512;
        let most = if pick(10) == 0 { 1500 } else { 40 };
        let len = ((1 + pick(most)) * 512).min(size - offset);
        let place = offset..offset + len;
        match pick(8) {
            0 => {
                let zeroed = active.write_zeroes(&f.io, offset as u64, len as u64, n % 2 == 0);
                f.io.block_on(zeroed).unwrap();
                model[place].fill(0);
            }
            1 => {
                let discarded = active.discard(&f.io, offset as u64, len as u64);
                f.io.block_on(discarded).unwrap();
                let now = f.read(&active, offset as u64, len);
                model[place].copy_from_slice(&now);
            }
            2 => f.io.block_on(active.flush(&f.io)).unwrap(),
            3 | 4 => assert!(
                f.read(&active, offset as u64, len) == model[place],
                "{offset}"
            ),
            _ => {
                let data = pattern(len, seed + n);
                f.write(&active, offset as u64, &data);
                model[place].copy_from_slice(&data);
            }
        }
    }
    assert!(f.read(&active, 0, size) == model);
    f.deactivate(active);
}

#[test]
fn an_encrypted_image_is_written_as_qemu_would_and_is_clean_afterwards() {
    let f = Folder::new();
    create(&f, "a.qcow2", &[]);
    let mut model = pattern(4 << 20, 9);
    model[1 << 20..2 << 20].fill(0);
    f.fill(&qcow2("a.qcow2"), &model);
    // QEMU writes compressed clusters as they are also into such an image.
    let image = qcow2("a.qcow2");
    let line = [
        "--image-opts",
        &image,
        "-c",
        "discard 3M 128k",
        "-c",
        "write -c -P 5 3M 64k",
    ];
    f.tool("qemu-io", &line);
    model[3 << 20..(3 << 20) + (64 << 10)].fill(5);
    model[(3 << 20) + (64 << 10)..(3 << 20) + (128 << 10)].fill(0);
    for seed in [1, 2] {
        let disk = f.open(f.spec("a.qcow2", Format::Qcow2)).unwrap();
        let active = f.activate(&disk).unwrap();
        assert!(f.read(&active, 0, model.len()) == model, "what QEMU wrote");
        f.deactivate(active);
        storm(&f, &disk, &mut model, seed);
        check(&f, &image);
        assert!(f.by_qemu(&image) == model, "what we wrote");
        // QEMU goes on with it.
        f.tool(
            "qemu-io",
            &["--image-opts", &image, "-c", "write -P 9 70k 300k"],
        );
        model[70 << 10..370 << 10].fill(9);
        assert!(f.by_qemu(&image) == model);
    }
    let report = f.io.block_on(async {
        let options = crate::block::FileOptions {
            read_only: true,
            direct: false,
        };
        let file = crate::block::FileStorage::open(f.at("a.qcow2"), options)?;
        let storage = crate::block::Storage::File(file);
        crate::block::qcow2::check::check(&f.io, &storage).await
    });
    let report = report.unwrap();
    assert!(report.errors == 0 && report.leaks == 0, "{report:?}");
}

#[test]
fn a_chain_of_encrypted_and_plain_images_with_keys_of_their_own() {
    let f = Folder::new();
    let base = pattern(3_000_320, 4);
    f.put("other", b"another key");
    // A LUKS file below, then a plain image, then an encrypted one on top.
    f.create("base.luks", base.len());
    f.fill(&luks("base.luks"), &base);
    let line = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "base.luks",
        "-F",
        "luks",
    ];
    f.tool("qemu-img", &[&line[..], &["middle.qcow2", "4M"]].concat());
    create(
        &f,
        "top.qcow2",
        &["-u", "-b", "middle.qcow2", "-F", "qcow2"],
    );
    let mut model = base.clone();
    model.resize(4 << 20, 0);

    let mut spec = f.spec("top.qcow2", Format::Qcow2);
    let disk = f.open(spec.clone()).unwrap();
    storm(&f, &disk, &mut model, 5);
    let image = "driver=qcow2,encrypt.key-secret=s,file.filename=top.qcow2,backing.driver=qcow2,\
                 backing.file.filename=middle.qcow2,backing.backing.driver=luks,\
                 backing.backing.key-secret=s,backing.backing.file.filename=base.luks";
    check(&f, image);
    assert!(f.by_qemu(image) == model);

    // The base by a key of its own, and the rest by the one for all.
    spec.keys.push(KeySpec {
        image: Some(f.at("base.luks")),
        source: KeySource::File(f.at("other")),
    });
    let error = f.open(spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    let text = error.to_string();
    assert!(
        text.contains("base.luks: the key from") && text.contains("other"),
        "{text}"
    );
}

#[test]
fn a_wrong_key_and_a_missing_one_are_told_for_qcow2_too() {
    let f = Folder::new();
    create(&f, "a.qcow2", &[]);
    let mut spec = f.spec("a.qcow2", Format::Qcow2);
    spec.keys.clear();
    let error = f.open(spec.clone()).unwrap_err().to_string();
    assert!(
        error.contains("a.qcow2: is encrypted, and no key was given"),
        "{error}"
    );
    f.put("wrong", b"wrong");
    spec.keys.push(KeySpec {
        image: None,
        source: KeySource::File(f.at("wrong")),
    });
    let error = f.open(spec).unwrap_err().to_string();
    assert!(error.contains("opens none of its 1 key slots"), "{error}");
    // The oldest method is refused by name.
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    let line = [
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        "old.qcow2",
        "1M",
    ];
    f.tool("qemu-img", &line);
    let error = f.open(f.spec("old.qcow2", Format::Qcow2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.to_string().contains("AES encryption"), "{error}");
}
