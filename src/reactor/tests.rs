use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use super::*;

pub(super) fn io() -> Io {
    Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring")
}

fn file(len: u64) -> File {
    let file = tempfile::tempfile().expect("temporary file");
    file.set_len(len).expect("set_len");
    file
}

#[test]
fn bytes_written_are_read_back_through_lists_of_any_shape() {
    let io = io();
    let file = IoFile::new(file(1 << 16));
    let mut buf = io.buf(12288);
    buf.iter_mut().enumerate().for_each(|(i, b)| *b = i as u8);
    let written = io.block_on(async { io.write(&file, 4096, buf.sg()).await });
    assert_eq!(written.unwrap(), 12288);

    let mut parts = [vec![0u8; 100], vec![0u8; 5000], vec![0u8; 7188]];
    let iovecs: Vec<libc::iovec> = parts
        .iter_mut()
        .map(|p| libc::iovec {
            iov_base: p.as_mut_ptr().cast(),
            iov_len: p.len(),
        })
        .collect();
    // SAFETY: `parts` outlives the list and is not touched before the reads end.
    let sg = unsafe { Sg::new(&iovecs) };
    io.block_on(async {
        let (head, tail) = sg.split_at(150);
        let a = io.read(&file, 4096, head);
        let b = io.read(&file, 4096 + 150, tail);
        assert_eq!((a.await.unwrap(), b.await.unwrap()), (150, 12288 - 150));
    });
    assert!(
        parts
            .concat()
            .iter()
            .enumerate()
            .all(|(i, b)| *b == i as u8)
    );
}

#[test]
fn a_full_submission_queue_makes_room_for_itself() {
    let io = io();
    let file = IoFile::new(file(1 << 20));
    let mut bufs: Vec<AlignedBuf> = (0..500).map(|_| io.buf(512)).collect();
    io.block_on(async {
        let ops: Vec<Op<'_>> = bufs.iter_mut().map(|b| io.read(&file, 0, b.sg())).collect();
        for op in ops {
            assert_eq!(op.await.unwrap(), 512);
        }
    });
}

#[test]
fn operations_enter_the_kernel_in_groups_and_the_rest_with_the_turn() {
    let io = io();
    let file = IoFile::new(file(1 << 20));
    io.turn();
    let mut bufs: Vec<AlignedBuf> = (0..9).map(|_| io.buf(512)).collect();
    io.block_on(async {
        let before = io.enters();
        let ops: Vec<Op<'_>> = bufs.iter_mut().map(|b| io.read(&file, 0, b.sg())).collect();
        assert_eq!(io.enters() - before, 2);
        io.turn();
        assert_eq!(io.enters() - before, 3);
        for op in ops {
            assert_eq!(op.await.unwrap(), 512);
        }
    });
}

#[test]
fn groups_are_larger_while_the_kernel_has_much_in_hand() {
    let io = io();
    let file = IoFile::new(file(1 << 20));
    io.turn();
    let mut bufs: Vec<AlignedBuf> = (0..32).map(|_| io.buf(512)).collect();
    io.block_on(async {
        let before = io.enters();
        let ops: Vec<Op<'_>> = bufs.iter_mut().map(|b| io.read(&file, 0, b.sg())).collect();
        // 4, 4, 4, 6 and 9 go out, the last two half of those before; the 5 that are left are less than 13.
        assert_eq!(io.enters() - before, 5);
        io.turn();
        assert_eq!(io.enters() - before, 6);
        for op in ops {
            assert_eq!(op.await.unwrap(), 512);
        }
    });
}

#[test]
fn completions_beyond_what_a_turn_takes_are_neither_lost_nor_slept_over() {
    // One more than turns of a few take together: at the end a single one waits.
    const COUNT: u32 = 97;
    let io = io();
    // Each of these operations has ended when it is begun, without a thread or an interrupt.
    let event = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    event.write(1).unwrap();
    // SAFETY: the duplicate is owned by the `File` alone.
    let file =
        unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(libc::dup(event.as_raw_fd())) };
    let file = std::rc::Rc::new(IoFile::new(file));
    let ended = std::rc::Rc::new(Cell::new(0));
    while io.turn() {}
    for _ in 0..COUNT {
        let (io, file, ended) = (io.clone(), file.clone(), ended.clone());
        io.clone().spawn(async move {
            io.readable(&file).await.unwrap();
            ended.set(ended.get() + 1);
        });
    }
    assert!(io.turn(), "all of them begin");
    assert_eq!(ended.get(), 0);
    // Who sleeps in spite of them is woken in the end, and that is told.
    let (over, waits) = std::sync::mpsc::channel::<()>();
    let doorbell = io.doorbell();
    let watch = std::thread::spawn(move || {
        let timeout = std::sync::mpsc::RecvTimeoutError::Timeout;
        let slept = || waits.recv_timeout(Duration::from_secs(20)) == Err(timeout);
        let rings = std::iter::from_fn(|| slept().then(|| doorbell.ring()));
        rings.count()
    });
    let mut least = u32::MAX;
    while ended.get() < COUNT {
        // What waits is there to be taken: this returns at once.
        io.park(None);
        let before = ended.get();
        assert!(io.turn(), "{before} of {COUNT}: nothing is done any more");
        assert!(ended.get() > before, "{before} of {COUNT}");
        least = least.min(ended.get() - before);
    }
    drop(over);
    assert_eq!(watch.join().unwrap(), 0, "it slept");
    assert!(least < COUNT / 4, "a few a turn, and not {least}");
    while io.turn() {}
    io.close();
}

