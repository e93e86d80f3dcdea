//! A small NVMe/TCP target for tests and benchmarks: it serves namespaces in memory, and misbehaves on command.
//!
//! It is an independent reading of the specifications (NVM Express base 2.0, NVM command set, TCP transport
//! 1.0a) and shares no code with the daemon, so that the two cannot agree on a mistake.
//!
//! ```
//! use virtioblkd_test_target::{NamespaceSpec, PortSpec, SubsystemSpec, Target};
//!
//! let target = Target::builder()
//!     .subsystem(
//!         SubsystemSpec::new("nqn.2026-01.org.example:disk")
//!             .namespace(NamespaceSpec::new(1, 64 << 20).lba_size(4096))
//!             .with(|controller| controller.max_io_queues = 4),
//!     )
//!     .port(PortSpec::loopback().with(|transport| transport.r2t_size = 64 << 10))
//!     .start()?;
//! println!("connect to {}", target.address());
//! // … the host does its work …
//! assert_eq!(target.violations(), Vec::<String>::new());
//! assert_eq!(target.counters().reads(), 0);
//! # Ok::<(), std::io::Error>(())
//! ```

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
