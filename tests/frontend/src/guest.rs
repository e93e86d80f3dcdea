//! What a guest does with its disk: random requests whose right answers are known, and a machine that can be moved.
//!
//! [`model`] is the disk as it must be and the requests that change it, for any device; [`vm`] is a guest whose memory
//! is copied page by page, as in a migration.

pub mod model;
mod random;
pub mod vm;

pub use random::Random;
