//! Tests of what a storage does with bytes; shared helpers of the room's tests.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use libc::iovec;

use super::sim::{Event, Kind, Sim, SimStorage};
use super::*;
use crate::reactor::{Epochs, Io, IoConfig, Sg};

pub(super) fn io() -> Io {
    Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring")
}

/// A temporary directory on a file system that has O_DIRECT.
pub(super) fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("temporary directory")
}

pub(super) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len).map(|_| sim::random(&mut state) as u8).collect()
}

/// Reads through a buffer of its own.
pub(super) fn read(io: &Io, storage: &Storage, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut buf = io.buf(len);
    buf.fill(0xee);
    io.block_on(async { storage.read(io, offset, buf.sg()).await })?;
    Ok(buf.to_vec())
}

pub(super) fn write(io: &Io, storage: &Storage, offset: u64, data: &[u8]) -> Result<()> {
    let mut buf = io.buf(data.len());
    buf.copy_from_slice(data);
    io.block_on(async { storage.write(io, offset, buf.sg()).await })
}

fn file_with(data: &[u8], direct: bool) -> (tempfile::TempDir, PathBuf, Storage) {
    let dir = dir();
    let path = dir.path().join("a.img");
    std::fs::write(&path, data).unwrap();
    let storage = open(&path, direct);
    (dir, path, storage)
}

fn open(path: &std::path::Path, direct: bool) -> Storage {
    let options = FileOptions {
        read_only: false,
        direct,
    };
    Storage::File(FileStorage::open(path, options).unwrap())
}

fn iovecs(parts: &mut [Vec<u8>]) -> Vec<iovec> {
    parts
        .iter_mut()
        .map(|p| iovec {
            iov_base: p.as_mut_ptr().cast(),
            iov_len: p.len(),
        })
        .collect()
}

#[test]
fn an_aligned_read_is_one_operation() {
    let (_dir, _, storage) = file_with(&pattern(1 << 20, 1), true);
    let Storage::File(file) = &storage else {
        unreachable!()
    };
    assert!(file.direct(), "the test wants a file system with O_DIRECT");
    let io = io();
    read(&io, &storage, 0, 4096).unwrap();
    let before = io.enters();
    read(&io, &storage, 8192, 4096).unwrap();
    // One to submit, at most one to wait.
    assert!(io.enters() - before <= 3, "{}", io.enters() - before);
}

#[test]
fn what_goes_through_the_page_cache_may_need_a_thread_of_the_kernel() {
    for direct in [false, true] {
        let (_dir, _, storage) = file_with(&pattern(4096, 1), direct);
        assert_eq!(storage.ends_by_interrupt(), direct);
    }
}

#[test]
fn reads_past_the_end_of_a_file_of_odd_size_are_zeros() {
    let data = pattern(10_001, 2);
    for direct in [false, true] {
        let (_dir, _, storage) = file_with(&data, direct);
        let io = io();
        for (offset, len) in [
            (0, 16384),
            (8192, 4096),
            (9999, 3),
            (10_001, 1),
            (1 << 40, 512),
        ] {
            let got = read(&io, &storage, offset, len).unwrap();
            let want: Vec<u8> = (offset..offset + len as u64)
                .map(|at| data.get(at as usize).copied().unwrap_or(0))
                .collect();
            assert_eq!(got, want, "direct {direct} offset {offset} len {len}");
        }
    }
}

#[test]
fn misaligned_memory_offset_and_length_are_served_past_the_page_cache() {
    let mut model = pattern(3 << 20, 3);
    let (_dir, path, storage) = file_with(&model, true);
    let io = io();
    let mut rng = 7;
    for round in 0..200u64 {
        let offset = sim::random(&mut rng) % (2 << 20);
        let len = 1 + sim::random(&mut rng) as usize % if round % 10 == 0 { 1 << 20 } else { 9000 };
        let skew = 1 + sim::random(&mut rng) as usize % 64;
        let mut parts = vec![vec![0; skew], pattern(len, round), vec![0; 3]];
        let list = iovecs(&mut parts);
        // SAFETY: `parts` outlives the list and is not touched before the transfers end.
        let sg = unsafe { Sg::new(&list) }.slice(skew, len);
        if round % 3 == 0 {
            io.block_on(async { storage.read(&io, offset, sg).await })
                .unwrap();
            assert_eq!(parts[1], model[offset as usize..][..len]);
        } else {
            io.block_on(async { storage.write(&io, offset, sg).await })
                .unwrap();
            model[offset as usize..][..len].copy_from_slice(&parts[1]);
        }
    }
    assert!(std::fs::read(path).unwrap() == model);
}

