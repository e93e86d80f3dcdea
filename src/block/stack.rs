//! Reading through a chain of layers, top first.

use std::sync::Arc;

use crate::reactor::{Io, Sg};

use super::copy_on_read::{Copies, Plan};
use super::error::{Error, Result};
use super::holes::Holes;
use super::layer::{Layer, Mapping};
use super::storage::{Pending, Storage};

/// Extents of one request that are under way at once.
const WINDOW: usize = 8;

/// Fills `to` with what the chain shows at `offset`: each byte from the first layer that has one. Where
/// no layer has, and beyond the end of a layer that a hole leads to, there are zeros.
///
/// # Errors
/// The first one met in a storage or in metadata; `to` then holds anything.
#[inline]
pub async fn read_chain(layers: &[Layer], io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
    match find_whole(layers, None, offset, to.len() as u64, false) {
        Some(Whole::Data(storage, at)) => storage.read(io, at, to).await,
        Some(Whole::Zero) => {
            to.zero();
            Ok(())
        }
        None => read_pieces(layers, io, offset, to, None).await,
    }
}

/// Where all of a range is, and nothing else.
#[derive(Clone, Copy, Debug)]
pub(super) enum Whole<'a> {
    /// In one piece, in this storage at this offset.
    Data(&'a Storage, u64),
    /// Nowhere.
    Zero,
}

/// What most reads need: where all of a range is, if it is in one piece and can be told without I/O. With `copies`,
/// holes of the first layer are left to [`read_pieces`].
#[inline]
pub(super) fn find_whole<'a>(
    layers: &'a [Layer],
    holes: Option<&Holes>,
    offset: u64,
    len: u64,
    copies: bool,
) -> Option<Whole<'a>> {
    let end = offset.checked_add(len).filter(|_| len > 0)?;
    let mut level = 0;
    while let Some(layer) = layers.get(level) {
        if end > layer.size() {
            return None;
        }
        match layer.map_at_once(offset, len)? {
            Mapping::Data { offset, len: found } if found == len => {
                return Some(Whole::Data(layer.data(), offset));
            }
            Mapping::Zero { len: found } if found == len => return Some(Whole::Zero),
            Mapping::Backing { len: found } if found == len && !(copies && level == 0) => {
                level = match holes.filter(|_| level == 0) {
                    Some(holes) => holes.below(layers, offset, len),
                    None => level + 1,
                };
            }
            _ => return None,
        }
    }
    Some(Whole::Zero)
}

/// As [`read_chain`], piece by piece; what is read through holes of the first layer is copied there, if there are
/// `copies`.
///
/// # Errors
/// As [`read_chain`]. A copy that fails is not one.
pub(super) async fn read_pieces(
    layers: &[Layer],
    io: &Io,
    offset: u64,
    to: Sg<'_>,
    copies: Option<&Arc<Copies>>,
) -> Result<()> {
    let mut pieces = Pieces {
        layers,
        copies,
        to,
        run: None,
        window: Window::default(),
    };
    let walked = pieces.walk(io, offset).await;
    // Whatever happened, what is under way ends before its memory is let go.
    let ended = pieces.window.finish_all(io).await;
    walked.and(ended)
}

/// Neighbouring extents that lie one after another in one storage.
#[derive(Clone, Copy)]
struct Run {
    level: usize,
    /// In the level's storage.
    offset: u64,
    /// In the request.
    at: usize,
    len: usize,
}

struct Pieces<'a> {
    layers: &'a [Layer],
    copies: Option<&'a Arc<Copies>>,
    to: Sg<'a>,
    run: Option<Run>,
    window: Window<'a>,
}

impl<'a> Pieces<'a> {
    async fn walk(&mut self, io: &'a Io, offset: u64) -> Result<()> {
        let all = self.to.len();
        let mut done = 0;
        while done < all {
            // `left` bytes are known to show `level`: all layers above have holes there.
            let (mut level, mut left) = (0, (all - done) as u64);
            while left > 0 {
                let at = offset.saturating_add(done as u64);
                let found = match self.layers.get(level) {
                    Some(layer) if at < layer.size() => {
                        let len = left.min(layer.size() - at);
                        layer.map(io, at, len).await?
                    }
                    _ => Mapping::Zero { len: left },
                };
                let len = match found {
                    Mapping::Backing { len } => {
                        match self.copies.filter(|_| level == 0) {
                            None => (level, left) = (1 + level, len),
                            Some(copies) => match copies.plan(io, at, len) {
                                Plan::Pass(len) => (level, left) = (1, len),
                                Plan::Copy(copy, len) => {
                                    let part = self.to.slice(done, len as usize);
                                    // Boxed: not to make every read's future larger.
                                    Box::pin(copy.read(io, at, part)).await?;
                                    done += len as usize;
                                    left = 0;
                                }
                            },
                        }
                        continue;
                    }
                    Mapping::Zero { len } => {
                        self.to.slice(done, len as usize).zero();
                        len
                    }
                    Mapping::Data { offset, len } => {
                        self.add(io, level, offset, done, len as usize).await?;
                        len
                    }
                    Mapping::Compressed { cluster, skip, len } => {
                        let part = self.to.slice(done, len as usize);
                        // Boxed: rare, and it works for longer than an allocation does.
                        let layer = &self.layers[level];
                        Box::pin(layer.read_compressed(io, cluster, skip, part)).await?;
                        len
                    }
                };
                done += len as usize;
                left -= len;
            }
        }
        self.start_run(io).await
    }

