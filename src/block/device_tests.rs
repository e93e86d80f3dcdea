//! Storage on real block devices and odd file systems. Loop devices and mounts need root; without it
//! these tests say so and pass.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use super::tests::{dir, io, pattern, read, write};
use super::*;
use crate::reactor::Io;

fn open(path: &Path, direct: bool) -> FileStorage {
    let read_only = false;
    FileStorage::open(path, FileOptions { read_only, direct }).unwrap()
}

fn without(what: &str) {
    eprintln!("not run: this machine or user has no {what}");
}

/// A loop device of a file.
struct Loop {
    device: PathBuf,
    backing: tempfile::TempDir,
}

impl Loop {
    fn new(block: u32, data: &[u8]) -> Option<Self> {
        let backing = dir();
        let file = backing.path().join("disk");
        std::fs::write(&file, data).unwrap();
        let output = Command::new("losetup")
            .args(["-b", &block.to_string(), "-f", "--show"])
            .arg(&file)
            .output();
        let Some(output) = output.ok().filter(|output| output.status.success()) else {
            without("loop devices");
            return None;
        };
        let device = String::from_utf8(output.stdout).unwrap();
        let device = PathBuf::from(device.trim());
        Some(Self { device, backing })
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.backing.path().join("disk")).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// A mounted file system.
pub(super) struct Mounted(pub(super) tempfile::TempDir);

impl Mounted {
    pub(super) fn new(kind: &str, options: &str) -> Option<Self> {
        let at = dir();
        let status = Command::new("mount")
            .args(["-t", kind, "-o", options, "virtioblkd-test"])
            .arg(at.path())
            .stderr(std::process::Stdio::null())
            .status();
        if !status.is_ok_and(|status| status.success()) {
            without("right to mount");
            return None;
        }
        Some(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Many writers of `len` bytes side by side, all at once; every one must be found afterwards.
fn neighbours(io: &Io, storage: &Rc<Storage>, count: u64, len: u64) {
    let left = Rc::new(std::cell::Cell::new(count));
    for n in 0..count {
        let (io, storage, left) = (io.clone(), storage.clone(), left.clone());
        io.clone().spawn(async move {
            let mut buf = io.buf(len as usize);
            buf.fill(n as u8 | 1);
            storage.write(&io, n * len, buf.sg()).await.unwrap();
            left.set(left.get() - 1);
        });
    }
    while left.get() > 0 {
        if !io.turn() {
            io.park(None);
        }
    }
    for n in 0..count {
        let got = read(io, storage, n * len, len as usize).unwrap();
        assert!(got.iter().all(|b| *b == n as u8 | 1), "writer {n}");
    }
    io.close();
}

#[test]
fn sectors_of_512_on_a_device_of_4096_do_not_undo_each_other() {
    let dir = dir();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut file = open(&path, true);
    file.pretend_blocks_of(4096);
    neighbours(&io(), &Rc::new(Storage::File(file)), 1000, 512);
    let Some(disk) = Loop::new(4096, &vec![0; 1 << 20]) else {
        return;
    };
    let file = open(&disk.device, true);
    assert_eq!(file.limits().io_align, 4096);
    neighbours(&io(), &Rc::new(Storage::File(file)), 1000, 512);
}

#[test]
fn whole_blocks_and_parts_of_blocks_meet() {
    // Where they overlap either may win; of what only the whole blocks cover nothing may be lost.
    let dir = dir();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let mut file = open(&path, true);
    file.pretend_blocks_of(4096);
    let storage = Rc::new(Storage::File(file));
    let io = io();
    for round in 0..50u64 {
        let left = Rc::new(std::cell::Cell::new(2));
        for (offset, len, byte) in [(0, 512, 1), (0, 8192, 2)] {
            let (io, storage, left) = (io.clone(), storage.clone(), left.clone());
            io.clone().spawn(async move {
                let mut buf = io.buf(len);
                buf.fill(byte);
                storage
                    .write(&io, round * 16384 + offset, buf.sg())
                    .await
                    .unwrap();
                left.set(left.get() - 1);
            });
        }
        while left.get() > 0 {
            if !io.turn() {
                io.park(None);
            }
        }
        let got = read(&io, &storage, round * 16384, 8192).unwrap();
        assert!(got[512..].iter().all(|b| *b == 2), "round {round}");
    }
    io.close();
}

#[test]
fn block_devices_are_read_written_zeroed_and_discarded() {
    for block in [512, 4096] {
        let mut model = pattern(4 << 20, u64::from(block));
        let Some(disk) = Loop::new(block, &model) else {
            return;
        };
        for direct in [true, false] {
            let file = open(&disk.device, direct);
            assert!(file.is_device() && file.direct() == direct);
            assert_eq!((file.len(), file.limits().logical_block), (4 << 20, block));
            let storage = Storage::File(file);
            let io = io();
            assert!(read(&io, &storage, 0, 4 << 20).unwrap() == model);
            write(&io, &storage, 1000, &[9; 5000]).unwrap();
            model[1000..6000].fill(9);
            for (offset, len, unmap) in [
                (8192, 65_536, true),
                (100_000, 70_001, true),
                (300_001, 70_001, false),
                (5, 6, false),
            ] {
                io.block_on(storage.write_zeroes(&io, offset, len, unmap))
                    .unwrap();
                model[offset as usize..][..len as usize].fill(0);
            }
            io.block_on(storage.discard(&io, 1 << 20, 65_536)).unwrap();
            model[1 << 20..][..65_536].fill(0);
            if io
                .block_on(storage.allocate(&io, 2 << 20, 1 << 20))
                .unwrap()
            {
                model[2 << 20..][..1 << 20].fill(0);
            }
            assert!(
                read(&io, &storage, 0, 4 << 20).unwrap() == model,
                "{block} {direct}"
            );
            assert_eq!(
                read(&io, &storage, (4 << 20) - 512, 1024).unwrap()[512..],
                [0; 512]
            );
            assert!(write(&io, &storage, 4 << 20, &[1; 512]).is_err());
            let full = io
                .block_on(storage.allocate(&io, 4 << 20, 65_536))
                .unwrap_err();
            assert_eq!(full.kind(), ErrorKind::NoSpace);
            io.block_on(storage.flush(&io)).unwrap();
            assert!(disk.contents() == model);
        }
    }
}

#[test]
fn a_full_file_system_is_no_space_and_not_an_io_error() {
    let Some(mounted) = Mounted::new("tmpfs", "size=1m") else {
        return;
    };
    let path = mounted.0.path().join("a.img");
    std::fs::write(&path, []).unwrap();
    let storage = Storage::File(open(&path, false));
    let io = io();
    let mut at = 0;
    let error = loop {
        if let Err(error) = write(&io, &storage, at, &[1; 65_536]) {
            break error;
        }
        at += 65_536;
        assert!(at <= 1 << 20);
    };
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert!(error.to_string().contains("make room"), "{error}");
    // In memory nothing is reserved by that.
    assert!(
        io.block_on(storage.allocate(&io, 4 << 20, 1 << 20))
            .unwrap()
    );
    let error = io
        .block_on(storage.reserve(&io, 4 << 20, 1 << 20))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    drop(storage);
}

#[test]
fn a_file_system_without_direct_io_and_without_fallocate_serves_all_the_same() {
    let Some(mounted) = Mounted::new("ramfs", "mode=700") else {
        return;
    };
    let path = mounted.0.path().join("a.img");
    let mut model = pattern(1 << 20, 3);
    std::fs::write(&path, &model).unwrap();
    let file = open(&path, true);
    assert!(!file.direct() && file.limits().io_align == 1);
    let storage = Storage::File(file);
    let io = io();
    for unmap in [true, false] {
        io.block_on(storage.write_zeroes(&io, 1000, 300_000, unmap))
            .unwrap();
        io.block_on(storage.discard(&io, 0, 1 << 20)).unwrap();
        model[1000..301_000].fill(0);
        assert!(read(&io, &storage, 0, 1 << 20).unwrap() == model);
        write(&io, &storage, 1000, &[5; 300_000]).unwrap();
        model[1000..301_000].fill(5);
    }
    assert!(!io.block_on(storage.allocate(&io, 0, 65_536)).unwrap());
    assert!(io.block_on(storage.allocate(&io, 2 << 20, 65_536)).unwrap());
    drop(storage);
}

#[test]
fn a_block_device_that_grows_and_shrinks_is_noticed_while_it_is_in_use() {
    let Some(device) = Loop::new(512, &pattern(1 << 20, 3)) else {
        return;
    };
    let io = io();
    let source = Source::File {
        path: device.device.clone(),
    };
    let spec = DiskSpec::new(source, Format::Raw);
    let disk = io.block_on(Disk::open(&io, spec)).unwrap();
    let active = io.block_on(disk.activate(&io, 0)).unwrap();
    for size in [3u64 << 20, 64 << 10, 1 << 20] {
        let file = device.backing.path().join("disk");
        let file = std::fs::File::options().write(true).open(file).unwrap();
        file.set_len(size).unwrap();
        let told = Command::new("losetup")
            .arg("-c")
            .arg(&device.device)
            .status();
        assert!(told.unwrap().success());
        assert_eq!(io.block_on(active.refresh(&io)).unwrap(), size);
        let mut buf = io.buf(4096);
        buf.fill(9);
        io.block_on(async { active.write(&io, size - 4096, buf.sg()).await })
            .unwrap();
        let refused = io.block_on(async { active.write(&io, size - 512, buf.sg()).await });
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    io.block_on(active.deactivate(&io)).unwrap();
}