#[test]
fn neighbours_in_one_block_do_not_undo_each_other() {
    let (_dir, path, storage) = file_with(&vec![0; 1 << 16], true);
    let storage = std::rc::Rc::new(storage);
    let io = io();
    let left = std::rc::Rc::new(std::cell::Cell::new(0));
    // 640 writers of 100 bytes each, many in every block, all at once.
    for n in 0..640u64 {
        let (io, storage, left) = (io.clone(), storage.clone(), left.clone());
        left.set(left.get() + 1);
        io.clone().spawn(async move {
            let mut buf = io.buf(100);
            buf.fill(n as u8 | 1);
            storage.write(&io, n * 100, buf.sg()).await.unwrap();
            left.set(left.get() - 1);
        });
    }
    while left.get() > 0 {
        if !io.turn() {
            io.park(None);
        }
    }
    let got = std::fs::read(path).unwrap();
    for n in 0..640usize {
        assert!(
            got[n * 100..][..100].iter().all(|b| *b == n as u8 | 1),
            "writer {n}"
        );
    }
    io.close();
}

#[test]
fn more_pieces_than_the_kernel_takes_at_once() {
    for direct in [false, true] {
        let (_dir, path, storage) = file_with(&vec![0; 1 << 21], direct);
        let io = io();
        let mut buf = io.buf(512 * 3000);
        let want = pattern(buf.len(), 5);
        buf.copy_from_slice(&want);
        let base = buf.as_mut_ptr();
        let list: Vec<iovec> = (0..3000)
            .map(|n| iovec {
                iov_base: base.wrapping_add(n * 512).cast(),
                iov_len: 512,
            })
            .collect();
        // SAFETY: the pieces are the buffer's, which is not touched before the transfers end.
        let sg = unsafe { Sg::new(&list) };
        io.block_on(async { storage.write(&io, 4096, sg).await })
            .unwrap();
        assert!(std::fs::read(&path).unwrap()[4096..][..want.len()] == want);
        sg.zero();
        io.block_on(async { storage.read(&io, 4096, sg).await })
            .unwrap();
        assert!(buf[..] == want);
    }
}

#[test]
fn zeroed_and_allocated_ranges_read_as_zeros_and_neighbours_stay() {
    for direct in [false, true] {
        for unmap in [false, true] {
            let mut model = pattern(300_000, 4);
            let (_dir, path, storage) = file_with(&model, direct);
            let io = io();
            for (offset, len) in [(0, 4096), (5000, 100), (8191, 70_001), (290_000, 30_000)] {
                io.block_on(storage.write_zeroes(&io, offset, len, unmap))
                    .unwrap();
                let end = (offset + len) as usize;
                if model.len() < end {
                    model.resize(end, 0);
                }
                model[offset as usize..end].fill(0);
            }
            assert_eq!(storage.len(), model.len() as u64);
            assert!(io.block_on(storage.allocate(&io, 131_072, 65_536)).unwrap());
            model[131_072..196_608].fill(0);
            assert!(io.block_on(storage.allocate(&io, 310_000, 65_536)).unwrap());
            model.resize(320_000, 0);
            assert!(std::fs::read(&path).unwrap()[..320_000] == model);
            io.block_on(storage.discard(&io, 200_000, 50_000)).unwrap();
            let file = std::fs::File::open(&path).unwrap();
            let mut around = vec![0; 100_000];
            file.read_exact_at(&mut around, 100_000).unwrap();
            assert!(
                around == model[100_000..200_000],
                "a discard stays in its range"
            );
        }
    }
}

