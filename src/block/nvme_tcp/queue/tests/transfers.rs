//! Bytes get where they belong, whatever the namespace and the controller are like.

use super::all;
use super::peer::Command;
use super::rig::{MIB, Rig, Setup, pattern};
use crate::block::ErrorKind;
use crate::reactor::Sg;

fn read(rig: &Rig, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = rig.io.buf(len);
    buf.fill(0xaa);
    rig.io
        .block_on(rig.storage().read(&rig.io, offset, buf.sg()))
        .unwrap();
    buf.to_vec()
}

fn write(rig: &Rig, offset: u64, bytes: &[u8]) {
    let mut buf = rig.io.buf(bytes.len());
    buf.copy_from_slice(bytes);
    rig.io
        .block_on(rig.storage().write(&rig.io, offset, buf.sg()))
        .unwrap();
}

fn expected(range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(pattern).collect()
}

fn sixty_four_at_once(setup: Setup) {
    const LEN: usize = 24 << 10;
    let rig = Rig::new(setup);
    rig.fill();
    rig.io.block_on(async {
        let mut reads: Vec<_> = (0..64).map(|_| rig.io.buf(LEN)).collect();
        let mut writes: Vec<_> = (0..64).map(|_| rig.io.buf(LEN)).collect();
        let half = 2 * MIB as u64;
        let places: Vec<u64> = (0..64).map(|n| n * LEN as u64).collect();
        for (buf, place) in writes.iter_mut().zip(&places) {
            buf.fill((place / LEN as u64) as u8 + 1);
        }
        let pending: Vec<_> = reads
            .iter_mut()
            .zip(&mut writes)
            .zip(&places)
            .flat_map(|((to, from), place)| {
                [
                    rig.storage().begin_read(&rig.io, *place, to.sg()),
                    rig.storage().begin_write(&rig.io, half + *place, from.sg()),
                ]
            })
            .collect();
        for done in all(pending.into_iter().map(|one| one.finish(&rig.io))).await {
            done.unwrap();
        }
        for (buf, place) in reads.iter().zip(&places) {
            assert!(**buf == *expected(*place..place + LEN as u64), "{place:#x}");
        }
    });
    rig.peer().with_disk(|disk| {
        for n in 0..64 {
            let at = 2 * MIB + n * LEN;
            assert!(disk[at..at + LEN].iter().all(|b| *b == n as u8 + 1), "{n}");
        }
    });
}

#[test]
fn sixty_four_reads_and_writes_at_once_get_their_own_bytes() {
    sixty_four_at_once(Setup::default());
}

#[test]
fn so_they_do_with_header_digests_data_digests_and_both() {
    sixty_four_at_once(Setup::default().digests(true, false));
    sixty_four_at_once(Setup::default().digests(false, true));
    sixty_four_at_once(Setup::default().digests(true, true));
}

#[test]
fn so_they_do_where_everything_goes_in_capsules() {
    let mut setup = Setup::default();
    setup.params.in_capsule = 32 << 10;
    sixty_four_at_once(setup);
}

#[test]
fn so_they_do_on_a_queue_of_two() {
    let mut setup = Setup::default();
    setup.params.depth = 2;
    sixty_four_at_once(setup);
}

#[test]
fn so_they_do_where_data_come_in_small_pdus_and_requests_are_cut() {
    let mut setup = Setup::default();
    setup.peer.pdu = 1000;
    setup.limits.max_transfer = 4096;
    sixty_four_at_once(setup);
}

#[test]
fn so_they_do_through_tls_with_keys_that_change() {
    for digests in [false, true] {
        sixty_four_at_once(Setup {
            tls: true,
            ..Setup::default().digests(digests, digests)
        });
    }
}

/// What was asked for, in bytes, and in order of the offsets.
fn ranges(commands: &[Command], opcode: u8) -> Vec<(u64, usize)> {
    let its = commands.iter().filter(|c| c.opcode() == opcode);
    let mut all: Vec<_> = its.map(|c| (c.slba() * 512, c.blocks() * 512)).collect();
    all.sort_unstable();
    all
}

