//! A remote disk with secrets, from the daemon's command line to the target: authenticated both ways, through TLS.
//! None of the secrets is to be seen anywhere.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nvme_target::{AuthOptions, NamespaceSpec, PortSpec, SubsystemSpec, Target, TlsOptions};
use vhost_user_frontend::{Daemon, Device, DeviceOptions, Disk, TempDir};

mod common;

use common::{program, until};

const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:01234567-89ab-cdef-0011-223344556677";
const HOST_ID: &str = "01234567-89ab-cdef-0011-223344556677";

/// A key, and its text.
struct Secret {
    bytes: Vec<u8>,
    text: String,
}

impl Secret {
    fn new(form: &str, seed: u64, len: usize) -> Self {
        let mut bytes = vec![0; len];
        vhost_user_frontend::guest::Random::new(seed).fill(&mut bytes);
        let mut crc = flate2::Crc::new();
        crc.update(&bytes);
        let whole = [&bytes[..], &crc.sum().to_le_bytes()].concat();
        let text = format!("{form}:{}:", openssl::base64::encode_block(&whole));
        Self { bytes, text }
    }

    /// What would give it away: any six bytes of it in a row, in any way that bytes are written.
    fn is_in(&self, log: &str) -> bool {
        let base64 = self.text.rsplit(':').nth(1).unwrap();
        let join = |bytes: &[u8], between: &str, one: fn(&u8) -> String| {
            bytes.iter().map(one).collect::<Vec<_>>().join(between)
        };
        let mut words: Vec<String> = base64
            .as_bytes()
            .windows(8)
            .map(|part| String::from_utf8_lossy(part).into_owned())
            .collect();
        for part in self.bytes.windows(6) {
            for between in ["", " ", ":", ", "] {
                words.push(join(part, between, |byte| format!("{byte:02x}")));
                words.push(join(part, between, |byte| format!("{byte:02X}")));
            }
            words.push(join(part, ", ", |byte| format!("{byte:#x}")));
            for between in [" ", ",", ", ", ",\n    "] {
                words.push(join(part, between, |byte| byte.to_string()));
            }
        }
        words.iter().any(|word| log.contains(word))
    }
}

/// The host's, the controller's, and the key for TLS.
fn secrets() -> [Secret; 3] {
    [
        Secret::new("DHHC-1:01", 1, 32),
        Secret::new("DHHC-1:00", 2, 48),
        Secret::new("NVMeTLSkey-1:01", 3, 32),
    ]
}

const OPTIONS: [&str; 3] = [
    "--nvme-dhchap-secret",
    "--nvme-dhchap-ctrl-secret",
    "--nvme-tls-key",
];

fn target([host, controller, tls]: &[Secret; 3]) -> Target {
    let auth = AuthOptions {
        controller_secret: Some(controller.text.clone()),
        ..AuthOptions::new(&host.text)
    };
    let subsystem = SubsystemSpec::new(nvme_target::DEFAULT_NQN)
        .namespace(NamespaceSpec::new(1, 8 << 20))
        .with(|controller| controller.auth = Some(auth));
    let port = PortSpec::loopback().with(|port| port.tls = Some(TlsOptions::new(&tls.text)));
    let target = Target::builder().subsystem(subsystem).port(port);
    target.start().unwrap()
}

/// The target as a disk, with the secrets at these places.
fn disk(target: &Target, places: [String; 3]) -> Disk {
    let nqn = nvme_target::DEFAULT_NQN;
    let uri = format!("nvme+tcp://{}/{nqn}?nsid=1", target.address());
    let options = OPTIONS.iter().zip(places);
    Disk::new(uri, "raw")
        .args(["--nvme-host-nqn", HOST, "--nvme-host-id", HOST_ID])
        .args(options.flat_map(|(option, place)| [(*option).to_owned(), place]))
        .env("RUST_LOG", "trace")
}

