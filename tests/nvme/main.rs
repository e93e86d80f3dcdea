//! The daemon on namespaces of an NVMe/TCP target that misbehaves: the tests' own target runs in the test, so
//! that its faults, its journal and what it has noticed of the host are at hand.
//!
//! `VIRTIOBLKD_NVME_SEED` changes what is random, `VIRTIOBLKD_NVME_REQUESTS` how many requests each random case
//! has. Both are printed.

#[path = "../common/mod.rs"]
mod common;
mod cuts;
mod events;
mod faults;
mod kills;
mod load;
mod migration;
mod polling;
mod requests;
mod rig;
