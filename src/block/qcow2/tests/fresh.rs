//! What writes cost that need no copying, and what a flush does not wait for.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::block::sim::Event;

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

/// Polls a future by hand until `reached`; it must not end before.
fn poll_until<F: Future>(io: &Io, mut future: std::pin::Pin<&mut F>, reached: impl Fn() -> bool) {
    io.block_on(async {
        while !reached() {
            let polled = future
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()));
            assert!(polled.is_pending(), "it ended before");
            io.yield_now().await;
        }
    });
}

fn writes(events: Vec<Event>) -> Vec<(u64, u64)> {
    let of_write = |event| match event {
        Event::Write { offset, len } => Some((offset, len)),
        _ => None,
    };
    events.into_iter().filter_map(of_write).collect()
}

#[test]
fn a_write_to_a_fresh_cluster_does_not_wait_for_another_one_under_way() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    let io = reactor();
    let config = Sim {
        delay: 40,
        ..Sim::default()
    };
    let storage = sim(images.bytes("a"), config);
    let image = io.block_on(open(&io, &storage, WRITE)).expect("open");
    let sim = the_sim(&storage);
    let (mut first, mut second) = (io.buf(4096), io.buf(4096));
    first.fill(1);
    second.fill(2);
    // The table and the arena.
    io.block_on(image.write(&io, &(), 0, first.sg()))
        .expect("write");
    {
        let _pin = io.pin();
        sim.take_events();
        let mut slow = pin!(image.write(&io, &(), 65536, first.sg()));
        let begun = std::cell::RefCell::new(Vec::new());
        poll_until(&io, slow.as_mut(), || {
            begun.borrow_mut().extend(writes(sim.take_events()));
            begun.borrow().iter().any(|(_, len)| *len == 4096)
        });
        // The first one's data is on its way, and it is not polled meanwhile.
        io.block_on(async {
            let mut back = io.buf(65536);
            image
                .write(&io, &(), 65536 + 8192, second.sg())
                .await
                .expect("write");
            read(&io, &image, &(), 65536, back.sg())
                .await
                .expect("read");
            assert!(back[8192..12288].iter().all(|b| *b == 2));
            assert!(back[4096..8192].iter().all(|b| *b == 0));
            assert!(back[12288..].iter().all(|b| *b == 0));
            slow.await.expect("the slow write");
            read(&io, &image, &(), 65536, back.sg())
                .await
                .expect("read");
            assert!(back[..4096].iter().all(|b| *b == 1));
        });
    }
    io.block_on(image.close(&io, &())).expect("close");
    assert_eq!(judge::Judge::new(&sim.image()).check(), 0);
    io.close();
}

#[test]
fn a_failed_write_to_a_fresh_cluster_of_zeros_leaves_zeros() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    let io = reactor();
    let storage = sim(images.bytes("a"), Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(4096);
        buf.fill(1);
        image.write(&io, &(), 0, buf.sg()).await.expect("write");
        the_sim(&storage).fail(crate::block::sim::Kind::Write, 1, libc::EIO, false);
        let failed = image.write(&io, &(), 65536, buf.sg()).await;
        assert_eq!(failed.expect_err("failed").errno(), Some(libc::EIO));
        let mut back = io.buf(65536);
        read(&io, &image, &(), 65536, back.sg())
            .await
            .expect("read");
        assert!(back.iter().all(|b| *b == 0));
        image.close(&io, &()).await.expect("close");
    });
    assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
    io.close();
}

#[test]
fn where_memory_is_full_a_write_fails_and_what_was_written_can_be_flushed() {
    use crate::block::device_tests::Mounted;
    use crate::block::file::{FileOptions, FileStorage};
    let Some(mounted) = Mounted::new("tmpfs", "size=1m") else {
        return;
    };
    let path = mounted.0.path().join("a");
    let name = path.display().to_string();
    let options = ["-o", "cluster_size=64k", name.as_str(), "64M"];
    run(
        "qemu-img",
        &[&["create", "-q", "-f", "qcow2"], &options[..]].concat(),
    );
    let io = reactor();
    let how = FileOptions {
        read_only: false,
        direct: false,
    };
    let storage = Arc::new(Storage::File(FileStorage::open(&path, how).expect("open")));
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(4096);
        let mut at = 0;
        let error = loop {
            buf.fill((at >> 16) as u8 | 1);
            match image.write(&io, &(), at, buf.sg()).await {
                Ok(()) => at += 65536,
                Err(error) => break error,
            }
        };
        // More than as many as would fit if the whole of each cluster took space.
        assert!(at >> 16 > 100, "{at}");
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
        let mut back = io.buf(65536);
        read(&io, &image, &(), at, back.sg()).await.expect("read");
        assert!(back.iter().all(|b| *b == 0));
        image.flush(&io, &()).await.expect("a flush takes no space");
        let size = ["-o", "remount,size=4m"];
        let at_name = mounted.0.path().display().to_string();
        run("mount", &[&size[..], &[at_name.as_str()]].concat());
        buf.fill((at >> 16) as u8 | 1);
        image.write(&io, &(), at, buf.sg()).await.expect("now");
        for n in 0..=at >> 16 {
            read(&io, &image, &(), n << 16, back.sg())
                .await
                .expect("read");
            assert!(back[..4096].iter().all(|b| *b == n as u8 | 1), "{n}");
            assert!(back[4096..].iter().all(|b| *b == 0), "{n}");
        }
        image.close(&io, &()).await.expect("close");
    });
    drop(storage);
    run("qemu-img", &["check", "-q", &name]);
    io.close();
}

