//! `virtioblkd info`: what an image is, by its header.
//!
//! The JSON has the keys of `qemu-img info` where that has them, with the same meaning, so that scripts can
//! use either; `docs/configuration.md` lists them. Names in an image are untrusted: the text for people
//! shows control characters escaped.

mod text;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use crate::block::crypt::luks;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::nvme_tcp::uri::is_remote;
use crate::block::qcow2::Header;
use crate::block::qcow2::bitmaps::{self, Bitmap};
use crate::block::qcow2::header::{Compression, Encryption, autoclear, compatible, incompatible};
use crate::block::qcow2::snapshots::{self, Snapshot};
use crate::block::{FileOptions, FileStorage, MAX_DEPTH, Role, Storage, resolve_backing};
use crate::config::Format;
use crate::reactor::{Epochs, Io, IoConfig};

/// Operations in flight.
const ENTRIES: u32 = 16;

/// Options of `virtioblkd info`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct InfoArgs {
    /// The image
    pub image: PathBuf,

    /// Format of the image; it is never guessed
    #[arg(short = 'f', long, value_enum, default_value = "raw")]
    pub format: Format,

    /// How to write the result
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,

    /// Tell of the images below it, too
    #[arg(long)]
    pub backing_chain: bool,

    /// Another directory that images below it may be in; can be repeated
    #[arg(long, value_name = "DIR", requires = "backing_chain")]
    pub allow_path: Vec<PathBuf>,

    /// Look also at an image that somebody writes to; what is told may be out of date
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

/// How a result is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Human,
    /// For programs, with the keys of `qemu-img info`.
    Json,
}

/// What is told of one image.
#[derive(Debug)]
struct Info {
    path: PathBuf,
    format: Format,
    /// Bytes of the disk.
    virtual_size: u64,
    /// Bytes that the file takes.
    disk_size: u64,
    /// Not of a raw image.
    qcow2: Option<Qcow2Info>,
}

#[derive(Debug)]
struct Qcow2Info {
    header: Header,
    snapshots: Vec<Snapshot>,
    bitmaps: Vec<Bitmap>,
    /// The backing file's path as a name from here, or its URI; none where it is neither.
    backing: Option<PathBuf>,
}

