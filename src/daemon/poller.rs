//! A level-triggered or edge-triggered wait on several descriptors.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

pub(super) use epoll::Events;
use epoll::{ControlOptions, Event};

/// Readable, for as long as it is.
pub(super) const IN: Events = Events::EPOLLIN;

/// Becomes readable, once a time.
pub(super) const EDGE: Events = Events::EPOLLIN.union(Events::EPOLLET);

/// Whatever changes on a connection, once a change.
pub(super) const CONNECTION: Events = Events::EPOLLIN
    .union(Events::EPOLLOUT)
    .union(Events::EPOLLRDHUP)
    .union(Events::EPOLLET);

/// An epoll instance.
pub(super) struct Poller(OwnedFd);

impl Poller {
    pub(super) fn new() -> io::Result<Self> {
        let fd = epoll::create(true)?;
        // SAFETY: the descriptor was just made and is nobody else's.
        Ok(Poller(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn add(&self, fd: &impl AsRawFd, events: Events, token: u64) -> io::Result<()> {
        let event = Event::new(events, token);
        epoll::ctl(
            self.0.as_raw_fd(),
            ControlOptions::EPOLL_CTL_ADD,
            fd.as_raw_fd(),
            event,
        )
    }

    pub(super) fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        let event = Event::new(Events::empty(), 0);
        epoll::ctl(
            self.0.as_raw_fd(),
            ControlOptions::EPOLL_CTL_DEL,
            fd.as_raw_fd(),
            event,
        )
    }

    /// The tokens of what is ready; none when the time is over. `None` waits for ever.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<u64>> {
        let millis = timeout.map_or(-1, |time| {
            i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
        });
        let mut events = [Event::new(Events::empty(), 0); 8];
        match epoll::wait(self.0.as_raw_fd(), millis, &mut events) {
            Ok(count) => Ok(events[..count].iter().map(|event| event.data).collect()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}
