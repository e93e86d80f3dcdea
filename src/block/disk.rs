//! A disk: what the user asked for, opened but not yet in use; and its life from there.

#[cfg(test)]
mod bitmap_tests;
#[cfg(test)]
mod chain_tests;
#[cfg(test)]
mod data_file_tests;
#[cfg(test)]
mod remote_tests;
#[cfg(test)]
mod resize_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod write_tests;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::reactor::Io;
use crate::shared_memory::SharedPart;

pub use super::active::ActiveDisk;
use super::active::Locks;
use super::chain::{self, Link, Now};
use super::crypt::{CryptStorage, Keys, Unlocked};
use super::error::{Error, ErrorKind, Result};
use super::layer::{Layer, Raw};
use super::lock::Role;
use super::nvme_tcp::remote;
use super::qcow2::{self, Qcow2};
pub use super::spec::{CacheMode, DiskSpec, Format, Source};
use super::storage::Storage;

/// Guests count in sectors of this many bytes.
pub const SECTOR: u64 = 512;

/// What a disk wants of requests, for the guest to know. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLimits {
    /// Smallest request; smaller ones are served, at a price.
    pub logical_block: u32,
    /// Below this a write costs a read.
    pub physical_block: u32,
    /// What the disk likes best; 0: it does not say.
    pub optimal_io: u32,
    /// Discards are passed on.
    pub can_discard: bool,
    /// Discards that are no multiple of this, or not aligned to it, lose their ends.
    pub discard_granularity: u32,
    /// Largest discard that is served at one go.
    pub max_discard: u64,
    /// Largest write of zeros that is served at one go.
    pub max_write_zeroes: u64,
    /// Zeroed ranges may give their space back.
    pub write_zeroes_may_unmap: bool,
}

/// A disk whose images are open and whose headers were read. Nothing is locked and nothing that may
/// change is kept, so another process may use the images meanwhile.
#[derive(Debug)]
pub struct Disk {
    spec: DiskSpec,
    keys: Keys,
    links: Vec<Link>,
    /// As it was when somebody looked last.
    size: AtomicU64,
    /// Signalled when a namespace has changed.
    outside: Mutex<Option<EventFd>>,
}

impl Disk {
    /// Opens the images. Blocks: not for a worker.
    ///
    /// # Errors
    /// Files that are missing, not allowed or not what they are said to be; unsupported features.
    pub async fn open(io: &Io, mut spec: DiskSpec) -> Result<Self> {
        // A descriptor is read once, and then closed.
        let keys = Keys::load(&std::mem::take(&mut spec.keys))?;
        spec.nvme = Arc::new(spec.nvme.read_secrets()?);
        let links = chain::open(io, &spec, &keys, &[]).await?;
        let size = capacity(&links)?;
        Ok(Self {
            spec,
            keys,
            links,
            size: AtomicU64::new(size),
            outside: Mutex::new(None),
        })
    }

