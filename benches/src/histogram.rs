//! A log-linear histogram of latencies: 64 buckets for each power of two, so that a value is known to
//! 1.6 % and recording one is a shift and an increment.

/// Buckets for each power of two.
const LINEAR_BITS: u32 = 6;
const LINEAR: usize = 1 << LINEAR_BITS;
/// Enough for any `u64`.
const BUCKETS: usize = (64 - LINEAR_BITS as usize + 1) * LINEAR;

/// Counts of values by size.
pub struct Histogram {
    buckets: Box<[u64]>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: vec![0; BUCKETS].into(),
            count: 0,
            sum: 0,
            max: 0,
        }
    }
}

/// The bucket that holds a value.
fn bucket(value: u64) -> usize {
    if value < LINEAR as u64 {
        return value as usize;
    }
    let shift = 63 - value.leading_zeros() - LINEAR_BITS;
    (shift as usize + 1) * LINEAR + ((value >> shift) as usize - LINEAR)
}

/// The largest value in a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < LINEAR {
        return bucket as u64;
    }
    let shift = (bucket / LINEAR - 1) as u32;
    let first = ((bucket % LINEAR + LINEAR) as u64) << shift;
    first + ((1 << shift) - 1)
}

impl Histogram {
    /// Adds a value. Allocates nothing.
    pub fn record(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.count += 1;
        self.sum += u128::from(value);
        self.max = self.max.max(value);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.buckets.fill(0);
        self.count = 0;
        self.sum = 0;
        self.max = 0;
    }

    /// Values so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; 0 without any.
    pub fn mean(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum as f64 / self.count as f64
        }
    }

    /// A value that this share of all values (0 to 1) does not exceed; 0 without any.
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = ((share * self.count as f64).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_one_another_and_hold_what_they_say() {
        let mut last = 0;
        for value in (0..100_000).chain((17..64).flat_map(|bit| [(1 << bit) - 1, 1 << bit])) {
            let b = bucket(value);
            assert!(b >= last, "{value}");
            assert!(
                upper(b) >= value && (b == 0 || upper(b - 1) < value),
                "{value}"
            );
            last = b;
        }
        assert!(bucket(u64::MAX) < BUCKETS);
        assert_eq!(upper(bucket(u64::MAX)), u64::MAX);
    }

    #[test]
    fn quantiles_are_right_to_two_percent() {
        let mut histogram = Histogram::default();
        for value in 1..=1_000_000 {
            histogram.record(value);
        }
        for (share, exact) in [(0.5, 500_000.0), (0.99, 990_000.0), (0.999, 999_000.0)] {
            let got = histogram.quantile(share) as f64;
            assert!((exact..=exact * 1.02).contains(&got), "{share}: {got}");
        }
        assert_eq!(histogram.quantile(1.0), 1_000_000);
        assert_eq!(histogram.mean(), 500_000.5);
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        let mut histogram = Histogram::default();
        histogram.record(7);
        histogram.clear();
        assert_eq!((histogram.count(), histogram.quantile(0.5)), (0, 0));
        assert_eq!(histogram.mean(), 0.0);
    }
}
