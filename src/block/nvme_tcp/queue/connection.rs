//! One I/O queue: its state machine, its socket, and the tasks that send and receive.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::task::Poll;

use super::transport::{Failure, Transport};
use crate::block::nvme_tcp::link::{ControllerLimits, IoConnection, Wire};
use crate::block::nvme_tcp::local::Local;
use crate::block::nvme_tcp::machine::Machine;
use crate::block::nvme_tcp::wire::ProtocolError;
use crate::reactor::{Io, IoFile, Message, TaskId};

/// A connected I/O queue of one thread.
pub(in super::super) struct Queue {
    pub(in super::super) path: usize,
    pub(in super::super) generation: u64,
    pub(super) qid: u16,
    pub(super) nsid: u32,
    pub(super) depth: u32,
    pub(super) limits: ControllerLimits,
    pub(super) machine: RefCell<Machine>,
    transport: Transport,
    /// Commands that the machine has.
    pub(in super::super) in_flight: Cell<u32>,
    socket: IoFile,
    /// The sender has nothing to do and waits to be woken.
    sender_idle: Cell<bool>,
    sender: Cell<Option<TaskId>>,
    receiver: Cell<Option<TaskId>>,
    /// It takes no more commands, and its tasks are about to end.
    ending: Cell<bool>,
    /// Its controller broke the protocol, maybe by how it answers one of the commands.
    pub(super) violated: Cell<bool>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("path", &self.path)
            .field("generation", &self.generation)
            .field("qid", &self.qid)
            .field("in_flight", &self.in_flight.get())
            .finish_non_exhaustive()
    }
}

/// Why a queue ends.
#[derive(Debug)]
pub(in super::super) enum Why {
    /// The path's thread said so.
    Told,
    /// It is of no use any more; the path's thread is to learn of it.
    Failed(String),
}

impl Queue {
    /// Takes a connection over and starts its tasks.
    ///
    /// # Errors
    /// The socket is none.
    pub(in super::super) fn start(
        local: &Rc<Local>,
        connection: IoConnection,
    ) -> io::Result<Rc<Self>> {
        let (stream, transport) = match connection.wire {
            Wire::Plain(stream) => (stream, Transport::Plain),
            Wire::Tls(stream, session) => (stream, Transport::tls(session)),
        };
        // The kernel waits for a blocking socket by itself, and answers EAGAIN for another.
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        let queue = Rc::new(Self {
            path: connection.path,
            generation: connection.generation,
            qid: connection.qid,
            nsid: connection.nsid,
            depth: connection.params.depth.into(),
            limits: connection.limits,
            machine: RefCell::new(Machine::new(connection.params)),
            transport,
            in_flight: Cell::new(0),
            socket: IoFile::new(File::from(OwnedFd::from(stream))),
            sender_idle: Cell::new(false),
            sender: Cell::new(None),
            receiver: Cell::new(None),
            ending: Cell::new(false),
            violated: Cell::new(false),
        });
        let io = local.io();
        let sender = io.spawn(send(Side::new(local, &queue)));
        queue.sender.set(Some(sender));
        let receiver = io.spawn(receive(Side::new(local, &queue)));
        queue.receiver.set(Some(receiver));
        Ok(queue)
    }

    /// True if it takes no more commands.
    #[inline]
    pub(in super::super) fn is_ending(&self) -> bool {
        self.ending.get()
    }

    /// Has what the machine wants to send sent in the next turn, together with what else comes until then.
    #[inline]
    pub(super) fn kick(&self, io: &Io) {
        if self.sender_idle.replace(false) {
            if let Some(sender) = self.sender.get() {
                io.wake(sender);
            }
        }
    }

    /// Its tasks.
    pub(super) fn tasks(&self) -> impl Iterator<Item = TaskId> {
        self.sender.get().into_iter().chain(self.receiver.get())
    }

    /// Begins the end: the connection is shut down, so that what is under way on the socket ends. The commands are
    /// given up when it has.
    #[cold]
    pub(in super::super) fn end(&self, local: &Local, why: Why) {
        if self.ending.replace(true) {
            return;
        }
        // SAFETY: the descriptor is open; no memory is passed.
        unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
        for task in self.tasks() {
            local.io().wake(task);
        }
        local.queue_ends(self, why);
    }

    /// Ends at once: nothing touches the memory of its commands any more when this returns. Not from inside its
    /// tasks.
    #[cold]
    pub(super) fn cut(&self, local: &Local, why: Why) {
        self.end(local, why);
        // A task's end says so.
        for task in [self.sender.get(), self.receiver.get()]
            .into_iter()
            .flatten()
        {
            local.io().remove(task);
        }
    }