#[test]
fn requests_are_cut_at_the_largest_transfer_and_at_the_boundary() {
    let mut setup = Setup::default();
    setup.limits.max_transfer = 96 << 10;
    setup.boundary = 128 << 10;
    let rig = Rig::new(setup);
    rig.fill();
    let (k, start) = (1 << 10, 100 << 10);
    assert!(read(&rig, start, 300 << 10) == expected(start..start + (300 << 10)));
    let want = [
        (100 * k, 28 << 10),
        (128 * k, 96 << 10),
        (224 * k, 32 << 10),
        (256 * k, 96 << 10),
        (352 * k, 32 << 10),
        (384 * k, 16 << 10),
    ];
    assert_eq!(ranges(&rig.peer().seen(), 2), want);
}

#[test]
fn a_scatter_list_is_cut_in_the_middle_of_its_pieces() {
    let mut setup = Setup::default();
    setup.limits.max_transfer = 4096;
    let rig = Rig::new(setup);
    let mut parts = [vec![1u8; 100], vec![2; 5000], vec![3; 12288 - 5100]];
    let list: Vec<libc::iovec> = parts
        .iter_mut()
        .map(|part| libc::iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        })
        .collect();
    // SAFETY: the vectors outlive the list and are not touched meanwhile.
    let sg = unsafe { Sg::new(&list) };
    rig.io
        .block_on(rig.storage().write(&rig.io, 8192, sg))
        .unwrap();
    let all = parts.concat();
    rig.peer()
        .with_disk(|disk| assert!(disk[8192..8192 + 12288] == all));
    assert_eq!(ranges(&rig.peer().seen(), 1).len(), 3);
}

#[test]
fn parts_of_blocks_are_read_and_written_with_what_stands_around_them() {
    let rig = Rig::new(Setup::default().block(4096));
    rig.fill();
    for (offset, len) in [(512, 512), (4096, 4096), (3584, 1024), (1, 9000), (4095, 2)] {
        let end = offset + len as u64;
        assert!(read(&rig, offset, len) == expected(offset..end), "{offset}");
    }
    // Neighbours in one block, at the same time.
    rig.io.block_on(async {
        let mut bufs: Vec<_> = (0..24).map(|_| rig.io.buf(512)).collect();
        let writes = bufs.iter_mut().enumerate().map(|(n, buf)| {
            buf.fill(n as u8);
            let offset = (20 << 10) + 512 * n as u64;
            rig.storage().write(&rig.io, offset, buf.sg())
        });
        for done in all(writes).await {
            done.unwrap();
        }
    });
    write(&rig, 100, &[7; 10_000]);
    rig.peer().with_disk(|disk| {
        for n in 0..24 {
            let at = (20 << 10) + 512 * n;
            assert!(disk[at..at + 512].iter().all(|b| *b == n as u8), "{n}");
        }
        assert!(disk[..100] == expected(0..100) && disk[100..10_100] == [7; 10_000]);
        assert!(disk[10_100..20 << 10] == expected(10_100..20 << 10));
    });
    for command in rig.peer().seen() {
        assert!(command.slba() < (4 * MIB / 4096) as u64);
    }
}

#[test]
fn past_the_end_are_zeros_and_no_write() {
    let rig = Rig::new(Setup::default());
    rig.fill();
    let end = 4 * MIB as u64;
    let mut want = expected(end - 4096..end);
    want.resize(8192, 0);
    assert!(read(&rig, end - 4096, 8192) == want);
    assert!(read(&rig, end + 512, 1000) == [0; 1000]);
    let mut buf = rig.io.buf(8192);
    let write = rig.storage().write(&rig.io, end - 4096, buf.sg());
    let error = rig.io.block_on(write).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
    assert_eq!(ranges(&rig.peer().seen(), 1), []);
}

#[test]
fn a_flush_is_sent_where_there_is_a_volatile_write_cache_and_nowhere_else() {
    for cache in [true, false] {
        let mut setup = Setup::default();
        setup.limits.volatile_write_cache = cache;
        let rig = Rig::new(setup);
        rig.io.block_on(rig.storage().flush(&rig.io)).unwrap();
        let flushes = rig.peer().seen().iter().filter(|c| c.opcode() == 0).count();
        assert_eq!(flushes, usize::from(cache));
    }
}

