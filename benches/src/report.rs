//! The tables: goals, ratios, absolute values; as text and as Markdown.

use crate::goals::{Metric, Outcome, Verdict};
use crate::machine;
use crate::record::{Record, Records, median};

/// More than this share of the time without a CPU, and a run says little.
const DISTURBED: f64 = 0.05;
/// More than this share of the time at work, and the client is the limit.
const SATURATED: f64 = 0.9;

/// Rows of words under a row of heads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// What it is about.
    pub title: String,
    /// What the figures are, and how to read them.
    pub note: String,
    /// Heads of the columns.
    pub heads: Vec<String>,
    /// Columns of words, which stand left; the others stand right.
    pub words: usize,
    /// The rows, each as long as the heads.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    fn new(title: &str, note: &str, heads: &[&str], words: usize) -> Self {
        Self {
            title: title.to_owned(),
            note: note.to_owned(),
            heads: heads.iter().map(|head| (*head).to_owned()).collect(),
            words,
            rows: Vec::new(),
        }
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let widths: Vec<usize> = (0..self.heads.len())
            .map(|column| {
                let cells = self.rows.iter().chain([&self.heads]);
                cells
                    .map(|row| row[column].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let line = |row: &[String]| {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let width = widths[column];
                line += &if column < self.words {
                    format!("{cell:<width$}  ")
                } else {
                    format!("{cell:>width$}  ")
                };
            }
            line.trim_end().to_owned() + "\n"
        };
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!(
            "{}\n{}\n\n{}{rows}\n",
            self.title,
            self.note,
            line(&self.heads)
        )
    }

    /// For a document.
    pub fn markdown(&self) -> String {
        let line = |row: &[String]| {
            let cells: Vec<_> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule: String = (0..self.heads.len())
            .map(|column| {
                if column < self.words {
                    " --- |"
                } else {
                    " ---: |"
                }
            })
            .collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        format!(
            "## {}\n\n{}\n\n{}|{rule}\n{rows}\n",
            self.title,
            self.note,
            line(&self.heads)
        )
    }
}

/// A number in three digits or so, such as 1.23 M.
pub fn short(number: f64) -> String {
    match number.abs() {
        n if !n.is_finite() => "-".to_owned(),
        n if n >= 1e6 => format!("{:.2}M", number / 1e6),
        n if n >= 1e4 => format!("{:.0}k", number / 1e3),
        n if n >= 1e3 => format!("{:.1}k", number / 1e3),
        n if n >= 100.0 => format!("{number:.0}"),
        n if n >= 10.0 => format!("{number:.1}"),
        n if n > 0.0 && n < 0.1 => format!("{number:.3}"),
        _ => format!("{number:.2}"),
    }
}

/// Where the extremes are, as a share of the median.
fn spread<'a>(runs: impl Iterator<Item = &'a Record> + Clone) -> Option<f64> {
    let iops = || runs.clone().map(|record| record.iops);
    let (low, high) = (
        iops().fold(f64::INFINITY, f64::min),
        iops().fold(0.0, f64::max),
    );
    Some((high - low) / median(iops())?)
}

/// Layers and loads in the order in which they first appear, layers together; and so the subjects.
struct Order<'a> {
    cells: Vec<(&'a str, &'a str)>,
    subjects: Vec<&'a str>,
}

impl<'a> Order<'a> {
    fn of(records: &'a Records) -> Self {
        let (mut cells, mut layers, mut subjects) = (Vec::new(), Vec::new(), Vec::new());
        for record in &records.runs {
            let cell = (record.layer.as_str(), record.load.as_str());
            if !cells.contains(&cell) {
                cells.push(cell);
            }
            if !layers.contains(&cell.0) {
                layers.push(cell.0);
            }
            if !subjects.contains(&record.subject.as_str()) {
                subjects.push(&record.subject);
            }
        }
        cells.sort_by_key(|(layer, _)| layers.iter().position(|l| l == layer));
        Self { cells, subjects }
    }
}

