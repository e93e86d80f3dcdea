//! Scenarios against the tests' own target.

mod changes;
mod flood;
mod lies;
mod life;
mod opening;
mod queues;
mod relay;
mod security;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use nvme_target::{PortSpec, Target};

use super::open;
use crate::block::nvme_tcp::link::{IoConnection, Member, MemberEvent, Namespace};
use crate::block::nvme_tcp::spec::{Address, NamespaceName, NvmeOptions, NvmeSpec};

/// How long something may take that does happen.
const PATIENCE: Duration = Duration::from_secs(20);
/// Opcode of Get Log Page.
const GET_LOG_PAGE: u8 = 0x02;
const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:01234567-89ab-cdef-0011-223344556677";

fn options() -> NvmeOptions {
    NvmeOptions {
        host_nqn: Some(HOST.to_owned()),
        host_id: Some([7; 16]),
        connect_timeout: Duration::from_secs(5),
        ..NvmeOptions::default()
    }
}

fn spec_of(addresses: &[SocketAddr], change: impl FnOnce(&mut NvmeOptions)) -> NvmeSpec {
    let mut options = options();
    change(&mut options);
    NvmeSpec {
        addresses: addresses
            .iter()
            .map(|address| Address {
                host: address.ip().to_string(),
                port: address.port(),
            })
            .collect(),
        subsystem: nvme_target::DEFAULT_NQN.to_owned(),
        namespace: NamespaceName::Nsid(1),
        read_only: false,
        options: Arc::new(options),
    }
}

fn spec(target: &Target) -> NvmeSpec {
    let addresses: Vec<_> = target.ports().iter().map(|port| port.address()).collect();
    spec_of(&addresses, |_| {})
}

fn one_port() -> Target {
    Target::builder().start().unwrap()
}

fn two_ports() -> Target {
    let target = Target::builder()
        .port(PortSpec::loopback())
        .port(PortSpec::loopback());
    target.start().unwrap()
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A member whose thread is the test's.
struct Worker {
    member: Arc<Member>,
    events: VecDeque<MemberEvent>,
    queues: Vec<IoConnection>,
}

impl Worker {
    fn new(namespace: &Namespace) -> Self {
        Self::of(namespace.join())
    }

    fn of(member: Arc<Member>) -> Self {
        member.set_waker(&Waker::from(Arc::new(Unpark(thread::current()))));
        Self {
            member,
            events: VecDeque::new(),
            queues: Vec::new(),
        }
    }

    /// The next event.
    fn next(&mut self) -> MemberEvent {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.events.extend(self.member.take_events());
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no event came");
            thread::park_timeout(left);
        }
    }

    /// The next queue of a path, whatever comes before. Queues of other paths are kept.
    fn connected(&mut self, path: usize) -> IoConnection {
        if let Some(at) = self.queues.iter().position(|queue| queue.path == path) {
            return self.queues.remove(at);
        }
        loop {
            match self.next() {
                MemberEvent::Connected(queue) if queue.path == path => return *queue,
                MemberEvent::Connected(queue) => self.queues.push(*queue),
                MemberEvent::Refused { why, .. } => panic!("refused: {why}"),
                _ => {}
            }
        }
    }

    /// Waits for the end of an association.
    fn lost(&mut self, path: usize) -> u64 {
        loop {
            match self.next() {
                MemberEvent::Lost {
                    path: of,
                    generation,
                } if of == path => return generation,
                MemberEvent::Refused { why, .. } => panic!("refused: {why}"),
                _ => {}
            }
        }
    }

    fn refused(&mut self) -> String {
        loop {
            if let MemberEvent::Refused { why, .. } = self.next() {
                return why;
            }
        }
    }

    /// The queues of the first two paths.
    fn both(&mut self) -> [IoConnection; 2] {
        [self.connected(0), self.connected(1)]
    }

    /// Waits until something is so that an event tells to look at.
    fn until(&mut self, is: impl Fn() -> bool) {
        while !is() {
            self.next();
        }
    }
}

/// A target with one port, its namespace opened, and a member that has its queue.
fn served() -> (Target, Arc<Namespace>, Worker, IoConnection) {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    let queue = worker.connected(0);
    (target, namespace, worker, queue)
}

/// Waits until something is so that nobody tells of.
fn eventually(is: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline, "it does not happen");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until so many Keep Alives have come.
fn outlive(target: &Target, keep_alives: u64) {
    let enough = target.counters().keep_alives() + keep_alives;
    let deadline = Instant::now() + PATIENCE;
    while target.counters().keep_alives() < enough {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}

/// Closes a namespace, and checks that all was according to the specifications.
fn close(namespace: &Namespace, target: &Target) {
    assert!(namespace.close_and_wait(PATIENCE), "a path did not end");
    assert_eq!(target.violations(), Vec::<String>::new());
}

/// Why a namespace cannot be opened.
fn refused(spec: NvmeSpec) -> crate::block::Error {
    match open(spec) {
        Ok(namespace) => {
            namespace.close();
            panic!("it was opened");
        }
        Err(error) => error,
    }
}