    /// Throws away what the kernel has not sent, and resets the connection, whoever else has a descriptor of it:
    /// the commands are about to be done again elsewhere, and nothing of their first life may arrive after that.
    /// A connection that was only shut down and closed goes on sending for minutes. To be called when nothing is
    /// under way on the socket.
    #[cold]
    fn reset(&self) {
        let none = libc::sockaddr {
            sa_family: libc::AF_UNSPEC as libc::sa_family_t,
            sa_data: [0; 14],
        };
        // SAFETY: the descriptor is open, and the address is as long as is given. It fails only where nothing is
        // connected any more.
        unsafe {
            libc::connect(
                self.socket.as_raw_fd(),
                &raw const none,
                size_of_val(&none) as libc::socklen_t,
            )
        };
    }

    /// The last word to a controller that broke the protocol (TCP 3.5.1): sent if it can be sent now, between two
    /// PDUs.
    #[cold]
    fn terminate(&self, error: &ProtocolError) {
        if !self.sender_idle.get() || !self.machine.borrow().between_pdus() {
            return;
        }
        let bytes = self.transport.last_word(&error.term_req());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the bytes are readable through the call. That it may fail is as good as that it may be lost.
        unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                flags,
            )
        };
    }
}

/// What a task of a queue holds. When both tasks are over, so are their operations: the commands are free.
struct Side {
    local: Rc<Local>,
    queue: Rc<Queue>,
}

impl Side {
    fn new(local: &Rc<Local>, queue: &Rc<Queue>) -> Self {
        Self {
            local: local.clone(),
            queue: queue.clone(),
        }
    }

    fn fail(&self, why: String) {
        self.queue.end(&self.local, Why::Failed(why));
    }
}

/// The side of one direction; dropped after everything that its task had under way.
struct Sender(Side);
struct Receiver(Side);

impl Drop for Sender {
    fn drop(&mut self) {
        let Side { local, queue } = &self.0;
        queue.sender.set(None);
        side_is_over(local, queue);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let Side { local, queue } = &self.0;
        queue.receiver.set(None);
        side_is_over(local, queue);
    }
}

/// A task may also be removed because the reactor closes: then the other one has nobody to talk to.
fn side_is_over(local: &Rc<Local>, queue: &Rc<Queue>) {
    queue.end(local, Why::Told);
    if queue.tasks().next().is_none() {
        queue.reset();
        queue.machine.borrow_mut().abandon_all(&mut |_| ());
        local.queue_is_over(queue);
    }
}

/// Sends what the machine wants to send: at most one operation at a time, because a stream has an order.
async fn send(side: Side) {
    let side = Sender(side);
    let (local, queue) = (&side.0.local, &side.0.queue);
    let mut message = Message::new();
    let mut ended = Vec::with_capacity(queue.depth as usize);
    loop {
        let output = poll_fn(|_| {
            if queue.is_ending() {
                return Poll::Ready(Ok(0));
            }
            let pieces = &mut message.pieces;
            match queue.transport.output(&queue.machine, pieces, &mut ended) {
                Ok(0) => {
                    queue.sender_idle.set(true);
                    Poll::Pending
                }
                output => Poll::Ready(output),
            }
        })
        .await;
        match output {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => break side.0.fail(error.to_string()),
        }
        // SAFETY: the machine's own memory stays where it is until `sent`, and the memory of a command until the
        // command has ended or was abandoned, which comes after this task's end.
        let sent = unsafe { local.io().send(&queue.socket, &mut message) }.await;
        let count = match sent {
            Ok(0) => break side.0.fail("the connection takes nothing any more".into()),
            Ok(count) => count as usize,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => 0,
            Err(error) => break side.0.fail(format!("sending: {error}")),
        };
        queue.transport.sent(&queue.machine, count, &mut ended);
        if !ended.is_empty() {
            local.commands_ended(queue, &mut ended);
        }
    }
}

/// Receives, and hands on what has ended.
async fn receive(side: Side) {
    let side = Receiver(side);
    let (local, queue) = (&side.0.local, &side.0.queue);
    let mut message = Message::new();
    let mut ended = Vec::with_capacity(queue.depth as usize);
    while !queue.is_ending() {
        queue.transport.input(&queue.machine, &mut message.pieces);
        // SAFETY: as in `send`; the memory is the machine's, or that of commands that read, and no Rust reference
        // covers it.
        let received = unsafe { local.io().receive(&queue.socket, &mut message) }.await;
        let count = match received {
            Ok(0) => {
                side.0.fail("the controller closed the connection".into());
                break;
            }
            Ok(count) => count as usize,
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
            Err(error) => {
                side.0.fail(format!("receiving: {error}"));
                break;
            }
        };
        let done = queue.transport.received(&queue.machine, count, &mut ended);
        local.commands_ended(queue, &mut ended);
        if let Err(error) = done {
            if let Failure::Protocol(error) = &error {
                queue.violated.set(true);
                queue.terminate(error);
            }
            side.0.fail(error.to_string());
        } else if queue.transport.wants_to_send(&queue.machine) {
            queue.kick(local.io());
        }
    }
}
