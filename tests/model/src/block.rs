//! The storage stack, as far as it is modelled.

pub(crate) mod error;
pub mod qcow2;
