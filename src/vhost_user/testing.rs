//! A recording device and a raw front-end, for the tests of this room and of the daemon.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{Connection, ConnectionError, Device, Paused, Progress, Resized, RingStart};
use crate::shared_memory::SharedPart;
use crate::virtio::dirty::DirtyLog;
use crate::virtio::memory::GuestMemory;

/// Features of the recording device: VERSION_1, EVENT_IDX, INDIRECT_DESC, MQ, FLUSH.
pub(crate) const FEATURES: u64 = 1 << 32 | 1 << 29 | 1 << 28 | 1 << 12 | 1 << 9;
pub(crate) const BIT_30: u64 = 1 << 30;
/// LOG_ALL, which the session offers besides.
pub(crate) const LOG_ALL: u64 = 1 << 26;
/// MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS, DEVICE_STATE,
/// GET_VRING_BASE_INFLIGHT and GET_VRING_BASE_SKIP_DRAIN.
pub(crate) const PROTOCOL: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 5
    | 1 << 9
    | 1 << 12
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 19
    | 1 << 20
    | 1 << 23;
/// Offered only where this process may have a userfaultfd.
pub(crate) const PAGEFAULT: u64 = 1 << 8;
pub(crate) const NEED_REPLY: u32 = 0x8;

/// A call of the session to its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    Features(u64),
    Start(u16, u32),
    Stop(u16),
    Suspend(u16),
    Memory(usize),
    Kick(u16, bool),
    Call(u16, bool),
    Err(u16, bool),
    Enabled(u16, bool),
    SetConfig(u32, Vec<u8>),
    Journal(Option<usize>),
    Log(bool),
    UsedLog(u16, Option<u64>),
    Pause,
    Resumed,
    Reset,
}

/// A device that keeps a record of what the session asks of it.
#[derive(Default)]
pub(crate) struct FakeDevice {
    /// Features that it offers beside [`FEATURES`].
    pub(crate) more_features: AtomicU64,
    calls: Mutex<Vec<Asked>>,
    starts: Mutex<Vec<RingStart>>,
    memory: Mutex<Option<Arc<GuestMemory>>>,
    log: Mutex<Option<Arc<DirtyLog>>>,
    /// `start_ring` fails with these words.
    pub(crate) start_error: Mutex<Option<String>>,
    /// `pause` leaves an image behind that is wrong, in these words.
    pub(crate) pause_error: Mutex<Option<String>>,
    /// `config` fails with these words.
    pub(crate) config_error: Mutex<Option<String>>,
    /// What each `stop_ring` reports as in flight before it returns.
    pub(crate) in_flight: AtomicU64,
    /// A running ring has fetched so many requests when it stops.
    pub(crate) fetched: AtomicU64,
    /// The capacity, in bytes.
    pub(crate) size: AtomicU64,
    /// The capacity that `refresh` finds; `None`: it fails.
    pub(crate) size_outside: Mutex<Option<u64>>,
    changed: Mutex<Option<EventFd>>,
    outside: Mutex<Option<EventFd>>,
    /// Held by a test to keep `stop_ring` and `reset` from ending.
    pub(crate) gate: Mutex<()>,
}

impl FakeDevice {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(FakeDevice::default())
    }

    /// What was called since the last time.
    pub(crate) fn calls(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// What the rings were started with since the last time.
    pub(crate) fn starts(&self) -> Vec<RingStart> {
        std::mem::take(&mut *self.starts.lock().unwrap())
    }

    /// The memory that `set_memory` gave last.
    pub(crate) fn memory(&self) -> Option<Arc<GuestMemory>> {
        self.memory.lock().unwrap().clone()
    }

    /// The log that `set_log` gave last.
    pub(crate) fn log(&self) -> Option<Arc<DirtyLog>> {
        self.log.lock().unwrap().clone()
    }

    /// The disk has another size.
    pub(crate) fn resize(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
        if let Some(event) = &*self.changed.lock().unwrap() {
            event.write(1).unwrap();
        }
    }

    /// The image tells of another size by itself.
    pub(crate) fn resize_outside(&self, size: u64) {
        *self.size_outside.lock().unwrap() = Some(size);
        let outside = self.outside.lock().unwrap();
        outside.as_ref().unwrap().write(1).unwrap();
    }

    fn record(&self, call: Asked) {
        self.calls.lock().unwrap().push(call);
    }
}

impl Device for FakeDevice {
    fn features(&self) -> u64 {
        FEATURES | self.more_features.load(Ordering::Relaxed)
    }

