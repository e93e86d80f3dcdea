//! The command line. Its options are those of [`crate::config::args`]; nothing is judged here:
//! [`crate::config`] says what the settings mean together and refuses what cannot be meant.
//!
//! The options that every vhost-user backend has (`--socket-path`, `--fd`, `--print-capabilities`,
//! `--blk-file`, `--read-only`) are those of "Backend program conventions" in QEMU's
//! docs/interop/vhost-user.rst.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::block::nvme_tcp::uri::holds_secret;
use crate::config::args::{DiscoverArgs, DiskArgs, ProcessArgs, WorkerArgs};
use crate::config::{Config, Discovery, Error, Host, Settings, file};
use crate::tools::check::CheckArgs;
use crate::tools::info::InfoArgs;

/// What the process was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Write [`capabilities`] to stdout and exit successfully.
    PrintCapabilities,
    /// Write the configuration, which displays as a configuration file, to stdout and exit.
    CheckConfig(Config),
    /// Serve the disks.
    Run(Config),
    /// Check an image, and exit.
    Check(CheckArgs),
    /// Tell what an image is, and exit.
    Info(InfoArgs),
    /// Ask a discovery controller for its subsystems, and exit.
    Discover(Discovery),
}

/// What to do instead of serving disks.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Check the consistency of a qcow2 image, and repair it if asked to
    Check(CheckArgs),
    /// Tell what an image is, by its header
    Info(InfoArgs),
    /// Ask about remote disks (NVMe/TCP)
    #[command(subcommand)]
    Nvme(NvmeCommand),
}

/// What to ask about remote disks.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum NvmeCommand {
    /// Tell which subsystems a discovery controller knows
    Discover(DiscoverArgs),
}

/// The whole command line.
#[derive(Debug, Clone, Default, PartialEq, Eq, Parser)]
#[command(
    name = "virtioblkd",
    version,
    args_conflicts_with_subcommands = true,
    about = "A vhost-user block backend: serves raw, qcow2 and remote (NVMe/TCP) disks to a KVM/QEMU guest",
    after_help = "One disk is described by options; several, by a file given to --config.\n\
                  Environment: RUST_LOG chooses what is logged, as in env_logger, when \
                  --log-level does not."
)]
pub struct CommandLine {
    /// What to do instead of serving disks.
    #[command(subcommand)]
    pub command: Option<Command>,

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
    refuse_secrets(&args)?;
    let command = CommandLine::command();
    let matches = command.clone().try_get_matches_from(args)?;
    let line = CommandLine::from_arg_matches(&matches)?;
    match line.command {
        Some(Command::Check(args)) => return Ok(Invocation::Check(args)),
        Some(Command::Info(args)) => return Ok(Invocation::Info(args)),
        Some(Command::Nvme(NvmeCommand::Discover(args))) => {
            return Discovery::check(&args).map(Invocation::Discover);
        }
        None => {}
    }

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

/// Refuses a secret anywhere on the command line, before anything repeats it in an error.
fn refuse_secrets(args: &[OsString]) -> Result<(), Error> {
    let texts: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    let Some(at) = texts.iter().position(|text| holds_secret(text)) else {
        return Ok(());
    };
    let is_option = |text: &&str| text.starts_with("--") && !holds_secret(text);
    let own = texts[at].split('=').next().filter(is_option);
    let before = at.checked_sub(1).map(|at| &*texts[at]).filter(is_option);
    Err(Error::Secret {
        place: own.or(before).unwrap_or("the command line").to_owned(),
        readers: "on a command line everybody can read it",
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
