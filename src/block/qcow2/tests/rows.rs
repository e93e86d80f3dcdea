//! Rows, slices whose clusters lie one behind the other, as parts of an image: read, written over, and broken.

use super::*;

const CLUSTER: u64 = 4096;
/// Bytes of the disk that a slice maps.
const SLICE: u64 = 512 * CLUSTER;

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

/// A converted image, and what it must read as.
struct Converted {
    images: Images,
    io: Io,
    storage: Arc<Storage>,
    image: Qcow2,
    model: Vec<u8>,
}

impl Converted {
    /// Of so many bytes of noise. `change` may make something of the image before it is opened.
    fn new(size: u64, change: impl FnOnce(&Images)) -> Self {
        let images = Images::new();
        write_file(&images.path("raw"), &noise(size, size as usize));
        let (raw, name) = (images.name("raw"), images.name("a"));
        let options = ["-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k"];
        run(
            "qemu-img",
            &[&["convert"], &options[..], &[raw.as_str(), &name]].concat(),
        );
        change(&images);
        let io = reactor();
        let storage = sim(images.bytes("a"), Sim::default());
        let image = io.block_on(open(&io, &storage, WRITE)).expect("open");
        let converted = Self {
            model: images.contents("a"),
            images,
            io,
            storage,
            image,
        };
        // Nothing but a read has to be there for a slice to be loaded.
        converted.check("as it was converted");
        converted
    }

    /// Whether a slice is kept as one entry.
    fn is_row(&self, slice: u64) -> bool {
        let look = self.image.tables.with(slice, |slice| slice.bytes() < 512);
        look.expect("the slice is in memory")
    }

    /// The first slice that is one: what is not one has a refcount block among its clusters.
    fn row(&self) -> u64 {
        let whole = self.model.len() as u64 / SLICE;
        (0..whole).find(|n| self.is_row(*n)).expect("a row")
    }

    fn check(&self, what: &str) {
        let got = self.io.block_on(read_all(&self.io, &self.image, &()));
        assert_same(&got.expect("read"), &self.model, what);
    }

    async fn write(&mut self, offset: u64, seed: u64, len: u64) {
        let mut buf = self.io.buf(len as usize);
        buf.copy_from_slice(&noise(seed, len as usize));
        let _pin = self.io.pin();
        let written = self.image.write(&self.io, &(), offset, buf.sg()).await;
        written.expect("write");
        self.model[offset as usize..][..len as usize].copy_from_slice(&buf);
    }

    /// Closes the image, and has it judged. What its snapshots read as.
    fn finish(self, what: &str) -> Vec<Vec<u8>> {
        self.check(what);
        let closed = self.io.block_on(self.image.close(&self.io, &()));
        closed.expect("close");
        let bytes = the_sim(&self.storage).image();
        write_file(&self.images.path("a"), &bytes);
        run("qemu-img", &["check", "-q", &self.images.name("a")]);
        assert_same(&self.images.contents("a"), &self.model, what);
        self.io.close();
        judge::Judge::new(&bytes).read_snapshots(&[])
    }
}

#[test]
fn reads_that_begin_and_end_anywhere_in_rows_find_what_is_there() {
    let converted = Converted::new(7 << 20, |_| ());
    let first = converted.row() * SLICE;
    let (io, image) = (&converted.io, &converted.image);
    io.block_on(async {
        match image.map(io, first, SLICE).await.expect("map") {
            Extent::Data { len, .. } => assert_eq!(len, SLICE, "one extent"),
            other => panic!("{other:?}"),
        }
        let mut state = 3;
        for n in 0..2000u64 {
            // Near the borders of clusters and slices, and anywhere.
            let at = match n % 3 {
                0 => random(&mut state) % 4 * SLICE + random(&mut state) % 1024,
                1 => random(&mut state) % 1700 * CLUSTER + random(&mut state) % 1024,
                _ => random(&mut state) % (7 << 20),
            };
            let at = at.saturating_sub(512) & !511;
            let most = ((7 << 20) - at).min(3 * CLUSTER);
            let len = (1 + random(&mut state) % (most / 512)) * 512;
            let mut buf = io.buf(len as usize);
            read(io, image, &(), at, buf.sg()).await.expect("read");
            let want = &converted.model[at as usize..][..len as usize];
            assert_same(&buf, want, &format!("{len} bytes at {at:#x}"));
        }
    });
    assert!(converted.is_row(first / SLICE), "reads leave it alone");
    let none = converted.finish("read");
    assert!(none.is_empty());
}

