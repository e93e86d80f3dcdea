//! What a target has counted.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::wire::{Sqe, op};

/// Live counters.
pub(crate) struct Counters {
    io: [AtomicU64; 256],
    admin: [AtomicU64; 256],
    fabrics: [AtomicU64; 256],
    connections: AtomicU64,
    connects: AtomicU64,
    connects_refused: AtomicU64,
    associations: AtomicU64,
    associations_open: AtomicU64,
    aborts: AtomicU64,
    keep_alive_expired: AtomicU64,
    host_terminated: AtomicU64,
}

/// The counters at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// I/O commands by opcode.
    pub io: Vec<u64>,
    /// Admin commands by opcode.
    pub admin: Vec<u64>,
    /// Fabrics commands by type.
    pub fabrics: Vec<u64>,
    /// TCP connections accepted.
    pub connections: u64,
    /// Connect commands.
    pub connects: u64,
    /// Connect commands that were refused.
    pub connects_refused: u64,
    /// Associations (controllers) that were made.
    pub associations: u64,
    /// Associations that are alive.
    pub associations_open: u64,
    /// Abort commands.
    pub aborts: u64,
    /// Associations that ended because the host was not heard of.
    pub keep_alive_expired: u64,
    /// H2CTermReq PDUs that came.
    pub host_terminated: u64,
}

impl Snapshot {
    /// Read commands.
    pub fn reads(&self) -> u64 {
        self.io[usize::from(op::READ)]
    }
    /// Write commands.
    pub fn writes(&self) -> u64 {
        self.io[usize::from(op::WRITE)]
    }
    /// Flush commands.
    pub fn flushes(&self) -> u64 {
        self.io[usize::from(op::FLUSH)]
    }
    /// Keep Alive commands.
    pub fn keep_alives(&self) -> u64 {
        self.admin[usize::from(op::KEEP_ALIVE)]
    }
}

impl Default for Counters {
    fn default() -> Self {
        let many = || std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            io: many(),
            admin: many(),
            fabrics: many(),
            connections: AtomicU64::new(0),
            connects: AtomicU64::new(0),
            connects_refused: AtomicU64::new(0),
            associations: AtomicU64::new(0),
            associations_open: AtomicU64::new(0),
            aborts: AtomicU64::new(0),
            keep_alive_expired: AtomicU64::new(0),
            host_terminated: AtomicU64::new(0),
        }
    }
}

fn one(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub fn io(&self, opcode: u8) {
        one(&self.io[usize::from(opcode)]);
    }
    pub fn admin(&self, sqe: &Sqe) {
        if sqe.opcode() == op::FABRICS {
            one(&self.fabrics[usize::from(sqe.fctype())]);
        } else {
            one(&self.admin[usize::from(sqe.opcode())]);
        }
    }
    pub fn connection(&self) {
        one(&self.connections);
    }
    pub fn connect(&self) {
        one(&self.connects);
        one(&self.fabrics[usize::from(op::CONNECT)]);
    }
    pub fn connect_refused(&self) {
        one(&self.connects_refused);
    }
    pub fn association_began(&self) {
        one(&self.associations);
        one(&self.associations_open);
    }
    pub fn association_ended(&self) {
        self.associations_open.fetch_sub(1, Ordering::Relaxed);
    }
    pub fn abort(&self) {
        one(&self.aborts);
    }
    pub fn keep_alive_expired(&self) {
        one(&self.keep_alive_expired);
    }
    pub fn host_terminated(&self) {
        one(&self.host_terminated);
    }

    pub fn snapshot(&self) -> Snapshot {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let all = |c: &[AtomicU64; 256]| c.iter().map(get).collect();
        Snapshot {
            io: all(&self.io),
            admin: all(&self.admin),
            fabrics: all(&self.fabrics),
            connections: get(&self.connections),
            connects: get(&self.connects),
            connects_refused: get(&self.connects_refused),
            associations: get(&self.associations),
            associations_open: get(&self.associations_open),
            aborts: get(&self.aborts),
            keep_alive_expired: get(&self.keep_alive_expired),
            host_terminated: get(&self.host_terminated),
        }
    }
}
