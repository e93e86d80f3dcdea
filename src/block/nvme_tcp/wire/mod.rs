//! Encoding and decoding of what goes over the wire. No I/O, no `unsafe`, and no panic on any bytes:
//! everything that a target sends is untrusted.

mod codes;
pub mod command;
pub mod digest;
mod error;
pub mod identify;
pub mod pdu;
pub mod status;
#[cfg(test)]
mod tests;

pub use command::{Cqe, Nlb, Sqe};
pub use error::{FatalErrorStatus, ProtocolError, TermReqBytes, Violation};
pub use status::Status;

/// Little-endian fields at fixed places of a structure. A place beyond the end reads as zero: whoever
/// takes a structure apart has checked its length first, and this keeps a slip there from being a panic.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(<[u8]>::first_chunk)
        .copied()
        .unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}
