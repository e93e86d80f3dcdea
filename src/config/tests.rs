//! Command lines and configuration files as a user writes them, and what comes of them.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::CommandFactory;

use super::*;
use crate::cli::{self, CommandLine, Invocation};

mod nvme;
mod refusals;

/// A host of four CPUs without systemd.
fn host() -> Host {
    Host {
        cpus: vec![0, 1, 2, 3],
        sockets: Vec::new(),
    }
}

fn systemd_host(names: &[&str]) -> Host {
    let sockets = (3..)
        .zip(names)
        .map(|(fd, name)| PassedSocket {
            fd,
            name: (*name).to_owned(),
        })
        .collect();
    Host { sockets, ..host() }
}

/// A directory with images: `a.img`, `b.img`, `link` to `a.img`, directories `bases` and `more`.
struct Images(tempfile::TempDir);

impl Images {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.img"), [0; 4096]).unwrap();
        fs::write(dir.path().join("b.img"), [0; 4096]).unwrap();
        fs::hard_link(dir.path().join("a.img"), dir.path().join("link")).unwrap();
        fs::create_dir(dir.path().join("bases")).unwrap();
        fs::create_dir(dir.path().join("more")).unwrap();
        Self(dir)
    }

    /// The real path of this directory.
    fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }

    /// Runs a command line in which `@` stands for this directory.
    fn run(&self, line: &str, host: &Host) -> Result<Invocation, Error> {
        let line = line.replace('@', self.path().to_str().unwrap());
        cli::load_from(
            std::iter::once("virtioblkd").chain(line.split_whitespace()),
            host,
        )
    }

    fn config(&self, line: &str, host: &Host) -> Config {
        match self.run(line, host) {
            Ok(Invocation::Run(config)) => config,
            other => panic!("{line}: {other:?}"),
        }
    }

    /// Runs a configuration file in which `@` stands for this directory.
    fn file(&self, text: &str, host: &Host) -> Result<Config, Error> {
        let text = text.replace('@', self.path().to_str().unwrap());
        Config::check(&file::from_text(Path::new("vm.toml"), &text)?, host)
    }
}

/// The least that a command line must say.
const LEAST: &str = "--socket-path @/s --blk-file @/a.img";

#[test]
fn the_least_command_line_gets_every_default() {
    let images = Images::new();
    let config = images.config(LEAST, &host());
    assert_eq!(
        config,
        Config {
            workers: WorkersConfig {
                count: 1,
                cpus: vec![],
                poll: PollMode::Adaptive,
                poll_max: Duration::from_micros(50),
            },
            disks: vec![DiskConfig {
                name: "disk0".to_owned(),
                listen: Listen::Path {
                    path: images.path().join("s"),
                    mode: 0o600,
                    group: None
                },
                source: Source::File {
                    path: images.path().join("a.img")
                },
                format: Format::Raw,
                read_only: false,
                cache: CacheMode::None,
                backing_cache: BackingCache::Writeback,
                on_dirty: OnDirty::Repair,
                num_queues: 4,
                queue_size: 256,
                serial: config.disks[0].serial.clone(),
                block_size: Some(512),
                allow_paths: vec![],
                l2_cache_size: 72 << 20,
                data_file: None,
                allow_remote: vec![],
                nvme: None,
                copy_on_read: false,
                keys: vec![],
            }],
            once: false,
            pid_file: None,
            log_level: None,
            warnings: vec![],
        }
    );
}

#[test]
fn the_number_of_queues_follows_the_host_up_to_sixteen() {
    let images = Images::new();
    for (cpus, queues) in [(1, 1), (16, 16), (17, 16), (100_000, 16)] {
        let host = Host {
            cpus: (0..cpus).collect(),
            sockets: vec![],
        };
        assert_eq!(
            images.config(LEAST, &host).disks[0].num_queues,
            queues,
            "{cpus} CPUs"
        );
    }
}

#[test]
fn two_readers_may_share_an_image() {
    let images = Images::new();
    let config = images
        .file(
            "[[disk]]\nblk-file = '@/a.img'\nsocket-path = '@/s'\nread-only = true\n\
             [[disk]]\nblk-file = '@/link'\nsocket-path = '@/t'\nread-only = true\n",
            &host(),
        )
        .unwrap();
    assert_ne!(config.disks[0].serial, config.disks[1].serial);
}

