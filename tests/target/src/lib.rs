//! A small NVMe/TCP target for tests and benchmarks: it serves namespaces in memory, and misbehaves on command.
//!
//! It is an independent reading of the specifications (NVM Express base 2.0, NVM command set, TCP transport
//! 1.0a) and shares no code with the daemon, so that the two cannot agree on a mistake.
//!
//! A target has *ports* (addresses), *subsystems* that are reached at all of them, and in these *namespaces*. The
//! discovery subsystem ([`DISCOVERY_NQN`]) is always there. Each connection has a thread of its own; dropping the
//! [`Target`] ends them all. The same target as a process is the binary of this crate (`--help` tells its options).
//!
//! ```
//! use std::time::Duration;
//! use virtioblkd_test_target::{
//!     AnaState, Fault, Listening, NamespaceSpec, Notice, On, PortSpec, Rule, Status, SubsystemSpec, Target,
//! };
//!
//! // Two paths to one namespace.
//! let target = Target::builder()
//!     .subsystem(
//!         SubsystemSpec::new("nqn.2026-01.org.example:disk")
//!             .namespace(NamespaceSpec::new(1, 64 << 20).lba_size(4096))
//!             .with(|controller| controller.max_io_queues = 4),
//!     )
//!     .port(PortSpec::loopback().with(|transport| transport.r2t_size = 64 << 10))
//!     .port(PortSpec::loopback())
//!     .start()?;
//! println!("connect to {} and {}", target.port(0).address(), target.port(1).address());
//!
//! // What goes wrong with commands: by number, always, or by chance with a seed.
//! let faults = target.faults();
//! faults.seed(7);
//! let dropped = faults.add(Rule::nth(On::Write, 3, Fault::DropAfterExecution));
//! faults.add(Rule::always(On::KeepAlive, Fault::NoAnswer { execute: false, abortable: false }).port(1));
//! faults.add(Rule::rate(On::Io, 50, Fault::DelayUpTo(Duration::from_millis(5))));
//! faults.add(Rule::once(On::Connect, Fault::Status(Status::CONNECT_BUSY)).queue(0));
//!
//! // What goes wrong with everything else.
//! let subsystem = target.subsystem(0);
//! subsystem.set_ana_state(target.port(1), 1, AnaState::Inaccessible, Notice::Send);
//! subsystem.resize(1, 128 << 20, Notice::Send)?;
//! subsystem.configure(|controller| controller.time_to_ready = None);
//! target.port(1).set_listening(Listening::Refuse)?;
//! target.drop_connections_of(1);
//!
//! // … the host does its work, and then: what it did, and whether it kept to the specifications.
//! target.keep_journal(true);
//! assert_eq!(target.faults().fired(dropped), 0);
//! assert_eq!(target.counters().writes(), 0);
//! assert!(target.journal().is_empty());
//! assert_eq!(target.violations(), Vec::<String>::new());
//! # Ok::<(), std::io::Error>(())
//! ```
//!
//! Authentication is [`ControllerOptions::auth`], TLS is [`TransportOptions::tls`]; what goes wrong with them is
//! a field of theirs. A test's secrets are in their text form there.

mod admin;
mod auth;
mod build;
mod commands;
mod connect;
mod connection;
mod controller;
mod counters;
mod deallocate;
mod discovery;
mod faults;
mod identify;
mod io_queue;
mod journal;
mod late;
mod link;
mod logs;
mod misbehave;
mod options;
mod output;
mod port;
mod reservation;
mod status;
mod store;
mod stream;
mod subsystem;
mod sync;
mod target;
mod tls;
mod wire;

pub use auth::{AuthFault, AuthOptions, Group, Hash};
pub use counters::Snapshot;
pub use discovery::DISCOVERY_NQN;
pub use faults::{Fault, Faults, On, Rule, RuleId};
pub use journal::Execution;
pub use options::{
    ControllerOptions, Identity, NamespaceOptions, NamespaceSpec, PortSpec, SubsystemSpec,
    TransportOptions,
};
pub use port::{Listening, Port};
pub use status::Status;
pub use subsystem::{AnaState, Namespace, Notice, Subsystem};
pub use target::{Builder, DEFAULT_NQN, Target};
pub use tls::{TlsFault, TlsOptions};
pub use wire::FatalErrorStatus;