    async fn add(
        &mut self,
        io: &'a Io,
        level: usize,
        offset: u64,
        at: usize,
        len: usize,
    ) -> Result<()> {
        if let Some(run) = &mut self.run {
            if run.level == level && run.at + run.len == at && run.offset + run.len as u64 == offset
            {
                run.len += len;
                return Ok(());
            }
        }
        self.start_run(io).await?;
        self.run = Some(Run {
            level,
            offset,
            at,
            len,
        });
        Ok(())
    }

    async fn start_run(&mut self, io: &'a Io) -> Result<()> {
        let Some(run) = self.run.take() else {
            return Ok(());
        };
        self.window.make_room(io).await?;
        let part = self.to.slice(run.at, run.len);
        let storage = self.layers[run.level].data();
        self.window.push(storage.begin_read(io, run.offset, part));
        Ok(())
    }
}

/// Transfers under way, finished in the order in which they began.
#[derive(Default)]
pub(super) struct Window<'a> {
    slots: [Option<Pending<'a>>; WINDOW],
    oldest: usize,
    count: usize,
}

impl<'a> Window<'a> {
    /// Adds one; [`Window::make_room`] was called before.
    pub(super) fn push(&mut self, pending: Pending<'a>) {
        self.slots[(self.oldest + self.count) % WINDOW] = Some(pending);
        self.count += 1;
    }

    /// Finishes the oldest if there is no room for another.
    pub(super) async fn make_room(&mut self, io: &Io) -> Result<()> {
        if self.count < WINDOW {
            return Ok(());
        }
        self.finish_oldest(io).await
    }

    async fn finish_oldest(&mut self, io: &Io) -> Result<()> {
        let pending = self.slots[self.oldest].take();
        self.oldest = (self.oldest + 1) % WINDOW;
        self.count -= 1;
        match pending {
            Some(pending) => pending.finish(io).await,
            None => Ok(()),
        }
    }

