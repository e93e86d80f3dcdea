//! In-band authentication: the host's side of DH-HMAC-CHAP (NVM Express Base Specification 2.1, section
//! 8.3.5.5), without I/O.
//!
//! A queue's transaction is an [`Authentication`]: [`Authentication::next`] says what to send with
//! Authentication Send, or how much to ask for with Authentication Receive; what comes goes to
//! [`Authentication::received`]. In the commands SECP is E9h, SPSP0 and SPSP1 are 01h (section 8.3.5.3).
//!
//! | module | what it does |
//! | --- | --- |
//! | [`Authentication`] | the transaction |
//! | `message` | the messages' layouts |
//! | `group`, `hash` | Diffie-Hellman, hash functions |

mod group;
mod hash;
mod message;
mod transaction;

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;

pub use group::DhGroup;
pub use hash::Hash;
pub use transaction::{Authentication, Outcome, Step};

use super::secret::DhChapSecret;

/// What a host authenticates itself and the controller with.
#[derive(Clone, Debug)]
pub struct AuthConfig {
    /// The host's secret.
    pub host: Arc<DhChapSecret>,
    /// The subsystem's, if the controller has to authenticate itself, too.
    pub controller: Option<Arc<DhChapSecret>>,
    /// The hash functions to offer.
    pub hashes: Vec<Hash>,
    /// The Diffie-Hellman groups to offer.
    pub groups: Vec<DhGroup>,
}

impl AuthConfig {
    /// With all hash functions and groups.
    pub fn new(host: Arc<DhChapSecret>, controller: Option<Arc<DhChapSecret>>) -> Self {
        Self {
            host,
            controller,
            hashes: Hash::ALL.to_vec(),
            groups: DhGroup::ALL.to_vec(),
        }
    }
}

/// Why an authentication failed (NVM Express Base Specification 2.1, section 8.3.5.4: Reason Code
/// Explanation).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A response is not what the secret gives.
    Failed,
    /// No protocol that both know.
    ProtocolUnusable,
    /// A secure channel is asked for, and can not be; or the reverse.
    ConcatenationMismatch,
    /// A hash function that was not offered.
    HashUnusable,
    /// A Diffie-Hellman group that was not offered.
    DhGroupUnusable,
    /// A message that contradicts itself.
    IncorrectPayload,
    /// A message that was not due.
    IncorrectMessage,
    /// A value that no specification defines.
    Other(u8),
}

impl Reason {
    /// Its code in messages.
    pub fn code(self) -> u8 {
        match self {
            Self::Failed => 0x01,
            Self::ProtocolUnusable => 0x02,
            Self::ConcatenationMismatch => 0x03,
            Self::HashUnusable => 0x04,
            Self::DhGroupUnusable => 0x05,
            Self::IncorrectPayload => 0x06,
            Self::IncorrectMessage => 0x07,
            Self::Other(code) => code,
        }
    }

    fn by_code(code: u8) -> Self {
        let known = [
            Self::Failed,
            Self::ProtocolUnusable,
            Self::ConcatenationMismatch,
            Self::HashUnusable,
            Self::DhGroupUnusable,
            Self::IncorrectPayload,
            Self::IncorrectMessage,
        ];
        let found = known.into_iter().find(|reason| reason.code() == code);
        found.unwrap_or(Self::Other(code))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed => "authentication failed",
            Self::ProtocolUnusable => "authentication protocol not usable",
            Self::ConcatenationMismatch => "secure channel concatenation mismatch",
            Self::HashUnusable => "hash function not usable",
            Self::DhGroupUnusable => "Diffie-Hellman group not usable",
            Self::IncorrectPayload => "incorrect payload",
            Self::IncorrectMessage => "incorrect protocol message",
            Self::Other(code) => return write!(f, "reason {code:02x}h"),
        })
    }
}

/// A failed authentication. Nothing of a secret is in it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct AuthError {
    reason: Reason,
    message: String,
    by_controller: bool,
}

impl AuthError {
    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            by_controller: false,
        }
    }

    /// The controller sent AUTH_Failure1.
    fn refused(code: Option<u8>) -> Self {
        let reason = code.map_or(Reason::Failed, Reason::by_code);
        let advice = match reason {
            Reason::Failed => {
                "; check that the host's secret is the one that the target has for this host's NQN"
            }
            Reason::HashUnusable | Reason::DhGroupUnusable => {
                "; check the hash function and the group that the target is set to"
            }
            _ => "",
        };
        Self {
            reason,
            message: format!("the controller refused the authentication: {reason}{advice}"),
            by_controller: true,
        }
    }

    fn openssl(error: &openssl::error::ErrorStack) -> Self {
        Self::new(
            Reason::Failed,
            format!("OpenSSL could not compute the authentication: {error}"),
        )
    }

    /// Why, as in AUTH_Failure1 or AUTH_Failure2.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// True if the controller refused this host; false if this host refused the controller.
    pub fn by_controller(&self) -> bool {
        self.by_controller
    }
}
