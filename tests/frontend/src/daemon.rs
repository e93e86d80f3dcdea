//! Runs a backend process for a test: `virtioblkd`, or `qemu-storage-daemon` as the reference.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::process;
use crate::sys;

/// Which backend to run.
#[derive(Debug, Clone)]
pub enum Program {
    /// The daemon of this project, at this path.
    Virtioblkd(PathBuf),
    /// QEMU's storage daemon.
    QemuStorageDaemon,
}

impl Program {
    /// The program, where it is installed.
    pub fn qemu_storage_daemon() -> Option<Self> {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .any(|dir| dir.join("qemu-storage-daemon").is_file())
            .then_some(Self::QemuStorageDaemon)
    }
}

/// A disk to serve.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Path of the image, or a URI such as `null:1G`.
    pub image: OsString,
    /// `raw` or `qcow2`.
    pub format: String,
    /// Refuse writes.
    pub read_only: bool,
    /// Queues to offer.
    pub num_queues: u16,
    /// Logical block size.
    pub block_size: Option<u32>,
    /// Most entries a queue may have (`virtioblkd` only).
    pub queue_size: Option<u16>,
    /// Serial number.
    pub serial: Option<String>,
    /// Worker threads (`virtioblkd` only).
    pub workers: Option<u16>,
    /// Further arguments for `virtioblkd`; the reference gets none of them.
    pub extra: Vec<OsString>,
    /// Environment variables of the process.
    pub env: Vec<(OsString, OsString)>,
}

impl Disk {
    /// A writable disk with one queue.
    pub fn new(image: impl AsRef<Path>, format: &str) -> Self {
        Self {
            image: image.as_ref().as_os_str().to_owned(),
            format: format.to_owned(),
            read_only: false,
            num_queues: 1,
            block_size: None,
            queue_size: None,
            serial: None,
            workers: None,
            extra: Vec::new(),
            env: Vec::new(),
        }
    }

    /// The same, read-only.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// The same with `n` queues.
    pub fn queues(mut self, n: u16) -> Self {
        self.num_queues = n;
        self
    }

    /// The same with `n` workers.
    pub fn workers(mut self, n: u16) -> Self {
        self.workers = Some(n);
        self
    }

    /// The same with a logical block size.
    pub fn block_size(mut self, bytes: u32) -> Self {
        self.block_size = Some(bytes);
        self
    }

    /// The same with queues of up to `n` entries.
    pub fn queue_size(mut self, n: u16) -> Self {
        self.queue_size = Some(n);
        self
    }

    /// The same with a serial number.
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = Some(serial.to_owned());
        self
    }

    /// The same with further arguments.
    pub fn args<S: Into<OsString>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.extra.extend(args.into_iter().map(Into::into));
        self
    }

    /// The same with a variable in the environment of the process.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    fn virtioblkd(&self, program: &Path, socket: &Path) -> Command {
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(socket);
        command.arg("--blk-file").arg(&self.image);
        command.arg("--format").arg(&self.format);
        command.arg("--num-queues").arg(self.num_queues.to_string());
        if self.read_only {
            command.arg("--read-only");
        }
        if let Some(n) = self.workers {
            command.arg("--workers").arg(n.to_string());
        }
        if let Some(n) = self.queue_size {
            command.arg("--queue-size").arg(n.to_string());
        }
        if let Some(bytes) = self.block_size {
            command.arg("--block-size").arg(bytes.to_string());
        }
        if let Some(serial) = &self.serial {
            command.arg("--serial").arg(serial);
        }
        command.args(&self.extra);
        command
    }

    fn qemu_storage_daemon(&self, socket: &Path) -> Command {
        let image = self.image.to_string_lossy();
        let access = if self.read_only {
            "read-only=on,auto-read-only=off"
        } else {
            "read-only=off"
        };
        let node = if let Some(size) = image.strip_prefix("null:") {
            format!("driver=null-co,node-name=d,read-zeroes=on,size={size},{access}")
        } else {
            format!(
                "driver={},node-name=d,discard=unmap,{access},file.driver=file,\
                 file.filename={image},file.discard=unmap",
                self.format
            )
        };
        let mut export = format!(
            "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={},num-queues={}",
            socket.display(),
            self.num_queues
        );
        if !self.read_only {
            export.push_str(",writable=on");
        }
        if let Some(bytes) = self.block_size {
            export.push_str(&format!(",logical-block-size={bytes}"));
        }
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", &node, "--export", &export]);
        command
    }
}

