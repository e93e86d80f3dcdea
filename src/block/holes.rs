//! How deep the holes of a chain are: where a read that falls through the top image need not look.
//!
//! Images below the top one are not written to while the disk is in use, so what was found out once stays true. A byte
//! for each unit of the disk says which layer is the first, from the second on, that has anything but a hole there.
//! Of a chain of many images a read so looks at two tables and not at all of them, each of which would be a cache miss.

use std::sync::atomic::{AtomicU8, Ordering};

use super::layer::{Layer, Mapping};
use super::qcow2::room::Room;

/// Bytes of a unit, at the least: a usual cluster.
const UNIT: u64 = 64 << 10;
/// Units of a disk, at the most: larger disks have larger units.
const UNITS: u64 = 4 << 20;

/// What is known of a disk's chain.
#[derive(Debug)]
pub(super) struct Holes {
    unit_bits: u32,
    /// By unit: the first layer that is to be looked at, from 1 on. 0: not known yet.
    first: Room<AtomicU8>,
}

impl Holes {
    /// For a chain in which it saves anything.
    pub(super) fn of(layers: &[Layer]) -> Option<Self> {
        let size = layers.first().filter(|_| layers.len() > 2)?.size();
        let unit = size.div_ceil(UNITS).next_power_of_two().max(UNIT);
        Some(Self {
            unit_bits: unit.trailing_zeros(),
            first: Room::new(size / unit)?,
        })
    }

    /// The layer that a read of a hole in the first one goes on with.
    #[inline]
    pub(super) fn below(&self, layers: &[Layer], offset: u64, len: u64) -> usize {
        let unit = offset >> self.unit_bits;
        let ends_in = (offset + (len - 1)) >> self.unit_bits;
        match self.first.get(unit) {
            Some(first) if ends_in == unit => match first.load(Ordering::Relaxed) {
                0 => self.find_out(layers, unit, first),
                level => usize::from(level),
            },
            _ => 1,
        }
    }

    /// Looks at the whole unit, layer by layer. Only what is known without I/O counts: a table that is not in memory
    /// is loaded by the read, and the next one sees more.
    #[cold]
    fn find_out(&self, layers: &[Layer], unit: u64, first: &AtomicU8) -> usize {
        let (offset, len) = (unit << self.unit_bits, 1 << self.unit_bits);
        let mut level = 1;
        for layer in &layers[1..layers.len() - 1] {
            if offset + len > layer.size() {
                break;
            }
            match layer.map_at_once(offset, len) {
                Some(Mapping::Backing { len: found }) if found == len => level += 1,
                Some(_) => break,
                None => return level,
            }
        }
        if let Ok(known) = u8::try_from(level) {
            first.store(known, Ordering::Relaxed);
        }
        level
    }
}
