//! A vhost-user front end: one connection to a backend, one method for each message.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::memory::{Memory, Region, RegionSpec};
use crate::message::{
    Inflight, Message, VringAddr, Wire, config_payload, header, inflight_payload, memory_table,
    single_region, vring_state,
};
use crate::protocol::{VRING_NOFD, flag, protocol_feature, request};
use crate::sys;

/// How long an answer may take unless a test says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection to a backend.
#[derive(Debug)]
pub struct Client {
    wire: Wire,
    reply_ack: bool,
}

impl Client {
    /// Connects once.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path).map_err(Error::Io)?;
        Self::from_stream(stream)
    }

    /// Connects, trying again while the socket is missing or nobody listens on it, until `timeout`.
    ///
    /// # Errors
    /// Those of connect(2), or the last one seen when the time is up.
    pub fn connect_within(path: &Path, timeout: Duration) -> Result<Self> {
        let deadline = Instant::now() + timeout;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self::from_stream(stream),
                Err(e)
                    if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
                        && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(Error::Io(e)),
            }
        }
    }

    /// Uses a socket that is connected already.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn from_stream(stream: UnixStream) -> Result<Self> {
        let client = Self {
            wire: Wire { stream },
            reply_ack: false,
        };
        client.set_timeout(DEFAULT_TIMEOUT)?;
        Ok(client)
    }

    /// Bounds every later send and receive.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_timeout(&self, timeout: Duration) -> Result<()> {
        self.wire.stream.set_read_timeout(Some(timeout))?;
        self.wire.stream.set_write_timeout(Some(timeout))?;
        Ok(())
    }

    /// The raw socket.
    pub fn stream(&self) -> &UnixStream {
        &self.wire.stream
    }

    /// Whether messages ask for an acknowledgement; set by [`Client::set_protocol_features`].
    pub fn set_reply_ack(&mut self, on: bool) {
        self.reply_ack = on;
    }

    // Raw access, for tests of what must not be sent.

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send_raw(&self, bytes: &[u8], fds: &[RawFd]) -> Result<()> {
        self.wire.send(bytes, fds)
    }

    /// Sends a message with the header flags given (the version bit included by the caller).
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&self, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        let mut bytes = Vec::with_capacity(12 + payload.len());
        bytes.extend_from_slice(&header(request, flags, payload.len() as u32));
        bytes.extend_from_slice(payload);
        self.wire.send(&bytes, fds)
    }

    /// Receives one message.
    ///
    /// # Errors
    /// `Closed`, `TimedOut`, or `Protocol` for a wrong header.
    pub fn recv(&self) -> Result<Message> {
        self.wire.recv()
    }

    /// True once the backend has closed the connection; false when it is still open after `timeout`.
    /// Messages that come meanwhile are dropped.
    ///
    /// # Errors
    /// Those of poll(2).
    pub fn closed_within(&self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !sys::wait_readable(self.wire.stream.as_raw_fd(), left)? {
                return Ok(false);
            }
            match self.wire.recv() {
                Ok(_) | Err(Error::Protocol(_)) => {}
                Err(Error::Closed) => return Ok(true),
                Err(e) => return Err(e),
            }
        }
    }

    // Messages.

    /// Sends a message that has an answer of its own, and returns the answer.
    ///
    /// # Errors
    /// `Protocol` when the answer is to something else, and those of the socket.
    pub fn call(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<Message> {
        self.send(request, flag::VERSION, payload, fds)?;
        self.reply_to(request)
    }

    fn reply_to(&self, request: u32) -> Result<Message> {
        let reply = self.wire.recv()?;
        if reply.request != request || reply.flags & flag::REPLY == 0 {
            return Err(Error::Protocol(format!(
                "message {request} was answered by message {} with flags {:#x}",
                reply.request, reply.flags
            )));
        }
        Ok(reply)
    }

    /// Sends a message without an answer of its own; with REPLY_ACK it waits for the acknowledgement.
    ///
    /// # Errors
    /// `Refused` for a non-zero acknowledgement, and those of [`Client::call`].
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[RawFd]) -> Result<()> {
        if !self.reply_ack {
            return self.send(request, flag::VERSION, payload, fds);
        }
        self.send(request, flag::VERSION | flag::NEED_REPLY, payload, fds)?;
        match self.reply_to(request)?.u64()? {
            0 => Ok(()),
            value => Err(Error::Refused { request, value }),
        }
    }

    fn call_u64(&self, request: u32) -> Result<u64> {
        self.call(request, &[], &[])?.u64()
    }

    fn tell_u64(&self, request: u32, value: u64) -> Result<()> {
        self.tell(request, &value.to_le_bytes(), &[])
    }

    fn tell_state(&self, request: u32, index: u32, num: u32) -> Result<()> {
        self.tell(request, &vring_state(index, num), &[])
    }

    /// GET_FEATURES.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn get_features(&self) -> Result<u64> {
        self.call_u64(request::GET_FEATURES)
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.tell_u64(request::SET_FEATURES, features)
    }

    /// GET_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn get_protocol_features(&self) -> Result<u64> {
        self.call_u64(request::GET_PROTOCOL_FEATURES)
    }

    /// SET_PROTOCOL_FEATURES; from here on messages ask for acknowledgements if REPLY_ACK is among them.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.tell_u64(request::SET_PROTOCOL_FEATURES, features)?;
        self.reply_ack = features & protocol_feature::REPLY_ACK != 0;
        Ok(())
    }

    /// SET_OWNER.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_owner(&self) -> Result<()> {
        self.tell(request::SET_OWNER, &[], &[])
    }

    /// RESET_OWNER.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn reset_owner(&self) -> Result<()> {
        self.tell(request::RESET_OWNER, &[], &[])
    }

    /// RESET_DEVICE.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn reset_device(&self) -> Result<()> {
        self.tell(request::RESET_DEVICE, &[], &[])
    }

    /// SET_MEM_TABLE with all regions of `memory`.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_mem_table(&self, memory: &Memory) -> Result<()> {
        let specs: Vec<_> = memory.regions().iter().map(|r| r.spec()).collect();
        let fds: Vec<_> = memory.regions().iter().map(|r| r.fd()).collect();
        self.tell(request::SET_MEM_TABLE, &memory_table(&specs), &fds)
    }

    /// ADD_MEM_REG.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn add_mem_reg(&self, region: &Region) -> Result<()> {
        let payload = single_region(&region.spec());
        self.tell(request::ADD_MEM_REG, &payload, &[region.fd()])
    }

    /// REM_MEM_REG.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn rem_mem_reg(&self, spec: &RegionSpec) -> Result<()> {
        self.tell(request::REM_MEM_REG, &single_region(spec), &[])
    }

    /// POSTCOPY_ADVISE: the backend's userfaultfd, or nothing if it may have none.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn postcopy_advise(&self) -> Result<Option<OwnedFd>> {
        let mut reply = self.call(request::POSTCOPY_ADVISE, &[], &[])?;
        Ok(reply.fds.pop())
    }

    /// POSTCOPY_LISTEN.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn postcopy_listen(&self) -> Result<()> {
        self.tell(request::POSTCOPY_LISTEN, &[], &[])
    }

    /// ADD_MEM_REG while the backend listens: the address of the region there.
    ///
    /// # Errors
    /// `Protocol` when the answer is not the same region, and those of [`Client::call`].
    pub fn add_mem_reg_postcopy(&self, region: &Region) -> Result<u64> {
        let payload = single_region(&region.spec());
        let answer = self.call(request::ADD_MEM_REG, &payload, &[region.fd()])?;
        let mut same = answer.payload;
        let mut address = [0; 8];
        if same.len() == payload.len() {
            // Behind eight bytes of padding, the guest address and the size.
            address.copy_from_slice(&same[24..32]);
            same[24..32].copy_from_slice(&payload[24..32]);
        }
        if same != payload {
            return Err(Error::Protocol("the answer is another region".to_owned()));
        }
        Ok(u64::from_le_bytes(address))
    }

    /// What follows the last memory message while the backend listens: this side is ready for page faults. There is
    /// no answer.
    ///
    /// # Errors
    /// Those of [`Client::send`].
    pub fn postcopy_ready(&self) -> Result<()> {
        let zero = 0u64.to_le_bytes();
        self.send(request::ADD_MEM_REG, flag::VERSION, &zero, &[])
    }

    /// POSTCOPY_END.
    ///
    /// # Errors
    /// `Refused` for a non-zero answer, and those of [`Client::call`].
    pub fn postcopy_end(&self) -> Result<()> {
        let request = request::POSTCOPY_END;
        self.send(request, flag::VERSION | flag::NEED_REPLY, &[], &[])?;
        match self.reply_to(request)?.u64()? {
            0 => Ok(()),
            value => Err(Error::Refused { request, value }),
        }
    }

    /// GET_MAX_MEM_SLOTS.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn get_max_mem_slots(&self) -> Result<u64> {
        self.call_u64(request::GET_MAX_MEM_SLOTS)
    }

    /// GET_QUEUE_NUM.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn get_queue_num(&self) -> Result<u64> {
        self.call_u64(request::GET_QUEUE_NUM)
    }

    /// SET_VRING_NUM.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_num(&self, index: u32, size: u32) -> Result<()> {
        self.tell_state(request::SET_VRING_NUM, index, size)
    }

    /// SET_VRING_ADDR.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_addr(&self, index: u32, addr: &VringAddr) -> Result<()> {
        let mut payload = [0; 40];
        payload[..4].copy_from_slice(&index.to_le_bytes());
        payload[4..8].copy_from_slice(&addr.flags.to_le_bytes());
        let words = [addr.desc, addr.used, addr.avail, addr.log];
        for (to, word) in payload[8..].chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.tell(request::SET_VRING_ADDR, &payload, &[])
    }

    /// SET_VRING_BASE.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.tell_state(request::SET_VRING_BASE, index, base)
    }

    /// GET_VRING_BASE: stops the ring, and says where it would go on.
    ///
    /// # Errors
    /// `Protocol` when the answer is for another ring, and those of [`Client::call`].
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        self.stop_with(request::GET_VRING_BASE, index)
    }

    /// GET_VRING_BASE_SKIP_DRAIN: stops the ring with what is in flight left in the inflight region.
    ///
    /// # Errors
    /// As [`Client::get_vring_base`].
    pub fn get_vring_base_skip_drain(&self, index: u32) -> Result<u32> {
        self.stop_with(request::GET_VRING_BASE_SKIP_DRAIN, index)
    }

    fn stop_with(&self, request: u32, index: u32) -> Result<u32> {
        let reply = self.call(request, &vring_state(index, 0), &[])?;
        let value = reply.u64()?;
        if value as u32 != index {
            return Err(Error::Protocol(format!(
                "message {request} for ring {index} was answered for ring {}",
                value as u32
            )));
        }
        Ok((value >> 32) as u32)
    }

    /// SET_DEVICE_STATE_FD: the backend is to write its state into `fd` (`load` false) or to read it from there.
    /// The descriptor that the backend would rather use, if it has one.
    ///
    /// # Errors
    /// `Refused`, and those of [`Client::call`].
    pub fn set_device_state_fd(&self, load: bool, fd: RawFd) -> Result<Option<OwnedFd>> {
        // The phase is 0: all rings are stopped.
        let payload = vring_state(u32::from(load), 0);
        let request = request::SET_DEVICE_STATE_FD;
        let mut reply = self.call(request, &payload, &[fd])?;
        match reply.u64()? {
            value if value & 0xff != 0 => Err(Error::Refused { request, value }),
            VRING_NOFD => Ok(None),
            _ => Ok(reply.fds.pop()),
        }
    }

    /// CHECK_DEVICE_STATE: whether the state arrived.
    ///
    /// # Errors
    /// `Refused` if it did not, and those of [`Client::call`].
    pub fn check_device_state(&self) -> Result<()> {
        let request = request::CHECK_DEVICE_STATE;
        match self.call_u64(request)? {
            0 => Ok(()),
            value => Err(Error::Refused { request, value }),
        }
    }

    fn vring_fd(&self, request: u32, index: u32, fd: Option<RawFd>) -> Result<()> {
        let (value, fds) = match fd {
            Some(fd) => (u64::from(index), vec![fd]),
            None => (u64::from(index) | VRING_NOFD, Vec::new()),
        };
        self.tell(request, &value.to_le_bytes(), &fds)
    }

    /// SET_VRING_KICK; without a descriptor the backend is to poll.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_kick(&self, index: u32, fd: Option<RawFd>) -> Result<()> {
        self.vring_fd(request::SET_VRING_KICK, index, fd)
    }

    /// SET_VRING_CALL; without a descriptor this side polls.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_call(&self, index: u32, fd: Option<RawFd>) -> Result<()> {
        self.vring_fd(request::SET_VRING_CALL, index, fd)
    }

    /// SET_VRING_ERR.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_err(&self, index: u32, fd: Option<RawFd>) -> Result<()> {
        self.vring_fd(request::SET_VRING_ERR, index, fd)
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_vring_enable(&self, index: u32, on: bool) -> Result<()> {
        self.tell_state(request::SET_VRING_ENABLE, index, u32::from(on))
    }

    /// GET_CONFIG: `size` bytes of the configuration space at `offset`. The payload that comes back must
    /// have the size that was asked for; an error shows as an empty vector (the protocol's zero length).
    ///
    /// # Errors
    /// `Protocol` when the size differs, and those of [`Client::call`].
    pub fn get_config(&self, offset: u32, size: u32) -> Result<Vec<u8>> {
        let asked = config_payload(offset, size, 0, &vec![0; size as usize]);
        let reply = self.call(request::GET_CONFIG, &asked, &[])?;
        if reply.payload.is_empty() || (reply.payload.len() == 12 && size != 0) {
            return Ok(Vec::new());
        }
        if reply.payload.len() != asked.len() || reply.payload[..8] != asked[..8] {
            return Err(Error::Protocol(format!(
                "GET_CONFIG of {size} bytes at {offset} answered with {} bytes: {:x?}",
                reply.payload.len(),
                &reply.payload[..reply.payload.len().min(12)]
            )));
        }
        Ok(reply.payload[12..].to_vec())
    }

    /// SET_CONFIG; `flags` 0 is a write of the guest, 1 a migration.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_config(&self, offset: u32, flags: u32, data: &[u8]) -> Result<()> {
        let payload = config_payload(offset, data.len() as u32, flags, data);
        self.tell(request::SET_CONFIG, &payload, &[])
    }

    /// SET_STATUS.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_status(&self, status: u64) -> Result<()> {
        self.tell_u64(request::SET_STATUS, status)
    }

    /// GET_STATUS.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn get_status(&self) -> Result<u64> {
        self.call_u64(request::GET_STATUS)
    }

    /// SET_LOG_BASE: the dirty log is `size` bytes at `offset` of `fd`. With LOG_SHMFD the backend always
    /// answers.
    ///
    /// # Errors
    /// Those of [`Client::call`].
    pub fn set_log_base(&self, size: u64, offset: u64, fd: RawFd) -> Result<()> {
        let mut payload = [0; 16];
        payload[..8].copy_from_slice(&size.to_le_bytes());
        payload[8..].copy_from_slice(&offset.to_le_bytes());
        self.call(request::SET_LOG_BASE, &payload, &[fd]).map(drop)
    }

    /// SET_LOG_FD.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_log_fd(&self, fd: RawFd) -> Result<()> {
        self.tell(request::SET_LOG_FD, &[], &[fd])
    }

    /// GET_INFLIGHT_FD: a fresh region from the backend.
    ///
    /// # Errors
    /// `Protocol` when no descriptor came, and those of [`Client::call`].
    pub fn get_inflight_fd(&self, num_queues: u16, queue_size: u16) -> Result<Inflight> {
        let payload = inflight_payload(0, 0, num_queues, queue_size);
        let mut reply = self.call(request::GET_INFLIGHT_FD, &payload, &[])?;
        if reply.payload.len() < 20 || reply.fds.len() != 1 {
            return Err(Error::Protocol(format!(
                "GET_INFLIGHT_FD answered {} bytes and {} descriptors",
                reply.payload.len(),
                reply.fds.len()
            )));
        }
        let p = &reply.payload;
        let word = |at: usize| {
            let mut b = [0; 8];
            b.copy_from_slice(&p[at..at + 8]);
            u64::from_le_bytes(b)
        };
        Ok(Inflight {
            mmap_size: word(0),
            mmap_offset: word(8),
            num_queues: u16::from_le_bytes([p[16], p[17]]),
            queue_size: u16::from_le_bytes([p[18], p[19]]),
            fd: reply.fds.remove(0),
        })
    }

    /// SET_INFLIGHT_FD: gives a region back.
    ///
    /// # Errors
    /// Those of [`Client::tell`].
    pub fn set_inflight_fd(&self, region: &Inflight) -> Result<()> {
        let payload = inflight_payload(
            region.mmap_size,
            region.mmap_offset,
            region.num_queues,
            region.queue_size,
        );
        self.tell(request::SET_INFLIGHT_FD, &payload, &[region.fd.as_raw_fd()])
    }

    /// SET_BACKEND_REQ_FD: opens the channel for the backend's own requests and returns this side of it.
    ///
    /// # Errors
    /// Those of socketpair(2) and of [`Client::tell`].
    pub fn open_backend_channel(&self) -> Result<BackendChannel> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(DEFAULT_TIMEOUT))?;
        self.tell(request::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()])?;
        Ok(BackendChannel {
            wire: Wire { stream: ours },
        })
    }
}

