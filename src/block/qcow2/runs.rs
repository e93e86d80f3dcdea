//! Runs of host clusters: the unit in which clusters are found, handed over and freed.

use std::collections::BTreeMap;

/// Neighbouring host clusters, by number (host offset / cluster size).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: u64,
}

impl Run {
    pub(super) fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// The number after the last cluster's.
    pub(super) fn end(self) -> u64 {
        self.first.saturating_add(self.count)
    }

    /// Its parts by refcount block, as (block index, part); a block has `1 << bits` entries.
    pub(super) fn by_block(self, bits: u32) -> impl Iterator<Item = (usize, Run)> {
        let mut at = self.first;
        std::iter::from_fn(move || {
            if at >= self.end() {
                return None;
            }
            let block = at >> bits;
            let end = ((block + 1) << bits).min(self.end());
            let part = Run::new(at, end - at);
            at = end;
            Some((block as usize, part))
        })
    }
}

/// Sorts runs and joins those that touch.
pub(super) fn merge(runs: &mut Vec<Run>) {
    runs.sort_unstable_by_key(|run| run.first);
    let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs.drain(..) {
        match merged.last_mut() {
            Some(last) if last.end() >= run.first => {
                last.count = last.end().max(run.end()) - last.first;
            }
            _ => merged.push(run),
        }
    }
    *runs = merged;
}

/// Runs kept at most; what falls out is found again by the scan.
const MAX_RUNS: usize = 1 << 16;
/// Runs looked at in one search.
const MAX_SEARCH: usize = 256;

/// An index of runs that were free when they were noted. It is a hint: whoever takes a run looks at the
/// refcounts, which are the truth.
#[derive(Debug, Default)]
pub(super) struct FreeRuns {
    runs: BTreeMap<u64, u64>,
}

impl FreeRuns {
    /// Notes a run; returns false if there is no room for it.
    pub(super) fn add(&mut self, run: Run) -> bool {
        if run.count == 0 {
            return true;
        }
        let (mut first, mut end) = (run.first, run.end());
        if let Some((&before, &count)) = self.runs.range(..=first).next_back() {
            if before + count >= first {
                first = before;
                end = end.max(before + count);
                self.runs.remove(&before);
            }
        }
        while let Some((&after, &count)) = self.runs.range(first..=end).next() {
            end = end.max(after + count);
            self.runs.remove(&after);
        }
        if self.runs.len() >= MAX_RUNS {
            return false;
        }
        self.runs.insert(first, end - first);
        true
    }

    /// Takes the first run of at least `good` clusters among the first few hundred, or else the largest
    /// of those; cut at `max` clusters.
    pub(super) fn take(&mut self, good: u64, max: u64) -> Option<Run> {
        let mut best: Option<Run> = None;
        for (&first, &count) in self.runs.iter().take(MAX_SEARCH) {
            if best.is_none_or(|b| b.count < count) {
                best = Some(Run::new(first, count));
            }
            if count >= good {
                break;
            }
        }
        let found = best?;
        self.runs.remove(&found.first);
        let taken = Run::new(found.first, found.count.min(max));
        if taken.count < found.count {
            self.runs.insert(taken.end(), found.count - taken.count);
        }
        Some(taken)
    }
}

/// Host clusters that must never be handed out: header, L1, refcount table and blocks, and whatever
/// tables the mapping side registers. Ranges do not overlap.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    ranges: BTreeMap<u64, (u64, &'static str)>,
}

impl Reserved {
    /// Adds a range; on a clash returns what is there already.
    pub(super) fn add(&mut self, run: Run, what: &'static str) -> Result<(), &'static str> {
        if let Some((_, there)) = self.clash(run) {
            return Err(there);
        }
        self.ranges.insert(run.first, (run.count, what));
        Ok(())
    }

    /// Forgets clusters that were added as one range, or as part of one.
    pub(super) fn remove(&mut self, run: Run) {
        let range = self.ranges.range(..=run.first).next_back();
        let Some((&first, &(count, what))) = range.filter(|r| r.0 + r.1.0 >= run.end()) else {
            return;
        };
        self.ranges.remove(&first);
        if first < run.first {
            self.ranges.insert(first, (run.first - first, what));
        }
        if run.end() < first + count {
            self.ranges
                .insert(run.end(), (first + count - run.end(), what));
        }
    }

    /// Forgets these clusters, of whatever ranges they are parts.
    pub(super) fn cut(&mut self, run: Run) {
        let before = self.ranges.range(..run.first).next_back();
        if let Some((&first, &(count, what))) = before {
            if first + count > run.first {
                self.ranges.insert(first, (run.first - first, what));
                self.keep_behind(run, first + count, what);
            }
        }
        while let Some((&first, &(count, what))) = self.ranges.range(run.first..run.end()).next() {
            self.ranges.remove(&first);
            self.keep_behind(run, first + count, what);
        }
    }

    fn keep_behind(&mut self, run: Run, end: u64, what: &'static str) {
        if end > run.end() {
            self.ranges.insert(run.end(), (end - run.end(), what));
        }
    }

    /// All ranges, ascending.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> {
        self.ranges
            .iter()
            .map(|(first, (count, _))| Run::new(*first, *count))
    }

