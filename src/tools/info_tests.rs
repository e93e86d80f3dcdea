use std::process::Command;

use super::*;
use crate::cli::{Invocation, load_from};
use crate::config::Host;

fn parse(args: &[&str]) -> InfoArgs {
    let args = ["virtioblkd", "info"].iter().chain(args);
    match load_from(args, &Host::of_this_process()).unwrap() {
        Invocation::Info(args) => args,
        other => panic!("{other:?}"),
    }
}

fn qemu(dir: &Path, line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .current_dir(dir)
        .output();
    let output = output.expect("this test needs qemu-utils");
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn told(args: &[&str]) -> Value {
    let args = parse(args);
    let images = gather(&args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
    serde_json::from_str(&show(&args, &images)).expect("json")
}

/// What both tell under the same key must be the same. Lists of the same length.
fn agree(ours: &Value, theirs: &Value, at: &str) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, ours) in ours {
                if let Some(theirs) = theirs.get(key) {
                    agree(ours, theirs, &format!("{at}.{key}"));
                }
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            assert_eq!(ours.len(), theirs.len(), "{at}");
            for (ours, theirs) in ours.iter().zip(theirs) {
                agree(ours, theirs, at);
            }
        }
        _ => assert_eq!(ours, theirs, "{at}"),
    }
}

#[test]
fn json_agrees_with_qemu_img_wherever_both_tell() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let create = "qemu-img create -q -f qcow2";
    for (name, line) in [
        ("plain", format!("{create} plain 1M")),
        (
            "old",
            format!("{create} -o compat=0.10,cluster_size=4k old 3M"),
        ),
        (
            "narrow",
            format!("{create} -o refcount_bits=1,lazy_refcounts=on narrow 1M"),
        ),
        (
            "zstd",
            format!("{create} -o compression_type=zstd,extended_l2=on zstd 1M"),
        ),
        (
            "data",
            format!("{create} -o data_file=d.raw,data_file_raw=on data 1M"),
        ),
        ("over", format!("{create} -b plain -F qcow2 over 2M")),
        (
            "luks",
            format!(
                "{create} --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks 1M"
            ),
        ),
    ] {
        qemu(dir.path(), &line);
        if !["data", "luks"].contains(&name) && name != "narrow" {
            qemu(dir.path(), &format!("qemu-img snapshot -c first {name}"));
            qemu(dir.path(), &format!("qemu-img snapshot -c second {name}"));
        }
        let path = at(name);
        let ours = told(&["-f", "qcow2", "--output", "json", &path]);
        let theirs = qemu(
            dir.path(),
            &format!("qemu-img info -f qcow2 --output json {path}"),
        );
        let theirs: Value = serde_json::from_str(&theirs).unwrap();
        agree(&ours, &theirs, name);
        // Nothing that both could tell is left out.
        for (part, key) in [
            ("/format-specific/data", "refcount-bits"),
            ("", "virtual-size"),
        ] {
            assert!(
                ours.pointer(part).is_some_and(|v| v.get(key).is_some()),
                "{name} {key}"
            );
        }
        for key in [
            "snapshots",
            "backing-filename",
            "backing-filename-format",
            "encrypted",
        ] {
            assert_eq!(
                ours.get(key).is_some(),
                theirs.get(key).is_some(),
                "{name} {key}"
            );
        }
        let data = |value: &Value, key: &str| value["format-specific"]["data"].get(key).is_some();
        for key in [
            "data-file",
            "data-file-raw",
            "encrypt",
            "extended-l2",
            "corrupt",
        ] {
            assert_eq!(data(&ours, key), data(&theirs, key), "{name} {key}");
        }
    }
}

#[test]
fn features_are_told_by_name_and_unknown_ones_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let line = "qemu-img create -q -f qcow2 -o lazy_refcounts=on,extended_l2=on a 1M";
    qemu(dir.path(), line);
    qemu(dir.path(), "qemu-img bitmap --add a one");
    qemu(dir.path(), "qemu-img bitmap --add a two");
    let path = dir.path().join("a");
    let mut bytes = std::fs::read(&path).unwrap();
    (bytes[79], bytes[80], bytes[88]) = (bytes[79] | 2, 0x80, 0x40);
    std::fs::write(&path, bytes).unwrap();
    let path = path.display().to_string();
    let data = &told(&["--format", "qcow2", "--output", "json", &path])["format-specific"]["data"];
    assert_eq!(
        data["incompatible-features"],
        json!(["corrupt bit", "extended L2 entries"])
    );
    assert_eq!(
        data["compatible-features"],
        json!(["lazy refcounts", "bit 63"])
    );
    assert_eq!(data["autoclear-features"], json!(["bitmaps", "bit 62"]));
    assert_eq!(data["corrupt"], true);
    assert_eq!(data["bitmap-count"], 2);
    let args = parse(&["--format", "qcow2", &path]);
    let text = show(&args, &gather(&args).unwrap());
    for line in [
        "file format: qcow2",
        "virtual size: 1 MiB (1048576 bytes)",
        "cluster size: 64 KiB (65536 bytes)",
        "version: 3",
        "incompatible features: corrupt bit, extended L2 entries",
        "encryption: none",
        "compression type: zlib",
        "refcount bits: 16",
        "internal snapshots: 0",
        "persistent bitmaps: 2",
    ] {
        assert!(text.lines().any(|l| l == line), "{line}: {text}");
    }
}

