//! What a benchmark ran on.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::layer::Images;
use crate::options::Options;
use crate::record::Machine;
use crate::subject::{Subject, What};

/// CPUs that this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The first line that a program prints.
fn says(program: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default().trim();
    (output.status.success() && !line.is_empty()).then(|| line.to_owned())
}

/// The value of the first line of a file in /proc that begins with a name.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line
        .unwrap_or_default()
        .trim_start_matches([' ', '\t', ':']);
    value.to_owned()
}

/// All of it.
pub fn describe(
    options: &Options,
    subjects: &[Subject],
    disk: &Images,
    shm: &Images,
    backend_cpus: &[usize],
) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let run = |program: &str, args: &[&str]| says(Path::new(program), args).unwrap_or_default();
    let mut facts = Vec::new();
    let mut fact = |name: &str, value: String| facts.push((name.to_owned(), value));
    fact("date", run("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]));
    let model = field(&read("/proc/cpuinfo"), "model name");
    fact("cpu", format!("{model}, {} CPUs", cpus()));
    fact("memory", field(&read("/proc/meminfo"), "MemTotal"));
    fact(
        "kernel",
        format!("Linux {}", read("/proc/sys/kernel/osrelease").trim()),
    );
    let directory = disk.dir().to_string_lossy().into_owned();
    let df = Command::new("df")
        .args(["--output=source,fstype", &directory])
        .output();
    let df = df.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let device = df
        .ok()
        .and_then(|text| text.lines().last().map(str::to_owned));
    let direct = |images: &Images| if images.direct() { "yes" } else { "no" };
    fact(
        "disk",
        format!(
            "{}, O_DIRECT: {}; in memory: {}",
            device
                .unwrap_or_default()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
            direct(disk),
            direct(shm)
        ),
    );
    fact(
        "load",
        read("/proc/loadavg")
            .split(' ')
            .take(3)
            .collect::<Vec<_>>()
            .join(" "),
    );
    for subject in subjects {
        let value = match &subject.what {
            What::Ours(binary) => {
                let version = says(binary, &["--version"]).unwrap_or_default();
                let args = match options.backend_args.as_str() {
                    "" => "none",
                    args => args,
                };
                format!("{version}, {}, options: {args}", binary.display())
            }
            What::StorageDaemon(poll) => format!(
                "{}, iothread, poll-max-ns={poll}, aio=io_uring",
                run("qemu-storage-daemon", &["--version"])
            ),
            What::Refstack(_) => "vhost-user-backend and virtio-queue, of this tree".to_owned(),
            What::Peer { socket, pid, layer } => {
                format!("process {pid} at {}, as layer {layer}", socket.display())
            }
            What::Fio => format!(
                "{}, io_uring, fixed buffers and files, completions taken in batches",
                run("fio", &["--version"])
            ),
        };
        fact(&subject.name, value);
    }
    let commit = run("git", &["rev-parse", "--short", "HEAD"]);
    let clean = Command::new("git")
        .args(["diff", "--quiet", "HEAD"])
        .status();
    let changed = !clean.is_ok_and(|status| status.success());
    fact("commit", commit + if changed { " and changes" } else { "" });
    let list: Vec<String> = backend_cpus.iter().map(usize::to_string).collect();
    fact(
        "runs",
        format!(
            "{} of {} s each, in turns; client polls on CPU {}, backend on CPU {}{}; images of {} MiB",
            options.runs(),
            options.seconds(),
            options.client_cpu,
            list.join(","),
            if options.nice {
                ", at high priority"
            } else {
                ""
            },
            options.size() >> 20
        ),
    );
    Machine { facts }
}

/// As it is printed.
pub fn text(machine: &Machine) -> String {
    let width = machine
        .facts
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or(0);
    let lines = machine
        .facts
        .iter()
        .map(|(name, value)| format!("{name:<width$}  {value}\n"));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_name() {
        assert_eq!(
            field("model\t: 1\nmodel name\t: A B\n", "model name"),
            "A B"
        );
        assert_eq!(field("", "x"), "");
    }

    #[test]
    fn facts_are_printed_in_columns() {
        let facts = vec![("a".into(), "1".into()), ("long".into(), "2".into())];
        assert_eq!(text(&Machine { facts }), "a     1\nlong  2\n");
    }
}
