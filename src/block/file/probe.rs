//! Opening a file or block device, and finding out what it asks of requests.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::reactor::AlignedBuf;

use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Limits;

// linux/fs.h
const BLKSSZGET: libc::c_ulong = 0x1268;
const BLKIOOPT: libc::c_ulong = 0x1279;
const BLKPBSZGET: libc::c_ulong = 0x127b;
const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;

/// An opened file with what is known of it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) device: bool,
    pub(super) direct: bool,
    pub(super) len: u64,
    pub(super) limits: Limits,
    /// (device, inode) of a file, (device number, none) of a block device: the same thing by whatever
    /// name.
    pub(super) identity: (u64, u64),
}

/// Opens `path`; with `direct` past the page cache if the file system can, else a warning is logged.
pub(super) fn open(path: &Path, read_only: bool, direct: bool) -> Result<Opened> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "open", None, e))?;
    check_type(path, &meta)?;
    let mut cannot = None;
    if direct {
        match try_open(path, read_only, libc::O_DIRECT) {
            Ok(file) => match describe(path, file, true)? {
                Some(opened) => return Ok(opened),
                None => cannot = Some("its alignment rules are unknown"),
            },
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                cannot = Some("the file system does not support it");
            }
            Err(error) => return Err(open_error(path, read_only, error)),
        }
    }
    let file = try_open(path, read_only, 0).map_err(|e| open_error(path, read_only, e))?;
    if let Some(why) = cannot {
        log::warn!(
            "{}: no O_DIRECT, {why}: going through the page cache (say cache=writeback to mean it)",
            path.display()
        );
    }
    match describe(path, file, false)? {
        Some(opened) => Ok(opened),
        None => Err(Error::image(
            ErrorKind::Unsupported,
            path,
            None,
            "alignment rules are unknown",
        )),
    }
}

fn try_open(path: &Path, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(path)
}

fn open_error(path: &Path, read_only: bool, error: io::Error) -> Error {
    let told = Error::io(path, "open", None, error);
    match told.kind() {
        ErrorKind::NotAllowed | ErrorKind::ReadOnly if !read_only => {
            told.hint("it must be writable; a disk that is only read wants read-only=on")
        }
        _ => told,
    }
}

fn check_type(path: &Path, meta: &std::fs::Metadata) -> Result<()> {
    let kind = meta.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_char_device() => "a character device",
        () if kind.is_fifo() => "a pipe",
        () if kind.is_socket() => "a socket",
        () => "of an unknown type",
    };
    Err(Error::image(
        ErrorKind::Unsupported,
        path,
        None,
        format_args!("is {what}; a disk is a regular file or a block device"),
    ))
}

/// None: with O_DIRECT this file cannot be served.
fn describe(path: &Path, file: File, direct: bool) -> Result<Option<Opened>> {
    let meta = file
        .metadata()
        .map_err(|e| Error::io(path, "fstat", None, e))?;
    check_type(path, &meta)?;
    let device = meta.file_type().is_block_device();
    let len = size(path, &file)?;
    let mut limits = Limits::default();
    if device {
        limits.logical_block = get_u32(&file, BLKSSZGET).unwrap_or(512).max(512);
        limits.physical_block = get_u32(&file, BLKPBSZGET).unwrap_or(limits.logical_block);
        limits.optimal_io = get_u32(&file, BLKIOOPT).unwrap_or(0);
        limits.discard_granularity = limits.logical_block;
    } else {
        let block = u32::try_from(meta.blksize()).unwrap_or(4096);
        limits.physical_block = block.clamp(512, 4096).next_power_of_two();
        limits.discard_granularity = limits.physical_block;
    }
    if direct {
        let Some((mem, io)) = alignment(path, &file, device.then_some(limits.logical_block)) else {
            return Ok(None);
        };
        (limits.mem_align, limits.io_align) = (mem, io);
        limits.logical_block = limits.logical_block.max(io as u32);
        limits.physical_block = limits.physical_block.max(limits.logical_block);
    }
    Ok(Some(Opened {
        file,
        device,
        direct,
        len,
        limits,
        identity: identity(&meta),
    }))
}

/// What two names of one thing have in common.
pub(super) fn identity(meta: &std::fs::Metadata) -> (u64, u64) {
    match meta.file_type().is_block_device() {
        true => (meta.rdev(), u64::MAX),
        false => (meta.dev(), meta.ino()),
    }
}

/// Bytes of a file or a block device.
pub(super) fn size(path: &Path, file: &File) -> Result<u64> {
    let failed = |e| Error::io(path, "read the size", None, e);
    let meta = file.metadata().map_err(failed)?;
    if !meta.file_type().is_block_device() {
        return Ok(meta.len());
    }
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64 as _, &raw mut size) } == 0 {
        return Ok(size);
    }
    // SAFETY: no memory is passed; the file's position is used by nobody.
    let end = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| failed(io::Error::last_os_error()))
}

fn get_u32(file: &File, request: libc::c_ulong) -> Option<u32> {
    let mut value: libc::c_uint = 0;
    // SAFETY: the requests used here write one unsigned int.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request as _, &raw mut value) };
    (result == 0 && value > 0).then_some(value)
}

/// What O_DIRECT asks of memory addresses, and of offsets and lengths. None: it does not work.
fn alignment(path: &Path, file: &File, device_block: Option<u32>) -> Option<(usize, usize)> {
    let found = match statx_alignment(file) {
        Some((0, _) | (_, 0)) => return None,
        Some(told) => told,
        None => match device_block {
            Some(block) => (block as usize, block as usize),
            None => try_alignment(file)?,
        },
    };
    let (mem, io) = found;
    log::debug!(
        "{}: O_DIRECT wants memory on {mem} and offsets on {io}",
        path.display()
    );
    // Our own buffers are on 4096.
    let usable = mem.is_power_of_two() && io.is_power_of_two() && mem <= 4096 && io <= 1 << 16;
    usable.then_some((mem, io))
}

/// statx(2), STATX_DIOALIGN: Linux 6.1.
fn statx_alignment(file: &File) -> Option<(usize, usize)> {
    let empty = CString::default();
    let mut out = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor; the kernel fills the structure.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            out.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: zeroed bytes are a valid statx, and the kernel has filled it.
    let out = unsafe { out.assume_init() };
    (out.stx_mask & libc::STATX_DIOALIGN != 0).then_some((
        out.stx_dio_mem_align as usize,
        out.stx_dio_offset_align as usize,
    ))
}

/// Tries reads until one is small enough to be refused. An empty file answers anything, so it is taken
/// for a demanding one.
fn try_alignment(file: &File) -> Option<(usize, usize)> {
    let mut buf = AlignedBuf::new(4096);
    if file.metadata().is_ok_and(|meta| meta.len() == 0) {
        return Some((4096, 4096));
    }
    [512, 1024, 2048, 4096]
        .into_iter()
        .find(|align| file.read_at(&mut buf[..*align], 0).is_ok())
        .map(|align| (align, align))
}
