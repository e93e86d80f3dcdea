//! Power loss, errors and damage: no bitmap says what is not so.

use super::*;

fn is_consistent(images: &Images, bytes: &[u8], what: &str) {
    write_file(&images.path("c"), bytes);
    let output = Command::new("qemu-img")
        .args(["check", "-q", &images.name("c")])
        .output()
        .expect("qemu-img");
    let code = output.status.code();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(code, Some(0 | 3)), "{what}: {code:?} {text}");
}

/// Each stored bitmap is in use, or exactly what it should be.
fn is_honest(world: &World, bytes: &[u8], what: &str) -> bool {
    let mut in_use = false;
    for (n, stored) in stored(bytes).iter().enumerate() {
        if stored.flags & IN_USE != 0 {
            in_use = true;
        } else {
            assert!(
                stored.set == world.want(n),
                "{what}: the bits of {}",
                stored.name
            );
        }
    }
    in_use
}

/// Whole disks of marks, and none: clusters of bitmap data come and go.
async fn comings_and_goings(world: &mut World, io: &Io, image: &Qcow2) {
    world.write(io, image, 0, 4 << 20).await;
    world.write(io, image, 6 << 20, 1024).await;
}

#[test]
fn power_loss_while_bitmaps_are_stored_leaves_them_in_use_or_right() {
    let bitmaps = [("a", 512, true), ("off", 512, false), ("b", 4096, true)];
    let mut states = (0, 0);
    for operations in 0.. {
        let mut world = World::new("cluster_size=512", 8 << 20, &bitmaps, Sim::default());
        let io = reactor();
        let dead = io.block_on(async {
            let image = world.open(&io).await;
            comings_and_goings(&mut world, &io, &image).await;
            image.flush(&io, &()).await.expect("flush");
            the_sim(&world.storage).cut_power_after(operations);
            let closed = image.close(&io, &()).await;
            for seed in 0..2 {
                let what = format!("{operations} operations, seed {seed}");
                let bytes = the_sim(&world.storage).crash(operations * 8 + seed);
                match is_honest(&world, &bytes, &what) {
                    true => states.0 += 1,
                    false => states.1 += 1,
                }
                if operations % 7 == seed {
                    is_consistent(&world.images, &bytes, &what);
                }
            }
            assert_eq!(closed.is_err(), the_sim(&world.storage).is_dead());
            closed.is_err()
        });
        io.close();
        if !dead {
            break;
        }
        assert!(operations < 400);
    }
    assert!(states.0 > 10 && states.1 > 2, "{states:?}");
}

#[test]
fn an_error_while_bitmaps_are_stored_is_told_and_leaves_them_in_use() {
    let bitmaps = [("a", 512, true), ("b", 4096, true)];
    let mut told = 0;
    for (errno, stays) in [(libc::ENOSPC, true), (libc::EIO, false)] {
        for nth in 1.. {
            let what = format!("errno {errno}, operation {nth}");
            let mut world = World::new("cluster_size=512", 8 << 20, &bitmaps, Sim::default());
            let io = reactor();
            let over = io.block_on(async {
                let image = world.open(&io).await;
                comings_and_goings(&mut world, &io, &image).await;
                image.flush(&io, &()).await.expect("flush");
                let before = the_sim(&world.storage).operations();
                the_sim(&world.storage).fail(Kind::Any, nth, errno, stays);
                let closed = image.close(&io, &()).await;
                the_sim(&world.storage).heal();
                let bytes = world.bytes();
                if is_honest(&world, &bytes, &what) {
                    let error = closed.expect_err(&what);
                    told += u32::from(error.to_string().contains("bitmaps"));
                }
                is_consistent(&world.images, &bytes, &what);
                the_sim(&world.storage).operations() - before < nth
            });
            io.close();
            if over {
                break;
            }
            assert!(nth < 400);
        }
    }
    assert!(told > 10, "{told}");
}

#[test]
fn when_the_mark_of_use_cannot_be_written_nothing_is() {
    let bitmaps = [("a", 65536, true)];
    let mut world = World::new("cluster_size=64k", 8 << 20, &bitmaps, Sim::default());
    let io = reactor();
    io.block_on(async {
        let image = world.open(&io).await;
        let mut buf = io.buf(512);
        for kind in [Kind::Write, Kind::Flush] {
            the_sim(&world.storage).fail(kind, 1, libc::EIO, false);
            let error = image
                .write(&io, &(), 1 << 20, buf.sg())
                .await
                .expect_err("mark");
            assert!(error.to_string().contains("nothing was written"), "{error}");
        }
        let mut got = io.buf(512);
        read(&io, &image, &(), 1 << 20, got.sg())
            .await
            .expect("read");
        assert_eq!(*got, [1; 512], "as it was");
        world.write(&io, &image, 1 << 20, 512).await;
        image.close(&io, &()).await.expect("close");
    });
    world.check(&world.bytes(), 0, "the next attempt works");
}

