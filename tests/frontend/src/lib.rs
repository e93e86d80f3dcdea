//! A vhost-user front end and the driver side of virtio-blk, for tests and benchmarks.
//!
//! It is an independent reading of the specifications (QEMU's vhost-user document, virtio's split and
//! packed rings and block device) and shares no code with the backend, so that the two cannot agree on a mistake.
//!
//! From the bottom up: [`memory`] is guest memory; [`message`] and [`client`] speak vhost-user; [`ring`] drives a virtqueue,
//! [`blk`] and [`blk_queue`] put block requests on it; [`device`] joins them into a disk that can be read and
//! written; [`postcopy`] brings its pages late; [`guest`] knows what the disk must hold. [`daemon`], [`process`] and [`qemu`] run what is tested and look at it from outside.
//!
//! What a test does wrong itself ends in a panic that says so; what a backend does wrong ends in an [`Error`].

pub mod blk;
pub mod blk_queue;
pub mod client;
pub mod config_watch;
pub mod daemon;
pub mod device;
mod error;
pub mod guest;
pub mod memory;
pub mod message;
pub mod postcopy;
pub mod process;
pub mod protocol;
pub mod qemu;
pub mod ring;
pub mod sys;

pub use blk::Segment;
pub use blk_queue::{BlkQueue, Completion, Op, SlotOptions};
pub use client::Client;
pub use config_watch::ConfigWatch;
pub use daemon::{Daemon, Disk, Program};
pub use device::{Device, DeviceOptions};
pub use error::{Error, Result};
pub use memory::{Memory, RegionSpec};
pub use process::TempDir;
pub use ring::{Buf, Desc, Notify, Outcome, PackedQueue, SplitQueue, Virtqueue};
