//! What the kernel says about a process: its CPU time, its memory, and how long its threads waited for a CPU
//! that somebody else had, which makes a measurement worthless.

use std::fs;
use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

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

/// User and system time of all threads of a process, those that ended included, in nanoseconds:
/// `/proc/PID/stat` counts in ticks of 10 ms, too coarse for an idle process and for a short run.
///
/// # Errors
/// When the process is gone.
pub fn cpu_time(pid: u32) -> io::Result<Duration> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut clock = 0;
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: both calls write one value each, which is ours.
    unsafe {
        let error = libc::clock_getcpuclockid(pid, &mut clock);
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        if libc::clock_gettime(clock, &mut time) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    ))
}

/// Resident memory in KiB, as `/proc/PID/status` splits it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resident {
    /// All of it (`VmRSS`).
    pub total_kib: u64,
    /// Its own (`RssAnon`).
    pub anon_kib: u64,
    /// Pages of files, its program among them (`RssFile`).
    pub file_kib: u64,
    /// Shared memory (`RssShmem`): the guest's.
    pub shmem_kib: u64,
}

impl Resident {
    /// Of a process; zeros when it is gone.
    pub fn of(pid: u32) -> Self {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default())
    }

    /// Out of the text of `/proc/PID/status`.
    pub fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let mut lines = status.lines().filter_map(|line| line.split_once(':'));
            let value = lines.find(|(key, _)| *key == name).map(|(_, value)| value);
            let number = value.and_then(|value| value.split_whitespace().next());
            number.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        Self {
            total_kib: field("VmRSS"),
            anon_kib: field("RssAnon"),
            file_kib: field("RssFile"),
            shmem_kib: field("RssShmem"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vhost_user_frontend::process::io_counters;

    #[test]
    fn a_process_that_is_gone_waited_for_nothing() {
        assert_eq!(waited(u32::MAX), Duration::ZERO);
        assert!(waited(std::process::id()) < Duration::from_secs(3600));
    }

    #[test]
    fn cpu_time_grows_with_work_and_is_an_error_without_a_process() {
        let before = cpu_time(std::process::id()).unwrap();
        let mut x = 1u64;
        while cpu_time(std::process::id()).unwrap() == before {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(cpu_time(u32::MAX).is_err());
    }

    #[test]
    fn resident_memory_is_read_by_name() {
        let status = "Name:\tx\nVmRSS:\t   4100 kB\nRssAnon:\t 100 kB\nRssFile:\t3000 kB\n\
                      RssShmem:\t1000 kB\n";
        let resident = Resident::parse(status);
        assert_eq!((resident.total_kib, resident.anon_kib), (4100, 100));
        assert_eq!((resident.file_kib, resident.shmem_kib), (3000, 1000));
        assert_eq!(Resident::parse("VmRSS: many\n"), Resident::default());
        assert!(Resident::of(std::process::id()).total_kib > 0);
    }

    #[test]
    fn what_a_process_writes_is_counted() {
        let before = io_counters(std::process::id()).unwrap();
        let mut null = std::fs::File::create("/dev/null").unwrap();
        null.write_all(&[0; 4096]).unwrap();
        let after = io_counters(std::process::id()).unwrap();
        assert!(after.wchar >= before.wchar + 4096);
    }
}
