//! What the user wrote: the command line, and the tables of the configuration file.
//!
//! The option structs are read by clap and by serde alike, so an option and its key in the file have
//! one name, one type and one description. Nothing is judged here: [`crate::config`] says what the
//! settings mean together and refuses what cannot be meant.
//!
//! The options that every vhost-user backend has (`--socket-path`, `--fd`, `--print-capabilities`,
//! `--blk-file`, `--read-only`) are those of "Backend program conventions" in QEMU's
//! docs/interop/vhost-user.rst.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser};
use serde::Deserialize;

use crate::config::{
    BackingCache, CacheMode, Config, Error, Format, Host, LogLevel, PollMode, Settings, file,
};

/// What the process was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Write [`capabilities`] to stdout and exit successfully.
    PrintCapabilities,
    /// Write the configuration, which displays as a configuration file, to stdout and exit.
    CheckConfig(Config),
    /// Serve the disks.
    Run(Config),
}

/// The whole command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Parser)]
#[command(
    name = "virtioblkd",
    version,
    about = "A vhost-user block backend: serves raw and qcow2 disks to a KVM/QEMU guest",
    after_help = "One disk is described by options; several, by a file given to --config.\n\
                  Environment: RUST_LOG chooses what is logged, as in env_logger, when \
                  --log-level does not."
)]
pub struct CommandLine {
    /// Read everything from this TOML file, which can describe several disks
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// The one disk.
    #[command(flatten)]
    pub disk: DiskArgs,

    /// The worker threads.
    #[command(flatten)]
    pub workers: WorkerArgs,

    /// The process.
    #[command(flatten)]
    pub process: ProcessArgs,

    /// Check all settings, print what they mean as a configuration file, and exit
    #[arg(long)]
    pub check_config: bool,

    /// Print what this backend can do, as JSON, and exit; all else is ignored
    #[arg(long)]
    pub print_capabilities: bool,
}

/// A disk and its socket: options, or one `[[disk]]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Disk")]
pub struct DiskArgs {
    /// Image file or block device, or `null:SIZE` for a device that stores nothing
    #[arg(long, value_name = "PATH|null:SIZE")]
    pub blk_file: Option<PathBuf>,

    /// Format of the image; it is never guessed [default: raw]
    #[arg(long, value_enum)]
    pub format: Option<Format>,

    /// Refuse every write
    #[arg(long)]
    pub read_only: bool,

    /// Host cache of the image [default: none]
    #[arg(long, value_enum)]
    pub cache: Option<CacheMode>,

    /// Host cache of the read-only files below a qcow2 image [default: writeback]
    #[arg(long, value_enum)]
    pub backing_cache: Option<BackingCache>,

    /// Another directory that backing and data files may be in; can be repeated
    #[arg(long, value_name = "DIR")]
    pub allow_path: Vec<PathBuf>,

    /// Serial number that the guest sees, 1 to 20 characters [default: made from the image's path]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,

    /// Logical block size in bytes: 512 or 4096 [default: 512]
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u64>,

    /// Most queues the guest may use, 1 to 256 [default: one for each CPU of the host, at most 16]
    #[arg(long, value_name = "N")]
    pub num_queues: Option<u64>,

    /// Most entries a queue may have, a power of two from 2 to 1024 [default: 256]
    #[arg(long, value_name = "N")]
    pub queue_size: Option<u64>,

    /// Name of the disk in logs [default: disk0]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Listen for the VMM on a new Unix socket at this path
    #[arg(long, value_name = "PATH", help_heading = "Socket")]
    pub socket_path: Option<PathBuf>,

    /// Serve on this open descriptor, a Unix socket that is listening or already connected
    #[arg(long, value_name = "N", help_heading = "Socket")]
    pub fd: Option<i32>,

    /// Serve on the socket that systemd passed under this name (FileDescriptorName=)
    #[arg(long, value_name = "NAME", help_heading = "Socket")]
    pub fd_name: Option<String>,

    /// Group of the new socket, a name or a number
    #[arg(long, value_name = "GROUP", help_heading = "Socket")]
    pub socket_group: Option<String>,