/// All settings but those that exclude one another, on the command line and in a file.
const ALL_OPTIONS: &str = "--socket-path @/s --socket-mode 0660 --socket-group root \
    --blk-file @/a.img --format qcow2 --read-only --cache writethrough --backing-cache none \
    --on-dirty refuse \
    --allow-path @/bases --allow-path @/more --l2-cache-size 3M --data-file @/d.img --key-file @/b.img \
    --image-key @/a.img=keyring:disk --image-key @/link=file:@/b.img --serial 0123-456 --block-size 4096 \
    --num-queues 8 --queue-size 32768 --name root --workers 2 --cpus 3,0-1 --poll adaptive --poll-max-us 7 --once \
    --pid-file @/pid --log-level debug \
    --allow-remote nvme+tcp://h,[::1]:9/nqn.a --allow-remote nvme+tcp://10.0.0.1 --nvme-host-nqn nqn.2020-01.x:h \
    --nvme-host-id 00112233-4455-6677-8899-AABBCCDDEEFF --nvme-header-digest --nvme-data-digest \
    --nvme-queue-depth 31 --nvme-keep-alive 0 --nvme-connect-timeout 1 --nvme-io-timeout 2 --nvme-reconnect-delay 3 \
    --nvme-ctrl-loss-tmo off --nvme-fast-io-fail-tmo 4 --nvme-io-policy round-robin \
    --nvme-dhchap-secret file:@/b.img --nvme-dhchap-ctrl-secret keyring:it --nvme-tls-key file:@/a.img";
const ALL_KEYS: &str = "
    once = true
    pid-file = '@/pid'
    log-level = 'debug'
    [workers]
    count = 2
    cpus = '3,0-1'
    poll = 'adaptive'
    poll-max-us = 7
    [[disk]]
    name = 'root'
    socket-path = '@/s'
    socket-mode = '0660'
    socket-group = 'root'
    blk-file = '@/a.img'
    format = 'qcow2'
    read-only = true
    cache = 'writethrough'
    backing-cache = 'none'
    on-dirty = 'refuse'
    allow-path = ['@/bases', '@/more']
    l2-cache-size = '3072k'
    data-file = '@/d.img'
    key-file = '@/b.img'
    image-key = ['@/a.img=keyring:disk', '@/link=file:@/b.img']
    serial = '0123-456'
    block-size = 4096
    num-queues = 8
    queue-size = 32768
    allow-remote = ['nvme+tcp://h:4420,[0::1]:9/nqn.a', 'nvme+tcp://10.0.0.1']
    nvme-host-nqn = 'nqn.2020-01.x:h'
    nvme-host-id = '00112233445566778899aabbccddeeff'
    nvme-header-digest = true
    nvme-data-digest = true
    nvme-queue-depth = 31
    nvme-keep-alive = 0
    nvme-connect-timeout = 1
    nvme-io-timeout = 2
    nvme-reconnect-delay = 3
    nvme-ctrl-loss-tmo = 'off'
    nvme-fast-io-fail-tmo = 4
    nvme-io-policy = 'round-robin'
    nvme-dhchap-secret = 'file:@/b.img'
    nvme-dhchap-ctrl-secret = 'keyring:it'
    nvme-tls-key = 'file:@/a.img'
";

#[test]
fn a_file_and_a_command_line_mean_the_same() {
    let images = Images::new();
    let mut from_options = images.config(ALL_OPTIONS, &host());
    let mut from_file = images.file(ALL_KEYS, &host()).unwrap();
    // Warnings name what their reader wrote.
    assert!(from_options.warnings[0].starts_with("--cpus names 3 CPUs and --workers is 2"));
    assert!(from_file.warnings[0].starts_with("vm.toml: `cpus` in [workers] names 3 CPUs"));
    from_options.warnings.clear();
    from_file.warnings.clear();
    assert_eq!(from_options, from_file);

    assert_eq!(from_options.workers.cpus, [3, 0]);
    let disk = &from_options.disks[0];
    let dir = images.path();
    assert_eq!(
        disk.allow_paths,
        [dir.clone(), dir.join("bases"), dir.join("more")]
    );
    assert_eq!(disk.l2_cache_size, 3 << 20);
    assert_eq!(
        disk.listen,
        Listen::Path {
            path: dir.join("s"),
            mode: 0o660,
            group: Some(0)
        }
    );

    let (ours, _theirs) = UnixStream::pair().unwrap();
    let fd = ours.as_raw_fd();
    assert_eq!(
        images.config(
            &format!("--fd {fd} --blk-file null:1M --poll never"),
            &host()
        ),
        images
            .file(
                &format!("[workers]\npoll = 'never'\n[[disk]]\nfd = {fd}\nblk-file = 'null:1M'"),
                &host()
            )
            .unwrap()
    );
}