#[test]
fn an_operation_dropped_early_is_waited_for() {
    let io = io();
    let file = IoFile::new(file(8192));
    file.get().write_all_at(&[7; 4096], 0).unwrap();
    let mut buf = io.buf(4096);
    buf.fill(0);
    drop(io.read(&file, 0, buf.sg()));
    assert!(buf.iter().all(|b| *b == 7));
}

#[test]
fn errors_come_as_errors() {
    let io = io();
    let read_only = IoFile::new(File::open("/dev/null").unwrap());
    let mut buf = io.buf(512);
    let error = io.block_on(async { io.write(&read_only, 0, buf.sg()).await });
    assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EBADF));
}

#[test]
fn a_wake_from_another_thread_ends_the_sleep() {
    let io = io();
    let flag = Arc::new(AtomicBool::new(false));
    let mut thread = None;
    io.block_on(std::future::poll_fn(|cx| {
        if flag.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        if thread.is_none() {
            let (flag, waker) = (flag.clone(), cx.waker().clone());
            thread = Some(std::thread::spawn(move || {
                flag.store(true, Ordering::Release);
                waker.wake();
            }));
        }
        Poll::Pending
    }));
    thread.unwrap().join().unwrap();
}

#[test]
fn the_doorbell_ends_a_park_and_can_be_rung_again() {
    let io = io();
    for _ in 0..100 {
        let doorbell = io.doorbell();
        let thread = std::thread::spawn(move || doorbell.ring());
        // Rung before, at or after falling asleep: the turn after it always says that there was something.
        while !io.turn() {
            io.park(None);
        }
        thread.join().unwrap();
        while io.turn() {}
    }
}

#[test]
fn tasks_run_interleaved_and_sleepers_wake() {
    let io = io();
    let sum = std::rc::Rc::new(Cell::new(0));
    for n in 1..=10u64 {
        let (task_io, sum) = (io.clone(), sum.clone());
        io.spawn(async move {
            task_io.sleep(Duration::from_millis(n % 3)).await;
            task_io.yield_now().await;
            sum.set(sum.get() + n);
        });
    }
    let waiter = io.clone();
    io.block_on(async {
        while sum.get() != 55 {
            waiter.sleep(Duration::from_millis(1)).await;
        }
    });
    io.close();
}

/// Begins a task when it is dropped.
struct Begins(Io, std::rc::Rc<()>);

impl Drop for Begins {
    fn drop(&mut self) {
        let its = self.1.clone();
        self.0.spawn(async move {
            std::future::pending::<()>().await;
            drop(its);
        });
    }
}

#[test]
fn a_task_that_begins_while_the_reactor_closes_ends_too() {
    let io = io();
    let count = std::rc::Rc::new(());
    let begins = Begins(io.clone(), count.clone());
    io.spawn(async move {
        std::future::pending::<()>().await;
        drop(begins);
    });
    io.close();
    assert_eq!(std::rc::Rc::strong_count(&count), 1);
}

#[test]
fn a_closed_file_is_let_go_by_the_ring() {
    let io = io();
    let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = IoFile::new(File::from(std::os::fd::OwnedFd::from(writer)));
    let mut buf = io.buf(1);
    io.block_on(async { io.write(&file, u64::MAX, buf.sg()).await })
        .unwrap();
    drop(file);
    io.park(Some(Duration::ZERO));
    // With every writer gone the pipe ends after the one byte.
    let mut all = Vec::new();
    std::io::Read::read_to_end(&mut { reader }, &mut all).unwrap();
    assert_eq!(all.len(), 1);
}

