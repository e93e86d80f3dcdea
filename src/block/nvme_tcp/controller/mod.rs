//! The threads of the paths: all that is not a request.
//!
//! | module | what it does |
//! | --- | --- |
//! | `path` | a path's life: connect, serve, connect again, give up |
//! | `association` | serving: queues for members, events, keep-alive, Aborts |
//! | `setup` | from an address to a controller that is ready; I/O queues |
//! | `facts`, `ana` | what the controller and the namespace are |
//! | `members`, `mailbox` | who has queues; commands to the path |
//! | `channel`, `transport`, `secure`, `dial`, `wait` | commands, PDUs, secrets, TCP, poll(2) |
//! | `talk` | how much of what a controller tells is logged |
//! | `common` | what all paths of a namespace share |
//!
//! A path's thread is the only one that uses its connections and its [`link::SharedPath`]'s mailbox. Everything it
//! does has a deadline, and every wait looks at the mailbox, so that a path can be closed at any time. No lock is
//! held while it waits; what paths share they lock for a few instructions.

mod ana;
mod association;
mod backoff;
pub(super) mod channel;
mod common;
pub(super) mod dial;
mod facts;
mod mailbox;
mod members;
mod path;
mod secure;
pub(super) mod setup;
mod talk;
pub(super) mod transport;
pub(super) mod trouble;
pub(super) mod wait;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::link::{Namespace, PathCommand, SharedPath};
use super::spec::{NvmeOptions, NvmeSpec};
use crate::block::error::{Error, ErrorKind, Result};
use common::Common;
use path::Path;
use setup::Target;

/// How much longer than the paths' own timeouts is waited, so that each can say why it failed.
const SLACK: Duration = Duration::from_millis(500);
/// How long a path's thread gets to end after an opening that failed.
const TO_END: Duration = Duration::from_secs(2);

/// Connects a namespace: a thread is started for each of its paths. Returns when the first one has found it; the
/// others go on in the background. Blocks for the connect timeout at most: not for a worker.
///
/// # Errors
/// What the user gave does not make sense, or no path has found the namespace in time; then the message says why,
/// for each address.
pub fn open(mut spec: NvmeSpec) -> Result<Arc<Namespace>> {
    let wrong = |what: &str, why: &str| Error::image(ErrorKind::InvalidImage, what, None, why);
    if spec.addresses.is_empty() {
        return Err(wrong(
            &spec.subsystem,
            "no address of the subsystem is given",
        ));
    }
    let target = Target::new(spec.subsystem.clone(), spec.options.clone())?;
    // Reservations go by it, long after the files of the machine can be read.
    spec.options = Arc::new(NvmeOptions {
        host_nqn: Some(target.host.nqn.clone()),
        host_id: Some(target.host.id),
        ..(*spec.options).clone()
    });
    let system = |what| {
        let name = spec.subsystem.clone();
        move |error| Error::io(name, what, None, error)
    };
    let shared = spec
        .addresses
        .iter()
        .map(|_| SharedPath::new().map(Arc::new))
        .collect::<std::io::Result<Box<[_]>>>()
        .map_err(system("eventfd"))?;
    let deadline = Instant::now() + spec.options.connect_timeout + SLACK;
    let common = Arc::new(Common::new(spec.clone(), target, shared.clone()));
    let started = (0..shared.len()).try_for_each(|index| {
        let path = Path::new(common.clone(), index);
        let thread = thread::Builder::new().name(format!("nvme-{index}"));
        thread.spawn(|| path.run()).map(drop)
    });
    let opened = started
        .map_err(system("start a thread"))
        .and_then(|()| common.wait(deadline));
    if opened.is_err() {
        for path in &shared {
            path.send(PathCommand::Close);
        }
        let deadline = Instant::now() + TO_END;
        for path in &shared {
            path.wait_ended(deadline);
        }
    }
    opened
}

#[cfg(test)]
mod tests;
