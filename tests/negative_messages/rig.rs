//! A daemon that has to take everything, sessions at every stage, and what they leave behind.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_user_frontend as frontend;

use frontend::message::header;
use frontend::protocol::{flag, request};
use frontend::{Client, Device, DeviceOptions, Error, process};

use crate::common::{Rig, SOON, until};
use crate::table::{Files, Kind};

const MIB: u64 = 1 << 20;

/// How far a session has come when it goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Connected, and nothing said.
    Connected,
    /// Features and protocol features, and no memory.
    NoMemory,
    /// Negotiated, with memory.
    Negotiated,
    /// With the first ring running.
    Running,
    /// With the first ring stopped again.
    Stopped,
}

impl Stage {
    pub const ALL: [Self; 5] = [
        Self::Connected,
        Self::NoMemory,
        Self::Negotiated,
        Self::Running,
        Self::Stopped,
    ];
}

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The connection has ended.
    Ended,
    /// It was refused: by its acknowledgement, or as its own answer says it.
    Refused,
    /// It was taken, or answered.
    Taken(Vec<u8>),
    /// There was no answer, and the connection goes on.
    Silent,
}

impl Answer {
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Ended | Self::Refused)
    }
}

/// Whether `len` bytes are wrong for a message whose payload has `right` in this suite. Some have a part of any
/// length, and one is sent in two lengths.
pub fn is_wrong_length(id: u32, len: usize, right: usize) -> bool {
    match id {
        // Padding after the last field: 20 bytes, or 24 as compilers lay it out.
        31 | 32 => len != 20 && len != 24,
        _ => len != right,
    }
}

/// A connection, and what has to stay open with it.
pub struct Session {
    device: Device,
    /// The connection of a stage before the handshake.
    raw: Option<Client>,
    ends: std::cell::RefCell<Vec<UnixStream>>,
    ended: bool,
}

impl Session {
    /// Guest memory and rings.
    pub fn device(&self) -> &Device {
        &self.device
    }

    fn client(&self) -> &Client {
        match &self.raw {
            Some(client) => client,
            None => self.device.client().unwrap(),
        }
    }

    /// Descriptors that are right for a message.
    pub fn files(&self, kind: &Kind) -> Files {
        kind.carries
            .files(&self.device, &mut self.ends.borrow_mut())
    }

    /// Sends a payload with the descriptors that are right.
    pub fn send(&mut self, kind: &Kind, payload: &[u8]) -> Answer {
        let files = self.files(kind);
        self.send_with(kind, payload, &files.raw())
    }

    /// Sends a payload with descriptors.
    pub fn send_with(&mut self, kind: &Kind, payload: &[u8], fds: &[RawFd]) -> Answer {
        let flags = flag::VERSION | flag::NEED_REPLY;
        let mut bytes = header(kind.id, flags, payload.len() as u32).to_vec();
        bytes.extend_from_slice(payload);
        self.send_all(kind, &bytes, fds)
    }

    /// Sends bytes.
    pub fn send_bytes(&mut self, kind: &Kind, bytes: &[u8]) -> Answer {
        self.send_all(kind, bytes, &[])
    }

    /// Sends bytes that are no message, with descriptors, and asks for nothing.
    pub fn raw_bytes(&self, bytes: &[u8], fds: &[RawFd]) -> frontend::Result<()> {
        self.client().send_raw(bytes, fds)
    }

    fn send_all(&mut self, kind: &Kind, bytes: &[u8], fds: &[RawFd]) -> Answer {
        let answer = self.sent_and_answered(kind, bytes, fds);
        self.ended |= answer == Answer::Ended;
        answer
    }

    fn sent_and_answered(&self, kind: &Kind, bytes: &[u8], fds: &[RawFd]) -> Answer {
        let client = self.client();
        if let Err(error) = client.send_raw(bytes, fds) {
            assert!(matches!(error, Error::Closed), "{}: {error}", kind.name);
            return Answer::Ended;
        }
        // A question that is always answered tells that what came before it was seen.
        let probe = header(request::GET_FEATURES, flag::VERSION, 0);
        if client.send_raw(&probe, &[]).is_err() {
            return Answer::Ended;
        }
        let mut answer = Answer::Silent;
        let mut answers_due = 1 + usize::from(kind.id == request::GET_FEATURES);
        loop {
            match client.recv() {
                Ok(reply) if reply.request == request::GET_FEATURES => {
                    answers_due -= 1;
                    if answers_due == 0 {
                        return answer;
                    }
                    answer = Answer::Taken(reply.payload);
                }
                Ok(reply) => {
                    assert_eq!(reply.request, kind.id, "an answer to something else");
                    assert_eq!(answer, Answer::Silent, "{}: two answers", kind.name);
                    answer = judge(kind, reply.payload);
                }
                Err(Error::Closed) => return Answer::Ended,
                // With its last answer unread by us, the end may come as a broken header.
                Err(error) => panic!("{}: {error}", kind.name),
            }
        }
    }

