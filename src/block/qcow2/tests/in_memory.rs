//! Images on a file system in memory, where new clusters are holes and nothing is reserved for them.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::block::file::{FileOptions, FileStorage};

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

/// A file in memory with these bytes, and a storage on it.
fn in_memory(bytes: &[u8]) -> (File, Arc<Storage>) {
    // SAFETY: the name is a string; a new descriptor is ours alone.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"image".as_ptr(), 0)) };
    file.write_all_at(bytes, 0).expect("room");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let how = FileOptions {
        read_only: false,
        direct: false,
    };
    let storage = FileStorage::open(path, how).expect("open");
    (file, Arc::new(Storage::File(storage)))
}

#[test]
fn a_new_cluster_takes_the_pages_that_were_written_and_no_others() {
    const CLUSTERS: u64 = 200;
    let images = Images::new();
    images.create("a", "cluster_size=64k", 64 << 20);
    let (file, storage) = in_memory(&images.bytes("a"));
    let of = |file: &File| file.metadata().expect("metadata").blocks() * 512;
    let before = of(&file);
    let io = reactor();
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(4096);
        buf.fill(1);
        for n in 0..CLUSTERS {
            let written = image.write(&io, &(), n << 16, buf.sg()).await;
            written.expect("write");
        }
        let taken = of(&file) - before;
        assert!(taken < (CLUSTERS << 16) / 4, "{taken} bytes");
        // The L2 table has all of its space: a flush must not fail for want of it.
        assert!(taken >= CLUSTERS * 4096 + 65536, "{taken} bytes");
        image.close(&io, &()).await.expect("close");
    });
    io.close();
}

#[test]
fn what_free_space_held_is_never_read_as_a_table_nor_as_data() {
    let images = Images::new();
    images.create("a", "cluster_size=4k", 64 << 20);
    images.qemu_io("a", &["write -P 1 0 256k"]);
    let mut bytes = images.bytes("a");
    // Clusters that nobody refers to, full of entries of the kind that tables have: each leads to the guest's data.
    let end = bytes.len() as u64;
    let entry = (1 << 63 | (end - 4096)).to_be_bytes();
    bytes.extend(entry.repeat((1 << 20) / entry.len()));
    let (file, storage) = in_memory(&bytes);
    let mut model = images.contents("a");
    let io = reactor();
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        let mut buf = io.buf(512);
        for n in 1..32u64 {
            // Each in a part of the disk that has no L2 table yet.
            let at = n * (2 << 20) + n * 8192 + 1024;
            buf.fill(n as u8 | 0x80);
            let _pin = io.pin();
            let written = image.write(&io, &(), at, buf.sg()).await;
            written.expect("write");
            model[at as usize..][..512].copy_from_slice(&buf);
            let table = image.tables.slice_offset(n).expect("a table").0;
            assert!(table >= end && table < end + (1 << 20), "{table:#x}");
        }
        let got = read_all(&io, &image, &()).await.expect("read");
        assert_same(&got, &model, "written");
        image.close(&io, &()).await.expect("close");
    });
    io.close();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    write_file(&images.path("a"), &std::fs::read(path).expect("image"));
    run("qemu-img", &["check", "-q", &images.name("a")]);
    assert_same(&images.contents("a"), &model, "closed");
}