/// A running backend; killed, by its own process id, when the value goes.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
    command_line: String,
    status: Option<ExitStatus>,
}

impl Daemon {
    /// Starts the backend in `dir` and waits until it listens.
    ///
    /// # Panics
    /// When it exits or does not listen within a minute; its log is in the message.
    pub fn start(program: &Program, disk: &Disk, dir: &Path) -> Self {
        let mut daemon = Self::spawn(program, disk, dir);
        daemon.wait_listening(Duration::from_secs(60));
        daemon
    }

    /// Starts the backend in `dir` without waiting. The socket is `dir/s`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn(program: &Program, disk: &Disk, dir: &Path) -> Self {
        let socket = dir.join("s");
        let mut command = match program {
            Program::Virtioblkd(path) => disk.virtioblkd(path, &socket),
            Program::QemuStorageDaemon => {
                // It does not take over the socket file of one that was killed.
                let _ = fs::remove_file(&socket);
                disk.qemu_storage_daemon(&socket)
            }
        };
        command.envs(disk.env.iter().map(|(name, value)| (name, value)));
        Self::spawn_command(&mut command, &socket, dir)
    }

    /// Starts any command that is to listen on `socket`; its output goes to `dir/daemon.log`.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn spawn_command(command: &mut Command, socket: &Path, dir: &Path) -> Self {
        let log = dir.join("daemon.log");
        let open = || {
            File::options()
                .append(true)
                .create(true)
                .open(&log)
                .unwrap_or_else(|e| panic!("{}: {e}", log.display()))
        };
        let command_line = format!("{command:?}");
        let child = command
            .stdin(Stdio::null())
            .stdout(open())
            .stderr(open())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {command_line}: {e}"));
        Self {
            child,
            socket: socket.to_owned(),
            log,
            command_line,
            status: None,
        }
    }

    /// Waits until somebody listens on the socket.
    ///
    /// # Panics
    /// When the backend exits first, or the time is up.
    pub fn wait_listening(&mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while !process::is_listening(&self.socket).unwrap_or(false) {
            if let Some(status) = self.try_exit() {
                panic!(
                    "the backend exited ({status}) before it listened\n{}\n{}",
                    self.command_line,
                    self.log()
                );
            }
            assert!(
                Instant::now() < deadline,
                "the backend does not listen\n{}\n{}",
                self.command_line,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to its standard output and error so far, this and earlier runs in the same directory.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its exit status, if it has exited.
    pub fn try_exit(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Waits for its exit.
    ///
    /// # Panics
    /// When it still runs after `timeout`.
    pub fn wait_exit(&mut self, timeout: Duration) -> ExitStatus {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_exit() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "the backend does not exit\n{}\n{}",
                self.command_line,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks it to end, and waits for that.
    ///
    /// # Panics
    /// When it does not exit within a minute, or not with success.
    pub fn terminate(&mut self) {
        self.signal(libc::SIGTERM);
        let status = self.wait_exit(Duration::from_secs(60));
        assert!(
            status.success(),
            "the backend ended with {status}\n{}\n{}",
            self.command_line,
            self.log()
        );
    }

    /// Kills it outright and waits for its end.
    pub fn kill(&mut self) {
        if self.try_exit().is_none() {
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: i32) {
        if self.try_exit().is_none() {
            let _ = sys::kill(self.child.id(), signal);
        }
    }

    /// Asserts that it has not ended.
    ///
    /// # Panics
    /// When it has; its log is in the message.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.try_exit() {
            panic!(
                "the backend ended with {status} (signal {:?})\n{}",
                status.signal(),
                self.log()
            );
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!(
                "{}\n--- backend log ---\n{}---",
                self.command_line,
                self.log()
            );
        }
    }
}
