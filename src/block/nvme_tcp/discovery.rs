//! What subsystems there are: the log of a discovery controller (Base section 5.16.1.23).

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use super::controller::channel::{Channel, succeeded};
use super::controller::dial::Resolver;
use super::controller::setup::Target;
use super::controller::transport::MAX_DATA;
use super::controller::trouble::{self, Trouble, later};
use super::controller::wait::Patience;
use super::spec::{Address, NvmeOptions};
use super::wire::Sqe;
use super::wire::command::log as log_page;
use super::wire::identify::{
    DataError, DiscoveryEntry, DiscoveryHeader, SecureChannel, SecurityType, SubsystemType,
    TRTYPE_TCP,
};
use crate::block::error::{Error, ErrorKind, Result};

/// The name that every discovery subsystem has (Base section 4.5).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Entries that are read, at most.
const MAX_ENTRIES: u64 = 16 << 10;
/// The log is read anew this often if it changes meanwhile.
const TRIES: u32 = 8;

/// One entry of the log.
pub type Record = DiscoveryEntry;

/// Asks a discovery controller for its log. Blocks for the connect timeout at most.
///
/// # Errors
/// The controller cannot be reached, or its log makes no sense.
pub fn discover(address: &Address, options: &Arc<NvmeOptions>) -> Result<Vec<Record>> {
    let target = Target::new(DISCOVERY_NQN.to_owned(), options.clone())?;
    let deadline = Instant::now() + options.connect_timeout;
    read(&target, address, deadline).map_err(|trouble| {
        let (kind, text) = match trouble {
            Trouble::Failed(failure) => (failure.kind, failure.text),
            Trouble::Closed => (ErrorKind::Io, "closed".to_owned()),
        };
        Error::image(kind, format!("discovery controller {address}"), None, text)
    })
}

fn read(target: &Target, address: &Address, deadline: Instant) -> trouble::Result<Vec<Record>> {
    let addresses = Resolver::default().resolve(address, deadline, &mut Patience)?;
    let kato = std::time::Duration::ZERO;
    let mut ready = target.admin(&addresses, kato, deadline, &mut Patience)?;
    let channel = &mut ready.channel;
    for _ in 0..TRIES {
        let before = header(channel, deadline)?;
        if before.entries > MAX_ENTRIES {
            return Err(later(format!(
                "the log has {} entries, which cannot be",
                before.entries
            )));
        }
        let mut records = Vec::new();
        while (records.len() as u64) < before.entries {
            let at = DiscoveryHeader::BYTES + records.len() * DiscoveryEntry::BYTES;
            let left = (before.entries - records.len() as u64) as usize * DiscoveryEntry::BYTES;
            let want = left.min(MAX_DATA as usize);
            let data = piece(channel, at as u64, want as u32, deadline)?;
            if data.len() != want {
                return Err(later("the log is shorter than it says"));
            }
            for entry in data.chunks_exact(DiscoveryEntry::BYTES) {
                records.push(DiscoveryEntry::parse(entry).map_err(wrong)?);
            }
        }
        // The same generation before and after: nothing has changed meanwhile.
        if header(channel, deadline)? == before {
            return Ok(records);
        }
    }
    Err(later("the log changes all the time; try again"))
}

fn wrong(error: DataError) -> Trouble {
    later(format!("the controller's answer makes no sense: {error}"))
}

fn header(channel: &mut Channel, deadline: Instant) -> trouble::Result<DiscoveryHeader> {
    let data = piece(channel, 0, DiscoveryHeader::BYTES as u32, deadline)?;
    DiscoveryHeader::parse(&data).map_err(wrong)
}

fn piece(
    channel: &mut Channel,
    offset: u64,
    length: u32,
    deadline: Instant,
) -> trouble::Result<Vec<u8>> {
    const WHAT: &str = "Get Log Page (Discovery)";
    let sqe = Sqe::get_log_page(log_page::DISCOVERY, 0, offset, length, false, 0);
    let (end, data) = channel
        .run_for(sqe, length, deadline, &mut Patience)
        .map_err(|trouble| trouble.during(WHAT))?;
    succeeded(end, WHAT)?;
    Ok(data)
}

