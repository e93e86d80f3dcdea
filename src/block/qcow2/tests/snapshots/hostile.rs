//! Snapshot tables that are damaged, or made to do harm.

use super::*;

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

/// The error of opening an image for writing, if there is one.
fn open_error(bytes: Vec<u8>) -> Option<crate::block::error::Error> {
    let io = reactor();
    let storage = sim(bytes, Sim::default());
    let result = io.block_on(async {
        let image = open(&io, &storage, WRITE).await?;
        image.close(&io, &()).await
    });
    io.close();
    result.err()
}

fn patched(bytes: &[u8], at: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + value.len()].copy_from_slice(value);
    bytes
}

/// An image with two snapshots, and where its snapshot table is.
fn image() -> (Album, Vec<u8>, usize) {
    let album = Album::new("cluster_size=4k", &[], 4 << 20, &ALL_SHARED);
    let bytes = album.images.bytes("a");
    let table = number(&bytes, 64, 8) as usize;
    (album, bytes, table)
}

#[test]
fn sizes_and_offsets_of_the_table_are_bounded() {
    let (_album, good, table) = image();
    assert!(open_error(good.clone()).is_none());
    let l1 = number(&good, table, 8);
    let cases: [(&str, usize, Vec<u8>); 10] = [
        ("a snapshot too many", 60, 3u32.to_be_bytes().into()),
        ("more than there may be", 60, 65_537u32.to_be_bytes().into()),
        ("as many as can be counted", 60, vec![0xff; 4]),
        ("extra data without end", table + 36, vec![0xff; 4]),
        ("extra data", table + 36, 1025u32.to_be_bytes().into()),
        ("a name beyond the file", table + 14, vec![0xff; 2]),
        ("an L1 table askew", table, (l1 + 512).to_be_bytes().into()),
        ("an L1 table nowhere", table, vec![0; 8]),
        (
            "an L1 table far away",
            table,
            (1u64 << 60).to_be_bytes().into(),
        ),
        ("an L1 table too large", table + 8, vec![0xff; 4]),
    ];
    for (what, at, value) in cases {
        let error = open_error(patched(&good, at, &value)).expect(what);
        let kind = error.kind();
        assert!(
            matches!(kind, ErrorKind::InvalidImage | ErrorKind::Corrupt),
            "{what}: {error}"
        );
        // Reading needs none of it.
        let io = reactor();
        let storage = sim(patched(&good, at, &value), Sim::default());
        assert!(io.block_on(open(&io, &storage, READ)).is_ok(), "{what}");
        io.close();
    }
}

#[test]
fn tables_that_are_in_each_others_place_are_refused() {
    let (_album, good, table) = image();
    let active = number(&good, 40, 8);
    let own = number(&good, table, 8);
    let second = (table + 40 + number(&good, table + 36, 4) as usize + 1 + 2).next_multiple_of(8);
    let other = number(&good, second, 8);
    assert_eq!(other % 4096, 0, "the second entry");
    let (active_l2, own_l2) = (
        number(&good, active as usize, 8),
        number(&good, own as usize, 8),
    );
    let refcount_block = number(&good, number(&good, 48, 8) as usize, 8);
    const COPIED: u64 = 1 << 63;
    let cases: [(&str, u64, u64); 12] = [
        ("a snapshot's L1 over the header", table as u64, 0),
        ("a snapshot's L1 over the active one", table as u64, active),
        ("a snapshot's L1 over the other's", table as u64, other),
        (
            "a snapshot's L1 over their table",
            table as u64,
            table as u64,
        ),
        (
            "a snapshot's L1 over an L2 table",
            table as u64,
            active_l2 & !COPIED,
        ),
        (
            "a snapshot's L1 over refcounts",
            table as u64,
            refcount_block,
        ),
        ("a snapshot's L2 over the other's L1", own, other),
        ("a snapshot's L2 over the active L1", own, active),
        ("a snapshot's L2 beyond the file", own, 1 << 40),
        ("a snapshot's L2 over refcounts", own, refcount_block),
        ("an active L2 over a snapshot's L1", active, own | COPIED),
        (
            "an active L2 that is a snapshot's",
            active,
            (own_l2 & !COPIED) | COPIED,
        ),
    ];
    for (what, at, value) in cases {
        let bytes = patched(&good, at as usize, &value.to_be_bytes());
        let error = open_error(bytes).expect(what);
        assert!(
            matches!(error.kind(), ErrorKind::InvalidImage | ErrorKind::Corrupt),
            "{what}: {error}"
        );
        assert!(error.to_string().contains("qemu-img"), "{what}: {error}");
    }
    // The flag is missing where nothing is shared.
    let alone = good[active as usize..active as usize + 16].chunks(8);
    let at = alone
        .map(|raw| number(raw, 0, 8))
        .position(|raw| raw & COPIED != 0);
    if let Some(n) = at {
        let at = active as usize + n * 8;
        let raw = number(&good, at, 8) & !COPIED;
        let error = open_error(patched(&good, at, &raw.to_be_bytes())).expect("no snapshot has it");
        assert!(error.to_string().contains("no snapshot has it"), "{error}");
    }
}

