use super::*;

/// Options that cover every refcount width, and the smallest and largest clusters.
const SHAPES: [&str; 10] = [
    "cluster_size=512,refcount_bits=1",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4096,refcount_bits=2",
    "cluster_size=4096,refcount_bits=4",
    "cluster_size=8192,refcount_bits=8",
    "cluster_size=65536,refcount_bits=16",
    "cluster_size=65536,refcount_bits=32",
    "cluster_size=512,refcount_bits=16",
    "cluster_size=512,compat=0.10",
    "cluster_size=2M,refcount_bits=1",
];

#[test]
fn what_is_taken_counts_and_what_is_freed_is_given_back_at_the_end() {
    for options in SHAPES {
        let io = reactor();
        let before = image(options, 64 << 20);
        let storage = sim(before.clone(), Sim::default());
        io.block_on(async {
            let allocator = open(&io, &storage, 0).await.unwrap();
            let mut books = Books::default();
            let count = (4 << 20 >> allocator.cluster_bits).clamp(2, 1500);
            let runs = take(&allocator, &io, count).await.unwrap();
            runs.iter().for_each(|run| books.take(run.0, run.1));
            let durable = simulated(&storage).crash_with(|_, _| 0);
            let counts = Counts::of(&durable);
            for cluster in books.0.keys() {
                assert_eq!(counts.get(*cluster), 1, "{options}: {cluster}");
                assert_eq!(
                    allocator
                        .refcount(&io, HostCluster(*cluster))
                        .await
                        .unwrap(),
                    1
                );
            }
            let judged = judge(&simulated(&storage).image());
            assert_eq!(judged.errors, 0, "{options}");
            assert!(judged.leaks >= count, "{options}: {judged:?}");

            free_and_settle(&allocator, &io, &runs).await.unwrap();
            assert_eq!(allocator.in_limbo(), 0, "{options}");
            allocator.close(&io).await.unwrap();
        });
        let after = simulated(&storage).image();
        let clean = Judged {
            errors: 0,
            leaks: 0,
        };
        assert_eq!(judge(&after), clean, "{options}");
        io.close();
    }
}

#[test]
fn an_image_nobody_wrote_to_is_left_as_it_was() {
    let io = reactor();
    let before = image("cluster_size=64k", 1 << 30);
    let storage = sim(before.clone(), Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        allocator.close(&io).await.unwrap();
    });
    assert!(simulated(&storage).image() == before);
    io.close();
}

#[test]
fn the_unused_rest_of_an_arena_is_given_back_and_cut_off() {
    let io = reactor();
    let before = image("cluster_size=64k", 1 << 30);
    let storage = sim(before.clone(), Sim::default());
    io.block_on(async {
        let allocator = open(&io, &storage, 0).await.unwrap();
        drop(allocator.allocate(&io, 1).await.unwrap());
        assert!(storage.len() > before.len() as u64);
        allocator.close(&io).await.unwrap();
        let error = allocator.allocate(&io, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAllowed);
    });
    let after = simulated(&storage).image();
    assert_eq!(
        judge(&after),
        Judged {
            errors: 0,
            leaks: 0
        }
    );
    assert_eq!(after.len(), before.len().next_multiple_of(65536));
    io.close();
}
