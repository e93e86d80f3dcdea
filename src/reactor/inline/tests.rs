use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::task::{Context, Poll, Waker};

use super::*;
use crate::reactor::AlignedBuf;
use crate::reactor::tests::io;

/// A file in memory, of `len` bytes that tell their place.
fn memory(len: usize) -> File {
    // SAFETY: the name is a string; a new descriptor is ours alone.
    let file = unsafe {
        File::from_raw_fd(libc::memfd_create(
            c"inline".as_ptr(),
            libc::MFD_ALLOW_SEALING,
        ))
    };
    let bytes: Vec<u8> = (0..len).map(|at| (at / 7) as u8).collect();
    file.write_all_at(&bytes, 0).unwrap();
    file
}

fn pieces(parts: &mut [Vec<u8>]) -> Vec<iovec> {
    let piece = |part: &mut Vec<u8>| iovec {
        iov_base: part.as_mut_ptr().cast(),
        iov_len: part.len(),
    };
    parts.iter_mut().map(piece).collect()
}

/// What an operation gives at once; None: it is under way.
fn at_once(op: Op<'_>) -> Option<std::io::Result<u32>> {
    let mut op = std::pin::pin!(op);
    match Future::poll(op.as_mut(), &mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}

#[test]
fn regular_files_of_a_file_system_in_memory_are_and_devices_on_one_are_not() {
    assert!(is_in_memory(&memory(0)));
    // devtmpfs is a tmpfs.
    assert!(!is_in_memory(&File::open("/dev/null").unwrap()));
    assert!(!is_in_memory(&File::open("/proc/self/maps").unwrap()));
    let (_reader, writer) = std::io::pipe().unwrap();
    assert!(!is_in_memory(&File::from(OwnedFd::from(writer))));
}

#[test]
fn transfers_of_any_shape_have_ended_when_they_are_begun() {
    let io = io();
    let file = IoFile::of_disk(memory(64 << 10));
    let before = io.enters();
    let mut parts = [vec![1u8; 100], vec![2; 5000], vec![], vec![3; 900]];
    let list = pieces(&mut parts);
    // SAFETY: `parts` outlives the list and is not touched meanwhile.
    let sg = unsafe { Sg::new(&list) };
    assert_eq!(at_once(io.write(&file, 1000, sg)).unwrap().unwrap(), 6000);
    let cut = io.write(&file, 20_000, sg.slice(50, 5500));
    assert_eq!(at_once(cut).unwrap().unwrap(), 5500);
    let mut whole = io.buf(6000);
    assert_eq!(
        at_once(io.read(&file, 1000, whole.sg())).unwrap().unwrap(),
        6000
    );
    assert_eq!(whole[..], parts.concat()[..]);
    let mut back = [vec![0u8; 700], vec![0; 4800]];
    let list = pieces(&mut back);
    // SAFETY: as above.
    let sg = unsafe { Sg::new(&list) };
    assert_eq!(at_once(io.read(&file, 20_000, sg)).unwrap().unwrap(), 5500);
    assert_eq!(back.concat()[..], parts.concat()[50..5550]);
    assert_eq!(io.enters(), before, "the ring had no part in it");
}

#[test]
fn results_are_those_of_the_ring() {
    let io = io();
    let sealed = memory(10_000);
    // SAFETY: no memory is passed.
    assert_eq!(0, unsafe {
        libc::fcntl(sealed.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE)
    });
    let path = format!("/proc/self/fd/{}", sealed.as_raw_fd());
    let read_only = File::open(path).unwrap();
    let nowhere = [iovec {
        iov_base: std::ptr::without_provenance_mut(4096),
        iov_len: 4096,
    }];
    // SAFETY: nobody but the kernel looks at the address, which says that there is nothing.
    let nowhere = unsafe { Sg::new(&nowhere) };
    let mut many: Vec<Vec<u8>> = vec![vec![5; 2]; 2000];
    let many = pieces(&mut many);
    // SAFETY: the vectors outlive the list and are not touched meanwhile.
    let many = unsafe { Sg::new(&many) };
    let mut buf = io.buf(8192);
    for (file, write) in [(memory(10_000), true), (sealed, false), (read_only, false)] {
        let [inline, ring] = [
            IoFile::of_disk(file.try_clone().unwrap()),
            IoFile::new(file),
        ];
        let mut both =
            |what: &str, begin: &mut dyn FnMut(&IoFile, Sg<'_>) -> std::io::Result<u32>| {
                let [a, b] = [&inline, &ring]
                    .map(|file| begin(file, buf.sg()).map_err(|e| e.raw_os_error()));
                assert_eq!(a, b, "{what}");
                a
            };
        let wait = |op: Op<'_>| io.block_on(op);
        let mut read = |at| both("read", &mut |file, sg| wait(io.read(file, at, sg)));
        assert_eq!(read(0), Ok(8192));
        assert_eq!(read(9000), Ok(1000), "the end of the file");
        assert_eq!(read(10_000), Ok(0));
        assert_eq!(read(u64::MAX >> 1), Err(Some(libc::EINVAL)));
        let at_nowhere = both("nowhere", &mut |file, _| wait(io.read(file, 0, nowhere)));
        assert_eq!(at_nowhere, Err(Some(libc::EFAULT)));
        assert_eq!(
            both("pieces", &mut |file, _| wait(io.read(file, 0, many))),
            Ok(2048)
        );
        let wrote = both("write", &mut |file, sg| wait(io.write(file, 0, sg)));
        assert_eq!(wrote.is_ok(), write);
        assert_eq!(
            both("flush", &mut |file, _| wait(io.fdatasync(file))),
            Ok(0)
        );
        for mode in [
            0,
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            libc::FALLOC_FL_ZERO_RANGE,
            libc::FALLOC_FL_PUNCH_HOLE,
        ] {
            let _same = both("fallocate", &mut |file, _| {
                wait(io.fallocate(file, mode, 0, 4096))
            });
        }
    }
}

#[test]
fn large_transfers_and_all_that_is_begun_after_a_turns_share_go_to_the_ring() {
    let io = io();
    let file = IoFile::of_disk(memory(1 << 20));
    let mut large = io.buf(LARGEST + 1);
    let op = io.read(&file, 7, large.sg());
    assert_eq!(io.inline_work(), 0);
    assert_eq!(io.block_on(op).unwrap() as usize, LARGEST + 1);
    let op = io.read(&file, 7, large.sg().slice(0, LARGEST));
    assert!(!op.is_queued(), "the largest");
    drop(op);
    io.turn();
    let mut bufs: Vec<AlignedBuf> = (0..40).map(|_| io.buf(32 << 10)).collect();
    let mut inline = 0;
    let ops: Vec<Op<'_>> = bufs
        .iter_mut()
        .map(|buf| io.read(&file, 0, buf.sg()))
        .collect();
    for op in ops {
        let work = io.inline_work();
        assert!(work < TURN + LARGEST + CALL, "{work}");
        inline += u32::from(!op.is_queued());
        assert_eq!(io.block_on(op).unwrap(), 32 << 10);
    }
    assert_eq!(inline as usize, TURN.div_ceil((32 << 10) + CALL));
    assert!(bufs.windows(2).all(|two| two[0][..] == two[1][..]));
    io.turn();
    let op = io.read(&file, 0, large.sg().slice(0, 4096));
    assert!(!op.is_queued(), "a new turn has its own share");
    drop(op);
}

#[test]
fn a_task_that_is_held_has_nothing_under_way_and_is_not_told() {
    let io = io();
    let told = std::rc::Rc::new(std::cell::Cell::new(0));
    let task = io.spawn({
        let (io, told) = (io.clone(), told.clone());
        async move {
            let file = IoFile::of_disk(memory(4096));
            let mut buf = io.buf(4096);
            loop {
                assert_eq!(io.read(&file, 0, buf.sg()).await.unwrap(), 4096);
                told.set(told.get() + 1);
                io.yield_now().await;
            }
        }
    });
    for _ in 0..3 {
        io.turn();
    }
    assert_eq!(told.get(), 3);
    io.hold(task);
    assert!(io.is_quiet(task));
    for _ in 0..3 {
        io.turn();
    }
    assert_eq!(told.get(), 3);
    io.remove(task);
}
