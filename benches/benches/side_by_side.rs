//! `cargo bench -p virtioblkd-bench [-- options of benches/run]`.

use std::path::Path;
use std::process::{Command, exit};

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` says so; `cargo test --all-targets` only wants to see that this starts.
    if !args.iter().any(|arg| arg == "--bench") {
        return;
    }
    args.retain(|arg| arg != "--bench");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("run");
    match Command::new(&script).args(args).status() {
        Ok(status) => exit(status.code().unwrap_or(1)),
        Err(error) => {
            eprintln!("{}: {error}", script.display());
            exit(1)
        }
    }
}
