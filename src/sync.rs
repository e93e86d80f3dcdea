//! The sync primitives of the rooms whose every interleaving is tried: std's here, and loom's in
//! `tests/model`, which compiles the same source files against its own `crate::sync`. Only what such a
//! room shares between threads goes through this name; [`std::sync::Arc`] does not, since who frees
//! what last is not in question.

pub(crate) use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence,
    };
}