/// Does what `args` ask for. The result goes to stdout, failures to stderr.
pub fn run(args: &InfoArgs) -> ExitCode {
    match gather(args) {
        Ok(images) => {
            println!("{}", show(args, &images));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("virtioblkd: info failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(args: &InfoArgs, images: &[Info]) -> String {
    match (args.output, args.backing_chain) {
        (Output::Human, _) => {
            let all: Vec<String> = images.iter().map(text::of).collect();
            all.join("\n\n")
        }
        (Output::Json, false) => {
            let one = images.first().map(Info::json);
            format!("{:#}", one.unwrap_or_default())
        }
        (Output::Json, true) => {
            let all: Vec<Value> = images.iter().map(Info::json).collect();
            format!("{:#}", Value::from(all))
        }
    }
}

fn gather(args: &InfoArgs) -> Result<Vec<Info>> {
    let io = Io::new(&IoConfig {
        worker: 0,
        entries: ENTRIES,
        epochs: Epochs::new(),
    })
    .map_err(|error| Error::io(&args.image, "set up io_uring", None, error))?;
    let told = io.block_on(async {
        let mut images = vec![look(&io, &args.image, args.format, args.force_share).await?];
        while let Some((image, below)) = args
            .backing_chain
            .then_some(images.as_slice())
            .and_then(next)
        {
            let (path, format) =
                resolve_backing(&args.image, &args.allow_path, &image.path, below)?;
            if images.len() == MAX_DEPTH {
                let what = format!("more than {MAX_DEPTH} images in a chain, or a loop of them");
                return Err(Error::image(ErrorKind::Unsupported, &path, None, what));
            }
            let format = match format {
                crate::block::Format::Raw => Format::Raw,
                crate::block::Format::Qcow2 => Format::Qcow2,
                crate::block::Format::Luks => Format::Luks,
            };
            images.push(look(&io, &path, format, args.force_share).await?);
        }
        Ok(images)
    });
    io.close();
    told
}

/// The last image of a chain, and what it names below it, unless that is remote: nothing is connected.
fn next(images: &[Info]) -> Option<(&Info, &crate::block::qcow2::BackingName)> {
    let image = images.last()?;
    let below = image.qcow2.as_ref()?.header.backing.as_ref()?;
    (!is_remote(&below.name)).then_some((image, below))
}

async fn look(io: &Io, path: &Path, format: Format, force_share: bool) -> Result<Info> {
    let options = FileOptions {
        read_only: true,
        direct: false,
    };
    let file = FileStorage::open(path, options)?;
    let metadata = std::fs::metadata(path)
        .map_err(|error| Error::io(path, "look at the file", None, error))?;
    let storage = Storage::File(file);
    if !force_share {
        let locked = storage.lock(Role::Reader);
        locked.map_err(|error| error.hint("or look at it as it is with: --force-share"))?;
    }
    let qcow2 = match format {
        Format::Raw => {
            let mut first = io.buf(storage.limits().io_align.max(512));
            storage.read(io, 0, first.sg()).await?;
            if first.starts_with(b"QFI\xfb") {
                eprintln!(
                    "virtioblkd: {} begins like a qcow2 image: if it is one, say --format qcow2",
                    path.display()
                );
            }
            None
        }
        Format::Luks => None,
        Format::Qcow2 => {
            let header = Header::read(io, &storage).await?;
            Some(Qcow2Info {
                snapshots: snapshots::list(io, &storage, &header).await?,
                bitmaps: bitmaps::list(io, &storage, &header).await?,
                backing: header.backing.as_ref().and_then(|backing| {
                    if is_remote(&backing.name) {
                        return Some(PathBuf::from(&backing.name));
                    }
                    let name = backing.name.strip_prefix("file:").unwrap_or(&backing.name);
                    let is_path = !name.contains(':') || name.starts_with(['/', '.']);
                    is_path.then(|| path.parent().unwrap_or(Path::new("")).join(name))
                }),
                header,
            })
        }
    };
    Ok(Info {
        path: path.to_owned(),
        format,
        virtual_size: match (&qcow2, format) {
            (Some(image), _) => image.header.size,
            (None, Format::Luks) => {
                let header = luks::Header::read(io, &storage).await?;
                storage.len().saturating_sub(header.payload())
            }
            (None, _) => storage.len(),
        },
        disk_size: metadata.blocks() * 512,
        qcow2,
    })
}

/// The names of the bits that are set; bits without a name by their number.
fn names(bits: u64, known: &[(u64, &str)]) -> Vec<String> {
    (0..64)
        .map(|n| (n, 1u64 << n))
        .filter(|(_, bit)| bits & bit != 0)
        .map(|(n, bit)| {
            let known = known.iter().find(|known| known.0 == bit);
            known.map_or_else(|| format!("bit {n}"), |known| known.1.to_owned())
        })
        .collect()
}

impl Qcow2Info {
    fn incompatible(&self) -> Vec<String> {
        let known = [
            (incompatible::DIRTY, "dirty bit"),
            (incompatible::CORRUPT, "corrupt bit"),
            (incompatible::EXTERNAL_DATA, "external data file"),
            (incompatible::COMPRESSION, "compression type"),
            (incompatible::EXTENDED_L2, "extended L2 entries"),
        ];
        names(self.header.incompatible, &known)
    }

    fn compatible(&self) -> Vec<String> {
        let known = [(compatible::LAZY_REFCOUNTS, "lazy refcounts")];
        names(self.header.compatible, &known)
    }

    fn autoclear(&self) -> Vec<String> {
        let known = [
            (autoclear::BITMAPS, "bitmaps"),
            (autoclear::RAW_EXTERNAL, "raw external data"),
            (autoclear::ARENAS, "not closed by virtioblkd"),
        ];
        names(self.header.autoclear, &known)
    }

    fn compression(&self) -> &'static str {
        match self.header.compression {
            Compression::Deflate => "zlib",
            Compression::Zstd => "zstd",
        }
    }

    fn encryption(&self) -> Option<&'static str> {
        match self.header.encryption {
            Encryption::None => None,
            Encryption::Aes => Some("aes"),
            Encryption::Luks(_) => Some("luks"),
        }
    }
}

impl Info {
    fn json(&self) -> Value {
        let mut all = Map::new();
        let mut put = |key: &str, value: Value| {
            all.insert(key.to_owned(), value);
        };
        put("filename", self.path.display().to_string().into());
        put("format", text::word(self.format).into());
        put("virtual-size", self.virtual_size.into());
        put("actual-size", self.disk_size.into());
        let Some(image) = &self.qcow2 else {
            return Value::from(all);
        };
        let header = &image.header;
        put("cluster-size", header.geometry.cluster_size().into());
        put("dirty-flag", header.has(incompatible::DIRTY).into());
        if image.encryption().is_some() {
            put("encrypted", true.into());
        }
        if let Some(backing) = &header.backing {
            put("backing-filename", backing.name.clone().into());
            if let Some(format) = &backing.format {
                put("backing-filename-format", format.clone().into());
            }
            if let Some(path) = &image.backing {
                put("full-backing-filename", path.display().to_string().into());
            }
        }
        if !image.snapshots.is_empty() {
            put("snapshots", image.snapshots.iter().map(snapshot).collect());
        }
        let mut data = json!({
            "compat": if header.version == 2 { "0.10" } else { "1.1" },
            "compression-type": image.compression(),
            "refcount-bits": header.geometry.refcount_bits(),
            "bitmap-count": image.bitmaps.len(),
            "incompatible-features": image.incompatible(),
            "compatible-features": image.compatible(),
            "autoclear-features": image.autoclear(),
        });
        if header.version > 2 {
            data["lazy-refcounts"] = (header.compatible & compatible::LAZY_REFCOUNTS != 0).into();
            data["corrupt"] = header.has(incompatible::CORRUPT).into();
            data["extended-l2"] = header.geometry.extended_l2.into();
        }
        if let Some(name) = &header.data_file {
            data["data-file"] = name.clone().into();
            data["data-file-raw"] = (header.autoclear & autoclear::RAW_EXTERNAL != 0).into();
        }
        if !image.bitmaps.is_empty() {
            data["bitmaps"] = image.bitmaps.iter().map(bitmap).collect();
        }
        if let Some(format) = image.encryption() {
            data["encrypt"] = json!({ "format": format });
        }
        put("format-specific", json!({ "type": "qcow2", "data": data }));
        Value::from(all)
    }
}

fn bitmap(bitmap: &Bitmap) -> Value {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    let set = flags.iter().filter(|flag| flag.0).map(|flag| flag.1);
    json!({
        "name": bitmap.name,
        "granularity": bitmap.granularity,
        "flags": set.collect::<Vec<_>>(),
    })
}

fn snapshot(snapshot: &Snapshot) -> Value {
    const SECOND: u64 = 1_000_000_000;
    let mut value = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "virtual-size": snapshot.disk_bytes,
        "vm-state-size": snapshot.vm_state_bytes,
        "date-sec": snapshot.date_secs,
        "date-nsec": snapshot.date_nanos,
        "vm-clock-sec": snapshot.vm_clock_nanos / SECOND,
        "vm-clock-nsec": snapshot.vm_clock_nanos % SECOND,
    });
    if let Some(count) = snapshot.icount {
        value["icount"] = count.into();
    }
    value
}

#[cfg(test)]
#[path = "info_tests.rs"]
mod tests;
