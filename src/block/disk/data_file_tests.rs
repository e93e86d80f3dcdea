//! External data files as disks have them: which may be opened, and who is kept out.

use super::super::tests::pattern;
use super::tests::Folder;
use super::*;

fn create(f: &Folder, name: &str, options: &str, size: &str) {
    f.tool(&[
        "qemu-img", "create", "-q", "-f", "qcow2", "-o", options, name, size,
    ]);
}

/// The image's header with another data file's name in it, of the same length.
fn rename(f: &Folder, image: &str, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(f.at(image)).unwrap();
    let found = bytes.windows(from.len()).position(|w| w == from.as_bytes());
    let at = found.unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    f.put(image, &bytes);
}

#[test]
fn what_is_written_is_in_the_data_file_and_qemu_reads_it() {
    for kind in ["off", "on"] {
        let f = Folder::new();
        create(
            &f,
            "a.qcow2",
            &format!("data_file=d.raw,data_file_raw={kind}"),
            "2M",
        );
        let disk = f.open_qcow2("a.qcow2").unwrap();
        assert!(
            disk.describe().contains("with data in"),
            "{}",
            disk.describe()
        );
        let mut model = vec![0; 2 << 20];
        for round in 0..3u64 {
            let active = f.activate(&disk).unwrap();
            let at = 60_416 + round as usize * 300_032;
            let data = pattern(100_352, round);
            f.write(&active, at as u64, &data).unwrap();
            model[at..at + data.len()].copy_from_slice(&data);
            f.io.block_on(active.write_zeroes(&f.io, at as u64 + 512, 66_048, true))
                .unwrap();
            model[at + 512..at + 66_560].fill(0);
            assert!(f.read(&active, 0, 2 << 20).unwrap() == model);
            f.deactivate(active).unwrap();
            if kind == "on" {
                assert!(std::fs::read(f.at("d.raw")).unwrap() == model, "{round}");
            }
            f.tool(&["qemu-img", "check", "-q", "a.qcow2"]);
            assert!(f.by_qemu("a.qcow2") == model, "{kind} {round}");
        }
    }
}

#[test]
fn a_data_file_below_is_read() {
    let f = Folder::new();
    create(&f, "base.qcow2", "data_file=d.raw", "1M");
    f.tool(&["qemu-io", "-c", "write -P 5 0 300k", "base.qcow2"]);
    f.tool(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    let disk = f.open_qcow2("top.qcow2").unwrap();
    let active = f.activate(&disk).unwrap();
    f.write(&active, 512, &[6; 512]).unwrap();
    f.deactivate(active).unwrap();
    let got = f.contents("top.qcow2", Format::Qcow2);
    assert!(got == f.by_qemu("top.qcow2"));
    assert_eq!((got[0], got[512], got[307_199], got[307_200]), (5, 6, 5, 0));
}

#[test]
fn data_files_are_opened_only_where_the_user_allows_or_has_named_them() {
    let f = Folder::new();
    for folder in ["vm", "store"] {
        std::fs::create_dir(f.at(folder)).unwrap();
    }
    let far = f.at("store/d.raw").to_str().unwrap().to_owned();
    create(&f, "vm/a.qcow2", &format!("data_file={far}"), "1M");
    let refused = f.open_qcow2("vm/a.qcow2").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotAllowed);
    assert!(refused.to_string().contains("allow-path="), "{refused}");
    let mut spec = f.spec("vm/a.qcow2", Format::Qcow2);
    spec.allow_paths = vec![f.at("store")];
    f.open(&spec).unwrap();
    // Named by the user it may be anywhere.
    spec.allow_paths.clear();
    spec.data_file = Some(f.at("store/d.raw"));
    let active = f.activate(&f.open(&spec).unwrap()).unwrap();
    f.write(&active, 0, &[3; 512]).unwrap();
    f.deactivate(active).unwrap();
    assert_eq!(std::fs::read(&far).unwrap()[..512], [3; 512]);
    // Through a link it is where the link leads.
    std::os::unix::fs::symlink(&far, f.at("vm/link")).unwrap();
    create(&f, "vm/b.qcow2", "data_file=vm/here", "1M");
    rename(&f, "vm/b.qcow2", "vm/here", "./link\0");
    let refused = f.open_qcow2("vm/b.qcow2").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotAllowed);
    // An image without a data file takes none.
    create(&f, "vm/c.qcow2", "cluster_size=64k", "1M");
    let mut spec = f.spec("vm/c.qcow2", Format::Qcow2);
    spec.data_file = Some(f.at("store/d.raw"));
    assert_eq!(f.open(&spec).unwrap_err().kind(), ErrorKind::InvalidImage);
}

