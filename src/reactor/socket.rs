//! Sending and receiving on a connected socket.

use io_uring::opcode;
use io_uring::types::{Fd, Fixed};
use libc::{iovec, msghdr};

use super::file::IoFile;
use super::op::Op;
use super::operations::Name;
use super::ring::Io;

/// The kernel takes this many pieces in one operation (UIO_MAXIOV).
const PIECES_MAX: usize = 1024;

/// A list of pieces of memory and the header that names it to the kernel. It lives as long as its owner, so that
/// sending and receiving allocate nothing.
pub(crate) struct Message {
    /// What is sent, or where what is received goes to.
    pub(crate) pieces: Vec<iovec>,
    header: Box<msghdr>,
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Message")
            .field("pieces", &self.pieces.len())
            .finish()
    }
}

impl Message {
    pub(crate) fn new() -> Self {
        Self {
            pieces: Vec::with_capacity(PIECES_MAX),
            // SAFETY: of this structure of integers and pointers zeros are a valid value.
            header: Box::new(unsafe { std::mem::zeroed() }),
        }
    }

    fn header(&mut self) -> *mut msghdr {
        self.header.msg_iov = self.pieces.as_mut_ptr();
        self.header.msg_iovlen = self.pieces.len().min(PIECES_MAX) as _;
        &raw mut *self.header
    }
}

impl Io {
    /// Sends `message` on a blocking stream socket; the result is how many bytes were taken: all, unless there
    /// are more pieces than the kernel takes at once, or the connection ended. Dropped early, it is cancelled.
    ///
    /// # Safety
    /// The pieces must be readable until the operation has ended.
    pub(crate) unsafe fn send<'a>(&'a self, socket: &IoFile, message: &'a mut Message) -> Op<'a> {
        let flags = (libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32;
        let header = message.header().cast_const();
        self.start(
            self.inner.name(socket),
            |fd| match fd {
                Name::Registered(Fixed(slot)) => opcode::SendMsg::new(Fixed(slot), header)
                    .flags(flags)
                    .build(),
                Name::Descriptor(Fd(fd)) => {
                    opcode::SendMsg::new(Fd(fd), header).flags(flags).build()
                }
            },
            None,
        )
    }

    /// Receives into `message` what a blocking stream socket has, or waits for it; the result is how many bytes
    /// came, 0 at the end of the stream. Dropped early, it is cancelled.
    ///
    /// # Safety
    /// The pieces must be writable until the operation has ended, and no Rust reference may cover them meanwhile.
    pub(crate) unsafe fn receive<'a>(
        &'a self,
        socket: &IoFile,
        message: &'a mut Message,
    ) -> Op<'a> {
        let header = message.header();
        self.start(
            self.inner.name(socket),
            |fd| match fd {
                Name::Registered(Fixed(slot)) => opcode::RecvMsg::new(Fixed(slot), header).build(),
                Name::Descriptor(Fd(fd)) => opcode::RecvMsg::new(Fd(fd), header).build(),
            },
            None,
        )
    }
}