#[test]
fn where_fallocate_is_refused_zeros_are_written() {
    let (_dir, path, storage) = file_with(&pattern(3 << 20, 6), true);
    let Storage::File(file) = &storage else {
        unreachable!()
    };
    file.pretend_no_fallocate();
    let io = io();
    io.block_on(storage.write_zeroes(&io, 1000, 2 << 20, true))
        .unwrap();
    let got = std::fs::read(&path).unwrap();
    let want = pattern(3 << 20, 6);
    assert!(got[..1000] == want[..1000] && got[1000 + (2 << 20)..] == want[1000 + (2 << 20)..]);
    assert!(got[1000..][..2 << 20].iter().all(|b| *b == 0));
    assert!(!io.block_on(storage.allocate(&io, 0, 65_536)).unwrap());
    assert!(io.block_on(storage.allocate(&io, 4 << 20, 65_536)).unwrap());
    io.block_on(storage.discard(&io, 0, 65_536)).unwrap();
    assert_eq!(std::fs::read(&path).unwrap().len(), 3 << 20);
}

/// A file in memory, open at this path as long as the descriptor is.
fn file_in_memory(data: &[u8]) -> (std::fs::File, PathBuf) {
    use std::os::fd::{AsRawFd, FromRawFd};
    // SAFETY: the name is a string with its end; the descriptor is new.
    let file = unsafe {
        let fd = libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "memfd_create");
        std::fs::File::from_raw_fd(fd)
    };
    file.write_all_at(data, 0).expect("write");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

#[test]
fn in_memory_what_is_allocated_is_a_hole_until_it_is_reserved_or_written() {
    use std::os::unix::fs::MetadataExt;
    let model = pattern(1 << 20, 5);
    let (file, path) = file_in_memory(&model);
    let options = FileOptions {
        read_only: false,
        direct: false,
    };
    let storage = Storage::File(FileStorage::open(&path, options).expect("open"));
    let pages = || file.metadata().expect("stat").blocks() * 512;
    let io = io();
    let full = pages();
    // Behind the end, over it, and before it: no page is taken, and what lies before it is given back.
    let allocate = |offset, len| io.block_on(storage.allocate(&io, offset, len)).unwrap();
    assert!(allocate(4 << 20, 16 << 20));
    assert!(allocate((1 << 20) - 65_536, 131_072));
    assert!(allocate(262_144, 65_536));
    assert_eq!(pages(), full - 131_072);
    let got = read(&io, &storage, 0, 2 << 20).unwrap();
    let is_zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
    assert!(is_zero(&got[262_144..327_680]) && is_zero(&got[(1 << 20) - 65_536..]));
    assert!(got[..262_144] == model[..262_144]);
    assert!(got[327_680..(1 << 20) - 65_536] == model[327_680..(1 << 20) - 65_536]);
    // Reserved, what is there stays.
    let reserve = |offset, len| io.block_on(storage.reserve(&io, offset, len)).unwrap();
    reserve(196_608, 131_072);
    assert_eq!(pages(), full - 65_536);
    assert!(read(&io, &storage, 196_608, 65_536).unwrap() == model[196_608..262_144]);
    assert!(is_zero(&read(&io, &storage, 262_144, 65_536).unwrap()));
}

#[test]
fn a_read_only_file_refuses_every_change_and_flushes_as_nothing() {
    let (_dir, path, _) = file_with(&[1; 4096], false);
    let options = FileOptions {
        read_only: true,
        direct: false,
    };
    let storage = Storage::File(FileStorage::open(&path, options).unwrap());
    let io = io();
    let refused = [
        write(&io, &storage, 0, &[0; 512]),
        io.block_on(storage.write_zeroes(&io, 0, 512, true)),
        io.block_on(storage.discard(&io, 0, 4096)),
        io.block_on(storage.set_len(&io, 0)),
        io.block_on(storage.allocate(&io, 0, 512)).map(|_| ()),
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    io.block_on(storage.flush(&io)).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), [1; 4096]);
}

