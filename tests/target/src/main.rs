//! The target as a process of its own: serves namespaces in memory until its standard input ends or it is killed.

use std::process::ExitCode;

use virtioblkd_test_target::{DEFAULT_NQN, NamespaceSpec, PortSpec, SubsystemSpec, Target};

const USAGE: &str = "\
usage: virtioblkd-test-target [OPTION…]
  --listen ADDRESS:PORT   a port (may be given several times; default 127.0.0.1:0)
  --nqn NQN               the subsystem's NQN
  --size BYTES            the namespace's size, with K, M, G or T (default 1G)
  --lba BYTES             its logical block size, 512 or 4096 (default 512)
  --namespaces N          how many such namespaces (default 1)
  --queues N              I/O queues that a controller grants (default 64)
  --digests off|allow|require
  --r2t-size BYTES        --max-r2t N   --in-capsule BYTES   --c2h-size BYTES   --no-success
  --verbose               notes and the host's violations on standard error
Prints one line a port: `listening ADDRESS:PORT`. Ends at the end of its standard input.";

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("virtioblkd-test-target: {e}");
            ExitCode::FAILURE
        }
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text}: not a number of bytes"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text}: too large"))
}

fn small<T: TryFrom<u64>>(text: &str) -> Result<T, String> {
    T::try_from(bytes(text)?).map_err(|_| format!("{text}: too large"))
}

fn run(mut args: impl Iterator<Item = String>) -> Result<(), String> {
    let (mut nqn, mut size, mut lba, mut namespaces) = (DEFAULT_NQN.to_owned(), 1 << 30, 512, 1u32);
    let mut listen = Vec::new();
    let mut transport = virtioblkd_test_target::TransportOptions::default();
    let mut controller = virtioblkd_test_target::ControllerOptions::default();
    let mut verbose = false;
    while let Some(option) = args.next() {
        let mut value = || {
            args.next()
                .ok_or_else(|| format!("{option} needs a value\n{USAGE}"))
        };
        match option.as_str() {
            "--listen" => listen.push(value()?),
            "--nqn" => nqn = value()?,
            "--size" => size = bytes(&value()?)?,
            "--lba" => lba = small(&value()?)?,
            "--namespaces" => namespaces = small(&value()?)?,
            "--queues" => controller.max_io_queues = small(&value()?)?,
            "--r2t-size" => transport.r2t_size = small(&value()?)?,
            "--max-r2t" => transport.max_r2t = small(&value()?)?,
            "--in-capsule" => controller.in_capsule = small(&value()?)?,
            "--c2h-size" => transport.c2h_size = small(&value()?)?,
            "--no-success" => transport.c2h_success = false,
            "--verbose" => verbose = true,
            "--digests" => {
                let value = value()?;
                let (allow, require) = match value.as_str() {
                    "off" => (false, false),
                    "allow" => (true, false),
                    "require" => (true, true),
                    _ => return Err(format!("--digests {value}: off, allow or require")),
                };
                (transport.header_digest, transport.data_digest) = (allow, allow);
                (
                    transport.require_header_digest,
                    transport.require_data_digest,
                ) = (require, require);
            }
            "--help" => {
                println!("{USAGE}");
                return Ok(());
            }
            _ => return Err(format!("{option}: not an option\n{USAGE}")),
        }
    }
    if listen.is_empty() {
        listen.push("127.0.0.1:0".into());
    }
    let mut subsystem = SubsystemSpec::new(nqn).with(|o| *o = controller);
    for nsid in 1..=namespaces {
        subsystem = subsystem.namespace(NamespaceSpec::new(nsid, size).lba_size(lba));
    }
    let mut builder = Target::builder().verbose(verbose).subsystem(subsystem);
    for address in listen {
        builder = builder.port(PortSpec::new(address).with(|t| *t = transport.clone()));
    }
    let target = builder.start().map_err(|e| e.to_string())?;
    for port in target.ports() {
        println!("listening {}", port.address());
    }
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink()).map_err(|e| e.to_string())?;
    Ok(())
}
