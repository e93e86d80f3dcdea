//! The ratios to reach: a table of what is computed from which records, and the verdicts.

use crate::record::{Record, Records, median};

mod table;

pub use table::{BURST, GOALS};

/// A figure of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Requests a second.
    Iops,
    /// Requests for each second of the backend's CPU.
    IopsPerCpu,
    /// Seconds of the backend's CPU for a second of time.
    Cpu,
    /// Microseconds of the backend's CPU for a request.
    CpuPerRequest,
    /// Median latency in microseconds.
    P50,
    /// Latency that 99 % do not exceed, in microseconds.
    P99,
}

impl Metric {
    /// Of one run.
    pub fn of(self, record: &Record) -> f64 {
        match self {
            Self::Iops => record.iops,
            Self::IopsPerCpu => record.iops_per_cpu_s,
            Self::Cpu => record.backend_cpu_s / record.seconds,
            Self::CpuPerRequest => 1e6 * record.backend_cpu_s / record.requests as f64,
            Self::P50 => record.p50_us,
            Self::P99 => record.p99_us,
        }
    }
}

/// Whose figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Ours.
    Ours,
    /// Ours with another option, measured specially: what is put behind the name.
    OursWith(&'static str),
    /// By name.
    Named(&'static str),
    /// The best of all others but fio, which serves nobody.
    BestPeer,
}

/// A layer and a load.
pub type Cell = (&'static str, &'static str);

/// How a goal's figure is computed. With several cells it is the worst of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Figure {
    /// Ours as it is, divided by a unit.
    Value(Metric, &'static [Cell], f64),
    /// Ours divided by somebody's, of the same cell.
    Ratio(Metric, &'static [Cell], Who),
    /// Ours less somebody's.
    Difference(Metric, &'static [Cell], Who),
    /// Requests a second of ours in the first cell of a pair divided by those in the second: in turns if they were
    /// measured so.
    Own(&'static [(Cell, Cell)]),
    /// A figure of a special measure of ours.
    Special(&'static str, &'static str),
    /// One figure of a special measure divided by another of the same.
    SpecialRatio(&'static str, &'static str, &'static str),
    /// A figure of special measures of ours divided by the peer's.
    SpecialToPeer(&'static [&'static str], &'static str),
}

/// Which side of the bound is good.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// The bound or more.
    AtLeast(f64),
    /// The bound or less.
    AtMost(f64),
    /// Less than the bound.
    Below(f64),
}

impl Bound {
    fn allows(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(bound) => figure >= bound,
            Self::AtMost(bound) => figure <= bound,
            Self::Below(bound) => figure < bound,
        }
    }

    /// The worse of two figures.
    fn worse(self, a: f64, b: f64) -> f64 {
        match self {
            Self::AtLeast(_) => a.min(b),
            Self::AtMost(_) | Self::Below(_) => a.max(b),
        }
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
            Self::Below(bound) => write!(f, "< {bound}"),
        }
    }
}

/// A line of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// The case.
    pub case: &'static str,
    /// What the figure is, in words.
    pub what: &'static str,
    /// How it is computed.
    pub figure: Figure,
    /// What it is to be.
    pub bound: Bound,
}

/// Whether a goal is computed from this load of this layer.
pub fn needs(layer: &str, load: &str) -> bool {
    let is = |cell: &Cell| *cell == (layer, load);
    GOALS.iter().any(|goal| match goal.figure {
        Figure::Value(_, cells, _)
        | Figure::Ratio(_, cells, _)
        | Figure::Difference(_, cells, _) => cells.iter().any(is),
        Figure::Own(pairs) => pairs.iter().any(|(a, b)| is(a) || is(b)),
        Figure::Special(..) | Figure::SpecialRatio(..) | Figure::SpecialToPeer(..) => false,
    })
}

/// All pairs of cells of ours that a goal holds against each other.
pub fn pairs() -> impl Iterator<Item = (Cell, Cell)> {
    let of = |goal: &'static Goal| match goal.figure {
        Figure::Own(pairs) => pairs,
        _ => &[],
    };
    GOALS.iter().flat_map(of).copied()
}

/// What a pair that was measured in turns is called as a special measure; its figure is [`RATIO`].
pub fn in_turns((a, b): (Cell, Cell)) -> String {
    format!("{} {} / {} {}", a.0, a.1, b.0, b.1)
}

/// The first of a pair divided by the second, of one turn.
pub const RATIO: &str = "ratio";

