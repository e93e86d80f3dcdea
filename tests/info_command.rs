//! `virtioblkd info` as a process: what goes where, and the exit status.

use std::path::Path;
use std::process::{Command, Output};

fn virtioblkd(dir: &Path, args: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_virtioblkd");
    let output = Command::new(program).args(args).current_dir(dir).output();
    output.expect("the program")
}

#[test]
fn info_tells_on_stdout_and_fails_on_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let create = ["create", "-q", "-f", "qcow2", "a", "1M"];
    let made = Command::new("qemu-img")
        .args(create)
        .current_dir(dir.path())
        .status();
    assert!(made.expect("this test needs qemu-utils").success());
    let told = virtioblkd(dir.path(), &["info", "-f", "qcow2", "a"]);
    assert!(told.status.success() && told.stderr.is_empty(), "{told:?}");
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(text.starts_with("image: a\nfile format: qcow2\n"), "{text}");

    let told = virtioblkd(dir.path(), &["info", "a", "--output", "json"]);
    assert!(told.status.success());
    let warning = String::from_utf8(told.stderr).unwrap();
    assert!(warning.contains("--format qcow2"), "{warning}");
    let json: serde_json::Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(json["format"], "raw");

    let told = virtioblkd(dir.path(), &["info", "nowhere"]);
    assert_eq!(told.status.code(), Some(1));
    assert!(told.stdout.is_empty() && !told.stderr.is_empty());
    // Without a subcommand it is the daemon, as ever.
    let told = virtioblkd(dir.path(), &["--blk-file", "a", "--format", "qcow2"]);
    assert_eq!(told.status.code(), Some(2), "no socket: {told:?}");
}
