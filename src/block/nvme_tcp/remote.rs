//! A remote namespace as a part of a disk: which ones an image may name, and how they are opened.

use std::path::Path;
use std::sync::Arc;

use super::controller;
use super::link::{Namespace, NamespaceState};
use super::spec::NvmeSpec;
use super::storage::NvmeStorage;
use super::uri::{Allowed, SCHEME, Uri};
use crate::block::Storage;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::spec::{DiskSpec, Format};

/// A namespace that is connected.
#[derive(Clone, Debug)]
pub(in crate::block) struct Remote {
    /// Its bytes.
    pub(in crate::block) storage: Arc<Storage>,
    /// What is known of it.
    pub(in crate::block) namespace: Arc<Namespace>,
}

/// Connects a namespace. Blocks until one path to it works; the others follow.
fn open_storage(spec: NvmeSpec) -> Result<Remote> {
    #[cfg(test)]
    if let Some(remote) = testing::connect(&spec) {
        return Ok(remote);
    }
    let namespace = controller::open(spec)?;
    let storage = NvmeStorage::new(namespace.clone());
    Ok(Remote {
        storage: Arc::new(Storage::Nvme(Box::new(storage))),
        namespace,
    })
}

/// Opens the namespace that is the top of a disk; it is `known` if it is connected already.
///
/// # Errors
/// Those of connecting; [`ErrorKind::Unsupported`] for a format that cannot be there; [`ErrorKind::ReadOnly`] for a
/// namespace that is write-protected, of a disk that is not.
pub(in crate::block) fn open_top(
    uri: &Uri,
    spec: &DiskSpec,
    known: Option<Remote>,
) -> Result<Remote> {
    let refuse = |kind, what: &str| Err(Error::image(kind, uri.to_string(), None, what));
    if spec.format == Format::Qcow2 {
        let what = "a qcow2 image in a remote namespace is not served: it cannot grow there; make a local overlay \
                    over the namespace (qemu-img create -u -f qcow2 -F raw -b URI FILE SIZE), or serve it as raw";
        return refuse(ErrorKind::Unsupported, what);
    }
    let remote = match known {
        Some(remote) => remote,
        None => open_storage(uri.spec(spec.read_only, spec.nvme.clone()))?,
    };
    check_present(&remote.namespace)?;
    // A guest that finds its disk read-only fails later, and says less.
    if !spec.read_only && remote.namespace.state() == NamespaceState::WriteProtected {
        let what = "the namespace is write-protected; make the disk read-only (read-only), or end the protection at \
                    the target";
        return refuse(ErrorKind::ReadOnly, what);
    }
    Ok(remote)
}

/// Opens a namespace that an image names as its backing file.
///
/// # Errors
/// Those of connecting, with the image's name.
pub(in crate::block) fn open_backing(
    image: &Path,
    uri: &Uri,
    spec: &DiskSpec,
    known: Option<Remote>,
) -> Result<Remote> {
    let remote = match known {
        Some(remote) => remote,
        None => open_storage(uri.spec(true, spec.nvme.clone())).map_err(|error| {
            error.hint(format_args!(
                "it is the backing file of {}",
                image.display()
            ))
        })?,
    };
    check_present(&remote.namespace)?;
    Ok(remote)
}

/// The namespace that `image` means by the name of its backing file, if it may be connected.
///
/// # Errors
/// [`ErrorKind::NotAllowed`], also for a name that is none.
pub(in crate::block) fn backing_uri(image: &Path, name: &str, allowed: &[Allowed]) -> Result<Uri> {
    let uri: Uri = name.parse().map_err(|error| {
        let what = format!("its backing file's name begins with {SCHEME} and {error}");
        Error::image(ErrorKind::NotAllowed, image, None, what)
    })?;
    if uri.is_allowed(allowed) {
        return Ok(uri);
    }
    let what = format!(
        "its backing file is remote, {uri}, and an image connects to nothing that was not allowed; if that is meant, \
         allow it with allow-remote={}",
        uri.needs()
    );
    Err(Error::image(ErrorKind::NotAllowed, image, None, what))
}

