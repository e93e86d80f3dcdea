//! How daemons die.

use std::path::Path;
use std::sync::OnceLock;

use vhost_user_frontend::guest::Random;

use crate::case::Case;
use crate::life::Tally;

/// How a life ends.
#[derive(Clone, Debug)]
pub enum Death {
    /// In the daemon, at the n-th pass of a place in its source.
    At { point: String, count: u64 },
    /// By a signal, when so many requests were completed, and a moment later.
    Signal { after: u64, spin: u32 },
    /// By a signal a moment after the rings were asked to stop: the image is being given back.
    InStop { after: u64, spin: u32 },
    /// By a signal a moment after it was asked to end.
    InTerm { after: u64, spin: u32 },
}

/// The places that the daemon has in its source.
pub fn kill_points() -> &'static [String] {
    static POINTS: OnceLock<Vec<String>> = OnceLock::new();
    POINTS.get_or_init(|| {
        let mut points = Vec::new();
        collect(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
            &mut points,
        );
        points.sort();
        points.dedup();
        assert!(points.len() >= 4, "no kill points: {points:?}");
        points
    })
}

fn collect(dir: &Path, points: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, points);
        } else if path.extension().is_some_and(|e| e == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            // The macros' own definitions and documentation have no name in them. The journal has one of its own.
            for name in ["kill_point!(\"", "step!(\""] {
                let calls = text.split(name).skip(1);
                points.extend(calls.filter_map(|c| c.split('"').next()).map(str::to_owned));
            }
        }
    }
}

/// Whether a case comes by a place at all, as far as its name says so.
fn concerns(case: &Case, point: &str) -> bool {
    let other_ring = match case.packed {
        true => "ring-split",
        false => "ring-packed",
    };
    let other_format = case.format == "raw" && point.starts_with("journal");
    !other_format && !point.starts_with(other_ring)
}

impl Death {
    /// How a life without a predecessor ends: half of the time where a region is made ready for use, which is
    /// passed in such lives only.
    pub fn pick_first(case: &Case, random: &mut Random, tally: &Tally, nth: u64) -> Self {
        let wanted = |point: &&String| point.contains("fresh") && concerns(case, point);
        let fresh: Vec<_> = kill_points().iter().filter(wanted).collect();
        match random.below(2) {
            0 if !fresh.is_empty() => Death::At {
                point: fresh[random.below(fresh.len() as u64) as usize].clone(),
                count: 1 + random.below(u64::from(case.queues)),
            },
            _ => Self::pick(case, random, tally, None, nth),
        }
    }

    /// How the next life ends, after one that ended so: mostly at one of the places in the source.
    pub fn pick(
        case: &Case,
        random: &mut Random,
        tally: &Tally,
        last: Option<&Self>,
        nth: u64,
    ) -> Self {
        let after = match random.below(3) {
            0 => random.below(4),
            1 => random.below(40),
            _ => random.below(200),
        };
        let spin = random.below(2000) as u32;
        match random.below(20) {
            0..=3 => Death::Signal { after, spin },
            4 => Death::InStop { after, spin },
            5 => Death::InTerm { after, spin },
            _ => Self::pick_place(case, random, tally, last, nth),
        }
    }

    fn pick_place(
        case: &Case,
        random: &mut Random,
        tally: &Tally,
        last: Option<&Self>,
        nth: u64,
    ) -> Self {
        // Places that this case does not come by are tried a few times only.
        let tried = |point: &&String| {
            let rare = tally.not_reached.get(*point) >= Some(&8);
            concerns(case, point) && (!rare || tally.by_point.contains_key(*point))
        };
        let points: Vec<_> = kill_points().iter().filter(tried).collect();
        let number = points.len() as u64;
        // Often one of the recovery from what the last death left behind.
        let recovery = match last {
            Some(Death::At { point, .. }) if point.starts_with("journal") => "replay",
            Some(Death::At { point, .. }) if point == "ring-packed-written" => "restored",
            Some(Death::At { point, .. }) if point == "ring-packed-shown" => "repaired",
            _ => "",
        };
        let of_recovery = |p: &&&String| !recovery.is_empty() && p.contains(recovery);
        let next: Vec<_> = points.iter().filter(of_recovery).collect();
        if !next.is_empty() && random.below(2) == 0 {
            let point = next[random.below(next.len() as u64) as usize].to_string();
            return Death::At { point, count: 1 };
        }
        // Any place after any other, and each in turn.
        let at = match random.below(3) {
            0 => random.below(number),
            _ => nth % number,
        };
        let point = points[at as usize].clone();
        // Low counts meet the recovery of what was in flight.
        let most = if case.depth == 1 { 60 } else { 400 };
        let count = match random.below(5) {
            _ if point.starts_with("stop") => 1,
            0 => 1,
            1 => 1 + nth / number % 40,
            2 => 1 + random.below(8),
            3 => 1 + random.below(60),
            _ => 1 + random.below(most),
        };
        Death::At { point, count }
    }
}
