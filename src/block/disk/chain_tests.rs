//! Chains of backing files, and the names that lead along them.

use super::super::tests::pattern;
use super::tests::{Folder, empty_qcow2, overlay};
use super::*;

#[test]
fn absolute_relative_and_file_prefixed_names_lead_to_the_same_file() {
    let f = Folder::new();
    std::fs::create_dir(f.at("vm")).unwrap();
    let data = pattern(1 << 20, 5);
    f.put("vm/base", &data);
    let absolute = f.at("vm/base").to_str().unwrap().to_owned();
    let prefixed = format!("file:{absolute}");
    for name in [
        "base",
        "./base",
        "../vm/base",
        "file:base",
        "file:./base",
        &absolute,
        &prefixed,
    ] {
        f.put("vm/top", &empty_qcow2(1 << 20, Some((name, Some("raw")))));
        assert!(f.contents("vm/top", Format::Qcow2) == data, "{name}");
        // QEMU looks up what comes after a prefix from its working directory.
        if !name.starts_with("file:") || name == prefixed {
            assert!(f.by_qemu("vm/top") == data, "{name}, by QEMU");
        }
    }
}

#[test]
fn a_chain_200_deep_is_opened_and_written_over_on_a_small_stack() {
    let small = std::thread::Builder::new().stack_size(256 << 10);
    let run = small.spawn(|| {
        let f = Folder::new();
        let data = pattern(1 << 20, 3);
        f.put("0", &data);
        f.put("1", &empty_qcow2(1 << 20, Some(("0", Some("raw")))));
        for n in 2..200 {
            f.put(&n.to_string(), &overlay(&(n - 1).to_string()));
        }
        let top = "199";
        let disk = f.open_qcow2(top).unwrap();
        let active = f.activate(&disk).unwrap();
        assert!(f.read(&active, 0, 1 << 20).unwrap() == data);
        // Part of a cluster: the rest comes from 199 layers below.
        f.write(&active, 5120, &[7; 512]).unwrap();
        f.deactivate(active).unwrap();
        let mut model = data;
        model[5120..5632].fill(7);
        assert!(f.contents(top, Format::Qcow2) == model);
    });
    run.unwrap().join().expect("200 layers");
}