/// Whether it was reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It was.
    Met,
    /// It was not.
    NotMet,
    /// There is no figure, or not for all cells; why.
    NotMeasured(String),
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Met => write!(f, "met"),
            Self::NotMet => write!(f, "not met"),
            Self::NotMeasured(why) => write!(f, "not measured ({why})"),
        }
    }
}

/// What became of a goal.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Which.
    pub goal: &'static Goal,
    /// The worst figure, and of which cell, where there are several.
    pub figure: Option<(f64, String)>,
    /// The verdict.
    pub verdict: Verdict,
}

/// Judges all goals. `ours` are the names of our builds; the goals are about the first.
pub fn judge(records: &Records, ours: &[String]) -> Vec<Outcome> {
    let one = |goal| outcome(goal, records, ours);
    GOALS.iter().map(one).collect()
}

fn outcome(goal: &'static Goal, records: &Records, ours: &[String]) -> Outcome {
    let mut worst: Option<(f64, String)> = None;
    let mut missing = None;
    for (label, figure) in figures(goal, records, ours) {
        match figure {
            Ok(figure) => {
                let worse = match &worst {
                    None => true,
                    Some((so_far, _)) => goal.bound.worse(*so_far, figure) != *so_far,
                };
                if worse {
                    worst = Some((figure, label));
                }
            }
            Err(why) => missing = missing.or(Some(why)),
        }
    }
    let verdict = match (&worst, missing) {
        // One cell that fails is enough.
        (Some((figure, _)), _) if !goal.bound.allows(*figure) => Verdict::NotMet,
        (_, Some(why)) => Verdict::NotMeasured(why),
        (Some(_), None) => Verdict::Met,
        (None, None) => Verdict::NotMeasured("no records".to_owned()),
    };
    Outcome {
        goal,
        figure: worst,
        verdict,
    }
}

/// The figure of each cell, with its name.
fn figures(
    goal: &Goal,
    records: &Records,
    builds: &[String],
) -> Vec<(String, Result<f64, String>)> {
    let ours = builds.first().map_or("virtioblkd", String::as_str);
    let of = |who: &str, metric: Metric, (layer, load): Cell| {
        let runs = records.of(who, layer, load);
        median(runs.map(|record| metric.of(record)))
            .ok_or_else(|| because(records, who, layer, load))
    };
    let theirs = |who: Who, metric: Metric, cell: Cell| match who {
        Who::Ours => of(ours, metric, cell),
        Who::OursWith(option) => of(&with(ours, option), metric, cell),
        Who::Named(name) => of(name, metric, cell),
        Who::BestPeer => best_peer(records, builds, metric, cell, goal.bound),
    };
    let name = |(layer, load): Cell, cells: usize| match cells {
        1 => String::new(),
        _ => format!("{layer} {load}"),
    };
    match goal.figure {
        Figure::Value(metric, cells, unit) => cells
            .iter()
            .map(|cell| {
                (
                    name(*cell, cells.len()),
                    of(ours, metric, *cell).map(|x| x / unit),
                )
            })
            .collect(),
        Figure::Ratio(metric, cells, who) | Figure::Difference(metric, cells, who) => {
            let difference = matches!(goal.figure, Figure::Difference(..));
            let figure = |cell| {
                let (a, b) = (of(ours, metric, cell)?, theirs(who, metric, cell)?);
                Ok(if difference { a - b } else { a / b })
            };
            let cells = cells
                .iter()
                .map(|cell| (name(*cell, cells.len()), figure(*cell)));
            cells.collect()
        }
        Figure::Own(pairs) => pairs
            .iter()
            .map(|(a, b)| {
                let turns = records.special(&in_turns((*a, *b)), ours, RATIO);
                let apart = || Ok(of(ours, Metric::Iops, *a)? / of(ours, Metric::Iops, *b)?);
                (name(*a, pairs.len()), turns.map_or_else(apart, Ok))
            })
            .collect(),
        Figure::Special(measure, figure) => {
            let value = special(records, measure, ours, figure);
            vec![(String::new(), value)]
        }
        Figure::SpecialRatio(measure, a, b) => {
            let ratio = || {
                let (a, b) = (
                    special(records, measure, ours, a)?,
                    special(records, measure, ours, b)?,
                );
                Ok(a / b)
            };
            vec![(String::new(), ratio())]
        }
        Figure::SpecialToPeer(measures, figure) => measures
            .iter()
            .map(|measure| {
                let ratio = || {
                    let a = special(records, measure, ours, figure)?;
                    Ok(a / special(records, measure, "qsd", figure)?)
                };
                ((*measure).to_owned(), ratio())
            })
            .collect(),
    }
}

/// The name of a subject with another option.
pub fn with(subject: &str, option: &str) -> String {
    format!("{subject}@{option}")
}

