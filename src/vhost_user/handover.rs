//! A connection as it is told to another process, which goes on with it (`docs/architecture.md`, "Hot upgrade").
//!
//! Descriptors travel beside the message; in it they are numbers that count from 0. A field that one side does
//! not know, or misses, makes the message wrong: state must not be lost without a word.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use serde::{Deserialize, Deserializer, Serialize};

/// Which of the descriptors that came with a message.
pub type FdNumber = u32;

/// What may be none, and has to be said to be none: without this, serde takes a field that is missing for one.
pub(crate) fn said<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Option::deserialize(deserializer)
}

/// A connection with a VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionState {
    /// The socket.
    pub sock: FdNumber,
    /// Messages handled so far.
    pub messages: u64,
    /// What the messages have left.
    pub session: SessionState,
}

/// What a session knows. What each field means is said at the session's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // They are the session's fields.
pub struct SessionState {
    pub features: u64,
    pub features_asked: bool,
    pub features_refused: bool,
    pub protocol: u64,
    pub status: u8,
    /// What the driver chose for the write cache, as it stands in the configuration space.
    pub write_cache: u8,
    pub memory: Vec<RegionState>,
    /// The inflight region.
    #[serde(deserialize_with = "said")]
    pub inflight: Option<InflightState>,
    /// The memory of the dirty log.
    #[serde(deserialize_with = "said")]
    pub log: Option<SharedState>,
    /// The back-end's channel.
    #[serde(deserialize_with = "said")]
    pub channel: Option<ChannelState>,
    /// The capacity in bytes that the VMM has read on this connection, and that it was told of last.
    #[serde(deserialize_with = "said")]
    pub capacity_read: Option<u64>,
    #[serde(deserialize_with = "said")]
    pub capacity_told: Option<u64>,
    pub rings: Vec<RingState>,
}

/// Memory of the VMM's that is not the guest's. Bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedState {
    /// Where it begins in its file.
    pub offset: u64,
    /// Length.
    pub len: u64,
    /// Its file.
    pub file: FdNumber,
}

/// The inflight region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InflightState {
    /// Its memory.
    pub memory: SharedState,
    /// Queues that there is room for.
    pub queues: u16,
    /// Entries of each.
    pub queue_size: u16,
}

/// The back-end's channel to the VMM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelState {
    /// The socket.
    pub sock: FdNumber,
    /// Messages whose answer is due.
    pub unanswered: u32,
    /// The beginning of an answer that has not all come.
    pub partial: Vec<u8>,
}

/// A region of the guest's memory. Addresses and lengths in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionState {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Address in the VMM.
    pub user_addr: u64,
    /// Length.
    pub len: u64,
    /// Where it begins in its file.
    pub offset: u64,
    /// Its file.
    pub file: FdNumber,
}

/// How the driver tells of new requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KickState {
    /// The VMM has not said yet.
    Missing,
    /// The ring is polled.
    Polled,
    /// By this descriptor.
    Fd(FdNumber),
}

/// What a session knows of a ring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // They are the ring's fields.
pub struct RingState {
    #[serde(deserialize_with = "said")]
    pub size: Option<u16>,
    /// Descriptor table, available ring and used ring, in the VMM's addresses.
    #[serde(deserialize_with = "said")]
    pub addresses: Option<[u64; 3]>,
    /// Where its used ring is in the dirty log.
    #[serde(deserialize_with = "said")]
    pub used_log: Option<u64>,
    #[serde(deserialize_with = "said")]
    pub base: Option<u32>,
    pub kick: KickState,
    #[serde(deserialize_with = "said")]
    pub call: Option<FdNumber>,
    #[serde(deserialize_with = "said")]
    pub err: Option<FdNumber>,
    #[serde(deserialize_with = "said")]
    pub enabled: Option<bool>,
    pub running: bool,
}

/// Descriptors to be sent with a message.
#[derive(Debug, Default)]
pub struct Outgoing(Vec<OwnedFd>);

impl Outgoing {
    /// Adds another descriptor of what `fd` is.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn add(&mut self, fd: &impl AsFd) -> io::Result<FdNumber> {
        let number = FdNumber::try_from(self.0.len()).map_err(io::Error::other)?;
        self.0.push(fd.as_fd().try_clone_to_owned()?);
        Ok(number)
    }

    /// [`Outgoing::add`] of what may be missing.
    ///
    /// # Errors
    /// As [`Outgoing::add`].
    pub fn add_some(&mut self, fd: Option<&File>) -> io::Result<Option<FdNumber>> {
        fd.map(|fd| self.add(fd)).transpose()
    }

    /// The descriptors, in the order of their numbers.
    pub fn raw(&self) -> Vec<RawFd> {
        self.0.iter().map(AsRawFd::as_raw_fd).collect()
    }
}

/// Descriptors that came with a message. Those that nobody takes are closed.
#[derive(Debug, Default)]
pub struct Incoming(Vec<Option<OwnedFd>>);

/// A descriptor that a message speaks of did not come with it, or is spoken of twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("descriptor {0} is missing")]
pub struct MissingFd(FdNumber);

impl Incoming {
    /// In the order in which they came.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// How many came.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if none came.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes one, once.
    ///
    /// # Errors
    /// It is not there.
    pub fn take(&mut self, number: FdNumber) -> Result<OwnedFd, MissingFd> {
        self.0
            .get_mut(number as usize)
            .and_then(Option::take)
            .ok_or(MissingFd(number))
    }

    /// [`Incoming::take`] of what may be none.
    ///
    /// # Errors
    /// As [`Incoming::take`].
    pub fn take_some(&mut self, number: Option<FdNumber>) -> Result<Option<File>, MissingFd> {
        let taken = number.map(|number| self.take(number)).transpose()?;
        Ok(taken.map(File::from))
    }
}
