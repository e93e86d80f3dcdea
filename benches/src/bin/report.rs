//! Reads the records of a benchmark, and prints the table: medians, and ours against theirs.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::PathBuf;

use clap::Parser;
use virtioblkd_bench::record::Record;

/// Print a table of medians and ratios from a file of JSON lines
#[derive(Debug, Parser)]
struct Args {
    /// The subject that ratios are of
    #[arg(long, default_value = "virtioblkd")]
    ours: String,
    /// The subject that it is compared with
    #[arg(long, default_value = "qsd")]
    theirs: String,
    /// The file
    records: PathBuf,
}

/// More than this share of the time without a CPU, and a run says little.
const DISTURBED: f64 = 0.05;

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("report: {error}");
        std::process::exit(1);
    }
}

/// The middle value; of an even number, the mean of the two in the middle.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// Where the extremes are, as a share of the median.
fn spread(runs: &[&Record]) -> f64 {
    let iops = || runs.iter().map(|r| r.iops);
    let (low, high) = (
        iops().fold(f64::INFINITY, f64::min),
        iops().fold(0.0, f64::max),
    );
    (high - low) / median(iops())
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(&args.records)?;
    let records: Vec<Record> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    print!("{}", table(&records, &args.ours, &args.theirs));
    Ok(())
}

/// The table, in the order in which layers and loads first appear.
fn table(records: &[Record], ours: &str, theirs: &str) -> String {
    let mut groups: BTreeMap<(&str, &str, &str), Vec<&Record>> = BTreeMap::new();
    let mut order: Vec<(&str, &str)> = Vec::new();
    for record in records {
        let (layer, load) = (record.layer.as_str(), record.load.as_str());
        if !order.contains(&(layer, load)) {
            order.push((layer, load));
        }
        groups
            .entry((layer, load, &record.subject))
            .or_default()
            .push(record);
    }
    // Layers together, whatever order the runs came in.
    let mut layers: Vec<&str> = Vec::new();
    for (layer, _) in &order {
        if !layers.contains(layer) {
            layers.push(layer);
        }
    }
    order.sort_by_key(|(layer, _)| layers.iter().position(|l| l == layer));

    let mut out = format!(
        "ours = {ours}, theirs = {theirs}; medians; latencies in µs; ratio = ours/theirs; \
         spread = (max-min)/median of IOPS, the worse of both\n\n"
    );
    out += &format!(
        "{:<14} {:<19}| {:>9} {:>9} {:>6} | {:>9} {:>9} {:>6} | {:>15} | {:>17} | {:>15} | {:>6}\n",
        "layer",
        "load",
        "IOPS",
        "theirs",
        "ratio",
        "IOPS/cpus",
        "theirs",
        "ratio",
        "p50",
        "p99",
        "flush ms",
        "spread"
    );
    let mut disturbed = 0;
    for (layer, load) in order {
        let runs = |subject| {
            groups
                .get(&(layer, load, subject))
                .map_or(&[][..], Vec::as_slice)
        };
        let (a, b) = (runs(ours), runs(theirs));
        let of = |runs: &[&Record], f: fn(&Record) -> f64| median(runs.iter().map(|r| f(r)));
        let pair = |f: fn(&Record) -> f64| (of(a, f), of(b, f));
        let number = |x: f64, digits: usize| {
            if x.is_nan() {
                "-".to_owned()
            } else {
                format!("{x:.digits$}")
            }
        };
        let (iops, cpu) = (pair(|r| r.iops), pair(|r| r.iops_per_cpu_s));
        let (p50, p99) = (pair(|r| r.p50_us), pair(|r| r.p99_us));
        let flush = pair(|r| r.flush_ms);
        let both =
            |(x, y): (f64, f64), digits| format!("{} / {}", number(x, digits), number(y, digits));
        out += &format!(
            "{layer:<14} {load:<19}| {:>9} {:>9} {:>6} | {:>9} {:>9} {:>6} | {:>15} | {:>17} | {:>15} | {:>5.0}%\n",
            number(iops.0, 0),
            number(iops.1, 0),
            number(iops.0 / iops.1, 2),
            number(cpu.0, 0),
            number(cpu.1, 0),
            number(cpu.0 / cpu.1, 2),
            both(p50, 1),
            both(p99, 1),
            both(flush, 1),
            100.0 * spread(a).max(spread(b)),
        );
        disturbed += a
            .iter()
            .chain(b)
            .filter(|r| r.client_waited > DISTURBED || r.backend_waited > DISTURBED)
            .count();
    }
    if disturbed > 0 {
        out += &format!(
            "\n{disturbed} of {} runs were disturbed: client or backend was ready to run and had no CPU \
             for more than {:.0} % of the time.\n",
            records.len(),
            100.0 * DISTURBED
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(subject: &str, layer: &str, iops: f64, waited: f64) -> Record {
        Record {
            subject: subject.to_owned(),
            layer: layer.to_owned(),
            load: "randread-4k-qd1".to_owned(),
            run: 1,
            block_size: 4096,
            depth: 1,
            queues: 1,
            seconds: 1.0,
            requests: iops as u64,
            errors: 0,
            iops,
            mean_us: 1.0,
            p50_us: 2.0,
            p99_us: 3.0,
            p999_us: 4.0,
            flush_ms: 0.0,
            backend_cpu_s: 0.5,
            iops_per_cpu_s: iops * 2.0,
            kicks_per_request: 0.0,
            client_waited: waited,
            backend_waited: 0.0,
        }
    }

    #[test]
    fn a_line_has_the_medians_and_the_ratio() {
        let mut records: Vec<_> = [100.0, 900.0, 300.0]
            .map(|iops| record("a", "null", iops, 0.0))
            .into();
        records.extend([200.0, 100.0].map(|iops| record("b", "null", iops, 0.0)));
        let table = table(&records, "a", "b");
        let line = table.lines().find(|l| l.starts_with("null")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words[3..6], ["300", "150", "2.00"], "{line}");
        assert!(line.trim_end().ends_with("267%"), "{line}");
        assert!(!table.contains("disturbed"));
    }

    #[test]
    fn a_subject_that_did_not_run_is_a_dash() {
        let table = table(&[record("b", "null", 5.0, 0.0)], "a", "b");
        let line = table.lines().find(|l| l.starts_with("null")).unwrap();
        assert_eq!(line.split_whitespace().nth(3), Some("-"), "{line}");
    }

    #[test]
    fn runs_that_had_no_cpu_are_counted() {
        let records = [record("a", "null", 5.0, 0.2), record("b", "null", 5.0, 0.0)];
        assert!(table(&records, "a", "b").contains("1 of 2 runs were disturbed"));
    }

    #[test]
    fn a_record_survives_its_file() {
        let record = record("a", "null", 5.0, 0.0);
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
    }
}
