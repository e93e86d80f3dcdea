//! The hot path of a request allocates nothing, whatever the disk is made of.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::Command;

use virtioblkd::block::crypt::{KeySource, KeySpec};
use virtioblkd::block::{Disk, DiskSpec, Format, Source};
use virtioblkd::reactor::{Epochs, Io, IoConfig};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is the system's allocator's own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are the ones wanted.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are the ones wanted.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn run(dir: &std::path::Path, line: &str) {
    let mut words = line.split(' ');
    let status = Command::new(words.next().unwrap_or_default())
        .args(words)
        .current_dir(dir)
        .stdout(std::process::Stdio::null())
        .status();
    assert!(
        status.expect("this test needs qemu-utils").success(),
        "{line}"
    );
}

#[test]
fn reads_and_writes_of_mapped_clusters_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base.img"), vec![1; 2 << 20]).unwrap();
    run(
        dir.path(),
        "qemu-img create -q -f qcow2 -b base.img -F raw a.qcow2",
    );
    for cluster in [0, 1, 2, 4, 6, 8, 11, 12] {
        let dir = dir.path();
        let write = format!("write {} 65536", cluster * 65_536);
        let status = Command::new("qemu-io")
            .args(["-f", "qcow2", "a.qcow2", "-c", &write])
            .current_dir(dir)
            .stdout(std::process::Stdio::null())
            .status();
        assert!(status.unwrap().success());
    }
    std::fs::write(at("key"), "secret").unwrap();
    for image in [
        "-f luks -o key-secret=s,iter-time=10 a.luks",
        "-f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 e.qcow2",
    ] {
        let secret = "--object secret,id=s,file=key";
        run(
            dir.path(),
            &format!("qemu-img create -q {secret} {image} 2M"),
        );
    }
    let io = Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .unwrap();
    let allocated = |what: &str, format, name: &str, write: bool, len: usize| {
        let mut spec = DiskSpec::new(Source::File { path: at(name) }, format);
        spec.keys = vec![KeySpec {
            image: None,
            source: KeySource::File(at("key")),
        }];
        let disk = io.block_on(Disk::open(&io, spec)).unwrap();
        let active = io.block_on(disk.activate(&io, 0)).unwrap();
        let mut buf = io.buf(len);
        let count = io.block_on(async {
            let mut before = 0;
            for round in 0..120 {
                // The first rounds fill caches and pools.
                if round == 20 {
                    before = ALLOCATIONS.with(Cell::get);
                }
                match write {
                    true => active.write(&io, 4096, buf.sg()).await.unwrap(),
                    false => active.read(&io, 4096, buf.sg()).await.unwrap(),
                }
            }
            ALLOCATIONS.with(Cell::get) - before
        });
        io.block_on(active.deactivate(&io)).unwrap();
        assert_eq!(count, 0, "{what}: allocations in 100 requests");
    };
    allocated("raw read", Format::Raw, "base.img", false, 4096);
    allocated("qcow2 read", Format::Qcow2, "a.qcow2", false, 4096);
    allocated(
        "qcow2 read in many pieces",
        Format::Qcow2,
        "a.qcow2",
        false,
        1 << 20,
    );
    allocated("qcow2 overwrite", Format::Qcow2, "a.qcow2", true, 4096);
    allocated("luks write", Format::Luks, "a.luks", true, 65_536);
    allocated("luks read", Format::Luks, "a.luks", false, 65_536);
    let large = 1 << 20;
    allocated("luks write in steps", Format::Luks, "a.luks", true, large);
    allocated(
        "encrypted qcow2 write",
        Format::Qcow2,
        "e.qcow2",
        true,
        4096,
    );
    allocated(
        "encrypted qcow2 read",
        Format::Qcow2,
        "e.qcow2",
        false,
        4096,
    );
    allocated("raw write", Format::Raw, "base.img", true, 65_536);
}