#[test]
fn every_option_of_a_disk_and_of_the_workers_is_in_the_equivalence_test() {
    let ours = [
        "config",
        "check-config",
        "print-capabilities",
        "help",
        "version",
    ];
    // The last two are no options of a read-only image; see `nvme.rs`.
    let excluded = [
        "fd",
        "fd-name",
        "key-fd",
        "key-keyring",
        "copy-on-read",
        "nvme-reservations",
    ];
    for option in CommandLine::command()
        .get_arguments()
        .filter_map(|arg| arg.get_long())
    {
        if !ours.contains(&option) && !excluded.contains(&option) {
            assert!(ALL_OPTIONS.contains(&format!("--{option}")), "{option}");
        }
    }
}

#[test]
fn a_configuration_displays_as_a_file_that_means_the_same() {
    let images = Images::new();
    let systemd = systemd_host(&["root"]);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let odd = images.path().join("od'd\"\\\u{7f}");
    fs::create_dir(&odd).unwrap();
    let lines = [
        (LEAST.to_owned(), host()),
        (ALL_OPTIONS.replace("--cpus 3,0-1", "--cpus 3,0"), host()),
        (
            format!("--fd {} --blk-file null:1G --poll always", ours.as_raw_fd()),
            host(),
        ),
        ("--blk-file null:1G".to_owned(), systemd),
        (
            format!("--blk-file null:1G --socket-path {}/s", odd.display()),
            host(),
        ),
    ];
    for (line, host) in lines {
        let config = images.config(&line, &host);
        let text = config.to_string();
        let again = images
            .file(&text, &host)
            .unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(again, config, "{text}");
    }
}

#[test]
fn check_config_hands_back_what_was_checked() {
    let images = Images::new();
    let Ok(Invocation::CheckConfig(config)) =
        images.run(&format!("{LEAST} --check-config"), &host())
    else {
        panic!("not a check");
    };
    assert_eq!(config, images.config(LEAST, &host()));
    assert!(
        images
            .run(&format!("{LEAST} --check-config --workers 0"), &host())
            .is_err()
    );
}

#[test]
fn options_about_the_process_beside_a_file_win() {
    let images = Images::new();
    let file = images.path().join("vm.toml");
    let text = "log-level = 'error'\npid-file = '@/pid'\n[[disk]]\nblk-file = 'null:1M'\n\
                socket-path = '@/s'\n";
    fs::write(&file, text.replace('@', images.path().to_str().unwrap())).unwrap();
    let config = images.config("--config @/vm.toml --log-level trace --once", &host());
    assert_eq!(config.log_level, Some(LogLevel::Trace));
    assert_eq!(config.pid_file, Some(images.path().join("pid")));
    assert!(config.once);
    let config = images.config("--config @/vm.toml", &host());
    assert_eq!(config.log_level, Some(LogLevel::Error));
    assert!(!config.once);
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    let value: serde_json::Value = serde_json::from_str(&cli::capabilities()).unwrap();
    assert_eq!(
        value,
        serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]})
    );
    let images = Images::new();
    for line in ["", LEAST, "--nonsense --workers 0", "--help"] {
        let line = format!("{line} --print-capabilities");
        assert_eq!(
            images.run(&line, &host()).unwrap(),
            Invocation::PrintCapabilities,
            "{line}"
        );
    }
}

#[test]
fn the_descriptor_for_management_software_fits_the_capabilities() {
    let text = include_str!("../../dist/50-virtioblkd.json");
    let value: serde_json::Value = serde_json::from_str(text).unwrap();
    let capabilities: serde_json::Value = serde_json::from_str(&cli::capabilities()).unwrap();
    assert_eq!(value["type"], capabilities["type"]);
    assert!(value["binary"].as_str().unwrap().starts_with('/'));
    assert!(value["description"].is_string());
}

#[test]
fn a_socket_of_systemd_finds_its_disk() {
    let images = Images::new();
    let listen = |line: &str, names: &[&str]| match images.run(line, &systemd_host(names)) {
        Ok(Invocation::Run(config)) => Ok((config.disks[0].listen.clone(), config.warnings)),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error.to_string()),
    };
    let socket = |fd, name: &str| Listen::Systemd {
        name: name.to_owned(),
        fd,
    };
    let image = "--blk-file @/a.img";
    assert_eq!(
        listen(image, &["unknown"]),
        Ok((socket(3, "unknown"), vec![]))
    );
    let (found, warnings) = listen(&format!("{image} --fd-name b"), &["a", "b"]).unwrap();
    assert_eq!(found, socket(4, "b"));
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].contains("\"a\""), "{warnings:?}");
    let (found, _) = listen(&format!("{image} --name b"), &["a", "b"]).unwrap();
    assert_eq!(found, socket(4, "b"));

    for (options, names, advice) in [
        (
            "",
            &["a", "b"][..],
            "--fd-name is missing: systemd passed a, b",
        ),
        (
            "--fd-name c",
            &["a", "b"],
            "--fd-name: \"c\" is the name of no socket: systemd passed a, b",
        ),
        ("--fd-name a", &["a", "a"], "another FileDescriptorName="),
    ] {
        let error = listen(&format!("{image} {options}"), names).unwrap_err();
        assert!(error.contains(advice), "{error}");
    }
}

