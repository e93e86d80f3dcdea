//! Who meets whom on an incomplete cluster.

use super::*;

#[test]
fn a_write_to_a_copied_cluster_does_not_wait_for_another_one_under_way() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, SLOW);
    over.io.block_on(over.write(0, &noise(2, 4096)));
    over.written();
    let begun = Cell::new(false);
    let first = noise(3, 4096);
    let mut slow = pin!(over.write(65536, &first));
    poll_until(&over.io, slow.as_mut(), 1000, || {
        begun.set(begun.get() || over.written().contains(&4096));
        begun.get()
    });
    over.io.block_on(async {
        over.write(65536 + 8192, &noise(4, 4096)).await;
        over.check("the second only").await;
        slow.await;
    });
    over.finish("both");
}

#[test]
fn a_late_fill_never_overwrites_a_completed_write() {
    for seed in 1..20 {
        let config = Sim { seed, ..SLOW };
        let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, config);
        over.io.block_on(async {
            over.write(0, &noise(2, 4096)).await;
            over.flush().await.expect("flush");
            over.write(65536, &noise(2, 4096)).await;
        });
        over.written();
        let data = noise(3, 4096);
        let mut slow = pin!(over.write(65536 + 8192, &data));
        let begun = Cell::new(false);
        poll_until(&over.io, slow.as_mut(), 1000, || {
            begun.set(begun.get() || over.written().contains(&4096));
            begun.get()
        });
        // The fill begins while the write is on its way.
        let mut flush = pin!(over.flush());
        let filling = Cell::new(false);
        poll_until(&over.io, flush.as_mut(), 300, || {
            filling.set(filling.get() || !over.written().is_empty());
            filling.get()
        });
        over.io.block_on(slow);
        over.io.block_on(flush).expect("flush");
        assert!(!filling.get(), "the fill waits for the writer");
        over.finish("late");
    }
}

#[test]
fn a_write_that_meets_a_fill_waits_for_it_and_goes_in_place() {
    for seed in 1..10 {
        let config = Sim { seed, ..SLOW };
        let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, config);
        over.io.block_on(async {
            over.write(0, &noise(2, 4096)).await;
            over.flush().await.expect("flush");
            over.write(65536, &noise(2, 4096)).await;
        });
        over.written();
        let mut flush = pin!(over.flush());
        let filling = Cell::new(false);
        poll_until(&over.io, flush.as_mut(), 1000, || {
            filling.set(filling.get() || !over.written().is_empty());
            filling.get()
        });
        let data = noise(3, 4096);
        let write = pin!(over.write(65536 + 8192, &data));
        over.io.block_on(join_all(vec![
            Box::pin(async { flush.await.expect("flush") }) as Pin<Box<dyn Future<Output = ()>>>,
            Box::pin(write),
        ]));
        over.finish("met");
    }
}

#[test]
fn a_discard_of_an_incomplete_cluster_waits_for_its_writer_and_frees_both_clusters() {
    for (seed, unmap) in [(1, None), (2, Some(true)), (3, Some(false))] {
        let config = Sim { seed, ..SLOW };
        let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, config);
        over.io.block_on(over.write(65536, &noise(2, 4096)));
        over.written();
        let data = noise(3, 4096);
        let mut slow = pin!(over.write(65536 + 8192, &data));
        let begun = Cell::new(false);
        poll_until(&over.io, slow.as_mut(), 1000, || {
            begun.set(begun.get() || over.written().contains(&4096));
            begun.get()
        });
        let (io, base) = (&over.io, &over.base);
        let mut discard = pin!(async {
            let _pin = io.pin();
            match unmap {
                None => over.image.discard(io, 65536, 65536).await,
                Some(unmap) => {
                    let zeroes = over.image.write_zeroes(io, base, 65536, 65536, unmap);
                    zeroes.await
                }
            }
        });
        poll_until(io, discard.as_mut(), 100, || false);
        io.block_on(slow);
        io.block_on(discard).expect("discard");
        assert_eq!(over.image.records.len(), 0);
        over.model.borrow_mut()[65536..131_072].fill(0);
        over.finish("discarded");
    }
}

#[test]
fn zeros_in_an_incomplete_cluster_are_written_as_data_is() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(65536, &noise(2, 4096)).await;
        let zeroes = over
            .image
            .write_zeroes(&over.io, &over.base, 65536 + 2048, 8192, false);
        zeroes.await.expect("zeroes");
        over.model.borrow_mut()[65536 + 2048..][..8192].fill(0);
        assert_eq!(over.image.records.len(), 1);
        over.check("zeros").await;
    });
    over.finish("zeros");
}

/// Writers with sectors of their own in shared clusters, a flusher, somebody who fills ahead, and readers,
/// who see each sector as it was or as it became, and nothing else.
fn crowd(seed: u64, cluster: u64) {
    let config = Sim {
        seed,
        delay: 8,
        pieces: true,
        discard_garbage: true,
        promises_zeros: seed % 3 != 0,
        torn_failures: false,
    };
    let size = 16 * cluster.max(16384);
    let over = Rc::new(Over::new(
        cluster,
        noise(seed, size as usize - 700),
        size,
        config,
    ));
    let history = Rc::new(History::new(over.model.borrow().clone()));
    let running = Rc::new(Cell::new(0));
    let sectors = size / 512;
    let spawn = |task: Pin<Box<dyn Future<Output = ()>>>| {
        running.set(running.get() + 1);
        let running = running.clone();
        over.io.spawn(async move {
            task.await;
            running.set(running.get() - 1);
        });
    };
    for task in 0..5u64 {
        let (over, history) = (over.clone(), history.clone());
        spawn(Box::pin(async move {
            let mut state = seed * 100 + task + 1;
            for step in 0..60 {
                let first = (random(&mut state) % (sectors / 20) * 5 + task) * 4;
                let (first, count) = (first + random(&mut state) % 4, 1);
                let tag = task << 32 | (step + 1);
                history.begin(first, count, Version::Written(tag));
                over.write(first * 512, &run_bytes(first, count, tag)).await;
                history.complete(first, count);
            }
        }));
    }
    for task in 0..2u64 {
        let over = over.clone();
        spawn(Box::pin(async move {
            for _ in 0..20 {
                match task {
                    0 => over.flush().await.expect("flush"),
                    _ => {
                        let older = over.image.fill_older(&over.io, &over.base, Duration::ZERO);
                        older.await.expect("fill");
                    }
                }
                over.io.yield_now().await;
            }
        }));
    }
    for task in 0..3u64 {
        let (over, history) = (over.clone(), history.clone());
        spawn(Box::pin(async move {
            let mut state = seed * 1000 + task + 1;
            for _ in 0..60 {
                let first = random(&mut state) % (sectors - 32);
                let point = history.flush_begins();
                let got = over.read(first * 512, 32 * 512).await;
                history.check_read(first as usize, &got, &point, &format!("seed {seed}"));
            }
        }));
    }
    over.io.block_on(async {
        while running.get() > 0 {
            over.io.yield_now().await;
        }
    });
    over.finish(&format!("crowd {seed}"));
}

#[test]
fn readers_see_each_sector_of_an_incomplete_cluster_as_it_was_or_became() {
    for seed in 1..20 {
        crowd(seed, [4096, 16384, 65536][seed as usize % 3]);
    }
}
