//! What the user asks for: an image, its format, and how it is to be used.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::crypt::KeySpec;
use super::handed::HandedFiles;
use super::nvme_tcp::spec::NvmeOptions;
use super::nvme_tcp::uri::{Allowed, Uri};
use super::qcow2::OnDirty;

/// How an image's bytes make a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes are the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// A LUKS1 header, and behind it the disk's bytes encrypted.
    Luks,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Luks => "luks",
        })
    }
}

impl FromStr for Format {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "luks" => Ok(Self::Luks),
            _ => Err(format!(
                "format {name:?} is not known; raw, qcow2 and luks are"
            )),
        }
    }
}

/// Where a disk's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A regular file or a block device.
    File {
        /// Its name.
        path: PathBuf,
    },
    /// A remote namespace.
    Nvme(Uri),
    /// Nowhere: zeros.
    Null {
        /// Bytes.
        size: u64,
    },
}

/// Who keeps a copy of what is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// Nobody: O_DIRECT.
    None,
    /// The host's page cache; a flush makes it durable.
    Writeback,
    /// The host's page cache; every write is made durable before it completes.
    Writethrough,
}

impl std::str::FromStr for CacheMode {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            _ => Err(format!(
                "cache mode {name:?} is not known; none, writeback and writethrough are"
            )),
        }
    }
}

/// Memory for the mappings of a qcow2 image by default, in bytes: enough for 1 TiB in clusters of 64 KiB.
pub const DEFAULT_L2_CACHE: u64 = 72 << 20;

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// The top image.
    pub source: Source,
    /// The top image's format. Those below are what the images say.
    pub format: Format,
    /// No writes; the image is opened for reading only.
    pub read_only: bool,
    /// Caching of the top image.
    pub cache: CacheMode,
    /// Caching of the images below it.
    pub backing_cache: CacheMode,
    /// What to do with a qcow2 image that is to be written to and was not closed by its last writer.
    pub on_dirty: OnDirty,
    /// Directories and files that backing files may be in, besides the top image's own directory.
    pub allow_paths: Vec<PathBuf>,
    /// Remote namespaces that images may name as backing files; no others.
    pub allow_remote: Vec<Allowed>,
    /// How remote namespaces are connected, wherever they are in the chain.
    pub nvme: Arc<NvmeOptions>,
    /// What is read from below a qcow2 image that is written to is kept in it.
    pub copy_on_read: bool,
    /// The top image's external data file, instead of the one that the image names.
    pub data_file: Option<PathBuf>,
    /// Discards are passed on; else they do nothing.
    pub discard: bool,
    /// Memory for cached qcow2 mappings, bytes an image. Taken as they are loaded.
    pub l2_cache_bytes: u64,
    /// The keys of encrypted images, in the chain at any depth.
    pub keys: Vec<KeySpec>,
    /// Files of the disk that another process has handed over, with their locks.
    pub handed: Arc<HandedFiles>,
}

impl DiskSpec {
    /// `source` with the usual: writable, past the page cache, backing files through it, discards passed
    /// on, mappings as far as [`DEFAULT_L2_CACHE`] reaches.
    pub fn new(source: Source, format: Format) -> Self {
        Self {
            source,
            format,
            read_only: false,
            cache: CacheMode::None,
            backing_cache: CacheMode::Writeback,
            on_dirty: OnDirty::default(),
            allow_paths: Vec::new(),
            allow_remote: Vec::new(),
            nvme: Arc::default(),
            copy_on_read: false,
            data_file: None,
            discard: true,
            l2_cache_bytes: DEFAULT_L2_CACHE,
            keys: Vec::new(),
            handed: Arc::default(),
        }
    }
}
