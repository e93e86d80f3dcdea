//! Opening an image and everything below it: which names are followed, and where to.
//!
//! An image is untrusted input, so the name it gives for its backing file opens only what the user
//! allowed, in the format that the image states. Nothing is probed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::reactor::Io;

use super::crypt::luks::Place;
use super::crypt::{Keys, Unlocked};
use super::data_file::{self, DataFile};
use super::error::{Error, ErrorKind, Result};
use super::file::{FileOptions, FileStorage};
use super::null::NullStorage;
use super::nvme_tcp::link::Namespace;
use super::nvme_tcp::remote::{self, Remote};
use super::nvme_tcp::uri;
use super::qcow2::{BackingName, Header};
use super::spec::{CacheMode, DiskSpec, Format, Source};
use super::storage::Storage;

/// Images in a chain, at most.
pub const MAX_DEPTH: usize = 256;

/// One image of a chain.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) storage: Arc<Storage>,
    /// What that is, if it is remote.
    pub(super) remote: Option<Arc<Namespace>>,
    pub(super) format: Format,
    /// The name it was opened by: relative names in it start from here.
    pub(super) named: PathBuf,
    /// What the header said when it was read.
    pub(super) backing: Option<BackingName>,
    /// The external data file's name in the header; empty: the user has to say it.
    pub(super) data_name: Option<String>,
    /// That file.
    pub(super) data: Option<DataFile>,
    /// Bytes of its disk, then.
    pub(super) size: u64,
    /// Bytes of a cluster; raw: none.
    pub(super) cluster: Option<u64>,
    /// The key of an encrypted image, by the header that was read last.
    key: Mutex<Option<Arc<Unlocked>>>,
}

/// What an image's headers say now.
#[derive(Debug)]
pub(super) struct Now {
    /// Of a qcow2 image.
    pub(super) header: Option<Header>,
    /// Of an encrypted image.
    pub(super) key: Option<Arc<Unlocked>>,
    /// The chain below is what it was.
    pub(super) same: bool,
}

impl Link {
    /// True if one of its files is the one of this identity.
    pub(super) fn holds(&self, identity: (u64, u64)) -> bool {
        let is_it = |storage: &Storage| matches!(storage, Storage::File(file) if file.identity() == identity);
        is_it(&self.storage) || self.data.as_ref().is_some_and(|data| is_it(&data.storage))
    }

    /// True if it is this namespace, by whichever name and path.
    fn is_namespace(&self, other: &Namespace) -> bool {
        let identity = |namespace: &Namespace| namespace.geometry().identity;
        let own = self.remote.as_deref().map(identity);
        own == Some(identity(other))
    }

    /// True if its names still lead to the files that are open, or if that cannot be told.
    pub(super) fn is_current(&self) -> bool {
        let leads_to = |named: &Path, storage: &Storage| {
            let Storage::File(file) = storage else {
                return true;
            };
            match FileStorage::identity_of(named) {
                Ok(now) => now == file.identity(),
                // Behind a sandbox names may be out of reach; a name that is gone is another matter.
                Err(error) => error.kind() != std::io::ErrorKind::NotFound,
            }
        };
        let data = self.data.as_ref();
        leads_to(&self.named, &self.storage)
            && data.is_none_or(|data| leads_to(&data.named, &data.storage))
    }

    /// Where its guest data is stored.
    pub(super) fn data_storage(&self) -> &Arc<Storage> {
        self.data
            .as_ref()
            .map_or(&self.storage, |data| &data.storage)
    }

    /// Reads the headers again.
    pub(super) async fn reread(&self, io: &Io, keys: &Keys) -> Result<Now> {
        if let Some(namespace) = &self.remote {
            remote::check_present(namespace)?;
        }
        self.storage.refresh()?;
        self.data_storage().refresh()?;
        let mut now = Now {
            header: None,
            key: None,
            same: true,
        };
        if self.format == Format::Qcow2 {
            let header = Header::read(io, &self.storage).await?;
            now.same = header.backing == self.backing && header.data_file == self.data_name;
            now.header = Some(header);
        }
        let lock = || self.key.lock().unwrap_or_else(PoisonError::into_inner);
        let known = lock().clone();
        let header = now.header.as_ref();
        now.key = unlock(io, &self.storage, self.format, header, keys, known).await?;
        lock().clone_from(&now.key);
        Ok(now)
    }
}

/// The key of an image that is encrypted, by the header of its encryption as it is now.
async fn unlock(
    io: &Io,
    storage: &Storage,
    format: Format,
    header: Option<&Header>,
    keys: &Keys,
    known: Option<Arc<Unlocked>>,
) -> Result<Option<Arc<Unlocked>>> {
    let place = match (format, header) {
        (Format::Luks, _) => Some(Place {
            offset: 0,
            len: storage.len(),
        }),
        (_, Some(header)) => header.luks(storage.len())?,
        _ => None,
    };
    let Some(place) = place else {
        return Ok(None);
    };
    let key = Unlocked::open(io, storage, place, keys, known).await?;
    Ok(Some(key))
}

