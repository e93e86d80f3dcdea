//! A look at the next message before the `vhost` crate takes it off the socket.
//!
//! The crate reads blocking: a message that has only half arrived, or one with more descriptors than it
//! has room for, would hold its thread for as long as the VMM likes. And it ends the connection on
//! messages that it does not carry. So each message is first looked at with `MSG_PEEK`; it goes to the
//! crate only when all of it is there and the crate knows what to do with it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Bytes of a message header (vhost-user.rst, "Header").
pub(super) const HEADER_SIZE: usize = 12;

const FLAG_VERSION_MASK: u32 = 0x3;
pub(super) const FLAG_VERSION: u32 = 0x1;
pub(super) const FLAG_REPLY: u32 = 0x4;
pub(super) const FLAG_NEED_REPLY: u32 = 0x8;

/// The most descriptors that the kernel passes in one message (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// The header of the next message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub request: u32,
    pub flags: u32,
    /// Bytes of payload after the header.
    pub size: u32,
}

impl Header {
    pub(super) fn need_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }

    /// The name of the request for the log.
    pub(super) fn name(&self) -> String {
        match FrontendReq::try_from(self.request) {
            Ok(known) => format!("{known:?}"),
            Err(_) => format!("message {}", self.request),
        }
    }

    /// Whether the sender speaks another version, sends a reply, or sets flags nobody knows.
    pub(super) fn has_bad_flags(&self) -> bool {
        self.flags & !FLAG_NEED_REPLY != FLAG_VERSION
    }

    pub(super) fn is_oversized(&self) -> bool {
        self.size as usize > MAX_MSG_SIZE
    }
}

/// What lies at the head of the socket's queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peeked {
    /// Nothing, or not all of a message; more may come.
    Incomplete,
    /// The peer has closed its end, and nothing is left.
    Closed,
    /// The peer has closed its end in the middle of a message.
    Truncated,
    /// A header, together with the number of descriptors that came with it. Unless it is oversized, the
    /// whole message is there.
    Message { header: Header, fds: usize },
    /// More descriptors came with the message than there is room for in it or in this process.
    TooManyFds,
}

/// Looks at the next message. Never blocks.
pub(super) fn peek(sock: &UnixStream) -> io::Result<Peeked> {
    // Asked first: a hang-up seen now means that the bytes seen below are the last.
    let ended = hung_up(sock);
    let mut bytes = [0u8; HEADER_SIZE];
    let received = peek_bytes(sock, &mut bytes)?;
    let Some((len, fds, truncated)) = received else {
        return Ok(Peeked::Incomplete);
    };
    if truncated {
        return Ok(Peeked::TooManyFds);
    }
    if len == 0 {
        return Ok(Peeked::Closed);
    }
    let unfinished = if ended {
        Peeked::Truncated
    } else {
        Peeked::Incomplete
    };
    let queued = queued_bytes(sock)?;
    if len < HEADER_SIZE {
        // Only descriptors in the middle of a header keep a peek from seeing all that is queued.
        if queued >= HEADER_SIZE {
            return Ok(Peeked::Truncated);
        }
        return Ok(unfinished);
    }
    let word =
        |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let header = Header {
        request: word(0),
        flags: word(4),
        size: word(8),
    };
    if !header.is_oversized() && queued < HEADER_SIZE + header.size as usize {
        return Ok(unfinished);
    }
    Ok(Peeked::Message { header, fds })
}

/// Bytes of a control message for [`MAX_FDS`] descriptors, aligned as `cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([MaybeUninit<u8>; 1040]);

// 16 bytes of `cmsghdr`, then the descriptors.
const _: () = assert!(size_of::<Control>() >= 16 + MAX_FDS * size_of::<RawFd>());

/// What one `recvmsg` brought.
struct Received {
    len: usize,
    /// Descriptors were lost.
    truncated: bool,
}