    /// Permissions of the new socket, octal [default: 0600]
    #[arg(long, value_name = "MODE", help_heading = "Socket")]
    pub socket_mode: Option<String>,
}

/// The worker threads: options, or the `[workers]` table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Workers")]
pub struct WorkerArgs {
    /// Number of worker threads; no more than there are queues [default: 1]
    #[arg(long, value_name = "N")]
    #[serde(rename = "count")]
    pub workers: Option<u64>,

    /// CPUs to pin the workers to, in order, such as 2,4-5
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<String>,

    /// When a worker polls instead of sleeping [default: adaptive]
    #[arg(long, value_enum)]
    pub poll: Option<PollMode>,

    /// With --poll adaptive: longest time in microseconds to poll without work, 1 to 1000000
    /// [default: 50]
    #[arg(long, value_name = "N")]
    pub poll_max_us: Option<u64>,
}

/// The process: options, or keys outside any table.
#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Process")]
pub struct ProcessArgs {
    /// Exit when the first VMM has disconnected
    #[arg(long)]
    pub once: bool,

    /// Write the process id to this file, and remove it at exit
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,

    /// Least serious messages to log [default: info, or what RUST_LOG says]
    #[arg(long, value_enum)]
    pub log_level: Option<LogLevel>,
}

/// What `--print-capabilities` prints: a `VHostUserBackendCapabilities` of QEMU's
/// docs/interop/vhost-user.json.
pub fn capabilities() -> String {
    serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }).to_string()
}

/// Reads this process's command line, and the configuration file if it names one.
///
/// # Errors
///
/// [`Error::Usage`] for what clap refuses and for `--help` and `--version`; any other [`Error`] for
/// settings that cannot be. [`Error::exit`] ends the process as each of them asks.
pub fn load() -> Result<Invocation, Error> {
    load_from(std::env::args_os(), &Host::of_this_process())
}

/// [`load`] for a given command line, program name first, and host.
///
/// # Errors
///
/// As [`load`].
pub fn load_from<I>(args: I, host: &Host) -> Result<Invocation, Error>
where
    I: IntoIterator,
    I::Item: Into<OsString>,
{
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    // "Other options and arguments should be ignored": also those that clap would refuse.
    if args.iter().skip(1).any(|arg| arg == "--print-capabilities") {
        return Ok(Invocation::PrintCapabilities);
    }
    let command = CommandLine::command();
    let matches = command.clone().try_get_matches_from(args)?;
    let line = CommandLine::from_arg_matches(&matches)?;

    let settings = match &line.config {
        None => Settings::from_command_line(line.disk, line.workers, line.process),
        Some(path) => {
            // What describes disks and workers is in one place, so that neither silently wins.
            let beside = command
                .get_arguments()
                .filter(|arg| {
                    !["config", "check_config", "once", "pid_file", "log_level"]
                        .contains(&arg.get_id().as_str())
                })
                .find(|arg| {
                    matches.value_source(arg.get_id().as_str())
                        == Some(clap::parser::ValueSource::CommandLine)
                });
            if let Some(option) = beside.and_then(clap::Arg::get_long) {
                return Err(Error::BesideConfig {
                    option: option.to_owned(),
                    path: path.clone(),
                });
            }
            let mut settings = file::read(path)?;
            settings.override_process(line.process);
            settings
        }
    };
    let config = Config::check(&settings, host)?;
    Ok(if line.check_config {
        Invocation::CheckConfig(config)
    } else {
        Invocation::Run(config)
    })
}

/// Starts logging to stderr as the configuration says, and logs its warnings.
///
/// `--log-level` wins over `RUST_LOG`; without either, `info` and worse are logged. A logger that is
/// already set stays.
pub fn start_logging(config: &Config) {
    let mut builder =
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"));
    if let Some(level) = config.log_level {
        builder.filter(None, level.into());
    }
    // Fails only when a logger is set already, and then the messages have somewhere to go.
    let _ = builder.try_init();
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
}
