//! The loads, and which of them belong to which layer.

use crate::goals;
use crate::layer::{Kind, Layer};
use crate::options::Options;
use crate::pattern::Load;

/// A load of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// What it does.
    pub load: Load,
    /// Bytes a request.
    pub block: u32,
    /// Requests in flight on each queue.
    pub depth: u16,
    /// Queues.
    pub queues: u16,
    /// Workers.
    pub workers: u16,
    /// Whether the usual run has it.
    usual: bool,
}

const fn spec(load: Load, block: u32, depth: u16) -> Spec {
    Spec {
        load,
        block,
        depth,
        queues: 1,
        workers: 1,
        usual: false,
    }
}

impl Spec {
    const fn usual(self) -> Self {
        Self {
            usual: true,
            ..self
        }
    }

    const fn with(self, queues: u16, workers: u16) -> Self {
        Self {
            queues,
            workers,
            ..self
        }
    }

    /// Its name, such as `randread-4k-qd32`, with `-q4w2` for four queues and two workers.
    pub fn name(self) -> String {
        let name = format!(
            "{}-{}k-qd{}",
            self.load.name(),
            self.block / 1024,
            self.depth
        );
        match (self.queues, self.workers) {
            (1, 1) => name,
            (queues, workers) => format!("{name}-q{queues}w{workers}"),
        }
    }

    /// Whether a sequential load ends with the disk: on an image without clusters, every request is to find
    /// none.
    pub fn once(self, layer: Layer) -> bool {
        self.load == Load::Write && layer.needs_fresh_image(self.load)
    }
}

const K4: u32 = 4 << 10;
const K128: u32 = 128 << 10;

/// All loads of a layer.
fn all(layer: Layer) -> Vec<Spec> {
    use Load::{Firstwrite, Randread, Randwrite, Read, Write};
    let depths = |load| {
        [1, 8, 32, 128].map(|depth| match depth {
            1 | 32 => spec(load, K4, depth).usual(),
            _ => spec(load, K4, depth),
        })
    };
    let mut loads = Vec::new();
    match layer.kind {
        Kind::Null | Kind::Nvme | Kind::Raw | Kind::Full => {
            loads.extend(depths(Randread));
            loads.extend(depths(Randwrite));
            let sequential = [spec(Read, K128, 8), spec(Write, K128, 8)];
            match layer.kind {
                Kind::Raw | Kind::Nvme => loads.extend(sequential.map(Spec::usual)),
                _ => loads.extend(sequential),
            }
        }
        Kind::Fresh => {
            loads.extend(depths(Firstwrite));
            loads.extend([
                spec(Write, K4, 1),
                spec(Write, K4, 32),
                spec(Write, K128, 8),
            ]);
        }
        Kind::OverlayRaw | Kind::OverlayQcow2 => {
            loads.extend([1, 32].map(|depth| spec(Randread, K4, depth)));
            loads.extend(depths(Firstwrite));
            loads.extend([1, 32].map(|depth| spec(Write, K4, depth).usual()));
            loads.extend([spec(Read, K128, 8), spec(Write, K128, 8)]);
        }
        Kind::Chain(_) => {
            loads.extend([1, 32].map(|depth| spec(Randread, K4, depth)));
            loads.push(spec(Read, K128, 8));
        }
    }
    if matches!(layer.kind, Kind::Null | Kind::Raw) {
        let wide = spec(Randread, K4, 32);
        loads.extend([(2, 1), (4, 1), (2, 2), (4, 2)].map(|(q, w)| wide.with(q, w)));
    }
    loads
}

/// A load of a layer by its name.
pub fn find(layer: Layer, name: &str) -> Option<Spec> {
    all(layer).into_iter().find(|spec| spec.name() == name)
}

/// Layers that a run has when none is named.
pub fn layers(options: &Options) -> Result<Vec<Layer>, String> {
    if options.layers.is_empty() {
        let wanted = |layer: &Layer| options.full || !of(*layer, options, usize::MAX).is_empty();
        return Ok(Layer::all().into_iter().filter(wanted).collect());
    }
    let named = options.layers.iter().filter(|name| *name != "none");
    named
        .map(|name| Layer::parse(name).ok_or_else(|| format!("unknown layer {name}")))
        .collect()
}

/// The loads of a layer that a run has, with this many CPUs for the backend.
pub fn of(layer: Layer, options: &Options, cpus: usize) -> Vec<Spec> {
    let name = layer.name();
    let usual_layer = !options.layers.is_empty()
        || match layer.kind {
            Kind::Nvme | Kind::OverlayQcow2 => false,
            Kind::Chain(length) => length == 1 || length == 16,
            _ => true,
        };
    let wanted = |spec: &Spec| {
        let usual = spec.usual && usual_layer && !options.goals;
        // Who names layers and loads gets every load that matches.
        let named = !options.layers.is_empty() && !options.loads.as_str().is_empty();
        let chosen = options.full || named || usual || goals::needs(&name, &spec.name());
        let allowed = !(options.read_only && spec.load.writes());
        let fits = usize::from(spec.workers) <= cpus;
        chosen && allowed && fits && options.loads.is_match(&spec.name())
    };
    let mut loads: Vec<Spec> = all(layer).into_iter().filter(wanted).collect();
    if let Some(workers) = options.workers {
        loads.retain(|spec| spec.queues == 1);
        for spec in &mut loads {
            *spec = spec.with(workers, workers);
        }
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::collections::HashSet;

    fn names(layer: &str, args: &[&str], cpus: usize) -> Vec<String> {
        let options = Options::try_parse_from(std::iter::once(&"run").chain(args)).unwrap();
        let loads = of(Layer::parse(layer).unwrap(), &options, cpus);
        loads.into_iter().map(Spec::name).collect()
    }

    #[test]
    fn no_two_loads_of_a_layer_have_one_name() {
        for layer in Layer::all() {
            let names: Vec<_> = all(layer).into_iter().map(Spec::name).collect();
            let distinct: HashSet<_> = names.iter().collect();
            assert_eq!(names.len(), distinct.len(), "{names:?}");
        }
    }

    #[test]
    fn every_load_of_the_issue_is_there() {
        let raw = names("raw-shm", &["--full"], 2);
        for load in ["randread", "randwrite"] {
            for depth in [1, 8, 32, 128] {
                assert!(raw.contains(&format!("{load}-4k-qd{depth}")));
            }
        }
        assert!(raw.contains(&"read-128k-qd8".to_owned()));
        let overlay = names("overlay-raw-shm", &["--full"], 2);
        assert!(overlay.contains(&"write-4k-qd1".to_owned()));
        assert!(overlay.contains(&"firstwrite-4k-qd128".to_owned()));
    }

    #[test]
    fn a_second_worker_needs_a_second_cpu() {
        let two = "randread-4k-qd32-q2w2".to_owned();
        assert!(names("null", &["--full"], 2).contains(&two));
        assert!(!names("null", &["--full"], 1).contains(&two));
    }

    #[test]
    fn a_regex_and_read_only_choose_among_the_loads() {
        assert_eq!(
            names("raw-shm", &["--loads", "randread-4k-qd(1|32)$"], 1).len(),
            2
        );
        let reads = names("raw-shm", &["--read-only"], 1);
        assert!(!reads.is_empty() && reads.iter().all(|name| !name.contains("write")));
    }

    #[test]
    fn a_sequential_write_ends_where_every_request_is_to_find_no_cluster() {
        let write = spec(Load::Write, K4, 1);
        assert!(write.once(Layer::parse("overlay-raw-shm").unwrap()));
        assert!(!write.once(Layer::parse("raw-shm").unwrap()));
    }
}
