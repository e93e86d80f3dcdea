//! What the disk is made of, and the images for it.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::pattern::Load;

/// Bytes of a qcow2 cluster.
const CLUSTER: u64 = 64 << 10;

/// What a disk is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Null,
    /// A namespace of the tests' own NVMe/TCP target.
    Nvme,
    /// A raw file of data.
    Raw,
    /// A qcow2 image with every cluster written.
    Full,
    /// A qcow2 image without any cluster.
    Fresh,
    /// The same over a raw base.
    OverlayRaw,
    /// The same over a qcow2 base with every cluster written.
    OverlayQcow2,
    /// So many qcow2 images over one another: the lowest is full, each above has a 16th of the clusters.
    Chain(u32),
}

/// Where its files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It has none.
    Nowhere,
    /// In the directory on a disk.
    Disk,
    /// In memory.
    Shm,
}

/// A layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// What it is.
    pub kind: Kind,
    /// Where.
    pub place: Place,
}

impl Layer {
    /// All layers, in the order of a full run.
    pub fn all() -> Vec<Self> {
        let mut kinds = vec![
            Kind::Raw,
            Kind::Full,
            Kind::Fresh,
            Kind::OverlayRaw,
            Kind::OverlayQcow2,
        ];
        kinds.extend([1, 2, 4, 8, 16].map(Kind::Chain));
        let of = |kind, place| Self { kind, place };
        let mut layers = vec![of(Kind::Null, Place::Nowhere)];
        for kind in kinds {
            layers.extend([of(kind, Place::Disk), of(kind, Place::Shm)]);
        }
        layers.push(of(Kind::Nvme, Place::Nowhere));
        layers
    }

    /// By its name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|layer| layer.name() == name)
    }

    /// Its name, such as `overlay-raw-shm`.
    pub fn name(self) -> String {
        let kind = match self.kind {
            Kind::Null => "null".to_owned(),
            Kind::Nvme => "nvme".to_owned(),
            Kind::Raw => "raw".to_owned(),
            Kind::Full => "full".to_owned(),
            Kind::Fresh => "fresh".to_owned(),
            Kind::OverlayRaw => "overlay-raw".to_owned(),
            Kind::OverlayQcow2 => "overlay-qcow2".to_owned(),
            Kind::Chain(length) => format!("chain-{length}"),
        };
        match self.place {
            Place::Nowhere => kind,
            Place::Disk => kind + "-disk",
            Place::Shm => kind + "-shm",
        }
    }

    /// Whether a write changes what the next load finds, so that each run needs an image of its own.
    pub fn needs_fresh_image(self, load: Load) -> bool {
        match self.kind {
            Kind::Fresh | Kind::OverlayRaw | Kind::OverlayQcow2 => true,
            Kind::Chain(_) => load.writes(),
            _ => false,
        }
    }
}

/// A disk that was made: what a backend is told to serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disk {
    /// Zeros, of this size.
    Null(u64),
    /// A URI.
    Remote(String),
    /// A raw file.
    Raw(PathBuf),
    /// qcow2 images, the lowest first, and the raw file below them if there is one.
    Qcow2 {
        /// Below all.
        base: Option<PathBuf>,
        /// At least one; the last is what is written.
        images: Vec<PathBuf>,
    },
}

impl Disk {
    /// The image that is written, if it is a qcow2 one.
    pub fn qcow2(&self) -> Option<&Path> {
        match self {
            Self::Qcow2 { images, .. } => images.last().map(PathBuf::as_path),
            _ => None,
        }
    }

    /// Whether the image that was written is still sound: a benchmark of a backend that breaks images would be
    /// worthless.
    ///
    /// # Errors
    /// That it is not.
    pub fn check(&self) -> Result<(), String> {
        match self.qcow2() {
            Some(image) if !is_sound(image) => Err("it left a broken image".to_owned()),
            _ => Ok(()),
        }
    }
}

/// The images of one place, made as they are needed.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
    size: u64,
    /// On a disk: nothing of a new image stays in the page cache.
    flush: bool,
}

impl Images {
    /// In this directory, which is the caller's to remove.
    pub fn new(dir: &Path, size: u64, flush: bool) -> Self {
        Self {
            dir: dir.to_owned(),
            size,
            flush,
        }
    }

