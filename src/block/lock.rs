//! Image locks, as QEMU's `block/file-posix.c` takes them, so that QEMU's tools and this program keep
//! each other out.
//!
//! Every user of an image locks one byte for each permission it uses (from 100 on) and one for each that
//! it does not let others use (from 200 on), all as shared locks of the open file description. It then
//! asks whether anybody holds the byte that speaks against it: "not shared" for what it uses, "used" for
//! what it does not share. The locks are in before the questions are asked, so of two that come at once
//! at least one sees the other.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use super::error::{Error, ErrorKind, Result};
use super::file::FileStorage;
use super::storage::Storage;

/// QEMU's `BLK_PERM_*`.
const CONSISTENT_READ: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const RESIZE: u32 = 1 << 3;
/// Bits that have a byte.
const BITS: u32 = 4;
const USED_BASE: u64 = 100;
const NOT_SHARED_BASE: u64 = 200;

/// What an image is locked for. Nobody else may write to it or resize it, whichever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Read by us, and by whoever likes.
    Reader,
    /// Written by us alone, at its size.
    RawWriter,
    /// Written by us alone, and growing: an image format's file.
    ImageWriter,
}

impl Role {
    fn used(self) -> u32 {
        match self {
            Self::Reader => CONSISTENT_READ,
            Self::RawWriter => CONSISTENT_READ | WRITE,
            Self::ImageWriter => CONSISTENT_READ | WRITE | RESIZE,
        }
    }

    fn not_shared(self) -> u32 {
        WRITE | RESIZE
    }
}

/// The lock bytes that are held on a file: permissions used, and those not shared above them.
#[derive(Debug, Default)]
pub(super) struct Held(AtomicU32);

impl Storage {
    /// Locks the image for `role`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another process is in the way, or if it is locked already.
    pub fn lock(&self, role: Role) -> Result<()> {
        let storage = match self {
            Self::File(storage) => storage,
            Self::Crypt(storage) => return storage.below().lock(role),
            _ => return Ok(()),
        };
        let bits = role.used() | role.not_shared() << 16;
        // Locks of one open file do not exclude each other.
        let free = storage
            .held
            .0
            .compare_exchange(0, bits, Ordering::AcqRel, Ordering::Acquire);
        if free.is_err() {
            let message = "the image is in use by this process already";
            return Err(Error::image(ErrorKind::Locked, self.path(), None, message));
        }
        let result = take(storage.file(), self.path(), role);
        if result.is_err() {
            self.unlock();
        }
        result
    }

    /// Gives all locks of the image back.
    pub fn unlock(&self) {
        let storage = match self {
            Self::File(storage) => storage,
            Self::Crypt(storage) => return storage.below().unlock(),
            _ => return,
        };
        if storage.held.0.swap(0, Ordering::AcqRel) == 0 {
            return;
        }
        let ours = storage.locks_ours.as_ref();
        if ours.is_none_or(|ours| ours.load(Ordering::Acquire)) {
            self.unlock_file(storage);
        }
    }

    /// Forgets that the image is locked, and leaves it so: for the process that goes on with it, or for this
    /// one if it locks it again.
    pub(super) fn keep_locked(&self) {
        match self {
            Self::File(storage) => storage.held.0.store(0, Ordering::Release),
            Self::Crypt(storage) => storage.below().keep_locked(),
            _ => {}
        }
    }

    /// Gives back what [`Storage::keep_locked`] has left, unless it was locked again.
    pub(super) fn unlock_kept(&self) {
        match self {
            Self::File(storage) if storage.held.0.load(Ordering::Acquire) == 0 => {
                self.unlock_file(storage);
            }
            Self::Crypt(storage) => storage.below().unlock_kept(),
            _ => {}
        }
    }

    fn unlock_file(&self, storage: &FileStorage) {
        for start in [USED_BASE, NOT_SHARED_BASE] {
            let unlocked = set(storage.file(), libc::F_UNLCK, start, u64::from(BITS));
            if let Err(error) = unlocked {
                log::error!("{}: cannot unlock: {error}", self.path().display());
            }
        }
    }
}

