//! `virtioblkd check`: is an image consistent, and can it be made so?
//!
//! Options, output and exit status are those of `qemu-img check`, so that scripts can use either.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use crate::block::error::Result;
use crate::block::lock::Role;
use crate::block::qcow2::check::{Finding, Fix, Report, check_with};
use crate::block::qcow2::repair::{self, Repair, Repaired};
use crate::block::{FileOptions, FileStorage, Storage};
use crate::config::Format;
use crate::reactor::{Epochs, Io, IoConfig};

/// Findings that are written one by one; the rest are counted.
const MAX_TOLD: usize = 50;
/// Operations in flight.
const ENTRIES: u32 = 64;

/// Options of `virtioblkd check`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct CheckArgs {
    /// The image
    pub image: PathBuf,

    /// Format of the image; raw images hold nothing that could be checked
    #[arg(short = 'f', long, value_enum, default_value = "qcow2")]
    pub format: Format,

    /// How to write the result
    #[arg(long, value_enum, default_value = "human")]
    pub output: Output,

    /// Repair leaked clusters, or all that can be; nobody else may use the image meanwhile
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<What>,

    /// Tell on stderr how far the check has come, also where that is no terminal
    #[arg(short, long)]
    pub progress: bool,
}

/// How a result is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    Human,
    /// For programs, with the keys of `qemu-img check`.
    Json,
}

/// What is to be repaired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Clusters that nothing uses.
    Leaks,
    /// Whatever can be.
    All,
}

/// How a check ended, as `qemu-img check` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Neither errors nor leaks.
    Clean = 0,
    /// The check could not be done.
    Failed = 1,
    /// There are errors.
    Errors = 2,
    /// There are leaks only.
    Leaks = 3,
    /// The format has nothing to check.
    Unsupported = 63,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

/// Does what `args` ask for. The result goes to stdout; findings, advice and failures to stderr.
pub fn run(args: &CheckArgs) -> Status {
    if args.format != Format::Qcow2 {
        eprintln!("virtioblkd: this image format does not support checks");
        return Status::Unsupported;
    }
    let mut bar = Bar::new(args.progress || std::io::stderr().is_terminal());
    let done = work(args, &mut bar);
    bar.end();
    match done {
        Ok(done) => tell(args, &done, &mut std::io::stdout().lock()).unwrap_or_else(|error| {
            eprintln!("virtioblkd: writing the result: {error}");
            Status::Failed
        }),
        Err(error) => {
            eprintln!("virtioblkd: check failed: {error}");
            Status::Failed
        }
    }
}

fn work(args: &CheckArgs, bar: &mut Bar) -> Result<Repaired> {
    let storage = FileStorage::open(
        &args.image,
        FileOptions {
            read_only: args.repair.is_none(),
            direct: false,
        },
    )?;
    let storage = Storage::File(storage);
    storage.lock(match args.repair {
        None => Role::Reader,
        Some(_) => Role::ImageWriter,
    })?;
    let io = Io::new(&IoConfig {
        worker: 0,
        entries: ENTRIES,
        epochs: Epochs::new(),
    })
    .map_err(|error| crate::block::error::Error::io(&args.image, "set up io_uring", None, error))?;
    let mut progress = |part| bar.show(part);
    let done = io.block_on(async {
        let what = match args.repair {
            None => {
                let report = check_with(&io, &storage, &mut progress).await?;
                return Ok(Repaired {
                    before: report.clone(),
                    after: report,
                });
            }
            Some(What::Leaks) => Repair::Leaks,
            Some(What::All) => Repair::All,
        };
        repair::repair(&io, &storage, what, &mut progress).await
    });
    io.close();
    storage.unlock();
    done
}

fn tell(args: &CheckArgs, done: &Repaired, out: &mut impl Write) -> std::io::Result<Status> {
    let report = &done.after;
    tell_findings(&args.image, args.repair.is_some(), done);
    match args.output {
        Output::Json => writeln!(out, "{:#}", to_json(&args.image, done))?,
        Output::Human => human(report, done, out)?,
    }
    Ok(match (report.errors, report.leaks) {
        (0, 0) => Status::Clean,
        (0, _) => Status::Leaks,
        _ => Status::Errors,
    })
}

