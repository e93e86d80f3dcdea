//! The `virtioblkd` program: parse, build, run.

use std::process::ExitCode;

use virtioblkd::assembly;
use virtioblkd::cli::{self, Invocation};
use virtioblkd::tools;

fn main() -> ExitCode {
    match cli::load() {
        Ok(Invocation::PrintCapabilities) => println!("{}", cli::capabilities()),
        Ok(Invocation::CheckConfig(config)) => println!("{config}"),
        Ok(Invocation::Run(config)) => {
            cli::start_logging(&config);
            if let Err(error) = assembly::run(&config) {
                log::error!("{error}");
                return ExitCode::FAILURE;
            }
        }
        Ok(Invocation::Check(args)) => return tools::check::run(&args).into(),
        Ok(Invocation::Info(args)) => return tools::info::run(&args),
        Ok(Invocation::Discover(discovery)) => return tools::nvme::discover(&discovery),
        Err(error) => error.exit(),
    }
    ExitCode::SUCCESS
}
