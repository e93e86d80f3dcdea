//! Runs every load of every layer against every subject, in turns, and keeps the records.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use vhost_user_frontend::TempDir;

use crate::fio;
use crate::layer::{Disk, Images, Kind, Layer, Place};
use crate::load::{self, Spec};
use crate::machine;
use crate::options::Options;
use crate::process::{self, Pin, Running, go_on};
use crate::record::{Line, Missing, Record, Records, median};
use crate::subject::{Serve, Subject, What};

const NQN: &str = "nqn.2026-01.org.example:bench";

/// Everything that the measures share.
#[derive(Debug)]
pub struct Bench {
    /// What was asked for.
    pub options: Options,
    /// Ours first.
    pub subjects: Vec<Subject>,
    /// CPUs of the backend.
    pub cpus: Vec<usize>,
    /// Where the programs of this tree are.
    pub built: PathBuf,
    /// What was found so far.
    pub records: Records,
    /// What went wrong: told at the end, beside what went well.
    pub failures: Vec<String>,
    /// Images on a disk.
    pub disk: Images,
    /// Images in memory, and the sockets.
    pub shm: Images,
    dirs: [TempDir; 2],
    out: File,
    begin: Instant,
}

impl Bench {
    /// Makes directories for images below `disk` and in memory; they go with the value. Records go to `out`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn new(
        options: Options,
        (subjects, missing): (Vec<Subject>, Vec<(String, String)>),
        built: &Path,
        disk: &Path,
        out: &Path,
    ) -> Result<Self, String> {
        let dirs = [
            TempDir::new_in(disk),
            TempDir::new_in(Path::new("/dev/shm")),
        ];
        let file = File::create(out).map_err(|error| format!("{}: {error}", out.display()))?;
        let mut bench = Self {
            cpus: options.backend_cpus(machine::cpus()),
            disk: Images::new(dirs[0].path(), options.size(), true),
            shm: Images::new(dirs[1].path(), options.size(), false),
            options,
            subjects,
            built: built.to_owned(),
            records: Records::default(),
            failures: Vec::new(),
            dirs,
            out: file,
            begin: Instant::now(),
        };
        let machine = machine::describe(
            &bench.options,
            &bench.subjects,
            &bench.disk,
            &bench.shm,
            &bench.cpus,
        );
        bench.add(Line::Machine(machine));
        for (what, why) in missing {
            bench.missing(&what, &why);
        }
        Ok(bench)
    }

    /// Keeps a line, in the file at once.
    pub fn add(&mut self, line: Line) {
        match serde_json::to_string(&line) {
            Ok(text) => {
                if let Err(error) = writeln!(self.out, "{text}") {
                    self.failures.push(format!("writing the records: {error}"));
                }
            }
            Err(error) => self.failures.push(format!("a record: {error}")),
        }
        self.records.add(line);
    }

    /// Something that cannot be measured here.
    pub fn missing(&mut self, what: &str, why: &str) {
        self.progress(&format!("{what}: not measured: {why}"));
        let (what, why) = (what.to_owned(), why.to_owned());
        self.add(Line::Missing(Missing { what, why }));
    }

    /// A line for who waits.
    pub fn progress(&self, text: &str) {
        eprintln!("[{:4}s] {text}", self.begin.elapsed().as_secs());
    }

    /// How programs are started.
    pub fn pin(&self) -> Pin {
        Pin {
            nice: self.options.nice,
        }
    }

    /// Our builds, the one that the goals are about first.
    pub fn ours(&self) -> Vec<Subject> {
        self.subjects
            .iter()
            .filter(|s| s.is_ours())
            .cloned()
            .collect()
    }

    /// Where sockets are: their paths must be short.
    pub fn sockets(&self) -> &Path {
        self.dirs[1].path()
    }

    /// The images of a place; `Nowhere` has only its socket in memory.
    pub fn images(&self, place: Place) -> &Images {
        match place {
            Place::Disk => &self.disk,
            Place::Nowhere | Place::Shm => &self.shm,
        }
    }

    /// Starts a backend and waits for its socket.
    ///
    /// # Errors
    /// In words.
    pub fn start(
        &self,
        subject: &Subject,
        serve: &Serve<'_>,
        more: &str,
    ) -> Result<Running, String> {
        let _ = std::fs::remove_file(serve.socket);
        let args = format!("{} {more}", self.options.backend_args);
        let args: Vec<OsString> = subject
            .command(serve, &args)
            .ok_or_else(|| format!("{} serves no such disk", subject.name))?;
        let mut command = self.pin().command(serve.cpus, &args[0]);
        let mut running =
            Running::start(command.args(&args[1..])).map_err(|error| error.to_string())?;
        running.wait_for_socket(serve.socket)?;
        Ok(running)
    }

    /// Runs the load generator, pinned; its record, if it printed one, and what went wrong, if anything did.
    pub fn client(&self, args: &[OsString]) -> Result<Line, String> {
        let program = self.built.join("loadgen");
        let mut command = self
            .pin()
            .command(&[self.options.client_cpu], program.as_os_str());
        let text = process::output(command.args(args))?;
        serde_json::from_str(text.trim()).map_err(|error| format!("the client's record: {error}"))
    }

    /// Options of the load generator that every measure has.
    pub fn client_args(
        &self,
        subject: &str,
        layer: &str,
        (socket, pid): (&Path, u32),
        run: u32,
    ) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["--socket".into(), socket.into()];
        let pairs = [
            ("--pid", pid.to_string()),
            ("--subject", subject.to_owned()),
            ("--layer", layer.to_owned()),
            ("--run", run.to_string()),
            ("--seconds", self.options.seconds().to_string()),
            ("--warm-up", self.options.warm_up().to_string()),
        ];
        for (name, value) in pairs {
            args.extend([name.into(), value.into()]);
        }
        args
    }

    /// Runs all loads of all layers.
    ///
    /// # Errors
    /// Only when this program was asked to end; what else goes wrong is in [`Bench::failures`].
    pub fn layers(&mut self, layers: &[Layer]) -> Result<(), String> {
        for layer in layers {
            go_on()?;
            let loads = load::of(*layer, &self.options, self.cpus.len());
            if loads.is_empty() {
                continue;
            }
            if let Err(error) = self.layer(*layer, &loads) {
                go_on()?;
                self.failures.push(format!("{}: {error}", layer.name()));
            }
            self.images(layer.place).clear();
        }
        Ok(())
    }

    fn layer(&mut self, layer: Layer, loads: &[Spec]) -> Result<(), String> {
        let mut target = None;
        let mut disk = if layer.kind == Kind::Nvme {
            let (running, uri) = self.start_target()?;
            target = Some(running);
            Disk::Remote(uri)
        } else {
            self.progress(&format!("{}: making its images", layer.name()));
            self.images(layer.place).make(layer.kind)?
        };
        for spec in loads {
            for run in 1..=self.options.runs() {
                for subject in self.subjects.clone() {
                    if !subject.serves(layer, spec.queues, spec.workers) {
                        continue;
                    }
                    go_on()?;
                    if layer.needs_fresh_image(spec.load) {
                        disk = self.images(layer.place).make(layer.kind)?;
                    }
                    if let Err(error) = self.one(&subject, layer, &disk, *spec, run) {
                        go_on()?;
                        let load = spec.name();
                        let name = layer.name();
                        self.failures
                            .push(format!("{}: {name}, {load}: {error}", subject.name));
                    }
                    if subject.what != What::Fio
                        && let Err(error) = disk.check()
                    {
                        let (load, name) = (spec.name(), layer.name());
                        self.failures
                            .push(format!("{}: {name}, {load}: {error}", subject.name));
                    }
                }
            }
            self.progress(&self.summary(layer, *spec));
        }
        drop(target);
        Ok(())
    }

    /// The medians of a load so far, in a line.
    fn summary(&self, layer: Layer, spec: Spec) -> String {
        let (layer, load) = (layer.name(), spec.name());
        let mut line = format!("{layer} {load}:");
        for subject in &self.subjects {
            let runs = self.records.of(&subject.name, &layer, &load);
            if let Some(iops) = median(runs.map(|record| record.iops)) {
                line += &format!("  {} {}", subject.name, crate::report::short(iops));
            }
        }
        line
    }

    /// One run of one load against one subject, kept.
    fn one(
        &mut self,
        subject: &Subject,
        layer: Layer,
        disk: &Disk,
        spec: Spec,
        run: u32,
    ) -> Result<(), String> {
        let (record, ended) = self.run_once(subject, layer, disk, spec, run)?;
        self.add(Line::Run(record));
        ended
    }

    /// One run of one load against one subject: its record, and whether requests and backend ended well.
    ///
    /// # Errors
    /// Why there is no record.
    pub fn run_once(
        &self,
        subject: &Subject,
        layer: Layer,
        disk: &Disk,
        spec: Spec,
        run: u32,
    ) -> Result<(Box<Record>, Result<(), String>), String> {
        let direct = layer.place == Place::Nowhere || self.images(layer.place).direct();
        let cpus = &self.cpus[..usize::from(spec.workers).min(self.cpus.len())];
        if let (What::Fio, Disk::Raw(file)) = (&subject.what, disk) {
            let times = (self.options.seconds(), self.options.warm_up());
            let mut record = fio::run(spec, file, direct, times, (self.pin(), cpus))?;
            record.subject.clone_from(&subject.name);
            record.layer = layer.name();
            record.run = run;
            let ended = match record.errors {
                0 => Ok(()),
                _ => Err("requests failed".to_owned()),
            };
            return Ok((Box::new(record), ended));
        }
        let own = self.sockets().join("s");
        let (socket, pid, running) = match &subject.what {
            What::Peer { socket, pid, .. } => (socket.clone(), *pid, None),
            _ => {
                let serve = Serve {
                    disk,
                    direct,
                    socket: &own,
                    queues: spec.queues,
                    workers: spec.workers,
                    cpus,
                    read_only: self.options.read_only,
                };
                let running = self.start(subject, &serve, "")?;
                (own.clone(), running.pid(), Some(running))
            }
        };
        let mut args = self.client_args(&subject.name, &layer.name(), (&socket, pid), run);
        let pairs = [
            ("--load", spec.load.name().to_owned()),
            ("--block-size", spec.block.to_string()),
            ("--depth", spec.depth.to_string()),
            ("--queues", spec.queues.to_string()),
            ("--workers", spec.workers.to_string()),
            ("--name", spec.name()),
        ];
        for (name, value) in pairs {
            args.extend([name.into(), value.into()]);
        }
        if spec.once(layer) {
            args.push("--once".into());
        }
        if layer.kind == Kind::Nvme && self.target_cpu() == self.options.client_cpu {
            args.push("--yields".into());
        }
        let line = self.client(&args);
        // A backend that does not end well has failed, whatever it served.
        let stopped = running.map_or(Ok(()), Running::stop);
        match line? {
            Line::Run(record) => Ok((record, stopped)),
            _ => Err("the client's record is of another kind".to_owned()),
        }
    }

    fn target_cpu(&self) -> usize {
        self.options.target_cpu.unwrap_or(self.options.client_cpu)
    }

    /// Starts an NVMe/TCP target with a namespace of zeros in memory; it ends with its standard input.
    /// Returns what is served.
    fn start_target(&self) -> Result<(Running, String), String> {
        let program = self.built.join("virtioblkd-test-target");
        let mut command = Pin::default().command(&[self.target_cpu()], program.as_os_str());
        command
            .args(["--nqn", NQN, "--size", &self.options.size().to_string()])
            .args(self.options.target_args.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut running = Running::start(&mut command)
            .map_err(|error| format!("{}: {error}", program.display()))?;
        let stdout = running
            .child()
            .stdout
            .take()
            .ok_or("the target has no output")?;
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .map_err(|error| error.to_string())?;
        let address = line
            .trim()
            .strip_prefix("listening ")
            .ok_or("the target does not start")?;
        let uri = format!("nvme+tcp://{address}/{NQN}?nsid=1");
        Ok((running, uri))
    }
}
