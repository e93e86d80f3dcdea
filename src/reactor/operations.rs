//! The operations that a task can queue.

use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, Timespec};
use io_uring::{opcode, squeue};
use libc::iovec;

use super::buf::Sg;
use super::file::IoFile;
use super::op::Op;
use super::ring::Io;

/// The kernel takes this many iovecs an operation (IOV_MAX); the rest is a short transfer.
const IOV_MAX: usize = 1024;
/// Largest transfer the kernel makes in one operation (MAX_RW_COUNT), kept to whole 4 KiB blocks.
const MAX_TRANSFER: usize = 0x7fff_f000;

/// Builds an entry for either kind of name: the crate's opcodes take a type each.
macro_rules! entry {
    ($name:expr, $fd:ident => $build:expr) => {
        match $name {
            Name::Registered($fd) => $build,
            Name::Descriptor($fd) => $build,
        }
    };
}

/// How a submission names its file.
#[derive(Clone, Copy)]
pub(super) enum Name {
    Registered(Fixed),
    Descriptor(Fd),
}

impl Io {
    /// Reads at `offset` into `to`; the result is how many bytes were read, 0 at the end of the file.
    pub(crate) fn read<'a>(&'a self, file: &IoFile, offset: u64, to: Sg<'a>) -> Op<'a> {
        self.transfer(file, offset, to, false)
    }

    /// Writes `from` at `offset`; the result is how many bytes were written.
    pub(crate) fn write<'a>(&'a self, file: &IoFile, offset: u64, from: Sg<'a>) -> Op<'a> {
        self.transfer(file, offset, from, true)
    }

    fn transfer<'a>(&'a self, file: &IoFile, offset: u64, sg: Sg<'a>, write: bool) -> Op<'a> {
        if let Some(ended) = self.transfer_inline(file, offset, sg, write) {
            return ended;
        }
        let fd = self.inner.name(file);
        let mut pieces = sg.iter();
        let first = pieces.next().unwrap_or((std::ptr::null_mut(), 0));
        if pieces.next().is_none() {
            let len = first.1.min(MAX_TRANSFER) as u32;
            return self.start(
                fd,
                |fd| {
                    if write {
                        entry!(fd, fd => opcode::Write::new(fd, first.0, len).offset(offset).build())
                    } else {
                        entry!(fd, fd => opcode::Read::new(fd, first.0, len).offset(offset).build())
                    }
                },
                None,
            );
        }
        let mut copied = None;
        let (iovecs, count) = match sg.whole() {
            Some(all) => (all.as_ptr(), all.len().min(IOV_MAX) as u32),
            None => {
                let list = copied.insert(self.iovecs_of(sg));
                (list.as_ptr(), list.len() as u32)
            }
        };
        self.start(
            fd,
            |fd| {
                if write {
                    entry!(fd, fd => opcode::Writev::new(fd, iovecs, count).offset(offset).build())
                } else {
                    entry!(fd, fd => opcode::Readv::new(fd, iovecs, count).offset(offset).build())
                }
            },
            copied,
        )
    }

    /// Registers the file with the ring, which holds on to it from then on, also beyond the end of the process
    /// as long as anything is under way.
    pub(crate) fn register(&self, file: &IoFile) {
        let _name = self.inner.name(file);
    }

    /// Makes the file's data durable, and the metadata needed to read it (fdatasync).
    pub(crate) fn fdatasync(&self, file: &IoFile) -> Op<'_> {
        if let Some(ended) = self.fdatasync_inline(file) {
            return ended;
        }
        self.start(
            self.inner.name(file),
            |fd| entry!(fd, fd => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build()),
            None,
        )
    }

    /// `fallocate(2)` with `mode` (`libc::FALLOC_FL_*`).
    pub(crate) fn fallocate(&self, file: &IoFile, mode: i32, offset: u64, len: u64) -> Op<'_> {
        if let Some(ended) = self.fallocate_inline(file, mode, offset, len) {
            return ended;
        }
        self.start(
            self.inner.name(file),
            |fd| {
                entry!(fd, fd => opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
            },
            None,
        )
    }

    /// Ends successfully after `duration`.
    pub(crate) async fn sleep(&self, duration: Duration) {
        let index = self.ops().begin(self.current_task());
        let timespec = self.ops().timeout(index, Timespec::from(duration));
        self.inner.push(
            &opcode::Timeout::new(timespec)
                .build()
                .user_data(index.into()),
        );
        // A timeout's result is -ETIME: it ended.
        let _ = Op::queued(self, index, None).await;
    }

    /// Ends when the file has something to read (POLLIN) or was hung up. Unlike a read, it also waits on
    /// a non-blocking eventfd, as VMMs make them.
    pub(crate) fn readable(&self, file: &IoFile) -> Op<'_> {
        self.start(
            self.inner.name(file),
            |fd| entry!(fd, fd => opcode::PollAdd::new(fd, libc::POLLIN as u32).build()),
            None,
        )
    }

    /// Lets other tasks run before going on.
    pub(crate) async fn yield_now(&self) {
        let mut yielded = false;
        std::future::poll_fn(|_| {
            if std::mem::replace(&mut yielded, true) {
                return std::task::Poll::Ready(());
            }
            self.wake(self.current_task());
            std::task::Poll::Pending
        })
        .await;
    }

    pub(super) fn start(
        &self,
        fd: Name,
        build: impl FnOnce(Name) -> squeue::Entry,
        iovecs: Option<Vec<iovec>>,
    ) -> Op<'_> {
        let index = self.ops().begin(self.current_task());
        self.inner.push(&build(fd).user_data(index.into()));
        Op::queued(self, index, iovecs)
    }

    /// Calls with iovecs of the list, as many as the kernel takes.
    #[inline]
    pub(super) fn with_iovecs<R>(&self, sg: Sg<'_>, then: impl FnOnce(&[iovec]) -> R) -> R {
        if let Some(all) = sg.whole() {
            return then(&all[..all.len().min(IOV_MAX)]);
        }
        let list = self.iovecs_of(sg);
        let result = then(&list);
        self.give_iovecs(list);
        result
    }

    fn iovecs_of(&self, sg: Sg<'_>) -> Vec<iovec> {
        let mut list = self.inner.iovecs.borrow_mut().pop().unwrap_or_default();
        list.extend(sg.iter().take(IOV_MAX).map(|(ptr, len)| iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        }));
        list
    }

    pub(super) fn give_iovecs(&self, mut list: Vec<iovec>) {
        list.clear();
        self.inner.iovecs.borrow_mut().push(list);
    }
}
