//! What Identify, log pages and asynchronous events tell (Base 5.17, 5.16, 5.2), as far as a host of disks
//! needs it. All of it is untrusted: nothing here promises more than that the field was read from its place.

mod ana;
mod controller;
mod discovery;
mod event;
mod namespace;

pub use ana::{AnaGroup, AnaLog, AnaState};
pub use controller::{Controller, NvmController};
pub use discovery::{
    DiscoveryEntry, DiscoveryHeader, SecureChannel, SecurityType, SubsystemType, TRTYPE_TCP,
};
pub use event::{AsyncEvent, AsyncEventKind};
pub use namespace::{ChangedNamespaces, LbaFormat, Namespace, NamespaceIds, active_namespaces};

/// Bytes of every Identify data structure.
pub const IDENTIFY: usize = 4096;

/// Data that can not be what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// Fewer bytes than the structure has.
    #[error("{what}: {got} bytes of at least {needed}")]
    TooShort {
        /// The structure.
        what: &'static str,
        /// Bytes that there are.
        got: usize,
        /// Bytes that it needs.
        needed: usize,
    },
    /// A field that can not be so.
    #[error("{what}: {field} {value:#x}: {why}")]
    Field {
        /// The structure.
        what: &'static str,
        /// The field's name in the specification.
        field: &'static str,
        /// What it said.
        value: u64,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn need(what: &'static str, bytes: &[u8], needed: usize) -> Result<(), DataError> {
    if bytes.len() < needed {
        let got = bytes.len();
        return Err(DataError::TooShort { what, got, needed });
    }
    Ok(())
}

/// Text in a field of fixed size: up to a NUL, without blanks around it, and with nothing in it that would
/// disturb a terminal or a log.
fn text(bytes: &[u8], at: usize, len: usize) -> String {
    let field = bytes.get(at..).unwrap_or(&[]);
    let field = field.get(..len).unwrap_or(field);
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    let text = String::from_utf8_lossy(&field[..end]);
    let clean = |c: char| if c.is_control() { '?' } else { c };
    text.trim().chars().map(clean).collect()
}
