//! Layers of ours that a goal holds against each other, one after the other and again: what a disk can do drifts within
//! minutes, and by more than they differ.

use crate::goals::{self, Cell, RATIO};
use crate::layer::{Disk, Images, Layer, Place, is_sound};
use crate::load::{self, Spec};
use crate::process::go_on;
use crate::record::{Line, Special};
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
    /// With images of its own, beside those of others; `None` for what cannot be run here or was not asked for.
    fn new(bench: &Bench, (layer, name): Cell, beside: &str) -> Result<Option<Self>, String> {
        let (Some(layer), options) = (Layer::parse(layer), &bench.options) else {
            return Err(format!("no layer {layer}"));
        };
        let spec = load::find(layer, name).ok_or_else(|| format!("no load {name}"))?;
        let fits = usize::from(spec.workers) <= bench.cpus.len();
        let allowed = !(options.read_only && spec.load.writes());
        if !(fits && allowed && options.loads.is_match(name)) {
            return Ok(None);
        }
        let dir = bench.images(layer.place).dir().join(beside);
        std::fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let images = Images::new(&dir, options.size(), layer.place == Place::Disk);
        let disk = images.make(layer.kind)?;
        Ok(Some(Self {
            layer,
            spec,
            images,
            disk,
        }))
    }

    /// Requests a second of one run.
    fn iops(&mut self, bench: &Bench, subject: &Subject, run: u32) -> Result<f64, String> {
        if self.layer.needs_fresh_image(self.spec.load) {
            self.disk = self.images.make(self.layer.kind)?;
        }
        let (record, ended) = bench.serve(subject, self.layer, &self.disk, self.spec, run)?;
        ended?;
        match self.disk.qcow2() {
            Some(image) if !is_sound(image) => Err("it left a broken image".to_owned()),
            _ => Ok(record.iops),
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.images.dir());
    }
}

/// All pairs of the goals, for each build of ours.
pub(super) fn measure(bench: &mut Bench) -> Result<(), String> {
    for (a, b) in goals::pairs() {
        go_on()?;
        let name = goals::in_turns((a, b));
        bench.progress(&name);
        let sides = (Side::new(bench, a, "a")?, Side::new(bench, b, "b")?);
        if let (Some(mut a), Some(mut b)) = sides {
            turns(bench, &name, &mut a, &mut b).map_err(|error| format!("{name}: {error}"))?;
        }
    }
    Ok(())
}

fn turns(bench: &mut Bench, name: &str, a: &mut Side, b: &mut Side) -> Result<(), String> {
    for run in 1..=TURNS * bench.options.runs() {
        for subject in bench.ours() {
            go_on()?;
            // Who comes first changes.
            let (of_a, of_b) = if run % 2 == 1 {
                let of_a = a.iops(bench, &subject, run)?;
                (of_a, b.iops(bench, &subject, run)?)
            } else {
                let of_b = b.iops(bench, &subject, run)?;
                (a.iops(bench, &subject, run)?, of_b)
            };
            let special = Special::new(name, &subject.name, run)
                .with("iops", of_a)
                .with("iops_beside", of_b)
                .with(RATIO, of_a / of_b);
            bench.add(Line::Special(special));
        }
    }
    Ok(())
}
