//! Persistent bitmaps of an image on a file system, past the page cache; qemu-img says what they are.

use super::tests::Folder;
use super::*;

/// The flags that qemu-img tells of the image's only bitmap.
fn flags(f: &Folder, name: &str) -> Vec<String> {
    let file = f.at(name).to_str().unwrap().to_owned();
    let output = std::process::Command::new("qemu-img")
        .args(["info", "-U", "--output=json", &file])
        .output()
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
    let flags = flags.as_array().unwrap().iter();
    flags
        .map(|flag| flag.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_disk_with_a_bitmap_is_in_use_from_its_first_write_to_its_end() {
    let f = Folder::new();
    f.tool(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "64M"]);
    f.tool(&["qemu-img", "bitmap", "--add", "a.qcow2", "daily"]);
    for cache in [CacheMode::None, CacheMode::Writeback] {
        let mut spec = f.spec("a.qcow2", Format::Qcow2);
        spec.cache = cache;
        let disk = f.open(&spec).unwrap();
        let active = f.activate(&disk).unwrap();
        assert_eq!(f.read(&active, 32 << 20, 512).unwrap().len(), 512);
        assert_eq!(flags(&f, "a.qcow2"), ["auto"]);
        f.write(&active, 1 << 20, &[5; 4096]).unwrap();
        assert_eq!(flags(&f, "a.qcow2"), ["in-use", "auto"]);
        f.deactivate(active).unwrap();
        assert_eq!(flags(&f, "a.qcow2"), ["auto"]);
        f.tool(&["qemu-img", "check", "-q", "a.qcow2"]);
        // QEMU takes it for what it is: a bitmap that is in use could not be merged.
        f.tool(&[
            "qemu-img", "bitmap", "--add", "--merge", "daily", "a.qcow2", "copy",
        ]);
        f.tool(&["qemu-img", "bitmap", "--remove", "a.qcow2", "copy"]);
    }
    // Reading changes nothing, and asks nothing of a bitmap that nobody finished.
    let disk = f.open_qcow2("a.qcow2").unwrap();
    let active = f.activate(&disk).unwrap();
    f.write(&active, 2 << 20, &[6; 512]).unwrap();
    drop(active);
    assert_eq!(flags(&f, "a.qcow2"), ["in-use", "auto"]);
    assert_eq!(f.contents("a.qcow2", Format::Qcow2)[1 << 20], 5);
}
