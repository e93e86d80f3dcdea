//! One image: made by `qemu-img` and `qemu-io`, and judged by them.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use vhost_user_frontend::guest::Random;

use crate::axes::{Backing, Case, Compression, DataFile};

const SECRET: &str = "secret,id=key,data=matrix";
/// The names of the image and of its data file.
const TOP: &str = "top.qcow2";
const DATA: &str = "data.raw";

/// An image in a directory of its own, and what of it must stay as it is.
pub struct Image {
    case: Case,
    dir: tempfile::TempDir,
    size: u64,
    /// What `qemu-img` reads from the image when it is new.
    pub contents: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    listing: String,
    bitmaps: Value,
}

fn run(dir: &Path, program: &str, args: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(args).current_dir(dir).output();
    let output = output.expect("this test needs qemu-utils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let told = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {args:?}: {text}{told}"))
}

fn must(dir: &Path, program: &str, args: &[&str]) -> String {
    run(dir, program, args).unwrap_or_else(|failed| panic!("{failed}"))
}

impl Image {
    /// Makes the image, with everything that the case asks for.
    pub fn new(case: Case, random: &mut Random) -> Self {
        let cluster = 1u64 << case.cluster_bits;
        let mut image = Self {
            case,
            dir: tempfile::tempdir().expect("a directory"),
            size: (640 << 10).max(3 * cluster) + 512 * (1 + random.below(7)),
            contents: Vec::new(),
            snapshots: Vec::new(),
            listing: String::new(),
            bitmaps: Value::Null,
        };
        let below = image.make_backing(random);
        image.create(below);
        image.fill(random);
        for n in 0..case.snapshots {
            let name = format!("shot{n}");
            image.on_image("qemu-img", &["snapshot"], &["-c", &name]);
            let contents = image.read(Some(&name));
            image.snapshots.push((name, contents));
            // The last one may have everything in common with the active disk.
            if n + 1 < case.snapshots || random.below(2) == 0 {
                image.fill(random);
            }
        }
        for n in 0..case.bitmaps {
            let name = format!("map{n}");
            let kind = ["--enable", "--disable"][n % 2];
            let args = ["--add", "-g", ["64k", "512"][n % 2], kind];
            image.on_image_and("qemu-img", &["bitmap"], &args, &[&name]);
        }
        if case.bitmaps > 0 {
            image.fill(random);
        }
        image.contents = image.read(None);
        image.listing = image.on_image("qemu-img", &["snapshot"], &["-l"]);
        image.bitmaps = image.bitmaps();
        image
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join(TOP)
    }

    /// A file with the key, if the image is encrypted.
    pub fn key_file(&self) -> Option<PathBuf> {
        self.case.luks.then(|| {
            let path = self.dir.path().join("key");
            std::fs::write(&path, "matrix").expect("key file");
            path
        })
    }

    /// Runs a tool on the image; its format is always stated, and the key if it needs one.
    fn on_image(&self, program: &str, command: &[&str], args: &[&str]) -> String {
        self.on_image_and(program, command, args, &[])
    }

    fn on_image_and(
        &self,
        program: &str,
        command: &[&str],
        args: &[&str],
        last: &[&str],
    ) -> String {
        let told = self.try_on_image(program, command, args, last);
        told.unwrap_or_else(|failed| panic!("{failed}"))
    }

    fn try_on_image(
        &self,
        program: &str,
        command: &[&str],
        args: &[&str],
        last: &[&str],
    ) -> Result<String, String> {
        let target = self.target();
        let opts = ["--image-opts"];
        let all = [
            command,
            self.secret(),
            &opts,
            args,
            &[target.as_str()],
            last,
        ]
        .concat();
        run(self.dir.path(), program, &all)
    }

