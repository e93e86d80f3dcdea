//! Encrypted images: what is theirs in the file, and what their zeros are.

use super::history::{History, Version, run_bytes};
use super::*;
use crate::block::qcow2::check::check;
use crate::block::qcow2::header::Encryption;

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

const SIZE: u64 = 2 << 20;

fn image(images: &Images, options: &str) -> Arc<Storage> {
    images.create_encrypted("a", options, None, SIZE);
    sim(images.bytes("a"), Sim::default())
}

#[test]
fn the_rest_of_a_new_cluster_reads_as_zeros_and_not_as_deciphered_zeros() {
    let images = Images::new();
    for zeros in [true, false] {
        images.create_encrypted("a", "cluster_size=64k", None, SIZE);
        let storage = sim(
            images.bytes("a"),
            Sim {
                promises_zeros: zeros,
                ..Sim::default()
            },
        );
        let io = reactor();
        io.block_on(async {
            let opened = open_encrypted(&io, &storage, &images, WRITE).await;
            let (image, _) = opened.expect("open");
            let mut buf = io.buf(512);
            buf.fill(7);
            image
                .write(&io, &(), 70_656, buf.sg())
                .await
                .expect("write");
            let all = read_all(&io, &image, &()).await.expect("read");
            let mut want = vec![0; SIZE as usize];
            want[70_656..71_168].fill(7);
            assert!(all == want);
            // Reserved as zeros, and written to in part.
            image
                .write_zeroes(&io, &(), 0, 128 << 10, false)
                .await
                .expect("zeroes");
            image.write(&io, &(), 512, buf.sg()).await.expect("write");
            let all = read_all(&io, &image, &()).await.expect("read");
            let mut want = vec![0; SIZE as usize];
            want[512..1024].fill(7);
            assert!(all == want);
            image.close(&io, &()).await.expect("close");
        });
        let plain = [7; 512];
        let bytes = the_sim(&storage).image();
        assert!(
            !bytes.windows(512).any(|part| part == plain),
            "nothing is plain in the file"
        );
    }
}

#[test]
fn nothing_is_allocated_or_mapped_in_the_encryption_header() {
    let images = Images::new();
    let storage = image(&images, "cluster_size=64k");
    let io = reactor();
    io.block_on(async {
        let header = Header::read(&io, &storage).await.expect("header");
        let place = header
            .luks(storage.len())
            .expect("place")
            .expect("encrypted");
        let before = images.bytes("a")[place.offset as usize..][..place.len as usize].to_vec();
        let opened = open_encrypted(&io, &storage, &images, WRITE).await;
        let (image, _) = opened.expect("open");
        let data = noise(3, SIZE as usize);
        let mut buf = io.buf(data.len());
        buf.copy_from_slice(&data);
        image.write(&io, &(), 0, buf.sg()).await.expect("write");
        image.close(&io, &()).await.expect("close");
        let report = check(&io, &storage).await.expect("check");
        assert!(report.errors == 0 && report.leaks == 0, "{report:?}");
        let bytes = the_sim(&storage).image();
        assert!(bytes[place.offset as usize..][..place.len as usize] == before[..]);

        // An entry that leads there is not written through.
        let l1 = u64::from_be_bytes(bytes[40..48].try_into().expect("offset"));
        let at = |at: u64| {
            let bytes = &bytes[at as usize..at as usize + 8];
            u64::from_be_bytes(bytes.try_into().expect("entry"))
        };
        let l2 = at(l1) & 0x00ff_ffff_ffff_fe00;
        let mut bad = bytes.clone();
        let entry = (place.offset | 1 << 63).to_be_bytes();
        bad[l2 as usize..l2 as usize + 8].copy_from_slice(&entry);
        let storage = sim(bad, Sim::default());
        let opened = open_encrypted(&io, &storage, &images, WRITE).await;
        let (image, _) = opened.expect("open");
        let part = buf.sg().slice(0, 4096);
        let error = image.write(&io, &(), 0, part).await.expect_err("metadata");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        let _ = image.close(&io, &()).await;
    });
}

