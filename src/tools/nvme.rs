//! `virtioblkd nvme`: what remote disks there are.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;

use crate::assembly;
use crate::block::nvme_tcp::discovery;
use crate::config::Discovery;

/// Asks a discovery controller for its subsystems. The result goes to stdout, failures to stderr.
pub fn discover(asked: &Discovery) -> ExitCode {
    let options = Arc::new(assembly::nvme_options(&asked.nvme));
    match discovery::run(&asked.address, &options, asked.json) {
        // Whoever reads it may have closed the pipe.
        Ok(text) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("virtioblkd: writing the result: {error}");
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("virtioblkd: discovery failed: {error}");
            ExitCode::FAILURE
        }
    }
}