#[test]
fn the_format_is_not_guessed() {
    let dir = tempfile::tempdir().unwrap();
    qemu(dir.path(), "qemu-img create -q -f qcow2 a 1M");
    let path = dir.path().join("a").display().to_string();
    let value = told(&["--output", "json", &path]);
    assert_eq!(value["format"], "raw");
    assert_ne!(value["virtual-size"], 1 << 20);
    std::fs::write(dir.path().join("b"), [7; 5000]).unwrap();
    let path = dir.path().join("b").display().to_string();
    assert_eq!(told(&["--output", "json", &path])["virtual-size"], 5000);
    let error = gather(&parse(&["-f", "qcow2", &path])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
}

#[test]
fn a_chain_is_followed_where_the_user_allows() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("bases")).unwrap();
    qemu(dir.path(), "qemu-img create -q -f raw bases/base 1M");
    qemu(
        dir.path(),
        "qemu-img create -q -f qcow2 -b base -F raw bases/middle 1M",
    );
    std::fs::create_dir(dir.path().join("tops")).unwrap();
    qemu(
        dir.path(),
        "qemu-img create -q -f qcow2 -b ../bases/middle -F qcow2 tops/top 1M",
    );
    let top = dir.path().join("tops/top").display().to_string();
    let args = ["-f", "qcow2", "--output", "json", "--backing-chain", &top];
    let error = gather(&parse(&args)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAllowed, "{error}");
    let bases = dir.path().join("bases").display().to_string();
    let args = [&args[..], &["--allow-path", &bases]].concat();
    let chain = told(&args);
    let formats: Vec<&str> = chain
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|image| image["format"].as_str())
        .collect();
    assert_eq!(formats, ["qcow2", "qcow2", "raw"]);
    // A loop ends.
    qemu(
        dir.path(),
        "qemu-img rebase -u -F qcow2 -b middle bases/middle",
    );
    let error = gather(&parse(&args)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn an_image_that_somebody_writes_to_is_looked_at_only_if_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    qemu(dir.path(), "qemu-img create -q -f qcow2 a 1M");
    let path = dir.path().join("a");
    let options = FileOptions {
        read_only: false,
        direct: false,
    };
    let writer = Storage::File(FileStorage::open(&path, options).unwrap());
    writer.lock(Role::ImageWriter).unwrap();
    let path = path.display().to_string();
    let error = gather(&parse(&["-f", "qcow2", &path])).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("--force-share"), "{error}");
    assert!(gather(&parse(&["-f", "qcow2", "-U", &path])).is_ok());
}

#[test]
fn options_of_the_daemon_and_subcommands_do_not_mix() {
    let host = Host::of_this_process();
    for args in [
        &["virtioblkd", "--read-only", "info", "a"][..],
        &["virtioblkd", "info"],
        &["virtioblkd", "info", "--format", "guess", "a"],
        &["virtioblkd", "info", "--allow-path", "/", "a"],
    ] {
        assert!(load_from(args, &host).is_err(), "{args:?}");
    }
}

#[test]
fn a_remote_backing_file_is_told_by_its_name_and_not_connected() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody listens there.
    let uri = "nvme+tcp://127.0.0.1:1/nqn.a?nsid=1";
    qemu(
        dir.path(),
        &format!("qemu-img create -q -u -f qcow2 -F raw -b {uri} top 1M"),
    );
    let top = dir.path().join("top").display().to_string();
    for more in [&[][..], &["--backing-chain"]] {
        let args = [&["-f", "qcow2", "--output", "json", &top], more].concat();
        let told = told(&args);
        let image = told.get(0).unwrap_or(&told);
        assert_eq!(image["backing-filename"], uri);
        assert_eq!(image["backing-filename-format"], "raw");
        assert_eq!(image["full-backing-filename"], uri);
    }
    let text = parse(&["-f", "qcow2", "--backing-chain", &top]);
    let text = show(&text, &gather(&text).unwrap());
    assert!(text.contains(&format!("backing file: {uri}\n")), "{text}");
}
