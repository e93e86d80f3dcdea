//! The target: what its threads share, and the handle to it.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::connection::Connection;
use crate::counters::{Counters, Snapshot};
use crate::discovery;
use crate::faults::Faults;
use crate::journal::{Execution, Journal};
use crate::link::{Link, Mail};
use crate::options::{NamespaceSpec, PortSpec, SubsystemSpec};
pub use crate::port::Port;
use crate::subsystem::Subsystem;
use crate::sync::Locked;

/// The NQN of the subsystem that a target has if none was asked for.
pub const DEFAULT_NQN: &str = "nqn.2026-01.org.example:disk";

/// Lines of the log, and violations, that are kept at most.
const KEPT_LINES: usize = 10_000;

/// A connection and its thread.
type Served = (Arc<Link>, Option<JoinHandle<()>>);

pub(crate) struct Shared {
    pub subsystems: Vec<Arc<Subsystem>>,
    pub ports: Vec<Arc<Port>>,
    pub counters: Counters,
    pub faults: Faults,
    pub journal: Journal,
    stopping: AtomicBool,
    connections: Mutex<HashMap<u64, Served>>,
    next_connection: AtomicU64,
    notes: Mutex<Vec<String>>,
    violations: Mutex<Vec<String>>,
    verbose: bool,
}

impl Shared {
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
    pub fn next_connection(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed) + 1
    }
    pub fn association_began(&self) {
        self.counters.association_began();
    }
    pub fn association_ended(&self) {
        self.counters.association_ended();
    }

    /// Keeps a line of what happened.
    pub fn note(&self, line: fmt::Arguments<'_>) {
        keep(&self.notes, line, self.verbose);
    }

    /// Keeps a line of what the host must not do.
    pub fn violation(&self, line: fmt::Arguments<'_>) {
        keep(&self.violations, line, self.verbose);
    }

    pub fn find_subsystem(&self, nqn: &str) -> Option<Arc<Subsystem>> {
        self.subsystems.iter().find(|s| s.nqn() == nqn).cloned()
    }

    pub fn discovery_log(&self, port: u16) -> Vec<u8> {
        discovery::log_page(&self.ports, &self.subsystems, port)
    }

    /// Gives a connection a thread of its own.
    pub fn start(self: &Arc<Self>, link: Arc<Link>, mut connection: Connection) -> io::Result<()> {
        let id = link.id;
        self.connections.locked().insert(id, (link.clone(), None));
        let shared = self.clone();
        let name = format!("connection-{id}");
        let thread = thread::Builder::new().name(name).spawn(move || {
            connection.run();
            drop(connection);
            shared.connections.locked().remove(&id);
        });
        let thread = match thread {
            Ok(thread) => thread,
            Err(e) => {
                self.connections.locked().remove(&id);
                return Err(e);
            }
        };
        // A connection that is over already has taken itself off, and its thread needs nobody to wait for it.
        if let Some(entry) = self.connections.locked().get_mut(&id) {
            entry.1 = Some(thread);
        }
        // The target may have begun to stop meanwhile: then nobody else shuts this one down.
        if self.stopping() {
            link.shut_down();
        }
        Ok(())
    }

    pub fn links(&self) -> Vec<Arc<Link>> {
        self.connections
            .locked()
            .values()
            .map(|(link, _)| link.clone())
            .collect()
    }
}

fn keep(lines: &Mutex<Vec<String>>, line: fmt::Arguments<'_>, verbose: bool) {
    let line = line.to_string();
    if verbose {
        eprintln!("target: {line}");
    }
    let mut lines = lines.locked();
    if lines.len() < KEPT_LINES {
        lines.push(line);
    }
}

/// A target that is not started yet.
#[derive(Default)]
pub struct Builder {
    subsystems: Vec<SubsystemSpec>,
    ports: Vec<PortSpec>,
    verbose: bool,
}

impl Builder {
    /// Adds a subsystem; without any there is [`DEFAULT_NQN`] with namespace 1 of 64 MiB.
    pub fn subsystem(mut self, subsystem: SubsystemSpec) -> Self {
        self.subsystems.push(subsystem);
        self
    }

    /// Adds a port; without any there is one at a free port of 127.0.0.1.
    pub fn port(mut self, port: PortSpec) -> Self {
        self.ports.push(port);
        self
    }

    /// Writes its notes and the host's violations to standard error as well.
    pub fn verbose(mut self, verbose: bool) -> Self {
        self.verbose = verbose;
        self
    }

