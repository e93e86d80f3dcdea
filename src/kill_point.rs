//! Places where a test ends this process as `SIGKILL` would, to see what the next one makes of it.
//!
//! A test names a place and how often it is passed before the end comes:
//! `VIRTIOBLKD_KILL_POINT=NAME:COUNT`. Only builds with debug assertions have these places; in others
//! [`kill_point!`](crate::kill_point) is nothing.

#[cfg(debug_assertions)]
pub(crate) use counted::pass;

#[cfg(debug_assertions)]
mod counted {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// The place that was named, and how many passes are left.
    static PLACE: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();

    fn named() -> Option<(String, AtomicU64)> {
        let value = std::env::var("VIRTIOBLKD_KILL_POINT").ok()?;
        let (name, count) = value.rsplit_once(':')?;
        Some((name.to_owned(), AtomicU64::new(count.parse().ok()?)))
    }

    /// Passes a place; does not return from the last pass.
    pub(crate) fn pass(name: &str) {
        #[cfg(test)]
        super::simulated::pass();
        let Some((place, left)) = PLACE.get_or_init(named) else {
            return;
        };
        if place == name && left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // SAFETY: kill with this process's own id.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
            // The signal may take a moment; nothing of this thread's must happen after it.
            loop {
                std::thread::park();
            }
        }
    }
}

/// A place where a test may end this process: see [`crate::kill_point`].
macro_rules! kill_point {
    ($name:literal) => {
        #[cfg(debug_assertions)]
        $crate::kill_point::pass($name);
    };
}
pub(crate) use kill_point;

/// The same without a process: what runs is left in the middle, by unwinding.
#[cfg(test)]
pub(crate) mod simulated {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    thread_local! {
        /// Places still to be passed before the end.
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    struct Killed;

    pub(super) fn pass() {
        match LEFT.get() {
            Some(0) => {
                LEFT.set(None);
                resume_unwind(Box::new(Killed));
            }
            Some(left) => LEFT.set(Some(left - 1)),
            None => {}
        }
    }

    /// Works until `places` were passed, and is killed at the next one: `None`. Every other panic goes on.
    pub(crate) fn killed_after<T>(places: u64, work: impl FnOnce() -> T) -> Option<T> {
        LEFT.set(Some(places));
        let done = catch_unwind(AssertUnwindSafe(work));
        LEFT.set(None);
        match done {
            Ok(done) => Some(done),
            Err(panic) if panic.is::<Killed>() => None,
            Err(panic) => resume_unwind(panic),
        }
    }
}
