//! From a configured PSK and an identity to the key that TLS has (transport specification, section 3.6.1.3).

use super::TlsOptions;
use crate::auth::{Hash, secret};

/// A configured PSK, and the hash that makes a retained PSK of it; none: it is one already.
pub(super) struct Configured {
    key: Vec<u8>,
    transform: Option<Hash>,
    compat: bool,
    /// How identities that are known begin.
    known: String,
}

/// What an identity says.
pub(super) struct Identity<'a> {
    /// The hash of the cipher suite.
    pub hash: Hash,
    pub host_nqn: &'a str,
    pub subsystem_nqn: &'a str,
    /// Version 1: the digest of the PSK.
    digest: Option<&'a str>,
    text: &'a str,
}

impl<'a> Identity<'a> {
    /// `NVMe0R01 HOSTNQN SUBNQN` or `NVMe1R01 HOSTNQN SUBNQN DIGEST`; 02 for SHA-384.
    pub fn parse(text: &'a str) -> Option<Self> {
        let mut words = text.split(' ');
        let (version, hash) = words.next()?.strip_prefix("NVMe")?.split_once('R')?;
        let hash = match hash {
            "01" => Hash::Sha256,
            "02" => Hash::Sha384,
            _ => return None,
        };
        let (host_nqn, subsystem_nqn, digest) = (words.next()?, words.next()?, words.next());
        let known = matches!((version, digest), ("0", None) | ("1", Some(_)));
        (known && words.next().is_none()).then_some(Self {
            hash,
            host_nqn,
            subsystem_nqn,
            digest,
            text,
        })
    }
}

impl Configured {
    /// Reads the interchange form.
    pub fn parse(options: &TlsOptions) -> Option<Self> {
        let (key, hash) = secret::interchange(&options.key, "NVMeTLSkey-1:")?;
        let transform = match hash {
            0 => None,
            1 => Some(Hash::Sha256),
            2 => Some(Hash::Sha384),
            _ => return None,
        };
        Some(Self {
            key,
            transform,
            compat: options.compat,
            known: options.known.clone(),
        })
    }

    /// The key of an identity; none if it is not known, or its digest is that of another key.
    pub fn key_for(&self, identity: &Identity<'_>) -> Option<Vec<u8>> {
        if !identity.text.starts_with(&self.known) {
            return None;
        }
        let retained = match self.transform {
            None => self.key.clone(),
            Some(hash) => self.expand(
                hash,
                &self.key,
                b"HostNQN",
                identity.host_nqn.as_bytes(),
                self.key.len(),
            ),
        };
        let hash = identity.hash;
        let context = match identity.digest {
            None => identity.text.to_owned(),
            Some(told) => {
                let names = format!(
                    "{} {} NVMe-over-Fabrics",
                    identity.host_nqn, identity.subsystem_nqn
                );
                let digest = hash.hmac(&retained, &[names.as_bytes()]);
                if secret::decode_base64(told)? != digest {
                    return None;
                }
                format!("{:02} {told}", hash as u8)
            }
        };
        Some(self.expand(
            hash,
            &retained,
            b"nvme-tls-psk",
            context.as_bytes(),
            hash.len(),
        ))
    }

    /// HKDF-Extract with zeros as the salt (RFC 5869), then HKDF-Expand-Label (RFC 8446, section 7.1).
    fn expand(&self, hash: Hash, key: &[u8], label: &[u8], context: &[u8], len: usize) -> Vec<u8> {
        let prk = hash.hmac(&vec![0; hash.len()], &[key]);
        let mut info = Vec::new();
        if self.compat {
            info.extend_from_slice(&(len as u16).to_le_bytes());
            info.extend_from_slice(&[b"tls13 ", label, context].concat());
        } else {
            info.extend_from_slice(&(len as u16).to_be_bytes());
            info.push(6 + label.len() as u8);
            info.extend_from_slice(&[b"tls13 ", label].concat());
            info.push(context.len() as u8);
            info.extend_from_slice(context);
        }
        let (mut out, mut block) = (Vec::new(), Vec::new());
        let mut n = 1u8;
        while out.len() < len {
            block = hash.hmac(&prk, &[&block, &info, &[n]]);
            out.extend_from_slice(&block);
            n = n.wrapping_add(1);
        }
        out.truncate(len);
        out
    }
}