    /// Finishes all; the first error.
    pub(super) async fn finish_all(&mut self, io: &Io) -> Result<()> {
        let mut first: Option<Error> = None;
        while self.count > 0 {
            if let Err(error) = self.finish_oldest(io).await {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use super::super::layer::Raw;
    use super::super::sim::{Sim, SimStorage, random};
    use super::super::tests::{dir, io, pattern};
    use super::super::{FileOptions, FileStorage, Storage};
    use super::*;

    /// A layer whose clusters are where a test wants them.
    #[derive(Debug)]
    pub struct Made {
        pub(in super::super) storage: Arc<Storage>,
        pub(in super::super) size: u64,
        cluster: u64,
        map: Vec<Cluster>,
    }

    #[derive(Clone, Copy, Debug)]
    enum Cluster {
        Data(u64),
        Zero,
        Hole,
    }

    impl Made {
        pub(in super::super) fn map(&self, offset: u64, len: u64) -> Mapping {
            assert!(len > 0 && offset + len <= self.size);
            let skip = offset % self.cluster;
            let len = len.min(self.cluster - skip);
            match self.map[(offset / self.cluster) as usize] {
                Cluster::Data(host) => Mapping::Data {
                    offset: host * self.cluster + skip,
                    len,
                },
                Cluster::Zero => Mapping::Zero { len },
                Cluster::Hole => Mapping::Backing { len },
            }
        }
    }

    fn sim(data: Vec<u8>) -> Arc<Storage> {
        let config = Sim {
            delay: 3,
            ..Sim::default()
        };
        Arc::new(Storage::Sim(SimStorage::new(data, config)))
    }

    fn raw(data: Vec<u8>) -> Layer {
        let size = data.len() as u64;
        Layer::Raw(Raw::new(sim(data), size))
    }

    fn holes(size: u64, cluster: u64) -> Layer {
        Layer::Made(Made {
            storage: sim(Vec::new()),
            size,
            cluster,
            map: vec![Cluster::Hole; size.div_ceil(cluster) as usize],
        })
    }

    fn get(layers: &[Layer], io: &Io, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut buf = io.buf(len);
        buf.fill(0xee);
        io.block_on(async { read_chain(layers, io, offset, buf.sg()).await })?;
        Ok(buf.to_vec())
    }

    /// Layers of chance, top first, and what they show.
    fn chance(
        rng: &mut u64,
        storage: &mut dyn FnMut(Vec<u8>) -> Arc<Storage>,
    ) -> (Vec<Layer>, Vec<u8>) {
        let base = pattern(1 + random(rng) as usize % 40_000, random(rng));
        let mut shown = base.clone();
        let size = base.len() as u64;
        let mut layers = vec![Layer::Raw(Raw::new(storage(base), size))];
        for _ in 0..random(rng) % 5 {
            let cluster = 512 << (random(rng) % 4);
            let size = 512 * (1 + random(rng) % 80);
            let count = size.div_ceil(cluster);
            let data = pattern((count * 2 * cluster) as usize, random(rng));
            let mut map = Vec::new();
            shown.resize(size as usize, 0);
            let mut next = 0;
            for n in 0..count {
                let place = (n * cluster) as usize..((n + 1) * cluster).min(size) as usize;
                let kind = match random(rng) % 6 {
                    0 => Cluster::Zero,
                    1 | 2 => Cluster::Hole,
                    3 => Cluster::Data(random(rng) % (count * 2)),
                    _ => Cluster::Data(next),
                };
                if let Cluster::Data(host) = kind {
                    let from = (host * cluster) as usize;
                    let len = place.len();
                    shown[place].copy_from_slice(&data[from..from + len]);
                    next = (host + 1) % (count * 2);
                } else if let Cluster::Zero = kind {
                    shown[place].fill(0);
                }
                map.push(kind);
            }
            layers.insert(
                0,
                Layer::Made(Made {
                    storage: storage(data),
                    size,
                    cluster,
                    map,
                }),
            );
        }
        (layers, shown)
    }

    #[test]
    fn any_chain_shows_what_a_model_of_it_shows() {
        let io = io();
        let dir = dir();
        let mut rng = 11;
        for round in 0..60 {
            let mut files = 0;
            // In memory, and past the page cache, where pieces really are under way together.
            let mut storage = |data: Vec<u8>| match round % 3 {
                0 => {
                    files += 1;
                    let path = dir.path().join(format!("{round}-{files}"));
                    std::fs::write(&path, data).unwrap();
                    let options = FileOptions {
                        read_only: true,
                        direct: true,
                    };
                    Arc::new(Storage::File(FileStorage::open(path, options).unwrap()))
                }
                _ => sim(data),
            };
            let (layers, shown) = chance(&mut rng, &mut storage);
            assert!(
                get(&layers, &io, 0, shown.len()).unwrap() == shown,
                "round {round}"
            );
            for _ in 0..20 {
                let offset = random(&mut rng) as usize % shown.len();
                let len = 1 + random(&mut rng) as usize % (shown.len() - offset);
                let got = get(&layers, &io, offset as u64, len).unwrap();
                assert!(
                    got == shown[offset..offset + len],
                    "round {round} {offset}+{len}"
                );
            }
        }
    }

    #[test]
    fn a_backing_file_shorter_than_the_overlay_ends_in_zeros() {
        let io = io();
        for short in [0, 1, 511, 512, 700, 4095, 4096, 5000] {
            let data = pattern(short, 3);
            let layers = [holes(8192, 4096), raw(data.clone())];
            let got = get(&layers, &io, 0, 8192).unwrap();
            assert!(
                got[..short] == data && got[short..].iter().all(|b| *b == 0),
                "{short}"
            );
            let layers = [
                holes(8192, 512),
                holes(short as u64, 4096),
                raw(pattern(8192, 4)),
            ];
            let got = get(&layers, &io, 0, 8192).unwrap();
            assert!(got[..short] == pattern(8192, 4)[..short], "{short}");
            assert!(
                got[short..].iter().all(|b| *b == 0),
                "what lies below a layer that ended does not shine through: {short}"
            );
        }
    }

    #[test]
    fn a_backing_file_longer_than_the_overlay_is_cut() {
        let io = io();
        let data = pattern(100_000, 5);
        let layers = [holes(1024, 512), raw(data.clone())];
        assert!(get(&layers, &io, 0, 1024).unwrap() == data[..1024]);
        assert!(get(&layers, &io, 512, 1024).unwrap()[512..] == [0; 512]);
    }

    #[test]
    fn a_chain_200_deep_is_walked_without_recursion() {
        let io = io();
        let data = pattern(65_536, 6);
        let mut layers: Vec<Layer> = (0..200).map(|_| holes(65_536, 512)).collect();
        layers.push(raw(data.clone()));
        assert!(get(&layers, &io, 0, 65_536).unwrap() == data);
        let one = std::mem::size_of_val(&read_chain(&layers, &io, 0, Sg::empty()));
        assert!(one < 4096, "a request's future of {one} bytes");
    }

    #[test]
    fn an_error_in_one_piece_is_the_request_s_and_the_others_end_first() {
        let io = io();
        let data = pattern(65_536, 7);
        let storage = sim(data);
        let map = (0..128).rev().map(Cluster::Data).collect();
        let layers = [Layer::Made(Made {
            storage: storage.clone(),
            size: 65_536,
            cluster: 512,
            map,
        })];
        let Storage::Sim(sim) = &*storage else {
            unreachable!()
        };
        sim.fail(super::super::sim::Kind::Read, 50, libc::EIO, false);
        let error = get(&layers, &io, 0, 65_536).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EIO));
        assert!(get(&layers, &io, 0, 65_536).is_ok());
    }

    #[test]
    fn pieces_that_lie_together_are_read_together() {
        let io = io();
        let storage = sim(pattern(65_536, 8));
        let map = (0..128).map(Cluster::Data).collect();
        let layers = [Layer::Made(Made {
            storage: storage.clone(),
            size: 65_536,
            cluster: 512,
            map,
        })];
        assert!(get(&layers, &io, 0, 65_536).unwrap() == pattern(65_536, 8));
        let Storage::Sim(sim) = &*storage else {
            unreachable!()
        };
        assert_eq!(sim.operations(), 1);
    }

    /// A layer of units with data where `data` has them, and holes elsewhere.
    fn units(unit: u64, count: u64, data: &[u64]) -> Layer {
        let place = |n| match data.contains(&n) {
            true => Cluster::Data(n),
            false => Cluster::Hole,
        };
        Layer::Made(Made {
            storage: sim(pattern((unit * count) as usize, data.len() as u64)),
            size: unit * count,
            cluster: unit,
            map: (0..count).map(place).collect(),
        })
    }

    #[test]
    fn a_read_through_holes_goes_on_where_something_is() {
        const UNIT: u64 = 64 << 10;
        let mut layers = vec![units(UNIT, 4, &[]), units(UNIT, 4, &[])];
        layers.push(units(UNIT, 4, &[1]));
        layers.push(units(UNIT, 2, &[0]));
        layers.push(raw(pattern(4 * UNIT as usize, 9)));
        let holes = Holes::of(&layers).unwrap();
        // Twice: what was found out is remembered.
        for _ in 0..2 {
            assert_eq!(holes.below(&layers, 4096, 4096), 3);
            assert_eq!(holes.below(&layers, UNIT, 512), 2);
            // The layer ends there: it is looked at, and says so.
            assert_eq!(holes.below(&layers, 2 * UNIT, 512), 3);
            assert_eq!(holes.below(&layers, UNIT - 512, 1024), 1, "two units");
            assert_eq!(holes.below(&layers, 9 * UNIT, 512), 1, "behind the end");
        }
        assert!(Holes::of(&layers[..2]).is_none(), "nothing to be saved");
    }

    #[test]
    fn a_whole_range_is_found_with_holes_as_without() {
        const UNIT: u64 = 64 << 10;
        let mut rng = 11;
        for round in 0..200 {
            let mut layers = Vec::new();
            for _ in 0..2 + random(&mut rng) % 6 {
                let count = 1 + random(&mut rng) % 4;
                let data: Vec<u64> = (0..count).filter(|_| random(&mut rng) % 4 == 0).collect();
                layers.push(units(UNIT, count, &data));
            }
            let base = 1 + random(&mut rng) % (4 * UNIT);
            layers.push(raw(pattern(base as usize, round)));
            let holes = Holes::of(&layers);
            for _ in 0..40 {
                let offset = random(&mut rng) % layers[0].size() / 512 * 512;
                let len = 512 * (1 + random(&mut rng) % 130);
                for copies in [false, true] {
                    let with = find_whole(&layers, holes.as_ref(), offset, len, copies);
                    let without = find_whole(&layers, None, offset, len, copies);
                    let place = |found: Option<Whole>| {
                        found.map(|whole| match whole {
                            Whole::Data(storage, at) => Some((std::ptr::from_ref(storage), at)),
                            Whole::Zero => None,
                        })
                    };
                    assert_eq!(place(with), place(without), "round {round} {offset}+{len}");
                }
            }
        }
    }
}