/// Clusters of a slice where a row is broken: the first, one in the middle, the last.
const WHERE: [u64; 3] = [0, 200, 511];

#[test]
fn a_write_over_a_row_goes_in_place_and_leaves_it_one() {
    let mut converted = Converted::new(7 << 20, |_| ());
    let row = converted.row();
    let size = the_sim(&converted.storage).image().len();
    let io = converted.io.clone();
    io.block_on(async {
        for n in WHERE {
            let at = row * SLICE + n * CLUSTER;
            converted.write(at + 512, n, 1024).await;
            converted.write(at, n + 1, CLUSTER).await;
        }
    });
    assert!(converted.is_row(row));
    assert_eq!(the_sim(&converted.storage).image().len(), size);
    converted.finish("in place");
}

#[test]
fn a_row_of_which_a_snapshot_has_the_clusters_is_written_elsewhere_and_the_snapshot_stays() {
    for n in WHERE {
        let mut converted = Converted::new(7 << 20, |images| {
            run("qemu-img", &["snapshot", "-c", "s", &images.name("a")]);
        });
        let before = converted.model.clone();
        let row = converted.row();
        let at = row * SLICE + n * CLUSTER;
        let io = converted.io.clone();
        io.block_on(converted.write(at + 512, n, 1024));
        io.block_on(converted.write(at + 1536, n + 1, 512));
        converted.check("elsewhere");
        let flushed = io.block_on(converted.image.flush(&io, &()));
        flushed.expect("flush");
        assert!(!converted.is_row(row));
        // A second one, over two clusters, of which one is the image's own already.
        let from = at.saturating_sub(CLUSTER);
        io.block_on(converted.write(from, 9, 2 * CLUSTER));
        let snapshots = converted.finish("a snapshot");
        assert_same(&snapshots[0], &before, "the snapshot");
    }
}

#[test]
fn a_discard_or_zeros_inside_a_row_are_a_hole_there_and_nowhere_else() {
    for (n, unmap) in WHERE.into_iter().zip([None, Some(true), Some(false)]) {
        let mut converted = Converted::new(7 << 20, |_| ());
        let row = converted.row();
        let at = row * SLICE + n * CLUSTER;
        let io = converted.io.clone();
        io.block_on(async {
            let _pin = io.pin();
            let image = &converted.image;
            let done = match unmap {
                None => image.discard(&io, at, CLUSTER).await,
                Some(unmap) => image.write_zeroes(&io, &(), at, CLUSTER, unmap).await,
            };
            done.expect("zeros");
        });
        converted.model[at as usize..][..CLUSTER as usize].fill(0);
        converted.check("a hole");
        assert!(!converted.is_row(row));
        // Over the hole and what lies on both sides of it, where there is something.
        io.block_on(async {
            converted.image.flush(&io, &()).await.expect("flush");
            let from = at.saturating_sub(512);
            converted.write(from, 5, 1024).await;
        });
        converted.finish("a hole");
    }
}

#[test]
fn a_row_that_goes_on_behind_the_end_of_the_disk_ends_there() {
    // The entries of the last slice lead somewhere up to its end, and the disk has a part of them.
    let end = SLICE + 100 * CLUSTER + 1536;
    let mut converted = Converted::new(4 * SLICE, |images| {
        let mut bytes = images.bytes("a");
        bytes[24..32].copy_from_slice(&end.to_be_bytes());
        write_file(&images.path("a"), &bytes);
    });
    assert_eq!(converted.image.size(), end);
    assert!(converted.is_row(1));
    let io = converted.io.clone();
    io.block_on(async {
        let at = end - 512 - CLUSTER;
        match converted.image.map(&io, at, CLUSTER + 512).await {
            Ok(Extent::Data { len, .. }) => assert_eq!(len, CLUSTER + 512),
            other => panic!("{other:?}"),
        }
        for len in [513, CLUSTER, SLICE] {
            let beyond = converted.image.map(&io, end - 512, len).await;
            assert_eq!(beyond.expect_err("beyond").kind(), ErrorKind::OutOfRange);
        }
        converted.write(at, 3, CLUSTER + 512).await;
    });
    converted.finish("the end");
}