fn special(records: &Records, measure: &str, who: &str, figure: &str) -> Result<f64, String> {
    let value = records.special(measure, who, figure);
    value.ok_or_else(|| {
        let known = records
            .missing
            .iter()
            .find(|m| m.what == measure || m.what == who);
        known.map_or_else(|| format!("no {measure} of {who}"), |m| m.why.clone())
    })
}

/// Why there is no run.
fn because(records: &Records, who: &str, layer: &str, load: &str) -> String {
    let cell = format!("{layer} {load}");
    let known = records
        .missing
        .iter()
        .find(|m| m.what == who || m.what == layer || m.what == cell);
    known.map_or_else(|| format!("no {cell} of {who}"), |m| m.why.clone())
}

/// The best figure of anybody but ours, our variants, and fio.
fn best_peer(
    records: &Records,
    ours: &[String],
    metric: Metric,
    (layer, load): Cell,
    bound: Bound,
) -> Result<f64, String> {
    let mut names: Vec<&str> = Vec::new();
    for record in &records.runs {
        let name = record.subject.as_str();
        let other = !ours.contains(&record.subject) && name != "fio" && !name.contains('@');
        if other && record.layer == layer && record.load == load && !names.contains(&name) {
            names.push(name);
        }
    }
    let medians = names.iter().filter_map(|name| {
        median(
            records
                .of(name, layer, load)
                .map(|record| metric.of(record)),
        )
    });
    // The best of theirs makes our figure the worst.
    let best = match bound {
        Bound::AtLeast(_) => medians.reduce(f64::max),
        Bound::AtMost(_) | Bound::Below(_) => medians.reduce(f64::min),
    };
    best.ok_or_else(|| format!("no peer on {layer} {load}"))
}

#[cfg(test)]
mod tests {
    use super::table::{QD1, QD32, RAW_DISK_DEEP};
    use super::*;
    use crate::layer::Layer;
    use crate::record::{Line, Missing, Special};

    fn run(subject: &str, layer: &str, load: &str, iops: f64) -> Line {
        Line::Run(Box::new(Record {
            subject: subject.into(),
            layer: layer.into(),
            load: load.into(),
            seconds: 1.0,
            requests: iops as u64,
            iops,
            p50_us: 1e6 / iops,
            backend_cpu_s: 0.5,
            iops_per_cpu_s: 2.0 * iops,
            ..Record::default()
        }))
    }

    fn verdict(lines: Vec<Line>, what: &str) -> Outcome {
        let mut records = Records::default();
        lines.into_iter().for_each(|line| records.add(line));
        let outcomes = judge(&records, &["virtioblkd".to_owned()]);
        outcomes.into_iter().find(|o| o.goal.what == what).unwrap()
    }

    #[test]
    fn every_cell_of_a_goal_is_a_load_of_a_layer_that_is_run_for_it() {
        use crate::options::Options;
        use clap::Parser;
        let options = Options::try_parse_from(["run", "--goals"]).unwrap();
        let run = |(layer, load): Cell| {
            let layer = Layer::parse(layer).unwrap();
            let loads = crate::load::of(layer, &options, 2);
            load == BURST || loads.iter().any(|spec| spec.name() == load)
        };
        for goal in GOALS {
            let cells: Vec<Cell> = match goal.figure {
                Figure::Value(_, cells, _)
                | Figure::Ratio(_, cells, _)
                | Figure::Difference(_, cells, _) => cells.to_vec(),
                Figure::Own(pairs) => pairs.iter().flat_map(|(a, b)| [*a, *b]).collect(),
                _ => Vec::new(),
            };
            for cell in cells {
                assert!(run(cell), "{cell:?} of {}", goal.case);
            }
        }
    }

    #[test]
    fn a_ratio_is_of_medians_and_held_against_its_bound() {
        let ours = [1.0, 6.0, 100.0].map(|iops| run("virtioblkd", "null", QD32, iops));
        let theirs = |iops| run("qsd", "null", QD32, iops);
        let met: Vec<_> = ours.iter().cloned().chain([theirs(2.0)]).collect();
        let outcome = verdict(met, "IOPS, ours / qsd");
        assert_eq!(
            (outcome.figure.unwrap().0, outcome.verdict),
            (3.0, Verdict::Met)
        );
        let not: Vec<_> = ours.into_iter().chain([theirs(2.5)]).collect();
        assert_eq!(verdict(not, "IOPS, ours / qsd").verdict, Verdict::NotMet);
    }

