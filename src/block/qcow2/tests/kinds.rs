//! The kinds of images that are put through power losses and faults, one entry each. Made and prepared by
//! QEMU's own tools.

use super::*;

/// What prepares an image.
pub(super) enum Prepare {
    /// Commands of `qemu-io`.
    Io(&'static [&'static str]),
    /// Arguments of `qemu-img`; `{}` is the image.
    Img(&'static [&'static str]),
}
use Prepare::{Img, Io as IoCommands};

/// A kind of image.
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// `-o` of `qemu-img create`.
    pub(super) options: &'static str,
    /// Bytes of the disk. Small: each of thousands of states is read and checked as a whole.
    pub(super) size: u64,
    /// Bytes of a raw backing file of random bytes; 0: none.
    pub(super) below: usize,
    pub(super) prepare: &'static [Prepare],
    /// The storage promises zeros where it allocates; else it gives garbage.
    pub(super) zeros: bool,
    /// Why it is left out: what is not served yet. Its opening for writing is refused, and
    /// `what_is_left_out_is_refused` fails when it no longer is.
    pub(super) off: Option<&'static str>,
}

const PLAIN: Kind = Kind {
    name: "plain",
    options: "cluster_size=4k",
    size: 512 << 10,
    below: 0,
    prepare: &[],
    zeros: true,
    off: None,
};

const COMPRESSED: &[Prepare] = &[IoCommands(&[
    "write -c -P 3 0 64k",
    "write -c -P 4 100k 4k",
    "write -P 5 256k 64k",
])];

const SNAPSHOTS: &[Prepare] = &[
    IoCommands(&["write -P 3 0 64k", "write -P 4 256k 64k"]),
    Img(&["snapshot", "-c", "first", "{}"]),
    IoCommands(&["write -P 5 16k 96k", "write -z 260k 8k"]),
    Img(&["snapshot", "-c", "second", "{}"]),
    IoCommands(&["write -P 6 60k 8k"]),
];

/// All of them. To switch one on, drop its `off`.
pub(super) const KINDS: &[Kind] = &[
    PLAIN,
    Kind {
        name: "compressed",
        prepare: COMPRESSED,
        ..PLAIN
    },
    Kind {
        name: "compressed by zstd",
        options: "cluster_size=4k,compression_type=zstd",
        prepare: COMPRESSED,
        ..PLAIN
    },
    Kind {
        name: "over a base, compressed",
        below: 300_003,
        prepare: COMPRESSED,
        ..PLAIN
    },
    Kind {
        name: "over a base, no zeros from storage",
        below: 300_003,
        prepare: COMPRESSED,
        zeros: false,
        ..PLAIN
    },
    Kind {
        name: "no zeros from storage",
        zeros: false,
        ..PLAIN
    },
    Kind {
        name: "clusters of 512 bytes",
        options: "cluster_size=512",
        ..PLAIN
    },
    Kind {
        name: "clusters of 512 bytes, no zeros from storage",
        options: "cluster_size=512",
        size: 256 << 10,
        zeros: false,
        ..PLAIN
    },
    Kind {
        name: "clusters of 512 bytes over a base",
        options: "cluster_size=512,refcount_bits=8",
        below: 400_000,
        size: 256 << 10,
        ..PLAIN
    },
    Kind {
        // One cluster of table: 64 blocks of 64 clusters, 2 MiB of file. All but full.
        name: "a refcount table that grows",
        options: "cluster_size=512,refcount_bits=64",
        size: 2300 << 10,
        prepare: &[IoCommands(&["write -P 9 0 1800k"])],
        ..PLAIN
    },
    Kind {
        name: "refcounts of 1 bit",
        options: "cluster_size=4k,refcount_bits=1",
        ..PLAIN
    },
    Kind {
        name: "clusters of 16 KiB over a base",
        options: "cluster_size=16k",
        below: 500_000,
        ..PLAIN
    },
    Kind {
        name: "default clusters",
        options: "cluster_size=64k",
        size: 768 << 10,
        prepare: &[IoCommands(&["write -P 5 256k 64k", "write -z 384k 64k"])],
        ..PLAIN
    },
    Kind {
        name: "reserved clusters",
        options: "cluster_size=4k,preallocation=metadata",
        ..PLAIN
    },
    Kind {
        name: "version 2",
        options: "cluster_size=4k,compat=0.10",
        prepare: &[IoCommands(&["write -P 5 256k 64k"])],
        ..PLAIN
    },
    Kind {
        name: "version 2 over a base",
        options: "cluster_size=4k,compat=0.10",
        below: 300_003,
        prepare: COMPRESSED,
        ..PLAIN
    },
    Kind {
        name: "snapshots",
        prepare: SNAPSHOTS,
        ..PLAIN
    },
    Kind {
        name: "snapshots, clusters of 512 bytes, over a base",
        options: "cluster_size=512",
        below: 400_000,
        prepare: SNAPSHOTS,
        ..PLAIN
    },
    Kind {
        name: "snapshots of compressed clusters, version 2",
        options: "cluster_size=4k,compat=0.10",
        prepare: &[
            IoCommands(&["write -c -P 3 0 64k", "write -P 5 256k 64k"]),
            Img(&["snapshot", "-c", "first", "{}"]),
        ],
        ..PLAIN
    },
    Kind {
        name: "extended L2 entries",
        options: "cluster_size=16k,extended_l2=on",
        prepare: &[IoCommands(&["write -P 5 250k 30k", "write -z 400k 20k"])],
        ..PLAIN
    },
    Kind {
        name: "extended L2 entries over a base",
        options: "cluster_size=16k,extended_l2=on",
        below: 500_000,
        prepare: &[IoCommands(&["write -P 5 250k 30k", "write -z 400k 20k"])],
        ..PLAIN
    },
    Kind {
        name: "extended L2 entries and snapshots",
        options: "cluster_size=16k,extended_l2=on",
        prepare: SNAPSHOTS,
        ..PLAIN
    },
    Kind {
        name: "a persistent bitmap",
        prepare: &[
            Img(&["bitmap", "--add", "-g", "4k", "{}", "b"]),
            IoCommands(&["write -P 5 256k 64k"]),
        ],
        ..PLAIN
    },
];

