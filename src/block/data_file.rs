//! External data files of qcow2 images: which are opened, and how.
//!
//! (qcow2.rst, "External data file".) The same rules hold as for backing files: only what the user allowed,
//! and no format but raw. A name is looked up from the image's own folder (QEMU looks from its working
//! directory, which says nothing about the image).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Allowed, Link, beside, not_allowed, open_raw};
use super::error::{Error, ErrorKind, Result};
use super::file::{FileOptions, FileStorage};
use super::spec::{CacheMode, DiskSpec};
use super::storage::Storage;

/// An image's data file, open.
#[derive(Debug)]
pub(super) struct DataFile {
    pub(super) storage: Arc<Storage>,
    /// The name that led to it.
    pub(super) named: PathBuf,
}

/// Opens the data file of the last of `links`, if it has one.
pub(super) fn open(links: &mut [Link], spec: &DiskSpec, allowed: &Allowed) -> Result<()> {
    let Some((link, above)) = links.split_last_mut() else {
        return Ok(());
    };
    let top = above.is_empty();
    let chosen = spec.data_file.as_deref().filter(|_| top);
    let Some(name) = &link.data_name else {
        return match chosen {
            None => Ok(()),
            Some(_) => {
                let what = "has no external data file; leave data-file out";
                Err(Error::image(
                    ErrorKind::InvalidImage,
                    &link.named,
                    None,
                    what,
                ))
            }
        };
    };
    let named = match chosen {
        Some(path) => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        None => named(&link.named, name)?,
    };
    let real = std::fs::canonicalize(&named).map_err(|error| {
        Error::io(&link.named, "look up the external data file", None, error).hint(format_args!(
            "its data is in {name:?}, that is {}; say where it is with data-file=PATH",
            named.display()
        ))
    })?;
    // What the user has named is allowed; what an image names has to be.
    let is_allowed = |real: &Path| chosen.is_some() || allowed.allows(&link.named, real);
    let refused = |real: &Path| not_allowed(&link.named, "external data file", name, real);
    if !is_allowed(&real) {
        return Err(refused(&real));
    }
    let storage = match top {
        true => open_raw(&real, spec, true)?,
        false => {
            let options = FileOptions {
                read_only: true,
                direct: spec.backing_cache == CacheMode::None,
            };
            FileStorage::open_with(&real, options, &spec.handed)?
        }
    };
    // A link may have been put in the way since the name was looked up.
    if let Some(opened) = storage.real_path().filter(|opened| !is_allowed(opened)) {
        return Err(refused(&opened));
    }
    let identity = storage.identity();
    if link.holds(identity) || above.iter().any(|other| other.holds(identity)) {
        let message = format!(
            "its external data file {} is an image of the disk already",
            named.display()
        );
        return Err(Error::image(
            ErrorKind::InvalidImage,
            &link.named,
            None,
            message,
        ));
    }
    link.data = Some(DataFile {
        storage: Arc::new(Storage::File(storage)),
        named,
    });
    Ok(())
}

fn named(image: &Path, name: &str) -> Result<PathBuf> {
    if name.is_empty() {
        let what = "its data is in an external file, and it does not say in which; say it with data-file=PATH";
        return Err(Error::image(ErrorKind::InvalidImage, image, None, what));
    }
    beside(image, "external data file", name)
}