    /// Bytes of the disk, whole sectors, as they were when it was opened, activated or refreshed last.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The disk has changed its size while it was active.
    pub(crate) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Relaxed);
    }

    /// Looks what size the disk has now, and returns it. To be called while the disk is not active:
    /// another process may have resized the image, or put another in its place. Nothing is locked.
    ///
    /// # Errors
    /// As [`Disk::open`]. The size stays what it was then.
    pub async fn refresh(&self, io: &Io) -> Result<u64> {
        for namespace in self.links.iter().filter_map(|link| link.remote.as_ref()) {
            remote::look_at(namespace)?;
        }
        let size = match self.links.first() {
            Some(top) if top.is_current() => {
                let now = top.reread(io, &self.keys).await?;
                let size = match (now.header, now.key) {
                    (Some(header), _) => header.size,
                    (None, Some(key)) => chain::payload_len(&top.storage, &key)?,
                    (None, None) => top.storage.len_known_as(self.size()),
                };
                rounded(top.storage.path(), size)?
            }
            _ => capacity(&chain::open(io, &self.spec, &self.keys, &self.links).await?)?,
        };
        self.set_size(size);
        Ok(size)
    }

    /// True if writes are refused.
    pub fn read_only(&self) -> bool {
        self.spec.read_only
    }

    /// What the user asked for.
    pub fn spec(&self) -> &DiskSpec {
        &self.spec
    }

    /// Gives locks back that [`ActiveDisk::deactivate_locked`] has left and that nobody goes on with.
    pub fn unlock_kept(&self) {
        for link in &self.links {
            link.storage.unlock_kept();
            if let Some(data) = &link.data {
                data.storage.unlock_kept();
            }
        }
    }

    /// Descriptors of all files that are open, to be handed to another process.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn files(&self) -> std::io::Result<Vec<std::fs::File>> {
        let data = |link: &Link| link.data.as_ref().map(|data| data.storage.clone());
        let storages = self
            .links
            .iter()
            .flat_map(|link| [Some(link.storage.clone()), data(link)]);
        let files = storages.flatten().filter_map(|storage| match &*storage {
            Storage::File(file) => Some(file.file().try_clone()),
            _ => None,
        });
        files.collect()
    }

    /// Descriptors for a process that reads the same configuration as this one, each with the number that it is
    /// to have there: the keys and secrets that were given by descriptor, to be read once more.
    ///
    /// # Errors
    /// No more pipes are to be had.
    pub fn descriptors(&self) -> io::Result<Vec<(std::os::fd::RawFd, std::fs::File)>> {
        let mut all = self.keys.descriptors()?;
        all.extend(self.spec.nvme.descriptors()?);
        Ok(all)
    }

    /// From now on `event` is signalled when a remote namespace of the disk has another size or another state: it is
    /// time for [`Disk::refresh`], or [`ActiveDisk::refresh`] while the disk is active. Of files nobody tells.
    ///
    /// # Errors
    /// Too many files are open.
    pub fn on_outside_change(&self, event: EventFd) -> io::Result<()> {
        *self.outside.lock().unwrap_or_else(PoisonError::into_inner) = Some(event.try_clone()?);
        self.watch(&self.links)?;
        // What has changed since the disk was opened was told to nobody.
        let top = self.links.first().and_then(|link| link.remote.as_ref());
        if top.is_some_and(|namespace| namespace.bytes() / SECTOR * SECTOR != self.size()) {
            event.write(1)?;
        }
        Ok(())
    }

    fn watch(&self, links: &[Link]) -> io::Result<()> {
        let outside = self.outside.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event) = &*outside {
            for namespace in links.iter().filter_map(|link| link.remote.as_ref()) {
                namespace.on_change(event.try_clone()?);
            }
        }
        Ok(())
    }

    /// Who the namespace is that the disk's bytes are in, whatever it is called; none: they are in a file.
    pub fn remote_identity(&self) -> Option<[u8; 16]> {
        let namespace = self.links.first()?.remote.as_ref()?;
        Some(namespace.geometry().identity)
    }

    /// The logical block, in bytes, that suits the guest best: a remote namespace's own. Of files one of 512, which
    /// does not change with where a file is.
    pub fn block_size(&self) -> u32 {
        match self.remote_identity() {
            Some(_) => self.limits().logical_block,
            None => SECTOR as u32,
        }
    }

    /// What the guest should know.
    pub fn limits(&self) -> DiskLimits {
        let Some(top) = self.links.first() else {
            return DiskLimits::default();
        };
        let below = top.data_storage().limits();
        let device = match &*top.storage {
            Storage::File(file) => file.is_device(),
            _ => top.remote.is_some(),
        };
        // A file's alignment is not the guest's business: it would change with where the file is.
        let logical_block = match device && top.format != Format::Qcow2 {
            true => below.logical_block,
            false => SECTOR as u32,
        };
        let cluster = top.cluster.and_then(|bytes| u32::try_from(bytes).ok());
        let discard_granularity = cluster
            .unwrap_or(below.discard_granularity)
            .max(logical_block);
        // Discards of a LUKS file are not passed on: they would show which sectors are in use.
        let passed_on = below.discard_granularity > 0 && top.format != Format::Luks;
        let can_discard = self.spec.discard && !self.spec.read_only && passed_on;
        DiskLimits {
            logical_block,
            physical_block: below.physical_block.max(logical_block),
            optimal_io: cluster.unwrap_or(below.optimal_io),
            can_discard,
            discard_granularity,
            max_discard: 2 << 30,
            max_write_zeroes: match top.format {
                Format::Raw | Format::Luks => 64 << 20,
                Format::Qcow2 => 2 << 30,
            },
            write_zeroes_may_unmap: can_discard,
        }
    }

    /// One line for the log: `qcow2 a.qcow2 (O_DIRECT) over raw b.img (page cache)`.
    pub fn describe(&self) -> String {
        let one = |link: &Link| {
            if link.remote.is_some() {
                return format!("{} {}", link.format, link.named.display());
            }
            let how = match &*link.storage {
                Storage::File(file) if file.direct() => " (O_DIRECT)",
                Storage::File(_) => " (page cache)",
                _ => return link.storage.path().display().to_string(),
            };
            let data = match &link.data {
                Some(data) => format!(" with data in {}", data.storage.path().display()),
                None => String::new(),
            };
            format!(
                "{} {}{how}{data}",
                link.format,
                link.storage.path().display()
            )
        };
        let all: Vec<String> = self.links.iter().map(one).collect();
        all.join(" over ")
    }

    /// Takes the images into use: locks them as QEMU does, reads headers and metadata afresh, follows
    /// the chain again where it has changed. `workers` threads besides the calling one will use it.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if another process, or this one, uses an image; those of [`Disk::open`].
    /// Nothing is locked then.
    pub async fn activate(&self, io: &Io, workers: usize) -> Result<Arc<ActiveDisk>> {
        self.activate_with(io, workers, None).await
    }

    /// As [`Disk::activate`], with memory for a crash journal that outlives this process: [`JOURNAL_BYTES`] of
    /// it, zeros at first. What a process that was killed left there is made good before this returns.
    ///
    /// # Errors
    /// As [`Disk::activate`]; [`ErrorKind::InvalidImage`] for the journal of another image.
    ///
    /// [`JOURNAL_BYTES`]: crate::block::JOURNAL_BYTES
    pub async fn activate_with(
        &self,
        io: &Io,
        workers: usize,
        journal: Option<SharedPart>,
    ) -> Result<Arc<ActiveDisk>> {
        let locks = lock(&self.links, self.spec.read_only)?;
        if let Some(now) = current(io, &self.links, &self.keys).await? {
            return self
                .start(io, &self.links, now, locks, workers, journal)
                .await;
        }
        drop(locks);
        // Somebody has put other files in place, or rebased, since they were opened.
        let links = chain::open(io, &self.spec, &self.keys, &self.links).await?;
        self.watch(&links)
            .map_err(|error| Error::io(links[0].storage.path(), "watch it", None, error))?;
        let locks = lock(&links, self.spec.read_only)?;
        let Some(now) = current(io, &links, &self.keys).await? else {
            let path = links[0].storage.path();
            let message = "the chain of images is being changed by another process; try again";
            return Err(Error::image(ErrorKind::Locked, path, None, message));
        };
        log::info!("the chain of images is another now: {}", names(&links));
        self.start(io, &links, now, locks, workers, journal).await
    }

    async fn start(
        &self,
        io: &Io,
        links: &[Link],
        now: Vec<Now>,
        mut locks: Locks,
        workers: usize,
        journal: Option<SharedPart>,
    ) -> Result<Arc<ActiveDisk>> {
        locks.reserve(io, &links[0].storage).await?;
        let layers = match self.layers(io, links, now, workers, journal).await {
            Ok(layers) => layers,
            Err(error) => {
                // Nobody is kept out by a disk that is not in use.
                let _same_path = locks.unreserve(io).await;
                return Err(error);
            }
        };
        let size = layers[0].size() / SECTOR * SECTOR;
        self.set_size(size);
        let namespaces = links
            .iter()
            .filter_map(|link| link.remote.clone())
            .collect();
        let disk = ActiveDisk::new(layers, namespaces, locks, size, &self.spec);
        let disk = Arc::new(disk);
        disk.fill_ahead_by_tasks();
        disk.copy_by_tasks();
        Ok(disk)
    }

    /// The layers that requests go to, with what is in the journal made good.
    async fn layers(
        &self,
        io: &Io,
        links: &[Link],
        now: Vec<Now>,
        workers: usize,
        journal: Option<SharedPart>,
    ) -> Result<Vec<Layer>> {
        let mut layers = Vec::with_capacity(links.len());
        for (level, (link, now)) in links.iter().zip(now).enumerate() {
            let storage = link.storage.clone();
            let layer = match (now.header, now.key) {
                (None, None) => {
                    let known = if level == 0 { self.size() } else { 0 };
                    let len = storage.len_known_as(known);
                    Layer::Raw(Raw::new(storage, len))
                }
                (None, Some(key)) => {
                    let len = chain::payload_len(&storage, &key)?;
                    let payload = key.payload();
                    Layer::Raw(Raw::new(decrypted(storage, key, payload), len))
                }
                (Some(header), key) => {
                    let file = link.data.as_ref().map(|data| data.storage.clone());
                    let data = match key {
                        Some(key) => {
                            let file = file.unwrap_or_else(|| storage.clone());
                            Some(decrypted(file, key, 0))
                        }
                        None => file,
                    };
                    let options = qcow2::Options {
                        read_only: level > 0 || self.spec.read_only,
                        l2_cache_bytes: self.spec.l2_cache_bytes,
                        workers,
                        has_backing: level + 1 < links.len(),
                        on_dirty: self.spec.on_dirty,
                    };
                    let open = Qcow2::open_with_data(io, storage, data, header, options);
                    Layer::Qcow2(Box::new(open.await?))
                }
            };
            layers.push(layer);
        }
        if let Some(journal) = journal {
            layers[0].use_journal(io, &layers[1..], journal).await?;
        }
        whole_sectors(&layers[0])?;
        Ok(layers)
    }
}

