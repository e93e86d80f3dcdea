//! Models of what virtioblkd's threads share: a few steps of each thread, in every interleaving and with
//! every value that the memory model lets a load see, by loom.
//!
//! The rooms under test are the daemon's own source files, compiled here by `#[path]`; their
//! `crate::sync` is loom's. What they are called by is played by the models, which follow the daemon's
//! order of steps and say where it is found. `tests/models.rs` runs them.
//!
//! Loom's threads are one thread of the system: what they share may be in an `Rc`.

// The rooms have more to offer than the models call.
#![allow(dead_code, missing_docs)]

mod block;
mod reactor;
mod sync;

pub use block::qcow2::{arena_models, limbo_models, slice_models};
pub use reactor::epoch_models;

/// Tries the interleavings with at most this many preemptions: what goes wrong at all goes wrong with
/// fewer. `LOOM_MAX_PREEMPTIONS` allows more.
const PREEMPTIONS: usize = 4;

fn explore(model: impl Fn() + Sync + Send + 'static) {
    explore_up_to(PREEMPTIONS, model);
}

fn explore_up_to(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.check(model);
}