/// Tells what was found, and what to do about what is left.
fn tell_findings(image: &Path, repaired: bool, done: &Repaired) {
    let left = &done.after;
    let show = |prefix: &str, findings: &[Finding], count: u64| {
        for finding in findings.iter().take(MAX_TOLD) {
            eprintln!("{prefix}{finding}");
        }
        let more = count.saturating_sub(findings.len().min(MAX_TOLD) as u64);
        if more > 0 {
            eprintln!("{prefix}and {more} more");
        }
    };
    if repaired && (done.errors_fixed() > 0 || done.leaks_fixed() > 0) {
        let before = &done.before;
        show(
            "found: ",
            &before.findings,
            before.errors.saturating_add(before.leaks),
        );
    }
    show("", &left.findings, left.errors.saturating_add(left.leaks));
    let image = image.display();
    if left.errors > left.lasting {
        eprintln!("to repair what can be repaired: virtioblkd check -r all {image}");
    } else if left.leaks > 0 && left.errors == 0 {
        eprintln!("to give leaked clusters back: virtioblkd check -r leaks {image}");
    }
    if left.lasting > 0 {
        let place = left
            .findings
            .iter()
            .find(|finding| finding.fix == Fix::Never);
        let place = place.map_or(0, |finding| finding.offset);
        eprintln!(
            "no repair can tell what the errors like the one at offset {place:#x} were meant to be: save \
             what can be read with qemu-img convert, or go back to a backup"
        );
    }
}

fn human(report: &Report, done: &Repaired, out: &mut impl Write) -> std::io::Result<()> {
    let (errors, leaks) = (done.errors_fixed(), done.leaks_fixed());
    if errors + leaks > 0 {
        writeln!(
            out,
            "The following inconsistencies were found and repaired:\n"
        )?;
        writeln!(
            out,
            "    {leaks} leaked clusters\n    {errors} corruptions\n"
        )?;
    }
    if report.is_clean() {
        writeln!(out, "No errors were found on the image.")?;
    }
    if report.errors > 0 {
        writeln!(
            out,
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image \
             may corrupt it.",
            report.errors
        )?;
    }
    if report.leaks > 0 {
        writeln!(
            out,
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to \
             data.",
            report.leaks
        )?;
    }
    let percent = |part: u64, of: u64| part as f64 * 100.0 / of.max(1) as f64;
    let (allocated, total) = (report.allocated, report.total);
    if total > 0 && allocated > 0 {
        writeln!(
            out,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(report.fragmented, allocated),
            percent(report.compressed, allocated),
        )?;
    }
    writeln!(out, "Image end offset: {}", report.image_end)
}

/// The object that `qemu-img check --output=json` writes: counts of 0 are left out where it does so.
fn to_json(image: &Path, done: &Repaired) -> Value {
    let report = &done.after;
    let mut object = Map::new();
    object.insert("filename".into(), json!(image.to_string_lossy()));
    object.insert("format".into(), json!("qcow2"));
    object.insert("check-errors".into(), json!(0));
    for (key, count) in [
        ("image-end-offset", report.image_end),
        ("corruptions", report.errors),
        ("leaks", report.leaks),
        ("corruptions-fixed", done.errors_fixed()),
        ("leaks-fixed", done.leaks_fixed()),
        ("total-clusters", report.total),
        ("allocated-clusters", report.allocated),
        ("fragmented-clusters", report.fragmented),
        ("compressed-clusters", report.compressed),
    ] {
        if count > 0 {
            object.insert(key.into(), json!(count));
        }
    }
    Value::Object(object)
}

/// A line on stderr that tells how far the work has come.
struct Bar {
    shown: Option<u32>,
    wanted: bool,
}

impl Bar {
    fn new(wanted: bool) -> Self {
        Self {
            shown: None,
            wanted,
        }
    }

    fn show(&mut self, part: f64) {
        let percent = (part * 100.0) as u32;
        if self.wanted && self.shown != Some(percent) {
            self.shown = Some(percent);
            eprint!("\r    ({percent}/100%)");
        }
    }

    fn end(&self) {
        if self.shown.is_some() {
            eprintln!();
        }
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
