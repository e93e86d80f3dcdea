//! Image locks.

/// The lock bytes that this process holds on a file.
#[derive(Debug, Default)]
pub(super) struct Held;
