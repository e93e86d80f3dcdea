//! Drives a vhost-user-blk backend as a guest in poll mode would, and prints a JSON line of what came out.
//!
//! One thread drives all queues. In steady state a request allocates nothing, copies nothing and makes no
//! system call but the kick that the backend asks for.

use std::error::Error;
use std::ffi::OsString;
use std::time::Duration;

use clap::Parser;
use virtioblkd_bench::client::{Client, Options, bursts, sleeper, startup, steady};
use virtioblkd_bench::record::Line;

/// Drive a vhost-user-blk backend and measure it
#[derive(Debug, Parser)]
struct Args {
    #[command(flatten)]
    options: Options,
    /// Send in bursts: microseconds on and microseconds off, such as 1000,9000
    #[arg(long, value_name = "ON,OFF", value_parser = parse_bursts)]
    bursts: Option<(Duration, Duration)>,
    /// Send nothing, and measure what the backend uses
    #[arg(long, conflicts_with = "bursts")]
    idle: bool,
    /// Measure first requests after this many milliseconds of silence, beside bare wakes
    #[arg(long, conflicts_with_all = ["bursts", "idle"])]
    wake_ms: Option<u64>,
    /// With --wake-ms: the CPU of the backend, for the bare wakes
    #[arg(long, default_value_t = 1)]
    peer_cpu: usize,
    /// Start the backend that follows, and measure until its first read has completed
    #[arg(long, requires = "command", conflicts_with_all = ["bursts", "idle", "wake_ms"])]
    start: bool,
    /// With --start: the backend's program and its arguments
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// Two numbers of microseconds.
fn parse_bursts(text: &str) -> Result<(Duration, Duration), String> {
    let numbers = text
        .split_once(',')
        .and_then(|(on, off)| Some((on.parse().ok()?, off.parse().ok()?)));
    let (on, off) = numbers.ok_or("ON,OFF, please")?;
    Ok((Duration::from_micros(on), Duration::from_micros(off)))
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("loadgen: {error}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let options = &args.options;
    if args.start {
        let line = Line::Special(startup::run(options, &args.command)?);
        println!("{}", serde_json::to_string(&line)?);
        return Ok(());
    }
    let mut client = Client::connect(options)?;
    let line = if args.idle {
        Line::Special(sleeper::idle(options, &mut client)?)
    } else if let Some(gap) = args.wake_ms {
        let gap = Duration::from_millis(gap);
        Line::Special(sleeper::wake(options, &mut client, gap, args.peer_cpu)?)
    } else if let Some((on, off)) = args.bursts {
        Line::Run(Box::new(bursts::run(options, &mut client, on, off)?))
    } else {
        Line::Run(Box::new(steady::run(options, &mut client)?))
    };
    client.shut_down()?;
    println!("{}", serde_json::to_string(&line)?);
    match line {
        Line::Run(record) if record.errors > 0 => {
            Err(format!("{} requests failed", record.errors).into())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_one_and_bursts_are_two_numbers() {
        Args::command().debug_assert();
        let args = [
            "loadgen",
            "--socket",
            "/s",
            "--pid",
            "1",
            "--bursts",
            "1000,9000",
        ];
        let args = Args::try_parse_from(args).unwrap();
        assert_eq!(
            args.bursts,
            Some((Duration::from_millis(1), Duration::from_millis(9)))
        );
        for wrong in ["", "1000", "1,x", "1,2,3"] {
            assert!(parse_bursts(wrong).is_err(), "{wrong}");
        }
    }
}
