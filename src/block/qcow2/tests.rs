//! Tests of the image as a whole. Images are made by `qemu-img`, which is also the judge of the result.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use super::*;
use crate::block::crypt::{CryptStorage, KeySource, KeySpec, Keys, Unlocked};
use crate::block::error::{ErrorKind, Result};
use crate::block::sim::{Sim, SimStorage, random};
use crate::reactor::{Epochs, Io, IoConfig, Sg};

mod bitmaps;
mod cancelled;
mod chain;
mod compressed;
mod concurrent;
mod cow;
mod crash;
mod damage;
mod data_file;
mod encrypted;
mod extended;
mod faults;
mod fresh;
mod history;
mod in_memory;
mod journal;
mod judge;
mod kinds;
mod leaks;
mod memory;
mod read;
mod resize;
mod rows;
mod snapshots;
mod write;

/// A reactor of its own epoch domain.
fn reactor() -> Io {
    reactor_of(&Epochs::new(), 0)
}

fn reactor_of(epochs: &Arc<Epochs>, worker: usize) -> Io {
    Io::new(&IoConfig {
        worker,
        entries: 64,
        epochs: epochs.clone(),
    })
    .expect("io_uring")
}

/// Runs a command that must succeed; returns what it printed.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// A directory with images in it.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn create(&self, name: &str, options: &str, size: u64) {
        let (file, size) = (self.name(name), size.to_string());
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, &file, &size],
        );
    }

    fn create_over(&self, name: &str, options: &str, base: &str, format: &str, size: u64) {
        let (file, base, size) = (self.name(name), self.name(base), size.to_string());
        run(
            "qemu-img",
            &[
                "create", "-q", "-f", "qcow2", "-o", options, "-b", &base, "-F", format, &file,
                &size,
            ],
        );
    }

    /// An encrypted image, over a raw base if one is named. Its key is in the file `key`.
    fn create_encrypted(&self, name: &str, options: &str, base: Option<&str>, size: u64) {
        write_file(&self.path("key"), b"secret");
        let (file, size) = (self.name(name), size.to_string());
        let secret = format!("secret,id=s,file={}", self.name("key"));
        let options =
            format!("{options},encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10");
        let base = base.map(|base| self.name(base));
        let mut args = vec![
            "create", "-q", "--object", &secret, "-f", "qcow2", "-o", &options,
        ];
        if let Some(base) = &base {
            args.extend(["-b", base, "-F", "raw"]);
        }
        args.extend([file.as_str(), &size]);
        run("qemu-img", &args);
    }

    /// What `qemu-img check` says of an image of [`Images::create_encrypted`] must be nothing.
    fn check_encrypted(&self, name: &str) {
        let secret = format!("secret,id=s,file={}", self.name("key"));
        let image = format!(
            "driver=qcow2,encrypt.key-secret=s,file.filename={}",
            self.name(name)
        );
        let line = ["check", "-q", "--object", &secret, "--image-opts", &image];
        run("qemu-img", &line);
    }

    fn qemu_io(&self, name: &str, commands: &[&str]) {
        let file = self.name(name);
        let mut args = vec!["-f", "qcow2"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(&file);
        let text = run("qemu-io", &args);
        assert!(!text.contains("failed"), "{text}");
    }

    /// What `qemu-img` reads from an image.
    fn contents(&self, name: &str) -> Vec<u8> {
        let raw = self.name("contents.raw");
        run(
            "qemu-img",
            &["convert", "-O", "raw", &self.name(name), &raw],
        );
        std::fs::read(raw).expect("contents")
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("image")
    }
}

/// A layer below, for tests: bytes, zeros behind them.
impl Below for Vec<u8> {
    async fn read(&self, _: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        let start = (offset as usize).min(self.len());
        let done = to.copy_from(&self[start..]);
        to.split_at(done).1.zero();
        Ok(())
    }
}

fn sim(image: Vec<u8>, config: Sim) -> Arc<Storage> {
    Arc::new(Storage::Sim(SimStorage::new(image, config)))
}