impl Kind {
    /// Makes image "a" of this kind; returns what is below it.
    pub(super) fn create(&self, images: &Images) -> Vec<u8> {
        let below = noise(self.below as u64, self.below);
        if below.is_empty() {
            images.create("a", self.options, self.size);
        } else {
            write_file(&images.path("base"), &below);
            images.create_over("a", self.options, "base", "raw", self.size);
        }
        for prepare in self.prepare {
            match prepare {
                IoCommands(commands) => images.qemu_io("a", commands),
                Img(args) => {
                    let name = images.name("a");
                    let args = args.iter().map(|arg| match *arg {
                        "{}" => name.as_str(),
                        arg => arg,
                    });
                    run("qemu-img", &args.collect::<Vec<_>>());
                }
            }
        }
        below
    }

    /// How it is opened for writing.
    pub(super) fn opened(&self, l2_cache_bytes: u64) -> Options {
        Options {
            read_only: false,
            l2_cache_bytes,
            workers: 0,
            has_backing: self.below > 0,
            on_dirty: OnDirty::Repair,
        }
    }
}

/// Those that are switched on.
pub(super) fn kinds() -> impl Iterator<Item = &'static Kind> {
    KINDS.iter().filter(|kind| kind.off.is_none())
}

#[test]
fn what_is_left_out_is_refused() {
    let io = reactor();
    for kind in KINDS {
        let images = Images::new();
        let below = kind.create(&images);
        let bytes = images.bytes("a");
        // The second reader knows it, whether the first does or not.
        let judge = judge::Judge::new(&bytes);
        assert_eq!(judge.check(), 0, "{}", kind.name);
        assert_same(&judge.read_all(&below), &images.contents("a"), kind.name);
        let opened = io.block_on(open(&io, &sim(bytes, Sim::default()), kind.opened(0)));
        match (kind.off, opened) {
            (None, Ok(_)) => {}
            (Some(_), Err(error)) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
            (Some(why), Ok(_)) => panic!("{}: no longer ({why}): switch it on", kind.name),
            (None, Err(error)) => panic!("{}: {error}", kind.name),
        }
    }
    io.close();
}

#[test]
fn the_second_reader_reads_snapshots_as_qemu_img_does() {
    for kind in KINDS.iter().filter(|kind| kind.name.contains("snapshots")) {
        let images = Images::new();
        let below = kind.create(&images);
        let bytes = images.bytes("a");
        let read = judge::Judge::new(&bytes).read_snapshots(&below);
        for (name, read) in ["first", "second"].iter().zip(&read) {
            let raw = images.name("snapshot.raw");
            let image = images.name("a");
            run(
                "qemu-img",
                &["convert", "-O", "raw", "-l", name, &image, &raw],
            );
            let want = std::fs::read(&raw).expect("contents");
            assert_same(read, &want, &format!("{}, {name}", kind.name));
        }
        assert!(!read.is_empty(), "{}", kind.name);
    }
}
