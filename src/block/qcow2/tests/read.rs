use super::*;

fn read_image(bytes: Vec<u8>, below: &Vec<u8>, has_backing: bool) -> Result<Vec<u8>> {
    let io = reactor();
    io.block_on(async {
        let storage = sim(bytes, Sim::default());
        let options = Options {
            has_backing,
            ..READ
        };
        let image = open(&io, &storage, options).await?;
        read_all(&io, &image, below).await
    })
}

#[test]
fn images_of_qemu_img_read_as_qemu_reads_them() {
    let images = Images::new();
    for bits in [9u32, 10, 12, 16, 21] {
        for compat in ["0.10", "1.1"] {
            let size = 5_000_704;
            images.create(
                "a",
                &format!("cluster_size={},compat={compat}", 1u64 << bits),
                size,
            );
            let mut commands = vec![
                "write -P 1 0 512".to_owned(),
                "write -P 2 100k 300k".into(),
                "write -P 3 3000000 1000000".into(),
                "write -P 4 5000192 512".into(),
            ];
            if compat == "1.1" {
                commands.push("write -z 128k 64k".into());
                commands.push("write -z -u 3200000 512k".into());
            }
            let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
            images.qemu_io("a", &commands);
            let got = read_image(images.bytes("a"), &vec![], false).expect("read");
            assert_same(&got, &images.contents("a"), &format!("{bits} {compat}"));
        }
    }
}

#[test]
fn an_overlay_shows_what_is_below_where_it_has_nothing() {
    let images = Images::new();
    // Shorter than the overlay, and of odd size.
    let base = noise(1, 1_000_003);
    write_file(&images.path("base"), &base);
    images.create_over("a", "cluster_size=4k", "base", "raw", 2 << 20);
    images.qemu_io(
        "a",
        &["write -P 1 4k 64k", "write -z 256k 64k", "write -P 2 1M 1k"],
    );
    let got = read_image(images.bytes("a"), &base, true).expect("read");
    assert_same(&got, &images.contents("a"), "overlay");
}

#[test]
fn compressed_clusters_are_inflated_also_across_host_clusters() {
    let images = Images::new();
    for bits in [9u32, 12, 16, 21] {
        // Half noise, half repetition, so that clusters deflate to odd sizes.
        let mut raw = noise(7, 6 << 20);
        for (n, chunk) in raw.chunks_mut(1000).enumerate() {
            let keep = n * 37 % 1000;
            chunk.iter_mut().skip(keep).for_each(|b| *b = n as u8);
        }
        write_file(&images.path("raw"), &raw);
        let options = format!("cluster_size={}", 1u64 << bits);
        run(
            "qemu-img",
            &[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &options,
                &images.name("raw"),
                &images.name("a"),
            ],
        );
        let got = read_image(images.bytes("a"), &vec![], false).expect("read");
        assert_same(&got, &raw, &format!("{bits}"));
    }
}

#[test]
fn more_slices_than_the_cache_holds_come_and_go() {
    let images = Images::new();
    images.create("a", "cluster_size=512", 4 << 20);
    // The last cluster of each slice first: none of them lies in a row.
    let mut writes: Vec<String> = (1..=128u32)
        .map(|n| format!("write -P 4 {} 512", n * 64 * 512 - 512))
        .collect();
    writes.extend(["write -P 1 0 2M", "write -P 2 2M 1M", "write -P 3 3M 1M"].map(String::from));
    let writes: Vec<&str> = writes.iter().map(String::as_str).collect();
    images.qemu_io("a", &writes);
    let io = reactor();
    io.block_on(async {
        let storage = sim(images.bytes("a"), Sim::default());
        let options = Options {
            l2_cache_bytes: 0,
            ..READ
        };
        let image = open(&io, &storage, options).await.expect("open");
        let want = images.contents("a");
        for _ in 0..2 {
            let got = read_all(&io, &image, &vec![]).await.expect("read");
            assert_same(&got, &want, "small cache");
        }
        assert!(image.tables.loaded() <= 5, "{}", image.tables.loaded());
    });
}

#[test]
fn damaged_tables_give_errors_and_no_panic() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 4 << 20);
    images.qemu_io("a", &["write -P 1 0 4M"]);
    let good = images.bytes("a");
    let header = Header::parse(Path::new("a"), &good[..4096], good.len() as u64).expect("header");
    let l1 = header.l1_offset.0 as usize;
    let l2 = u64::from_be_bytes(good[l1..l1 + 8].try_into().expect("entry")) & !(1 << 63);
    let l2 = l2 as usize;
    let mut state = 3;
    for round in 0..200 {
        let mut bytes = good.clone();
        let at = if round % 4 == 0 {
            l1 + 8 * (random(&mut state) % 2) as usize
        } else {
            l2 + 8 * (random(&mut state) % 512) as usize
        };
        let value = random(&mut state) << 11 ^ random(&mut state);
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        if let Err(error) = read_image(bytes, &vec![], false) {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
    }
    // An entry that leads to the header, the L1 table or an L2 table.
    for target in [0u64, 1 << 63, l1 as u64 | 1 << 63, l2 as u64 | 1 << 63] {
        let mut bytes = good.clone();
        bytes[l2 + 80..l2 + 88].copy_from_slice(&target.to_be_bytes());
        let result = read_image(bytes, &vec![], false);
        assert_eq!(result.is_err(), target != 0, "{target:#x}");
    }
}

#[test]
fn an_error_reading_a_slice_is_told_and_the_next_read_tries_again() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 4 << 20);
    images.qemu_io("a", &["write -P 1 0 4M"]);
    let io = reactor();
    io.block_on(async {
        let storage = sim(images.bytes("a"), Sim::default());
        let image = open(&io, &storage, READ).await.expect("open");
        the_sim(&storage).fail(crate::block::sim::Kind::Read, 1, libc::EIO, false);
        let error = image.map(&io, 0, 512).await.expect_err("the slice");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(matches!(
            image.map(&io, 0, 512).await,
            Ok(Extent::Data { len: 512, .. })
        ));
    });
}

#[test]
fn beyond_the_disk_is_an_error() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1_000_448);
    let io = reactor();
    io.block_on(async {
        let storage = sim(images.bytes("a"), Sim::default());
        let image = open(&io, &storage, READ).await.expect("open");
        for (offset, len) in [
            (1_000_448, 1),
            (0, 1_000_449),
            (u64::MAX, 1),
            (512, u64::MAX),
        ] {
            let error = image.map(&io, offset, len).await.expect_err("beyond");
            assert_eq!(error.kind(), ErrorKind::OutOfRange);
        }
        assert_eq!(
            image.map(&io, 0, 1_000_448).await.ok(),
            Some(Extent::Zero { len: 1_000_448 })
        );
    });
}
