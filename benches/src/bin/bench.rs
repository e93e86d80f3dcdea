//! The runner of the benchmarks; `benches/run` builds what it needs and starts it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Parser;
use virtioblkd_bench::goals;
use virtioblkd_bench::layer::Layer;
use virtioblkd_bench::options::Options;
use virtioblkd_bench::process;
use virtioblkd_bench::record::Records;
use virtioblkd_bench::runner::Bench;
use virtioblkd_bench::{load, machine, plot, report, special, subject};

fn main() -> ExitCode {
    process::catch_signals();
    let done = run(Options::parse());
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("benches/run: {error}");
            match process::interrupted() {
                0 => ExitCode::FAILURE,
                signal => ExitCode::from(128_u8.wrapping_add(signal as u8)),
            }
        }
    }
}

/// Runs what was asked for; whether all of it went well.
fn run(options: Options) -> Result<bool, String> {
    let has_cpu = |cpu| Path::new(&format!("/sys/devices/system/cpu/cpu{cpu}")).exists();
    options.check(has_cpu, machine::cpus())?;
    special::check(&options)?;
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    let built = here.parent().ok_or("this program is in no directory")?;
    let target = built.parent().unwrap_or(built).join("bench");
    let disk = options.dir.clone().unwrap_or_else(|| target.clone());
    for dir in [&target, &disk] {
        std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
    }
    if machine::cpus() < 2 {
        return Err("the client and the backend need a CPU each".to_owned());
    }
    let out = options
        .out
        .clone()
        .unwrap_or_else(|| target.join(format!("{}.jsonl", date())));
    let older = match &options.baseline {
        Some(path) => Some((Records::read(path)?, path.display().to_string())),
        None => None,
    };
    let layers = if options.guest {
        Vec::new()
    } else {
        load::layers(&options)?
    };
    let cpus = options.backend_cpus(machine::cpus()).len();
    let nothing = |layer: &Layer| load::of(*layer, &options, cpus).is_empty();
    if !options.layers.is_empty() && !layers.is_empty() && layers.iter().all(nothing) {
        let (layers, loads) = (options.layers.join(","), &options.loads);
        return Err(format!("no load of {layers} matches: --loads {loads}"));
    }
    let subjects = subject::all(&options, built);

    let mut bench = Bench::new(options, subjects, built, &disk, &out)?;
    print!(
        "{}records   {}\n\n",
        machine::text(&bench.records.machine),
        out.display()
    );
    if bench.cpus.len() < 2 {
        let why = format!("not measurable here: {} CPUs", machine::cpus());
        bench.missing("null randread-4k-qd32-q2w2", &why);
    }
    let done = bench
        .layers(&layers)
        .and_then(|()| special::run(&mut bench));
    let failures = std::mem::take(&mut bench.failures);
    let mut ours: Vec<String> = bench
        .ours()
        .into_iter()
        .map(|subject| subject.name)
        .collect();
    if ours.is_empty() {
        ours.push("virtioblkd".to_owned());
    }
    let records = std::mem::take(&mut bench.records);
    // Ends what still runs and removes the images.
    drop(bench);
    done?;

    let outcomes = goals::judge(&records, &ours);
    let older = older
        .as_ref()
        .map(|(records, name)| (records, name.as_str()));
    let (text, markdown) = report::whole(&records, &outcomes, &ours[0], older);
    print!("{text}");
    write(&out.with_extension("md"), &markdown)?;
    let plots = [
        ("ratios", plot::ratios(&records, &ours[0])),
        ("latency", plot::latencies(&records)),
    ];
    for (name, svg) in plots {
        if let Some(svg) = svg {
            write(&out.with_extension(format!("{name}.svg")), &svg)?;
        }
    }
    println!("records   {}", out.display());
    for failure in &failures {
        println!("failed: {failure}");
    }
    Ok(failures.is_empty())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}

/// For the name of the records.
fn date() -> String {
    let output = Command::new("date").arg("+%Y%m%dT%H%M%S").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_else(|_| PathBuf::from("run").display().to_string())
}
