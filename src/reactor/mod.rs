//! What the storage stack and the workers run on: one io_uring and one executor a thread.
//!
//! An [`Io`] is a thread's handle to its reactor. Everything here is single-threaded, but for waking a
//! task from another thread ([`std::task::Waker`]) and the [`epoch`] domain.
//!
//! - `Io::read`, `Io::write` and their kin queue a submission at once and return a future of the
//!   result. Operations enter the kernel in groups of a few, and what is left of them when [`Io::turn`] (or
//!   [`Io::park`]) submits it. Transfers to files in memory are made at once (`inline`).
//! - [`Io::spawn`] and [`Io::slot`] make tasks, [`Io::block_on`] runs one future to its end.
//! - `Io::begin_software` makes an operation that another task completes: of a request that goes over a
//!   connection which that task serves.
//! - `Io::local` is what a storage keeps for this thread.
//! - [`Io::pin`] marks a request as begun, so that memory and clusters it may still look at are not
//!   reused before it ends.
//!
//! A worker's loop is `dataplane::worker`; tests and the control thread use [`Io::block_on`].

pub mod buf;
pub mod epoch;
mod executor;
mod file;
mod inline;
mod local;
mod op;
mod operations;
mod ring;
mod socket;
mod software;

#[cfg(test)]
mod tests;

pub use buf::{AlignedBuf, Sg};
pub use epoch::{Epoch, Epochs, Pin};
pub use executor::TaskId;
pub use file::IoFile;
pub(crate) use inline::INLINE_SHARE;
pub(crate) use local::LocalSlot;
pub use op::Op;
pub use ring::{Doorbell, Io, IoConfig};
pub(crate) use socket::Message;
pub(crate) use software::SoftwareOp;
