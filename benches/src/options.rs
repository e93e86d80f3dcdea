//! The command line of the runner.

use std::path::{Path, PathBuf};

use clap::Parser;
use regex_lite::Regex;

use crate::layer::Layer;

/// What our build is called where it is the only one.
pub const OURS: &str = "virtioblkd";
/// The other subjects.
const SUBJECTS: [&str; 4] = ["qsd", "qsd-spin", "refstack", "fio"];

/// Measure virtioblkd beside its peers and the machine's own limit
#[derive(Debug, Clone, Parser)]
#[command(name = "benches/run")]
pub struct Options {
    /// One run of half a second for each load, with images of 256M
    #[arg(long)]
    pub quick: bool,
    /// Every load on every layer, which takes hours
    #[arg(long, conflicts_with = "goals")]
    pub full: bool,
    /// Only what the table of goals is computed from
    #[arg(long)]
    pub goals: bool,
    /// Runs of each load [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: Option<u32>,
    /// Measured seconds a run [default: 1]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    pub seconds: Option<f64>,
    /// virtioblkd (or the names given to --binary), qsd, qsd-spin, refstack, fio [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub subjects: Vec<String>,
    /// Layers such as null, raw-disk, chain-16-shm; see benches/README.md
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub layers: Vec<String>,
    /// Only loads whose name matches, such as randread or qd32
    #[arg(long, value_name = "REGEX", default_value = "")]
    pub loads: Regex,
    /// Special measures: idle, wake, bursts, start, memory, instructions, turns, guest; none for none [default: all, with --layers none]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub specials: Vec<String>,
    /// Size of the images [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// Directory on a disk for images [default: target/bench]
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// CPU of the client
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub client_cpu: usize,
    /// CPUs of the backend, one for each worker [default: the first two that are not the client's]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub backend_cpu: Vec<usize>,
    /// CPU of the NVMe/TCP target of layer nvme [default: the client's]
    #[arg(long, value_name = "N")]
    pub target_cpu: Option<usize>,
    /// Workers and queues of all loads, each queue with the depth of the load [default: what the load says]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub workers: Option<u16>,
    /// A virtioblkd to measure, under a name of its own if several are compared [default: that of this tree]
    #[arg(long, value_name = "[NAME=]PATH", value_parser = parse_binary)]
    pub binary: Vec<Binary>,
    /// Another vhost-user-blk backend that runs already: its socket, its process, and the layer that its disk
    /// is counted as (null)
    #[arg(long, value_name = "NAME=SOCKET,PID[,LAYER]", value_parser = parse_peer)]
    pub peer: Vec<Peer>,
    /// Only loads that read, on disks that are served read-only
    #[arg(long)]
    pub read_only: bool,
    /// Client and backend at the highest ordinary priority (root), where others compute too
    #[arg(long)]
    pub nice: bool,
    /// Further options for virtioblkd, such as "--poll always"
    #[arg(long, value_name = "S", default_value = "", allow_hyphen_values = true)]
    pub backend_args: String,
    /// Further options for the target of layer nvme
    #[arg(long, value_name = "S", default_value = "", allow_hyphen_values = true)]
    pub target_args: String,
    /// Older records to compare with
    #[arg(long, value_name = "FILE.jsonl")]
    pub baseline: Option<PathBuf>,
    /// Instructions a request, as JSON lines, for the goal that compares them
    #[arg(long, value_name = "FILE.jsonl")]
    pub instructions: Option<PathBuf>,
    /// Only the special measure guest: fio in a guest on a qcow2 overlay that each backend serves
    #[arg(long, conflicts_with_all = ["layers", "specials"])]
    pub guest: bool,
    /// File of JSON lines; the tables and plots go beside it [default: target/bench/DATE.jsonl]
    #[arg(long, value_name = "FILE.jsonl")]
    pub out: Option<PathBuf>,
}

impl Options {
    /// Runs of each load.
    pub fn runs(&self) -> u32 {
        self.runs.unwrap_or(if self.quick { 1 } else { 3 })
    }

