//! The system calls that the unit allows are enough for what the daemon does.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::process::Command;

use vhost_user_frontend as frontend;

use frontend::{Daemon, Device, DeviceOptions, Segment, TempDir, qemu};

use crate::common::{SOON, until};
use crate::{PROGRAM, dist};

/// What `SystemCallFilter=` of the unit says.
fn of_the_unit() -> Vec<String> {
    let unit = std::fs::read_to_string(dist("systemd/virtioblkd@.service")).unwrap();
    let line = unit
        .lines()
        .find_map(|l| l.strip_prefix("SystemCallFilter="));
    // What systemd always allows.
    let words = line.unwrap().split(' ').chain(["@default", "execve"]);
    words.map(str::to_owned).collect()
}

/// The calls that names and sets of names stand for; `None` without systemd.
fn expanded(names: &[String]) -> Option<BTreeSet<String>> {
    let mut calls = BTreeSet::new();
    let mut todo = names.to_vec();
    while let Some(name) = todo.pop() {
        if !name.starts_with('@') {
            calls.insert(name);
            continue;
        }
        let told = Command::new("systemd-analyze")
            .args(["syscall-filter", "--no-pager", &name])
            .output()
            .ok()?;
        let text = String::from_utf8(told.stdout).unwrap();
        let inside = text.lines().filter_map(|l| l.strip_prefix("    "));
        let names = inside.filter(|l| !l.starts_with('#')).map(str::to_owned);
        let before = todo.len();
        todo.extend(names);
        assert!(todo.len() > before, "{name}: {text}");
    }
    Some(calls)
}

/// The numbers of the system calls here; none without the kernel's headers.
fn numbers() -> BTreeMap<String, u32> {
    let arch = format!(
        "/usr/include/{}-linux-gnu/asm/unistd_64.h",
        std::env::consts::ARCH
    );
    let text = std::fs::read_to_string(arch).unwrap_or_default();
    let define = |line: &str| {
        let (name, number) = line.strip_prefix("#define __NR_")?.split_once(' ')?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(define).collect()
}

/// A filter that allows `allowed`, and answers all else as the unit does (`SystemCallErrorNumber=EPERM`).
fn program(allowed: &[u32]) -> Vec<libc::sock_filter> {
    let op = |code: u32, jf, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut program = vec![op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for number in allowed {
        program.push(op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, *number));
        program.push(op(libc::BPF_RET, 0, libc::SECCOMP_RET_ALLOW));
    }
    let refused = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    program.push(op(libc::BPF_RET, 0, refused));
    program
}

fn start(filter: &[libc::sock_filter], dir: &TempDir, image: &str, args: &[&str]) -> Daemon {
    let socket = dir.join("s");
    let mut command = Command::new(PROGRAM);
    command.arg("--socket-path").arg(&socket);
    command.arg("--blk-file").arg(dir.join(image)).args(args);
    command.args(["--num-queues", "2", "--workers", "2", "--cpus", "0,1"]);
    let mut filter = filter.to_vec();
    // SAFETY: two system calls on memory that was made before the fork.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_mut_ptr(),
            };
            let mode = libc::SECCOMP_MODE_FILTER;
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    Daemon::spawn_command(&mut command, &socket, dir.path())
}

#[test]
fn system_calls_that_the_unit_allows_are_enough_and_io_uring_is_among_them() {
    let numbers = numbers();
    let Some(calls) = expanded(&of_the_unit()).filter(|_| !numbers.is_empty()) else {
        println!("skipped: no systemd-analyze, or no headers of the kernel");
        return;
    };
    let with = |keep: &dyn Fn(&str) -> bool| {
        let kept = calls.iter().filter(|name| keep(name));
        let allowed: Vec<u32> = kept.filter_map(|n| numbers.get(n).copied()).collect();
        program(&allowed)
    };
    let dir = TempDir::new();
    std::fs::write(dir.join("raw"), vec![0; 16 << 20]).unwrap();
    qemu::create(&dir.join("qcow2"), "qcow2", 16 << 20, "");
    std::fs::write(dir.join("key"), "secret").unwrap();
    let secret = format!("secret,id=k,file={}", dir.join("key").display());
    let options = "key-secret=k,iter-time=10";
    let luks = dir.join("luks");
    let luks = luks.to_str().unwrap();
    qemu::img_ok([
        "create", "-q", "-f", "luks", "--object", &secret, "-o", options, luks, "16M",
    ]);
    let key = dir.join("key");
    let key = key.to_str().unwrap();

    let images: [(&str, &[&str]); 4] = [
        ("raw", &["--format", "raw"]),
        ("raw", &["--format", "raw", "--cache", "writeback"]),
        ("qcow2", &["--format", "qcow2"]),
        ("luks", &["--format", "luks", "--key-file", key]),
    ];
    let filter = with(&|_| true);
    for (image, args) in images {
        let mut daemon = start(&filter, &dir, image, args);
        daemon.wait_listening(SOON);
        let options = DeviceOptions {
            queues: 2,
            memory_slots: true,
            ..DeviceOptions::default()
        };
        let mut device = Device::start(daemon.socket(), options).unwrap();
        for n in 0..50 {
            device.write(n * 300, &[n as u8; 4096]).unwrap();
        }
        device.flush().unwrap();
        device
            .write_zeroes(&[Segment::new(0, 600).unmap()])
            .unwrap();
        if device.features() & frontend::protocol::feature::BLK_DISCARD != 0 {
            device.discard(&[Segment::new(1200, 2048)]).unwrap();
        }
        assert_eq!(device.read(49 * 300, 4096).unwrap(), [49; 4096]);
        daemon.signal(libc::SIGHUP);
        until("it has looked at its disk", || {
            daemon.log().contains("has not changed")
        });
        device.shut_down().unwrap();
        daemon.terminate();
        let log = daemon.log();
        assert!(
            !log.contains("not permitted") && !log.contains("ERROR"),
            "{log}"
        );
        std::fs::remove_file(dir.join("daemon.log")).unwrap();
    }

    // The filter does what it says: without io_uring there is no daemon.
    let filter = with(&|name| !name.starts_with("io_uring"));
    let mut daemon = start(&filter, &dir, "raw", &[]);
    assert!(!daemon.wait_exit(SOON).success());
    assert!(daemon.log().contains("not permitted"), "{}", daemon.log());
}