#[test]
fn an_active_entry_that_leads_to_a_table_of_a_snapshot_is_not_used() {
    let (_album, good, table) = image();
    let active_l1 = number(&good, 40, 8) as usize;
    let l2 = (number(&good, active_l1, 8) & !(1 << 63)) as usize;
    let own_l1 = number(&good, table, 8);
    let own_l2 = number(&good, own_l1 as usize, 8) & !(1 << 63);
    for target in [own_l1, own_l2, table as u64] {
        let io = reactor();
        let bytes = patched(&good, l2 + 80, &(target | 1 << 63).to_be_bytes());
        let storage = sim(bytes.clone(), Sim::default());
        io.block_on(async {
            let image = open(&io, &storage, WRITE).await.expect("open");
            let mut buf = io.buf(4096);
            let error = image.write(&io, &(), 40_960, buf.sg()).await;
            let error = error.expect_err("a table");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            // The image is damaged: its neighbours are read, and not written to any more.
            let stopped = image.write(&io, &(), 0, buf.sg()).await;
            assert_eq!(stopped.expect_err("stopped").kind(), ErrorKind::Corrupt);
            read(&io, &image, &(), 0, buf.sg()).await.expect("read");
            image.close(&io, &()).await.expect("close");
        });
        io.close();
        let after = the_sim(&storage).image();
        for place in [own_l1 as usize, own_l2 as usize, table] {
            let end = (place + 4096).min(bytes.len());
            assert_same(&after[place..end], &bytes[place..end], "kept");
        }
    }
}

#[test]
fn flags_in_a_shared_table_that_say_a_cluster_is_ours_do_not_count() {
    let (album, good, _) = image();
    let active_l1 = number(&good, 40, 8) as usize;
    let l2 = (number(&good, active_l1, 8) & !(1 << 63)) as usize;
    // Cluster 2 is in use by every snapshot.
    let raw = number(&good, l2 + 16, 8);
    let io = reactor();
    let bytes = patched(&good, l2 + 16, &(raw | 1 << 63).to_be_bytes());
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(4096);
        buf.fill(0xee);
        image.write(&io, &(), 0, buf.sg()).await.expect("write");
        image.write(&io, &(), 8192, buf.sg()).await.expect("write");
        image.close(&io, &()).await.expect("close");
    });
    io.close();
    let after = the_sim(&storage).image();
    for (n, (snapshot, contents)) in album.snapshots.iter().enumerate() {
        let then = with_snapshot_active(&after, n);
        assert_same(&judge::Judge::new(&then).read_all(&[]), contents, snapshot);
    }
}

#[test]
fn a_shared_table_whose_refcount_says_otherwise_stops_all_writing() {
    let (album, good, table) = image();
    let active_l1 = number(&good, 40, 8) as usize;
    let l2 = number(&good, active_l1, 8) & !(1 << 63);
    let block = number(&good, number(&good, 48, 8) as usize, 8) as usize;
    let count = block + (l2 >> 12) as usize * 2;
    assert_eq!(number(&good, count, 2), 2);
    let io = reactor();
    let storage = sim(patched(&good, count, &[0, 1]), Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(4096);
        for _ in 0..2 {
            let error = image
                .write(&io, &(), 0, buf.sg())
                .await
                .expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        }
        image.close(&io, &()).await.expect("close");
    });
    io.close();
    let after = the_sim(&storage).image();
    assert_eq!(after[79] & 2, 2, "marked as corrupt");
    assert_same(&after[table..], &good[table..], "nothing was written");
    drop(album);
}

#[test]
fn random_damage_gives_errors_and_no_panic() {
    let (_album, good, table) = image();
    let l1 = number(&good, table, 8) as usize;
    let mut state = 11;
    for round in 0..300 {
        let at = match round % 3 {
            0 => table + (random(&mut state) % 130) as usize,
            1 => l1 + (random(&mut state) % 16) as usize,
            _ => 60 + (random(&mut state) % 12) as usize,
        };
        let value = random(&mut state).to_be_bytes();
        let len = 1 + (random(&mut state) % 4) as usize;
        if let Some(error) = open_error(patched(&good, at, &value[..len])) {
            let kind = error.kind();
            assert!(
                matches!(
                    kind,
                    ErrorKind::Corrupt | ErrorKind::InvalidImage | ErrorKind::Unsupported
                ),
                "{error}"
            );
        }
    }
}
