//! Images of every kind, made by QEMU's tools, and what `qemu-img check` says of them.

use std::path::{Path, PathBuf};
use std::process::Command;

pub(in crate::block::qcow2) const SECRET: &str = "secret,id=key,data=very-secret";

/// An image and how to open it with QEMU's tools.
#[derive(Clone, Debug)]
pub(in crate::block::qcow2) struct Animal {
    pub(in crate::block::qcow2) name: &'static str,
    pub(in crate::block::qcow2) path: PathBuf,
    luks: bool,
}

pub(in crate::block::qcow2) fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().expect(program);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// What `qemu-img check` says; without an answer it could not check, or not to the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::block::qcow2) struct Said {
    pub(in crate::block::qcow2) errors: u64,
    pub(in crate::block::qcow2) leaks: u64,
    pub(in crate::block::qcow2) total: u64,
    pub(in crate::block::qcow2) allocated: u64,
    pub(in crate::block::qcow2) fragmented: u64,
    pub(in crate::block::qcow2) compressed: u64,
    pub(in crate::block::qcow2) image_end: u64,
}

impl Animal {
    /// Options of a QEMU tool that open `path` as this image.
    fn opened(&self) -> Vec<String> {
        let path = self.path.to_str().unwrap();
        match self.luks {
            false => vec!["-f".into(), "qcow2".into(), path.into()],
            true => vec![
                "--object".into(),
                SECRET.into(),
                "--image-opts".into(),
                format!("driver=qcow2,encrypt.key-secret=key,file.filename={path}"),
            ],
        }
    }

    pub(in crate::block::qcow2) fn check(&self) -> Option<Said> {
        let output = Command::new("qemu-img")
            .args(["check", "--output=json"])
            .args(self.opened())
            .output()
            .expect("qemu-img");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        let count = |key: &str| json[key].as_u64().unwrap_or(0);
        (count("check-errors") == 0).then(|| Said {
            errors: count("corruptions"),
            leaks: count("leaks"),
            total: count("total-clusters"),
            allocated: count("allocated-clusters"),
            fragmented: count("fragmented-clusters"),
            compressed: count("compressed-clusters"),
            image_end: count("image-end-offset"),
        })
    }

    fn io(&self, commands: &[&str]) {
        let mut args: Vec<String> = Vec::new();
        commands
            .iter()
            .for_each(|c| args.extend(["-c".into(), (*c).into()]));
        args.extend(self.opened());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        run("qemu-io", &args);
    }
}

/// Images of all kinds, 4 MiB of disk each, small enough to be copied often.
pub(in crate::block::qcow2) fn zoo(dir: &Path) -> Vec<Animal> {
    let data = ["write 0 300k", "write -P 5 1M 123k", "discard 64k 64k"];
    let zeros = ["write -z 512k 128k", "write -z -u 700k 64k"];
    let packed = ["write -c -P 7 2M 512k", "write -c -P 8 3M 256k"];
    let mut animals = Vec::new();
    for (name, options) in [
        ("plain", "cluster_size=64k"),
        ("version 2", "cluster_size=64k,compat=0.10"),
        ("refcounts of 1 bit", "cluster_size=4k,refcount_bits=1"),
        ("refcounts of 2 bits", "cluster_size=4k,refcount_bits=2"),
        ("refcounts of 4 bits", "cluster_size=4k,refcount_bits=4"),
        ("refcounts of 8 bits", "cluster_size=8k,refcount_bits=8"),
        ("refcounts of 32 bits", "cluster_size=4k,refcount_bits=32"),
        ("refcounts of 64 bits", "cluster_size=512,refcount_bits=64"),
        ("preallocated", "cluster_size=4k,preallocation=metadata"),
        ("zstd", "cluster_size=4k,compression_type=zstd"),
        ("lazy refcounts", "cluster_size=4k,lazy_refcounts=on"),
        ("extended L2", "cluster_size=16k,extended_l2=on"),
        ("snapshots", "cluster_size=4k"),
        ("snapshots, extended L2", "cluster_size=16k,extended_l2=on"),
        ("snapshots, version 2", "cluster_size=512,compat=0.10"),
        ("bitmaps", "cluster_size=4k"),
        ("data file", "cluster_size=4k"),
        ("raw data file", "cluster_size=4k,data_file_raw=on"),
        (
            "luks",
            "cluster_size=4k,encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
        ),
    ] {
        let file = name.replace([' ', ','], "-");
        let path = dir.join(format!("{file}.qcow2"));
        let text = path.to_str().unwrap();
        let luks = name == "luks";
        let data_file = format!("{options},data_file={}", dir.join(&file).display());
        let options = if name.contains("data file") {
            &data_file
        } else {
            options
        };
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", options];
        if luks {
            args.extend(["--object", SECRET]);
        }
        args.extend([text, "4M"]);
        run("qemu-img", &args);
        let animal = Animal {
            name,
            path: path.clone(),
            luks,
        };
        animal.io(&data);
        if name != "version 2" && name != "snapshots, version 2" {
            animal.io(&zeros);
        }
        if !["refcounts of 1 bit", "preallocated", "luks"].contains(&name)
            && !name.contains("data file")
        {
            animal.io(&packed);
        }
        if name.contains("snapshots") {
            run("qemu-img", &["snapshot", "-c", "first", text]);
            animal.io(&["write -P 9 100k 60k", "write -P 4 2M 20k"]);
            run("qemu-img", &["snapshot", "-c", "second", text]);
            animal.io(&["write -P 1 200k 10k", "discard 1M 64k"]);
        }
        if name == "bitmaps" {
            run("qemu-img", &["bitmap", "--add", "-g", "512", text, "one"]);
            run("qemu-img", &["bitmap", "--add", "-g", "4k", text, "two"]);
            animal.io(&["write -P 9 100k 60k", "write -P 4 2M 1M"]);
        }
        animals.push(animal);
    }
    animals
}