fn take(file: &File, path: &Path, role: Role) -> Result<()> {
    let (used, not_shared) = (role.used(), role.not_shared());
    for bit in 0..BITS {
        for (bits, base) in [(used, USED_BASE), (not_shared, NOT_SHARED_BASE)] {
            if bits >> bit & 1 != 0 {
                set(file, libc::F_RDLCK, base + u64::from(bit), 1)
                    .map_err(|error| refused(path, base + u64::from(bit), error))?;
            }
        }
    }
    for bit in 0..BITS {
        if used >> bit & 1 != 0 && is_held(file, path, NOT_SHARED_BASE + u64::from(bit))? {
            let what = match 1 << bit {
                CONSISTENT_READ => "reading",
                WRITE => "writing",
                _ => "resizing",
            };
            return Err(in_use(path, format_args!("does not share {what} it")));
        }
    }
    for bit in 0..BITS {
        if not_shared >> bit & 1 != 0 && is_held(file, path, USED_BASE + u64::from(bit))? {
            let what = match 1 << bit {
                WRITE => "writes to",
                _ => "may resize",
            };
            return Err(in_use(path, format_args!("{what} it")));
        }
    }
    Ok(())
}

fn in_use(path: &Path, how: std::fmt::Arguments<'_>) -> Error {
    Error::image(
        ErrorKind::Locked,
        path,
        None,
        format_args!(
            "the image is in use: another process (QEMU, qemu-img, qemu-storage-daemon or another \
             virtioblkd) {how}. Stop that process (`fuser -v {}` names it), or use another image",
            path.display()
        ),
    )
}

fn refused(path: &Path, byte: u64, error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => {
            in_use(path, format_args!("holds byte {byte} of it locked"))
        }
        Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => Error::image(
            ErrorKind::Unsupported,
            path,
            None,
            format_args!(
                "cannot be locked ({error}): the file system keeps no locks, so nothing would keep two \
                 writers apart; put the image on one that does (NFS: with its lock manager)"
            ),
        ),
        _ => Error::io(path, "lock", byte, error),
    }
}

fn description(kind: i32, start: u64, len: u64) -> libc::flock {
    // SAFETY: zeros are a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    lock.l_start = start as _;
    lock.l_len = len as _;
    lock
}