#[test]
fn sockets_of_systemd_go_to_the_disks_of_their_names() {
    let images = Images::new();
    let text = "[[disk]]\nname = 'data'\nblk-file = 'null:1M'\n\
                [[disk]]\nname = 'root'\nblk-file = 'null:1M'\n";
    let config = images.file(text, &systemd_host(&["root", "data"])).unwrap();
    let fds: Vec<_> = config
        .disks
        .iter()
        .map(|d| match d.listen {
            Listen::Systemd { fd, .. } => fd,
            ref other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(fds, [4, 3]);
}

#[test]
fn a_descriptor_must_be_a_socket() {
    let images = Images::new();
    let file = fs::File::open(images.path().join("a.img")).unwrap();
    let line = format!("--blk-file @/b.img --fd {}", file.as_raw_fd());
    let error = images.run(&line, &host()).unwrap_err().to_string();
    assert!(error.contains("is not a socket"), "{error}");
}

#[test]
fn a_stale_socket_is_no_obstacle() {
    let images = Images::new();
    drop(std::os::unix::net::UnixListener::bind(images.path().join("s")).unwrap());
    images.config(LEAST, &host());
}

#[test]
fn the_default_serial_is_stable_and_its_own() {
    let images = Images::new();
    let serial = |line: &str| {
        images
            .config(&format!("--socket-path @/s {line}"), &host())
            .disks[0]
            .serial
            .clone()
            .unwrap()
    };
    let a = serial("--blk-file @/a.img");
    assert_eq!(a, serial("--blk-file @/a.img --read-only"));
    assert!(a.starts_with("a-") && a.len() == 10, "{a}");
    fs::create_dir(images.path().join("other")).unwrap();
    fs::copy(
        images.path().join("a.img"),
        images.path().join("other/a.img"),
    )
    .unwrap();
    assert_ne!(a, serial("--blk-file @/other/a.img"));
    fs::write(images.path().join("a-very-long näme.of-an-image.qcow2"), "").unwrap();
    let long = images.path().join("a-very-long näme.of-an-image.qcow2");
    let source = Source::File { path: long };
    let long = super::disk::default_serial(&source, "disk0").unwrap();
    assert!(
        long.starts_with("a-very-long-") && long.len() == MAX_SERIAL,
        "{long}"
    );
    assert!(long.is_ascii());
    assert_eq!(serial("--blk-file @/a.img --serial mine"), "mine");
    // Known by heart: a guest's /dev/disk/by-id would change with it.
    let fixed = Source::File {
        path: PathBuf::from("/srv/vm1/root.qcow2"),
    };
    assert_eq!(
        super::disk::default_serial(&fixed, "disk0").as_deref(),
        Some("root-3b02b557")
    );
}

#[test]
fn a_file_named_like_a_device_is_reached_by_a_path() {
    let images = Images::new();
    fs::write(images.path().join("null:1G"), [0; 512]).unwrap();
    let config = images.config("--socket-path @/s --blk-file @/null:1G", &host());
    assert_eq!(
        config.disks[0].source,
        Source::File {
            path: images.path().join("null:1G")
        }
    );
}

#[test]
fn the_options_are_sound() {
    CommandLine::command().debug_assert();
}

#[test]
fn every_option_is_documented() {
    let text = include_str!("../../docs/configuration.md");
    let command = CommandLine::command();
    let discover = command.find_subcommand("nvme").unwrap();
    let discover = discover.find_subcommand("discover").unwrap();
    for option in command
        .get_arguments()
        .chain(discover.get_arguments())
        .filter_map(|arg| arg.get_long())
    {
        if !["help", "version"].contains(&option) {
            assert!(
                text.contains(&format!("`--{option}`")) || text.contains(&format!("`--{option} ")),
                "{option}"
            );
        }
    }
}

#[test]
fn the_file_of_the_documentation_is_one() {
    let text = include_str!("../../docs/configuration.md");
    let examples = text.split("```toml\n").skip(1);
    let examples = examples.filter_map(|rest| rest.split("```").next());
    let disks = examples.map(|example| {
        let settings = file::from_text(Path::new("vm1.toml"), example).unwrap();
        settings.disks.len()
    });
    assert!(
        disks.eq([1, 2]),
        "the example of a service, and the whole one"
    );
}
