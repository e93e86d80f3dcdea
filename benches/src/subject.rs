//! Whom a load is given to, and how each is started with its best settings.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::layer::{Disk, Kind, Layer};
use crate::options::{OURS, Options};

/// How long the peer's event loop polls, in nanoseconds: what QEMU's own iothreads do by default.
const QSD_POLL_NS: u64 = 32_768;
/// The same without an end.
const QSD_SPIN_NS: u64 = 1_000_000_000;

/// Whom a load is given to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// What it is called in records.
    pub name: String,
    /// What it is.
    pub what: What,
}

/// What a subject is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A build of virtioblkd.
    Ours(PathBuf),
    /// qemu-storage-daemon, whose event loop polls for so many nanoseconds.
    StorageDaemon(u64),
    /// vhost-user-backend and virtio-queue.
    Refstack(PathBuf),
    /// A backend that runs already.
    Peer {
        /// Its socket.
        socket: PathBuf,
        /// Its process.
        pid: u32,
        /// The layer that it is measured with.
        layer: String,
    },
    /// fio on the bare file: the limit.
    Fio,
}

/// What a backend is told to serve, and how.
#[derive(Debug, Clone)]
pub struct Serve<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// Past the page cache.
    pub direct: bool,
    /// Where to listen.
    pub socket: &'a Path,
    /// Queues.
    pub queues: u16,
    /// Workers of ours.
    pub workers: u16,
    /// CPUs of the workers.
    pub cpus: &'a [usize],
    /// Refuse writes.
    pub read_only: bool,
}

/// All subjects of a run, ours first, and what is missing with the reason.
pub fn all(options: &Options, built: &Path) -> (Vec<Subject>, Vec<(String, String)>) {
    let mut subjects = Vec::new();
    let mut missing = Vec::new();
    let subject = |name: &str, what| Subject {
        name: name.to_owned(),
        what,
    };
    if options.binary.is_empty() {
        subjects.push(subject(OURS, What::Ours(built.join("virtioblkd"))));
    }
    for binary in &options.binary {
        subjects.push(subject(&binary.name, What::Ours(binary.path.clone())));
    }
    for (name, poll) in [("qsd", QSD_POLL_NS), ("qsd-spin", QSD_SPIN_NS)] {
        subjects.push(subject(name, What::StorageDaemon(poll)));
    }
    subjects.push(subject("refstack", What::Refstack(built.join("refstack"))));
    subjects.push(subject("fio", What::Fio));
    subjects.retain(|subject| options.wants(&subject.name));
    subjects.retain(|subject| match subject.what.absent() {
        Some(why) => {
            missing.push((subject.name.clone(), why));
            false
        }
        None => true,
    });
    for peer in &options.peer {
        let what = What::Peer {
            socket: peer.socket.clone(),
            pid: peer.pid,
            layer: peer.layer.clone(),
        };
        subjects.push(subject(&peer.name, what));
    }
    (subjects, missing)
}

impl What {
    /// Why it cannot be started, if so.
    fn absent(&self) -> Option<String> {
        let program = |name: &str| {
            (!crate::process::is_installed(name)).then(|| format!("{name} is not installed"))
        };
        let file = |path: &Path| (!path.is_file()).then(|| format!("no {}", path.display()));
        match self {
            Self::Ours(binary) | Self::Refstack(binary) => file(binary),
            Self::StorageDaemon(_) => program("qemu-storage-daemon"),
            Self::Peer { .. } => None,
            Self::Fio => program("fio"),
        }
    }
}

impl Subject {
    /// Whether it is one of our builds.
    pub fn is_ours(&self) -> bool {
        matches!(self.what, What::Ours(_))
    }

    /// Whether it can serve a layer to that many queues and workers.
    pub fn serves(&self, layer: Layer, queues: u16, workers: u16) -> bool {
        match &self.what {
            What::Ours(_) => true,
            // No NVMe/TCP, and one thread.
            What::StorageDaemon(poll) => {
                let usual = *poll == QSD_POLL_NS || layer.kind == Kind::Null;
                usual && layer.kind != Kind::Nvme && workers == 1
            }
            // A thread for each queue.
            What::Refstack(_) => matches!(layer.kind, Kind::Null | Kind::Raw) && queues == workers,
            What::Peer { layer: its, .. } => *its == layer.name() && workers == 1,
            What::Fio => layer.kind == Kind::Raw && queues == 1 && workers == 1,
        }
    }