    /// Measured seconds a run.
    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 0.5 } else { 1.0 })
    }

    /// Seconds before them.
    pub fn warm_up(&self) -> f64 {
        if self.quick { 0.2 } else { 0.3 }
    }

    /// Bytes of an image.
    pub fn size(&self) -> u64 {
        self.size
            .unwrap_or(if self.quick { 256 << 20 } else { 1 << 30 })
    }

    /// CPUs of the backend on a machine with this many.
    pub fn backend_cpus(&self, cpus: usize) -> Vec<usize> {
        if self.backend_cpu.is_empty() {
            let others = (0..cpus).filter(|cpu| *cpu != self.client_cpu);
            others.take(2).collect()
        } else {
            self.backend_cpu.clone()
        }
    }

    /// Whether what is named is there, on a machine with these CPUs: what was mistyped is told before hours of
    /// measuring.
    ///
    /// # Errors
    /// The first thing that is not, and what there is.
    pub fn check(&self, has_cpu: impl Fn(usize) -> bool, cpus: usize) -> Result<(), String> {
        let ours = self.binary.iter().map(|binary| &*binary.name);
        let peers = self.peer.iter().map(|peer| &*peer.name);
        let mut known: Vec<&str> = ours.chain(peers).chain(SUBJECTS).collect();
        if self.binary.is_empty() {
            known.insert(0, OURS);
        }
        if let Some(name) = self.subjects.iter().find(|name| !known.contains(&&***name)) {
            return Err(format!(
                "unknown subject {name}: one of {}, please",
                known.join(", ")
            ));
        }
        let backend = self.backend_cpus(cpus);
        let named = [
            ("--client-cpu", Some(self.client_cpu)),
            ("--target-cpu", self.target_cpu),
        ];
        let named = named
            .into_iter()
            .filter_map(|(option, cpu)| Some((option, cpu?)));
        let all = named.chain(backend.iter().map(|cpu| ("--backend-cpu", *cpu)));
        for (option, cpu) in all {
            if !has_cpu(cpu) {
                return Err(format!("{option}: this machine has no CPU {cpu}"));
            }
        }
        let workers = usize::from(self.workers.unwrap_or(1));
        if workers > backend.len() {
            return Err(format!(
                "--workers {workers} needs as many CPUs for the backend, and it has {}: name them with --backend-cpu",
                backend.len()
            ));
        }
        let instructions = self.instructions.iter();
        let mut files = (self.binary.iter())
            .map(|binary| ("--binary", &binary.path))
            .chain(instructions.map(|path| ("--instructions", path)));
        if let Some((option, path)) = files.find(|(_, path)| !path.is_file()) {
            return Err(format!("{option}: there is no file {}", path.display()));
        }
        for peer in &self.peer {
            let (name, socket) = (&peer.name, peer.socket.display());
            if !peer.socket.exists() {
                return Err(format!("--peer {name}: there is no socket {socket}"));
            }
            if !Path::new(&format!("/proc/{}", peer.pid)).exists() {
                return Err(format!("--peer {name}: there is no process {}", peer.pid));
            }
            if Layer::parse(&peer.layer).is_none() {
                return Err(format!("--peer {name}: unknown layer {}", peer.layer));
            }
        }
        Ok(())
    }

    /// Whether a subject is wanted.
    pub fn wants(&self, subject: &str) -> bool {
        self.subjects.is_empty() || self.subjects.iter().any(|name| name == subject)
    }

    /// Whether a special measure is wanted.
    pub fn wants_special(&self, measure: &str) -> bool {
        if self.guest {
            measure == "guest"
        } else if self.specials.is_empty() {
            // Who asks for one layer asks for that alone.
            self.layers.is_empty()
        } else {
            self.specials.iter().any(|name| name == measure)
        }
    }
}

/// A build of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// What it is called in the tables.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

/// A backend that runs already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What it is called in the tables.
    pub name: String,
    /// Its socket.
    pub socket: PathBuf,
    /// Its process.
    pub pid: u32,
    /// The layer that it is measured with.
    pub layer: String,
}

/// Bytes: a number with K, M, G or T.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err("one of K, M, G, T, please".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "not a number".to_owned())?;
    number
        .checked_mul(1 << shift)
        .filter(|size| *size >= 16 << 20)
        .ok_or_else(|| "16M at least".to_owned())
}

fn parse_seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match seconds {
        0.1..=86_400.0 => Ok(seconds),
        _ => Err("0.1 to 86400".to_owned()),
    }
}

fn parse_binary(text: &str) -> Result<Binary, String> {
    let (name, path) = text.split_once('=').unwrap_or((OURS, text));
    if name.is_empty() || path.is_empty() {
        return Err("[NAME=]PATH, please".to_owned());
    }
    Ok(Binary {
        name: name.to_owned(),
        path: path.into(),
    })
}

