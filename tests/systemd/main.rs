//! The daemon as a service of systemd, without systemd: sockets that are passed, readiness that is told, the unit
//! files, and the descriptor for management software.

#[path = "../common/mod.rs"]
mod common;
mod filter;

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{SOON, until};
use vhost_user_frontend as frontend;

use frontend::{Client, Daemon, Device, DeviceOptions, TempDir};

const PROGRAM: &str = env!("CARGO_BIN_EXE_virtioblkd");

fn dist(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("dist")
        .join(name)
}

/// What systemd does for a service: a socket that it made, and one that it hears on.
struct Manager {
    dir: TempDir,
    socket: UnixListener,
    heard: UnixDatagram,
}

impl Manager {
    fn new() -> Self {
        let dir = TempDir::new();
        let socket = UnixListener::bind(dir.join("vm1.sock")).unwrap();
        let heard = UnixDatagram::bind(dir.join("notify")).unwrap();
        heard.set_read_timeout(Some(SOON)).unwrap();
        std::fs::write(dir.join("disk"), vec![0; 1 << 20]).unwrap();
        let file = format!(
            "[[disk]]\nname = \"root\"\nblk-file = {:?}\n",
            dir.join("disk")
        );
        std::fs::write(dir.join("vm1.toml"), file).unwrap();
        Self { dir, socket, heard }
    }

    /// Runs the command of the unit file, with its paths.
    fn start(&self) -> Daemon {
        let unit = std::fs::read_to_string(dist("systemd/virtioblkd@.service")).unwrap();
        let line = unit.lines().find_map(|l| l.strip_prefix("ExecStart="));
        let line = line
            .unwrap()
            .replace("/usr/bin/virtioblkd", PROGRAM)
            .replace("/etc/virtioblkd", self.dir.path().to_str().unwrap())
            .replace("%i", "vm1");
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("LISTEN_PID=$$ exec {line}"))
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", "vm1")
            .env("NOTIFY_SOCKET", self.dir.join("notify"));
        let fd = self.socket.as_raw_fd();
        // SAFETY: both calls may be made between fork and exec; 3 is nobody else's there. If it is 3 already, only
        // the flag that closes it has to go.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(fd, 3) != 3 || libc::fcntl(3, libc::F_SETFD, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Daemon::spawn_command(&mut command, &self.dir.join("vm1.sock"), self.dir.path())
    }

    fn hears(&self) -> String {
        let mut bytes = [0; 100];
        let len = self.heard.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    fn connect(&self) -> Device {
        Device::start(&self.dir.join("vm1.sock"), DeviceOptions::default()).unwrap()
    }
}

#[test]
fn service_is_ready_reloads_stops_and_leaves_its_socket_to_the_next() {
    let manager = Manager::new();
    let mut daemon = manager.start();
    assert_eq!(manager.hears(), "READY=1");
    let mut device = manager.connect();
    device.write(0, &[7; 512]).unwrap();

    // ExecReload.
    let file = std::fs::File::options()
        .write(true)
        .open(manager.dir.join("disk"));
    file.unwrap().set_len(2 << 20).unwrap();
    daemon.signal(libc::SIGHUP);
    until("the size is noticed", || {
        device.read_config().unwrap().capacity == 4096
    });

    daemon.terminate();
    assert_eq!(manager.hears(), "STOPPING=1");
    assert!(manager.dir.join("vm1.sock").exists(), "systemd's to remove");
    drop(device);

    // A VMM that comes while nobody serves waits for the next one.
    let early = Client::connect(&manager.dir.join("vm1.sock")).unwrap();
    let mut daemon = manager.start();
    assert_eq!(manager.hears(), "READY=1");
    assert_ne!(early.get_features().unwrap(), 0);
    drop(early);
    let mut device = manager.connect();
    assert_eq!(device.capacity(), 2 << 20);
    assert_eq!(device.read(0, 512).unwrap(), [7; 512]);

    // Restart=on-failure: as after a crash.
    daemon.kill();
    drop(device);
    let _daemon = manager.start();
    assert_eq!(manager.hears(), "READY=1");
    assert_eq!(manager.connect().read(0, 512).unwrap(), [7; 512]);
}