    /// The program and its arguments; `None` for what is not started, or not by this.
    pub fn command(&self, serve: &Serve<'_>, backend_args: &str) -> Option<Vec<OsString>> {
        match &self.what {
            What::Ours(binary) => Some(ours(binary, serve, backend_args)),
            What::StorageDaemon(poll) => storage_daemon(serve, *poll),
            What::Refstack(binary) => refstack(binary, serve),
            What::Peer { .. } | What::Fio => None,
        }
    }
}

fn ours(binary: &Path, serve: &Serve<'_>, backend_args: &str) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec![binary.into()];
    args.extend(["--socket-path".into(), serve.socket.into()]);
    args.extend(["--num-queues".into(), serve.queues.to_string().into()]);
    args.extend(["--workers".into(), serve.workers.to_string().into()]);
    args.extend(["--log-level", "error"].map(OsString::from));
    if serve.workers > 1 {
        let cpus: Vec<String> = serve.cpus.iter().map(usize::to_string).collect();
        args.extend(["--cpus".into(), cpus.join(",").into()]);
    }
    args.push("--blk-file".into());
    let cache = if serve.direct { "none" } else { "writeback" };
    match serve.disk {
        Disk::Null(size) => args.push(format!("null:{size}").into()),
        Disk::Remote(uri) => args.extend([uri.into(), "--format".into(), "raw".into()]),
        Disk::Raw(path) => {
            args.push(path.into());
            args.extend(["--format", "raw", "--cache", cache].map(OsString::from));
        }
        Disk::Qcow2 { base, images } => {
            if let Some(image) = images.last() {
                args.push(image.into());
            }
            args.extend(["--format", "qcow2", "--cache", cache].map(OsString::from));
            if base.is_some() || images.len() > 1 {
                // The peer's cache.direct holds for the base too.
                args.extend(["--backing-cache", cache].map(OsString::from));
            }
        }
    }
    if serve.read_only {
        args.push("--read-only".into());
    }
    args.extend(backend_args.split_whitespace().map(OsString::from));
    args
}

/// Nodes of qemu-storage-daemon, the lowest first, and the name of the top one.
fn storage_daemon(serve: &Serve<'_>, poll_ns: u64) -> Option<Vec<OsString>> {
    let on = |on: bool| if on { "on" } else { "off" };
    let mut nodes: Vec<String> = Vec::new();
    let file = |name: &str, path: &Path, read_only: bool| {
        // A comma in a value is doubled.
        let path = path.display().to_string().replace(',', ",,");
        let (direct, ro) = (on(serve.direct), on(read_only));
        format!(
            "driver=file,node-name={name},filename={path},cache.direct={direct},aio=io_uring,read-only={ro}"
        )
    };
    let top = match serve.disk {
        Disk::Remote(_) => return None,
        Disk::Null(size) => {
            let ro = on(serve.read_only);
            nodes.push(format!(
                "driver=null-co,read-zeroes=on,node-name=top,size={size},read-only={ro}"
            ));
            "top".to_owned()
        }
        // No format node above: one layer less.
        Disk::Raw(path) => {
            nodes.push(file("top", path, serve.read_only));
            "top".to_owned()
        }
        Disk::Qcow2 { base, images } => {
            let mut below = None;
            if let Some(base) = base {
                nodes.push(file("base", base, true));
                nodes.push("driver=raw,node-name=raw-base,file=base,read-only=on".to_owned());
                below = Some("raw-base".to_owned());
            }
            for (index, image) in images.iter().enumerate() {
                let ro = serve.read_only || index + 1 < images.len();
                let name = format!("image{index}");
                nodes.push(file(&format!("file{index}"), image, ro));
                let mut node = format!(
                    "driver=qcow2,node-name={name},file=file{index},cache.direct={},read-only={}",
                    on(serve.direct),
                    on(ro)
                );
                if let Some(below) = below {
                    node += &format!(",backing={below}");
                }
                nodes.push(node);
                below = Some(name);
            }
            below?
        }
    };
    let mut args: Vec<OsString> = vec!["qemu-storage-daemon".into()];
    for node in nodes {
        args.extend(["--blockdev".into(), node.into()]);
    }
    let socket = serve.socket.display();
    let export = format!(
        "type=vhost-user-blk,id=e,node-name={top},addr.type=unix,addr.path={socket},writable={},\
         num-queues={},iothread=io0",
        on(!serve.read_only),
        serve.queues
    );
    args.extend([
        "--object".into(),
        format!("iothread,id=io0,poll-max-ns={poll_ns}").into(),
    ]);
    args.extend(["--export".into(), export.into()]);
    Some(args)
}

