//! Measures that are no load of a layer: each one has records of its own.

use std::ffi::OsString;

use crate::goals::{BURST, with};
use crate::guest;
use crate::layer::{Disk, Kind, Place, create_qcow2, qemu_img};
use crate::options::Options;
use crate::process::{Running, go_on};
use crate::runner::Bench;
use crate::subject::{Serve, Subject};

mod instructions;
mod turns;

/// Bytes of the images for `start` and `memory`.
const TIB: u64 = 1 << 40;
/// Images below the overlay of `start`.
const CHAIN: usize = 4;

type Measure = fn(&mut Bench) -> Result<(), String>;

/// All of them, by name.
const MEASURES: &[(&str, Measure)] = &[
    ("idle", idle),
    ("wake", wake),
    ("bursts", bursts),
    ("start", start),
    ("memory", memory),
    ("instructions", instructions::measure),
    ("turns", turns::measure),
    ("guest", guest::run),
];

/// Whether all that are asked for are there.
///
/// # Errors
/// The first that is not.
pub fn check(options: &Options) -> Result<(), String> {
    let is_known = |name: &str| name == "none" || MEASURES.iter().any(|(known, _)| *known == name);
    match options.specials.iter().find(|name| !is_known(name)) {
        Some(name) => Err(format!("unknown special measure {name}")),
        None => Ok(()),
    }
}

/// Runs those that are wanted.
///
/// # Errors
/// Only when this program was asked to end; what else goes wrong is in the failures.
pub fn run(bench: &mut Bench) -> Result<(), String> {
    for (name, measure) in MEASURES {
        go_on()?;
        if !bench.options.wants_special(name) {
            continue;
        }
        if bench.ours().is_empty() && !matches!(*name, "instructions" | "guest") {
            bench.missing(name, "virtioblkd is not among the subjects");
            continue;
        }
        bench.progress(&format!("special measure {name}"));
        if let Err(error) = measure(bench) {
            go_on()?;
            bench.failures.push(format!("{name}: {error}"));
        }
        bench.disk.clear();
        bench.shm.clear();
    }
    Ok(())
}

/// Ours, and the peer beside it.
fn ours_and_peer(bench: &Bench) -> Vec<Subject> {
    let peer = |s: &&Subject| s.is_ours() || s.name == "qsd";
    bench.subjects.iter().filter(peer).cloned().collect()
}

/// Starts a subject on a disk, with one queue; `more` are options of ours.
fn serve(bench: &Bench, subject: &Subject, disk: &Disk, more: &str) -> Result<Running, String> {
    let direct = match disk {
        Disk::Raw(path) if path.starts_with(bench.shm.dir()) => bench.shm.direct(),
        Disk::Qcow2 { images, .. } if images[0].starts_with(bench.shm.dir()) => bench.shm.direct(),
        _ => bench.disk.direct(),
    };
    let socket = bench.sockets().join("s");
    let serve = Serve {
        disk,
        direct,
        socket: &socket,
        queues: 1,
        workers: 1,
        cpus: &bench.cpus[..1],
        read_only: false,
    };
    bench.start(subject, &serve, more)
}

/// One measure of the load generator against one subject.
fn drive(
    bench: &mut Bench,
    (subject, name): (&Subject, &str),
    (disk, layer): (&Disk, &str),
    more: &str,
    (run, args): (u32, &[(&str, &str)]),
) -> Result<(), String> {
    let running = serve(bench, subject, disk, more)?;
    let socket = bench.sockets().join("s");
    let mut words = bench.client_args(name, layer, (&socket, running.pid()), run);
    for (option, value) in args {
        // The last one counts.
        let known = words.iter().position(|word| word == *option);
        if let Some(at) = known {
            words.drain(at..at + 2);
        }
        words.push(option.into());
        if !value.is_empty() {
            words.push(value.into());
        }
    }
    let line = bench.client(&words);
    let stopped = running.stop();
    bench.add(line?);
    stopped
}

/// CPU of a backend with a session and no request, on a qcow2 image.
fn idle(bench: &mut Bench) -> Result<(), String> {
    let disk = bench.disk.make(Kind::Fresh)?;
    let seconds = if bench.options.quick { "2" } else { "5" };
    let args = [("--idle", ""), ("--seconds", seconds), ("--warm-up", "1")];
    for run in 1..=bench.options.runs() {
        for subject in ours_and_peer(bench) {
            let who = (&subject, subject.name.as_str());
            drive(bench, who, (&disk, "fresh-disk"), "", (run, &args))?;
        }
    }
    Ok(())
}

