use std::process::Command;

use super::*;
use crate::cli::{Invocation, load_from};
use crate::config::Host;

fn parse(args: &[&str]) -> CheckArgs {
    let args = ["virtioblkd", "check"]
        .into_iter()
        .chain(args.iter().copied());
    match load_from(args, &Host::of_this_process()).unwrap() {
        Invocation::Check(args) => args,
        other => panic!("{other:?}"),
    }
}

fn qemu(program: &str, args: &[&str]) -> (i32, Vec<u8>) {
    let output = Command::new(program).args(args).output().expect(program);
    (output.status.code().unwrap(), output.stdout)
}

fn image(dir: &tempfile::TempDir) -> String {
    let path = dir.path().join("image.qcow2").to_str().unwrap().to_owned();
    assert_eq!(
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", &path, "8M"]).0,
        0
    );
    assert_eq!(
        qemu("qemu-io", &["-f", "qcow2", "-c", "write 0 1M", &path]).0,
        0
    );
    path
}

/// Adds to the refcount of a cluster of a new image.
fn add(path: &str, cluster: usize, more: i8) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = (2 << 16) + cluster * 2 + 1;
    bytes[at] = bytes[at].wrapping_add_signed(more);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn status_and_json_are_those_of_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    for status in [Status::Clean, Status::Leaks, Status::Errors] {
        match status {
            Status::Leaks => {
                // A cluster at the end that nothing uses.
                let mut bytes = std::fs::read(&path).unwrap();
                let end = bytes.len() >> 16;
                bytes.resize((end + 1) << 16, 0);
                std::fs::write(&path, bytes).unwrap();
                add(&path, end, 1);
            }
            Status::Errors => add(&path, 6, -1),
            _ => {}
        }
        let theirs = qemu(
            "qemu-img",
            &["check", "-f", "qcow2", "--output=json", &path],
        );
        let args = parse(&[&path, "--output", "json"]);
        let done = work(&args, &mut Bar::new(false)).unwrap();
        let mut out = Vec::new();
        assert_eq!(tell(&args, &done, &mut out).unwrap(), status);
        assert_eq!(theirs.0, status as i32);
        let ours: Value = serde_json::from_slice(&out).unwrap();
        let theirs: Value = serde_json::from_slice(&theirs.1).unwrap();
        assert_eq!(ours, theirs);
        let mut text = Vec::new();
        tell(&parse(&[&path]), &done, &mut text).unwrap();
        let theirs = qemu("qemu-img", &["check", "-f", "qcow2", &path]).1;
        assert_eq!(
            String::from_utf8(text).unwrap(),
            String::from_utf8(theirs).unwrap()
        );
    }
}

#[test]
fn leaks_and_then_errors_are_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    add(&path, 5, -1);
    add(&path, 6, 1);
    assert_eq!(run(&parse(&[&path, "-r", "leaks"])), Status::Errors);
    let done = work(&parse(&[&path]), &mut Bar::new(false)).unwrap();
    assert_eq!(done.after.leaks, 0);
    assert_eq!(run(&parse(&[&path, "--repair", "all"])), Status::Clean);
    assert_eq!(qemu("qemu-img", &["check", "-f", "qcow2", &path]).0, 0);
}

#[test]
fn an_image_in_use_is_not_checked_and_one_being_read_not_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(&dir);
    let open = |read_only| {
        let direct = false;
        Storage::File(FileStorage::open(&path, FileOptions { read_only, direct }).unwrap())
    };
    let writer = open(false);
    writer.lock(Role::ImageWriter).unwrap();
    assert_eq!(run(&parse(&[&path])), Status::Failed);
    writer.unlock();
    let reader = open(true);
    reader.lock(Role::Reader).unwrap();
    assert_eq!(run(&parse(&[&path])), Status::Clean);
    assert_eq!(run(&parse(&[&path, "-r", "all"])), Status::Failed);
}

#[test]
fn what_can_not_be_checked_is_told_by_the_status() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw").to_str().unwrap().to_owned();
    std::fs::write(&path, [7; 4096]).unwrap();
    assert_eq!(run(&parse(&[&path, "-f", "raw"])), Status::Unsupported);
    assert_eq!(run(&parse(&[&path])), Status::Failed);
    assert_eq!(run(&parse(&["/nowhere/at/all"])), Status::Failed);
}