/// The goals, each with its figure and whether it was reached.
pub fn goals(outcomes: &[Outcome]) -> Table {
    let count = |wanted: fn(&Verdict) -> bool| {
        outcomes
            .iter()
            .filter(|outcome| wanted(&outcome.verdict))
            .count()
    };
    let note = format!(
        "{} met, {} not met, {} not measured. Of several loads the worst counts, and is named.",
        count(|v| *v == Verdict::Met),
        count(|v| *v == Verdict::NotMet),
        count(|v| matches!(v, Verdict::NotMeasured(_)))
    );
    let heads = [
        "case",
        "figure",
        "is",
        "goal",
        "verdict",
        "worst of its loads",
    ];
    let mut table = Table::new("Goals", &note, &heads, 2);
    for outcome in outcomes {
        let (figure, cell) = match &outcome.figure {
            Some((figure, cell)) => (short(*figure), cell.clone()),
            None => ("-".to_owned(), String::new()),
        };
        table.rows.push(vec![
            outcome.goal.case.to_owned(),
            outcome.goal.what.to_owned(),
            figure,
            outcome.goal.bound.to_string(),
            outcome.verdict.to_string(),
            cell,
        ]);
    }
    table
}

/// Ours against each other subject, with one row for each layer and load.
pub fn ratios(records: &Records, ours: &str) -> Table {
    let order = Order::of(records);
    let others: Vec<&str> = order
        .subjects
        .iter()
        .copied()
        .filter(|s| *s != ours)
        .collect();
    let mut heads = vec!["layer".to_owned(), "load".to_owned()];
    for other in &others {
        heads.extend(["IOPS", "IOPS/cpu", "p50"].map(|what| format!("{what} /{other}")));
    }
    let mut table = Table {
        title: format!("Ratios: {ours} / others"),
        note: "Medians. IOPS/cpu: requests for each second of the backend's CPU. Above 1 is better, but for \
               p50 (median latency), where below 1 is."
            .to_owned(),
        heads,
        words: 2,
        rows: Vec::new(),
    };
    for (layer, load) in order.cells {
        let figure = |who, metric: Metric| {
            median(records.of(who, layer, load).map(|record| metric.of(record)))
        };
        if others.is_empty() || figure(ours, Metric::Iops).is_none() {
            continue;
        }
        let mut row = vec![layer.to_owned(), load.to_owned()];
        for other in &others {
            for metric in [Metric::Iops, Metric::IopsPerCpu, Metric::P50] {
                let ratio = figure(ours, metric).zip(figure(other, metric));
                row.push(ratio.map_or("-".to_owned(), |(a, b)| short(a / b)));
            }
        }
        table.rows.push(row);
    }
    table
}

/// All figures of everybody.
pub fn absolute(records: &Records) -> Table {
    let mut table = Table::new(
        "Absolute values",
        "Medians; latencies in µs. client: ns of the client's CPU a request, and the share of the time in \
         which it was busy (near 100 % it is the limit). read, write: bytes of storage a request. RSS: MiB \
         without the guest's memory. spread: (max − min) / median of IOPS.",
        &[
            "layer", "load", "subject", "IOPS", "mean", "p50", "p99", "p99.9", "IOPS/cpu", "CPU %",
            "client", "busy", "kicks", "read", "write", "RSS", "flush ms", "spread",
        ],
        3,
    );
    let order = Order::of(records);
    for (layer, load) in order.cells {
        for subject in &order.subjects {
            let runs = records.of(subject, layer, load);
            let of = |figure: fn(&Record) -> f64| median(runs.clone().map(figure));
            let Some(iops) = of(|r| r.iops) else {
                continue;
            };
            let show = |figure: fn(&Record) -> f64| of(figure).map_or("-".to_owned(), short);
            let percent = |figure: Option<f64>| format!("{:.0}%", 100.0 * figure.unwrap_or(0.0));
            table.rows.push(vec![
                layer.to_owned(),
                load.to_owned(),
                (*subject).to_owned(),
                short(iops),
                show(|r| r.mean_us),
                show(|r| r.p50_us),
                show(|r| r.p99_us),
                show(|r| r.p999_us),
                show(|r| r.iops_per_cpu_s),
                percent(of(|r| r.backend_cpu_s / r.seconds)),
                show(|r| r.client_ns),
                percent(of(|r| r.client_busy)),
                show(|r| r.kicks_per_request),
                show(|r| r.read_bytes as f64 / r.requests.max(1) as f64),
                show(|r| r.write_bytes as f64 / r.requests.max(1) as f64),
                show(|r| r.resident.total_kib.saturating_sub(r.resident.shmem_kib) as f64 / 1024.0),
                show(|r| r.flush_ms),
                percent(spread(runs.clone())),
            ]);
        }
    }
    table
}

