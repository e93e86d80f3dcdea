//! Zeros to be written where no command makes a range read as zeros.

use std::ops::Range;

use crate::reactor::{AlignedBuf, Io, Sg};

/// A range that is to be full of zeros, in steps that are written from one buffer.
#[derive(Debug)]
pub(super) struct Zeros {
    buf: AlignedBuf,
    left: Range<u64>,
    step: u64,
}

impl Zeros {
    /// Zeros for `range`, at most `step` bytes at a time.
    pub(super) fn new(io: &Io, range: Range<u64>, step: u64) -> Self {
        let len = range.end.saturating_sub(range.start).min(step);
        let mut buf = io.buf(len as usize);
        buf.fill(0);
        Self {
            buf,
            left: range,
            step,
        }
    }

    /// The next step: where it begins, and its zeros. Each ends where one would begin, so that only the ends of the
    /// range are in parts of blocks.
    pub(super) fn next(&mut self) -> Option<(u64, Sg<'_>)> {
        if self.left.is_empty() {
            return None;
        }
        let at = self.left.start;
        let len = (self.step - at % self.step)
            .min(self.left.end - at)
            .min(self.buf.len() as u64);
        self.left.start += len;
        Some((at, self.buf.sg().split_at(len as usize).0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::tests::io;

    #[test]
    fn steps_cover_a_range_and_end_where_steps_begin() {
        let io = io();
        for range in [0..0, 5..5, 0..4096, 100..9000, 4095..4097, 8192..8193] {
            let mut zeros = Zeros::new(&io, range.clone(), 4096);
            let mut at = range.start;
            while let Some((start, sg)) = zeros.next() {
                let mut bytes = [0xee; 4096];
                let len = sg.copy_to(&mut bytes);
                assert_eq!((start, sg.len()), (at, len));
                assert!(len > 0 && bytes[..len].iter().all(|byte| *byte == 0));
                at += len as u64;
                assert!(at == range.end || at % 4096 == 0 || len == zeros.buf.len());
            }
            assert_eq!(at, range.end);
        }
    }
}