#[test]
fn service_that_cannot_start_is_never_ready() {
    let manager = Manager::new();
    std::fs::remove_file(manager.dir.join("disk")).unwrap();
    let mut daemon = manager.start();
    assert!(!daemon.wait_exit(SOON).success());
    manager.heard.set_nonblocking(true).unwrap();
    assert!(manager.heard.recv(&mut [0; 100]).is_err());
}

#[test]
fn service_manager_that_is_gone_keeps_nobody_from_starting() {
    let manager = Manager::new();
    std::fs::remove_file(manager.dir.join("notify")).unwrap();
    let mut daemon = manager.start();
    until("it says so", || daemon.log().contains("service manager"));
    drop(manager.connect());
    daemon.terminate();
}

#[test]
fn units_are_in_order_for_systemd() {
    let dir = TempDir::new();
    let names = ["virtioblkd@.service", "virtioblkd@.socket"];
    for name in names {
        let text = std::fs::read_to_string(dist("systemd").join(name)).unwrap();
        // The program has to be where the unit says it is.
        let text = text.replace("/usr/bin/virtioblkd", PROGRAM);
        std::fs::write(dir.join(name), text).unwrap();
    }
    let verify = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(names.map(|name| dir.join(name)))
        .output();
    match verify {
        Ok(told) => {
            let said = String::from_utf8_lossy(&told.stderr).into_owned();
            let ours: Vec<&str> = said.lines().filter(|l| l.contains("virtioblkd")).collect();
            assert!(told.status.success() && ours.is_empty(), "{said}");
        }
        Err(error) => println!("skipped: systemd-analyze: {error}"),
    }
}

#[test]
fn units_name_files_of_one_instance_and_sandbox_what_they_run() {
    let service = std::fs::read_to_string(dist("systemd/virtioblkd@.service")).unwrap();
    let socket = std::fs::read_to_string(dist("systemd/virtioblkd@.socket")).unwrap();
    for line in [
        "Type=notify",
        "Requires=virtioblkd@%i.socket",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "Restart=on-failure",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "RestrictAddressFamilies=AF_UNIX",
        "MemoryDenyWriteExecute=yes",
    ] {
        assert!(service.lines().any(|l| l == line), "{line}");
    }
    assert!(socket.contains("ListenStream=/run/virtioblkd/%i.sock"));
    let descriptor = std::fs::read_to_string(dist("50-virtioblkd.json")).unwrap();
    assert!(
        descriptor.contains("\"/usr/bin/virtioblkd\"") && service.contains("=/usr/bin/virtioblkd")
    );
}

#[test]
fn descriptor_for_management_software_is_what_the_program_prints() {
    let text = std::fs::read_to_string(dist("50-virtioblkd.json")).unwrap();
    let descriptor: serde_json::Value = serde_json::from_str(&text).unwrap();
    // A VhostUserBackend of QEMU's docs/interop/vhost-user.json, which has no other keys than these and tags.
    let keys: Vec<&str> = descriptor
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(keys, ["binary", "description", "type"]);
    let printed = Command::new(PROGRAM)
        .arg("--print-capabilities")
        .output()
        .unwrap();
    assert!(printed.status.success() && printed.stderr.is_empty());
    let printed: serde_json::Value = serde_json::from_slice(&printed.stdout).unwrap();
    assert_eq!(printed["type"], descriptor["type"]);
    // Each feature is an option of that name, which the program has.
    let help = Command::new(PROGRAM).arg("--help").output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let features = printed["features"].as_array().unwrap();
    assert_eq!(features.len(), 2);
    for feature in features {
        let option = format!("--{}", feature.as_str().unwrap());
        assert!(help.contains(&option), "{option}");
    }
}
