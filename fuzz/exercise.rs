//! Everything that may be done with an image that nobody trusts. The fuzz target runs it on what libFuzzer
//! makes, and `tests/image_mutations.rs` on seeded mutations, with limits on memory and I/O.
//!
//! What must hold of any bytes: each step ends with a result or an error, none with a panic. And where the
//! check finds no error in an image, reading it, writing to it, closing and repairing it leave none, either.

use std::path::Path;
use std::sync::Arc;

use virtioblkd::block::qcow2::check::{Report, check};
use virtioblkd::block::qcow2::repair::{Repair, repair};
use virtioblkd::block::qcow2::{Extent, Header, OnDirty, Options, Qcow2};
use virtioblkd::block::{FileOptions, FileStorage, Layer, Result, Storage};
use virtioblkd::reactor::Io;

/// Places of the disk that are read and written, spread over it.
const PLACES: u64 = 12;
/// Bytes of one request.
const REQUEST: usize = 12 << 10;

/// How far an image came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The check came to its end, and found so many errors.
    pub checked: Option<u64>,
    /// It was opened for reading; so many requests succeeded.
    pub read: Option<u64>,
    /// It was opened for writing; so many requests succeeded.
    pub written: Option<u64>,
    /// A repair came to its end, and left so many errors.
    pub repaired: Option<u64>,
}

/// Does everything with the image `bytes`, in a file at `path`.
///
/// # Panics
/// If something does not hold that must.
pub fn exercise(io: &Io, path: &Path, bytes: &[u8]) -> Outcome {
    let mut outcome = Outcome::default();
    put(path, bytes);
    let before = io.block_on(check_file(io, path)).ok();
    outcome.checked = before.as_ref().map(|report| report.errors);
    outcome.read = io.block_on(read(io, path)).ok();
    assert_eq!(
        std::fs::read(path).expect("read back"),
        bytes,
        "reading wrote"
    );
    outcome.written = io.block_on(write(io, path)).ok();
    let sound = before.as_ref().is_some_and(|report| report.errors == 0);
    if sound && outcome.written.is_some() {
        let after = io
            .block_on(check_file(io, path))
            .expect("it could be checked before");
        assert_eq!(after.errors, 0, "writing made errors: {after:#?}");
    }
    put(path, bytes);
    let repaired =
        io.block_on(async { repair(io, &storage(path, false)?, Repair::All, &mut |_| {}).await });
    if let Ok(done) = repaired {
        outcome.repaired = Some(done.after.errors);
        assert!(
            done.after.is_clean() || done.after.lasting > 0,
            "left, though it could be repaired: {:#?}",
            done.after
        );
    }
    outcome
}

fn put(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("a place for the image");
}

fn storage(path: &Path, read_only: bool) -> Result<Storage> {
    let direct = false;
    FileStorage::open(path, FileOptions { read_only, direct }).map(Storage::File)
}

async fn check_file(io: &Io, path: &Path) -> Result<Report> {
    check(io, &storage(path, true)?).await
}

async fn open(io: &Io, path: &Path, read_only: bool) -> Result<Qcow2> {
    let storage = Arc::new(storage(path, read_only)?);
    let header = Header::read(io, &storage).await?;
    let options = Options {
        read_only,
        on_dirty: OnDirty::Repair,
        l2_cache_bytes: 64 << 10,
        workers: 0,
        has_backing: header.backing.is_some(),
    };
    Qcow2::open(io, storage, header, options).await
}

/// Offsets all over the disk, with room for a request behind them. None in a disk without a sector, which
/// nobody can use.
fn places(image: &Qcow2) -> impl Iterator<Item = u64> + use<> {
    let last = image.size().saturating_sub(REQUEST as u64);
    let count = if image.size() < 512 { 0 } else { PLACES };
    (0..count).map(move |n| (last / PLACES * n) & !511)
}

async fn read(io: &Io, path: &Path) -> Result<u64> {
    let image = open(io, path, true).await?;
    let mut good = 0;
    for offset in places(&image) {
        let _pin = io.pin();
        let len = image.size().min(REQUEST as u64);
        let mut buf = io.buf(len as usize);
        let Ok(extent) = image.map(io, offset, len).await else {
            continue;
        };
        let done = match extent {
            Extent::Data { host, len } => {
                image
                    .data()
                    .read(io, host.0, buf.sg().slice(0, len as usize))
                    .await
            }
            Extent::Compressed { data, skip, len } => {
                let part = buf.sg().slice(0, len as usize);
                image.read_compressed(io, data, skip, part).await
            }
            Extent::Zero { .. } | Extent::Backing { .. } => Ok(()),
        };
        good += u64::from(done.is_ok());
    }
    Ok(good)
}

async fn write(io: &Io, path: &Path) -> Result<u64> {
    let image = open(io, path, false).await?;
    let below: &[Layer] = &[];
    let mut good = 0;
    for (n, offset) in places(&image).enumerate() {
        let pin = io.pin();
        let len = image.size().min(REQUEST as u64);
        let mut buf = io.buf(len as usize);
        buf.fill(n as u8);
        let done = match n % 4 {
            0 => image.discard(io, offset, len).await,
            1 => image.write_zeroes(io, below, offset, len, n % 8 == 1).await,
            _ => image.write(io, below, offset, buf.sg()).await,
        };
        good += u64::from(done.is_ok());
        drop(pin);
        if n % 5 == 4 {
            // What fails here is told by the next request, or by nobody.
            let _ = image.flush(io, &()).await;
        }
    }
    // An image that turned out to be damaged may not be closed without an error.
    let _ = image.close(io, &()).await;
    Ok(good)
}