fn the_sim(storage: &Storage) -> &SimStorage {
    match storage {
        Storage::Sim(sim) => sim,
        _ => panic!("a simulated storage"),
    }
}

async fn open(io: &Io, storage: &Arc<Storage>, options: Options) -> Result<Qcow2> {
    let header = Header::read(io, storage).await?;
    Qcow2::open(io, storage.clone(), header, options).await
}

/// Opens an image of [`Images::create_encrypted`].
async fn open_encrypted(
    io: &Io,
    storage: &Arc<Storage>,
    images: &Images,
    options: Options,
) -> Result<(Qcow2, Arc<Unlocked>)> {
    let header = Header::read(io, storage).await?;
    let keys = Keys::load(&[KeySpec {
        image: None,
        source: KeySource::File(images.path("key")),
    }])?;
    let place = header.luks(storage.len())?.expect("encrypted");
    let key = Unlocked::open(io, storage, place, &keys, None).await?;
    let plain = CryptStorage::new(storage.clone(), key.clone(), 0);
    let data = Some(Arc::new(Storage::Crypt(Box::new(plain))));
    let image = Qcow2::open_with_data(io, storage.clone(), data, header, options).await?;
    Ok((image, key))
}

const READ: Options = Options {
    on_dirty: OnDirty::Repair,
    read_only: true,
    l2_cache_bytes: 1 << 20,
    workers: 0,
    has_backing: false,
};

/// Reads as the stack of layers does.
async fn read<B: Below>(
    io: &Io,
    image: &Qcow2,
    below: &B,
    mut offset: u64,
    to: Sg<'_>,
) -> Result<()> {
    let _pin = io.pin();
    let mut rest = to;
    while !rest.is_empty() {
        let extent = image.map(io, offset, rest.len() as u64).await?;
        let len = match extent {
            Extent::Data { len, .. }
            | Extent::Zero { len }
            | Extent::Backing { len }
            | Extent::Compressed { len, .. } => len,
        };
        assert!(len >= 1 && len <= rest.len() as u64);
        let (part, tail) = rest.split_at(len as usize);
        match extent {
            Extent::Data { host, .. } => image.data().read(io, host.0, part).await?,
            Extent::Zero { .. } => part.zero(),
            Extent::Backing { .. } => below.read(io, offset, part).await?,
            Extent::Compressed { data, skip, .. } => {
                image.read_compressed(io, data, skip, part).await?;
            }
        }
        offset += len;
        rest = tail;
    }
    Ok(())
}

async fn read_all<B: Below>(io: &Io, image: &Qcow2, below: &B) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while (all.len() as u64) < image.size() {
        let len = (image.size() - all.len() as u64).min(1 << 20);
        let mut buf = io.buf(len as usize);
        read(io, image, below, all.len() as u64, buf.sg()).await?;
        all.extend_from_slice(&buf);
    }
    Ok(all)
}

/// Compares without printing megabytes.
fn assert_same(got: &[u8], want: &[u8], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let differs = got.iter().zip(want).position(|(a, b)| a != b);
    if let Some(at) = differs {
        panic!(
            "{what}: differs at {at:#x}: {:02x} instead of {:02x}",
            got[at], want[at]
        );
    }
}

/// Stores what is below at a place of chance, as copy-on-read does: whole units of it, and no more than a few.
async fn copy_some(io: &Io, image: &Qcow2, below: &[u8], state: &mut u64) -> Result<u64> {
    let Some(unit) = image.copy_unit() else {
        return Ok(0);
    };
    let units = image.size().div_ceil(unit);
    let first = random(state) % units;
    let count = 1 + random(state) % (units - first).min(1 + (32 << 10) / unit);
    let mut buf = io.buf((count * unit) as usize);
    buf.fill(0);
    let start = ((first * unit) as usize).min(below.len());
    let end = (start + buf.len()).min(below.len());
    buf[..end - start].copy_from_slice(&below[start..end]);
    image.store_copy(io, first * unit, &mut buf).await
}

/// Bytes that do not compress, nor repeat.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len).map(|_| random(&mut state) as u8).collect()
}

fn write_file(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("write");
}
