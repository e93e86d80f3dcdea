//! What a check tells.

use std::fmt;

/// Findings that are told one by one; the others are counted.
const MAX_FINDINGS: usize = 1000;

/// What a check found. The counts are those of `qemu-img check`.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Inconsistencies that can cost data.
    pub errors: u64,
    /// Clusters that are allocated and not, or not that often, used: lost space, nothing else.
    pub leaks: u64,
    /// Errors that no repair makes good: the others are left when these are 0.
    pub lasting: u64,
    /// Clusters of the virtual disk.
    pub total: u64,
    /// Guest clusters with a host cluster, compressed ones included.
    pub allocated: u64,
    /// Allocated clusters that do not lie behind the one before them.
    pub fragmented: u64,
    /// Compressed clusters.
    pub compressed: u64,
    /// Bytes of the file up to the end of the last cluster in use.
    pub image_end: u64,
    /// The first of errors and leaks, in the order in which they were found.
    pub findings: Vec<Finding>,
}

impl Report {
    /// True if there is neither an error nor a leak.
    pub fn is_clean(&self) -> bool {
        self.errors + self.leaks == 0
    }

    /// Notes a finding that counts `times`.
    pub(super) fn add(
        &mut self,
        times: u64,
        leak: bool,
        offset: u64,
        fix: Fix,
        what: impl fmt::Display,
    ) {
        let count = if leak {
            &mut self.leaks
        } else {
            &mut self.errors
        };
        *count = count.saturating_add(times);
        if fix == Fix::Never {
            self.lasting = self.lasting.saturating_add(times);
        }
        if self.findings.len() < MAX_FINDINGS {
            let what = what.to_string();
            self.findings.push(Finding {
                leak,
                offset,
                fix,
                what,
            });
        }
    }
}

/// What makes a finding good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// A repair of leaks, and of everything.
    Leaks,
    /// A repair of everything.
    All,
    /// No repair: what was meant can not be told.
    Never,
}

/// One error or leak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A leak; else an error.
    pub leak: bool,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// What repairs it.
    pub fix: Fix,
    /// What is wrong there.
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.leak { "leak" } else { "error" };
        write!(f, "{kind} at offset {:#x}: {}", self.offset, self.what)
    }
}
