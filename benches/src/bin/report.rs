//! Prints the tables of a file of records again.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use virtioblkd_bench::record::Records;
use virtioblkd_bench::{goals, report};

/// Print the tables of a file of JSON lines
#[derive(Debug, Parser)]
struct Args {
    /// Our builds; the goals are about the first
    #[arg(long, value_delimiter = ',', default_value = "virtioblkd")]
    ours: Vec<String>,
    /// Older records to compare with
    #[arg(long)]
    baseline: Option<PathBuf>,
    /// As Markdown
    #[arg(long)]
    markdown: bool,
    /// The files; several are taken together
    #[arg(required = true)]
    records: Vec<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("report: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<String, String> {
    let mut records = Records::default();
    for path in &args.records {
        let more = Records::read(path)?;
        records.machine = more.machine;
        records.runs.extend(more.runs);
        records.specials.extend(more.specials);
        records.missing.extend(more.missing);
    }
    let older = match &args.baseline {
        Some(path) => Some((Records::read(path)?, path.display().to_string())),
        None => None,
    };
    let older = older
        .as_ref()
        .map(|(records, name)| (records, name.as_str()));
    let outcomes = goals::judge(&records, &args.ours);
    let (text, markdown) = report::whole(&records, &outcomes, &args.ours[0], older);
    Ok(if args.markdown { markdown } else { text })
}
