//! `virtioblkd`: a vhost-user block backend for KVM/QEMU guests.
//!
//! One process per VM. It maps the memory the VMM shares with it, polls the virtqueues on threads of
//! its own, and serves virtio-blk requests from a stack of storage layers.
//!
//! The rooms, from the outside in; each knows only those below it:
//!
//! | room | what lives there |
//! | --- | --- |
//! | [`cli`], [`config`] | what the user wrote; what it means once checked |
//! | [`tools`] | subcommands that work on an image and end |
//! | [`assembly`] | from a checked configuration to a running daemon |
//! | [`daemon`] | the life cycle: listen, serve one VMM, listen again, signals |
//! | [`vhost_user`] | the control plane: one connection with a VMM |
//! | [`dataplane`] | the worker threads that own virtqueues and run requests to completion |
//! | [`virtio`] | what the guest sees: memory, rings, virtio-blk requests, the configuration space |
//! | [`block`] | the storage stack: files, null, qcow2; knows nothing of virtio |
//! | [`reactor`] | io_uring, the local executor, buffers, epochs: what `block` and `dataplane` run on |
//! | [`shared_memory`] | memory that the VMM keeps for us: the inflight region, the dirty log |
//! | [`mappings`] | what of that, and of guest memory, has lost its pages |
//!
//! `virtio` and `block` do not know each other; `dataplane` joins them.
//! `docs/architecture.md` tells the whole story.

pub mod assembly;
pub mod block;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod dataplane;
mod kill_point;
pub mod mappings;
pub mod reactor;
pub mod shared_memory;
mod sync;
pub mod tools;
pub mod vhost_user;
pub mod virtio;
