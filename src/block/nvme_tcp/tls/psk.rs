//! From a configured PSK to the identity and the key that TLS has (NVM Express TCP Transport Specification
//! 1.1, section 3.6.1.3: TLS PSK and PSK identity derivation).

use std::fmt;

use openssl::error::ErrorStack;
use zeroize::Zeroizing;

use super::TlsError;
use crate::block::nvme_tcp::auth::Hash;
use crate::block::nvme_tcp::secret::TlsSecret;

/// How the identity and the key are made of the configured PSK. A target has a key under the identity of the
/// derivation that was chosen when the key was given to it; so a host tries them in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Derivation {
    /// Version 1: the identity ends in a digest of the key.
    Version1,
    /// Version 0, which SPDK takes: the identity is the two NQNs alone.
    Version0,
    /// Version 1 as `nvme-cli` derived it before libnvme 1.15, and does with `--compat`: the parts of
    /// HKDF-Expand-Label's argument have no lengths.
    Version1Compat,
    /// Version 0 in that way.
    Version0Compat,
}

impl Derivation {
    /// All, in the order to try them.
    pub const ALL: [Self; 4] = [
        Self::Version1,
        Self::Version0,
        Self::Version1Compat,
        Self::Version0Compat,
    ];

    fn version(self) -> u8 {
        match self {
            Self::Version1 | Self::Version1Compat => 1,
            Self::Version0 | Self::Version0Compat => 0,
        }
    }

    fn is_compat(self) -> bool {
        matches!(self, Self::Version1Compat | Self::Version0Compat)
    }
}

/// A key for TLS with its identity.
#[derive(Clone)]
pub struct TlsPsk {
    identity: String,
    key: Zeroizing<Vec<u8>>,
    hash: Hash,
}

impl fmt::Debug for TlsPsk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TlsPsk({:?}, [secret])", self.identity)
    }
}

impl TlsPsk {
    /// Derives it for a host and a subsystem.
    ///
    /// # Errors
    /// [`TlsError::TooLong`] for long NQNs with version 0; those of OpenSSL.
    pub fn derive(
        secret: &TlsSecret,
        derivation: Derivation,
        host_nqn: &str,
        subsystem_nqn: &str,
    ) -> Result<Self, TlsError> {
        let configured = secret.key();
        // The suite, and so the hash of all but the retained PSK, follows from the length of the key.
        let hash = match configured.len() {
            48 => Hash::Sha384,
            _ => Hash::Sha256,
        };
        let label = Label {
            is_compat: derivation.is_compat(),
        };
        let retained = match secret.retained_by() {
            None => Zeroizing::new(configured.to_vec()),
            Some(hash) => label.expand(hash, configured, "HostNQN", host_nqn)?,
        };
        Self::of_input(
            ('R', hash, &retained),
            derivation.version(),
            &label,
            host_nqn,
            subsystem_nqn,
        )
    }

    /// Of the PSK that a DH-HMAC-CHAP transaction generated with `hash`: SHA-256 or SHA-384.
    ///
    /// # Errors
    /// Those of OpenSSL.
    pub fn generated(
        hash: Hash,
        psk: &[u8],
        host_nqn: &str,
        subsystem_nqn: &str,
    ) -> Result<Self, TlsError> {
        let label = Label { is_compat: false };
        Self::of_input(('G', hash, psk), 1, &label, host_nqn, subsystem_nqn)
    }

    fn of_input(
        (kind, hash, input): (char, Hash, &[u8]),
        version: u8,
        label: &Label,
        host_nqn: &str,
        subsystem_nqn: &str,
    ) -> Result<Self, TlsError> {
        let mut identity = format!(
            "NVMe{version}{kind}{:02} {host_nqn} {subsystem_nqn}",
            hash.id()
        );
        let context = match version {
            0 => identity.clone(),
            _ => {
                let text = format!("{host_nqn} {subsystem_nqn} NVMe-over-Fabrics");
                let digest = hash.hmac(input, &[text.as_bytes()])?;
                let digest = openssl::base64::encode_block(&digest);
                identity = format!("{identity} {digest}");
                format!("{:02} {digest}", hash.id())
            }
        };
        // The context of HKDF-Expand-Label has a length of one byte.
        if context.len() > 255 {
            return Err(TlsError::TooLong);
        }
        let key = label.expand(hash, input, "nvme-tls-psk", &context)?;
        Ok(Self {
            identity,
            key,
            hash,
        })
    }

    /// Bytes of the longest key.
    pub(super) const MAX_KEY: usize = 48;

    /// Of a key that was derived already, with its identity; none if the two do not fit.
    pub(super) fn derived(identity: String, key: Zeroizing<Vec<u8>>) -> Option<Self> {
        let hash = match identity.get(6..8)? {
            "01" => Hash::Sha256,
            "02" => Hash::Sha384,
            _ => return None,
        };
        (key.len() == hash.digest_len()).then_some(Self {
            identity,
            key,
            hash,
        })
    }

    /// The identity, which is no secret.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// The cipher suite that goes with the key, by OpenSSL's name.
    pub fn cipher_suite(&self) -> &'static str {
        match self.hash {
            Hash::Sha384 => "TLS_AES_256_GCM_SHA384",
            _ => "TLS_AES_128_GCM_SHA256",
        }
    }

    /// The suite's number (RFC 8446, section B.4).
    pub(super) fn cipher_suite_id(&self) -> [u8; 2] {
        match self.hash {
            Hash::Sha384 => [0x13, 0x02],
            _ => [0x13, 0x01],
        }
    }

    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }
}

/// HKDF-Expand-Label(HKDF-Extract(0, key), label, context, length of the digest).
struct Label {
    is_compat: bool,
}

impl Label {
    /// One block of HKDF (RFC 5869) suffices, as the output is as long as the digest. The argument of
    /// HKDF-Expand is HkdfLabel (RFC 8446, section 7.1).
    fn expand(
        &self,
        hash: Hash,
        key: &[u8],
        label: &str,
        context: &str,
    ) -> Result<Zeroizing<Vec<u8>>, ErrorStack> {
        let salt = [0; Hash::MAX_LEN];
        let pseudorandom = hash.hmac(&salt[..hash.digest_len()], &[key])?;
        let len = hash.digest_len() as u16;
        let label = format!("tls13 {label}");
        let (label, context) = (label.as_bytes(), context.as_bytes());
        match self.is_compat {
            true => hash.hmac(&pseudorandom, &[&len.to_le_bytes(), label, context, &[1]]),
            false => hash.hmac(
                &pseudorandom,
                &[
                    &len.to_be_bytes(),
                    &[label.len() as u8],
                    label,
                    &[context.len() as u8],
                    context,
                    &[1],
                ],
            ),
        }
    }
}