    /// Where they are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether files here can be opened past the page cache; tmpfs learned it late.
    pub fn direct(&self) -> bool {
        let probe = self.dir.join("probe");
        let opened = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(libc::O_DIRECT)
            .open(&probe);
        let _ = fs::remove_file(&probe);
        opened.is_ok()
    }

    /// Makes what stays the same for all loads of a layer, and the disk itself where that does.
    ///
    /// # Errors
    /// What failed, in words.
    pub fn make(&self, kind: Kind) -> Result<Disk, String> {
        let image = self.dir.join("image");
        match kind {
            Kind::Null => return Ok(Disk::Null(self.size)),
            Kind::Nvme => return Err("a namespace is no image".to_owned()),
            Kind::Raw => {
                self.data(&image)?;
                return Ok(Disk::Raw(image));
            }
            Kind::Full => self.full(&image)?,
            Kind::Fresh => self.create(&image, None)?,
            Kind::OverlayRaw | Kind::OverlayQcow2 => return self.overlay(kind, &image),
            Kind::Chain(length) => return self.chain(length),
        }
        self.settle(&image)?;
        Ok(Disk::Qcow2 {
            base: None,
            images: vec![image],
        })
    }

    fn overlay(&self, kind: Kind, image: &Path) -> Result<Disk, String> {
        let base = self.dir.join("base");
        let raw = kind == Kind::OverlayRaw;
        if !base.exists() {
            if raw {
                self.data(&base)?
            } else {
                self.full(&base)?
            }
            self.settle(&base)?;
        }
        self.create(image, Some((&base, if raw { "raw" } else { "qcow2" })))?;
        self.settle(image)?;
        Ok(if raw {
            Disk::Qcow2 {
                base: Some(base),
                images: vec![image.to_owned()],
            }
        } else {
            Disk::Qcow2 {
                base: None,
                images: vec![base, image.to_owned()],
            }
        })
    }

    fn chain(&self, length: u32) -> Result<Disk, String> {
        let mut images: Vec<PathBuf> = Vec::new();
        for level in 0..length {
            let image = self.dir.join(format!("level-{level}"));
            match images.last() {
                None => self.full(&image)?,
                Some(below) => {
                    self.create(&image, Some((below, "qcow2")))?;
                    self.write_some(&image, level)?;
                }
            }
            self.settle(&image)?;
            images.push(image);
        }
        Ok(Disk::Qcow2 { base: None, images })
    }

    /// Removes all files that were made here.
    pub fn clear(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
    }

    /// A file without holes and without anything to compress.
    fn data(&self, path: &Path) -> Result<(), String> {
        let write = || -> std::io::Result<()> {
            let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
            let mut random = 0x9e37_79b9_7f4a_7c15_u64;
            for _ in 0..self.size / 8 {
                // xorshift64, by Marsaglia.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                file.write_all(&random.to_le_bytes())?;
            }
            file.flush()
        };
        write().map_err(|error| format!("{}: {error}", path.display()))?;
        self.settle(path)
    }

    /// All clusters allocated and written.
    fn full(&self, path: &Path) -> Result<(), String> {
        let raw = path.with_extension("raw");
        self.data(&raw)?;
        let size = self.size.to_string();
        let made = qemu_img(&[
            "create".as_ref(),
            "-q".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            "-o".as_ref(),
            "preallocation=metadata".as_ref(),
            path.as_os_str(),
            size.as_ref(),
        ])
        .and_then(|()| {
            qemu_img(&[
                "convert".as_ref(),
                "-q".as_ref(),
                "-n".as_ref(),
                "-f".as_ref(),
                "raw".as_ref(),
                "-O".as_ref(),
                "qcow2".as_ref(),
                raw.as_os_str(),
                path.as_os_str(),
            ])
        });
        let _ = fs::remove_file(&raw);
        made
    }

    /// Without any cluster.
    fn create(&self, path: &Path, base: Option<(&Path, &str)>) -> Result<(), String> {
        create_qcow2(path, self.size, base)
    }