fn parse_peer(text: &str) -> Result<Peer, String> {
    let parse = || {
        let (name, rest) = text.split_once('=')?;
        let mut parts = rest.split(',');
        let (socket, pid) = (parts.next()?, parts.next()?.parse().ok()?);
        let layer = parts.next().unwrap_or("null");
        if name.is_empty() || socket.is_empty() || parts.next().is_some() {
            return None;
        }
        Some(Peer {
            name: name.to_owned(),
            socket: socket.into(),
            pid,
            layer: layer.to_owned(),
        })
    };
    parse().ok_or_else(|| "NAME=SOCKET,PID[,LAYER], please".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Options {
        Options::try_parse_from(std::iter::once(&"run").chain(args)).unwrap()
    }

    #[test]
    fn quick_makes_everything_smaller_unless_it_is_said_otherwise() {
        let options = parse(&["--quick"]);
        assert_eq!((options.runs(), options.seconds()), (1, 0.5));
        assert_eq!(options.size(), 256 << 20);
        assert_eq!(parse(&["--quick", "--runs", "5"]).runs(), 5);
        assert_eq!(parse(&["--size", "2G"]).size(), 2 << 30);
        assert_eq!(parse(&[]).runs(), 3);
    }

    #[test]
    fn peers_and_binaries_are_taken_apart() {
        let options = parse(&[
            "--peer",
            "spdk=/tmp/s,12",
            "--peer",
            "x=/y,3,raw-shm",
            "--binary",
            "old=/a",
            "--binary",
            "/b",
        ]);
        assert_eq!(options.peer[0].layer, "null");
        assert_eq!(
            (options.peer[1].pid, options.peer[1].layer.as_str()),
            (3, "raw-shm")
        );
        assert_eq!(options.binary[0].name, "old");
        assert_eq!(options.binary[1].name, "virtioblkd");
        for wrong in [
            "spdk",
            "spdk=/tmp/s",
            "spdk=/tmp/s,x",
            "=/tmp/s,1",
            "a=b,1,c,d",
        ] {
            assert!(parse_peer(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_have_a_unit_and_a_least() {
        assert_eq!(parse_size("64M"), Ok(64 << 20));
        for wrong in ["", "G", "1X", "1GG", "4096", "99999999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_backend_has_the_cpus_that_the_client_has_not() {
        assert_eq!(parse(&[]).backend_cpus(2), [1]);
        assert_eq!(parse(&["--client-cpu", "1"]).backend_cpus(4), [0, 2]);
        assert_eq!(parse(&["--backend-cpu", "3"]).backend_cpus(4), [3]);
    }

    #[test]
    fn special_measures_run_unless_only_layers_are_asked_for() {
        assert!(parse(&[]).wants_special("idle"));
        assert!(!parse(&["--layers", "null"]).wants_special("idle"));
        assert!(parse(&["--layers", "null", "--specials", "idle"]).wants_special("idle"));
        assert!(!parse(&["--specials", "none"]).wants_special("idle"));
        assert!(parse(&["--goals"]).wants_special("guest"));
        assert!(parse(&["--guest"]).wants_special("guest"));
        assert!(!parse(&["--guest"]).wants_special("idle"));
    }

    #[test]
    fn what_is_named_and_is_not_there_is_told_before_anything_is_measured() {
        let check = |args: &[&str]| parse(args).check(|cpu| cpu < 4, 4);
        let me = std::process::id();
        let peer = |what: &str| format!("--peer=p={what}");
        let here = format!("/proc/self/exe,{me}");
        for right in [
            &[][..],
            &["--subjects", "virtioblkd,fio"],
            &[
                "--binary",
                "old=/proc/self/exe",
                "--subjects",
                "old,qsd-spin",
            ],
            &["--workers", "2"],
            &["--workers", "3", "--backend-cpu", "1,2,3"],
            &[&peer(&here), "--subjects", "p"],
        ] {
            assert_eq!(check(right), Ok(()), "{right:?}");
        }
        for (wrong, word) in [
            (&["--subjects", "spdk"][..], "spdk"),
            (
                &["--binary", "old=/proc/self/exe", "--subjects", "virtioblkd"],
                "old",
            ),
            (&["--client-cpu", "4"], "--client-cpu"),
            (&["--backend-cpu", "1,4"], "CPU 4"),
            (&["--target-cpu", "9"], "--target-cpu"),
            (&["--workers", "3"], "--workers 3"),
            (&["--binary", "/no/such"], "/no/such"),
            (&["--instructions", "/no/such"], "/no/such"),
            (&[&peer(&format!("/no/such,{me}"))], "socket /no/such"),
            (&[&peer("/proc/self/exe,4194305")], "process 4194305"),
            (&[&peer(&format!("{here},lace"))], "layer lace"),
        ] {
            let error = check(wrong).expect_err("refused");
            assert!(error.contains(word), "{wrong:?}: {error}");
        }
        for wrong in [
            "--seconds=0",
            "--seconds=-1",
            "--seconds=nan",
            "--runs=0",
            "--workers=0",
        ] {
            assert!(Options::try_parse_from(["run", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn options_of_the_backend_may_begin_with_a_hyphen() {
        assert_eq!(
            parse(&["--backend-args", "--poll always"]).backend_args,
            "--poll always"
        );
    }
}
