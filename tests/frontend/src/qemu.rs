//! `qemu-img`, the oracle for images.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Runs `qemu-img`; returns its output whatever its exit code.
///
/// # Panics
/// When it is not installed.
pub fn img<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::new("qemu-img");
    command.args(args);
    command
        .output()
        .unwrap_or_else(|e| panic!("cannot run {command:?} (install qemu-utils): {e}"))
}

/// What it said, without the thousands of lines that name each leaked cluster.
fn text(output: &Output) -> String {
    let all = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    let lines = all.iter().flat_map(|said| said.lines());
    lines
        .filter(|line| !line.starts_with("Leaked cluster "))
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// Runs `qemu-img` and returns its standard output.
///
/// # Panics
/// When it fails; its output is in the message.
pub fn img_ok<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> String {
    let args: Vec<_> = args.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let output = img(&args);
    assert!(
        output.status.success(),
        "qemu-img {args:?} failed with {}:\n{}",
        output.status,
        text(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Creates an image; `options` as for `-o`, empty for none.
///
/// # Panics
/// When it cannot be made.
pub fn create(path: &Path, format: &str, size: u64, options: &str) {
    let mut args = vec![
        OsStr::new("create"),
        "-q".as_ref(),
        "-f".as_ref(),
        format.as_ref(),
    ];
    if !options.is_empty() {
        args.extend([OsStr::new("-o"), options.as_ref()]);
    }
    let size = size.to_string();
    args.extend([path.as_os_str(), size.as_ref()]);
    img_ok(args);
}

/// Creates an overlay of `backing`.
///
/// # Panics
/// When it cannot be made.
pub fn create_overlay(path: &Path, size: u64, backing: &Path, backing_format: &str, options: &str) {
    let mut all = format!(
        "backing_file={},backing_fmt={backing_format}",
        backing.display()
    );
    if !options.is_empty() {
        all = format!("{all},{options}");
    }
    create(path, "qcow2", size, &all);
}

/// Asserts that `qemu-img check` finds neither errors nor leaks.
///
/// # Panics
/// When it finds any; its output is in the message.
pub fn check_clean(path: &Path) {
    let output = img([
        OsStr::new("check"),
        "-f".as_ref(),
        "qcow2".as_ref(),
        path.as_os_str(),
    ]);
    assert!(
        output.status.code() == Some(0),
        "qemu-img check {} ended with {}:\n{}",
        path.display(),
        output.status,
        text(&output)
    );
}

/// Asserts that `qemu-img check` finds no errors; leaked clusters are allowed (after a crash).
///
/// # Panics
/// When it finds any; its output is in the message.
pub fn check_no_corruption(path: &Path) {
    let output = img([
        OsStr::new("check"),
        "-f".as_ref(),
        "qcow2".as_ref(),
        path.as_os_str(),
    ]);
    // Exit code 3: leaks and nothing else.
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "qemu-img check {} ended with {}:\n{}",
        path.display(),
        output.status,
        text(&output)
    );
}

/// Waits until nobody holds a lock on an image. The kernel lets go of the files of a killed process that used
/// io_uring a little after its end.
///
/// # Panics
/// When it is still locked after a minute.
pub fn wait_unlocked(path: &Path, format: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let output = img([
            OsStr::new("info"),
            "-f".as_ref(),
            format.as_ref(),
            path.as_os_str(),
        ]);
        let said = text(&output);
        if output.status.success() || !said.contains("lock") {
            return;
        }
        assert!(Instant::now() < deadline, "{}: {said}", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Asserts that two images have the same contents (a longer one must be zero past the end of the other).
///
/// # Panics
/// When they differ; the place is in the message.
pub fn assert_equal(a: &Path, a_format: &str, b: &Path, b_format: &str) {
    let output = img([
        OsStr::new("compare"),
        "-f".as_ref(),
        a_format.as_ref(),
        "-F".as_ref(),
        b_format.as_ref(),
        a.as_os_str(),
        b.as_os_str(),
    ]);
    assert!(
        output.status.success(),
        "{} and {} differ:\n{}",
        a.display(),
        b.display(),
        text(&output)
    );
}

/// `qemu-img info --output=json`.
///
/// # Panics
/// When it fails.
pub fn info_json(path: &Path, format: &str) -> String {
    img_ok([
        OsStr::new("info"),
        "-U".as_ref(),
        "--output=json".as_ref(),
        "-f".as_ref(),
        format.as_ref(),
        path.as_os_str(),
    ])
}
