//! What was executed, in the order that it took effect.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::sync::Locked;

/// An I/O command that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Execution {
    /// The opcode.
    pub opcode: u8,
    /// The port's id.
    pub port: u16,
    /// The controller's id.
    pub cntlid: u16,
    /// The queue's id.
    pub qid: u16,
    /// The command identifier.
    pub cid: u16,
    /// The namespace.
    pub nsid: u32,
    /// The first logical block; 0 for a Flush, which has none.
    pub slba: u64,
    /// Logical blocks.
    pub blocks: u64,
    /// CRC32C of the data that was read or written; 0 for commands without.
    pub crc: u32,
    /// The completion was handed to the socket. It may have been lost on its way.
    pub answered: bool,
}

/// A list that is kept only when asked for.
#[derive(Default)]
pub(crate) struct Journal {
    on: AtomicBool,
    entries: Mutex<Vec<Execution>>,
}

impl Journal {
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
    pub fn switch(&self, on: bool) {
        self.on.store(on, Ordering::Relaxed);
    }
    /// Adds an execution: its place.
    pub fn executed(&self, execution: Execution) -> usize {
        let mut entries = self.entries.locked();
        entries.push(execution);
        entries.len() - 1
    }
    pub fn answered(&self, place: usize) {
        if let Some(entry) = self.entries.locked().get_mut(place) {
            entry.answered = true;
        }
    }
    pub fn entries(&self) -> Vec<Execution> {
        self.entries.locked().clone()
    }
}
