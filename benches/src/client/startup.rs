//! How long a backend takes from its exec to the first completed read.

use std::error::Error;
use std::ffi::OsString;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Client, Options};
use crate::process::Running;
use crate::record::Special;

/// Starts `command`, connects, reads the first block, and ends it.
///
/// # Errors
/// When it does not start, or the read fails.
pub fn run(options: &Options, command: &[OsString]) -> Result<Special, Box<dyn Error>> {
    let (program, args) = command.split_first().ok_or("no command to start")?;
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    let begin = Instant::now();
    let mut running = Running::start(&mut command)?;
    while !options.socket.exists() {
        if let Some(status) = running.child().try_wait()? {
            return Err(format!("the backend ended at once: {status}").into());
        }
        if begin.elapsed() > options.patience() {
            return Err("the backend makes no socket".into());
        }
        std::thread::sleep(Duration::from_micros(20));
    }
    let listening = begin.elapsed();
    let mut client = Client::connect(options)?;
    let (end, ok) = client.one(0, options.patience())?;
    client.shut_down()?;
    running.stop()?;
    if !ok {
        return Err("the first read failed".into());
    }
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let special = Special::new("start", &options.subject, options.run);
    Ok(special
        .with("socket_ms", ms(listening))
        .with("first_read_ms", ms(end - begin)))
}
