//! What callgrind wrote: the instructions of each object and each file.
//!
//! The format is in Valgrind's manual, "Callgrind Format Specification". Costs that lines have of their own are
//! summed; the line after `calls=` is what was called, which has its own lines elsewhere.

use std::collections::HashMap;
use std::path::Path;

/// Instructions by where they are.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// In the program itself: its own code, its crates, and the part of the standard library that it links.
    pub own: u64,
    /// In shared libraries: the C library's system calls, copies and fills.
    pub libraries: u64,
    /// Those of the program by source file.
    pub files: HashMap<String, u64>,
}

/// Names that were abbreviated as numbers.
#[derive(Default)]
struct Names(HashMap<String, String>);

impl Names {
    /// `(1) name` defines, `(1)` stands for it.
    fn get(&mut self, said: &str) -> String {
        let Some((number, name)) = said.strip_prefix('(').and_then(|rest| rest.split_once(')'))
        else {
            return said.to_owned();
        };
        match name.trim() {
            "" => self.0.get(number).cloned().unwrap_or_default(),
            name => {
                self.0.insert(number.to_owned(), name.to_owned());
                name.to_owned()
            }
        }
    }
}

impl Profile {
    /// Reads what callgrind wrote about `program`.
    ///
    /// # Errors
    /// A line of costs without a number.
    pub fn parse(text: &str, program: &Path) -> Result<Self, String> {
        let mut profile = Self::default();
        let (mut objects, mut files) = (Names::default(), Names::default());
        let (mut object, mut file) = (String::new(), String::new());
        let mut called = false;
        for line in text.lines() {
            if let Some((key, said)) = line.split_once('=') {
                match key {
                    "ob" => object = objects.get(said),
                    "cob" => drop(objects.get(said)),
                    "fl" | "fi" | "fe" => file = files.get(said),
                    "cfi" | "cfl" => drop(files.get(said)),
                    "calls" => called = true,
                    _ => {}
                }
                continue;
            }
            if !line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
                continue;
            }
            if std::mem::take(&mut called) {
                continue;
            }
            let cost = line.split_whitespace().nth(1);
            let cost: u64 = cost
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| format!("no cost in callgrind's line {line:?}"))?;
            if Path::new(&object) == program {
                profile.own += cost;
                *profile.files.entry(file.clone()).or_default() += cost;
            } else {
                profile.libraries += cost;
            }
        }
        Ok(profile)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_counted_once_and_by_object() {
        let text = "version: 1\nevents: Ir\n\nob=(1) /bin/daemon\nfl=(1) a.rs\nfn=(1) turn\n10 5\n+2 7\nfi=(2) b.rs\n\
                    3 4\nfe=(1)\ncob=(2) /lib/libc.so\ncfi=(3) ???\ncfn=(2) memset\ncalls=1 0\n12 900\n* 1\n\nob=(2)\n\
                    fl=(3)\nfn=(2)\n0 900\n\nob=(1)\nfl=(2)\nfn=(3) more\n9 10\ntotals: 927\n";
        let profile = Profile::parse(text, Path::new("/bin/daemon")).unwrap();
        assert_eq!((profile.own, profile.libraries), (27, 900));
        assert_eq!(profile.files["a.rs"], 13);
        assert_eq!(profile.files["b.rs"], 14);
    }

    #[test]
    fn a_line_without_a_cost_is_an_error() {
        assert!(Profile::parse("ob=x\n10\n", Path::new("x")).is_err());
    }
}
