//! `virtioblkd nvme`: what remote disks there are.

use std::process::ExitCode;

use crate::config::Discovery;

/// Asks a discovery controller for its subsystems. The result goes to stdout, failures to stderr.
pub fn discover(discovery: &Discovery) -> ExitCode {
    eprintln!(
        "virtioblkd: discovery failed: {}: this program is built without the NVMe/TCP initiator",
        discovery.address
    );
    ExitCode::FAILURE
}
