//! Layers of ours that a goal holds against each other, one after the other and again: what a disk can do drifts within
//! minutes, and by more than they differ.

use crate::goals::{self, Cell, RATIO};
use crate::layer::{Disk, Images, Layer, Place};
use crate::load::{self, Spec};
use crate::process::go_on;
use crate::record::{Line, Record, Special};
use crate::runner::Bench;
use crate::subject::Subject;

/// Turns for each run of a load: they are short, and what is sought is small.
const TURNS: u32 = 3;

/// A cell, and what it is run on.
struct Side {
    layer: Layer,
    spec: Spec,
    images: Images,
    disk: Disk,
}

impl Side {
    /// With images of its own, beside those of others.
    fn new(bench: &Bench, (layer, spec): (Layer, Spec), beside: &str) -> Result<Self, String> {
        let dir = bench.images(layer.place).dir().join(beside);
        std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let images = Images::new(&dir, bench.options.size(), layer.place == Place::Disk);
        let disk = images.make(layer.kind)?;
        Ok(Self {
            layer,
            spec,
            images,
            disk,
        })
    }

    /// One run.
    fn run(&mut self, bench: &Bench, subject: &Subject, run: u32) -> Result<Box<Record>, String> {
        if self.layer.needs_fresh_image(self.spec.load) {
            self.disk = self.images.make(self.layer.kind)?;
        }
        let (record, ended) = bench.run_once(subject, self.layer, &self.disk, self.spec, run)?;
        ended.and_then(|()| self.disk.check())?;
        Ok(record)
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.images.dir());
    }
}

/// What a cell is, if it can be run here and was asked for.
fn wanted(bench: &Bench, (layer, name): Cell) -> Option<(Layer, Spec)> {
    let (layer, options) = (Layer::parse(layer)?, &bench.options);
    let spec = load::find(layer, name)?;
    let fits = usize::from(spec.workers) <= bench.cpus.len();
    let allowed = !(options.read_only && spec.load.writes());
    (fits && allowed && options.loads.is_match(name)).then_some((layer, spec))
}

/// All pairs of the goals, for each build of ours.
pub(super) fn measure(bench: &mut Bench) -> Result<(), String> {
    for (a, b) in goals::pairs() {
        go_on()?;
        let name = goals::in_turns((a, b));
        let (Some(a), Some(b)) = (wanted(bench, a), wanted(bench, b)) else {
            continue;
        };
        bench.progress(&name);
        if let Err(error) = turns(bench, &name, a, b) {
            go_on()?;
            bench.failures.push(format!("{name}: {error}"));
        }
    }
    Ok(())
}

fn turns(bench: &mut Bench, name: &str, a: (Layer, Spec), b: (Layer, Spec)) -> Result<(), String> {
    let (mut a, mut b) = (Side::new(bench, a, "a")?, Side::new(bench, b, "b")?);
    for run in 1..=TURNS * bench.options.runs() {
        for subject in bench.ours() {
            go_on()?;
            // Who comes first changes.
            let (of_a, of_b) = if run % 2 == 1 {
                let of_a = a.run(bench, &subject, run)?;
                (of_a, b.run(bench, &subject, run)?)
            } else {
                let of_b = b.run(bench, &subject, run)?;
                (a.run(bench, &subject, run)?, of_b)
            };
            let waited = |of: &Record| of.client_waited.max(of.backend_waited);
            let special = Special::new(name, &subject.name, run)
                .with("iops", of_a.iops)
                .with("iops_beside", of_b.iops)
                .with(RATIO, of_a.iops / of_b.iops)
                .with("waited_share", waited(&of_a).max(waited(&of_b)));
            bench.add(Line::Special(special));
        }
    }
    Ok(())
}
