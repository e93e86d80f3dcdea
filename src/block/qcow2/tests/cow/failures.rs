//! Copies that fail, and copies that are dropped half-way.

use super::*;

#[test]
fn a_fill_that_fails_fails_the_flush_and_the_next_one_tries_again() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        over.write(65536 + 4096, &noise(3, 4096)).await;
        over.base.broken.set(true);
        over.flush().await.expect_err("nothing to copy from");
        over.base.broken.set(false);
        over.check("as incomplete as before").await;
        assert_eq!(over.image.records.len(), 2);
        // Half-way through what is written.
        over.sim().fail(Kind::Write, 1, libc::ENOSPC, false);
        over.flush().await.expect_err("no space");
        over.check("as incomplete as before").await;
        over.write(65536, &noise(4, 8192)).await;
        over.flush().await.expect("flush");
        let durable = over.after_power_loss(false);
        assert_same(&durable, &over.model.borrow(), "flushed");
    });
    over.finish("failed once");
}

#[test]
fn a_cluster_that_can_not_be_completed_keeps_nothing_else_back() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(4096, &noise(2, 4096)).await;
        // A whole cluster, which needs nothing from below.
        over.write(3 * 65536, &noise(3, 65536)).await;
        over.base.broken.set(true);
        over.flush().await.expect_err("nothing to copy from");
        let durable = over.after_power_loss(false);
        assert_same(
            &durable[3 * 65536..4 * 65536],
            &noise(3, 65536),
            "its mapping went to the file all the same",
        );
        over.base.broken.set(false);
    });
    over.finish("could not be completed once");
}

#[test]
fn a_failed_write_to_an_incomplete_cluster_shows_the_old_content() {
    let over = Over::new(65536, noise(1, 1 << 20), 1 << 20, Sim::default());
    over.io.block_on(async {
        over.write(0, &noise(2, 4096)).await;
        for at in [131_072, 8192] {
            over.sim().fail(Kind::Write, 1, libc::EIO, false);
            over.try_write(at, &noise(2, 4096))
                .await
                .expect_err("failed");
            over.check("the old content").await;
        }
        // With a whole cluster between two that are not.
        over.sim().fail(Kind::Write, 1, libc::EIO, false);
        let failed = over.try_write(262_144 + 4096, &noise(2, 3 * 65536)).await;
        failed.expect_err("failed");
        over.check("the old content").await;
    });
    over.finish("failed");
}

#[test]
fn a_request_that_is_dropped_while_it_copies_leaves_the_cluster_to_others() {
    for turns in 0..80 {
        let config = Sim {
            seed: turns,
            delay: 6,
            pieces: true,
            ..Sim::default()
        };
        let over = Rc::new(Over::new(4096, noise(1, 1 << 18), 1 << 18, config));
        let task = over.clone();
        let dropped = over.io.spawn(async move {
            match turns % 2 {
                0 => task.write(512, &noise(2, 16384)).await,
                _ => {
                    task.write(512, &noise(2, 1024)).await;
                    task.flush().await.expect("flush");
                }
            }
        });
        over.io.block_on(async {
            for _ in 0..turns {
                over.io.yield_now().await;
            }
        });
        over.io.remove(dropped);
        over.io.block_on(async {
            over.write(512, &noise(turns, 16384)).await;
            over.check("the second write").await;
        });
        over.finish("dropped");
    }
}