    /// Uses the first ring, if it may still run; an error is an answer.
    pub fn use_ring(&mut self, stage: Stage) {
        if stage != Stage::Running || self.ended {
            return;
        }
        let queue = self.device.queue(0);
        let op = frontend::Op::Write {
            sector: 8,
            data: &[3; 512],
        };
        // Whatever was done to its descriptors and addresses: nobody may hang over it.
        let _ = queue.run(op, Duration::from_millis(20));
    }
}

fn judge(kind: &Kind, payload: Vec<u8>) -> Answer {
    if !kind.answers {
        return match payload.as_slice() {
            [0, 0, 0, 0, 0, 0, 0, 0] => Answer::Taken(payload),
            bytes => {
                assert_eq!(bytes.len(), 8, "{}", kind.name);
                Answer::Refused
            }
        };
    }
    match (kind.id, payload.as_slice()) {
        // The protocol's error of GET_CONFIG: no payload, or none of the configuration.
        (request::GET_CONFIG, bytes) if bytes.len() <= 12 => Answer::Refused,
        // The lower byte is the error (vhost-user.rst, VHOST_USER_SET_DEVICE_STATE_FD).
        (42 | 43, [error, ..]) if *error != 0 => Answer::Refused,
        // What is not supported is acknowledged as such, since its own answer is not known.
        (_, [1, 0, 0, 0, 0, 0, 0, 0]) => Answer::Refused,
        _ => Answer::Taken(payload),
    }
}

/// The daemon.
pub struct Bad {
    pub rig: Rig,
    idle: Idle,
}

/// What an idle daemon has open.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Idle {
    fds: usize,
    /// Mappings of files; the allocator's are its own affair.
    mapped_files: usize,
    threads: usize,
}

/// Threads of the daemon's own; the kernel's helpers of its io_urings come and go.
fn threads(pid: u32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names =
        tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| !name.starts_with("iou-")).count()
}

impl Idle {
    fn of(pid: u32) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let of_a_file = |line: &&str| {
            let inode = line.split_whitespace().nth(4);
            inode.is_some_and(|inode| inode != "0")
        };
        Self {
            fds: process::fd_count(pid).unwrap(),
            mapped_files: maps.lines().filter(of_a_file).count(),
            threads: threads(pid),
        }
    }
}

