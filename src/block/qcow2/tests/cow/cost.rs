//! What copying costs: reads of what is below, and writes of what is new.

use super::*;

#[test]
fn a_sequential_writer_reads_almost_nothing_of_the_base() {
    for writers in [1, 4] {
        let over = Over::new(65536, noise(1, 8 << 20), 8 << 20, Sim::default());
        let data = noise(2, 6 << 20);
        // Beginning and ending inside a cluster, with a flush there, and one every now and then.
        let start = 20_480;
        over.io.block_on(async {
            for (n, piece) in data.chunks(4096 * writers).enumerate() {
                let at = start + (n * 4096 * writers) as u64;
                let each = piece.chunks(4096).enumerate();
                let all: Vec<_> = each
                    .map(|(n, data)| Box::pin(over.write(at + n as u64 * 4096, data)))
                    .collect();
                join_all(all).await;
                if n % 400 == 399 {
                    over.flush().await.expect("flush");
                }
            }
            over.flush().await.expect("flush");
        });
        let written: u64 = over.written().iter().sum();
        let read = over.base.bytes_read();
        assert!(read * 16 < written, "{read} read, {written} written");
        over.finish("sequential");
    }
}

#[test]
fn a_random_writer_on_a_fresh_image_writes_little_more_than_the_guest() {
    let images = Images::new();
    images.create("a", "cluster_size=64k", 256 << 20);
    let io = reactor();
    let storage = sim(images.bytes("a"), Sim::default());
    let options = Options {
        has_backing: false,
        ..WRITE
    };
    io.block_on(async {
        let image = open(&io, &storage, options).await.expect("open");
        the_sim(&storage).take_events();
        let before = the_sim(&storage).bytes_read();
        let mut state = 9;
        let mut buf = io.buf(4096);
        buf.fill(1);
        const WRITES: u64 = 2000;
        for n in 0..WRITES {
            let at = random(&mut state) % (65536 - 1) * 4096;
            image.write(&io, &(), at, buf.sg()).await.expect("write");
            if n % 500 == 499 {
                image.flush(&io, &()).await.expect("flush");
            }
        }
        let written: u64 = the_sim(&storage)
            .take_events()
            .iter()
            .map(|event| match event {
                Event::Write { len, .. } => *len,
                _ => 0,
            })
            .sum();
        assert!(written * 10 < WRITES * 4096 * 12, "{written} written");
        let read = the_sim(&storage).bytes_read() - before;
        assert!(read < 1 << 20, "{read} read, of tables");
        image.close(&io, &()).await.expect("close");
    });
    io.close();
}

#[test]
fn a_random_writer_reads_each_cluster_of_the_base_once_for_a_flush() {
    let options = Options {
        l2_cache_bytes: 8 << 20,
        ..WRITE
    };
    let over = Over::with(65536, noise(1, 8 << 20), 8 << 20, Sim::default(), options);
    over.io.block_on(async {
        let mut state = 5;
        for n in 0..over.image.records.lone_limit() as u64 {
            over.write(n * 131_072 + 8192, &noise(n, 4096)).await;
        }
        assert_eq!(over.base.bytes_read(), 0, "not before it must be");
        for n in 0..300 {
            let at = random(&mut state) % 2048 * 4096;
            over.write(at, &noise(n, 4096)).await;
        }
        assert!(over.image.records.len() > 50);
        over.flush().await.expect("flush");
        assert_eq!(over.image.records.len(), 0);
    });
    assert!(over.base.sectors.borrow().iter().all(|n| *n <= 1));
    over.finish("random");
}

#[test]
fn neighbours_are_read_at_one_go_and_written_together() {
    let over = Over::new(4096, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(900_096, &noise(7, 512)).await; // the table and the arena
        over.flush().await.expect("flush");
        for n in 0..8 {
            over.write(n * 4096 + 1024, &noise(n, 512)).await;
        }
        over.written();
        let reads = over.base.reads.get();
        over.flush().await.expect("flush");
        assert_eq!(over.base.reads.get() - reads, 1);
        let data = over.written().into_iter().filter(|len| *len < 4096);
        // Before the first, between two of them, and behind the last.
        assert_eq!(data.collect::<Vec<_>>().len(), 9);
    });
    over.finish("neighbours");
}

#[test]
fn a_cluster_full_of_holes_is_written_at_one_go() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        for n in 0..60 {
            over.write(65536 + 512 + n * 1024, &noise(n, 512)).await;
        }
        over.written();
        over.flush().await.expect("flush");
        let written = over.written();
        assert!(written.len() <= 4, "{written:?}");
    });
    over.finish("holes");
}

#[test]
fn zeros_of_the_base_are_not_written() {
    let over = Over::new(65536, vec![0; 1 << 20], 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(65536 + 4096, &noise(1, 4096)).await;
        over.written();
        over.flush().await.expect("flush");
        let written = over.written();
        assert!(written.iter().all(|len| *len <= 4096), "{written:?}");
    });
    over.finish("zeros");
}

#[test]
fn zeros_of_the_base_are_not_written_by_who_copies_at_once() {
    let mut base = vec![0; 1 << 20];
    // One cluster has data before, one behind what is written.
    base[65536..65536 + 512].fill(7);
    base[196_608 - 512..196_608].fill(7);
    let over = Over::new(65536, base, 1 << 20, Sim::default());
    over.io.block_on(async {
        let (io, base) = (&over.io, &over.base);
        over.image.set_eager(io, base, true).await.expect("eager");
        over.write(524_288 + 8192, &noise(1, 4096)).await; // the table, too
        over.written();
        over.write(262_144 + 8192, &noise(2, 4096)).await;
        assert_eq!(over.written(), [4096]);
        over.write(65536 + 8192, &noise(3, 4096)).await;
        assert_eq!(over.written(), [8192 + 4096]);
        over.write(131_072 + 8192, &noise(4, 4096)).await;
        assert_eq!(over.written(), [65536 - 8192]);
        over.check("zeros").await;
    });
    over.finish("zeros");
}

#[test]
fn zeros_of_the_base_are_written_where_new_clusters_may_hold_anything() {
    for eager in [false, true] {
        let config = Sim {
            promises_zeros: false,
            ..Sim::default()
        };
        let over = Over::new(65536, vec![0; 1 << 20], 1 << 20, config);
        over.io.block_on(async {
            let (io, base) = (&over.io, &over.base);
            over.image.set_eager(io, base, eager).await.expect("eager");
            over.write(65536 + 4096, &noise(1, 4096)).await;
            over.flush().await.expect("flush");
            over.check("zeros").await;
        });
        over.finish("zeros");
    }
}
