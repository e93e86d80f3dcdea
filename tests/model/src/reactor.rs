//! The reactor, as far as it is modelled: epochs, and a worker's turns.

#[path = "../../../src/reactor/epoch.rs"]
pub(crate) mod epoch;
pub mod epoch_models;

use std::rc::Rc;
use std::sync::Arc;

pub(crate) use epoch::{Epoch, Epochs, Pin};

/// What `reactor::ring::Io` does about epochs.
pub(crate) struct Worker(Rc<epoch::Participant>);

impl Worker {
    pub(crate) fn new(epochs: &Arc<Epochs>) -> Self {
        Self(epoch::Participant::new(epochs.clone()))
    }

    /// The beginning of a turn.
    pub(crate) fn turn(&self) {
        self.0.quiesce();
    }

    /// Before it sleeps.
    pub(crate) fn park(&self) {
        self.0.park();
    }

    /// A request begins.
    pub(crate) fn pin(&self) -> Pin {
        self.0.pin()
    }
}
