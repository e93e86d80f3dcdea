//! What becomes one transfer, and what does not.

use super::*;

#[test]
fn a_sequential_batch_of_writes_becomes_one_transfer() {
    for packed in [false, true] {
        for delay in [0, 5] {
            let sim = Sim {
                delay,
                ..Sim::default()
            };
            let mut rig = Rig::with(sim, packed, u32::MAX);
            let served = rig.serve();
            // Nobody knows that the first one has neighbours; every later batch goes on where the last one ended.
            for batch in 0..20 {
                let start = batch * 128;
                for i in 0..32 {
                    rig.write((start + i * 4) * KIB, 4 * KIB);
                }
                let (good, bad) = judged(&rig.run(&served));
                assert_eq!((good.len(), bad.len()), (32, 0));
                match batch {
                    0 => assert_eq!(rig.writes(), [(0, 4), (4, 124)]),
                    _ => assert_eq!(rig.writes(), [(start, 128)]),
                }
            }
            let written = 20 * 128 * KIB;
            assert!(rig.sim().image()[..written as usize] == data_of(0, written));
            assert_eq!(served.stats.requests.get(), 20 * 32, "each is counted");
        }
    }
}

#[test]
fn a_sequential_batch_of_reads_becomes_one_transfer() {
    let disk = pattern();
    for packed in [false, true] {
        let mut rig = Rig::with(Sim::default(), packed, u32::MAX);
        let served = rig.serve();
        for batch in 0..8 {
            let before = rig.sim().operations();
            for i in 0..16 {
                rig.read((batch * 64 + i * 4) * KIB, 4 * KIB);
            }
            rig.guest.ring.publish();
            while served.turn() {}
            for _ in 0..16 {
                let done = rig.guest.poll().unwrap().expect("a completion");
                assert_eq!((done.status, done.used_len), (status::OK, 4097));
                let mut got = vec![0; 4096];
                rig.guest.copy_data(done.slot, &mut got);
                let at = (done.token * 4 * KIB) as usize;
                assert!(got == disk[at..at + 4096], "{}", done.token);
                rig.guest.release(done);
            }
            let operations = rig.sim().operations() - before;
            assert_eq!(operations, if batch == 0 { 2 } else { 1 });
        }
    }
}

/// KiB of writes in a batch that begins with a neighbour at 1024, and of what the disk is to see.
#[test]
fn what_does_not_go_on_is_a_transfer_of_its_own() {
    type Ranges = &'static [(u64, u64)];
    let cases: [(&str, Ranges, Ranges); 12] = [
        ("one", &[(1024, 4)], &[(1024, 4)]),
        ("two", &[(1024, 4), (1028, 4)], &[(1024, 8)]),
        ("a gap", &[(1024, 4), (1032, 4)], &[(1024, 4), (1032, 4)]),
        (
            "a gap between two runs",
            &[(1024, 4), (1028, 4), (1040, 4), (1044, 4), (1048, 4)],
            &[(1024, 8), (1040, 4), (1044, 8)],
        ),
        (
            "the same again",
            &[(1024, 4), (1024, 4), (1028, 4)],
            &[(1024, 4), (1024, 4), (1028, 4)],
        ),
        (
            "overlapping",
            &[(1024, 8), (1028, 8), (1036, 4)],
            &[(1024, 8), (1028, 8), (1036, 4)],
        ),
        (
            "backward",
            &[(1024, 4), (1020, 4), (1016, 4)],
            &[(1024, 4), (1020, 4), (1016, 4)],
        ),
        (
            "two streams in turn",
            &[(1024, 4), (2048, 4), (1028, 4), (2052, 4)],
            &[(1024, 4), (2048, 4), (1028, 4), (2052, 4)],
        ),
        (
            "sizes of all kinds",
            &[(1024, 1), (1025, 32), (1057, 8), (1065, 3)],
            &[(1024, 44)],
        ),
        (
            "one that is too large",
            &[(1024, 4), (1028, 33), (1061, 4), (1065, 4)],
            &[(1024, 4), (1028, 33), (1061, 8)],
        ),
        (
            "a neighbour behind another",
            &[(2048, 4), (1024, 4), (1028, 4)],
            &[(2048, 4), (1024, 4), (1028, 4)],
        ),
        ("none at all", &[(2048, 4)], &[(2048, 4)]),
    ];
    for (what, writes, want) in cases {
        let mut rig = Rig::new(Sim::default());
        let served = rig.serve();
        rig.write_before(&served, 1024 * KIB);
        for (at, len) in writes {
            rig.write(at * KIB, len * KIB);
        }
        let (good, bad) = judged(&rig.run(&served));
        assert_eq!((good.len(), bad.len()), (writes.len(), 0), "{what}");
        // In which order they begin does not count.
        let mut got = rig.writes();
        let mut want = want.to_vec();
        got.sort_unstable();
        want.sort_unstable();
        assert_eq!(got, want, "{what}");
        let image = rig.sim().image();
        for (at, len) in writes {
            let range = (at * KIB) as usize..((at + len) * KIB) as usize;
            assert!(image[range] == data_of(at * KIB, len * KIB), "{what}");
        }
    }
}

