//! What the service manager wants to know (sd_notify(3)): one datagram to the socket that `NOTIFY_SOCKET` names.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use log::warn;

/// The sockets are served.
pub(super) const READY: &str = "READY=1";
/// The disks are being drained.
pub(super) const STOPPING: &str = "STOPPING=1";

/// Tells the service manager, if there is one that wants to know. What keeps it from hearing is a line in the
/// log: it says itself what follows from that.
pub(super) fn notify(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return;
    };
    if let Err(error) = send(&socket, state) {
        warn!("telling {state} to the service manager at {socket:?}: {error}");
    }
}

/// Says which process is the service's main one.
pub(super) fn main_pid(pid: libc::pid_t) {
    notify(&format!("MAINPID={pid}"));
}

fn send(socket: &OsStr, state: &str) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(socket)?,
        // An abstract name.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => {
            let what = "it is neither a path nor an abstract name";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
    };
    let ours = UnixDatagram::unbound()?;
    // A manager that does not read holds up nobody.
    ours.set_nonblocking(true)?;
    ours.send_to_addr(state.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> Vec<u8> {
        let mut bytes = vec![0; 100];
        let len = socket.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    #[test]
    fn state_goes_to_a_path_or_an_abstract_name_in_one_datagram() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        send(path.as_os_str(), READY).unwrap();
        assert_eq!(received(&manager), b"READY=1");
        let name = format!("virtioblkd-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        send(OsStr::new(&format!("@{name}")), STOPPING).unwrap();
        assert_eq!(received(&manager), b"STOPPING=1");
    }

    #[test]
    fn manager_that_is_missing_deaf_or_no_socket_is_an_error_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        for nowhere in [path.to_str().unwrap(), "vsock:2:1", "@", "/", "x"] {
            assert!(send(OsStr::new(nowhere), READY).is_err(), "{nowhere}");
        }
        let _deaf = UnixDatagram::bind(&path).unwrap();
        assert!((0..100_000).any(|_| send(path.as_os_str(), READY).is_err()));
    }
}