/// Opens the image of `spec` and what it names, top first. Headers are read, nothing is locked. A namespace that one
/// of `known` is connected to is not connected again.
pub(super) async fn open(
    io: &Io,
    spec: &DiskSpec,
    keys: &Keys,
    known: &[Link],
) -> Result<Vec<Link>> {
    let top = match &spec.source {
        Source::Null { size } => {
            let storage = Storage::Null(NullStorage::new(*size, spec.read_only));
            let name = PathBuf::from(NullStorage::NAME);
            return Ok(vec![
                link(io, storage.into(), Format::Raw, name, keys).await?,
            ]);
        }
        Source::Nvme(uri) => {
            let remote = remote::open_top(uri, spec, known_namespace(known, uri))?;
            let name = PathBuf::from(uri.to_string());
            return Ok(vec![
                link(io, remote.into(), spec.format, name, keys).await?,
            ]);
        }
        Source::File { path } => path,
    };
    let allowed = Allowed::new(top, &spec.allow_paths)?;
    let storage = open_top(top, spec)?;
    // Whatever becomes the working directory, the name leads to the same place.
    let named = std::path::absolute(top).unwrap_or_else(|_| top.clone());
    let mut links: Vec<Link> = vec![link(io, storage.into(), spec.format, named, keys).await?];
    data_file::open(&mut links, spec, &allowed)?;
    while let Some(Link {
        named,
        backing: Some(backing),
        ..
    }) = links.last()
    {
        let format = backing_format(named, backing)?;
        if links.len() == MAX_DEPTH {
            let message = format!(
                "more than {MAX_DEPTH} images in a chain of backing files; `qemu-img commit` or \
                 `qemu-img rebase` make it shorter"
            );
            return Err(Error::image(ErrorKind::Unsupported, top, None, message));
        }
        let (opened, name) = match uri::is_remote(&backing.name) {
            true => open_namespace(spec, &links, backing, known)?,
            false => open_file(spec, &links, backing, &allowed)?,
        };
        let next = link(io, opened, format, name, keys).await?;
        links.push(next);
        data_file::open(&mut links, spec, &allowed)?;
    }
    Ok(links)
}

/// Opens the file that the last of `links` names as its backing file.
fn open_file(
    spec: &DiskSpec,
    links: &[Link],
    backing: &BackingName,
    allowed: &Allowed,
) -> Result<(Opened, PathBuf)> {
    let named = links.last().map_or(Path::new(""), |link| &link.named);
    let name = beside(named, "backing file", &backing.name)?;
    let real =
        std::fs::canonicalize(&name).map_err(|error| missing(links, backing, &name, error))?;
    let is_allowed = |real: &Path| allowed.allows(named, real);
    if !is_allowed(&real) {
        return Err(not_allowed(named, "backing file", &backing.name, &real));
    }
    let options = FileOptions {
        read_only: true,
        direct: spec.backing_cache == CacheMode::None,
    };
    let storage = FileStorage::open_with(&real, options, &spec.handed)?;
    // A link may have been put in the way since the name was looked up.
    if let Some(opened) = storage.real_path().filter(|opened| !is_allowed(opened)) {
        return Err(not_allowed(named, "backing file", &backing.name, &opened));
    }
    if links.iter().any(|other| other.holds(storage.identity())) {
        return Err(a_loop(links, &name));
    }
    Ok((Storage::File(storage).into(), name))
}

/// Connects the namespace that the last of `links` names as its backing file, unless one of `known` is connected to
/// it.
fn open_namespace(
    spec: &DiskSpec,
    links: &[Link],
    backing: &BackingName,
    known: &[Link],
) -> Result<(Opened, PathBuf)> {
    let image = links.last().map_or(Path::new(""), |link| &link.named);
    let uri = remote::backing_uri(image, &backing.name, &spec.allow_remote)?;
    let name = PathBuf::from(uri.to_string());
    let remote = remote::open_backing(image, &uri, spec, known_namespace(known, &uri))?;
    if links
        .iter()
        .any(|link| link.is_namespace(&remote.namespace))
    {
        return Err(a_loop(links, &name));
    }
    Ok((remote.into(), name))
}

/// The namespace of this name, if a chain has it open.
fn known_namespace(known: &[Link], uri: &uri::Uri) -> Option<Remote> {
    known.iter().find_map(|link| {
        let namespace = link.remote.as_ref()?;
        let is_it = namespace.spec().uri() == *uri && remote::check_present(namespace).is_ok();
        is_it.then(|| Remote {
            storage: link.storage.clone(),
            namespace: namespace.clone(),
        })
    })
}

