//! The lines of the machine-readable file: what the machine is, one run of one load, and what the special
//! measures found.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::proc::Resident;

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Line {
    /// The first line: what it ran on.
    Machine(Machine),
    /// One run of one load.
    Run(Box<Record>),
    /// One special measure.
    Special(Special),
    /// What could not be measured, and why.
    Missing(Missing),
}

/// What it ran on: names and values in the order in which they are printed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Such as `cpu` and its model.
    pub facts: Vec<(String, String)>,
}

/// What could not be measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Missing {
    /// A subject, a layer, or the name of a special measure.
    pub what: String,
    /// Why not.
    pub why: String,
}

/// What a special measure found: figures by name, with their unit in the name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Special {
    /// Which measure.
    pub measure: String,
    /// Of whom.
    pub subject: String,
    /// Which repetition, from 1.
    pub run: u32,
    /// The figures.
    pub figures: BTreeMap<String, f64>,
}

impl Special {
    /// Without figures yet.
    pub fn new(measure: &str, subject: &str, run: u32) -> Self {
        Self {
            measure: measure.to_owned(),
            subject: subject.to_owned(),
            run,
            figures: BTreeMap::new(),
        }
    }

    /// With one more figure.
    pub fn with(mut self, name: &str, value: f64) -> Self {
        self.figures.insert(name.to_owned(), value);
        self
    }
}

/// What was run and what came out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Which backend.
    pub subject: String,
    /// What the disk is made of.
    pub layer: String,
    /// The load, block size and depth in a word: `randread-4k-qd32`.
    pub load: String,
    /// Which repetition, from 1.
    pub run: u32,
    /// Bytes a request.
    pub block_size: u64,
    /// Requests in flight, over all queues.
    pub depth: u32,
    /// Queues.
    pub queues: u32,
    /// Workers that the backend was given.
    pub workers: u32,
    /// Seconds measured.
    pub seconds: f64,
    /// Requests completed in them.
    pub requests: u64,
    /// Requests that ended with another status than OK, warm-up included.
    pub errors: u64,
    /// Requests a second.
    pub iops: f64,
    /// Mean latency in microseconds.
    pub mean_us: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// Latency that 99 % do not exceed, in microseconds.
    pub p99_us: f64,
    /// Latency that 99.9 % do not exceed, in microseconds.
    pub p999_us: f64,
    /// Milliseconds of a flush after all writes; 0 for loads that only read.
    pub flush_ms: f64,
    /// Seconds of CPU that the backend used in the measured time, all threads, user and system.
    pub backend_cpu_s: f64,
    /// Requests for each of those seconds.
    pub iops_per_cpu_s: f64,
    /// Kicks (eventfd writes) that the backend asked for, a request.
    pub kicks_per_request: f64,
    /// Nanoseconds of the client's CPU for a request, from finding its completion to having published the
    /// next: what the client needs when it does not wait.
    pub client_ns: f64,
    /// Share of the measured time that those nanoseconds are. Near 1 the client is the limit.
    pub client_busy: f64,
    /// Share of the measured time in which the client was ready to run and had no CPU.
    pub client_waited: f64,
    /// The same for all threads of the backend together.
    pub backend_waited: f64,
    /// Bytes that the backend had storage read (`read_bytes` of `/proc/PID/io`).
    pub read_bytes: u64,
    /// Bytes that the backend had storage write (`write_bytes`).
    pub write_bytes: u64,
    /// Bytes that the backend read by system calls (`rchar`).
    pub rchar: u64,
    /// Bytes that the backend wrote by system calls (`wchar`).
    pub wchar: u64,
    /// The backend's memory at the end.
    pub resident: Resident,
}

/// Everything a file of records holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Records {
    /// What it ran on.
    pub machine: Machine,
    /// The runs, in their order.
    pub runs: Vec<Record>,
    /// The special measures.
    pub specials: Vec<Special>,
    /// What could not be measured.
    pub missing: Vec<Missing>,
}

impl Records {
    /// Adds one line.
    pub fn add(&mut self, line: Line) {
        match line {
            Line::Machine(machine) => self.machine = machine,
            Line::Run(record) => self.runs.push(*record),
            Line::Special(special) => self.specials.push(special),
            Line::Missing(missing) => self.missing.push(missing),
        }
    }

    /// Reads the text of a file. Lines without a kind are runs, as older files have them.
    ///
    /// # Errors
    /// The number of the first line that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut records = Self::default();
        for (number, line) in text.lines().enumerate() {
            let line = serde_json::from_str(line)
                .or_else(|error| {
                    if line.contains("\"kind\"") {
                        return Err(error);
                    }
                    serde_json::from_str(line).map(|record| Line::Run(Box::new(record)))
                })
                .map_err(|error| format!("line {}: {error}", number + 1))?;
            records.add(line);
        }
        Ok(records)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it, and its name.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|error| format!("{}: {error}", path.display()))?;
        Self::parse(&text).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// All runs of a subject with a load on a layer.
    pub fn of<'a>(
        &'a self,
        subject: &'a str,
        layer: &'a str,
        load: &'a str,
    ) -> impl Iterator<Item = &'a Record> + Clone {
        self.runs
            .iter()
            .filter(move |r| r.subject == subject && r.layer == layer && r.load == load)
    }

    /// Median of a figure of a special measure of a subject; `None` without any.
    pub fn special(&self, measure: &str, subject: &str, figure: &str) -> Option<f64> {
        let of = self.specials.iter();
        let of = of.filter(|s| s.measure == measure && s.subject == subject);
        median(of.filter_map(|s| s.figures.get(figure).copied()))
    }
}

/// The middle value; of an even number, the mean of the two in the middle; of none, `None`.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line_survives_the_file() {
        let lines = [
            Line::Machine(Machine {
                facts: vec![("cpu".into(), "one".into())],
            }),
            Line::Run(Box::new(Record {
                subject: "a".into(),
                iops: 0.5,
                ..Record::default()
            })),
            Line::Special(Special::new("idle", "a", 1).with("cpu_share", 0.25)),
            Line::Missing(Missing {
                what: "fio".into(),
                why: "not installed".into(),
            }),
        ];
        let text: Vec<_> = lines
            .iter()
            .map(|line| serde_json::to_string(line).unwrap())
            .collect();
        let records = Records::parse(&text.join("\n")).unwrap();
        let mut wanted = Records::default();
        lines.into_iter().for_each(|line| wanted.add(line));
        assert_eq!(records, wanted);
        assert_eq!(records.special("idle", "a", "cpu_share"), Some(0.25));
        assert_eq!(records.special("idle", "b", "cpu_share"), None);
    }

    #[test]
    fn a_line_of_an_older_file_is_a_run() {
        let text = r#"{"subject":"qsd","layer":"null","load":"randread-4k-qd1","iops":7.0}"#;
        let records = Records::parse(text).unwrap();
        assert_eq!(records.of("qsd", "null", "randread-4k-qd1").count(), 1);
    }

    #[test]
    fn a_line_that_is_none_is_told_by_its_number() {
        let error = Records::parse("{\"kind\":\"run\"}\n{\"kind\":\"walk\"}").unwrap_err();
        assert!(error.starts_with("line 2: "), "{error}");
    }

    #[test]
    fn the_median_of_an_even_number_is_between() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