/// What `virtioblkd nvme discover` prints: a table, or with `json` one array.
///
/// # Errors
/// Those of [`discover`].
pub fn run(address: &Address, options: &Arc<NvmeOptions>, json: bool) -> Result<String> {
    let records = discover(address, options)?;
    Ok(match json {
        true => format!("{:#}\n", as_json(&records)),
        false => table(&records),
    })
}

fn transport(record: &Record) -> String {
    match record.trtype {
        1 => "rdma".to_owned(),
        2 => "fc".to_owned(),
        TRTYPE_TCP => "tcp".to_owned(),
        254 => "loop".to_owned(),
        other => format!("transport {other}"),
    }
}

fn subtype(record: &Record) -> String {
    match record.subtype {
        SubsystemType::Referral => "referral".to_owned(),
        SubsystemType::Nvm => "nvm".to_owned(),
        SubsystemType::CurrentDiscovery => "discovery".to_owned(),
        SubsystemType::Unknown(other) => format!("type {other}"),
    }
}

fn security(record: &Record) -> &'static str {
    match (record.security, record.secure_channel) {
        (SecurityType::Tls13, SecureChannel::Required) => "tls1.3 required",
        (SecurityType::Tls13, _) => "tls1.3",
        (SecurityType::Tls12, _) => "tls1.2",
        (SecurityType::None, SecureChannel::Required) => "secure channel required",
        (SecurityType::None, _) => "none",
        (SecurityType::Unknown(_), _) => "unknown",
    }
}

fn place(record: &Record) -> String {
    match (record.trtype, record.port) {
        (TRTYPE_TCP, Some(port)) => Address {
            host: record.traddr.clone(),
            port,
        }
        .to_string(),
        _ => record.traddr.clone(),
    }
}

fn table(records: &[Record]) -> String {
    if records.is_empty() {
        return "no subsystem is offered to this host\n".to_owned();
    }
    let head = ["TRANSPORT", "ADDRESS", "TYPE", "SECURITY", "SUBSYSTEM"].map(str::to_owned);
    let mut rows = vec![head];
    rows.extend(records.iter().map(|record| {
        let security = security(record).to_owned();
        let subsystem = record.subnqn.clone();
        [
            transport(record),
            place(record),
            subtype(record),
            security,
            subsystem,
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..4).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a String does not fail.
            let _ = write!(text, "{cell:width$}  ");
        }
        text.push_str(&row[4]);
        text.push('\n');
    }
    text
}

fn as_json(records: &[Record]) -> serde_json::Value {
    let one = |record: &Record| {
        serde_json::json!({
            "transport": transport(record),
            "address": record.traddr,
            "port": record.port,
            "type": subtype(record),
            "security": security(record),
            "subsystem": record.subnqn,
            "port-id": record.portid,
        })
    };
    records.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_target::{SubsystemSpec, Target as TestTarget};

    #[test]
    fn the_subsystems_of_a_target_are_listed() {
        // More of them than one chunk has.
        let mut builder = TestTarget::builder();
        for number in 0..70 {
            builder = builder.subsystem(SubsystemSpec::new(format!(
                "nqn.2016-06.io.example:{number}"
            )));
        }
        let target = builder.start().unwrap();
        let address = Address {
            host: target.address().ip().to_string(),
            port: target.address().port(),
        };
        let options = Arc::new(NvmeOptions {
            host_nqn: Some("nqn.2016-06.io.example:host".to_owned()),
            host_id: Some([7; 16]),
            ..NvmeOptions::default()
        });
        let records = discover(&address, &options).unwrap();
        for number in 0..70 {
            let nqn = format!("nqn.2016-06.io.example:{number}");
            let found = records.iter().find(|record| record.subnqn == nqn).unwrap();
            assert_eq!(place(found), address.to_string());
            assert_eq!(found.subtype, SubsystemType::Nvm);
        }
        let text = run(&address, &options, false).unwrap();
        assert!(text.starts_with("TRANSPORT"), "{text}");
        assert!(text.contains("nqn.2016-06.io.example:69\n"), "{text}");
        let json: serde_json::Value =
            serde_json::from_str(&run(&address, &options, true).unwrap()).unwrap();
        assert_eq!(json.as_array().unwrap().len(), records.len());
        assert_eq!(target.violations(), Vec::<String>::new());
    }
}