#[test]
fn reads_and_writes_do_not_mix() {
    let mut rig = Rig::new(Sim::default());
    let served = rig.serve();
    rig.write_before(&served, 64 * KIB);
    let before = rig.sim().operations();
    // Three of each, in turns, all in a row.
    for i in (64..160).step_by(24) {
        for at in [i, i + 4, i + 8] {
            rig.write(at * KIB, 4 * KIB);
        }
        for at in [i + 12, i + 16, i + 20] {
            rig.read(at * KIB, 4 * KIB);
        }
    }
    let (good, bad) = judged(&rig.run(&served));
    assert_eq!((good.len(), bad.len()), (24, 0));
    // Of a first one nobody knows that it has neighbours, but for that of the batch.
    let writes = rig.writes();
    assert_eq!(
        writes,
        [
            (64, 12),
            (88, 4),
            (92, 8),
            (112, 4),
            (116, 8),
            (136, 4),
            (140, 8)
        ]
    );
    let operations = rig.sim().operations() - before;
    assert_eq!(operations as usize - writes.len(), 4 * 2, "reads");
}

#[test]
fn what_is_no_read_or_write_closes_the_gather_and_is_not_a_part_of_it() {
    let zeroes = [frontend::Segment::new(4000, 8)];
    let others: [(Op<'_>, usize); 4] = [
        (Op::Flush, 1),
        (Op::GetId, 0),
        (Op::Discard(&zeroes), 1),
        (Op::WriteZeroes(&zeroes), 1),
    ];
    for (other, events) in others {
        let mut rig = Rig::new(Sim::default());
        let served = rig.serve();
        rig.write_before(&served, 64 * KIB);
        for i in 0..4 {
            rig.write((64 + 4 * i) * KIB, 4 * KIB);
        }
        rig.submit(other);
        for i in 4..8 {
            rig.write((64 + 4 * i) * KIB, 4 * KIB);
        }
        let (good, bad) = judged(&rig.run(&served));
        assert_eq!((good.len(), bad.len()), (9, 0), "{other:?}");
        let seen = rig.sim().take_events();
        let write = |at, len| Event::Write {
            offset: at * KIB,
            len: len * KIB,
        };
        assert_eq!(seen.first(), Some(&write(64, 16)), "{other:?}: {seen:?}");
        assert_eq!(seen.last(), Some(&write(80, 16)), "{other:?}: {seen:?}");
        assert_eq!(seen.len(), 2 + events, "{other:?}: {seen:?}");
    }
}

#[test]
fn a_request_of_no_bytes_is_not_gathered() {
    let mut rig = Rig::new(Sim::default());
    let served = rig.serve();
    rig.write_before(&served, 64 * KIB);
    rig.write(64 * KIB, 4 * KIB);
    rig.write(68 * KIB, 0);
    rig.write(68 * KIB, 4 * KIB);
    let (good, bad) = judged(&rig.run(&served));
    assert_eq!((good.len(), bad.len()), (3, 0));
    let mut writes = rig.writes();
    writes.sort_unstable();
    assert_eq!(writes, [(64, 4), (68, 0), (68, 4)]);
}

#[test]
fn a_transfer_ends_exactly_at_its_limits() {
    // Bytes of a request, how many, bytes of a piece, and what the disk is to see, in KiB.
    let cases: [(u64, u64, u64, &[u64]); 9] = [
        (4 * KIB, 32, 4096, &[128]),
        (4 * KIB, 33, 4096, &[128, 4]),
        (4 * KIB, 64, 4096, &[128, 128]),
        (4 * KIB, 65, 4096, &[128, 128, 4]),
        (12 * KIB, 11, 4096, &[120, 12]),
        (32 * KIB, 5, 4096, &[128, 32]),
        // 64 pieces are the most of one, and 256 of all.
        (32 * KIB, 5, 512, &[128, 32]),
        (16 * KIB, 9, 512, &[128, 16]),
        (33 * KIB, 3, 4096, &[33, 33, 33]),
    ];
    for (len, count, piece, want) in cases {
        let mut rig = Rig::with(Sim::default(), false, piece as u32);
        let served = rig.serve();
        rig.write_before(&served, 64 * KIB);
        for i in 0..count {
            rig.write(64 * KIB + i * len, len);
        }
        let (good, bad) = judged(&rig.run(&served));
        assert_eq!((good.len() as u64, bad.len()), (count, 0));
        let sizes: Vec<u64> = rig.writes().iter().map(|write| write.1).collect();
        assert_eq!(sizes, want, "{count} of {len} in pieces of {piece}");
        let range = (64 * KIB) as usize..(64 * KIB + len * count) as usize;
        assert!(rig.sim().image()[range] == data_of(64 * KIB, len * count));
    }
}

#[test]
fn requests_that_come_one_by_one_are_not_held_up() {
    let mut rig = Rig::new(Sim::default());
    let served = rig.serve();
    for i in 0..16 {
        rig.write(i * 4 * KIB, 4 * KIB);
        rig.guest.ring.publish();
        // The disk ends what it is asked for at once, and one turn is enough.
        assert!(served.turn());
        let done = rig.guest.poll().unwrap().expect("completed in this turn");
        rig.guest.release(done);
        assert_eq!(rig.writes(), [(i * 4, 4)]);
    }
}

#[test]
fn buffers_of_any_alignment_are_not_gathered() {
    let mut rig = Rig::with(Sim::default(), false, 1000);
    let served = rig.serve();
    rig.write_before(&served, 64 * KIB);
    for i in 0..4 {
        rig.write((64 + 4 * i) * KIB, 4 * KIB);
    }
    let (good, bad) = judged(&rig.run(&served));
    assert_eq!((good.len(), bad.len()), (4, 0));
    assert_eq!(rig.writes(), [(64, 4), (68, 4), (72, 4), (76, 4)]);
}

#[test]
fn a_write_with_more_room_than_for_its_status_leads_nobody() {
    let mut rig = Rig::with(Sim::default(), false, 4096);
    let served = rig.serve();
    rig.write_before(&served, 64 * KIB);
    let data = data_of(64 * KIB, 4 * KIB);
    // The room is behind its data, where a leader's members are put.
    rig.submit(Op::Raw {
        request_type: frontend::blk::request_type::OUT,
        sector: 128,
        out: &data,
        in_len: 100,
    });
    for i in 1..4 {
        rig.write((64 + 4 * i) * KIB, 4 * KIB);
    }
    let (good, bad) = judged(&rig.run(&served));
    assert_eq!((good.len(), bad.len()), (4, 0));
    assert_eq!(rig.writes(), [(64, 4), (68, 12)]);
    let range = (64 * KIB) as usize..(80 * KIB) as usize;
    assert!(rig.sim().image()[range] == data_of(64 * KIB, 16 * KIB));
}

#[test]
fn what_is_in_other_memory_does_not_join() {
    let memory = [(); 2].map(|()| crate::virtio::testing::memory(&[(0, 4096)]));
    let request = |head, memory| Neighbour {
        head,
        command: Command::Read {
            offset: 0,
            len: 4096,
        },
        data: &[],
        memory,
    };
    let gather = Gather::new(true);
    assert!(gather.open(&request(1, &memory[0])));
    let joined = Joined::In {
        after: 1,
        full: false,
    };
    assert_eq!(gather.join(&request(2, &memory[0])), joined);
    assert_eq!(gather.join(&request(3, &memory[1])), Joined::Not);
    assert!(matches!(gather.close(), Some((1, Verdict::Lead))));
    assert!(gather.close().is_none());
    assert!(!Gather::new(false).open(&request(1, &memory[0])), "no use");
}

#[test]
fn runs_of_random_sizes_do_what_a_model_says() {
    for seed in 0..24 {
        let mut random = Random::new(seed);
        let sim = Sim {
            seed,
            delay: (seed % 5) as u32 * 2,
            pieces: seed % 2 == 0,
            ..Sim::default()
        };
        let piece = [4096, 512, 1000][seed as usize % 3];
        let mut rig = Rig::with(sim, seed % 4 > 1, piece);
        let served = rig.serve();
        let mut model = pattern();
        let (mut next, mut transfers, mut requests) = (0, 0, 0);
        for _ in 0..40 {
            // In a batch nothing overlaps.
            let mut touched = std::collections::BTreeMap::new();
            let mut reads = Vec::new();
            for _ in 0..1 + random.below(48) {
                let sectors = match random.below(3) {
                    0 => 1 + random.below(80),
                    _ => 8,
                };
                let len = 512 * sectors;
                if random.below(6) == 0 {
                    next = random.below(DISK / 512) * 512;
                }
                let range = next..next + len;
                next = range.end;
                let before = touched.range(..range.end).next_back();
                if range.end > DISK || before.is_some_and(|(_, end)| *end > range.start) {
                    next = 0;
                    continue;
                }
                touched.insert(range.start, range.end);
                requests += 1;
                if random.below(8) == 0 {
                    reads.push((rig.read(range.start, len), range));
                } else {
                    let at = range.start as usize;
                    let data = random.bytes(len as usize);
                    let sector = range.start / 512;
                    rig.submit(Op::Write {
                        sector,
                        data: &data,
                    });
                    model[at..at + data.len()].copy_from_slice(&data);
                }
            }
            let before = rig.sim().operations();
            rig.guest.ring.publish();
            let mut idle = 0;
            while idle < 64 {
                idle = if served.turn() { 0 } else { idle + 1 };
                while let Some(done) = rig.guest.poll().unwrap() {
                    assert_eq!(done.status, status::OK);
                    if let Some((_, range)) = reads.iter().find(|read| read.0 == done.token) {
                        let range = range.start as usize..range.end as usize;
                        let mut got = vec![0; range.len()];
                        rig.guest.copy_data(done.slot, &mut got);
                        assert!(got == model[range], "seed {seed}");
                    }
                    rig.guest.release(done);
                }
            }
            transfers += rig.sim().operations() - before;
            assert_eq!(served.queue.requests(), 0);
            assert!(rig.sim().image() == model, "seed {seed}");
        }
        // Requests in pieces of 1000 bytes are not joined, unless they are a piece of whole sectors.
        let joined = transfers * 4 < requests * 3;
        assert_eq!(
            joined,
            piece != 1000,
            "seed {seed}: {transfers} of {requests}"
        );
    }
}