/// The channel on which a backend sends requests of its own.
#[derive(Debug)]
pub struct BackendChannel {
    wire: Wire,
}

impl BackendChannel {
    /// Waits for one request, and acknowledges it if that was asked for.
    ///
    /// # Errors
    /// `TimedOut`, `Closed`, `Protocol`.
    pub fn recv(&self, timeout: Duration) -> Result<Message> {
        let message = self.recv_only(timeout)?;
        self.answer(&message, 0)?;
        Ok(message)
    }

    /// Waits for one request.
    ///
    /// # Errors
    /// `TimedOut`, `Closed`, `Protocol`.
    pub fn recv_only(&self, timeout: Duration) -> Result<Message> {
        self.wire.stream.set_read_timeout(Some(timeout))?;
        self.wire.recv()
    }

    /// Acknowledges a request with `value`, if that was asked for.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn answer(&self, message: &Message, value: u64) -> Result<()> {
        if message.flags & flag::NEED_REPLY != 0 {
            let mut reply = header(message.request, flag::VERSION | flag::REPLY, 8).to_vec();
            reply.extend_from_slice(&value.to_le_bytes());
            self.wire.send(&reply, &[])?;
        }
        Ok(())
    }

    /// The raw socket.
    pub fn stream(&self) -> &UnixStream {
        &self.wire.stream
    }
}