    /// A 16th of the clusters, scattered, others on each level.
    fn write_some(&self, path: &Path, level: u32) -> Result<(), String> {
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2", "--cache=unsafe"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| format!("qemu-io: {error}"))?;
        let mut commands = String::new();
        for index in clusters_of(level, self.size / CLUSTER) {
            commands += &format!("write -q -P {} {} 64k\n", level + 1, index * CLUSTER);
        }
        let written = match child.stdin.take() {
            Some(mut stdin) => stdin.write_all(commands.as_bytes()),
            None => Ok(()),
        };
        let status = child.wait().map_err(|error| format!("qemu-io: {error}"))?;
        match written {
            Ok(()) if status.success() => Ok(()),
            Ok(()) => Err(format!("qemu-io on {}: {status}", path.display())),
            Err(error) => Err(format!("qemu-io on {}: {error}", path.display())),
        }
    }

    /// Pages left in the page cache would have to be written or thrown out under the first O_DIRECT requests,
    /// which io_uring then hands to a thread.
    fn settle(&self, path: &Path) -> Result<(), String> {
        if !self.flush {
            return Ok(());
        }
        use std::os::fd::AsRawFd;
        let settle = || -> std::io::Result<()> {
            let file = File::open(path)?;
            file.sync_all()?;
            // SAFETY: an open descriptor and integers. Advice that is not taken is no error.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            Ok(())
        };
        settle().map_err(|error| format!("{}: {error}", path.display()))
    }
}

/// Which clusters of so many a level above the lowest has: those that a hash gives to it, a 16th.
fn clusters_of(level: u32, clusters: u64) -> impl Iterator<Item = u64> {
    (0..clusters).filter(move |index| {
        let key = (index << 8) | u64::from(level);
        key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60 == 0
    })
}

/// Makes an empty qcow2 image, over a base if one is given with its format.
///
/// # Errors
/// That of qemu-img, in words.
pub fn create_qcow2(path: &Path, size: u64, base: Option<(&Path, &str)>) -> Result<(), String> {
    let size = size.to_string();
    let mut args = vec![
        "create".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
    ];
    if let Some((base, format)) = base {
        args.extend([
            "-b".as_ref(),
            base.as_os_str(),
            "-F".as_ref(),
            format.as_ref(),
        ]);
    }
    args.extend([path.as_os_str(), size.as_ref()]);
    qemu_img(&args)
}

/// Runs qemu-img.
///
/// # Errors
/// What it says.
pub fn qemu_img(args: &[&std::ffi::OsStr]) -> Result<(), String> {
    let output = Command::new("qemu-img")
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("qemu-img: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!(
        "qemu-img {}: {}",
        args[0].to_string_lossy(),
        said.trim()
    ))
}

/// Whether `qemu-img check` finds nothing worse than leaked clusters (status 3).
fn is_sound(image: &Path) -> bool {
    let check = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2"])
        .arg(image)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    check.is_ok_and(|status| matches!(status.code(), Some(0 | 3)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_has_a_name_of_its_own_and_is_found_by_it() {
        for layer in Layer::all() {
            assert_eq!(Layer::parse(&layer.name()), Some(layer));
        }
        assert_eq!(
            Layer::parse("overlay-raw-shm").unwrap().kind,
            Kind::OverlayRaw
        );
        assert_eq!(Layer::parse("chain-3-shm"), None);
    }

    #[test]
    fn a_level_has_about_a_16th_of_the_clusters_and_others_than_its_neighbour() {
        let (first, second): (Vec<_>, Vec<_>) = (
            clusters_of(1, 16384).collect(),
            clusters_of(2, 16384).collect(),
        );
        for clusters in [&first, &second] {
            assert!((700..1400).contains(&clusters.len()), "{}", clusters.len());
        }
        let both = first.iter().filter(|index| second.contains(index)).count();
        assert!(both < 300, "{both}");
    }

    #[test]
    fn writes_to_a_disk_without_clusters_need_a_new_image_each_time() {
        let needs = |name: &str, load| Layer::parse(name).unwrap().needs_fresh_image(load);
        assert!(needs("fresh-shm", Load::Firstwrite));
        assert!(needs("chain-2-shm", Load::Randwrite));
        assert!(!needs("chain-2-shm", Load::Randread));
        assert!(!needs("raw-disk", Load::Randwrite));
    }
}
