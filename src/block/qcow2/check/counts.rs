//! A number for each host cluster, in memory only where it is not 0.
//!
//! Both what an image says (its refcounts) and what is true (the references that were found) are kept so:
//! one byte a cluster, eight where a neighbour needs more than 255. An image is untrusted and may spread a
//! few pointers over an enormous sparse file, so there is a limit.

use std::collections::BTreeMap;

/// Clusters in one piece of memory.
pub(in super::super) const CHUNK: u64 = 1024;
/// Bytes that the map itself takes for a piece, about.
const OVERHEAD: usize = 64;

#[derive(Debug)]
enum Chunk {
    Narrow(Box<[u8]>),
    Wide(Box<[u64]>),
}

impl Chunk {
    fn get(&self, at: usize) -> u64 {
        match self {
            Self::Narrow(counts) => counts[at].into(),
            Self::Wide(counts) => counts[at],
        }
    }
}

/// More memory is needed than is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMany;

/// Numbers by cluster.
#[derive(Debug)]
pub(in super::super) struct Counts {
    chunks: BTreeMap<u64, Chunk>,
    bytes: usize,
    limit: usize,
}

impl Counts {
    /// No more than `limit` bytes will be used.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            chunks: BTreeMap::new(),
            bytes: 0,
            limit,
        }
    }

    /// The number of a cluster.
    #[inline]
    pub(in super::super) fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        chunk.map_or(0, |chunk| chunk.get((cluster % CHUNK) as usize))
    }

    /// Sets the number of a cluster.
    pub(super) fn set(&mut self, cluster: u64, count: u64) -> Result<(), TooMany> {
        let (key, at) = (cluster / CHUNK, (cluster % CHUNK) as usize);
        if !self.chunks.contains_key(&key) {
            if count == 0 {
                return Ok(());
            }
            self.charge(CHUNK as usize + OVERHEAD)?;
            let zeros = vec![0; CHUNK as usize].into_boxed_slice();
            self.chunks.insert(key, Chunk::Narrow(zeros));
        }
        let is_narrow = matches!(self.chunks.get(&key), Some(Chunk::Narrow(_)));
        if is_narrow && count > u8::MAX.into() {
            self.charge(CHUNK as usize * 7)?;
        }
        let Some(chunk) = self.chunks.get_mut(&key) else {
            return Ok(());
        };
        match (&mut *chunk, u8::try_from(count)) {
            (Chunk::Narrow(counts), Ok(count)) => counts[at] = count,
            (Chunk::Narrow(counts), Err(_)) => {
                let mut wide: Box<[u64]> = counts.iter().map(|count| u64::from(*count)).collect();
                wide[at] = count;
                *chunk = Chunk::Wide(wide);
            }
            (Chunk::Wide(counts), _) => counts[at] = count,
        }
        Ok(())
    }

    /// Adds to the number of a cluster, up to `max`; returns what was too much.
    #[inline]
    pub(super) fn add(&mut self, cluster: u64, more: u64, max: u64) -> Result<u64, TooMany> {
        let (key, at) = (cluster / CHUNK, (cluster % CHUNK) as usize);
        // The common case: one more in a piece that is there.
        if let Some(Chunk::Narrow(counts)) = self.chunks.get_mut(&key) {
            let sum = u64::from(counts[at]).saturating_add(more);
            if let (Ok(narrow), true) = (u8::try_from(sum), sum <= max) {
                counts[at] = narrow;
                return Ok(0);
            }
        }
        let sum = self.get(cluster).saturating_add(more);
        self.set(cluster, sum.min(max))?;
        Ok(sum.saturating_sub(max))
    }

    fn charge(&mut self, bytes: usize) -> Result<(), TooMany> {
        self.bytes += bytes;
        if self.bytes > self.limit {
            return Err(TooMany);
        }
        Ok(())
    }

    /// The number after the last cluster whose number is not 0.
    pub(in super::super) fn end(&self) -> u64 {
        let last = |(key, chunk): (&u64, &Chunk)| {
            let at = (0..CHUNK).rev().find(|at| chunk.get(*at as usize) != 0)?;
            Some(key * CHUNK + at + 1)
        };
        self.chunks.iter().rev().find_map(last).unwrap_or(0)
    }

    /// First clusters of the pieces that are in memory, ascending.
    pub(in super::super) fn pieces(&self) -> impl Iterator<Item = u64> {
        self.chunks.keys().map(|key| key * CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_any_size_are_kept_next_to_each_other() {
        let mut counts = Counts::new(1 << 20);
        assert_eq!((counts.get(7), counts.end()), (0, 0));
        for (cluster, count) in [(0, 1), (1, 255), (2, 256), (3, u64::MAX), (1 << 40, 2)] {
            counts.set(cluster, count).unwrap();
            assert_eq!(counts.get(cluster), count);
        }
        assert_eq!((counts.get(1), counts.get(4)), (255, 0));
        assert_eq!(counts.end(), (1 << 40) + 1);
        counts.set(1 << 40, 0).unwrap();
        assert_eq!(counts.end(), 4);
        assert_eq!(counts.pieces().collect::<Vec<_>>(), [0, 1 << 40]);
    }

    #[test]
    fn sums_stop_at_the_largest_refcount() {
        let mut counts = Counts::new(1 << 20);
        assert_eq!(counts.add(9, 3, 15), Ok(0));
        assert_eq!(counts.add(9, 20, 15), Ok(8));
        assert_eq!(counts.get(9), 15);
        assert!(counts.add(9, u64::MAX, u64::MAX).is_ok());
        assert_eq!(counts.get(9), u64::MAX);
    }

    #[test]
    fn memory_has_a_limit() {
        let mut counts = Counts::new(10 * (CHUNK as usize + OVERHEAD));
        let far = (0..).map(|n| n * 1_000_000);
        let kept = far.take_while(|c| counts.add(*c, 1, 1).is_ok()).count();
        assert_eq!(kept, 10);
        assert_eq!(counts.add(5, 1, 9), Ok(0), "what is there is there");
    }
}
