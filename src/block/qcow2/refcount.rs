//! The entries of a refcount block (qcow2.rst, "Host cluster management", "Refcount block entry"):
//! big-endian numbers of 1 to 64 bits; of those narrower than a byte, the first is in the byte's least
//! significant bits.

/// Width of a reference count: 1 << order bits, order 0 to 6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Width {
    order: u32,
}

impl Width {
    /// The width named by the header's `refcount_order`; `None` above 6.
    pub(super) fn new(order: u32) -> Option<Self> {
        (order <= 6).then_some(Self { order })
    }

    /// Largest reference count that fits.
    pub(super) fn max(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    /// log2 of the entries in a block of `1 << cluster_bits` bytes.
    pub(super) fn entries_bits(self, cluster_bits: u32) -> u32 {
        cluster_bits + 3 - self.order
    }

    /// The bytes of a block in which entry `index` lies: (first, bytes).
    fn bytes_of(self, index: usize) -> (usize, usize) {
        match self.order {
            0..=2 => (index >> (3 - self.order), 1),
            order => (index << (order - 3), 1 << (order - 3)),
        }
    }

    /// First byte of entry `index`.
    pub(super) fn byte_of(self, index: usize) -> usize {
        self.bytes_of(index).0
    }

    /// Entry `index` of `block`.
    pub(super) fn get(self, block: &[u8], index: usize) -> u64 {
        let (at, len) = self.bytes_of(index);
        let bytes = &block[at..at + len];
        if self.order < 3 {
            return (u64::from(bytes[0]) >> self.shift(index)) & self.max();
        }
        bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// Sets entry `index` of `block`; `value` is at most [`Width::max`].
    pub(super) fn set(self, block: &mut [u8], index: usize, value: u64) {
        debug_assert!(value <= self.max());
        let (at, len) = self.bytes_of(index);
        if self.order < 3 {
            let shift = self.shift(index);
            let mask = (self.max() << shift) as u8;
            block[at] = (block[at] & !mask) | ((value << shift) as u8 & mask);
            return;
        }
        block[at..at + len].copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }

    fn shift(self, index: usize) -> u32 {
        ((index as u32) & ((8 >> self.order) - 1)) << self.order
    }

    /// The first run of zeros in entries `from..to` of `block`, cut at `max` entries: (first, entries).
    pub(super) fn zero_run(
        self,
        block: &[u8],
        from: usize,
        to: usize,
        max: usize,
    ) -> Option<(usize, usize)> {
        let first = self.skip(
            block,
            from,
            to,
            |word| !self.has_zero(word),
            |entry| entry != 0,
        );
        if first >= to || max == 0 {
            return None;
        }
        let to = to.min(first.saturating_add(max));
        let end = self.skip(block, first, to, |word| word == 0, |entry| entry == 0);
        Some((first, end - first))
    }

    /// Goes on from `from` while entries are as wanted, eight bytes at a time where possible.
    fn skip(
        self,
        block: &[u8],
        from: usize,
        to: usize,
        word_is: impl Fn(u64) -> bool,
        entry_is: impl Fn(u64) -> bool,
    ) -> usize {
        let per_word = 64usize >> self.order;
        let mut at = from;
        while at < to {
            if at % per_word == 0 && at + per_word <= to {
                let byte = self.byte_of(at);
                if let Some(bytes) = block.get(byte..byte + 8).and_then(|b| b.try_into().ok()) {
                    if word_is(u64::from_be_bytes(bytes)) {
                        at += per_word;
                        continue;
                    }
                }
            }
            if !entry_is(self.get(block, at)) {
                break;
            }
            at += 1;
        }
        at.min(to)
    }

    /// True if one of the entries in eight bytes of a block is 0. The usual trick: subtracting one from
    /// each lane borrows into a lane's top bit only where a lane was zero.
    fn has_zero(self, word: u64) -> bool {
        let ones = u64::MAX / self.max();
        let tops = ones << ((1u32 << self.order) - 1);
        word.wrapping_sub(ones) & !word & tops != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_every_width_are_where_the_specification_says() {
        let at = |order, block: &[u8], index| Width::new(order).unwrap().get(block, index);
        // Narrower than a byte: the first entry is the least significant.
        assert_eq!(at(0, &[0b0000_0010, 1], 1), 1);
        assert_eq!(at(0, &[0b0000_0010, 1], 0), 0);
        assert_eq!(at(0, &[0, 1], 8), 1);
        assert_eq!(at(1, &[0b1101_0010], 0), 2);
        assert_eq!(at(1, &[0b1101_0010], 3), 3);
        assert_eq!(at(2, &[0xa5], 0), 5);
        assert_eq!(at(2, &[0xa5], 1), 10);
        // Wider: big-endian.
        assert_eq!(at(3, &[1, 2], 1), 2);
        assert_eq!(at(4, &[1, 2, 3, 4], 1), 0x304);
        assert_eq!(at(5, &[1, 2, 3, 4], 0), 0x0102_0304);
        assert_eq!(at(6, &[1, 2, 3, 4, 5, 6, 7, 8], 0), 0x0102_0304_0506_0708);
        assert!(Width::new(7).is_none());
    }

    #[test]
    fn setting_an_entry_leaves_its_neighbours() {
        for order in 0..=6 {
            let width = Width::new(order).unwrap();
            let entries = (64 * 8) >> order;
            for value in [0, 1, width.max()] {
                for fill in [0u8, 0xff] {
                    let mut block = vec![fill; 64];
                    let index = 5 % entries;
                    width.set(&mut block, index, value);
                    for other in 0..entries {
                        let want = match (other == index, fill) {
                            (true, _) => value,
                            (false, 0) => 0,
                            _ => width.max(),
                        };
                        assert_eq!(width.get(&block, other), want, "order {order}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_run_of_free_clusters_is_found_as_by_looking_at_each() {
        let mut seed = 1u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for order in 0..=6 {
            let width = Width::new(order).unwrap();
            let entries = (512 * 8usize) >> order;
            for density in [1, 2, 50] {
                let mut block = vec![0; 512];
                let mut at = 0;
                while at < entries {
                    let used = random() % 3 > 0;
                    let len = (random() % density + 1) as usize;
                    for index in at..(at + len).min(entries) {
                        let value = if used { random() % width.max() + 1 } else { 0 };
                        width.set(&mut block, index, value.min(width.max()));
                    }
                    at += len;
                }
                for _ in 0..200 {
                    let from = random() as usize % entries;
                    let to = from + random() as usize % (entries - from + 1);
                    let max = random() as usize % 40 + 1;
                    let slow = (from..to)
                        .find(|i| width.get(&block, *i) == 0)
                        .map(|first| {
                            let len = (first..to)
                                .take(max)
                                .take_while(|i| width.get(&block, *i) == 0)
                                .count();
                            (first, len)
                        });
                    assert_eq!(width.zero_run(&block, from, to, max), slow, "order {order}");
                }
            }
        }
    }
}