/// The special measures.
pub fn specials(records: &Records) -> Table {
    let heads = ["measure", "subject", "figure", "median"];
    let mut table = Table::new("Special measures", "Units are in the names.", &heads, 3);
    let mut seen: Vec<(&str, &str, &str)> = Vec::new();
    for special in &records.specials {
        for name in special.figures.keys() {
            let row = (
                special.measure.as_str(),
                special.subject.as_str(),
                name.as_str(),
            );
            if !seen.contains(&row) {
                seen.push(row);
            }
        }
    }
    seen.sort_by_key(|(measure, ..)| {
        records
            .specials
            .iter()
            .position(|special| special.measure == *measure)
    });
    for (measure, subject, name) in seen {
        let value = records.special(measure, subject, name);
        table.rows.push(vec![
            measure.to_owned(),
            subject.to_owned(),
            name.to_owned(),
            value.map_or("-".to_owned(), short),
        ]);
    }
    table
}

/// This run against an older one, of the same subjects.
pub fn against(records: &Records, older: &Records, name: &str) -> Table {
    let heads = ["layer", "load", "subject", "IOPS", "IOPS/cpu", "p50", "p99"];
    let note = "Medians, now / then. Other machines, or another day, are in this ratio too.";
    let mut table = Table::new(&format!("Against {name}"), note, &heads, 3);
    let order = Order::of(records);
    for (layer, load) in order.cells {
        for subject in &order.subjects {
            let ratio = |metric: Metric| {
                let of = |records: &Records| {
                    median(
                        records
                            .of(subject, layer, load)
                            .map(|record| metric.of(record)),
                    )
                };
                of(records)
                    .zip(of(older))
                    .map(|(now, then)| short(now / then))
            };
            let Some(iops) = ratio(Metric::Iops) else {
                continue;
            };
            let mut row = vec![
                layer.to_owned(),
                load.to_owned(),
                (*subject).to_owned(),
                iops,
            ];
            for metric in [Metric::IopsPerCpu, Metric::P50, Metric::P99] {
                row.push(ratio(metric).unwrap_or_else(|| "-".to_owned()));
            }
            table.rows.push(row);
        }
    }
    table
}

/// What makes runs worth less: clients at their limit, and CPUs that others had.
pub fn remarks(records: &Records) -> Vec<String> {
    let all = records.runs.len();
    let mut remarks = Vec::new();
    let disturbed = records
        .runs
        .iter()
        .filter(|r| r.client_waited > DISTURBED || r.backend_waited > DISTURBED);
    let disturbed = disturbed.count();
    if disturbed > 0 {
        remarks.push(format!(
            "{disturbed} of {all} runs were disturbed: client or backend was ready to run and had no CPU for \
             more than {:.0} % of the time.",
            100.0 * DISTURBED
        ));
    }
    let saturated: Vec<_> = records
        .runs
        .iter()
        .filter(|r| r.client_busy > SATURATED)
        .collect();
    if !saturated.is_empty() {
        let mut cells: Vec<String> = saturated
            .iter()
            .map(|r| format!("{} {} {}", r.subject, r.layer, r.load))
            .collect();
        cells.sort();
        cells.dedup();
        remarks.push(format!(
            "The client was at work more than {:.0} % of the time, so that it may be the limit: {}.",
            100.0 * SATURATED,
            cells.join(", ")
        ));
    }
    for missing in &records.missing {
        remarks.push(format!("Not measured: {}: {}.", missing.what, missing.why));
    }
    remarks
}

