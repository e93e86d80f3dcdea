//! Compressed clusters that were decompressed a moment ago.
//!
//! A guest reads a cluster in pieces: without this each piece would decompress all of it.
//!
//! What is kept is known by the cluster's descriptor, its place in the file. That is safe although a freed
//! cluster of the file is used again: an open image gets no new descriptors (what is written is never
//! compressed), and a place is not used again before every entry that had its descriptor is gone. A reader
//! that found the entry before it went reads what the cluster held then, as from the file. So what is kept is
//! dropped when its entry is replaced ([`Inflated::forget`]) only to save memory.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use async_lock::OnceCell;

use super::entry::Compressed;
use super::tables::lock;
use super::units::Geometry;

/// Memory for decompressed clusters, in bytes an image, and their number; one is kept whatever its size.
const MAX_BYTES: u64 = 2 << 20;
const MAX_CLUSTERS: u64 = 16;

/// A cluster that is, or is being, decompressed.
type Slot = Arc<OnceCell<Arc<[u8]>>>;

/// The last few decompressed clusters of an image, shared by all threads. Memory is taken when there are
/// some.
#[derive(Debug)]
pub(super) struct Inflated {
    /// The one that was used last is in front.
    slots: Mutex<VecDeque<(Compressed, Slot)>>,
    most: usize,
    #[cfg(test)]
    decompressed: std::sync::atomic::AtomicU64,
}

impl Inflated {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self {
            slots: Mutex::default(),
            most: (MAX_BYTES >> geometry.cluster_bits).clamp(1, MAX_CLUSTERS) as usize,
            #[cfg(test)]
            decompressed: Default::default(),
        }
    }

    /// The cluster's slot, new or not; the one that was not used for longest goes for it.
    pub(super) fn slot(&self, data: Compressed) -> Slot {
        let mut slots = lock(&self.slots);
        let known = slots.iter().position(|(known, _)| *known == data);
        let slot = match known.and_then(|at| slots.remove(at)) {
            Some((_, slot)) => slot,
            None => {
                slots.truncate(self.most - 1);
                Slot::default()
            }
        };
        slots.push_front((data, slot.clone()));
        slot
    }

    /// Drops a cluster.
    pub(super) fn forget(&self, data: Compressed) {
        lock(&self.slots).retain(|(known, _)| *known != data);
    }

    /// Notes that a cluster was decompressed.
    pub(super) fn count(&self) {
        #[cfg(test)]
        self.decompressed
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn decompressed(&self) -> u64 {
        self.decompressed.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        lock(&self.slots).len()
    }
}
