//! The session from the VMM's side: each test is a case that broke some back-end.

mod channel;
mod device;
mod handover;
mod inflight;
mod log;
mod memory;
mod messages;
mod packed;
mod postcopy;
mod rings;
mod state;
mod stop;

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::vhost_user::message::FrontendReq as Req;

use super::testing::*;
use super::{ConnectionError, Progress};

const NOFD: u64 = 0x100;

fn add_region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[0, guest, size, user, offset])
}
