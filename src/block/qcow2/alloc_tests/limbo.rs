//! When freed clusters may be used again.

use super::*;

/// Frees everything of a small image in an order, and says which clusters come up again.
fn freed_again(cut: impl AsyncFn(&Io, &Arc<Allocator>, HostCluster)) -> bool {
    let epochs = Epochs::new();
    let io = reactor_of(&epochs, 0);
    let storage = sim(image("cluster_size=4096", 8 << 20), Sim::default());
    let again = io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let victim = take(&allocator, &io, 1).await.unwrap()[0].0;
        cut(&io, &allocator, victim).await;
        let runs = take(&allocator, &io, 600).await.unwrap();
        runs.iter()
            .any(|run| (run.0.0..run.0.0 + run.1).contains(&victim.0))
    });
    io.close();
    again
}

#[test]
fn a_freed_cluster_is_used_again_only_after_the_flush_that_unlinks_it() {
    assert!(!freed_again(async |io, allocator, victim| {
        allocator.free(io, victim, 1);
    }));
    assert!(!freed_again(async |io, allocator, victim| {
        let mark = allocator.mark();
        allocator.free(io, victim, 1);
        io.yield_now().await;
        allocator.settle(io, mark).await.unwrap();
        assert_eq!(allocator.in_limbo(), 1);
        assert_eq!(allocator.refcount(io, victim).await.unwrap(), 1);
    }));
    assert!(freed_again(async |io, allocator, victim| {
        free_and_settle(allocator, io, &[(victim, 1)])
            .await
            .unwrap();
    }));
}

#[test]
fn a_freed_cluster_is_not_used_again_while_an_older_request_runs() {
    assert!(!freed_again(async |io, allocator, victim| {
        let request = io.pin();
        free_and_settle(allocator, io, &[(victim, 1)])
            .await
            .unwrap();
        assert_eq!(allocator.in_limbo(), 1);
        drop(request);
    }));
    assert!(freed_again(async |io, allocator, victim| {
        let request = io.pin();
        free_and_settle(allocator, io, &[(victim, 1)])
            .await
            .unwrap();
        drop(request);
        io.yield_now().await;
        let mark = allocator.mark();
        allocator.settle(io, mark).await.unwrap();
    }));
}

#[test]
fn freed_neighbours_are_discarded_as_one() {
    let io = reactor();
    let storage = sim(image("cluster_size=4096", 8 << 20), Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let (first, count) = allocator.allocate(&io, 8).await.unwrap().keep();
        assert_eq!(count, 8);
        simulated(&storage).take_events();
        let backwards: Vec<_> = (0..8)
            .rev()
            .map(|n| (HostCluster(first.0 + n), 1))
            .collect();
        free_and_settle(&allocator, &io, &backwards).await.unwrap();
        let events = simulated(&storage).take_events();
        let want = crate::block::sim::Event::Discard {
            offset: first.0 * 4096,
            len: 8 * 4096,
        };
        assert!(events.contains(&want), "{events:?}");
        allocator.close(&io).await.unwrap();
    });
    io.close();
}

#[test]
fn a_shared_cluster_loses_one_reference_a_free() {
    let io = reactor();
    let mut bytes = image("cluster_size=4096", 8 << 20);
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    let cluster = 100;
    bytes[block + 200..block + 202].copy_from_slice(&[0, 3]);
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let shared = [(HostCluster(cluster), 1)];
        for left in [2, 1] {
            free_and_settle(&allocator, &io, &shared).await.unwrap();
            let count = allocator.refcount(&io, HostCluster(cluster)).await.unwrap();
            assert_eq!(count, left);
        }
        assert!(
            !simulated(&storage)
                .take_events()
                .iter()
                .any(|e| matches!(e, crate::block::sim::Event::Discard { .. }))
        );
        free_and_settle(&allocator, &io, &shared).await.unwrap();
        // Once too often, alone and with good company.
        let good = take(&allocator, &io, 1).await.unwrap()[0];
        let never = (HostCluster(1500), 1);
        let error = free_and_settle(&allocator, &io, &[good, never])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(allocator.refcount(&io, good.0).await.unwrap(), 0);
        let good = take(&allocator, &io, 1).await.unwrap()[0];
        let error = free_and_settle(&allocator, &io, &[good, good])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(allocator.refcount(&io, good.0).await.unwrap(), 0);
        let l1 = HostCluster(Counts::of(&simulated(&storage).image()).word(40) >> 12);
        let error = free_and_settle(&allocator, &io, &[(l1, 1)])
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert_eq!(allocator.refcount(&io, l1).await.unwrap(), 1);
        allocator.close(&io).await.unwrap();
    });
    assert_eq!(
        judge(&simulated(&storage).image()),
        Judged {
            errors: 0,
            leaks: 0
        }
    );
    io.close();
}

#[test]
fn what_was_freed_after_the_last_flush_stays_allocated_at_the_end() {
    let io = reactor();
    let storage = sim(image("cluster_size=4096", 8 << 20), Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        let runs = take(&allocator, &io, 3).await.unwrap();
        let request = io.pin();
        free_and_settle(&allocator, &io, &runs[..1]).await.unwrap();
        drop(request);
        let late = take(&allocator, &io, 2).await.unwrap();
        late.iter()
            .for_each(|run| allocator.free(&io, run.0, run.1));
        allocator.close(&io).await.unwrap();
        assert_eq!(allocator.in_limbo(), 2);
    });
    assert_eq!(
        judge(&simulated(&storage).image()),
        Judged {
            errors: 0,
            leaks: 2
        }
    );
    io.close();
}