/// The first request after 20 ms of silence, beside a thread that is woken by an eventfd on the same CPU.
fn wake(bench: &mut Bench) -> Result<(), String> {
    let disk = Disk::Null(bench.options.size());
    let cpu = bench.cpus[0].to_string();
    let seconds = if bench.options.quick { "4" } else { "6" };
    let args = [
        ("--wake-ms", "20"),
        ("--peer-cpu", &cpu),
        ("--seconds", seconds),
    ];
    for run in 1..=bench.options.runs() {
        for subject in ours_and_peer(bench) {
            let who = (&subject, subject.name.as_str());
            drive(bench, who, (&disk, "null"), "", (run, &args))?;
        }
    }
    Ok(())
}

/// 1 ms on, 9 ms off: with the polling that is the default, and with polling always.
fn bursts(bench: &mut Bench) -> Result<(), String> {
    let seconds = (2.0 * bench.options.seconds()).to_string();
    for (layer, depth) in [("null", "1"), ("raw-disk", "8")] {
        let disk = match layer {
            "null" => Disk::Null(bench.options.size()),
            _ => bench.images(Place::Disk).make(Kind::Raw)?,
        };
        let args = [
            ("--bursts", "1000,9000"),
            ("--depth", depth),
            ("--seconds", &seconds),
            ("--name", BURST),
        ];
        for run in 1..=bench.options.runs() {
            for subject in ours_and_peer(bench) {
                let name = subject.name.clone();
                drive(bench, (&subject, &name), (&disk, layer), "", (run, &args))?;
                if subject.is_ours() {
                    let always = with(&name, "poll-always");
                    let more = "--poll always";
                    drive(
                        bench,
                        (&subject, &always),
                        (&disk, layer),
                        more,
                        (run, &args),
                    )?;
                }
            }
        }
    }
    Ok(())
}

/// From exec to the first completed read of a 1 TiB overlay over four images.
fn start(bench: &mut Bench) -> Result<(), String> {
    let mut images = Vec::new();
    for level in 0..=CHAIN {
        let image = bench.disk.dir().join(format!("start-{level}"));
        let below = images
            .last()
            .map(|path: &std::path::PathBuf| (path.as_path(), "qcow2"));
        create_qcow2(&image, TIB, below)?;
        images.push(image);
    }
    let disk = Disk::Qcow2 { base: None, images };
    let socket = bench.sockets().join("s");
    let direct = bench.disk.direct();
    for run in 1..=bench.options.runs().max(5) {
        for subject in ours_and_peer(bench) {
            go_on()?;
            let _ = std::fs::remove_file(&socket);
            let cpus = bench.cpus[..1].to_vec();
            let serve = Serve {
                disk: &disk,
                direct,
                socket: &socket,
                queues: 1,
                workers: 1,
                cpus: &cpus,
                read_only: false,
            };
            let command = subject
                .command(&serve, &bench.options.backend_args)
                .ok_or("no such disk")?;
            let mut args = bench.client_args(&subject.name, "start", (&socket, 0), run);
            args.extend(["--start".into(), "--".into(), "taskset".into(), "-c".into()]);
            args.push(OsString::from(cpus[0].to_string()));
            args.extend(command);
            let line = bench.client(&args)?;
            bench.add(line);
        }
    }
    Ok(())
}

/// Memory of the daemon after all mappings of a 1 TiB image were touched, with the default cache.
fn memory(bench: &mut Bench) -> Result<(), String> {
    let image = bench.shm.dir().join("memory");
    let size = TIB.to_string();
    // 16 million clusters: 128 MiB of L2 tables and 32 MiB of refcounts; the rest of the file is a hole.
    qemu_img(&[
        "create".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-o".as_ref(),
        "preallocation=metadata".as_ref(),
        image.as_os_str(),
        size.as_ref(),
    ])?;
    let disk = Disk::Qcow2 {
        base: None,
        images: vec![image],
    };
    let args = [
        ("--load", "firstread"),
        // Four reads for each 4 KiB of an L2 table.
        ("--stride", "8388608"),
        ("--depth", "32"),
        ("--seconds", "60"),
        ("--name", "touch-1t"),
    ];
    for subject in ours_and_peer(bench) {
        let name = subject.name.clone();
        drive(bench, (&subject, &name), (&disk, "memory"), "", (1, &args))?;
        let record = bench.records.runs.last().cloned();
        let Some(record) = record.filter(|r| r.layer == "memory" && r.subject == name) else {
            continue;
        };
        let mib = |kib: u64| kib as f64 / 1024.0;
        let resident = record.resident;
        let special = crate::record::Special::new("memory", &name, 1)
            // Guest memory is shared memory of the client's; everything else is the daemon's.
            .with("resident_mib", mib(resident.total_kib - resident.shmem_kib))
            .with("anonymous_mib", mib(resident.anon_kib))
            .with("guest_mib", mib(resident.shmem_kib))
            .with("reads", record.requests as f64);
        bench.add(crate::record::Line::Special(special));
    }
    Ok(())
}
