//! The discovery subsystem (base specification, section 3.1.2.3, and the discovery log page of section 5.16.1.23).

use std::sync::Arc;

use crate::options::SubsystemSpec;
use crate::port::Port;
use crate::subsystem::Subsystem;
use crate::wire::{put, put_nqn, put_text};

/// The well-known NQN of discovery.
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

const ENTRY: usize = 1024;

pub(crate) fn subsystem() -> SubsystemSpec {
    SubsystemSpec::new(DISCOVERY_NQN).with(|o| {
        o.ana = false;
        o.max_io_queues = 0;
        o.oncs = 0;
        o.mdts = 0;
    })
}

/// The log of all subsystems at all ports. The discovery subsystem itself is told as the current one, with
/// the port that is asked.
pub(crate) fn log_page(ports: &[Arc<Port>], subsystems: &[Arc<Subsystem>], asked: u16) -> Vec<u8> {
    let mut entries = Vec::new();
    for subsystem in subsystems {
        for port in ports {
            if !subsystem.is_discovery() || port.id() == asked {
                entries.push(entry(port, subsystem));
            }
        }
    }
    let generation: u64 = subsystems.iter().map(|s| s.generation()).sum();
    let mut b = vec![0; ENTRY];
    put(&mut b, 0, &generation.to_le_bytes());
    put(&mut b, 8, &(entries.len() as u64).to_le_bytes());
    b.extend(entries.into_iter().flatten());
    b
}

fn entry(port: &Port, subsystem: &Subsystem) -> [u8; ENTRY] {
    let mut e = [0; ENTRY];
    // TRTYPE 3: TCP; ADRFAM 1: IPv4; SUBTYPE 3: the current discovery subsystem, 2: an NVM subsystem.
    e[0] = 3;
    e[1] = 1;
    e[2] = if subsystem.is_discovery() { 3 } else { 2 };
    // TREQ: a secure channel is required (01b) or not (10b); SECTYPE of TSAS: 2 for TLS 1.3, 0 for none.
    let secured = port.transport().tls.is_some();
    e[3] = if secured { 1 } else { 2 };
    e[768] = if secured { 2 } else { 0 };
    put(&mut e, 4, &port.id().to_le_bytes());
    // CNTLID FFFFh: dynamic controllers; ASQSZ: the largest admin queue.
    put(&mut e, 6, &0xffffu16.to_le_bytes());
    put(&mut e, 8, &32u16.to_le_bytes());
    put_text(&mut e, 32, 32, &port.address().port().to_string());
    put_nqn(&mut e, 256, 256, subsystem.nqn());
    put_text(&mut e, 512, 256, &port.address().ip().to_string());
    e
}
