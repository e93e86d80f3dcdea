//! How long threads waited for a CPU that somebody else had: what makes a measurement worthless.

use std::fs;
use std::time::Duration;

/// Time that all threads of a process were ready and did not run (second field of
/// `/proc/PID/task/TID/schedstat`); zero where the kernel does not count it.
pub fn waited(pid: u32) -> Duration {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Duration::ZERO;
    };
    let nanoseconds = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanoseconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_gone_waited_for_nothing() {
        assert_eq!(waited(u32::MAX), Duration::ZERO);
        assert!(waited(std::process::id()) < Duration::from_secs(3600));
    }
}
