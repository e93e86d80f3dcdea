//! Persistent bitmaps: what we make of them, read by QEMU and by a second, simple reader.

use super::*;
use crate::block::qcow2::bitmaps::{Bitmap, list};
use crate::block::sim::{Event, Kind};

mod failures;

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

/// A bitmap as it is in the bytes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stored {
    name: String,
    flags: u32,
    granularity: u64,
    /// Ascending numbers of the bits that are set.
    set: Vec<u64>,
}

const IN_USE: u32 = 1;
const AUTO: u32 = 2;

fn get(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len]
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Where the directory's entries begin.
fn entries(bytes: &[u8]) -> Vec<usize> {
    let cluster = 1 << get(bytes, 20, 4);
    let header = Header::parse(Path::new("a"), &bytes[..cluster], bytes.len() as u64);
    let extension = header.expect("header").bitmaps.expect("bitmaps");
    let mut at = extension.directory_offset.0 as usize;
    (0..extension.count)
        .map(|_| {
            let this = at;
            at += (24 + get(bytes, at + 18, 2) as usize).next_multiple_of(8);
            this
        })
        .collect()
}

fn stored(bytes: &[u8]) -> Vec<Stored> {
    let cluster = 1usize << get(bytes, 20, 4);
    let one = |at: usize| {
        let table = get(bytes, at, 8) as usize;
        let data: Vec<u8> = (0..get(bytes, at + 8, 4) as usize)
            .flat_map(|n| match get(bytes, table + n * 8, 8) as usize {
                0 => vec![0; cluster],
                1 => vec![0xff; cluster],
                place => bytes[place..place + cluster].to_vec(),
            })
            .collect();
        let bit = |n: &u64| data[*n as usize / 8] >> (n % 8) & 1 == 1;
        let name = &bytes[at + 24..][..get(bytes, at + 18, 2) as usize];
        Stored {
            name: String::from_utf8(name.to_vec()).expect("name"),
            flags: get(bytes, at + 12, 4) as u32,
            granularity: 1 << get(bytes, at + 17, 1),
            set: (0..data.len() as u64 * 8).filter(bit).collect(),
        }
    };
    entries(bytes).into_iter().map(one).collect()
}

/// The bits that QEMU says are set, asked over NBD.
fn by_qemu(images: &Images, image: &str, name: &str, granularity: u64) -> Vec<u64> {
    // A server ends some time after its client: each has a copy of its own.
    let number = images.0.path().read_dir().expect("directory").count();
    let (socket, file) = (
        images.name(&format!("s{number}")),
        images.name(&format!("n{number}")),
    );
    std::fs::copy(images.path(image), &file).expect("copy");
    run(
        "qemu-nbd",
        &[
            "--fork", "-r", "-f", "qcow2", "-B", name, "-k", &socket, &file,
        ],
    );
    let options = format!(
        "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
    );
    let text = run(
        "qemu-img",
        &["map", "--output=json", "--image-opts", &options],
    );
    let map: Vec<serde_json::Value> = serde_json::from_str(&text).expect("json");
    map.iter()
        // What is dirty is told as a hole.
        .filter(|extent| extent["data"] == false)
        .flat_map(|extent| {
            let (start, len) = (extent["start"].as_u64(), extent["length"].as_u64());
            let (start, len) = (start.expect("start"), len.expect("length"));
            start / granularity..(start + len).div_ceil(granularity)
        })
        .collect()
}