#[test]
fn a_write_over_the_border_of_two_slices_is_one_write_where_the_clusters_are_neighbours() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 8 << 20);
    let io = reactor();
    let storage = sim(images.bytes("a"), Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(1 << 20);
        buf.fill(1);
        // The L2 tables, then clusters on both sides of the border at 2 MiB.
        for at in [0, (4 << 20) - 4096] {
            let part = buf.sg().slice(0, 4096);
            image.write(&io, &(), at, part).await.expect("write");
        }
        let start = (3 << 20) / 2;
        image.write(&io, &(), start, buf.sg()).await.expect("write");
        let border = 2 << 20;
        let mut hosts = Vec::new();
        for at in [border - 4096, border] {
            match image.map(&io, at, 4096).await.expect("map") {
                Extent::Data { host, .. } => hosts.push(host.0),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(hosts[0] + 4096, hosts[1], "neighbours");
        the_sim(&storage).take_events();
        let mut small = io.buf(16384);
        small.fill(2);
        image
            .write(&io, &(), border - 8192, small.sg())
            .await
            .expect("write");
        let written = writes(the_sim(&storage).take_events());
        assert_eq!(written, [(hosts[0] - 4096, 16384)]);
        image.close(&io, &()).await.expect("close");
    });
    assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
    io.close();
}

#[test]
fn a_flush_answers_before_holes_are_punched_and_a_close_waits_for_them() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 1 << 20);
    images.qemu_io("a", &["write -P 1 0 256k"]);
    let io = reactor();
    let config = Sim {
        delay: 20,
        ..Sim::default()
    };
    let storage = sim(images.bytes("a"), config);
    let image = io.block_on(open(&io, &storage, WRITE)).expect("open");
    let sim = the_sim(&storage);
    let punched = |events: Vec<Event>| {
        let holes = events
            .iter()
            .filter(|e| matches!(e, Event::Discard { .. }))
            .count();
        holes > 0
    };
    io.block_on(image.discard(&io, 0, 131_072))
        .expect("discard");
    io.block_on(async { io.yield_now().await });
    sim.take_events();
    io.block_on(image.flush(&io, &())).expect("flush");
    assert!(!punched(sim.take_events()));
    io.block_on(async {
        for _ in 0..100 {
            io.yield_now().await;
        }
    });
    assert!(punched(sim.take_events()));
    // With the task still to begin.
    io.block_on(image.discard(&io, 131_072, 131_072))
        .expect("discard");
    io.block_on(async { io.yield_now().await });
    io.block_on(image.flush(&io, &())).expect("flush");
    io.block_on(image.close(&io, &())).expect("close");
    assert!(punched(sim.take_events()));
    assert_eq!(judge::Judge::new(&sim.image()).check(), 0, "given back");
    io.close();
}

#[test]
fn space_on_its_way_out_of_limbo_is_waited_for_when_there_is_no_other() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 1 << 20);
    images.qemu_io("a", &["write -P 1 0 256k"]);
    let io = reactor();
    let storage = sim(images.bytes("a"), Sim::default());
    let sim = the_sim(&storage);
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        image.discard(&io, 0, 131_072).await.expect("discard");
        io.yield_now().await;
        image.flush(&io, &()).await.expect("flush");
        let alloc = image.alloc.clone().expect("writable");
        let mut settled = pin!(alloc.settled());
        let polled = settled
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()));
        assert_eq!(polled, Poll::Pending, "the task has not begun");
        // The file does not grow any more: what was freed inside it is all there is.
        sim.full_at(sim.image().len() as u64);
        let mut buf = io.buf(4096);
        buf.fill(2);
        image
            .write(&io, &(), 524_288, buf.sg())
            .await
            .expect("write");
        image.close(&io, &()).await.expect("close");
    });
    assert_eq!(judge::Judge::new(&sim.image()).check(), 0);
    io.close();
}

/// What must not change where a write is not placed at once.
fn state(image: &Qcow2) -> (u64, usize, (u64, u64)) {
    let journal = image.journal.get().map_or((0, 0), |it| it.used());
    let in_arena = image.allocator().expect("allocator").in_arena(0);
    (in_arena, image.tables.dirty().0, journal)
}