/// Everything, for a terminal or as a document.
pub fn whole(
    records: &Records,
    outcomes: &[Outcome],
    ours: &str,
    older: Option<(&Records, &str)>,
) -> (String, String) {
    let mut tables = vec![goals(outcomes), ratios(records, ours)];
    tables.extend(older.map(|(older, name)| against(records, older, name)));
    tables.extend([specials(records), absolute(records)]);
    tables.retain(|table| !table.rows.is_empty());
    let mut text: String = tables.iter().map(Table::text).collect();
    let mut markdown = "# Benchmark\n\n".to_owned();
    markdown.extend(tables.iter().map(Table::markdown));
    for remark in remarks(records) {
        text += &format!("{remark}\n");
        markdown += &format!("{remark}\n\n");
    }
    let machine = machine::text(&records.machine);
    text += &format!("\n{machine}");
    markdown += &format!("## Machine\n\n```\n{machine}```\n");
    (text, markdown)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Line, Special};

    fn record(subject: &str, layer: &str, iops: f64, waited: f64) -> Record {
        Record {
            subject: subject.to_owned(),
            layer: layer.to_owned(),
            load: "randread-4k-qd1".to_owned(),
            seconds: 1.0,
            requests: iops as u64,
            iops,
            p50_us: 2.0,
            backend_cpu_s: 0.5,
            iops_per_cpu_s: iops * 2.0,
            client_waited: waited,
            ..Record::default()
        }
    }

    fn of(runs: Vec<Record>) -> Records {
        Records {
            runs,
            ..Records::default()
        }
    }

    #[test]
    fn a_row_has_the_medians_and_the_ratio() {
        let mut runs: Vec<_> = [100.0, 900.0, 300.0]
            .map(|iops| record("a", "null", iops, 0.0))
            .into();
        runs.extend([200.0, 100.0].map(|iops| record("b", "null", iops, 0.0)));
        let records = of(runs);
        let ratios = ratios(&records, "a");
        assert_eq!(ratios.heads[2], "IOPS /b");
        assert_eq!(ratios.rows[0][2..], ["2.00", "2.00", "1.00"]);
        let absolute = absolute(&records);
        assert_eq!(absolute.rows[0][2..4], ["a", "300"]);
        assert_eq!(absolute.rows[0].last().unwrap(), "267%");
    }

    #[test]
    fn a_subject_that_did_not_run_is_a_dash_and_a_cell_without_ours_is_no_ratio() {
        let records = of(vec![record("a", "x", 5.0, 0.0), record("b", "y", 5.0, 0.0)]);
        let ratios = ratios(&records, "a");
        assert_eq!(ratios.rows.len(), 1);
        assert_eq!(ratios.rows[0][2], "-");
    }

    #[test]
    fn runs_that_had_no_cpu_and_clients_at_their_limit_are_told() {
        let mut busy = record("b", "null", 5.0, 0.0);
        busy.client_busy = 0.95;
        let remarks = remarks(&of(vec![record("a", "null", 5.0, 0.2), busy]));
        assert!(remarks[0].contains("1 of 2 runs were disturbed"));
        assert!(remarks[1].ends_with("b null randread-4k-qd1."));
    }

    #[test]
    fn an_older_run_is_compared_by_subject() {
        let now = of(vec![
            record("a", "null", 6.0, 0.0),
            record("b", "null", 1.0, 0.0),
        ]);
        let then = of(vec![record("a", "null", 4.0, 0.0)]);
        let table = against(&now, &then, "old");
        assert_eq!(table.rows.len(), 1);
        assert_eq!(table.rows[0][2..4], ["a", "1.50"]);
    }

    #[test]
    fn rows_are_as_long_as_the_heads_and_markdown_escapes_what_it_has_to() {
        let mut records = of(vec![record("a|b", "null", 5.0, 0.0)]);
        records.add(Line::Special(
            Special::new("idle", "a", 1).with("cpu_percent", 0.1),
        ));
        let outcomes = crate::goals::judge(&records, &["a|b".to_owned()]);
        let tables = [
            goals(&outcomes),
            ratios(&records, "a|b"),
            absolute(&records),
            specials(&records),
        ];
        for table in tables {
            assert!(
                table.rows.iter().all(|row| row.len() == table.heads.len()),
                "{}",
                table.title
            );
        }
        assert!(absolute(&records).markdown().contains("a\\|b"));
        let (text, markdown) = whole(&records, &outcomes, "a|b", None);
        assert!(text.starts_with("Goals") && markdown.contains("## Goals"));
    }

    #[test]
    fn numbers_are_short() {
        let shown = [
            6_210_000.0,
            74_300.0,
            1234.0,
            480.4,
            12.34,
            1.234,
            0.012,
            0.0,
        ]
        .map(short);
        assert_eq!(
            shown,
            [
                "6.21M", "74k", "1.2k", "480", "12.3", "1.23", "0.012", "0.00"
            ]
        );
        assert_eq!(short(f64::NAN), "-");
    }
}