/// A disk with bitmaps, and what they have to show.
struct World {
    images: Images,
    storage: Arc<Storage>,
    size: u64,
    /// (name, granularity, enabled)
    bitmaps: Vec<(&'static str, u64, bool)>,
    want: Vec<Vec<bool>>,
}

impl World {
    fn new(options: &str, size: u64, bitmaps: &[(&'static str, u64, bool)], config: Sim) -> Self {
        let images = Images::new();
        images.create("a", options, size);
        let file = images.name("a");
        for (name, granularity, _) in bitmaps {
            let granularity = granularity.to_string();
            let args = ["bitmap", "--add", "-g", &granularity, &file, name];
            run("qemu-img", &args);
        }
        // QEMU's own marks, also in those that are to be disabled.
        images.qemu_io("a", &["write -P 1 1M 70k", "discard 3M 64k"]);
        for (name, _, enabled) in bitmaps {
            if !enabled {
                run("qemu-img", &["bitmap", "--disable", &file, name]);
            }
        }
        let mut world = Self {
            storage: sim(images.bytes("a"), config),
            images,
            size,
            bitmaps: bitmaps.to_vec(),
            want: Vec::new(),
        };
        for (_, granularity, _) in bitmaps {
            world
                .want
                .push(vec![false; size.div_ceil(*granularity) as usize]);
        }
        world.mark(1 << 20, 70 << 10, true);
        world.mark(3 << 20, 64 << 10, true);
        world.check(&world.bytes(), 0, "before");
        world
    }

    fn bytes(&self) -> Vec<u8> {
        the_sim(&self.storage).image()
    }

    fn mark(&mut self, offset: u64, len: u64, all: bool) {
        for ((_, granularity, enabled), want) in self.bitmaps.iter().zip(&mut self.want) {
            if all || *enabled {
                let range = offset / granularity..=(offset + len - 1) / granularity;
                range.for_each(|n| want[n as usize] = true);
            }
        }
    }

    fn want(&self, n: usize) -> Vec<u64> {
        let set = self.want[n].iter().enumerate().filter(|(_, set)| **set);
        set.map(|(n, _)| n as u64).collect()
    }

    /// Checks what is stored; `in_use` is what the flags of enabled ones have to say.
    fn check(&self, bytes: &[u8], in_use: u32, what: &str) {
        let all = stored(bytes);
        assert_eq!(all.len(), self.bitmaps.len(), "{what}");
        for (n, (stored, (name, granularity, enabled))) in all.iter().zip(&self.bitmaps).enumerate()
        {
            let flags = if *enabled { AUTO | in_use } else { 0 };
            assert_eq!(
                (&*stored.name, stored.granularity),
                (*name, *granularity),
                "{what}"
            );
            assert_eq!(stored.flags, flags, "{what}: {name}");
            if flags & IN_USE == 0 {
                assert!(stored.set == self.want(n), "{what}: the bits of {name}");
            }
        }
    }

    fn check_by_qemu(&self, what: &str) {
        write_file(&self.images.path("a"), &self.bytes());
        run("qemu-img", &["check", "-q", &self.images.name("a")]);
        for (n, (name, granularity, _)) in self.bitmaps.iter().enumerate() {
            let got = by_qemu(&self.images, "a", name, *granularity);
            assert!(got == self.want(n), "{what}: the bits of {name}, by QEMU");
        }
    }

    async fn open(&self, io: &Io) -> Qcow2 {
        open(io, &self.storage, WRITE).await.expect("open")
    }

    async fn write(&mut self, io: &Io, image: &Qcow2, offset: u64, len: u64) {
        let mut buf = io.buf(len as usize);
        buf.fill(offset as u8);
        let _pin = io.pin();
        image.write(io, &(), offset, buf.sg()).await.expect("write");
        self.mark(offset, len, false);
    }

    async fn steps(&mut self, io: &Io, image: &Qcow2, seed: u64, steps: u64) {
        let mut state = seed;
        for _ in 0..steps {
            let sectors = self.size / 512;
            let at = random(&mut state) % sectors;
            let most = [1, 8, 200][random(&mut state) as usize % 3];
            let len = (1 + random(&mut state) % most).min(sectors - at) * 512;
            let at = at * 512;
            match random(&mut state) % 6 {
                0..3 => self.write(io, image, at, len).await,
                3 => {
                    let _pin = io.pin();
                    image.discard(io, at, len).await.expect("discard");
                    self.mark(at, len, false);
                }
                4 => {
                    let _pin = io.pin();
                    let unmap = random(&mut state) % 2 == 0;
                    let zeroed = image.write_zeroes(io, &(), at, len, unmap);
                    zeroed.await.expect("zeroes");
                    self.mark(at, len, false);
                }
                _ => image.flush(io, &()).await.expect("flush"),
            }
        }
    }
}

#[test]
fn enabled_bitmaps_show_every_change_exactly_and_disabled_ones_stay() {
    for (options, size, bitmaps) in [
        (
            "cluster_size=64k",
            8 << 20,
            &[
                ("a", 65536, true),
                ("b", 512, true),
                ("off", 4096, false),
                ("c", 1 << 20, true),
            ][..],
        ),
        (
            "cluster_size=4k",
            5_000_704,
            &[("off", 512, false), ("a", 512, true)],
        ),
        // A table of more than a cluster.
        ("cluster_size=512", 256 << 20, &[("large", 512, true)]),
        (
            "cluster_size=64k,refcount_bits=64",
            8 << 20,
            &[("off", 512, false)],
        ),
    ] {
        let mut world = World::new(options, size, bitmaps, Sim::default());
        let io = reactor();
        for round in 0..3 {
            let what = format!("{options} round {round}");
            io.block_on(async {
                let image = world.open(&io).await;
                world.steps(&io, &image, round + 7, 60).await;
                if round == 1 {
                    // All ones in whole clusters of the bitmap's data.
                    world.write(&io, &image, 0, 4 << 20).await;
                }
                image.close(&io, &()).await.expect("close");
            });
            world.check(&world.bytes(), 0, &what);
            world.check_by_qemu(&what);
            // QEMU goes on where we have stopped, and we where it stops.
            world.images.qemu_io("a", &["write -P 9 2500k 8k"]);
            world.mark(2500 << 10, 8 << 10, false);
            world.storage = sim(world.images.bytes("a"), Sim::default());
            world.check(&world.bytes(), 0, &what);
        }
        io.close();
    }
}

#[test]
fn a_merged_and_a_newly_enabled_bitmap_are_loaded() {
    let bitmaps = [("a", 65536, true), ("b", 4096, false)];
    let mut world = World::new("cluster_size=64k", 8 << 20, &bitmaps, Sim::default());
    let file = world.images.name("a");
    let image_args = |args: &[&str]| run("qemu-img", &[&["bitmap"], args].concat());
    image_args(&["--merge", "a", &file, "b"]);
    image_args(&["--enable", &file, "b"]);
    world.bitmaps[1].2 = true;
    let merged: Vec<u64> = world.want(0);
    for n in merged {
        (n * 16..n * 16 + 16).for_each(|n| world.want[1][n as usize] = true);
    }
    world.storage = sim(world.images.bytes("a"), Sim::default());
    let io = reactor();
    io.block_on(async {
        let image = world.open(&io).await;
        world.write(&io, &image, 5 << 20, 512).await;
        image.close(&io, &()).await.expect("close");
    });
    world.check(&world.bytes(), 0, "merged");
    world.check_by_qemu("merged");
}

#[test]
fn the_directory_is_listed() {
    let bitmaps = [("first", 65536, true), ("second", 512, false)];
    let world = World::new("cluster_size=64k", 8 << 20, &bitmaps, Sim::default());
    let io = reactor();
    let tell = |storage: &Arc<Storage>| {
        io.block_on(async {
            let header = Header::read(&io, storage).await.expect("header");
            list(&io, storage, &header).await.expect("list")
        })
    };
    let short = |b: &Bitmap| (b.name.clone(), b.granularity, b.auto, b.in_use);
    let all: Vec<_> = tell(&world.storage).iter().map(short).collect();
    let want = [
        ("first".to_owned(), 65536, true, false),
        ("second".to_owned(), 512, false, false),
    ];
    assert_eq!(all, want);
    // Without the auto-clear bit none of them means anything.
    let mut bytes = world.bytes();
    bytes[95] = 0;
    assert!(tell(&sim(bytes, Sim::default())).iter().all(|b| b.in_use));
    let none = Images::new();
    none.create("a", "cluster_size=64k", 1 << 20);
    assert!(tell(&sim(none.bytes("a"), Sim::default())).is_empty());
}

#[test]
fn bitmaps_are_in_use_durably_before_the_first_change_and_after_a_crash() {
    let bitmaps = [("a", 65536, true), ("off", 4096, false)];
    for change in 0..3 {
        let mut world = World::new("cluster_size=64k", 8 << 20, &bitmaps, Sim::default());
        let io = reactor();
        io.block_on(async {
            let image = world.open(&io).await;
            the_sim(&world.storage).take_events();
            let mut buf = io.buf(512);
            image.map(&io, 1 << 20, 512).await.expect("map");
            image.flush(&io, &()).await.expect("flush");
            world.check(&world.bytes(), 0, "nothing has changed");
            let _pin = io.pin();
            match change {
                0 => image.write(&io, &(), 1 << 20, buf.sg()).await,
                1 => image.discard(&io, 1 << 20, 65536).await,
                _ => image.write_zeroes(&io, &(), 1 << 20, 512, true).await,
            }
            .expect("change");
            let events = the_sim(&world.storage).take_events();
            let mut first = events.iter().skip_while(|event| **event == Event::Flush);
            assert!(
                matches!(first.next(), Some(Event::Write { len: 512, .. }))
                    && first.next() == Some(&Event::Flush),
                "{change}: {events:?}"
            );
            let nothing_else = the_sim(&world.storage).crash_with(|_, _| 0);
            world.check(&nothing_else, IN_USE, "not closed");

            // The next user leaves it alone, and says that it is in use.
            let left = sim(nothing_else, Sim::default());
            let after = open(&io, &left, WRITE).await.expect("open");
            after.write(&io, &(), 0, buf.sg()).await.expect("write");
            after.close(&io, &()).await.expect("close");
            let bytes = the_sim(&left).image();
            world.check(&bytes, IN_USE, "after a crash");
            write_file(&world.images.path("b"), &bytes);
            // Clusters that the crash left over are no errors.
            let output = Command::new("qemu-img")
                .args(["check", "-q", &world.images.name("b")])
                .output()
                .expect("qemu-img");
            assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}");
        });
        world.want.clear();
    }
}