fn write_private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// Uses the disk, before and behind a loss of its connections.
fn use_it(device: &mut Device, target: &Target, byte: u8) {
    let namespace = target.subsystem(0).namespace(1).unwrap();
    for (sector, byte) in [(8, byte), (4096, byte + 1)] {
        device.write(sector, &[byte; 65_536]).unwrap();
        assert_eq!(device.read(sector, 65_536).unwrap(), [byte; 65_536]);
        assert_eq!(namespace.read(sector * 512, 65_536), [byte; 65_536]);
        target.drop_connections();
    }
    assert_eq!(device.read(8, 65_536).unwrap(), [byte; 65_536]);
    assert_eq!(target.violations(), Vec::<String>::new());
}

/// No secret is in what the daemon has said, nor in what anybody may see of the process.
fn nothing_is_to_be_seen(secrets: &[Secret; 3], log: &str, pid: u32) {
    // It was asked to say all, and has.
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "{log}");
    assert!(log.contains("connected: controller"), "{log}");
    let process = |what: &str| fs::read(format!("/proc/{pid}/{what}")).unwrap();
    let shown = ["cmdline", "environ", "comm"].map(process).concat();
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("--nvme-tls-key"));
    for (secret, option) in secrets.iter().zip(OPTIONS) {
        assert!(!secret.is_in(log), "{option} is in the log");
        assert!(!secret.is_in(&shown), "{option} is in /proc");
    }
}

#[test]
fn a_secret_would_be_found() {
    let [host, ..] = secrets();
    assert!(host.is_in(&format!("{:?}", host.bytes)));
    assert!(host.is_in(&format!("{:#?}", host.bytes)));
    assert!(host.is_in(&format!("{:02x?}", host.bytes)));
    assert!(host.is_in(&host.text));
    assert!(!host.is_in("DHHC-1:01:"));
}

#[test]
fn a_disk_is_authenticated_and_secured_with_secrets_from_files() {
    let secrets = secrets();
    let target = target(&secrets);
    let dir = TempDir::new();
    let places = [0, 1, 2].map(|n| {
        let path = dir.join(format!("secret{n}"));
        write_private(&path, &format!("{}\n", secrets[n].text));
        format!("file:{}", path.display())
    });
    let mut daemon = Daemon::start(&program(), &disk(&target, places), dir.path());
    let mut device = Device::start(daemon.socket(), DeviceOptions::default()).unwrap();
    use_it(&mut device, &target, 1);
    nothing_is_to_be_seen(&secrets, &daemon.log(), daemon.pid());
    device.shut_down().unwrap();
    daemon.terminate();
    assert!(!daemon.log().contains("can be read by others"));
}

#[test]
fn a_wrong_secret_is_told_without_it() {
    let secrets = secrets();
    let target = target(&secrets);
    let others = [
        Secret::new("DHHC-1:01", 7, 32),
        Secret::new("DHHC-1:00", 8, 48),
        Secret::new("NVMeTLSkey-1:01", 9, 32),
    ];
    let said = [
        "the controller refused the authentication",
        "does not know the subsystem's secret",
        "refused the pre-shared key",
    ];
    for (wrong, said) in said.iter().enumerate() {
        let dir = TempDir::new();
        let places = [0, 1, 2].map(|n| {
            let path = dir.join(format!("secret{n}"));
            let given = if n == wrong { &others } else { &secrets };
            write_private(&path, &given[n].text);
            format!("file:{}", path.display())
        });
        let disk = disk(&target, places);
        let mut daemon = Daemon::spawn(&program(), &disk, dir.path());
        let status = daemon.wait_exit(common::SOON);
        let log = daemon.log();
        assert!(!status.success(), "{log}");
        assert!(log.contains(said), "{log}");
        for secret in secrets.iter().chain(&others) {
            assert!(!secret.is_in(&log), "{log}");
        }
    }
}

/// A process that has taken over, which is nobody's child.
struct Successor(u32);

impl Successor {
    fn lives(&self) -> bool {
        // SAFETY: signal 0 sends nothing.
        unsafe { libc::kill(self.0 as i32, 0) == 0 }
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        // SAFETY: kill takes plain integers.
        unsafe { libc::kill(self.0 as i32, libc::SIGKILL) };
    }
}

