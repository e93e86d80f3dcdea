//! What the paths of one namespace have in common, and how the first one that finds it makes it.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::facts::{Identity, NamespaceFacts, name_text};
use super::setup::Target;
use super::trouble::{Failure, Result as PathResult, Trouble, replaced};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::nvme_tcp::link::{Namespace, NamespaceState, SharedPath};
use crate::block::nvme_tcp::spec::NvmeSpec;

/// Shared by the threads of a namespace's paths, and by whoever waits for it to be found.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) spec: NvmeSpec,
    pub(crate) target: Target,
    pub(crate) name: PathBuf,
    shared: Box<[Arc<SharedPath>]>,
    opening: Mutex<Opening>,
    progress: Condvar,
}

#[derive(Debug)]
struct Opening {
    found: Option<Found>,
    /// Nobody waits any more, and nothing was found.
    given_up: bool,
    /// Why each path does not work, if it does not.
    failures: Box<[Option<Failure>]>,
    ends: Box<[End]>,
    /// What each path that is connected says of the namespace's size, bytes; 0 of those that are not.
    sizes: Box<[u64]>,
}

#[derive(Debug)]
struct Found {
    namespace: Arc<Namespace>,
    identity: Identity,
}

/// How a path has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It has not.
    Open,
    /// It was given up.
    Lost,
    /// It works, and the namespace is not there.
    Gone,
}

impl Common {
    pub(crate) fn new(spec: NvmeSpec, target: Target, shared: Box<[Arc<SharedPath>]>) -> Self {
        let paths = shared.len();
        Self {
            name: PathBuf::from(spec.uri().to_string()),
            spec,
            target,
            opening: Mutex::new(Opening {
                found: None,
                given_up: false,
                failures: vec![None; paths].into(),
                ends: vec![End::Open; paths].into(),
                sizes: vec![0; paths].into(),
            }),
            shared,
            progress: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Opening> {
        self.opening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mailbox of a path, and its state.
    pub(crate) fn shared(&self, path: usize) -> &Arc<SharedPath> {
        &self.shared[path]
    }

    /// The namespace, once a path has found it.
    pub(crate) fn namespace(&self) -> Option<Arc<Namespace>> {
        let opening = self.lock();
        opening.found.as_ref().map(|found| found.namespace.clone())
    }

    /// Tells all members that shared state has changed.
    pub(crate) fn tell_all(&self) {
        if let Some(namespace) = self.namespace() {
            namespace.tell_all();
        }
    }

    /// A path has found the namespace. The first one makes it; to the others it must be the same.
    pub(crate) fn found(&self, path: usize, facts: &NamespaceFacts) -> PathResult<Arc<Namespace>> {
        let mut opening = self.lock();
        if opening.given_up {
            return Err(Trouble::Closed);
        }
        if let Some(Found {
            namespace,
            identity,
        }) = &opening.found
        {
            if let Some(difference) = identity.differs(&facts.identity) {
                return Err(replaced(format!(
                    "this address has another namespace than the other ones, or than before: {difference}"
                )));
            }
            let namespace = namespace.clone();
            opening.failures[path] = None;
            return Ok(namespace);
        }
        let namespace = Arc::new(Namespace::new(
            self.spec.clone(),
            self.name.clone(),
            facts.geometry,
            facts.bytes,
            self.shared.clone(),
        ));
        if facts.write_protected {
            namespace.set_state(NamespaceState::WriteProtected);
        }
        opening.failures[path] = None;
        opening.found = Some(Found {
            namespace: namespace.clone(),
            identity: facts.identity,
        });
        self.progress.notify_all();
        Ok(namespace)
    }

    /// A path says how large the namespace is. Paths may differ for a while: one that was not told yet of a growth,
    /// or is on a gateway that was not, takes nothing away from what another one serves. The sizes before and now.
    pub(crate) fn sized(&self, path: usize, bytes: u64) -> (u64, u64) {
        let mut opening = self.lock();
        opening.sizes[path] = bytes;
        let now = opening.sizes.iter().copied().max().unwrap_or(bytes);
        let before = opening.found.as_ref().map_or(now, |found| {
            let before = found.namespace.bytes();
            found.namespace.set_bytes(now);
            before
        });
        (before, now)
    }

    /// A path is not connected any more. What it said of the size counts until another one says something.
    pub(crate) fn unsized_by(&self, path: usize) {
        self.lock().sizes[path] = 0;
    }

    /// A path does not work.
    pub(crate) fn failed(&self, path: usize, failure: &Failure) {
        let mut opening = self.lock();
        // Once all have failed that is what is told, whatever further attempts come to before it is.
        if opening.found.is_some() || opening.failures.iter().any(Option::is_none) {
            opening.failures[path] = Some(failure.clone());
            self.progress.notify_all();
        }
    }

    /// A path has ended. Once all have, and the namespace is gone on one of them, it is gone.
    pub(crate) fn ended(&self, path: usize, end: End) {
        let removed = {
            let mut opening = self.lock();
            opening.ends[path] = end;
            let all = opening.ends.iter().all(|end| *end != End::Open);
            let gone = opening.ends.contains(&End::Gone);
            opening
                .found
                .as_ref()
                .filter(|_| all && gone)
                .map(|found| found.namespace.clone())
        };
        if let Some(namespace) = removed {
            log::error!(
                "{}: the namespace is gone from all its paths; the disk has no storage any more",
                self.name.display()
            );
            namespace.set_state(NamespaceState::Removed);
        }
    }

    /// Waits until a path has found the namespace, all have failed, or the time is over.
    pub(crate) fn wait(&self, deadline: Instant) -> Result<Arc<Namespace>> {
        let mut opening = self.lock();
        loop {
            if let Some(found) = &opening.found {
                return Ok(found.namespace.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if opening.failures.iter().all(Option::is_some) || left.is_zero() {
                opening.given_up = true;
                return Err(self.error(&opening.failures));
            }
            let waited = self.progress.wait_timeout(opening, left);
            opening = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What is said of a namespace that was not found: why, for each address.
    fn error(&self, failures: &[Option<Failure>]) -> Error {
        let mut kinds = failures
            .iter()
            .map(|failure| failure.as_ref().map(|failure| failure.kind));
        let first = kinds.next().flatten().unwrap_or(ErrorKind::Io);
        let kind = match kinds.all(|kind| kind == Some(first)) {
            true => first,
            false => ErrorKind::Io,
        };
        let why: Vec<_> = self
            .spec
            .addresses
            .iter()
            .zip(failures)
            .map(|(address, failure)| match failure {
                Some(failure) => format!("{address}: {}", failure.text),
                None => format!("{address}: no answer within the connect timeout"),
            })
            .collect();
        Error::image(
            kind,
            &self.name,
            None,
            format!(
                "{} cannot be reached: {}",
                name_text(&self.spec.namespace),
                why.join("; ")
            ),
        )
    }
}

/// A time that is never over, of those that can be told.
pub(crate) const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