#[test]
fn damaged_directories_and_tables_are_refused_for_writing_and_read_all_the_same() {
    let bitmaps = [("a", 4096, true), ("second", 512, false)];
    let world = World::new("cluster_size=4k", 8 << 20, &bitmaps, Sim::default());
    let good = world.bytes();
    let io = reactor();
    let attempt = |bytes: Vec<u8>, options: Options| {
        io.block_on(async {
            let storage = sim(bytes, Sim::default());
            let image = open(&io, &storage, options).await?;
            let mut buf = io.buf(512);
            match options.read_only {
                true => image.map(&io, 0, 512).await.map(|_| ()),
                false => {
                    image.write(&io, &(), 0, buf.sg()).await?;
                    image.close(&io, &()).await
                }
            }
        })
    };
    let entry = entries(&good);
    let (first, second) = (entry[0], entry[1]);
    let (table, l1) = (get(&good, first, 8) as usize, get(&good, 40, 8) as usize);
    let extension = 8 + good
        .windows(4)
        .position(|w| w == 0x2385_2875u32.to_be_bytes())
        .expect("it");
    let mut far = good.len() as u64;
    far = far.next_multiple_of(4096) + 4096;
    let cases: Vec<(usize, Vec<u8>)> = vec![
        (extension, vec![0, 0, 0, 0]),
        (extension, vec![0, 0, 0, 1]),
        (extension, vec![0, 0, 0, 3]),
        (extension, vec![0xff; 4]),
        (extension + 8, vec![0xff; 8]),
        (extension + 8, vec![0, 0, 0, 0, 0, 0, 0, 8]),
        (extension + 16, vec![0xff; 8]),
        (extension + 16, far.to_be_bytes().to_vec()),
        (extension + 16, (l1 as u64).to_be_bytes().to_vec()),
        (first, vec![0; 8]),
        (first, vec![0xff; 8]),
        (first, (l1 as u64).to_be_bytes().to_vec()),
        (first, far.to_be_bytes().to_vec()),
        (first + 8, vec![0; 4]),
        (first + 8, vec![0xff; 4]),
        (first + 8, vec![0, 0, 0, 2]),
        (first + 12, vec![0xff; 4]),
        (first + 16, vec![2]),
        (first + 17, vec![8]),
        (first + 17, vec![32]),
        (first + 18, vec![0, 0]),
        (first + 18, vec![0xff, 0xff]),
        (first + 20, vec![0xff; 4]),
        (first + 20, vec![0, 0, 0, 8]),
        (second, (table as u64).to_be_bytes().to_vec()),
        (table, vec![0xff; 8]),
        (table, 0x200u64.to_be_bytes().to_vec()),
        (table, 2u64.to_be_bytes().to_vec()),
        (table, far.to_be_bytes().to_vec()),
        (table, (l1 as u64).to_be_bytes().to_vec()),
        (table, (table as u64).to_be_bytes().to_vec()),
    ];
    for (at, value) in cases {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(&value);
        attempt(bytes.clone(), READ).expect("reading needs no bitmaps");
        let error = attempt(bytes, WRITE).expect_err(&format!("{at:#x} {value:x?}"));
        assert!(
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported),
            "{at:#x} {value:x?}: {error}"
        );
    }
    let mut state = 11;
    for _ in 0..400 {
        let mut bytes = good.clone();
        let at = match random(&mut state) % 3 {
            0 => extension + random(&mut state) as usize % 24,
            1 => first + random(&mut state) as usize % 64,
            _ => table + random(&mut state) as usize % 8,
        };
        bytes[at] = random(&mut state) as u8;
        let _ = attempt(bytes, WRITE);
    }
    attempt(good, WRITE).expect("the good one");
}

#[test]
fn an_image_that_a_program_without_bitmaps_has_written_to_is_written_and_they_are_left() {
    let bitmaps = [("a", 4096, true)];
    let world = World::new("cluster_size=64k", 8 << 20, &bitmaps, Sim::default());
    let mut bytes = world.bytes();
    bytes[95] = 0;
    let io = reactor();
    io.block_on(async {
        let storage = sim(bytes.clone(), Sim::default());
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(512);
        image
            .write(&io, &(), 5 << 20, buf.sg())
            .await
            .expect("write");
        image.close(&io, &()).await.expect("close");
        let after = the_sim(&storage).image();
        assert_eq!(after[95], 0);
        assert_eq!(stored(&after), stored(&bytes));
    });
}