impl Bad {
    pub fn new() -> Self {
        let mut rig = Rig::with("qcow2", 16 * MIB, |d| d.queues(2).workers(2));
        // Once through, so that all is open that stays open.
        rig.assert_serves_a_new_client();
        let pid = rig.daemon.pid();
        until("it is idle", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
        });
        let mut last = Idle::of(pid);
        until("it has closed what it closes", || {
            let now = Idle::of(pid);
            std::mem::replace(&mut last, now.clone()) == now
        });
        let idle = last;
        Self { rig, idle }
    }

    fn options() -> DeviceOptions {
        DeviceOptions {
            // Whatever is offered.
            protocol_features: u64::MAX,
            memory: vec![frontend::RegionSpec::new(0, MIB)],
            slots: frontend::SlotOptions {
                data_len: 4096,
                count: 4,
                ..frontend::SlotOptions::default()
            },
            ..DeviceOptions::default()
        }
    }

    /// A session that has come to `stage`.
    pub fn session(&self, stage: Stage) -> Session {
        let socket = self.rig.daemon.socket();
        let mut device = Device::negotiate(socket, Self::options()).unwrap();
        match stage {
            Stage::Negotiated => {}
            Stage::Running => device.start_queues().unwrap(),
            Stage::Stopped => {
                device.start_queues().unwrap();
                device.stop_queue(0).unwrap();
            }
            Stage::Connected | Stage::NoMemory => device.disconnect(),
        }
        let raw = (device.client().is_err()).then(|| {
            // Who comes at once may be taken for a second one; VMMs try again, and so does this.
            loop {
                let mut client = Client::connect_within(socket, SOON).unwrap();
                match stage {
                    Stage::Connected => {
                        // Asked for nothing: the connection is known to be ours only by its use.
                        let quiet = Duration::from_millis(1);
                        if !client.closed_within(quiet).unwrap() {
                            break client;
                        }
                    }
                    _ => {
                        let Ok(features) = client.get_features() else {
                            continue;
                        };
                        let protocol = client.get_protocol_features().unwrap();
                        client.set_protocol_features(protocol).unwrap();
                        client.set_owner().unwrap();
                        client.set_features(features).unwrap();
                        break client;
                    }
                }
            }
        });
        Session {
            device,
            raw,
            ends: std::cell::RefCell::default(),
            ended: false,
        }
    }

    /// Ends a session; the next VM is served as ever.
    pub fn end(&mut self, session: Session) {
        drop(session);
        self.serves();
    }

    /// A VM in good order: it reads what it wrote.
    pub fn serves(&mut self) {
        self.rig.daemon.assert_alive();
        let mut device = Device::start(self.rig.daemon.socket(), Self::options()).unwrap();
        let sector = device.capacity() / 512 - 8;
        device.write(sector, &[0x5a; 4096]).unwrap();
        assert_eq!(device.read(sector, 4096).unwrap(), [0x5a; 4096]);
        device.shut_down().unwrap();
    }

    /// The daemon has open what it had in the beginning.
    pub fn nothing_leaks(&mut self) {
        self.rig.daemon.assert_alive();
        let pid = self.rig.daemon.pid();
        let mut now = Idle::of(pid);
        let deadline = std::time::Instant::now() + SOON;
        let leaks = |now: &Idle| {
            now.fds != self.idle.fds
                || now.mapped_files != self.idle.mapped_files
                || now.threads > self.idle.threads
        };
        while leaks(&now) {
            assert!(
                std::time::Instant::now() < deadline,
                "it had {:?} and has {now:?}",
                self.idle
            );
            std::thread::sleep(Duration::from_millis(1));
            now = Idle::of(pid);
        }
    }
}

fn pipe() -> Vec<OwnedFd> {
    let mut ends = [0; 2];
    // SAFETY: pipe2 fills two descriptors, which are ours alone.
    unsafe {
        assert_eq!(0, libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC));
        ends.map(|fd| OwnedFd::from_raw_fd(fd)).into()
    }
}

fn file(path: &str, write: bool) -> Vec<OwnedFd> {
    let file = File::options().read(true).write(write).open(path);
    vec![file.unwrap().into()]
}

/// What a kind of descriptor is, and how to make some: the first is to be sent.
type WrongFile = (&'static str, fn() -> Vec<OwnedFd>);

/// Descriptors of the wrong kind.
pub const WRONG_FILES: &[WrongFile] = &[
    ("a directory", || file("/", false)),
    ("/dev/null", || file("/dev/null", true)),
    ("a file that is only read", || file("/proc/self/exe", false)),
    ("an empty file", || vec![frontend::sys::memfd(0).unwrap()]),
    ("the reading end of a pipe", pipe),
    ("the writing end of a pipe that is full", || {
        let mut ends = pipe();
        ends.reverse();
        fill(&ends[0]);
        ends
    }),
    ("a pipe that nobody reads", || {
        let mut ends = pipe();
        ends.reverse();
        ends.truncate(1);
        ends
    }),
    ("an eventfd that blocks and is full", || {
        // SAFETY: plain call; the descriptor is ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC)) };
        let most = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: eight readable bytes.
        let n = unsafe { libc::write(fd.as_raw_fd(), most.as_ptr().cast(), 8) };
        assert_eq!(n, 8);
        vec![fd]
    }),
    ("a socket whose other end is closed", || {
        let (ours, _) = UnixStream::pair().unwrap();
        vec![ours.into()]
    }),
    ("a socket of datagrams", || {
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        vec![ours.into(), theirs.into()]
    }),
    ("an epoll instance", || {
        // SAFETY: plain call; the descriptor is ours alone.
        vec![unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) }]
    }),
];

/// Fills a pipe, so that a write to it would wait for ever.
fn fill(end: &OwnedFd) {
    let fd = end.as_raw_fd();
    // SAFETY: the descriptor is open, and the buffer readable.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK);
        let bytes = [0u8; 4096];
        while libc::write(fd, bytes.as_ptr().cast(), bytes.len()) > 0 {}
        libc::fcntl(fd, libc::F_SETFL, flags);
    }
}