    #[test]
    fn of_several_cells_the_worst_counts_and_is_named() {
        let lines = RAW_DISK_DEEP
            .iter()
            .enumerate()
            .flat_map(|(i, (layer, load))| {
                let ours = [99.0, 98.0, 97.5, 97.0][i];
                [
                    run("virtioblkd", layer, load, ours),
                    run("fio", layer, load, 100.0),
                ]
            });
        let outcome = verdict(lines.collect(), "IOPS, ours / bare fio");
        let (figure, cell) = outcome.figure.unwrap();
        assert_eq!(
            (figure, cell.as_str()),
            (0.97, "raw-disk randwrite-4k-qd128")
        );
        assert_eq!(outcome.verdict, Verdict::Met);
    }

    #[test]
    fn what_is_missing_in_part_is_not_met_if_the_rest_fails_and_not_measured_otherwise() {
        let half = |iops| {
            let (layer, load) = RAW_DISK_DEEP[0];
            vec![
                run("virtioblkd", layer, load, iops),
                run("fio", layer, load, 100.0),
            ]
        };
        let what = "IOPS, ours / bare fio";
        assert_eq!(verdict(half(90.0), what).verdict, Verdict::NotMet);
        let verdict = verdict(half(100.0), what).verdict;
        let Verdict::NotMeasured(why) = verdict else {
            panic!("{verdict}");
        };
        assert!(why.contains("randwrite-4k-qd32"), "{why}");
    }

    #[test]
    fn a_known_reason_is_told() {
        let mut lines = vec![run("virtioblkd", "null", QD32, 5.0)];
        lines.push(Line::Missing(Missing {
            what: "qsd".into(),
            why: "not installed".into(),
        }));
        let verdict = verdict(lines, "IOPS, ours / qsd").verdict;
        assert_eq!(verdict.to_string(), "not measured (not installed)");
    }

    #[test]
    fn the_best_peer_is_neither_the_limit_nor_ourselves() {
        let mut lines = vec![run("virtioblkd", "null", QD1, 50.0)];
        lines.extend([
            run("qsd", "null", QD1, 20.0),
            run("spdk", "null", QD1, 40.0),
            run("fio", "null", QD1, 900.0),
            run("virtioblkd@poll-always", "null", QD1, 900.0),
        ]);
        let outcome = verdict(lines, "p50, ours / best peer");
        assert!((outcome.figure.unwrap().0 - 0.8).abs() < 1e-9);
        assert_eq!(outcome.verdict, Verdict::Met);
    }

    #[test]
    fn of_two_cells_of_ours_what_was_measured_in_turns_counts() {
        let chains = [
            ("chain-16-disk", QD32),
            ("chain-16-shm", QD32),
            ("chain-16-shm", QD1),
        ];
        let mut lines: Vec<Line> = Vec::new();
        for (layer, load) in chains {
            lines.push(run("virtioblkd", layer, load, 50.0));
            lines.push(run("virtioblkd", &layer.replace("16", "1"), load, 100.0));
        }
        let what = "IOPS, chain of 16 / chain of 1";
        assert_eq!(verdict(lines.clone(), what).figure.unwrap().0, 0.5);
        for ((a, b), ratio) in pairs()
            .filter(|(a, _)| chains.contains(a))
            .zip([0.95, 0.97, 0.99])
        {
            for (run, ratio) in [ratio, 0.1, 2.0].into_iter().enumerate() {
                let special = Special::new(&in_turns((a, b)), "virtioblkd", run as u32);
                lines.push(Line::Special(special.with(RATIO, ratio)));
            }
        }
        let outcome = verdict(lines, what);
        let (figure, cell) = outcome.figure.unwrap();
        assert_eq!(
            (figure, cell.as_str()),
            (0.95, "chain-16-disk randread-4k-qd32")
        );
        assert_eq!(outcome.verdict, Verdict::Met);
    }

    #[test]
    fn special_measures_are_held_against_their_bounds() {
        let idle = |percent| {
            let special = Special::new("idle", "virtioblkd", 1).with("cpu_percent", percent);
            verdict(vec![Line::Special(special)], "% of a CPU").verdict
        };
        assert_eq!((idle(0.4), idle(0.5)), (Verdict::Met, Verdict::NotMet));
        let guest = |subject, cpu| {
            let special = Special::new("guest-randread-qd32", subject, 1);
            Line::Special(special.with("cpu_share", cpu))
        };
        let both = vec![guest("virtioblkd", 0.2), guest("qsd", 0.5)];
        let outcome = verdict(both, "CPU, ours / qsd");
        assert_eq!(outcome.figure.unwrap().0, 0.4);
        assert!(matches!(outcome.verdict, Verdict::NotMeasured(_)));
    }
}