/// Refuses a namespace that has gone.
///
/// # Errors
/// [`ErrorKind::NotFound`].
pub(in crate::block) fn check_present(namespace: &Namespace) -> Result<()> {
    match namespace.state() {
        NamespaceState::Present | NamespaceState::WriteProtected => Ok(()),
        NamespaceState::Removed => {
            let what = "the subsystem has this namespace no more, or has it with another identity or format; requests \
                        fail until the disk is started anew with one that exists";
            Err(Error::image(
                ErrorKind::NotFound,
                namespace.name(),
                None,
                what,
            ))
        }
    }
}

/// Looks at a namespace in use, and tells of what can be done no more.
///
/// # Errors
/// As [`check_present`].
pub(in crate::block) fn look_at(namespace: &Namespace) -> Result<()> {
    check_present(namespace)?;
    if namespace.state() == NamespaceState::WriteProtected && !namespace.spec().read_only {
        log::warn!(
            "{}: the namespace is write-protected now: writes fail until that is ended at the target",
            namespace.name().display()
        );
    }
    Ok(())
}

/// Namespaces without a network: what a test serves is found by the thread that serves it.
#[cfg(test)]
pub(crate) mod testing {
    use std::cell::RefCell;
    use std::path::PathBuf;

    use super::super::link::Geometry;
    use super::*;
    use crate::block::Limits;
    use crate::block::sim::{Sim, SimStorage};

    #[derive(Debug)]
    struct Served {
        subsystem: String,
        storage: Arc<Storage>,
        geometry: Geometry,
        state: NamespaceState,
        connected: Vec<Arc<Namespace>>,
    }

    thread_local! {
        static SERVED: RefCell<Vec<Served>> = const { RefCell::new(Vec::new()) };
    }

    /// What a namespace is made of, for [`serve`].
    pub(crate) fn geometry(block: u32, identity: u8) -> Geometry {
        Geometry {
            block,
            limits: Limits {
                io_align: block as usize,
                logical_block: block,
                physical_block: 16384,
                optimal_io: 65536,
                discard_granularity: 32768,
                ..Limits::default()
            },
            boundary: 0,
            deallocated_reads_zero: true,
            identity: [identity; 16],
        }
    }

    /// Lets every namespace of this subsystem be connected, by this thread; all of them have these contents.
    pub(crate) fn serve(subsystem: &str, contents: Vec<u8>, geometry: Geometry) {
        serve_as(subsystem, contents, geometry, NamespaceState::Present);
    }

    /// As [`serve`], in another state.
    pub(crate) fn serve_as(
        subsystem: &str,
        contents: Vec<u8>,
        geometry: Geometry,
        state: NamespaceState,
    ) {
        let storage = SimStorage::new(contents, Sim::default()).with_limits(geometry.limits);
        SERVED.with_borrow_mut(|all| {
            all.push(Served {
                subsystem: subsystem.to_owned(),
                storage: Arc::new(Storage::Sim(storage)),
                geometry,
                state,
                connected: Vec::new(),
            });
        });
    }

    pub(super) fn connect(spec: &NvmeSpec) -> Option<Remote> {
        SERVED.with_borrow_mut(|all| {
            let served = all.iter_mut().find(|one| one.subsystem == spec.subsystem)?;
            let namespace = Arc::new(Namespace::new(
                spec.clone(),
                PathBuf::from(spec.uri().to_string()),
                served.geometry,
                served.storage.len(),
                Box::new([]),
            ));
            namespace.set_state(served.state);
            served.connected.push(namespace.clone());
            Some(Remote {
                storage: served.storage.clone(),
                namespace,
            })
        })
    }

    /// Every connection that was made to this subsystem, by this thread.
    pub(crate) fn connected(subsystem: &str) -> Vec<Arc<Namespace>> {
        SERVED.with_borrow(|all| {
            let served = all.iter().find(|one| one.subsystem == subsystem);
            served.map_or_else(Vec::new, |one| one.connected.clone())
        })
    }

    /// The contents of this subsystem's namespaces.
    pub(crate) fn storage(subsystem: &str) -> Arc<Storage> {
        SERVED.with_borrow(|all| {
            let served = all.iter().find(|one| one.subsystem == subsystem);
            served.expect("it is served").storage.clone()
        })
    }
}
