//! LUKS files as disks.

use super::*;
use crate::block::CacheMode;
use crate::block::error::ErrorKind;
use crate::block::sim::random;
use crate::block::tests::pattern;

/// Read by us what QEMU wrote, and the other way round.
fn both_ways(f: &Folder, name: &str, what: &str, seed: u64) {
    let size = 256 << 10;
    let data = pattern(size, seed);
    f.fill(&luks(name), &data);
    let disk = f.open(f.spec(name, Format::Luks)).unwrap();
    assert_eq!(disk.size(), size as u64, "{what}");
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, size) == data, "{what}: what QEMU wrote");
    let mut data = data;
    for (offset, len) in [(0, 512), (9 * 512, 33 * 512), (size - 512, 512)] {
        let part = pattern(len, seed + offset as u64 + 1);
        f.write(&active, offset as u64, &part);
        data[offset..offset + len].copy_from_slice(&part);
    }
    f.deactivate(active);
    assert!(f.by_qemu(&luks(name)) == data, "{what}: what we wrote");
}

#[test]
fn every_cipher_mode_and_iv_of_qemu_img_is_read_and_written_as_qemu_does() {
    let f = Folder::new();
    let mut all = vec![("cast5", "cbc-plain", 16), ("cast5", "cbc-plain64", 16)];
    for cipher in ["aes", "serpent", "twofish"] {
        for mode in ["xts-plain", "xts-plain64", "xts-essiv:sha256"] {
            all.extend([32, 48, 64].map(|len| (cipher, mode, len)));
        }
        for mode in ["cbc-plain", "cbc-plain64", "cbc-essiv:sha256"] {
            // QEMU fails an assertion of its own over the key material of 192 bits.
            all.extend([16, 32].map(|len| (cipher, mode, len)));
        }
    }
    for (seed, (cipher, mode, len)) in (1..).zip(all) {
        let file = format::luks_file(cipher, mode, "sha256", len, 256 << 10);
        f.put("a.luks", &file);
        both_ways(&f, "a.luks", &format!("{cipher} {mode} {len}"), seed);
    }
}

#[test]
fn every_hash_derives_the_key_that_qemu_derives() {
    let f = Folder::new();
    for hash in ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"] {
        let file = format::luks_file("aes", "xts-plain64", hash, 64, 256 << 10);
        f.put("a.luks", &file);
        both_ways(&f, "a.luks", hash, 5);
    }
}

#[test]
fn what_qemu_img_makes_is_opened() {
    let f = Folder::new();
    for (seed, options) in (1..).zip([
        "",
        ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1",
        ",cipher-alg=serpent-192,ivgen-alg=plain,hash-alg=ripemd160",
        ",cipher-alg=twofish-256,cipher-mode=cbc,hash-alg=sha512",
    ]) {
        f.create_by_qemu("a.luks", options, "256K");
        both_ways(&f, "a.luks", options, seed);
    }
}

#[test]
fn ciphers_and_hashes_that_are_not_there_are_refused_by_name() {
    let f = Folder::new();
    for (at, name, told) in [
        (40, "ecb\0", "the cipher mode \"ecb\""),
        (40, "ctr-plain64\0", "the cipher mode \"ctr\""),
        (72, "md5\0", "the hash \"md5\""),
        (72, "sm3\0", "the hash \"sm3\""),
    ] {
        let mut file = format::luks_file("aes", "xts-plain64", "sha256", 64, 65_536);
        file[at..at + name.len()].copy_from_slice(name.as_bytes());
        f.put("a.luks", &file);
        let error = f.open(f.spec("a.luks", Format::Luks)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(told), "{error}");
    }
}

