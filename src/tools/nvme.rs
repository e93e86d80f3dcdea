//! `virtioblkd nvme`: what remote disks there are.

use std::process::ExitCode;
use std::sync::Arc;

use crate::assembly;
use crate::block::nvme_tcp::discovery;
use crate::config::Discovery;

/// Asks a discovery controller for its subsystems. The result goes to stdout, failures to stderr.
pub fn discover(asked: &Discovery) -> ExitCode {
    let options = Arc::new(assembly::nvme_options(&asked.nvme));
    match discovery::run(&asked.address, &options, asked.json) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("virtioblkd: discovery failed: {error}");
            ExitCode::FAILURE
        }
    }
}