impl Default for DiskLimits {
    fn default() -> Self {
        Self {
            logical_block: SECTOR as u32,
            physical_block: SECTOR as u32,
            optimal_io: 0,
            can_discard: false,
            discard_granularity: SECTOR as u32,
            max_discard: 0,
            max_write_zeroes: 0,
            write_zeroes_may_unmap: false,
        }
    }
}

fn lock(links: &[Link], read_only: bool) -> Result<Locks> {
    let mut locks = Locks::default();
    for (level, link) in links.iter().enumerate() {
        let role = match (level, read_only, link.format) {
            (0, false, Format::Raw | Format::Luks) => Role::RawWriter,
            (0, false, Format::Qcow2) => Role::ImageWriter,
            _ => Role::Reader,
        };
        locks.take(&link.storage, role)?;
        if let Some(data) = &link.data {
            // As QEMU locks it: who writes to it may make it grow.
            locks.take(&data.storage, role)?;
        }
    }
    Ok(locks)
}

/// The headers as they are now; None if the chain is not what it was.
async fn current(io: &Io, links: &[Link], keys: &Keys) -> Result<Option<Vec<Now>>> {
    let mut all = Vec::with_capacity(links.len());
    for link in links {
        if !link.is_current() {
            return Ok(None);
        }
        let now = link.reread(io, keys).await?;
        if !now.same {
            return Ok(None);
        }
        all.push(now);
    }
    Ok(Some(all))
}

fn decrypted(storage: Arc<Storage>, key: Arc<Unlocked>, payload: u64) -> Arc<Storage> {
    let plain = CryptStorage::new(storage, key, payload);
    Arc::new(Storage::Crypt(Box::new(plain)))
}

fn names(links: &[Link]) -> String {
    let names: Vec<String> = links
        .iter()
        .map(|link| link.storage.path().display().to_string())
        .collect();
    names.join(" over ")
}

fn capacity(links: &[Link]) -> Result<u64> {
    let Some(top) = links.first() else {
        return Ok(0);
    };
    rounded(top.storage.path(), top.size)
}

fn whole_sectors(top: &Layer) -> Result<u64> {
    rounded(top.data().path(), top.size())
}

fn rounded(path: &std::path::Path, bytes: u64) -> Result<u64> {
    let size = bytes / SECTOR * SECTOR;
    if size == 0 {
        let message = format!("a disk of {bytes} bytes: it needs a sector of {SECTOR} at least");
        return Err(Error::image(ErrorKind::InvalidImage, path, None, message));
    }
    if size != bytes {
        log::warn!(
            "{}: {bytes} bytes are no whole number of sectors: the guest sees {size}",
            path.display()
        );
    }
    Ok(size)
}