/// Requests of chance against a model.
fn storm(f: &Folder, cache: CacheMode, seed: u64) {
    let size: usize = 3 << 20;
    f.create("a.luks", size);
    let mut model = pattern(size, seed);
    f.fill(&luks("a.luks"), &model);
    let mut spec = f.spec("a.luks", Format::Luks);
    spec.cache = cache;
    let disk = f.open(spec).unwrap();
    let active = f.activate(&disk).unwrap();
    let mut rng = seed + 1;
    for n in 0..300 {
        let mut pick = |n: usize| (random(&mut rng) % n as u64) as usize;
        let offset = pick(size / 512) * 512;
        // Now and then longer than what is encrypted at once.
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
    assert!(f.by_qemu(&luks("a.luks")) == model);
}

#[test]
fn requests_of_chance_leave_what_the_model_says_and_qemu_reads_it() {
    let f = Folder::new();
    storm(&f, CacheMode::None, 1);
    storm(&f, CacheMode::Writeback, 2);
}

#[test]
fn a_wrong_key_and_a_missing_one_are_told_with_what_to_do() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let mut spec = f.spec("a.luks", Format::Luks);
    f.put("wrong", b"correct horse\n");
    spec.keys[0].source = KeySource::File(f.at("wrong"));
    let error = f.open(spec.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    let text = error.to_string();
    assert!(text.contains("a.luks: the key from "), "{text}");
    assert!(
        text.contains("wrong opens none of its 1 key slots"),
        "{text}"
    );
    assert!(text.contains("newline"), "{text}");
    assert!(!text.contains("horse"), "{text}");

    spec.keys.clear();
    let error = f.open(spec.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    let text = error.to_string();
    assert!(
        text.contains("no key was given") && text.contains("key-file"),
        "{text}"
    );

    for (name, data) in [("empty", vec![]), ("huge", vec![b'x'; 70_000])] {
        f.put(name, &data);
        spec.keys = vec![KeySpec {
            image: None,
            source: KeySource::File(f.at(name)),
        }];
        let error = f.open(spec.clone()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    spec.keys[0].source = KeySource::File(f.at("missing"));
    let error = f.open(spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn a_second_key_slot_opens_it_too() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let data = pattern(64 << 10, 3);
    f.fill(&luks("a.luks"), &data);
    f.put("second", b"another one\0with any bytes"[..11].as_ref());
    f.tool(
        "qemu-img",
        &[
            "amend",
            "--object",
            "secret,id=n,file=second",
            "-o",
            "state=active,new-secret=n,iter-time=10",
            "--image-opts",
            &luks("a.luks"),
        ],
    );
    let mut spec = f.spec("a.luks", Format::Luks);
    spec.keys[0].source = KeySource::File(f.at("second"));
    let disk = f.open(spec).unwrap();
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, data.len()) == data);
    f.deactivate(active);
}

#[test]
fn an_image_has_a_key_of_its_own() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    f.put("wrong", b"wrong");
    std::os::unix::fs::symlink(f.at("a.luks"), f.at("link.luks")).unwrap();
    let mut spec = f.spec("a.luks", Format::Luks);
    spec.keys[0].source = KeySource::File(f.at("wrong"));
    spec.keys.push(KeySpec {
        // By any name that leads to it.
        image: Some(f.at("link.luks")),
        source: KeySource::File(f.at("key")),
    });
    f.open(spec.clone()).unwrap();
    spec.keys[1].image = Some(f.at("key"));
    assert!(
        f.open(spec).is_err(),
        "the key of another image is not tried"
    );
}

#[test]
fn a_key_comes_from_a_pipe_and_is_kept_for_a_header_that_changes() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, SECRET.as_bytes()).unwrap();
    drop(writer);
    let mut spec = f.spec("a.luks", Format::Luks);
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(reader));
    spec.keys[0].source = KeySource::Fd(Arc::new(file));
    let disk = f.open(spec).unwrap();
    f.deactivate(f.activate(&disk).unwrap());
    // The same file, formatted again: another master key.
    let data = pattern(64 << 10, 8);
    let file = format::luks_file("aes", "cbc-plain64", "sha1", 32, 64 << 10);
    f.put("b.luks", &file);
    f.fill(&luks("b.luks"), &data);
    f.put("a.luks", &std::fs::read(f.at("b.luks")).unwrap());
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, data.len()) == data);
    f.deactivate(active);
    // And with another passphrase: what was derived from it does not open the master key.
    let mut file = std::fs::read(f.at("b.luks")).unwrap();
    file[208 + 2 * 48 + 8] ^= 1;
    f.put("a.luks", &file);
    let error = f.activate(&disk).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAllowed, "{error}");
}

#[test]
fn a_key_comes_from_the_keyring_by_name_and_by_number() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let name = format!("virtioblkd-test-{}", std::process::id());
    let description = std::ffi::CString::new(name.as_str()).unwrap();
    // SAFETY: the strings end in NUL, and the payload is as long as is said.
    let serial = unsafe {
        libc::syscall(
            libc::SYS_add_key,
            c"user".as_ptr(),
            description.as_ptr(),
            SECRET.as_ptr(),
            SECRET.len(),
            libc::c_long::from(libc::KEY_SPEC_THREAD_KEYRING),
        )
    };
    if serial < 0 {
        let error = std::io::Error::last_os_error();
        eprintln!("not tested: the keyring is not allowed here: {error}");
        return;
    }
    for name in [name, serial.to_string()] {
        let mut spec = f.spec("a.luks", Format::Luks);
        spec.keys[0].source = KeySource::Keyring(name);
        f.open(spec).unwrap();
    }
    let mut spec = f.spec("a.luks", Format::Luks);
    spec.keys[0].source = KeySource::Keyring("virtioblkd-no-such-key".into());
    let error = f.open(spec).unwrap_err().to_string();
    assert!(error.contains("virtioblkd-no-such-key"), "{error}");
}

#[test]
fn a_luks_file_is_locked_as_qemu_locks_it() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let disk = f.open(f.spec("a.luks", Format::Luks)).unwrap();
    let active = f.activate(&disk).unwrap();
    let image = luks("a.luks");
    let error = f.run("qemu-io", &["--image-opts", &image, "-c", "read 0 512"]);
    assert!(error.unwrap_err().contains("lock"));
    f.deactivate(active);
    f.tool("qemu-io", &["--image-opts", &image, "-c", "read 0 512"]);
}

#[test]
fn what_the_guest_is_told_of_a_luks_file() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let disk = f.open(f.spec("a.luks", Format::Luks)).unwrap();
    let limits = disk.limits();
    assert!(!limits.can_discard && !limits.write_zeroes_may_unmap);
    assert_eq!(limits.logical_block, 512);
    assert!(disk.describe().starts_with("luks /"), "{}", disk.describe());
}