#[test]
fn a_poll_dropped_early_is_cancelled_and_a_non_blocking_eventfd_is_waited_for() {
    let io = io();
    let event = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    // SAFETY: the duplicate is owned by the `File` alone.
    let file =
        unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(libc::dup(event.as_raw_fd())) };
    let file = IoFile::new(file);
    drop(io.readable(&file));
    let thread = std::thread::spawn({
        let event = event.try_clone().unwrap();
        move || event.write(1).unwrap()
    });
    io.block_on(async { io.readable(&file).await }).unwrap();
    thread.join().unwrap();
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn a_held_task_makes_no_progress_and_is_quiet_once_the_kernel_has_let_go() {
    let io = io();
    let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = std::rc::Rc::new(IoFile::new(File::from(std::os::fd::OwnedFd::from(reader))));
    let ended = std::rc::Rc::new(Cell::new(false));
    let task = io.spawn({
        let (io, file, ended) = (io.clone(), file.clone(), ended.clone());
        async move {
            let mut buf = io.buf(4096);
            // Nothing comes: it waits until it is cancelled.
            let _ = io.read(&file, u64::MAX, buf.sg()).await;
            ended.set(true);
        }
    });
    while io.turn() {}
    assert!(!io.is_quiet(task));
    io.hold(task);
    while !io.is_quiet(task) {
        io.turn();
    }
    while io.turn() {}
    assert!(!ended.get(), "it was not told of its operation's end");
    io.remove(task);
    // The number is used again, and that task runs.
    let next = io.spawn({
        let ended = ended.clone();
        async move { ended.set(true) }
    });
    assert_eq!(next, task);
    while io.turn() {}
    assert!(ended.get());
    drop(writer);
}

#[test]
fn a_software_operation_wakes_its_task_and_counts_while_it_is_under_way() {
    let io = io();
    let op = std::rc::Rc::new(Cell::new(None));
    let ended = std::rc::Rc::new(Cell::new(false));
    let task = io.spawn({
        let (io, op, ended) = (io.clone(), op.clone(), ended.clone());
        async move {
            let begun = io.begin_software();
            op.set(Some(begun));
            std::future::poll_fn(|_| io.poll_software(begun)).await;
            io.release_software(begun);
            ended.set(true);
        }
    });
    while io.turn() {}
    let begun = op.get().unwrap();
    assert!(!io.is_quiet(task));
    io.set_under_way(begun, false);
    assert!(io.is_quiet(task) && !io.waiter_is_held(begun));
    io.complete(begun);
    while io.turn() {}
    assert!(ended.get());
}

#[test]
fn a_local_is_each_reactors_own_and_its_number_is_used_again_when_nobody_has_one() {
    let (a, b) = (io(), io());
    let slot = LocalSlot::new();
    a.set_local(&slot, std::rc::Rc::new(7u32));
    assert_eq!(a.local::<u32>(&slot).as_deref(), Some(&7));
    assert!(a.local::<u64>(&slot).is_none() && b.local::<u32>(&slot).is_none());
    a.clear_local(&slot);
    assert!(a.local::<u32>(&slot).is_none());
}

#[test]
fn a_reactor_whose_last_user_is_gone_ends_its_service_tasks() {
    let io = io();
    let alive = std::rc::Rc::new(());
    let _task = io.spawn({
        let (io, alive) = (io.for_service(), alive.clone());
        async move {
            let _alive = alive;
            io.sleep(Duration::from_secs(3600)).await;
        }
    });
    io.turn();
    assert_eq!(std::rc::Rc::strong_count(&alive), 2);
    drop(io);
    assert_eq!(std::rc::Rc::strong_count(&alive), 1);
}

#[test]
fn a_message_goes_through_a_socket_and_one_that_waits_is_cancelled() {
    let io = io();
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    let [a, b] = [a, b].map(|end| IoFile::new(File::from(std::os::fd::OwnedFd::from(end))));
    let (mut from, mut to) = ([vec![1u8; 3], vec![2; 5]], vec![0u8; 100]);
    let piece = |bytes: &mut Vec<u8>| libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    let (mut out, mut into) = (Message::new(), Message::new());
    out.pieces.extend(from.iter_mut().map(piece));
    into.pieces.push(piece(&mut to));
    let (sent, received) = io.block_on(async {
        // SAFETY: the vectors outlive the operations, as below.
        let receiving = unsafe { io.receive(&b, &mut into) };
        // SAFETY: as above.
        let sent = unsafe { io.send(&a, &mut out) }.await;
        (sent.unwrap(), receiving.await.unwrap())
    });
    assert_eq!((sent, received), (8, 8));
    assert_eq!(to[..9], [1, 1, 1, 2, 2, 2, 2, 2, 0]);
    // SAFETY: as above. Nothing comes.
    drop(unsafe { io.receive(&b, &mut into) });
}
