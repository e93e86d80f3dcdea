//! How much is logged of what a controller tells: it may tell things without end.

use std::time::{Duration, Instant};

/// Lines in [`EACH`], at most.
const LINES: u32 = 10;
const EACH: Duration = Duration::from_secs(60);

/// A budget of lines.
#[derive(Debug)]
pub(crate) struct Talk {
    since: Instant,
    lines: u32,
    left_out: u64,
}

impl Talk {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            lines: 0,
            left_out: 0,
        }
    }

    /// True if another line may be logged about what is `label`led so.
    pub(crate) fn may_say_more(&mut self, label: &str) -> bool {
        self.may_say_more_at(label, Instant::now())
    }

    fn may_say_more_at(&mut self, label: &str, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= EACH {
            if self.left_out > 0 {
                log::warn!(
                    "{label}: {} more changes and events were not logged, there were so many; look at the target",
                    self.left_out
                );
            }
            *self = Self {
                since: now,
                lines: 0,
                left_out: 0,
            };
        }
        let may = self.lines < LINES;
        match may {
            true => self.lines += 1,
            false => self.left_out += 1,
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_later_lines_are_logged_again() {
        let mut talk = Talk::new();
        let now = Instant::now();
        let said = (0..1000)
            .filter(|_| talk.may_say_more_at("it", now))
            .count();
        assert_eq!(
            (said, talk.left_out),
            (LINES as usize, 1000 - u64::from(LINES))
        );
        assert!(talk.may_say_more_at("it", now + EACH));
        assert_eq!(talk.left_out, 0);
    }
}