#[test]
fn a_data_file_that_is_missing_or_an_image_of_the_disk_is_refused() {
    let f = Folder::new();
    create(&f, "a.qcow2", "data_file=d.raw", "1M");
    std::fs::remove_file(f.at("d.raw")).unwrap();
    let error = f.open_qcow2("a.qcow2").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("data-file=PATH"), "{error}");
    // Itself, the base, and the data file of another layer.
    std::os::unix::fs::symlink("a.qcow2", f.at("d.raw")).unwrap();
    let error = f.open_qcow2("a.qcow2").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert!(
        error.to_string().contains("an image of the disk already"),
        "{error}"
    );
    std::fs::remove_file(f.at("d.raw")).unwrap();
    create(&f, "top.qcow2", "data_file=d.raw", "1M");
    f.tool(&[
        "qemu-img",
        "rebase",
        "-u",
        "-b",
        "a.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    let error = f.open_qcow2("top.qcow2").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    f.tool(&[
        "qemu-img",
        "rebase",
        "-u",
        "-b",
        "d.raw",
        "-F",
        "raw",
        "top.qcow2",
    ]);
    let error = f.open_qcow2("top.qcow2").unwrap_err();
    assert!(
        error.to_string().contains("a loop of backing files"),
        "{error}"
    );
    // A name that is none, and names of protocols.
    rename(&f, "a.qcow2", "d.raw", "\0\0\0\0\0");
    let error = f.open_qcow2("a.qcow2").unwrap_err();
    assert!(
        error.to_string().contains("say it with data-file=PATH"),
        "{error}"
    );
    for name in ["json:{}", "nbd://h", "host:/d"] {
        create(&f, "b.qcow2", "data_file=seven77", "1M");
        rename(&f, "b.qcow2", "seven77", &format!("{name:\0<7}"));
        let error = f.open_qcow2("b.qcow2").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAllowed, "{error}");
    }
    // A raw data file and a backing file.
    create(&f, "c.qcow2", "data_file=e.raw,data_file_raw=on", "1M");
    f.tool(&["qemu-img", "rebase", "-u", "-b", "", "c.qcow2"]);
    create(
        &f,
        "e.qcow2",
        "data_file=f.raw,backing_file=d.raw,backing_fmt=raw",
        "1M",
    );
    let mut bytes = std::fs::read(f.at("e.qcow2")).unwrap();
    bytes[95] |= 2;
    f.put("e.qcow2", &bytes);
    let error = f.open_qcow2("e.qcow2").unwrap_err();
    assert!(error.to_string().contains("exclude each other"), "{error}");
}

#[test]
fn qemu_and_we_keep_each_other_out_of_the_data_file() {
    let f = Folder::new();
    create(&f, "a.qcow2", "data_file=d.raw", "1M");
    let disk = f.open_qcow2("a.qcow2").unwrap();
    let active = f.activate(&disk).unwrap();
    let writes = |name: &str| f.run(&["qemu-io", "-f", "raw", "-c", "write 0 512", name]);
    let said = writes("d.raw").unwrap_err();
    assert!(said.contains("lock"), "{said}");
    assert!(
        f.run(&["qemu-img", "resize", "-f", "raw", "d.raw", "2M"])
            .is_err()
    );
    f.deactivate(active).unwrap();
    writes("d.raw").unwrap();

    // The other way round: somebody writes to the data file alone.
    let mut child = std::process::Command::new("qemu-io")
        .args(["-f", "raw", f.at("d.raw").to_str().unwrap()])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, b"length\n").unwrap();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("iB") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0);
    }
    let refused = f.activate(&disk).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked);
    assert!(refused.path().ends_with("d.raw"), "{refused}");
    drop(stdin);
    child.wait().unwrap();
    let active = f.activate(&disk).unwrap();
    f.deactivate(active).unwrap();
}

#[test]
fn what_is_discarded_gives_its_space_in_the_data_file_back() {
    use std::os::unix::fs::MetadataExt;
    for kind in ["off", "on"] {
        let f = Folder::new();
        create(
            &f,
            "a.qcow2",
            &format!("data_file=d.raw,data_file_raw={kind}"),
            "4M",
        );
        let disk = f.open_qcow2("a.qcow2").unwrap();
        let active = f.activate(&disk).unwrap();
        f.write(&active, 0, &pattern(4 << 20, 1)).unwrap();
        let blocks = || std::fs::metadata(f.at("d.raw")).unwrap().blocks();
        let full = blocks();
        f.io.block_on(active.discard(&f.io, 0, 1 << 20)).unwrap();
        f.io.block_on(active.write_zeroes(&f.io, 2 << 20, 1 << 20, true))
            .unwrap();
        assert!(blocks() <= full / 2 + 16, "{kind}: {} of {full}", blocks());
        f.io.block_on(active.write_zeroes(&f.io, 3 << 20, 1 << 20, false))
            .unwrap();
        assert!(blocks() >= full / 2 - 16, "{kind}: {} of {full}", blocks());
        f.deactivate(active).unwrap();
        assert!(
            f.by_qemu("a.qcow2")[2 << 20..]
                .iter()
                .all(|byte| *byte == 0)
        );
    }
}
