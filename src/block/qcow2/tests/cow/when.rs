//! When what was put off is done, and which writes put nothing off.

use super::*;

#[test]
fn a_flush_makes_durable_what_was_incomplete_and_before_it_nothing_changes() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, SLOW);
    over.io.block_on(async {
        over.write(65536 + 4096, &noise(2, 8192)).await;
        over.write(200_704, &noise(3, 65536)).await;
        over.check("incomplete").await;
        for all in [false, true] {
            assert_same(&over.after_power_loss(all), &over.base.bytes, "not flushed");
        }
        // Metadata is written back without completing anything: of the same slice a whole cluster.
        let whole = noise(5, 65536);
        over.write(524_288, &whole).await;
        over.image.write_back(&over.io).await.expect("write back");
        assert!(over.image.records.len() > 1);
        let mut want = over.base.bytes.clone();
        want[524_288..][..65536].copy_from_slice(&whole);
        assert_same(&over.after_power_loss(false), &want, "the old entries");
        over.write(65536, &noise(4, 512)).await;
        over.check("incomplete").await;
        over.flush().await.expect("flush");
        let durable = over.after_power_loss(false);
        assert_same(&durable, &over.model.borrow(), "flushed");
    });
    over.finish("flushed");
}

#[test]
fn what_is_incomplete_for_long_is_completed_by_the_timer() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        let (io, base) = (&over.io, &over.base);
        over.image.flush(io, base).await.expect("flush");
        over.write(65536, &noise(2, 4096)).await;
        let hour = Duration::from_secs(3600);
        let due = over.image.write_back_older(io, base, hour);
        due.await.expect("write back");
        assert_eq!(over.image.records.len(), 1, "not due");
        let due = over.image.write_back_older(io, base, Duration::ZERO);
        due.await.expect("write back");
        assert_eq!(over.image.records.len(), 0);
    });
    over.finish("age");
}

#[test]
fn when_there_is_no_record_left_a_write_copies_at_once() {
    let options = Options {
        l2_cache_bytes: 512 << 10,
        ..WRITE
    };
    // Who writes to each second cluster is not followed; who writes one after the other is.
    for (apart, is_lone) in [(8192, true), (4096, false)] {
        let over = Over::with(4096, noise(1, 4 << 20), 4 << 20, Sim::default(), options);
        over.io.block_on(async {
            let records = &over.image.records;
            assert!(records.lone_limit() > 1 && records.lone_limit() * 4 < records.limit());
            let limit = match is_lone {
                true => records.lone_limit() as u64,
                false => records.limit() as u64,
            };
            for n in 0..limit + 5 {
                assert_eq!(over.base.bytes_read() > 0, n > limit, "{n}");
                over.write(n * apart + 512, &noise(n, 512)).await;
            }
            assert_eq!(records.len() as u64, limit);
            over.check("full").await;
        });
        over.finish("full");
    }
}

#[test]
fn a_stream_among_lone_writes_is_found_and_copies_one_cluster_at_most() {
    let over = Over::new(65536, noise(1, 32 << 20), 32 << 20, Sim::default());
    over.io.block_on(async {
        let mut lone = (0..120).map(|n| (16 << 20) + n * 131_072);
        for at in lone.by_ref().take(60) {
            over.write(at, &noise(at, 4096)).await;
        }
        // Eight clusters, one write each in turn with a lone one.
        let before: u32 = over.base.sectors.borrow()[..32768].iter().sum();
        for n in 0..8 * 16 {
            over.write(n * 4096, &noise(n, 4096)).await;
            if let Some(at) = lone.next() {
                over.write(at, &noise(at, 4096)).await;
            }
        }
        let read: u32 = over.base.sectors.borrow()[..32768].iter().sum();
        assert!(read - before <= 128, "{} sectors", read - before);
    });
    over.finish("stream");
}

#[test]
fn many_records_ask_for_being_made_fewer() {
    let options = Options {
        l2_cache_bytes: 512 << 10,
        ..WRITE
    };
    for (apart, is_lone) in [(8192, true), (4096, false)] {
        let over = Over::with(4096, noise(1, 4 << 20), 4 << 20, Sim::default(), options);
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        over.image.when_scarce(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        over.io.block_on(async {
            let limit = match is_lone {
                true => over.image.records.lone_limit() as u64,
                false => over.image.records.limit() as u64,
            };
            let at = |n: u64| (1 << 20) + n * apart + 512;
            for n in 0..limit / 2 {
                over.write(at(n), &noise(n, 512)).await;
            }
            over.image.fill_ahead(&over.io, &over.base).await;
            assert_eq!(over.image.records.len() as u64, limit / 2, "not scarce");
            assert_eq!(asked.load(Ordering::Relaxed), 0);
            over.write(at(limit / 2 - 1) + apart, &noise(1, 512)).await;
            assert_eq!(asked.load(Ordering::Relaxed), 1);
            over.image.fill_ahead(&over.io, &over.base).await;
            let left = over.image.records.len() as u64;
            assert!(left <= limit / 4 + 1, "{left} of {limit}");
            over.check("fewer").await;
            // The latest is among those that stay.
            let clusters = over.image.records.list(Duration::ZERO);
            let latest = (at(limit / 2 - 1) + apart) / 4096;
            assert_eq!(clusters.last(), Some(&GuestCluster(latest)));
        });
        over.finish("fewer");
    }
}

#[test]
fn an_eager_image_copies_at_once_and_has_completed_what_was_put_off() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        assert_eq!(over.image.records.len(), 1);
        let (io, base) = (&over.io, &over.base);
        over.image.set_eager(io, base, true).await.expect("eager");
        assert_eq!(over.image.records.len(), 0);
        over.write(131_072, &noise(2, 4096)).await;
        assert_eq!(over.image.records.len(), 0);
        over.image.set_eager(io, base, false).await.expect("lazy");
        over.write(262_144, &noise(2, 4096)).await;
        assert_eq!(over.image.records.len(), 1);
    });
    over.finish("eager");
}

#[test]
fn a_write_of_less_than_sectors_completes_the_cluster_first() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        over.write(4000, &noise(3, 200)).await;
        assert_eq!(over.image.records.len(), 0);
        over.write(131_172, &noise(3, 1000)).await;
        over.check("odd").await;
    });
    over.finish("odd");
}
