//! A special measure: fio in a guest, on a qcow2 overlay that each backend serves in turn.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::layer::Kind;
use crate::proc;
use crate::process::{Running, go_on};
use crate::record::{Line, Special};
use crate::runner::Bench;
use crate::subject::{Serve, Subject};

/// How long a guest may take beside its jobs: making its initramfs, booting under emulation.
const PATIENCE: Duration = Duration::from_secs(480);
/// Jobs of the guest, for the time they take.
const JOBS: u64 = 4;

/// A job's CPU time of the backend, by the job's name.
type Cpu = Vec<(String, Duration)>;

/// Boots the guest once for each subject and run.
///
/// # Errors
/// When this program was asked to end; what else goes wrong is in the failures.
pub fn run(bench: &mut Bench) -> Result<(), String> {
    let wanted = |s: &&Subject| s.is_ours() || s.name == "qsd";
    let subjects: Vec<Subject> = bench.subjects.iter().filter(wanted).cloned().collect();
    for run in 1..=bench.options.runs() {
        for subject in &subjects {
            go_on()?;
            bench.progress(&format!("guest on {}, run {run}", subject.name));
            if let Err(error) = one(bench, subject, run) {
                go_on()?;
                bench
                    .failures
                    .push(format!("{}: guest: {error}", subject.name));
            }
        }
    }
    bench.disk.clear();
    Ok(())
}

fn one(bench: &mut Bench, subject: &Subject, run: u32) -> Result<(), String> {
    let disk = bench.disk.make(Kind::OverlayRaw)?;
    let dir = bench.sockets().join("guest");
    std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    let socket = dir.join("disk.sock");
    let serve = Serve {
        disk: &disk,
        direct: bench.disk.direct(),
        socket: &socket,
        queues: 1,
        workers: 1,
        cpus: &bench.cpus[..1],
        read_only: false,
    };
    let backend = bench.start(subject, &serve, "")?;
    // A guest's figures need longer than those of a client that does nothing else.
    let seconds = (5.0 * bench.options.seconds()).max(2.0);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest-fio");
    let mut command = bench
        .pin()
        .command(&[bench.options.client_cpu], script.as_os_str());
    command
        .arg(&dir)
        .arg(seconds.to_string())
        .stdout(Stdio::null());
    let mut guest = Running::start(&mut command).map_err(|error| error.to_string())?;
    let patience = PATIENCE + Duration::from_secs_f64(seconds) * JOBS as u32;
    let cpu = watch(&mut guest, &dir.join("vm.result"), backend.pid(), patience);
    drop(guest);
    let stopped = backend.stop();
    let text = std::fs::read_to_string(dir.join("vm.result")).unwrap_or_default();
    let _ = std::fs::remove_dir_all(&dir);
    for (name, time) in cpu? {
        let (iops, p50_us, took) = job(&text, &name)?;
        let special = Special::new(&format!("guest-{name}"), &subject.name, run)
            .with("iops", iops)
            .with("p50_us", p50_us)
            .with("cpu_share", time.as_secs_f64() / took);
        bench.add(Line::Special(special));
    }
    stopped?;
    disk.check()
}

/// Follows what the guest reports to its end; the backend's CPU time between a job's begin and end.
fn watch(guest: &mut Running, results: &Path, pid: u32, patience: Duration) -> Result<Cpu, String> {
    let begin = Instant::now();
    let (mut cpu, mut open): (Cpu, Option<(String, Duration)>) = (Vec::new(), None);
    let mut seen = 0;
    loop {
        go_on()?;
        let over = guest
            .child()
            .try_wait()
            .map_err(|error| error.to_string())?;
        let text = std::fs::read(results).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in lines.iter().skip(seen) {
            let now = || proc::cpu_time(pid).map_err(|error| format!("the backend: {error}"));
            if let Some(name) = line.strip_prefix("BEGIN ") {
                open = Some((name.trim().to_owned(), now()?));
            } else if line.starts_with("END ") {
                if let Some((name, before)) = open.take() {
                    cpu.push((name, now()?.saturating_sub(before)));
                }
            }
        }
        // The last line may grow.
        seen = if text.ends_with('\n') {
            lines.len()
        } else {
            lines.len().saturating_sub(1)
        };
        match over {
            Some(status) if status.success() => return Ok(cpu),
            Some(status) => return Err(format!("the guest's script: {status}")),
            None if begin.elapsed() > patience => return Err("the guest does not end".to_owned()),
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A job's IOPS, median latency in microseconds, and seconds, out of fio's JSON behind its `END` line.
fn job(text: &str, name: &str) -> Result<(f64, f64, f64), String> {
    let missing = || format!("no result of {name}");
    let (_, rest) = text
        .split_once(&format!("END {name}\n"))
        .ok_or_else(missing)?;
    let rest = &rest[rest.find('{').ok_or_else(missing)?..];
    let mut documents = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
    let document = documents.next().ok_or_else(missing)?;
    let document = document.map_err(|error| format!("{name}: {error}"))?;
    let job = &document["jobs"][0];
    let way = &job[if name.contains("write") {
        "write"
    } else {
        "read"
    }];
    let number = |value: &Value| value.as_f64().ok_or_else(missing);
    let p50 = &way["lat_ns"]["percentile"]["50.000000"];
    Ok((
        number(&way["iops"])?,
        number(p50)? / 1e3,
        number(&way["runtime"])? / 1e3,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_found_behind_its_end_among_others() {
        let result = |iops: f64| {
            format!(
                "{{\"jobs\":[{{\"write\":{{\"iops\":{iops},\"runtime\":2000,\
                 \"lat_ns\":{{\"percentile\":{{\"50.000000\":9000}}}}}}}}]}}\n"
            )
        };
        let text = format!(
            "\nBEGIN randwrite-qd1\nEND randwrite-qd1\n{}BEGIN randwrite-qd32\nEND randwrite-qd32\n{}\
             GUEST-EXIT 0\n",
            result(10.0),
            result(20.0)
        );
        assert_eq!(job(&text, "randwrite-qd1"), Ok((10.0, 9.0, 2.0)));
        assert_eq!(job(&text, "randwrite-qd32").unwrap().0, 20.0);
        assert!(job(&text, "randread-qd1").is_err());
        assert!(job("END x\n{", "x").is_err());
    }
}
