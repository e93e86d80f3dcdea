//! What the host gives this process: its CPUs, and the sockets of systemd.

use std::io;
use std::os::fd::RawFd;
use std::path::Path;

use super::parse;

/// The first descriptor that systemd passes (`SD_LISTEN_FDS_START` in sd_listen_fds(3)).
const LISTEN_FDS_START: RawFd = 3;

/// What a configuration is checked against.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The CPUs that are online, in order.
    pub cpus: Vec<usize>,
    /// The sockets that systemd passed, in order.
    pub sockets: Vec<PassedSocket>,
}

/// A socket that systemd opened for this process (sd_listen_fds(3)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedSocket {
    /// The descriptor.
    pub fd: RawFd,
    /// What `FileDescriptorName=` says; `unknown` where nothing was said.
    pub name: String,
}

impl Host {
    /// The host as this process sees it.
    pub fn of_this_process() -> Self {
        let variable = |name: &str| std::env::var(name).ok();
        Self {
            cpus: online_cpus(Path::new("/sys/devices/system/cpu/online")),
            sockets: passed_sockets(
                listen_pid(),
                variable("LISTEN_PID").as_deref(),
                variable("LISTEN_FDS").as_deref(),
                variable("LISTEN_FDNAMES").as_deref(),
            ),
        }
    }
}

/// The process that `LISTEN_PID` must name for the sockets of systemd to be this process's: itself, or the one
/// whose place it is to take.
pub fn listen_pid() -> u32 {
    match std::env::var_os("VIRTIOBLKD_UPGRADE_FD") {
        None => std::process::id(),
        Some(_) => std::os::unix::process::parent_id(),
    }
}

/// All CPUs of the host that are online, whatever this process is pinned to just now: workers may be
/// pinned elsewhere, and the number of queues follows the guest's CPUs, not ours.
fn online_cpus(list: &Path) -> Vec<usize> {
    if let Ok(text) = std::fs::read_to_string(list) {
        if let Ok(cpus) = parse::cpu_list(&text) {
            return cpus;
        }
    }
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (0..count).collect()
}

/// Reads the protocol of sd_listen_fds(3). Sockets meant for another process, and nonsense, are none.
pub(crate) fn passed_sockets(
    pid: u32,
    listen_pid: Option<&str>,
    listen_fds: Option<&str>,
    names: Option<&str>,
) -> Vec<PassedSocket> {
    let for_us = listen_pid.and_then(|text| text.parse().ok()) == Some(pid);
    let count = match listen_fds.and_then(|text| text.parse::<u16>().ok()) {
        Some(count) if for_us => count,
        _ => return Vec::new(),
    };
    let mut names = names.unwrap_or_default().split(':');
    (0..count)
        .map(|i| PassedSocket {
            fd: LISTEN_FDS_START + RawFd::from(i),
            name: match names.next() {
                Some(name) if !name.is_empty() => name.to_owned(),
                _ => "unknown".to_owned(),
            },
        })
        .collect()
}

/// Whether an open descriptor is a socket.
///
/// # Errors
///
/// `NotFound` when it is not open.
pub(crate) fn is_socket(fd: RawFd) -> io::Result<bool> {
    use std::os::unix::fs::FileTypeExt;
    Ok(std::fs::metadata(format!("/proc/self/fd/{fd}"))?
        .file_type()
        .is_socket())
}

/// The number of a group, given its number or its name.
pub(crate) fn group_id(group: &str) -> Option<u32> {
    if !group.is_empty() && group.bytes().all(|b| b.is_ascii_digit()) {
        // The last number means "do not change" to chown(2).
        return group.parse().ok().filter(|id| *id != u32::MAX);
    }
    let name = std::ffi::CString::new(group).ok()?;
    let mut buffer: Vec<libc::c_char> = vec![0; 1024];
    loop {
        let mut found = std::ptr::null_mut();
        // SAFETY: `group` is plain data for which all zeros is a value; getgrnam_r fills it.
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        // SAFETY: the name ends in NUL, `entry` and `found` are ours to write, and the buffer is as
        // long as is said.
        let error = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                &mut entry,
                buffer.as_mut_ptr(),
                buffer.len(),
                &mut found,
            )
        };
        match error {
            0 if found.is_null() => return None,
            0 => return Some(entry.gr_gid),
            // A group of many members needs a larger buffer.
            libc::ERANGE if buffer.len() < 1 << 20 => buffer.resize(buffer.len() * 4, 0),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(fd: RawFd, name: &str) -> PassedSocket {
        PassedSocket {
            fd,
            name: name.to_owned(),
        }
    }

    #[test]
    fn systemd_sockets_are_numbered_from_three_and_named_in_order() {
        assert_eq!(
            passed_sockets(42, Some("42"), Some("2"), Some("root:data")),
            [socket(3, "root"), socket(4, "data")]
        );
    }

    #[test]
    fn systemd_sockets_without_names_are_unknown() {
        assert_eq!(
            passed_sockets(42, Some("42"), Some("1"), None),
            [socket(3, "unknown")]
        );
        assert_eq!(
            passed_sockets(42, Some("42"), Some("2"), Some("root")),
            [socket(3, "root"), socket(4, "unknown")]
        );
    }

    #[test]
    fn systemd_sockets_of_another_process_are_not_ours() {
        for (pid, fds) in [
            (Some("41"), Some("1")),
            (None, Some("1")),
            (Some("42"), None),
            (Some("42"), Some("-1")),
            (Some("x"), Some("1")),
            (Some("42"), Some("99999999")),
        ] {
            assert_eq!(passed_sockets(42, pid, fds, None), [], "{pid:?} {fds:?}");
        }
    }

    #[test]
    fn a_host_has_a_cpu_even_without_sysfs() {
        assert!(!online_cpus(Path::new("/nonexistent")).is_empty());
        assert!(!Host::of_this_process().cpus.is_empty());
    }

    #[test]
    fn groups_are_known_by_name_and_by_number() {
        assert_eq!(group_id("root"), Some(0));
        assert_eq!(group_id("4711"), Some(4711));
        for group in ["", "no such group", "nul\0", "4294967295", "99999999999"] {
            assert_eq!(group_id(group), None, "{group:?}");
        }
    }
}