#[test]
fn ranges_beyond_what_a_file_can_hold_are_errors() {
    let (_dir, _, storage) = file_with(&[0; 4096], false);
    let io = io();
    let error = read(&io, &storage, u64::MAX - 100, 512).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    let error = write(&io, &storage, i64::MAX as u64 - 100, &[0; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    let error = io
        .block_on(storage.write_zeroes(&io, u64::MAX, 2, false))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
}

#[test]
fn what_is_no_file_and_no_disk_is_refused_by_name() {
    let options = FileOptions {
        read_only: true,
        direct: true,
    };
    for (path, word) in [("/", "directory"), ("/dev/zero", "character device")] {
        let error = FileStorage::open(path, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(word), "{error}");
    }
    let error = FileStorage::open("/no/such/file", options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn the_simulator_loses_what_was_not_flushed_and_keeps_what_was() {
    let storage = Storage::Sim(SimStorage::new(vec![0; 4096], Sim::default()));
    let Storage::Sim(sim) = &storage else {
        unreachable!()
    };
    let io = io();
    write(&io, &storage, 0, &[1; 1024]).unwrap();
    io.block_on(storage.flush(&io)).unwrap();
    write(&io, &storage, 512, &[2; 1024]).unwrap();
    write(&io, &storage, 1024, &[3; 4096]).unwrap();
    let (mut lengths, mut seconds, mut thirds) = (vec![], vec![], vec![]);
    for seed in 0..64 {
        let image = sim.crash(seed);
        assert!(image[..512].iter().all(|b| *b == 1), "flushed");
        assert!(
            image[512..1024].iter().all(|b| *b == image[512]),
            "whole sectors"
        );
        lengths.push(image.len());
        seconds.push(image[512]);
        thirds.push(image[1024]);
    }
    for (mut seen, want) in [(seconds, vec![1, 2]), (thirds, vec![0, 2, 3])] {
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, want);
    }
    lengths.sort_unstable();
    lengths.dedup();
    assert_eq!(lengths, [4096, 5120]);
    let oldest = sim.crash_with(|_, _| 0);
    assert!(oldest.len() == 4096 && oldest[512] == 1 && oldest[1024] == 0);
    assert!(sim.crash_with(|_, versions| versions - 1) == sim.image());
    assert_eq!(
        sim.take_events()[..2],
        [
            Event::Write {
                offset: 0,
                len: 1024
            },
            Event::Flush
        ]
    );
}

#[test]
fn the_simulator_fails_the_nth_operation_and_dies_when_told() {
    let storage = Storage::Sim(SimStorage::new(vec![0; 4096], Sim::default()));
    let Storage::Sim(sim) = &storage else {
        unreachable!()
    };
    let io = io();
    sim.fail(Kind::Write, 2, libc::ENOSPC, false);
    write(&io, &storage, 0, &[1; 512]).unwrap();
    let error = write(&io, &storage, 0, &[2; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    write(&io, &storage, 512, &[3; 512]).unwrap();
    sim.cut_power_after(1);
    io.block_on(storage.flush(&io)).unwrap();
    assert!(write(&io, &storage, 0, &[4; 512]).is_err() && sim.is_dead());
    assert!(read(&io, &storage, 0, 512).is_err());
    let image = sim.crash(9);
    assert!(image[..512] == [1; 512] && image[512..1024] == [3; 512]);
}

#[test]
fn a_flush_covers_what_completed_before_it_began() {
    // Writes and flushes interleave by chance; after each completed flush no crash loses a write that
    // was complete when the flush began.
    for seed in 1..40 {
        let config = Sim {
            seed,
            delay: 5,
            pieces: true,
            ..Sim::default()
        };
        let storage = std::rc::Rc::new(Storage::Sim(SimStorage::new(vec![0; 1 << 16], config)));
        let io = io();
        let done = std::rc::Rc::new(std::cell::RefCell::new(Vec::new()));
        for n in 0..16u64 {
            let (io, storage, done) = (io.clone(), storage.clone(), done.clone());
            io.clone().spawn(async move {
                let mut buf = io.buf(4096);
                buf.fill(n as u8 + 1);
                storage.write(&io, n * 4096, buf.sg()).await.unwrap();
                done.borrow_mut().push(n as usize);
            });
        }
        for _ in 0..3 {
            let (io, storage, done) = (io.clone(), storage.clone(), done.clone());
            io.clone().spawn(async move {
                for _ in 0..3 {
                    let before = done.borrow().clone();
                    storage.flush(&io).await.unwrap();
                    let Storage::Sim(sim) = &*storage else {
                        unreachable!()
                    };
                    let image = sim.crash(seed);
                    for n in before {
                        assert!(image[n * 4096..][..4096].iter().all(|b| *b == n as u8 + 1));
                    }
                }
            });
        }
        while io.turn() {}
        assert_eq!(done.borrow().len(), 16);
        io.close();
    }
}