    fn num_queues(&self) -> u16 {
        4
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self, offset: u32, len: u32) -> Result<Vec<u8>, String> {
        if let Some(error) = &*self.config_error.lock().unwrap() {
            return Err(error.clone());
        }
        // A configuration of 60 bytes, each its own offset.
        let end = (offset + len).min(60);
        Ok((offset..end).map(|byte| byte as u8).collect())
    }

    fn capacity(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn on_change(&self, event: EventFd) {
        *self.changed.lock().unwrap() = Some(event);
    }

    fn on_outside_change(&self, event: EventFd) -> std::io::Result<()> {
        *self.outside.lock().unwrap() = Some(event);
        Ok(())
    }

    fn refresh(&self) -> Result<Resized, String> {
        let old = self.capacity();
        let outside = *self.size_outside.lock().unwrap();
        let new = outside.ok_or("the file is gone")?;
        if old != new {
            self.resize(new);
        }
        Ok(Resized { old, new })
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> Result<(), String> {
        if offset < 32 {
            return Err(format!("byte {offset} of the configuration is read-only"));
        }
        self.record(Asked::SetConfig(offset, data.to_vec()));
        Ok(())
    }

    fn set_acked_features(&self, features: u64) {
        self.record(Asked::Features(features));
    }

    fn journal_bytes(&self) -> usize {
        4096
    }

    fn set_journal(&self, memory: Option<SharedPart>) {
        self.record(Asked::Journal(memory.map(|memory| memory.len())));
    }

    fn start_ring(&self, index: u16, start: RingStart) -> Result<(), String> {
        if let Some(error) = &*self.start_error.lock().unwrap() {
            return Err(error.clone());
        }
        self.record(Asked::Start(index, start.config.base));
        self.starts.lock().unwrap().push(start);
        Ok(())
    }

    fn stop_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, String> {
        let _gate = self.gate.lock().unwrap();
        progress(self.in_flight.load(Ordering::Relaxed) as u32);
        self.record(Asked::Stop(index));
        Ok(self.fetched.load(Ordering::Relaxed) as u32)
    }

    fn suspend_ring(&self, index: u16, progress: &mut dyn FnMut(u32)) -> Result<u32, String> {
        progress(self.in_flight.load(Ordering::Relaxed) as u32);
        self.record(Asked::Suspend(index));
        Ok(self.fetched.load(Ordering::Relaxed) as u32)
    }

    fn set_memory(&self, memory: Arc<GuestMemory>) -> Result<(), String> {
        self.record(Asked::Memory(memory.regions().len()));
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn set_log(&self, log: Option<Arc<DirtyLog>>) -> Result<(), String> {
        self.record(Asked::Log(log.is_some()));
        *self.log.lock().unwrap() = log;
        Ok(())
    }

    fn set_used_log(&self, index: u16, used_log: Option<u64>) -> Result<(), String> {
        self.record(Asked::UsedLog(index, used_log));
        Ok(())
    }

    fn set_kick(&self, index: u16, kick: Option<File>) -> Result<(), String> {
        self.record(Asked::Kick(index, kick.is_some()));
        Ok(())
    }

    fn set_call(&self, index: u16, call: Option<File>) -> Result<(), String> {
        self.record(Asked::Call(index, call.is_some()));
        Ok(())
    }

    fn set_err(&self, index: u16, err: Option<File>) -> Result<(), String> {
        self.record(Asked::Err(index, err.is_some()));
        Ok(())
    }

    fn set_enabled(&self, index: u16, enabled: bool) -> Result<(), String> {
        self.record(Asked::Enabled(index, enabled));
        Ok(())
    }

    fn reset(&self) {
        let _gate = self.gate.lock().unwrap();
        self.record(Asked::Reset);
        self.starts.lock().unwrap().clear();
        *self.memory.lock().unwrap() = None;
    }

    fn image_files(&self) -> std::io::Result<Vec<File>> {
        Ok(Vec::new())
    }

    fn descriptors(&self) -> std::io::Result<Vec<(RawFd, File)>> {
        Ok(Vec::new())
    }

    fn write_ahead(&self) -> Result<(), String> {
        Ok(())
    }

    fn pause(&self, progress: &mut dyn FnMut(u32)) -> Paused<String> {
        let _gate = self.gate.lock().unwrap();
        progress(self.in_flight.load(Ordering::Relaxed) as u32);
        self.record(Asked::Pause);
        let base = self.fetched.load(Ordering::Relaxed) as u32;
        let failed = self.pause_error.lock().unwrap().clone();
        Paused {
            bases: (0..4).map(|index| (index, base)).collect(),
            image: failed.map_or(Ok(()), Err),
        }
    }

    fn resumed(&self) {
        self.record(Asked::Resumed);
    }
}

/// Where a ring of 256 entries or fewer lies in the test guest: user address = guest address + this.
pub(crate) const USER_BASE: u64 = 0x7f00_0000_0000;
/// Guest memory of the tests, in bytes.
pub(crate) const MEMORY_SIZE: u64 = 1 << 20;

/// A memfd of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    // SAFETY: the name is a C string, and the descriptor returned is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Bytes of several 64-bit numbers.
pub(crate) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Bytes of a vring state.
pub(crate) fn state(index: u32, num: u32) -> Vec<u8> {
    [index.to_ne_bytes(), num.to_ne_bytes()].concat()
}

/// Bytes of a `SET_VRING_ADDR` for ring `index`, which lies at guest address `index << 16`, moved by
/// `shift`.
pub(crate) fn addresses(index: u32, shift: u64) -> Vec<u8> {
    let desc = USER_BASE + (u64::from(index) << 16) + shift;
    let mut bytes = state(index, 0);
    bytes.extend(words(&[desc, desc + 0x4000, desc + 0x2000, 0]));
    bytes
}

/// A front-end that sends whatever bytes a test wants.
pub(crate) struct Client {
    pub(crate) sock: UnixStream,
}

impl Client {
    pub(crate) fn send(&self, request: FrontendReq, flags: u32, payload: &[u8], fds: &[RawFd]) {
        self.send_raw(
            request as u32,
            1 | flags,
            payload.len() as u32,
            payload,
            fds,
        );
    }

    pub(crate) fn send_raw(
        &self,
        request: u32,
        flags: u32,
        size: u32,
        payload: &[u8],
        fds: &[RawFd],
    ) {
        let mut message = Vec::new();
        for word in [request, flags, size] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        let sent = self.sock.send_with_fds(&[&message[..]], fds).unwrap();
        assert_eq!(sent, message.len());
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.sock.write_all(bytes).unwrap();
    }

    /// The next reply: its request and its payload.
    pub(crate) fn reply(&mut self) -> (u32, Vec<u8>) {
        let mut header = [0u8; 12];
        self.sock.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 0x5, "version 1, a reply");
        let mut payload = vec![0; word(8) as usize];
        self.sock.read_exact(&mut payload).unwrap();
        (word(0), payload)
    }

    /// The next reply that brings a descriptor: its payload and the file.
    pub(crate) fn reply_with_fd(&mut self, request: FrontendReq) -> (Vec<u8>, File) {
        let mut bytes = [0u8; 256];
        let (len, file) = self.sock.recv_with_fd(&mut bytes).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (request as u32, 0x5));
        assert_eq!(len, 12 + word(8) as usize);
        (bytes[12..len].to_vec(), file.expect("a descriptor"))
    }

    pub(crate) fn reply_u64(&mut self, request: FrontendReq) -> u64 {
        let (code, payload) = self.reply();
        assert_eq!(code, request as u32);
        u64::from_ne_bytes(payload.try_into().unwrap())
    }

    /// Whether nothing waits to be read.
    pub(crate) fn is_silent(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.sock.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, no wait.
        unsafe { libc::poll(&mut poll, 1, 0) == 0 }
    }
}

/// A connection with both its ends in one thread: a message is sent, then handled.
pub(crate) struct Bench {
    pub(crate) client: Client,
    pub(crate) connection: Connection,
    pub(crate) device: Arc<FakeDevice>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let device = FakeDevice::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours, "disk", device.clone()).unwrap();
        Bench {
            client: Client { sock: theirs },
            connection,
            device,
        }
    }

    /// A connection on which bit 30 and every protocol feature are negotiated.
    pub(crate) fn negotiated() -> Self {
        let mut bench = Bench::new();
        bench.negotiate(FEATURES | BIT_30);
        bench
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        let offered = self.device.features() | BIT_30 | LOG_ALL;
        assert_eq!(self.get(FrontendReq::GET_FEATURES), offered);
        let protocol = self.get(FrontendReq::GET_PROTOCOL_FEATURES);
        assert_eq!(protocol & !PAGEFAULT, PROTOCOL);
        self.client.send(
            FrontendReq::SET_PROTOCOL_FEATURES,
            0,
            &words(&[PROTOCOL]),
            &[],
        );
        self.client.send(FrontendReq::SET_OWNER, 0, &[], &[]);
        self.run().unwrap();
        self.set(FrontendReq::SET_FEATURES, &words(&[features]), &[]);
        self.device.calls();
    }

    /// Handles everything that was sent.
    pub(crate) fn run(&mut self) -> Result<Progress, ConnectionError> {
        loop {
            match self.connection.process()? {
                Progress::More => {}
                done => return Ok(done),
            }
        }
    }

    /// Sends a request that has a 64-bit answer and returns that.
    pub(crate) fn get(&mut self, request: FrontendReq) -> u64 {
        self.client.send(request, 0, &[], &[]);
        assert_eq!(self.run().unwrap(), Progress::Idle);
        self.client.reply_u64(request)
    }

    /// Sends a request with `need_reply`; whether it was accepted.
    pub(crate) fn try_set(&mut self, request: FrontendReq, payload: &[u8], fds: &[RawFd]) -> bool {
        self.client.send(request, NEED_REPLY, payload, fds);
        assert_eq!(self.run().unwrap(), Progress::Idle);
        let answer = self.client.reply_u64(request);
        assert!(self.client.is_silent(), "one answer, not two");
        answer == 0
    }

    pub(crate) fn set(&mut self, request: FrontendReq, payload: &[u8], fds: &[RawFd]) {
        assert!(
            self.try_set(request, payload, fds),
            "{request:?} was refused"
        );
    }

    /// `SET_MEM_TABLE` with one region of [`MEMORY_SIZE`] bytes at guest address 0.
    pub(crate) fn share_memory(&mut self) {
        let file = memfd(MEMORY_SIZE);
        let mut payload = state(1, 0);
        payload.extend(words(&[0, MEMORY_SIZE, USER_BASE, 0]));
        self.set(FrontendReq::SET_MEM_TABLE, &payload, &[file.as_raw_fd()]);
    }

    /// The messages that start ring `index`, in QEMU's order, with 128 entries from `base`; returns its
    /// kick and call.
    pub(crate) fn start_ring(&mut self, index: u32, base: u32) -> (EventFd, EventFd) {
        let (kick, call) = (eventfd(), eventfd());
        self.set(FrontendReq::SET_VRING_NUM, &state(index, 128), &[]);
        self.set(FrontendReq::SET_VRING_BASE, &state(index, base), &[]);
        self.set(FrontendReq::SET_VRING_ADDR, &addresses(index, 0), &[]);
        let number = words(&[index.into()]);
        self.set(FrontendReq::SET_VRING_KICK, &number, &[kick.as_raw_fd()]);
        self.set(FrontendReq::SET_VRING_CALL, &number, &[call.as_raw_fd()]);
        self.set(FrontendReq::SET_VRING_ENABLE, &state(index, 1), &[]);
        (kick, call)
    }

    /// `GET_VRING_BASE` of ring `index`.
    pub(crate) fn stop_ring(&mut self, index: u32) -> u32 {
        self.client
            .send(FrontendReq::GET_VRING_BASE, 0, &state(index, 0), &[]);
        assert_eq!(self.run().unwrap(), Progress::Idle);
        let (code, payload) = self.client.reply();
        assert_eq!(code, FrontendReq::GET_VRING_BASE as u32);
        assert_eq!(payload[..4], index.to_ne_bytes());
        u32::from_ne_bytes(payload[4..].try_into().unwrap())
    }
}

/// Set in the environment of a test's process of its own.
pub(crate) const CHILD: &str = "VIRTIOBLKD_TEST_CHILD";

/// Runs the test `name` of this binary again in a process of its own, with [`CHILD`] set, for what
/// parallel tests would disturb: those that start processes hold every descriptor for the moment between
/// fork and exec, so that a closed socket or lock is not free at once.
pub(crate) fn run_alone(name: &str) -> std::process::Output {
    std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap()
}

/// Whether the test `name` is in a process of its own already. If not, it has now passed in one.
pub(crate) fn alone(name: &str) -> bool {
    if is_alone() {
        return true;
    }
    let child = run_alone(name);
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&child.stderr)
    );
    false
}

/// Whether this is the process that [`run_alone`] started.
pub(crate) fn is_alone() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// The open descriptors of this process.
pub(crate) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
