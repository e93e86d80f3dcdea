//! Images with extended L2 entries: clusters of 32 subclusters. `qemu-img` and `qemu-io` make them, and judge
//! what became of them.

use super::history::{SECTOR, run_bytes};
use super::*;
use crate::block::sim::Event;

mod crash;
mod requests;
mod sharing;

/// What lies below an image under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    None,
    Raw,
    Qcow2,
    Extended,
}

const BASES: [Base; 4] = [Base::None, Base::Raw, Base::Qcow2, Base::Extended];

/// An image under test, and what it must read as.
struct Case {
    images: Images,
    storage: Arc<Storage>,
    below: Vec<u8>,
    options: Options,
    model: Vec<u8>,
    subcluster: u64,
}

impl Case {
    /// Makes an image with clusters of `cluster` bytes, filled by `commands` of qemu-io.
    fn new(cluster: u64, base: Base, size: u64, commands: &[&str], config: Sim) -> Self {
        let images = Images::new();
        let options = format!("extended_l2=on,cluster_size={cluster}");
        // Shorter than the overlay, and of odd size where it can be.
        let below = match base {
            Base::None => vec![],
            _ => noise(cluster ^ size, (size / 4 * 3 + 1003) as usize),
        };
        match base {
            Base::None => images.create("a", &options, size),
            Base::Raw => {
                write_file(&images.path("base"), &below);
                images.create_over("a", &options, "base", "raw", size);
            }
            Base::Qcow2 | Base::Extended => {
                let below_options = match base {
                    Base::Extended => "extended_l2=on,cluster_size=32k",
                    _ => "cluster_size=4k",
                };
                images.create("base", below_options, size / 4 * 3);
                images.qemu_io("base", &["write -P 17 3k 70k", "write -P 18 200k 99k"]);
                images.create_over("a", &options, "base", "qcow2", size);
            }
        }
        if !commands.is_empty() {
            images.qemu_io("a", commands);
        }
        let below = match base {
            Base::None | Base::Raw => below,
            _ => images.contents("base"),
        };
        Self {
            model: images.contents("a"),
            storage: sim(images.bytes("a"), config),
            options: Options {
                read_only: false,
                l2_cache_bytes: 1 << 20,
                workers: 2,
                has_backing: base != Base::None,
                on_dirty: OnDirty::Repair,
            },
            below,
            subcluster: cluster / 32,
            images,
        }
    }

    async fn open(&self, io: &Io) -> Qcow2 {
        open(io, &self.storage, self.options).await.expect("open")
    }

    async fn write(&mut self, io: &Io, image: &Qcow2, offset: u64, data: &[u8]) {
        let mut buf = io.buf(data.len());
        buf.copy_from_slice(data);
        let _pin = io.pin();
        image
            .write(io, &self.below, offset, buf.sg())
            .await
            .expect("write");
        self.model[offset as usize..][..data.len()].copy_from_slice(data);
    }

    async fn zero(&mut self, io: &Io, image: &Qcow2, offset: u64, len: u64, unmap: bool) {
        let _pin = io.pin();
        image
            .write_zeroes(io, &self.below, offset, len, unmap)
            .await
            .expect("zeroes");
        self.model[offset as usize..][..len as usize].fill(0);
    }

    /// A discard zeroes whole subclusters, but not parts of compressed clusters.
    async fn discard(&mut self, io: &Io, image: &Qcow2, offset: u64, len: u64) {
        let size = self.model.len() as u64;
        let (sub, cluster) = (self.subcluster, self.subcluster * 32);
        let end = offset + len;
        let mut at = offset.next_multiple_of(sub);
        while at < end {
            let next = at + sub;
            if next <= end || end == size {
                let compressed = matches!(
                    image.map(io, at, 1).await.expect("map"),
                    Extent::Compressed { .. }
                );
                let start = at / cluster * cluster;
                let whole = start >= offset && (start + cluster <= end || end == size);
                if whole || !compressed {
                    self.model[at as usize..next.min(size) as usize].fill(0);
                }
            }
            at = next;
        }
        let _pin = io.pin();
        image.discard(io, offset, len).await.expect("discard");
    }

    /// Takes what has happened to the storage.
    fn events(&self) -> Vec<Event> {
        the_sim(&self.storage).take_events()
    }

    /// Closes the image and lets qemu-img judge it.
    fn finish(&self, io: &Io, image: &Qcow2, what: &str) {
        io.block_on(async {
            let got = read_all(io, image, &self.below).await.expect("read");
            assert_same(&got, &self.model, what);
            image.close(io, &()).await.expect("close");
        });
        judge(
            &self.images,
            &the_sim(&self.storage).image(),
            &self.model,
            what,
        );
    }
}

/// No leak, no error, and these contents.
fn judge(images: &Images, bytes: &[u8], want: &[u8], what: &str) {
    write_file(&images.path("a"), bytes);
    run("qemu-img", &["check", "-q", &images.name("a")]);
    assert_same(&images.contents("a"), want, what);
}
