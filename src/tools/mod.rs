//! Subcommands: what the program does with an image besides serving it.

pub mod check;
pub mod info;
pub mod nvme;
