//! The figures that are kept under version control.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cases::Result;

/// The compiler of this program, and so of the code that it counts.
const RUSTC: &str = env!("BENCH_RUSTC");
const PROFILE: &str = if cfg!(debug_assertions) {
    "dev"
} else {
    "release"
};
/// By how much a figure may rise with the compiler that it was recorded with.
const BOUND: f64 = 0.05;
/// And with another one.
const BOUND_OTHER: f64 = 0.15;

/// Figures, and what they were counted with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    rustc: String,
    profile: String,
    architecture: String,
    /// Instructions a request, by case.
    instructions: BTreeMap<String, f64>,
}

/// What is to be said of a figure.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    Good,
    /// It should be recorded anew, so that it does not rise again unnoticed.
    Fell(String),
    Rose(String),
}

/// To a tenth of an instruction.
pub fn rounded(figure: f64) -> f64 {
    (figure * 10.0).round() / 10.0
}

impl Recorded {
    fn empty() -> Self {
        Self {
            rustc: RUSTC.into(),
            profile: PROFILE.into(),
            architecture: std::env::consts::ARCH.into(),
            instructions: BTreeMap::new(),
        }
    }

    /// Reads the file; where there is none, nothing is recorded yet.
    ///
    /// # Errors
    /// It is not what this writes.
    pub fn read(path: &Path) -> Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::empty()),
            Err(error) => return Err(format!("{}: {error}", path.display()).into()),
        };
        serde_json::from_str(&text).map_err(|error| format!("{}: {error}", path.display()).into())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// It can not be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        Ok(std::fs::write(path, text)?)
    }

    /// With these figures in place of older ones. Figures of another compiler are not kept beside them.
    pub fn with<'a>(&self, figures: impl Iterator<Item = (&'a str, f64)>) -> Self {
        let mut new = Self::empty();
        if self.is_comparable() && self.rustc == new.rustc {
            new.instructions.clone_from(&self.instructions);
        }
        let figures = figures.map(|(case, figure)| (case.to_owned(), rounded(figure)));
        new.instructions.extend(figures);
        new
    }

    /// A figure, for people.
    pub fn shown(&self, case: &str) -> String {
        let figure = self.instructions.get(case);
        figure.map_or_else(|| "-".into(), |figure| format!("{figure:.1}"))
    }

    fn is_comparable(&self) -> bool {
        self.architecture == std::env::consts::ARCH && self.profile == PROFILE
    }

    fn bound(&self) -> f64 {
        if self.rustc == RUSTC {
            BOUND
        } else {
            BOUND_OTHER
        }
    }

    /// How the comparison is made, for people.
    pub fn terms(&self) -> String {
        if !self.is_comparable() {
            return format!(
                "with nothing: the figures are those of {} on {}, and this is {PROFILE} on {}",
                self.profile,
                self.architecture,
                std::env::consts::ARCH
            );
        }
        let percent = 100.0 * self.bound();
        match self.rustc == RUSTC {
            true => {
                format!("with figures of the same compiler ({RUSTC}): a rise of {percent} % fails")
            }
            false => format!(
                "with figures of another compiler ({}; this is {RUSTC}): a rise of {percent} % fails",
                self.rustc
            ),
        }
    }

    /// Compares a figure with the recorded one.
    pub fn judge(&self, case: &str, figure: f64) -> Verdict {
        if !self.is_comparable() {
            return Verdict::Good;
        }
        let Some(&recorded) = self.instructions.get(case) else {
            return Verdict::Rose("nothing is recorded: benches/instructions --record".into());
        };
        let change = format!(
            "{figure:.1} instructions a request, {recorded:.1} were recorded ({:+.1} %)",
            100.0 * (figure / recorded - 1.0)
        );
        if figure > recorded * (1.0 + self.bound()) {
            return Verdict::Rose(format!(
                "{change}; if that is the price of something wanted: benches/instructions --record"
            ));
        }
        if self.rustc == RUSTC && figure < recorded * (1.0 - BOUND) {
            return Verdict::Fell(format!("{change}: benches/instructions --record keeps it"));
        }
        Verdict::Good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rustc: &str) -> Recorded {
        let mut recorded = Recorded::empty().with([("a", 100.0)].into_iter());
        recorded.rustc = rustc.into();
        recorded
    }

    #[test]
    fn a_rise_beyond_the_bound_fails_and_a_fall_is_told() {
        let same = of(RUSTC);
        assert_eq!(same.judge("a", 104.9), Verdict::Good);
        assert!(matches!(same.judge("a", 105.1), Verdict::Rose(_)));
        assert!(matches!(same.judge("a", 94.9), Verdict::Fell(_)));
        assert!(matches!(same.judge("b", 1.0), Verdict::Rose(_)));
    }

    #[test]
    fn another_compiler_has_a_wider_bound() {
        let other = of("rustc 1.2.3");
        assert_eq!(other.judge("a", 114.9), Verdict::Good);
        assert!(matches!(other.judge("a", 115.1), Verdict::Rose(_)));
        assert_eq!(other.judge("a", 50.0), Verdict::Good);
        assert!(other.with([("b", 1.0)].into_iter()).instructions.len() == 1);
    }

    #[test]
    fn another_architecture_is_not_compared() {
        let mut other = of(RUSTC);
        other.architecture = "z80".into();
        assert_eq!(other.judge("a", 1e9), Verdict::Good);
        assert!(other.terms().contains("z80"));
    }
}