#[test]
fn secrets_from_descriptors_are_handed_on_in_an_upgrade() {
    let secrets = secrets();
    let target = target(&secrets);
    let dir = TempDir::new();
    for (n, secret) in secrets.iter().enumerate() {
        write_private(&dir.join(format!("secret{n}")), &secret.text);
    }
    // Descriptors that can be read once, of files that are gone.
    let start = dir.join("start");
    let here = dir.path().display();
    let script = format!(
        "#!/bin/sh\nexport VIRTIOBLKD_UPGRADE_BINARY={0}\n\
         exec 7<{here}/secret0 8<{here}/secret1 9<{here}/secret2\n\
         rm {here}/secret?\nexec {0} \"$@\"\n",
        env!("CARGO_BIN_EXE_virtioblkd"),
    );
    fs::write(&start, script).unwrap();
    let uri_and_more = disk(&target, [7, 8, 9].map(|fd| format!("fd:{fd}")));
    let pid_file = dir.join("pid");
    let mut command = Command::new("/bin/sh");
    command.arg(&start);
    command.arg("--blk-file").arg(&uri_and_more.image);
    command.args(["--format", "raw", "--socket-path"]);
    command.arg(dir.join("s")).args(&uri_and_more.extra);
    command.arg("--pid-file").arg(&pid_file);
    command.env("RUST_LOG", "trace");
    let mut first = Daemon::spawn_command(&mut command, &dir.join("s"), dir.path());
    first.wait_listening(common::SOON);
    let mut device = Device::start(first.socket(), DeviceOptions::default()).unwrap();
    use_it(&mut device, &target, 1);
    nothing_is_to_be_seen(&secrets, &first.log(), first.pid());
    let mut pid = first.pid();
    let mut successor: Option<Successor> = None;
    for byte in [3, 5] {
        // SAFETY: kill takes plain integers.
        unsafe { libc::kill(pid as i32, libc::SIGUSR2) };
        let named = || fs::read_to_string(&pid_file).ok()?.trim().parse().ok();
        until("another process has taken over", || {
            named().is_some_and(|other: u32| other != pid)
        });
        pid = named().unwrap();
        let before = successor.replace(Successor(pid));
        until("the one before has ended", || match &before {
            Some(before) => !before.lives(),
            None => first.try_exit().is_some(),
        });
        std::mem::forget(before);
        use_it(&mut device, &target, byte);
        nothing_is_to_be_seen(&secrets, &first.log(), pid);
    }
    assert_eq!(first.log().matches("upgraded: the disks").count(), 2);
    device.shut_down().unwrap();
}

/// A key of the session, for as long as the value is there; none where the kernel gives none.
struct Kept(i64);

impl Kept {
    fn new(name: &str, text: &str) -> Option<Self> {
        let name = std::ffi::CString::new(name).unwrap();
        // SAFETY: both strings end in NUL, and the payload has as many bytes as are told.
        let serial = unsafe {
            libc::syscall(
                libc::SYS_add_key,
                c"user".as_ptr(),
                name.as_ptr(),
                text.as_ptr(),
                text.len(),
                libc::KEY_SPEC_SESSION_KEYRING as libc::c_long,
            )
        };
        (serial > 0).then_some(Self(serial))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // SAFETY: integers only.
        unsafe {
            libc::syscall(
                libc::SYS_keyctl,
                libc::KEYCTL_REVOKE as libc::c_long,
                self.0,
            )
        };
    }
}

#[test]
fn secrets_may_be_in_the_kernels_keyring() {
    let secrets = secrets();
    let target = target(&secrets);
    let dir = TempDir::new();
    let name = |n: usize| format!("virtioblkd-test-{}-{n}", std::process::id());
    let kept: Vec<_> = (0..3)
        .filter_map(|n| Kept::new(&name(n), &secrets[n].text))
        .collect();
    if kept.len() < 3 {
        eprintln!("skipped: {}", std::io::Error::last_os_error());
        return;
    }
    let places = [0, 1, 2].map(|n| format!("keyring:{}", name(n)));
    let daemon = Daemon::start(&program(), &disk(&target, places), dir.path());
    let mut device = Device::start(daemon.socket(), DeviceOptions::default()).unwrap();
    use_it(&mut device, &target, 1);
    nothing_is_to_be_seen(&secrets, &daemon.log(), daemon.pid());
    device.shut_down().unwrap();
}
