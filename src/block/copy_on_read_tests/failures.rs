//! Copies that cannot be read, stored, or made durable.

use super::super::sim::{Kind, Sim};
use super::*;

#[test]
fn a_full_file_system_is_not_the_guests_error() {
    for kind in KINDS {
        let size = 4 << 20;
        let over = Over::new(kind, pattern(size, 1), size);
        the_sim(&over.top).full_at(the_sim(&over.top).image().len() as u64);
        over.check(0, 65536);
        over.settle();
        let failed = over.disk.copy_stats();
        // A read of several pieces makes several copies.
        assert!((1..=2).contains(&failed.failed), "{kind}: {failed}");
        for offset in (65536..size).step_by(65536) {
            over.check(offset, 65536);
            over.settle();
        }
        assert_eq!(
            over.disk.copy_stats(),
            failed,
            "{kind}: it is asked for space again"
        );
        assert_eq!(failed.stored_bytes, 0, "{kind}");
        the_sim(&over.top).heal();
        the_sim(&over.top).full_at(u64::MAX);
        over.check(0, 65536);
        over.settle();
        assert_eq!(over.disk.copy_stats(), failed, "{kind}: not yet");
        over.disk.end_copy_pause();
        over.check(0, 65536);
        over.settle();
        assert_eq!(over.disk.copy_stats().stored_bytes, 65536, "{kind}");
        over.finish(kind);
    }
}

#[test]
fn a_base_that_fails_is_the_guests_error_only_where_the_guest_reads() {
    let size = 1 << 20;
    let over = Over::new("cluster_size=64k", pattern(size, 1), size);
    // The second read of the base is the rest of the cluster.
    the_sim(&over.base).fail(Kind::Read, 2, libc::EIO, true);
    over.check(4096, 4096);
    over.settle();
    assert_eq!(over.disk.copy_stats().failed, 1);
    let error = over.io.block_on(async {
        let mut buf = over.io.buf(4096);
        over.disk.read(&over.io, 131_072, buf.sg()).await
    });
    error.expect_err("the base can not be read");
    the_sim(&over.base).heal();
    over.finish("a failing base");
}

#[test]
fn a_write_that_fails_stores_nothing() {
    for kind in KINDS {
        for nth in 1..12 {
            let size = 1 << 20;
            let config = Sim {
                delay: 4,
                torn_failures: true,
                ..Sim::default()
            };
            let over = Over::with(kind, pattern(size, 1), size, &config, true);
            the_sim(&over.top).fail(Kind::Any, nth, libc::EIO, false);
            for offset in (0..size).step_by(65536) {
                let got = over.io.block_on(async {
                    let mut buf = over.io.buf(65536);
                    let read = over.disk.read(&over.io, offset as u64, buf.sg()).await;
                    read.map(|()| buf.to_vec())
                });
                // Looking for mappings reads the overlay for the guest, too.
                if let Ok(got) = got {
                    assert!(got == over.model[offset..offset + 65536], "{kind} {nth}");
                }
                over.settle();
                over.disk.end_copy_pause();
            }
            the_sim(&over.top).heal();
            over.finish(&format!("{kind} {nth}"));
        }
    }
}

#[test]
fn a_power_loss_at_any_step_of_a_flush_loses_copies_at_most() {
    for kind in KINDS {
        for steps in 0..5 {
            let size = 512 << 10;
            let mut base = pattern(size, 1);
            base[100_000..200_000].fill(0);
            let over = Over::new(kind, base, size);
            over.check(0, 4096);
            over.settle();
            let flushed = over.io.block_on(over.disk.flush(&over.io));
            flushed.expect("flush");
            over.check(0, size);
            over.settle();
            the_sim(&over.top).cut_power_after(steps);
            let _cut = over.io.block_on(over.disk.flush(&over.io));
            for seed in 1..=4 {
                // All that reached the file and some of it; the mapping without the data above all.
                let bytes = the_sim(&over.top).crash(seed);
                std::fs::write(over.path("a"), bytes).expect("image");
                let (file, raw) = (over.path("a"), over.path("raw"));
                let (file, raw) = (file.display().to_string(), raw.display().to_string());
                run("qemu-img", &["convert", "-O", "raw", &file, &raw]);
                let got = std::fs::read(raw).expect("raw");
                assert!(got == over.model, "{kind}, {steps} steps, {seed}");
            }
        }
    }
}
