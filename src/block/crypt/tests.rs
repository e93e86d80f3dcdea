//! LUKS files, made and judged by QEMU's tools.

mod bytes;
mod files;
mod format;
mod headers;
mod images;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use super::key::{KeySource, KeySpec};
use crate::block::error::Result;
use crate::block::tests::{dir, io};
use crate::block::{ActiveDisk, Disk, DiskSpec, Format, Source};
use crate::reactor::Io;

/// The passphrase of all images here.
const SECRET: &str = "correct horse";
const OBJECT: &str = "secret,id=s,file=key";

/// A directory with a key file and images.
struct Folder {
    dir: tempfile::TempDir,
    io: Io,
}

impl Folder {
    fn new() -> Self {
        let folder = Self {
            dir: dir(),
            io: io(),
        };
        folder.put("key", SECRET.as_bytes());
        folder
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str, data: &[u8]) {
        std::fs::write(self.at(name), data).unwrap();
    }

    /// Runs a QEMU tool in the folder, with the secret; what it printed, or its errors.
    fn run(&self, tool: &str, line: &[&str]) -> std::result::Result<String, String> {
        // The sub-command of `qemu-img` comes before its options.
        let (first, rest) = line.split_at(usize::from(tool == "qemu-img"));
        let output = Command::new(tool)
            .args(first)
            .args(["--object", OBJECT])
            .args(rest)
            .current_dir(self.dir.path())
            .output()
            .expect("these tests need qemu-img and qemu-io (package qemu-utils)");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    }

    fn tool(&self, tool: &str, line: &[&str]) -> String {
        self.run(tool, line).unwrap()
    }

    /// A LUKS file of the ciphers that qemu-img takes by default.
    fn create(&self, name: &str, size: usize) {
        let file = format::luks_file("aes", "xts-plain64", "sha256", 64, size);
        self.put(name, &file);
    }

    /// A LUKS file by qemu-img; `options` begin with a comma.
    fn create_by_qemu(&self, name: &str, options: &str, size: &str) {
        let options = format!("key-secret=s,iter-time=10{options}");
        let line = ["create", "-q", "-f", "luks", "-o", &options, name, size];
        self.tool("qemu-img", &line);
    }

    /// Fills an image by QEMU.
    fn fill(&self, image: &str, data: &[u8]) {
        self.put("fill.raw", data);
        let line = [
            "convert",
            "-f",
            "raw",
            "-n",
            "fill.raw",
            "--target-image-opts",
            image,
        ];
        self.tool("qemu-img", &line);
    }

    /// What QEMU reads.
    fn by_qemu(&self, image: &str) -> Vec<u8> {
        let line = ["convert", "--image-opts", image, "-O", "raw", "out.raw"];
        self.tool("qemu-img", &line);
        std::fs::read(self.at("out.raw")).unwrap()
    }

    fn spec(&self, name: &str, format: Format) -> DiskSpec {
        let path = self.at(name);
        let mut spec = DiskSpec::new(Source::File { path }, format);
        spec.keys = vec![KeySpec {
            image: None,
            source: KeySource::File(self.at("key")),
        }];
        spec
    }

    fn open(&self, spec: DiskSpec) -> Result<Disk> {
        self.io.block_on(Disk::open(&self.io, spec))
    }

    fn activate(&self, disk: &Disk) -> Result<Arc<ActiveDisk>> {
        self.io.block_on(disk.activate(&self.io, 0))
    }

    fn deactivate(&self, disk: Arc<ActiveDisk>) {
        self.io.block_on(disk.deactivate(&self.io)).unwrap();
    }

    fn read(&self, disk: &ActiveDisk, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = self.io.buf(len);
        buf.fill(0xee);
        let read = self
            .io
            .block_on(async { disk.read(&self.io, offset, buf.sg()).await });
        read.unwrap();
        buf.to_vec()
    }

    fn write(&self, disk: &ActiveDisk, offset: u64, data: &[u8]) {
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(data);
        let written = self
            .io
            .block_on(async { disk.write(&self.io, offset, buf.sg()).await });
        written.unwrap();
        assert!(buf[..] == *data, "the caller's memory stays as it is");
    }
}

/// How QEMU's tools are told of a LUKS file.
fn luks(name: &str) -> String {
    format!("driver=luks,key-secret=s,file.filename={name}")
}
