use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use super::super::testing::{CHILD, alone, is_alone};
use super::*;

fn listen(path: &Path) -> Result<Listener, ListenError> {
    listen_as(path, None, None)
}

fn listen_as(path: &Path, mode: Option<u32>, group: Option<u32>) -> Result<Listener, ListenError> {
    let listen = Listen::Path {
        path: path.to_owned(),
        mode,
        group,
    };
    match listen.open()? {
        Source::Listening(listener) => Ok(listener),
        Source::Connected(_) => panic!("a path is listened on"),
    }
}

#[test]
fn socket_file_lives_as_long_as_its_listener() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let listener = listen(&path).unwrap();
    assert!(listener.accept().unwrap().is_none());
    let _client = UnixStream::connect(&path).unwrap();
    assert!(listener.accept().unwrap().is_some());
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn stale_socket_file_is_replaced() {
    if !alone("vhost_user::listener::tests::stale_socket_file_is_replaced") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    // A daemon that was killed leaves its file behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let _listener = listen(&path).unwrap();
    UnixStream::connect(&path).unwrap();
}

#[test]
fn socket_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let first = listen(&path).unwrap();
    assert!(matches!(listen(&path), Err(ListenError::InUse { .. })));
    UnixStream::connect(first.path().unwrap()).unwrap();
}

#[test]
fn file_that_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    fs::write(&path, "precious").unwrap();
    assert!(matches!(listen(&path), Err(ListenError::NotASocket { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    // Nor is a link followed, wherever it points.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(matches!(listen(&link), Err(ListenError::NotASocket { .. })));
}

#[test]
fn successor_keeps_its_socket_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let old = listen(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let _new = listen(&path).unwrap();
    drop(old);
    UnixStream::connect(&path).unwrap();
}

#[test]
fn mode_and_group_are_set() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let listener = listen(&path).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    drop(listener);
    // SAFETY: getegid has no arguments and cannot fail.
    let own = unsafe { libc::getegid() };
    let _listener = listen_as(&path, Some(0o660), Some(own)).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);
    assert_eq!(metadata.gid(), own);
}

#[test]
fn nobody_can_connect_before_listen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let _bound = bind_only(&path).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let error = UnixStream::connect(&path).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn path_too_long_is_refused_by_name() {
    let path = Path::new("/tmp").join("x".repeat(120));
    let error = listen(&path).unwrap_err();
    assert!(error.to_string().contains("107"), "{error}");
}

#[test]
fn directory_that_is_missing_is_told() {
    let error = listen(Path::new("/nonexistent/disk.sock")).unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent/disk.sock"),
        "{error}"
    );
}

#[test]
fn given_descriptor_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("given")).unwrap();
    assert!(matches!(
        Listen::Fd(listener.into()).open(),
        Ok(Source::Listening(_))
    ));
    // A file that was not ours to make is not ours to remove.
    assert!(dir.path().join("given").exists());
    let (end, _other) = UnixStream::pair().unwrap();
    assert!(matches!(
        Listen::Fd(end.into()).open(),
        Ok(Source::Connected(_))
    ));
    let bound = bind_only(&dir.path().join("bound")).unwrap();
    let number = bound.as_raw_fd().to_string();
    let error = Listen::Fd(bound).open().unwrap_err();
    assert!(error.to_string().contains(&number), "{error}");
    assert!(
        Listen::Fd(UnixDatagram::unbound().unwrap().into())
            .open()
            .is_err()
    );
    assert!(
        Listen::Fd(fs::File::open("/dev/null").unwrap().into())
            .open()
            .is_err()
    );
}

#[test]
fn sockets_for_another_process_are_not_taken() {
    assert!(passed_sockets(None, Some(1), "").is_empty());
    assert!(passed_sockets(Some(std::process::id() + 1), Some(1), "").is_empty());
    assert!(passed_sockets(Some(std::process::id()), None, "").is_empty());
    assert!(passed_sockets(Some(std::process::id()), Some(0), "").is_empty());
}

#[test]
fn sockets_from_systemd_are_taken_with_their_names() {
    if is_alone() {
        let mut sockets = systemd_sockets();
        assert_eq!(sockets.len(), 1);
        let (fd, name) = sockets.remove(0);
        assert_eq!(name.as_deref(), Some("disk0"));
        assert!(matches!(Listen::Fd(fd).open(), Ok(Source::Listening(_))));
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("given")).unwrap();
    let test = "vhost_user::listener::tests::sockets_from_systemd_are_taken_with_their_names";
    // The shell puts the socket where systemd would, and tells for which process it is.
    let script = r#"LISTEN_PID=$$ exec "$0" --exact "$1" --nocapture 3<&0 </dev/null"#;
    let child = std::process::Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg(test)
        .env("LISTEN_FDS", "1")
        .env("LISTEN_FDNAMES", "disk0")
        .env(CHILD, "1")
        .stdin(std::os::fd::OwnedFd::from(listener))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
