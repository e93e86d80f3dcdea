//! The Discovery log page: which subsystems there are, and where.

use super::super::{u16_at, u64_at};
use super::{DataError, need, text};

/// The header of the Discovery log page (Base 5.16.1.23).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscoveryHeader {
    /// GENCTR: another number when the log has changed.
    pub generation: u64,
    /// NUMREC: entries.
    pub entries: u64,
}

impl DiscoveryHeader {
    /// Bytes of it; the first entry follows.
    pub const BYTES: usize = 1024;

    /// From the first bytes of the log page: 18 are enough.
    ///
    /// # Errors
    /// Fewer than that, or a format of records that is not known.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "Discovery log";
        need(WHAT, bytes, 18)?;
        let format = u16_at(bytes, 16);
        if format != 0 {
            return Err(DataError::Field {
                what: WHAT,
                field: "RECFMT",
                value: format.into(),
                why: "only format 0 is known",
            });
        }
        Ok(Self {
            generation: u64_at(bytes, 0),
            entries: u64_at(bytes, 8),
        })
    }
}

/// TRTYPE: TCP.
pub const TRTYPE_TCP: u8 = 3;

/// What an entry of the Discovery log stands for (SUBTYPE).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubsystemType {
    /// Another discovery subsystem.
    Referral,
    /// An NVM subsystem.
    Nvm,
    /// The discovery subsystem that was asked.
    CurrentDiscovery,
    /// Something else.
    Unknown(u8),
}

/// Whether a secure channel is needed (TREQ bits 1:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecureChannel {
    /// Not told.
    Unspecified,
    /// It is.
    Required,
    /// It is not.
    NotRequired,
}

/// What the port speaks (TSAS.SECTYPE; TCP 3.6.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecurityType {
    /// Plain TCP.
    None,
    /// TLS 1.2, which no host should use any more.
    Tls12,
    /// TLS 1.3.
    Tls13,
    /// Something else.
    Unknown(u8),
}

/// One entry of the Discovery log page (Base 5.16.1.23, figure 294).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryEntry {
    /// TRTYPE: [`TRTYPE_TCP`], or another transport.
    pub trtype: u8,
    /// ADRFAM: 1 IPv4, 2 IPv6.
    pub adrfam: u8,
    /// SUBTYPE.
    pub subtype: SubsystemType,
    /// TREQ: secure channel.
    pub secure_channel: SecureChannel,
    /// TREQ bit 2: SQ flow control may be disabled.
    pub can_disable_sq_flow_control: bool,
    /// PORTID.
    pub portid: u16,
    /// CNTLID; FFFFh: the subsystem makes controllers as needed.
    pub cntlid: u16,
    /// ASQSZ: most entries of the admin submission queue.
    pub asqsz: u16,
    /// EFLAGS: bit 0: other entries tell the same; bit 1: explicit persistent connections.
    pub eflags: u16,
    /// TRSVCID: the TCP port, in decimal; `None` if it is not one, and then the entry is not used (TCP
    /// 3.1.2).
    pub port: Option<u16>,
    /// SUBNQN.
    pub subnqn: String,
    /// TRADDR: the address.
    pub traddr: String,
    /// TSAS.SECTYPE.
    pub security: SecurityType,
}

impl DiscoveryEntry {
    /// Bytes of an entry.
    pub const BYTES: usize = 1024;

    /// From an entry's bytes.
    ///
    /// # Errors
    /// Fewer than 1024.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        need("Discovery log entry", bytes, Self::BYTES)?;
        Ok(Self {
            trtype: bytes[0],
            adrfam: bytes[1],
            subtype: match bytes[2] {
                1 => SubsystemType::Referral,
                2 => SubsystemType::Nvm,
                3 => SubsystemType::CurrentDiscovery,
                other => SubsystemType::Unknown(other),
            },
            secure_channel: match bytes[3] & 3 {
                1 => SecureChannel::Required,
                2 => SecureChannel::NotRequired,
                _ => SecureChannel::Unspecified,
            },
            can_disable_sq_flow_control: bytes[3] & 1 << 2 != 0,
            portid: u16_at(bytes, 4),
            cntlid: u16_at(bytes, 6),
            asqsz: u16_at(bytes, 8),
            eflags: u16_at(bytes, 10),
            port: text(bytes, 32, 32).parse().ok().filter(|port| *port != 0),
            subnqn: text(bytes, 256, 256),
            traddr: text(bytes, 512, 256),
            security: match bytes[768] {
                0 => SecurityType::None,
                1 => SecurityType::Tls12,
                2 => SecurityType::Tls13,
                other => SecurityType::Unknown(other),
            },
        })
    }
}