fn set(file: &File, kind: i32, start: u64, len: u64) -> io::Result<()> {
    let lock = description(kind, start, len);
    loop {
        // SAFETY: the structure lives through the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// True if another open file description has a lock on the byte.
fn is_held(file: &File, path: &Path, byte: u64) -> Result<bool> {
    let mut lock = description(libc::F_WRLCK, byte, 1);
    // SAFETY: the structure lives through the call, which writes to it.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) } != 0 {
        return Err(refused(path, byte, io::Error::last_os_error()));
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

    use super::super::tests::dir;
    use super::super::{FileOptions, FileStorage};
    use super::*;

    fn open(path: &Path, read_only: bool) -> Storage {
        let direct = false;
        Storage::File(FileStorage::open(path, FileOptions { read_only, direct }).unwrap())
    }

    fn qemu_img(args: &[&str]) -> Option<String> {
        let output = Command::new("qemu-img").args(args).output();
        let output = output.expect("these tests need qemu-img (package qemu-utils)");
        (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn qemu_io(args: &[&str]) -> bool {
        let status = Command::new("qemu-io")
            .args(args)
            .args(["-c", "read 0 512"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        status.expect("these tests need qemu-io").success()
    }

    /// A qemu-io that has an image open.
    struct Holder {
        child: Child,
        stdin: Option<ChildStdin>,
        _stdout: BufReader<ChildStdout>,
    }

    impl Holder {
        fn start(args: &[&str]) -> Self {
            let mut child = Command::new("qemu-io")
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("these tests need qemu-io");
            let mut stdin = child.stdin.take().unwrap();
            let mut stdout = BufReader::new(child.stdout.take().unwrap());
            stdin.write_all(b"length\n").unwrap();
            // It answers when the image is open.
            let mut line = String::new();
            while !line.contains("iB") {
                line.clear();
                assert_ne!(stdout.read_line(&mut line).unwrap(), 0, "qemu-io ended");
            }
            Self {
                child,
                stdin: Some(stdin),
                _stdout: stdout,
            }
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            drop(self.stdin.take());
            let _ = self.child.wait();
        }
    }

    #[test]
    fn qemu_img_and_qemu_io_are_kept_out_of_a_qcow2_that_is_in_use() {
        let dir = dir();
        let path = dir.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        assert_eq!(qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]), None);
        let image = open(&path, false);
        image.lock(Role::ImageWriter).unwrap();
        let said = qemu_img(&["info", name]).expect("refused");
        assert!(
            said.contains("Failed to get shared \"write\" lock"),
            "{said}"
        );
        assert_eq!(
            qemu_img(&["info", "-U", name]),
            None,
            "-U reads all the same"
        );
        assert!(qemu_img(&["snapshot", "-c", "s", name]).is_some());
        assert!(!qemu_io(&["-f", "qcow2", name]));
        assert!(!qemu_io(&["-r", "-f", "qcow2", name]));
        image.unlock();
        assert_eq!(qemu_img(&["info", name]), None);
        assert!(qemu_io(&["-f", "qcow2", name]));
    }

    #[test]
    fn writers_are_kept_out_of_a_raw_file_that_is_in_use() {
        let dir = dir();
        let path = dir.path().join("a.img");
        let name = path.to_str().unwrap();
        std::fs::write(&path, [0; 4096]).unwrap();
        for (role, read_only) in [(Role::RawWriter, false), (Role::Reader, true)] {
            let image = open(&path, read_only);
            image.lock(role).unwrap();
            assert!(!qemu_io(&["-f", "raw", name]), "a second writer");
            assert!(qemu_img(&["resize", "-f", "raw", name, "8192"]).is_some());
            image.unlock();
            assert!(qemu_io(&["-f", "raw", name]));
        }
    }

    #[test]
    fn what_qemu_io_writes_to_is_refused_to_us_and_what_it_reads_is_not_written() {
        let dir = dir();
        let qcow2 = dir.path().join("a.qcow2");
        let raw = dir.path().join("a.img");
        std::fs::write(&raw, [0; 65536]).unwrap();
        let name = qcow2.to_str().unwrap();
        assert_eq!(qemu_img(&["create", "-q", "-f", "qcow2", name, "1M"]), None);
        for (path, format, role) in [
            (&qcow2, "qcow2", Role::ImageWriter),
            (&raw, "raw", Role::RawWriter),
        ] {
            let name = path.to_str().unwrap();
            let image = open(path, false);
            let reader = open(path, true);
            let holder = Holder::start(&["-f", format, name]);
            for refused in [image.lock(role), reader.lock(Role::Reader)] {
                let error = refused.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Locked);
                assert!(error.to_string().contains("fuser -v"), "{error}");
            }
            drop(holder);
            image.lock(role).unwrap();
            image.unlock();
            // A reader of qcow2 wants nobody to write, a reader of raw does not mind (QEMU's rule).
            let _holder = Holder::start(&["-r", "-f", format, name]);
            reader.lock(Role::Reader).unwrap();
            reader.unlock();
            assert_eq!(image.lock(role).is_err(), format == "qcow2");
        }
    }

    #[test]
    fn a_storage_daemon_that_shares_writing_is_refused_all_the_same() {
        let dir = dir();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        std::fs::write(at("a.img"), [0; 65536]).unwrap();
        let status = Command::new("qemu-storage-daemon")
            .args(["--daemonize", "--pidfile", &at("pid"), "--blockdev"])
            .arg(format!("driver=file,node-name=f,filename={}", at("a.img")))
            .args([
                "--nbd-server",
                &format!("addr.type=unix,addr.path={}", at("nbd")),
            ])
            .args(["--export", "type=nbd,id=e,node-name=f,writable=on"])
            .status();
        assert!(
            status
                .expect("this test needs qemu-storage-daemon")
                .success()
        );
        let image = open(Path::new(&at("a.img")), false);
        let refused = image.lock(Role::RawWriter);
        let pid: i32 = std::fs::read_to_string(at("pid"))
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        // SAFETY: the daemon that this test started.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Locked);
    }

    #[test]
    fn one_of_ours_keeps_another_out_and_readers_share() {
        let dir = dir();
        let path = dir.path().join("a.img");
        std::fs::write(&path, [0; 512]).unwrap();
        let (first, second) = (open(&path, true), open(&path, true));
        first.lock(Role::Reader).unwrap();
        second.lock(Role::Reader).unwrap();
        let writer = open(&path, false);
        assert_eq!(
            writer.lock(Role::RawWriter).unwrap_err().kind(),
            ErrorKind::Locked
        );
        first.unlock();
        assert!(writer.lock(Role::RawWriter).is_err());
        second.unlock();
        writer.lock(Role::RawWriter).unwrap();
        assert!(first.lock(Role::Reader).is_err());
        let other = open(&path, false);
        assert!(other.lock(Role::RawWriter).is_err());
        assert!(
            other.lock(Role::RawWriter).is_err(),
            "a refusal leaves nothing locked"
        );
        writer.unlock();
        other.lock(Role::RawWriter).unwrap();
    }
}
