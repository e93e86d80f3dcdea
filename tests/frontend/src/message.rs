//! Messages as they lie on the socket: headers, payloads, and the reading and writing of them.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::error::{Error, Result};
use crate::memory::RegionSpec;
use crate::protocol::flag;
use crate::sys;

/// A message as it came from the other side.
#[derive(Debug)]
pub struct Message {
    /// The message id.
    pub request: u32,
    /// The header's flags.
    pub flags: u32,
    /// The payload.
    pub payload: Vec<u8>,
    /// Attached descriptors.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one 64-bit integer.
    ///
    /// # Errors
    /// `Protocol` when it is not eight bytes.
    pub fn u64(&self) -> Result<u64> {
        let bytes: [u8; 8] = self.payload.as_slice().try_into().map_err(|_| {
            Error::Protocol(format!(
                "message {}: {} bytes of payload where 8 were due",
                self.request,
                self.payload.len()
            ))
        })?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// The twelve bytes before each payload, with any flags and any size.
pub fn header(request: u32, flags: u32, size: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// The payload of a vring state message.
pub fn vring_state(index: u32, num: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&index.to_le_bytes());
    bytes[4..].copy_from_slice(&num.to_le_bytes());
    bytes
}

fn region_bytes(spec: &RegionSpec) -> [u8; 32] {
    let mut bytes = [0; 32];
    let words = [spec.guest_addr, spec.size, spec.user_addr, spec.mmap_offset];
    for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// The payload of SET_MEM_TABLE for `specs`.
pub fn memory_table(specs: &[RegionSpec]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + 32 * specs.len());
    payload.extend_from_slice(&(specs.len() as u32).to_le_bytes());
    payload.extend_from_slice(&[0; 4]);
    for spec in specs {
        payload.extend_from_slice(&region_bytes(spec));
    }
    payload
}

/// The payload of ADD_MEM_REG and REM_MEM_REG.
pub fn single_region(spec: &RegionSpec) -> [u8; 40] {
    let mut payload = [0; 40];
    payload[8..].copy_from_slice(&region_bytes(spec));
    payload
}

/// The payload of GET_CONFIG and SET_CONFIG.
pub fn config_payload(offset: u32, size: u32, flags: u32, data: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(12 + data.len());
    for word in [offset, size, flags] {
        payload.extend_from_slice(&word.to_le_bytes());
    }
    payload.extend_from_slice(data);
    payload
}

/// The addresses of one ring, as SET_VRING_ADDR carries them (user addresses; the log address is the guest
/// physical address of the used ring).
#[derive(Debug, Clone, Copy, Default)]
pub struct VringAddr {
    /// Ring flags; bit 0 asks for the used ring to be logged.
    pub flags: u32,
    /// User address of the descriptor table.
    pub desc: u64,
    /// User address of the used ring.
    pub used: u64,
    /// User address of the available ring.
    pub avail: u64,
    /// Guest address that writes to the used ring are logged at.
    pub log: u64,
}

/// The inflight region as GET_INFLIGHT_FD described it.
#[derive(Debug)]
pub struct Inflight {
    /// The shared memory.
    pub fd: OwnedFd,
    /// Its length in bytes.
    pub mmap_size: u64,
    /// Where it starts in the file.
    pub mmap_offset: u64,
    /// Queues it covers.
    pub num_queues: u16,
    /// Descriptors a queue.
    pub queue_size: u16,
}

/// One end of a socket that speaks vhost-user messages.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) stream: UnixStream,
}

impl Wire {
    /// Sends all bytes, the descriptors with the first.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[RawFd]) -> Result<()> {
        let mut rest = bytes;
        let mut fds = fds;
        while !rest.is_empty() {
            match sys::send_with_fds(self.stream.as_raw_fd(), rest, fds) {
                Ok(n) => {
                    rest = &rest[n..];
                    fds = &[];
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn recv_exact(&self, mut rest: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<()> {
        while !rest.is_empty() {
            match sys::recv_with_fds(self.stream.as_raw_fd(), rest) {
                Ok((0, _)) => return Err(Error::Closed),
                Ok((n, new)) => {
                    fds.extend(new);
                    rest = &mut rest[n..];
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    pub(crate) fn recv(&self) -> Result<Message> {
        let mut head = [0u8; 12];
        let mut fds = Vec::new();
        self.recv_exact(&mut head, &mut fds)?;
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8));
        if flags & flag::VERSION_MASK != flag::VERSION {
            return Err(Error::Protocol(format!("header flags {flags:#x}")));
        }
        if size > 1 << 20 {
            return Err(Error::Protocol(format!("a message of {size} bytes")));
        }
        let mut payload = vec![0; size as usize];
        self.recv_exact(&mut payload, &mut fds)?;
        Ok(Message {
            request,
            flags,
            payload,
            fds,
        })
    }
}

/// The payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD (20 bytes and 4 of padding, as QEMU sends it).
pub fn inflight_payload(
    mmap_size: u64,
    mmap_offset: u64,
    num_queues: u16,
    queue_size: u16,
) -> [u8; 24] {
    let mut payload = [0; 24];
    payload[..8].copy_from_slice(&mmap_size.to_le_bytes());
    payload[8..16].copy_from_slice(&mmap_offset.to_le_bytes());
    payload[16..18].copy_from_slice(&num_queues.to_le_bytes());
    payload[18..20].copy_from_slice(&queue_size.to_le_bytes());
    payload
}