fn a_loop(links: &[Link], name: &Path) -> Error {
    let top = links.first().map_or(Path::new(""), |link| &link.named);
    let message = format!(
        "a loop of backing files: {} → {}",
        names(links),
        name.display()
    );
    Error::image(ErrorKind::InvalidImage, top, None, message)
}

/// What a link is made of.
struct Opened {
    storage: Arc<Storage>,
    remote: Option<Arc<Namespace>>,
}

impl From<Storage> for Opened {
    fn from(storage: Storage) -> Self {
        Self {
            storage: Arc::new(storage),
            remote: None,
        }
    }
}

impl From<Remote> for Opened {
    fn from(remote: Remote) -> Self {
        Self {
            storage: remote.storage,
            remote: Some(remote.namespace),
        }
    }
}

async fn link(
    io: &Io,
    opened: Opened,
    format: Format,
    named: PathBuf,
    keys: &Keys,
) -> Result<Link> {
    let Opened { storage, remote } = opened;
    let header = match format {
        Format::Qcow2 => Some(Header::read(io, &storage).await?),
        Format::Raw | Format::Luks => None,
    };
    // Now, not when a VM waits for it: it takes seconds, and the key may be wrong.
    let key = unlock(io, &storage, format, header.as_ref(), keys, None).await?;
    let (size, backing, data_name, cluster) = match (header, &key) {
        (Some(header), _) => {
            header.check_supported()?;
            let cluster = header.geometry.cluster_size();
            (header.size, header.backing, header.data_file, Some(cluster))
        }
        (None, Some(key)) => (payload_len(&storage, key)?, None, None, None),
        (None, None) => {
            warn_of_qcow2(io, &storage).await?;
            (storage.len(), None, None, None)
        }
    };
    Ok(Link {
        storage,
        remote,
        format,
        named,
        backing,
        data_name,
        data: None,
        size,
        cluster,
        key: Mutex::new(key),
    })
}

/// Bytes of the disk in a LUKS file.
pub(super) fn payload_len(storage: &Storage, key: &Unlocked) -> Result<u64> {
    storage.len().checked_sub(key.payload()).ok_or_else(|| {
        let what = format!(
            "the payload of the LUKS header begins at {:#x}, beyond the end of the file",
            key.payload()
        );
        Error::image(ErrorKind::InvalidImage, storage.path(), None, what)
    })
}

fn open_top(path: &Path, spec: &DiskSpec) -> Result<Storage> {
    let storage = open_raw(path, spec, spec.format != Format::Qcow2)?;
    Ok(Storage::File(storage))
}

/// Opens a file of the top image. With `raw` its bytes are a disk's, and it must not grow.
pub(super) fn open_raw(path: &Path, spec: &DiskSpec, raw: bool) -> Result<FileStorage> {
    let mut options = FileOptions {
        read_only: spec.read_only,
        direct: spec.cache == CacheMode::None,
    };
    let mut storage = FileStorage::open_with(path, options, &spec.handed)?;
    let limits = *storage.limits();
    let in_part = storage.len() % limits.io_align as u64 != 0;
    if in_part && !spec.read_only && raw {
        // Past the page cache only whole blocks can be written: the file would grow.
        log::warn!(
            "{}: its size, {} bytes, is no multiple of {}: going through the page cache instead of \
             O_DIRECT (`truncate -s %{} {0}` makes it one)",
            path.display(),
            storage.len(),
            limits.io_align,
            limits.io_align,
        );
        options.direct = false;
        storage = FileStorage::open_with(path, options, &spec.handed)?;
    }
    Ok(storage)
}

async fn warn_of_qcow2(io: &Io, storage: &Storage) -> Result<()> {
    if matches!(storage, Storage::Null(_)) {
        return Ok(());
    }
    let mut first = io.buf(storage.limits().io_align.max(512));
    storage.read(io, 0, first.sg()).await?;
    if first.starts_with(b"QFI\xfb") {
        log::warn!(
            "{}: opened as raw, as told, but begins like a qcow2 image: if it is one, say format=qcow2 \
             (a backing file: `qemu-img rebase -u -F qcow2` on the image above it)",
            storage.path().display()
        );
    }
    Ok(())
}

/// Directories and files that the files which images name may be in, without symbolic links.
pub(super) struct Allowed {
    /// The top image's own folder.
    folder: PathBuf,
    paths: Vec<PathBuf>,
}