    /// The first reserved cluster of `run` and what it holds.
    pub(super) fn clash(&self, run: Run) -> Option<(u64, &'static str)> {
        let before = self.ranges.range(..=run.first).next_back();
        if let Some((&first, &(count, what))) = before {
            if first + count > run.first {
                return Some((run.first, what));
            }
        }
        let inside = self.ranges.range(run.first..run.end()).next();
        inside.map(|(&first, &(_, what))| (first, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_neighbours_become_one_run() {
        let mut free = FreeRuns::default();
        for run in [(10, 5), (20, 5), (15, 5), (12, 10), (40, 1), (39, 1)] {
            assert!(free.add(Run::new(run.0, run.1)));
        }
        assert_eq!(free.take(100, 100), Some(Run::new(10, 15)));
        assert_eq!(free.take(1, 1), Some(Run::new(39, 1)));
        assert_eq!(free.take(1, 100), Some(Run::new(40, 1)));
        assert_eq!(free.take(1, 100), None);
    }

    #[test]
    fn the_first_run_of_a_good_size_is_taken_and_the_rest_of_it_kept() {
        let mut free = FreeRuns::default();
        for run in [(0, 3), (10, 8), (30, 100)] {
            free.add(Run::new(run.0, run.1));
        }
        assert_eq!(free.take(5, 6), Some(Run::new(10, 6)));
        assert_eq!(free.take(5, 60), Some(Run::new(30, 60)));
        assert_eq!(free.take(50, 60), Some(Run::new(90, 40)));
        assert_eq!(
            free.take(9, 60),
            Some(Run::new(0, 3)),
            "the largest there is"
        );
    }

    #[test]
    fn reserved_ranges_are_found_wherever_a_run_touches_them() {
        let mut reserved = Reserved::default();
        reserved.add(Run::new(0, 1), "header").unwrap();
        reserved.add(Run::new(5, 3), "L1 table").unwrap();
        assert_eq!(reserved.clash(Run::new(1, 4)), None);
        assert_eq!(reserved.clash(Run::new(1, 5)), Some((5, "L1 table")));
        assert_eq!(reserved.clash(Run::new(7, 9)), Some((7, "L1 table")));
        assert_eq!(reserved.clash(Run::new(8, 9)), None);
        assert_eq!(reserved.add(Run::new(4, 2), "x"), Err("L1 table"));
        reserved.remove(Run::new(5, 3));
        assert_eq!(reserved.clash(Run::new(1, 9)), None);
    }

    #[test]
    fn a_part_of_reserved_ranges_is_let_go() {
        let mut reserved = Reserved::default();
        reserved.add(Run::new(1, 9), "L1 or an L2 table").unwrap();
        reserved.add(Run::new(10, 1), "L2 table").unwrap();
        reserved.add(Run::new(12, 5), "L2 table").unwrap();
        reserved.cut(Run::new(3, 2));
        assert_eq!(reserved.clash(Run::new(3, 2)), None);
        assert_eq!(
            reserved.clash(Run::new(2, 1)),
            Some((2, "L1 or an L2 table"))
        );
        assert_eq!(
            reserved.clash(Run::new(4, 3)),
            Some((5, "L1 or an L2 table"))
        );
        reserved.cut(Run::new(8, 6));
        assert_eq!(reserved.clash(Run::new(8, 6)), None);
        assert_eq!(
            reserved.clash(Run::new(7, 1)),
            Some((7, "L1 or an L2 table"))
        );
        assert_eq!(reserved.clash(Run::new(8, 90)), Some((14, "L2 table")));
        assert_eq!(reserved.clash(Run::new(17, 90)), None);
    }

    #[test]
    fn a_part_of_a_reserved_range_is_given_up_and_the_rest_stays() {
        let mut reserved = Reserved::default();
        reserved.add(Run::new(5, 5), "L2 tables").unwrap();
        reserved.remove(Run::new(9, 2));
        assert_eq!(reserved.clash(Run::new(9, 1)), Some((9, "L2 tables")));
        reserved.remove(Run::new(7, 1));
        assert_eq!(reserved.clash(Run::new(7, 1)), None);
        assert_eq!(reserved.clash(Run::new(0, 100)), Some((5, "L2 tables")));
        assert_eq!(reserved.clash(Run::new(7, 3)), Some((8, "L2 tables")));
        reserved.remove(Run::new(5, 2));
        reserved.remove(Run::new(8, 2));
        assert_eq!(reserved.clash(Run::new(0, 100)), None);
    }

    #[test]
    fn a_run_is_cut_at_block_borders() {
        let parts: Vec<_> = Run::new(6, 12).by_block(3).collect();
        let want = [
            (0, Run::new(6, 2)),
            (1, Run::new(8, 8)),
            (2, Run::new(16, 2)),
        ];
        assert_eq!(parts, want);
    }
}