#[test]
fn a_pointer_that_leads_nowhere_and_a_missing_key_are_errors() {
    let images = Images::new();
    let storage = image(&images, "cluster_size=64k");
    let io = reactor();
    io.block_on(async {
        let error = open(&io, &storage, READ).await.expect_err("no key");
        assert_eq!(error.kind(), ErrorKind::NotAllowed, "{error}");
    });
    let good = images.bytes("a");
    assert_eq!(good[112..116], 0x0537_be77u32.to_be_bytes());
    for (offset, len) in [
        (0, 592),
        (0x40200, 592),
        (0x40000, u64::MAX),
        (!0xffff, 0x10000),
        (1 << 40, 592),
    ] {
        let mut bad = good.clone();
        bad[120..128].copy_from_slice(&u64::to_be_bytes(offset));
        bad[128..136].copy_from_slice(&u64::to_be_bytes(len));
        let storage = sim(bad, Sim::default());
        io.block_on(async {
            let header = Header::read(&io, &storage).await.expect("header");
            assert!(matches!(header.encryption, Encryption::Luks(_)));
            let error = header.luks(storage.len()).expect_err("nowhere");
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "{error}");
        });
    }
    // In the place of other metadata.
    let mut bad = good.clone();
    bad[120..128].copy_from_slice(&0x10000u64.to_be_bytes());
    let storage = sim(bad, Sim::default());
    io.block_on(async {
        assert!(open_encrypted(&io, &storage, &images, WRITE).await.is_err());
    });
}

/// Zeros in the file are not the guest's, and what was not written to a new cluster is not zeros: a mapping
/// that is durable before its cluster is whole would show noise.
#[test]
fn power_loss_with_an_encrypted_image() {
    for (seed, base) in [(1, None), (2, Some("base"))] {
        let images = Images::new();
        let below = base.map_or(vec![], |_| noise(seed, 300_003));
        write_file(&images.path("base"), &below);
        images.create_encrypted("a", "cluster_size=4k", base, SIZE);
        let config = Sim {
            seed,
            delay: 4,
            pieces: true,
            discard_garbage: true,
            ..Sim::default()
        };
        let storage = sim(images.bytes("a"), config);
        let options = Options {
            has_backing: base.is_some(),
            ..WRITE
        };
        let mut shown = below.clone();
        shown.resize(SIZE as usize, 0);
        let history = History::new(shown);
        let io = reactor();
        let mut state = seed;
        let judge = async |bytes: Vec<u8>, key: &Arc<Unlocked>, what: &str| {
            let after = sim(bytes, Sim::default());
            let header = Header::read(&io, &after).await.expect("header");
            let plain = CryptStorage::new(after.clone(), key.clone(), 0);
            let data = Some(Arc::new(Storage::Crypt(Box::new(plain))));
            let read_only = Options {
                read_only: true,
                ..options
            };
            let image = Qcow2::open_with_data(&io, after.clone(), data, header, read_only).await;
            let disk = read_all(&io, &image.expect("open"), &below).await;
            history.check_crash(&disk.expect("read"), what);
            let report = check(&io, &after).await.expect("check");
            assert_eq!(report.errors, 0, "{what}: {report:?}");
        };
        io.block_on(async {
            let opened = open_encrypted(&io, &storage, &images, options).await;
            let (image, key) = opened.expect("open");
            for step in 0..60 {
                let first = random(&mut state) % (SIZE / 512);
                let count = 1 + random(&mut state) % (SIZE / 512 - first).min(40);
                let _pin = io.pin();
                if random(&mut state) % 4 == 0 {
                    history.begin(first, count, Version::Zeros);
                    let unmap = random(&mut state) % 2 == 0;
                    let zeroed = image.write_zeroes(&io, &below, first * 512, count * 512, unmap);
                    zeroed.await.expect("zeroes");
                } else {
                    history.begin(first, count, Version::Written(step));
                    let data = run_bytes(first, count, step);
                    let mut buf = io.buf(data.len());
                    buf.copy_from_slice(&data);
                    let written = image.write(&io, &below, first * 512, buf.sg());
                    written.await.expect("write");
                }
                history.complete(first, count);
                let point = history.flush_begins();
                if random(&mut state) % 3 == 0 {
                    image.flush(&io, &below).await.expect("flush");
                    history.flush_completed(point);
                }
                let bytes = the_sim(&storage).crash(random(&mut state));
                judge(bytes, &key, &format!("seed {seed}, step {step}")).await;
            }
            let point = history.flush_begins();
            image.close(&io, &below).await.expect("close");
            history.flush_completed(point);
            let bytes = the_sim(&storage).crash_with(|_, _| 0);
            write_file(&images.path("a"), &bytes);
            images.check_encrypted("a");
            judge(bytes, &key, "closed").await;
        });
        io.close();
    }
}