fn refstack(binary: &Path, serve: &Serve<'_>) -> Option<Vec<OsString>> {
    let mut args: Vec<OsString> = vec![binary.into()];
    args.extend(["--socket-path".into(), serve.socket.into()]);
    args.extend(["--num-queues".into(), serve.queues.to_string().into()]);
    args.push("--blk-file".into());
    match serve.disk {
        Disk::Null(size) => args.push(format!("null:{}M", size >> 20).into()),
        Disk::Raw(path) => args.push(path.into()),
        Disk::Remote(_) | Disk::Qcow2 { .. } => return None,
    }
    if serve.direct && matches!(serve.disk, Disk::Raw(_)) {
        args.push("--direct".into());
    }
    Some(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve(disk: &Disk) -> Serve<'_> {
        Serve {
            disk,
            direct: true,
            socket: Path::new("/s"),
            queues: 1,
            workers: 1,
            cpus: &[1],
            read_only: false,
        }
    }

    fn words(args: Vec<OsString>) -> Vec<String> {
        args.into_iter()
            .map(|arg| arg.into_string().unwrap())
            .collect()
    }

    #[test]
    fn the_peer_gets_a_node_for_each_image_and_direct_files() {
        let disk = Disk::Qcow2 {
            base: Some("/b".into()),
            images: vec!["/0".into(), "/1".into()],
        };
        let args = words(storage_daemon(&serve(&disk), 7).unwrap());
        let find = |name: &str| {
            let node = format!("node-name={name},");
            args.iter().find(|arg| arg.contains(&node)).unwrap().clone()
        };
        assert!(find("image0").ends_with(",read-only=on,backing=raw-base"));
        assert!(find("image1").ends_with(",read-only=off,backing=image0"));
        assert!(find("file1").contains("cache.direct=on,aio=io_uring,read-only=off"));
        assert!(args.contains(&"iothread,id=io0,poll-max-ns=7".to_owned()));
        assert!(args.last().unwrap().contains("node-name=image1,"));
    }

    #[test]
    fn a_raw_file_has_no_format_node_and_a_comma_is_doubled() {
        let disk = Disk::Raw("/a,b".into());
        let args = words(storage_daemon(&serve(&disk), 1).unwrap());
        assert_eq!(args.iter().filter(|arg| *arg == "--blockdev").count(), 1);
        assert!(args[2].contains("filename=/a,,b,"));
    }

    #[test]
    fn ours_has_the_same_cache_for_what_is_below() {
        let disk = Disk::Qcow2 {
            base: Some("/b".into()),
            images: vec!["/0".into()],
        };
        let args = words(ours(Path::new("v"), &serve(&disk), "--poll always")).join(" ");
        assert!(args.contains("--blk-file /0 --format qcow2 --cache none --backing-cache none"));
        assert!(args.ends_with("--poll always"));
        assert!(!args.contains("--cpus"));
    }

    #[test]
    fn who_serves_what() {
        let layer = |name: &str| Layer::parse(name).unwrap();
        let qsd = |poll| Subject {
            name: "qsd".into(),
            what: What::StorageDaemon(poll),
        };
        assert!(qsd(QSD_POLL_NS).serves(layer("chain-16-shm"), 1, 1));
        assert!(!qsd(QSD_POLL_NS).serves(layer("nvme"), 1, 1));
        assert!(!qsd(QSD_SPIN_NS).serves(layer("raw-shm"), 1, 1));
        assert!(qsd(QSD_SPIN_NS).serves(layer("null"), 1, 1));
        let fio = Subject {
            name: "fio".into(),
            what: What::Fio,
        };
        assert!(fio.serves(layer("raw-disk"), 1, 1) && !fio.serves(layer("full-disk"), 1, 1));
    }
}