#[test]
fn zeros_are_written_by_command_in_parts_that_the_controller_takes() {
    let mut setup = Setup::default().block(4096);
    setup.limits.max_write_zeroes = Some(8192);
    let rig = Rig::new(setup);
    rig.fill();
    let zeroes = |from: u64, len| rig.storage().write_zeroes(&rig.io, from, len, true);
    rig.io.block_on(zeroes(1000, 30_000)).unwrap();
    let mut want = expected(0..65_536);
    want[1000..31_000].fill(0);
    rig.peer().with_disk(|disk| assert!(disk[..65_536] == want));
    let commands = rig.peer().seen();
    let zeroes: Vec<_> = commands.iter().filter(|c| c.opcode() == 8).collect();
    assert_eq!(zeroes.len(), 3, "4096 to 28672");
    let deallocates = |c: &&Command| c.sqe[51] & 2 != 0;
    assert!(zeroes.iter().all(deallocates));
}

#[test]
fn zeros_are_written_as_data_where_there_is_no_command() {
    let mut setup = Setup::default();
    setup.limits.max_write_zeroes = None;
    let rig = Rig::new(setup);
    rig.fill();
    let zeroes = rig.storage().write_zeroes(&rig.io, 512, 3 << 20, false);
    rig.io.block_on(zeroes).unwrap();
    rig.peer().with_disk(|disk| {
        assert!(disk[512..512 + (3 << 20)].iter().all(|b| *b == 0));
        assert_eq!(disk[511], pattern(511));
        assert_eq!(disk[512 + (3 << 20)], pattern(512 + (3 << 20)));
    });
}

#[test]
fn a_discard_takes_whole_grains_in_ranges_that_the_controller_takes() {
    let mut setup = Setup {
        discard_granularity: 4096,
        ..Setup::default()
    };
    setup.limits.max_discard_ranges = 2;
    setup.limits.max_discard_range_blocks = 16;
    setup.limits.max_discard_blocks = 24;
    let rig = Rig::new(setup);
    rig.io
        .block_on(rig.storage().discard(&rig.io, 1000, 40_000))
        .unwrap();
    // From 4096 to 40960: 72 blocks, 24 a command.
    let commands = rig.peer().seen();
    assert_eq!(commands.iter().filter(|c| c.opcode() == 9).count(), 3);
    rig.peer().with_disk(|disk| {
        for (at, byte) in disk.iter().enumerate().take(65_536) {
            let discarded = (4096..40_960).contains(&at);
            assert_eq!(*byte, if discarded { 0xdd } else { 0 }, "{at}");
        }
    });
    let mut setup = Setup::default();
    setup.limits.discards = false;
    let rig = Rig::new(setup);
    rig.io
        .block_on(rig.storage().discard(&rig.io, 0, 65_536))
        .unwrap();
    assert!(rig.peer().seen().is_empty());
}

#[test]
fn a_namespace_is_not_resized_from_here() {
    let rig = Rig::new(Setup::default());
    let set = |len| rig.io.block_on(rig.storage().set_len(&rig.io, len));
    assert!(set(4 * MIB as u64).is_ok());
    let error = set(5 * MIB as u64).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("at the target"), "{error}");
}

#[test]
fn what_a_namespace_has_lost_by_shrinking_is_an_error_and_what_never_was_there_is_zeros() {
    let rig = Rig::new(Setup::default().block(4096));
    rig.fill();
    let (whole, half) = (4 * MIB as u64, 2 * MIB as u64);
    let ends = |offset: u64, len: usize| {
        let mut buf = rig.io.buf(len);
        let read = rig.storage().read(&rig.io, offset, buf.sg());
        rig.io.block_on(read).map(|()| buf.to_vec())
    };
    assert!(read(&rig, whole, 8192).iter().all(|byte| *byte == 0));
    rig.namespace.set_bytes(half);
    // Of whole blocks and in parts of them; across the end, behind it, and across the end that there was.
    for (offset, len, first) in [
        (half - 4096, 8192, half),
        (half - 512, 1024, half),
        (half, 4096, half),
        (half + 512, 512, half + 512),
        (whole - 4096, 8192, whole - 4096),
        (whole - 512, 1024, whole - 512),
    ] {
        let error = ends(offset, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfRange, "{error}");
        assert_eq!(error.offset(), Some(first), "{error}");
        assert!(error.to_string().contains("has shrunk"), "{error}");
    }
    assert!(read(&rig, half - 4096, 4096) == expected(half - 4096..half));
    assert!(read(&rig, whole, 4096).iter().all(|byte| *byte == 0));
    assert!(read(&rig, whole, 512).iter().all(|byte| *byte == 0));
    // It heals.
    rig.namespace.set_bytes(whole);
    assert!(read(&rig, half - 512, 1024) == expected(half - 512..half + 512));
}