    /// Starts the target.
    ///
    /// # Errors
    /// An address cannot be listened on, or there is no memory or no thread to be had.
    pub fn start(mut self) -> io::Result<Target> {
        if self.subsystems.is_empty() {
            let namespace = NamespaceSpec::new(1, 64 << 20);
            self.subsystems
                .push(SubsystemSpec::new(DEFAULT_NQN).namespace(namespace));
        }
        if self.ports.is_empty() {
            self.ports.push(PortSpec::loopback());
        }
        let mut subsystems = vec![Arc::new(Subsystem::new(&discovery::subsystem(), true)?)];
        for spec in &self.subsystems {
            subsystems.push(Arc::new(Subsystem::new(spec, false)?));
        }
        let mut ports = Vec::new();
        for (i, spec) in self.ports.iter().enumerate() {
            ports.push(Arc::new(Port::open(i as u16 + 1, spec)?));
        }
        let shared = Arc::new(Shared {
            subsystems,
            ports,
            counters: Counters::default(),
            faults: Faults::default(),
            journal: Journal::default(),
            stopping: AtomicBool::new(false),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(0),
            notes: Mutex::default(),
            violations: Mutex::default(),
            verbose: self.verbose,
        });
        let mut target = Target {
            shared: shared.clone(),
            acceptors: Vec::new(),
        };
        for port in &shared.ports {
            let (port, shared) = (port.clone(), shared.clone());
            let name = format!("port-{}", port.id());
            target.acceptors.push(
                thread::Builder::new()
                    .name(name)
                    .spawn(move || port.run(&shared))?,
            );
        }
        Ok(target)
    }
}

/// A running target. Dropping it ends all its threads.
pub struct Target {
    shared: Arc<Shared>,
    acceptors: Vec<JoinHandle<()>>,
}

impl Target {
    /// A target to be.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where the first port listens.
    pub fn address(&self) -> SocketAddr {
        self.port(0).address()
    }
    /// A port, counted from 0 in the order of the builder. Panics if there are fewer.
    pub fn port(&self, index: usize) -> &Port {
        &self.shared.ports[index]
    }
    /// All ports.
    pub fn ports(&self) -> &[Arc<Port>] {
        &self.shared.ports
    }
    /// A subsystem, counted from 0 in the order of the builder. Panics if there are fewer.
    pub fn subsystem(&self, index: usize) -> &Arc<Subsystem> {
        // The first is the discovery subsystem.
        &self.shared.subsystems[index + 1]
    }
    /// What was counted until now.
    pub fn counters(&self) -> Snapshot {
        self.shared.counters.snapshot()
    }
    /// The script of its misbehaviour.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }
    /// Begins, or ends, to keep the list of what is executed.
    pub fn keep_journal(&self, on: bool) {
        self.shared.journal.switch(on);
    }
    /// What was executed while the list was kept, in the order that it took effect.
    pub fn journal(&self) -> Vec<Execution> {
        self.shared.journal.entries()
    }
    /// Leaves all sockets alone for a time: nothing is read or sent.
    pub fn stall(&self, time: Duration) {
        for link in self.shared.links() {
            link.send(Mail::Stall(time));
        }
    }
    /// TCP connections that are served now.
    pub fn connections(&self) -> usize {
        self.shared.links().len()
    }
    /// What the hosts did that the specifications forbid, in the order that it was noticed. A test of a
    /// well-behaved host ends with this being empty.
    pub fn violations(&self) -> Vec<String> {
        self.shared.violations.locked().clone()
    }
    /// What happened, for the reader of a failed test.
    pub fn notes(&self) -> Vec<String> {
        self.shared.notes.locked().clone()
    }
    /// Cuts all connections of all ports.
    pub fn drop_connections(&self) {
        for link in self.shared.links() {
            link.shut_down();
        }
    }
    /// Cuts all connections of one port, counted from 0.
    pub fn drop_connections_of(&self, port: usize) {
        let id = self.port(port).id();
        for link in self
            .shared
            .links()
            .into_iter()
            .filter(|link| link.port == id)
        {
            link.shut_down();
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for port in &self.shared.ports {
            port.ring();
        }
        for acceptor in self.acceptors.drain(..) {
            let _ = acceptor.join();
        }
        let threads: Vec<JoinHandle<()>> = {
            let mut connections = self.shared.connections.locked();
            connections
                .values_mut()
                .filter_map(|(link, thread)| {
                    link.shut_down();
                    thread.take()
                })
                .collect()
        };
        for thread in threads {
            let _ = thread.join();
        }
    }
}