    fn secret(&self) -> &'static [&'static str] {
        if self.case.luks {
            &["--object", SECRET]
        } else {
            &[]
        }
    }

    fn target(&self) -> String {
        let key = if self.case.luks {
            ",encrypt.key-secret=key"
        } else {
            ""
        };
        format!("driver=qcow2,file.driver=file,file.filename={TOP}{key}")
    }

    fn create(&self, below: Option<(&str, &str)>) {
        let case = &self.case;
        let mut options = vec![
            format!("compat={}", ["0.10", "1.1"][case.version as usize - 2]),
            format!("cluster_size={}", 1u64 << case.cluster_bits),
            format!("refcount_bits={}", case.refcount_bits),
        ];
        if case.compression == Compression::Zstd {
            options.push("compression_type=zstd".into());
        }
        if case.extended_l2 {
            options.push("extended_l2=on".into());
        }
        if case.data_file != DataFile::None {
            options.push(format!("data_file={DATA}"));
        }
        if case.data_file == DataFile::Raw {
            options.push("data_file_raw=on".into());
        }
        if case.luks {
            options.push("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10".into());
        }
        let (options, size) = (options.join(","), self.size.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        args.extend(self.secret());
        if let Some((name, format)) = below {
            args.extend(["-b", name, "-F", format]);
        }
        args.extend([TOP, &size]);
        must(self.dir.path(), "qemu-img", &args);
    }

    /// Makes what is below; returns its name and format.
    fn make_backing(&self, random: &mut Random) -> Option<(&'static str, &'static str)> {
        let dir = self.dir.path();
        let raw = |name: &str, len: u64, random: &mut Random| {
            // Holes, repetition and noise.
            let mut bytes = vec![0; len as usize];
            for piece in bytes.chunks_mut(10_007) {
                match random.below(3) {
                    0 => {}
                    1 => piece.fill(random.below(256) as u8),
                    _ => random.fill(piece),
                }
            }
            std::fs::write(dir.join(name), bytes).expect("a raw file");
        };
        match self.case.backing {
            Backing::None => None,
            Backing::Raw => {
                raw("base", self.size, random);
                Some(("base", "raw"))
            }
            Backing::ShortRaw => {
                raw("base", self.size / 2 + 123, random);
                Some(("base", "raw"))
            }
            Backing::LongQcow2 => {
                raw("long", self.size + (100 << 10), random);
                let args = ["convert", "-c", "-f", "raw", "-O", "qcow2", "long", "base"];
                must(dir, "qemu-img", &args);
                Some(("base", "qcow2"))
            }
            Backing::Deep => {
                raw("layer0", self.size / 3 + 77, random);
                let layers = [
                    ("raw", "layer0", "layer1"),
                    ("qcow2", "layer1", "layer2"),
                    ("qcow2", "layer2", "layer3"),
                ];
                for (n, (format, below, name)) in layers.into_iter().enumerate() {
                    let options = format!("cluster_size={}", [512, 65536, 4096][n]);
                    let size = (self.size / [2, 1, 3][n] + [0, 1 << 16, 0][n]) / 512 * 512;
                    let args = [
                        "create", "-q", "-f", "qcow2", "-o", &options, "-b", below, "-F", format,
                        name,
                    ];
                    must(dir, "qemu-img", &[&args[..], &[&size.to_string()]].concat());
                    let write = format!("write -P {} {} 9k", n + 200, n * 20_480);
                    must(dir, "qemu-io", &["-f", "qcow2", "-c", &write, name]);
                }
                Some(("layer3", "qcow2"))
            }
        }
    }

    /// Writes, zeroes and discards here and there, with `qemu-io`.
    fn fill(&self, random: &mut Random) {
        let case = &self.case;
        let cluster = 1u64 << case.cluster_bits;
        let mut commands = Vec::new();
        for _ in 0..6 {
            let sectors = self.size / 512;
            let first = random.below(sectors);
            let len = (1 + random.below(300)).min(sectors - first) * 512;
            let (at, byte) = (first * 512, 1 + random.below(255));
            // A compressed write is of whole clusters.
            let whole = at / cluster * cluster;
            let most = (self.size - whole) / cluster;
            commands.push(match random.below(8) {
                0..3 => format!("write -P {byte} {at} {len}"),
                3 | 4 if case.compression != Compression::None && most > 0 => {
                    let count = (1 + random.below(4)).min(most) * cluster;
                    format!("write -c -P {byte} {whole} {count}")
                }
                5 => format!("write -z {at} {len}"),
                6 => format!("write -z -u {at} {len}"),
                7 => format!("discard {at} {len}"),
                _ => format!("write -P {byte} {at} 512"),
            });
        }
        let (first, then): (Vec<_>, Vec<_>) = commands.iter().partition(|c| c.contains("-c"));
        // QEMU refuses to compress where a cluster is allocated already, so that may fail.
        for (commands, may_fail) in [(first, true), (then, false)] {
            let args: Vec<&str> = commands.iter().flat_map(|c| ["-c", c.as_str()]).collect();
            if args.is_empty() {
                continue;
            }
            let told = self.try_on_image("qemu-io", &[], &args, &[]);
            match told {
                Err(told) if !(may_fail && told.contains("write failed: Input/output error")) => {
                    panic!("{told}")
                }
                _ => {}
            }
        }
    }

    /// What `qemu-img` reads, from the active disk or a snapshot.
    fn read(&self, snapshot: Option<&str>) -> Vec<u8> {
        let which = snapshot.map(|name| format!("snapshot.name={name}"));
        let args: Vec<&str> = which.iter().flat_map(|w| ["-l", w.as_str()]).collect();
        let args = [&args[..], &["-O", "raw"]].concat();
        self.on_image_and("qemu-img", &["convert"], &args, &["read.raw"]);
        std::fs::read(self.dir.path().join("read.raw")).expect("contents")
    }

    /// Name, granularity and flags of each bitmap.
    fn bitmaps(&self) -> Value {
        let told = self.on_image("qemu-img", &["info"], &["--output", "json"]);
        let told: Value = serde_json::from_str(&told).expect("json");
        told["format-specific"]["data"]["bitmaps"].clone()
    }

    /// Judges the image after it was closed: clean, with `contents`, snapshots and bitmaps as they were.
    pub fn judge(&self, contents: &[u8]) {
        self.on_image("qemu-img", &["check"], &["-q"]);
        let dir = self.dir.path();
        std::fs::write(dir.join("model.raw"), contents).expect("the model");
        let model = "driver=raw,file.driver=file,file.filename=model.raw";
        self.on_image_and("qemu-img", &["compare"], &["-q"], &[model]);
        let listing = self.on_image("qemu-img", &["snapshot"], &["-l"]);
        assert_eq!(listing, self.listing, "the list of snapshots");
        for (name, contents) in &self.snapshots {
            assert!(
                self.read(Some(name)) == *contents,
                "snapshot {name} has changed"
            );
        }
        assert_eq!(self.bitmaps(), self.bitmaps, "bitmaps");
        if self.case.data_file == DataFile::Raw {
            let data = std::fs::read(dir.join(DATA)).expect("the data file");
            // Its last cluster may be whole, or not be there yet.
            let end = contents.len().min(data.len());
            let same = data[..end] == contents[..end];
            assert!(same, "the data file is no raw image by itself");
            let mut rest = contents[end..].iter().chain(&data[end..]);
            assert!(rest.all(|byte| *byte == 0), "the end of the data file");
        }
    }
}
