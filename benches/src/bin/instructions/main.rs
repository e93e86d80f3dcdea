//! Counts the instructions of a request under callgrind: a number that does not waver with the machine's load.
//!
//! `benches/instructions` builds it and runs it. Each case is a process of its own under Valgrind, in which guest and
//! worker are one thread: the driver makes a batch of requests available, the worker is turned until they have
//! completed, and only its turns are counted, from the ring's pop to the used ring's publication, with the reactor's
//! part. Before that, as many requests are served that are not counted.
//!
//! What is counted is the program's own code. Instructions of the kernel are not seen. Those of the C library are
//! printed but neither recorded nor compared: which copy and fill it chooses depends on its version and on the CPU.

mod cases;
mod profile;
mod record;
mod rings;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Parser;
use vhost_user_frontend::TempDir;

use cases::{CASES, Case, Result};
use profile::Profile;
use record::{Recorded, Verdict};

/// Count the instructions of a request
#[derive(Debug, Parser)]
struct Args {
    /// Compare with the recorded figures, and fail where one has risen
    #[arg(long, conflicts_with = "record")]
    check: bool,
    /// Record the figures
    #[arg(long)]
    record: bool,
    /// Where they are recorded
    #[arg(long, default_value = "benches/instructions.json", value_name = "PATH")]
    file: PathBuf,
    /// Only cases whose name has this in it
    #[arg(long, default_value = "", value_name = "TEXT")]
    only: String,
    /// Print each case's instructions by source file, too
    #[arg(long)]
    by_file: bool,
    /// Keep what callgrind writes there, for callgrind_annotate
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Do this case, and nothing else: what runs under Valgrind
    #[arg(long, hide = true)]
    drive: Option<String>,
}

/// What a case cost, in instructions a request.
struct Figure {
    case: &'static Case,
    own: f64,
    libraries: f64,
    files: Vec<(String, f64)>,
}

fn main() {
    match run(&Args::parse()) {
        Ok(true) => {}
        Ok(false) => std::process::exit(1),
        Err(error) => {
            eprintln!("instructions: {error}");
            std::process::exit(1);
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    if let Some(name) = &args.drive {
        let case = CASES.iter().find(|case| case.name == name);
        let case = case.ok_or_else(|| format!("no case {name}"))?;
        case.drive(case.requests())?;
        return Ok(true);
    }
    let wanted: Vec<&Case> = CASES
        .iter()
        .filter(|case| case.name.contains(&args.only))
        .collect();
    let dir = TempDir::new();
    let out = args.keep.clone().unwrap_or_else(|| dir.path().to_owned());
    std::fs::create_dir_all(&out)?;
    let recorded = Recorded::read(&args.file)?;
    println!(
        "{:<44} {:>12} {:>12} {:>10}",
        "a request", "instructions", "recorded", "libraries"
    );
    let mut figures = Vec::new();
    for case in wanted {
        let figure = count(case, &out)?;
        println!(
            "{:<44} {:>12.1} {:>12} {:>10.1}",
            case.what,
            figure.own,
            recorded.shown(case.name),
            figure.libraries
        );
        if args.by_file {
            for (file, cost) in &figure.files {
                println!("    {cost:>8.1}  {file}");
            }
        }
        figures.push(figure);
    }
    for figure in &figures {
        let own = record::rounded(figure.own);
        let line = serde_json::json!({
            "case": figure.case.name,
            "instructions": own,
            "libraries": record::rounded(figure.libraries),
        });
        println!("{line}");
    }
    if args.record {
        let new = figures.iter().map(|figure| (figure.case.name, figure.own));
        recorded.with(new).write(&args.file)?;
        println!("recorded in {}", args.file.display());
        return Ok(true);
    }
    if !args.check {
        return Ok(true);
    }
    let mut good = true;
    println!("compared {}", recorded.terms());
    for figure in figures.iter().filter(|figure| figure.case.ours) {
        match recorded.judge(figure.case.name, figure.own) {
            Verdict::Good => {}
            Verdict::Fell(words) => println!("{}: {words}", figure.case.name),
            Verdict::Rose(words) => {
                println!("FAIL {}: {words}", figure.case.name);
                good = false;
            }
        }
    }
    Ok(good)
}

/// Runs a case under callgrind.
fn count(case: &'static Case, out: &Path) -> Result<Figure> {
    let program = std::env::current_exe()?;
    let file = out.join(format!("callgrind.{}", case.name));
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--quiet", "--tool=callgrind", "--toggle-collect=*counted_*"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .arg(&program)
        .args(["--drive", case.name])
        .stdin(Stdio::null());
    let ended = valgrind
        .output()
        .map_err(|error| format!("starting valgrind: {error}; install it"))?;
    if !ended.status.success() {
        let said = String::from_utf8_lossy(&ended.stderr);
        return Err(format!("{} under valgrind: {}: {said}", case.name, ended.status).into());
    }
    let text = std::fs::read_to_string(&file)?;
    let profile = Profile::parse(&text, &program)?;
    if profile.own == 0 {
        return Err(format!("{}: callgrind has counted nothing", case.name).into());
    }
    let each = |count: u64| count as f64 / case.requests() as f64;
    let mut files: Vec<(String, f64)> = profile
        .files
        .iter()
        .map(|(file, cost)| (file.clone(), each(*cost)))
        .collect();
    files.sort_by(|one, other| other.1.total_cmp(&one.1));
    files.retain(|(_, cost)| *cost >= 0.05);
    Ok(Figure {
        case,
        own: each(profile.own),
        libraries: each(profile.libraries),
        files,
    })
}