/// Receives at most `bytes.len()` bytes, and descriptors, without waiting; `None` if nothing is there.
fn receive(
    sock: &UnixStream,
    bytes: &mut [u8],
    flags: libc::c_int,
    fds: &mut Vec<OwnedFd>,
) -> io::Result<Option<Received>> {
    let mut control = Control([MaybeUninit::uninit(); 1040]);
    let mut iov = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: an all-zero msghdr is a valid one: null pointers with zero lengths.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = size_of::<Control>();
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let len = loop {
        // SAFETY: `msg` points to `iov` over `bytes` and to `control`, all alive and writable.
        let len = unsafe { libc::recvmsg(sock.as_raw_fd(), &mut msg, flags) };
        if let Ok(len) = usize::try_from(len) {
            break len;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    };
    // SAFETY: the kernel has filled `control` up to `msg_controllen`; the CMSG macros stay within it.
    unsafe {
        let mut cmsg = libc::CMSG_FIRSTHDR(&msg);
        while !cmsg.is_null() {
            if (*cmsg).cmsg_level == libc::SOL_SOCKET && (*cmsg).cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(cmsg).cast::<RawFd>();
                let count = ((*cmsg).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for i in 0..count {
                    fds.push(OwnedFd::from_raw_fd(data.add(i).read_unaligned()));
                }
            }
            cmsg = libc::CMSG_NXTHDR(&msg, cmsg);
        }
    }
    Ok(Some(Received {
        len,
        truncated: msg.msg_flags & libc::MSG_CTRUNC != 0,
    }))
}

/// Peeks at most `bytes.len()` bytes: how many came, with how many descriptors, and whether some of
/// those were lost; `None` if there is nothing to see yet.
fn peek_bytes(sock: &UnixStream, bytes: &mut [u8]) -> io::Result<Option<(usize, usize, bool)>> {
    // Peeking makes descriptors of its own, to be closed.
    let mut fds = Vec::new();
    match receive(sock, bytes, libc::MSG_PEEK, &mut fds) {
        Ok(Some(received)) => Ok(Some((received.len, fds.len(), received.truncated))),
        Ok(None) => Ok(None),
        // A peer that dies with our replies unread resets the connection.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some((0, 0, false))),
        Err(error) => Err(error),
    }
}

/// Bytes waiting in the socket's queue, over all messages.
fn queued_bytes(sock: &UnixStream) -> io::Result<usize> {
    let mut queued: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    if unsafe { libc::ioctl(sock.as_raw_fd(), libc::FIONREAD, &mut queued) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(queued).unwrap_or(0))
}

fn poll_now(sock: &UnixStream, events: libc::c_short) -> libc::c_short {
    let mut poll = libc::pollfd {
        fd: sock.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: `poll` is one valid pollfd; the call does not wait.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    if ready == 1 { poll.revents } else { 0 }
}

/// Whether the peer has closed its end. What it sent before may still be unread.
pub(super) fn hung_up(sock: &UnixStream) -> bool {
    poll_now(sock, libc::POLLRDHUP) & (libc::POLLHUP | libc::POLLRDHUP | libc::POLLERR) != 0
}

/// Whether a reply can be sent without waiting for the peer to read earlier ones.
///
/// A unix socket counts as writable while three quarters of its buffer are free: far more than the
/// longest reply.
pub(super) fn can_reply(sock: &UnixStream) -> bool {
    poll_now(sock, libc::POLLOUT) != 0
}

/// Takes a message that [`peek`] has seen off the socket and returns its payload. Descriptors that came
/// with it are closed: plain reads do not receive them.
pub(super) fn take(mut sock: &UnixStream, header: &Header) -> io::Result<Vec<u8>> {
    let mut message = vec![0u8; HEADER_SIZE + header.size as usize];
    io::Read::read_exact(&mut sock, &mut message)?;
    Ok(message.split_off(HEADER_SIZE))
}

/// As [`take`], with the descriptors that came with the message.
pub(super) fn take_with_fds(
    sock: &UnixStream,
    header: &Header,
) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut message = vec![0u8; HEADER_SIZE + header.size as usize];
    let mut fds = Vec::new();
    let mut done = 0;
    while done < message.len() {
        match receive(sock, &mut message[done..], 0, &mut fds)? {
            Some(received) if received.len > 0 && !received.truncated => done += received.len,
            // It was all there when it was looked at.
            _ => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
    Ok((message.split_off(HEADER_SIZE), fds))
}

/// Sends a request as a front-end does, with a 64-bit payload or with none.
pub(super) fn send(mut sock: &UnixStream, request: u32, value: Option<u64>) -> io::Result<()> {
    let payload = value.map(u64::to_ne_bytes);
    let payload = payload.as_ref().map_or(&[][..], |bytes| &bytes[..]);
    let mut message = Vec::with_capacity(HEADER_SIZE + 8);
    for word in [request, FLAG_VERSION, payload.len() as u32] {
        message.extend_from_slice(&word.to_ne_bytes());
    }
    message.extend_from_slice(payload);
    io::Write::write_all(&mut sock, &message)
}

/// Makes the descriptor of `old` one of the socket `new`; its number stays.
pub(super) fn replace(old: &impl AsRawFd, new: &UnixStream) -> io::Result<()> {
    // SAFETY: both are open sockets, and the owner of the number goes on to own it.
    if unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Answers `header` with a 64-bit payload.
pub(super) fn reply(sock: &UnixStream, header: &Header, value: u64) -> io::Result<()> {
    answer(sock, header, &value.to_ne_bytes(), &[])
}

/// Answers `header` with any payload, and with copies of descriptors.
pub(super) fn answer(
    sock: &UnixStream,
    header: &Header,
    payload: &[u8],
    fds: &[RawFd],
) -> io::Result<()> {
    let flags = (header.flags & FLAG_VERSION_MASK) | FLAG_REPLY;
    let size = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(HEADER_SIZE + payload.len());
    message.extend_from_slice(&header.request.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&size.to_ne_bytes());
    message.extend_from_slice(payload);
    if fds.is_empty() {
        let mut sock = sock;
        return io::Write::write_all(&mut sock, &message);
    }
    // Shorter than what the socket takes at once (see `can_reply`).
    let sent = sock.send_with_fds(&[&message[..]], fds)?;
    match sent == message.len() {
        true => Ok(()),
        false => Err(io::ErrorKind::WriteZero.into()),
    }
}