impl Allowed {
    fn new(top: &Path, allow_paths: &[PathBuf]) -> Result<Self> {
        let look_up = |path: &Path| {
            std::fs::canonicalize(path)
                .map_err(|e| Error::io(path, "look up an allowed path", None, e))
        };
        let folder = match top.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        Ok(Self {
            folder: look_up(folder)?,
            paths: allow_paths
                .iter()
                .map(|path| look_up(path))
                .collect::<Result<_>>()?,
        })
    }

    /// Whether `image` may name this file. The folder is for images that are files: what is in a namespace is written
    /// by whoever has the target, and by everybody on the way to it.
    pub(super) fn allows(&self, image: &Path, real: &Path) -> bool {
        (!is_remote(image) && real.starts_with(&self.folder))
            || self.paths.iter().any(|path| real.starts_with(path))
    }
}

fn is_remote(image: &Path) -> bool {
    image.to_str().is_some_and(uri::is_remote)
}

fn backing_format(image: &Path, backing: &BackingName) -> Result<Format> {
    let Some(format) = &backing.format else {
        return Err(Error::image(
            ErrorKind::NotAllowed,
            image,
            None,
            format_args!(
                "names the backing file {:?} but not its format, and formats are not guessed; state it \
                 with: qemu-img rebase -u -F raw|qcow2|luks -b '{}' '{}'",
                backing.name,
                backing.name,
                image.display()
            ),
        ));
    };
    format.parse().map_err(|error| {
        let message = format!("its backing file {:?}: {error}", backing.name);
        Error::image(ErrorKind::Unsupported, image, None, message)
    })
}

/// The backing file that `image`, of the chain of `top`, names, if it may be opened; and its format.
///
/// # Errors
/// Those of [`open`] that concern the name.
pub(crate) fn resolve_backing(
    top: &Path,
    allow_paths: &[PathBuf],
    image: &Path,
    backing: &BackingName,
) -> Result<(PathBuf, Format)> {
    let format = backing_format(image, backing)?;
    let name = beside(image, "backing file", &backing.name)?;
    let real = std::fs::canonicalize(&name)
        .map_err(|error| Error::io(&name, "look up the backing file", None, error))?;
    let allowed = Allowed::new(top, allow_paths)?;
    if !allowed.allows(image, &real) {
        return Err(not_allowed(image, "backing file", &backing.name, &real));
    }
    Ok((name, format))
}

/// The file that `image` means by the name of its backing file, or of another one (`what`).
pub(super) fn beside(image: &Path, what: &str, name: &str) -> Result<PathBuf> {
    let refuse = |text: String| Err(Error::image(ErrorKind::NotAllowed, image, None, text));
    if name.starts_with("json:") {
        return refuse(format!(
            "its {what} is given as json:{{…}}, which can name anything; give a plain file name with: {}",
            match what {
                "backing file" => "qemu-img rebase -u -F FORMAT -b NAME IMAGE",
                _ => "qemu-img amend -o data_file=NAME IMAGE",
            }
        ));
    }
    let name = name.strip_prefix("file:").unwrap_or(name);
    // As QEMU reads it: a colon before any slash ends a protocol's name.
    if let Some(colon) = name.find(':') {
        if !name[..colon].contains('/') {
            return refuse(format!(
                "its {what} {name:?} is on {:?}: only files and block devices are opened (a file whose \
                 name has a colon is written ./NAME)",
                &name[..colon]
            ));
        }
    }
    if name.is_empty() || name.contains('\0') {
        return refuse(format!("its {what}'s name {name:?} is none"));
    }
    if is_remote(image) && !name.starts_with('/') {
        return refuse(format!(
            "its {what} {name:?} is beside it, and a namespace has no folder; name it by its whole path"
        ));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(name))
}

fn missing(links: &[Link], backing: &BackingName, name: &Path, error: std::io::Error) -> Error {
    let image = links.last().map_or(Path::new(""), |link| &link.named);
    let told = Error::io(image, "look up the backing file", None, error);
    told.hint(format_args!(
        "it names {:?}, that is {}; chain: {} → {}",
        backing.name,
        name.display(),
        names(links),
        backing.name
    ))
}

pub(super) fn not_allowed(image: &Path, what: &str, name: &str, real: &Path) -> Error {
    let folder = real.parent().unwrap_or(real).display();
    let why = match is_remote(image) {
        true => "and what a namespace names is opened only where it is allowed",
        false => "outside the disk's own folder",
    };
    Error::image(
        ErrorKind::NotAllowed,
        image,
        None,
        format_args!(
            "its {what} {name:?} is {}, {why}; if that is meant, allow it with allow-path={folder}",
            real.display()
        ),
    )
}

fn names(links: &[Link]) -> String {
    let names: Vec<String> = links
        .iter()
        .map(|link| link.named.display().to_string())
        .collect();
    names.join(" → ")
}