#[test]
fn a_first_write_to_zeros_is_placed_by_a_plain_call_and_noted_before_it_is_seen() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    images.create_over("b", "cluster_size=64k", "a", "qcow2", 1 << 20);
    images.qemu_io("b", &["write -z -u 64k 64k", "write 0 64k"]);
    for (name, has_backing) in [("a", false), ("b", true)] {
        let io = reactor();
        let storage = sim(images.bytes(name), Sim::default());
        let options = Options {
            has_backing,
            ..WRITE
        };
        io.block_on(async {
            let below = Vec::new();
            let image = open(&io, &storage, options).await.expect("open");
            let memory = super::journal::memory(320 << 10);
            image
                .use_journal(&io, &below, memory)
                .await
                .expect("journal");
            let mut buf = io.buf(4096);
            // The table, the arena, and the mark that the journal is in use.
            let first = image.write(&io, &below, 15 << 16, buf.sg());
            first.await.expect("write");
            image.flush(&io, &below).await.expect("flush");
            let (in_arena, dirty, (used, promised)) = state(&image);
            assert_eq!((dirty, used, promised), (0, 0, 0));

            the_sim(&storage).take_events();
            let host = image
                .in_place(&io, (1 << 16) + 8192, 4096)
                .expect("at once");
            assert!(writes(the_sim(&storage).take_events()).is_empty());
            assert_eq!(state(&image), (in_arena - 1, 1, (1, 0)), "{name}");
            let mapped = image.map(&io, 1 << 16, 65536).await.expect("map");
            let cluster = HostOffset(host.0 - 8192);
            let whole = Extent::Data {
                host: cluster,
                len: 65536,
            };
            assert_eq!(mapped, whole, "{name}");
            assert_eq!(image.in_place(&io, 1 << 16, 512), Some(cluster), "{name}");
            buf.fill(7);
            image
                .data
                .write(&io, host.0, buf.sg())
                .await
                .expect("write");
            let mut back = io.buf(65536);
            read(&io, &image, &below, 1 << 16, back.sg())
                .await
                .expect("read");
            let of_guest = 8192..12288;
            let is_right = |(at, byte): (usize, &u8)| *byte == 7 * u8::from(of_guest.contains(&at));
            assert!(back.iter().enumerate().all(is_right), "{name}");
            image.close(&io, &below).await.expect("close");
        });
        assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
        io.close();
    }
}

#[test]
fn a_first_write_that_needs_more_than_a_plain_call_changes_nothing_by_one() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 1 << 20);
    images.create_over("b", "cluster_size=64k", "a", "qcow2", 1 << 20);
    let io = reactor();
    // Over a base; where new clusters read as anything; where somebody has claimed the cluster; over a border;
    // of nothing; with a full journal; with an arena that is dry.
    for case in [
        "base", "no zeros", "claimed", "border", "empty", "journal", "arena",
    ] {
        let name = if case == "base" { "b" } else { "a" };
        let config = Sim {
            promises_zeros: case != "no zeros",
            ..Sim::default()
        };
        let storage = sim(images.bytes(name), config);
        let options = Options {
            has_backing: case == "base",
            ..WRITE
        };
        io.block_on(async {
            let below = Vec::new();
            let image = open(&io, &storage, options).await.expect("open");
            let memory = super::journal::memory(320 << 10);
            image
                .use_journal(&io, &below, memory)
                .await
                .expect("journal");
            let mut buf = io.buf(65536);
            let first = image.write(&io, &below, 15 << 16, buf.sg());
            first.await.expect("write");
            let cluster = GuestCluster(1);
            let (mut offset, mut len, mut claim, mut clusters) = (1 << 16, 4096, None, Vec::new());
            match case {
                "claimed" => claim = Some(image.tables.try_claim(cluster, 1, |_, _| true)),
                "border" => offset += 65536 - 512,
                "empty" => len = 0,
                "journal" => image.journal.get().expect("journal").leave_only(1),
                "arena" => {
                    let alloc = image.allocator().expect("allocator");
                    clusters.extend(alloc.allocate_at_once(&io, 1 << 20));
                    while alloc.in_arena(0) > 0 {
                        clusters.extend(alloc.allocate_at_once(&io, 1 << 20));
                    }
                }
                _ => {}
            }
            let before = state(&image);
            assert_eq!(image.in_place(&io, offset, len), None, "{case}");
            assert_eq!(state(&image), before, "{case}");
            drop((claim, clusters));
            let part = buf.sg().slice(0, len as usize);
            image.write(&io, &below, offset, part).await.expect(case);
            image.close(&io, &below).await.expect("close");
        });
        assert_eq!(judge::Judge::new(&the_sim(&storage).image()).check(), 0);
    }
    io.close();
}
