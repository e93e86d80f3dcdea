//! Which block each request is for.

/// What the load generator does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// Reads one block after the other, from the start again at the end.
    Read,
    /// Writes one block after the other.
    Write,
    /// Reads blocks anywhere.
    Randread,
    /// Writes blocks anywhere.
    Randwrite,
    /// Writes one block in each stretch of `--stride` bytes, each stretch once, scattered; ends when all
    /// are written. On an image without data it is all allocations.
    Firstwrite,
    /// Reads one block in each stretch of `--stride` bytes, each stretch once, scattered; ends when all are
    /// read. It touches all mappings of an image.
    Firstread,
}

impl Load {
    /// Whether it writes.
    pub fn writes(self) -> bool {
        matches!(self, Self::Write | Self::Randwrite | Self::Firstwrite)
    }

    /// Whether it touches one block in each stretch and then ends.
    pub fn ends(self) -> bool {
        matches!(self, Self::Firstwrite | Self::Firstread)
    }

    /// Its name on command lines and in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Firstwrite => "firstwrite",
            Self::Firstread => "firstread",
        }
    }
}

/// A sequence of offsets in bytes.
#[derive(Debug)]
pub struct Pattern {
    load: Load,
    /// Bytes from one possible offset to the next.
    step: u64,
    /// How many possible offsets there are.
    places: u64,
    next: u64,
    random: u64,
    /// A sequential load ends at the end of the span instead of starting again.
    once: bool,
}

impl Pattern {
    /// Blocks of `block` bytes in the first `span` bytes; `stride` is for [`Load::Firstwrite`].
    ///
    /// Returns `None` where not one block fits.
    pub fn new(load: Load, block: u64, span: u64, stride: u64, seed: u64) -> Option<Self> {
        let step = if load.ends() {
            stride.max(block)
        } else {
            block
        };
        let mut places = span.checked_div(step)?;
        if places == 0 {
            return None;
        }
        if load.ends() {
            // A power of two, so that an odd factor scatters them without hitting one twice.
            places = 1 << places.ilog2();
        }
        Some(Self {
            load,
            step,
            places,
            next: 0,
            random: seed | 1,
            once: false,
        })
    }

    /// The same, but that a sequential load ends at the end of the span.
    pub fn once(self, once: bool) -> Self {
        Self { once, ..self }
    }

    /// The offset of the next request; `None` when a load that ends has ended.
    pub fn offset(&mut self) -> Option<u64> {
        let index = match self.load {
            Load::Read | Load::Write => {
                if self.next == self.places {
                    if self.once {
                        return None;
                    }
                    self.next = 0;
                }
                self.next += 1;
                self.next - 1
            }
            Load::Randread | Load::Randwrite => {
                // xorshift64*, by Marsaglia and Vigna; the upper half of a product takes it to a range
                // without a division.
                self.random ^= self.random >> 12;
                self.random ^= self.random << 25;
                self.random ^= self.random >> 27;
                let random = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d);
                ((u128::from(random) * u128::from(self.places)) >> 64) as u64
            }
            Load::Firstwrite | Load::Firstread => {
                if self.next == self.places {
                    return None;
                }
                self.next += 1;
                self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15) & (self.places - 1)
            }
        };
        Some(index * self.step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn sequential_offsets_start_again_at_the_end() {
        let mut pattern = Pattern::new(Load::Read, 4096, 3 * 4096 + 512, 0, 1).unwrap();
        let offsets: Vec<_> = (0..4).map(|_| pattern.offset().unwrap()).collect();
        assert_eq!(offsets, [0, 4096, 8192, 0]);
    }

    #[test]
    fn sequential_offsets_end_at_the_end_where_that_is_asked_for() {
        let pattern = Pattern::new(Load::Write, 4096, 3 * 4096, 0, 1).unwrap();
        let mut pattern = pattern.once(true);
        let offsets: Vec<_> = std::iter::from_fn(|| pattern.offset()).collect();
        assert_eq!(offsets, [0, 4096, 8192]);
    }

    #[test]
    fn random_offsets_are_aligned_inside_and_everywhere() {
        let mut pattern = Pattern::new(Load::Randwrite, 4096, 100 * 4096, 0, 42).unwrap();
        let seen: HashSet<_> = (0..10_000).map(|_| pattern.offset().unwrap()).collect();
        assert!(
            seen.iter()
                .all(|offset| offset % 4096 == 0 && *offset < 100 * 4096)
        );
        assert_eq!(seen.len(), 100);
    }

    #[test]
    fn first_writes_hit_each_stretch_once_and_end() {
        let mut pattern = Pattern::new(Load::Firstwrite, 4096, 100 << 20, 64 << 10, 1).unwrap();
        let offsets: Vec<_> = std::iter::from_fn(|| pattern.offset()).collect();
        let distinct: HashSet<_> = offsets.iter().collect();
        assert_eq!((offsets.len(), distinct.len()), (1024, 1024));
        assert!(
            offsets
                .iter()
                .all(|offset| offset % (64 << 10) == 0 && *offset < 64 << 20)
        );
    }

    #[test]
    fn a_span_without_room_is_refused() {
        assert!(Pattern::new(Load::Read, 4096, 4095, 0, 1).is_none());
        assert!(Pattern::new(Load::Firstwrite, 4096, 4096, 65536, 1).is_none());
    }
}
