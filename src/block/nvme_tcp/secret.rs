//! The secrets of in-band authentication and of TLS: their text, and where they come from.
//!
//! Both are `NAME:XX:BASE64:` with the key and its CRC-32 in the base64. What is said of a wrong one never
//! quotes it, and `Debug` shows nothing of it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;

use zeroize::{Zeroize, Zeroizing};

use super::auth::Hash;
use crate::block::crypt::{Key, KeySource};
use crate::block::error::{Error, ErrorKind, Result};

/// Bytes of a key at most.
const MAX_KEY: usize = 64;
/// Bytes of the CRC behind it.
const CRC: usize = 4;

/// Why a text is no secret. It quotes nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Another beginning.
    #[error("it does not begin with {0:?}")]
    Name(&'static str),
    /// The two digits are something else.
    #[error("the two digits behind {0:?} must be one of {1}")]
    Transformation(&'static str, &'static str),
    /// The last colon is missing, or is not the last.
    #[error("the base64 part must end in one \":\", and nothing may follow")]
    End,
    /// No base64 (RFC 4648, section 4, with padding).
    #[error("the part between the last two colons is no base64")]
    Base64,
    /// The key has another length than its transformation asks for, or than any key has.
    #[error("the key has {got} bytes, where {want} are asked for")]
    Length {
        /// Bytes of it, without the CRC.
        got: usize,
        /// What is asked for.
        want: &'static str,
    },
    /// Not the key that was generated.
    #[error("its CRC-32 does not match: it is cut, or mistyped")]
    Crc,
}

/// The bytes of a key. They are wiped when it goes.
#[derive(Clone)]
struct Bytes {
    bytes: [u8; MAX_KEY],
    len: usize,
}

impl Bytes {
    fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

/// A form of secrets: what they begin with, and what may follow.
struct Form {
    name: &'static str,
    /// For each value of the two digits, the lengths of keys.
    lengths: &'static [(&'static [usize], &'static str)],
    digits: &'static str,
}

impl Form {
    /// The value of the two digits, and the key.
    fn parse(&self, text: &[u8]) -> std::result::Result<(u8, Bytes), SecretError> {
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let rest = text
            .strip_prefix(self.name.as_bytes())
            .ok_or(SecretError::Name(self.name))?;
        let wrong = SecretError::Transformation(self.name, self.digits);
        let [b'0', digit @ b'0'..=b'9', b':', rest @ ..] = rest else {
            return Err(wrong);
        };
        let value = digit - b'0';
        let (lengths, want) = self.lengths.get(usize::from(value)).ok_or(wrong)?;
        let Some((b':', base64)) = rest.split_last() else {
            return Err(SecretError::End);
        };
        if base64.contains(&b':') {
            return Err(SecretError::End);
        }
        let mut decoded = Zeroizing::new([0; MAX_KEY + CRC]);
        let len = decode_base64(base64, &mut decoded[..]).ok_or(SecretError::Base64)?;
        let got = len.saturating_sub(CRC);
        if !lengths.contains(&got) {
            return Err(SecretError::Length { got, want });
        }
        let (key, crc) = decoded[..len].split_at(got);
        let mut sum = flate2::Crc::new();
        sum.update(key);
        if crc != sum.sum().to_le_bytes() {
            return Err(SecretError::Crc);
        }
        let mut bytes = Bytes {
            bytes: [0; MAX_KEY],
            len: got,
        };
        bytes.bytes[..got].copy_from_slice(key);
        Ok((value, bytes))
    }
}

/// How many bytes `text` is in base64 (RFC 4648, section 4), which go to `to`; none if it is no base64, or
/// if they are too many. More than `to` has room for counts as bytes, so that a caller can tell the length.
fn decode_base64(text: &[u8], to: &mut [u8]) -> Option<usize> {
    if text.is_empty() || text.len() % 4 != 0 {
        return None;
    }
    let padding = text.iter().rev().take_while(|c| **c == b'=').count();
    if padding > 2 {
        return None;
    }
    let mut len = 0;
    let mut bits = Zeroizing::new(0u32);
    let mut filled = 0;
    for c in &text[..text.len() - padding] {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        *bits = *bits << 6 | u32::from(six);
        filled += 6;
        if filled >= 8 {
            filled -= 8;
            if let Some(byte) = to.get_mut(len) {
                *byte = (*bits >> filled) as u8;
            }
            *bits &= (1 << filled) - 1;
            len += 1;
        }
    }
    // The bits that are left over belong to no byte; a generated key has none there.
    (*bits == 0).then_some(len)
}

/// What a secret was read from, if it was read.
#[derive(Debug, Default)]
struct Origin(Option<Key>);

impl Origin {
    fn descriptor(&self) -> Option<io::Result<(RawFd, File)>> {
        self.0.as_ref()?.descriptor()
    }
}

fn load<T>(
    source: &KeySource,
    what: &str,
    command: &str,
    parse: impl FnOnce(&[u8]) -> std::result::Result<T, SecretError>,
) -> Result<(T, Origin)> {
    let key = Key::read(source)?;
    match parse(key.secret()) {
        Ok(secret) => Ok((secret, Origin(Some(key)))),
        Err(error) => {
            let message = format!("this is no {what}: {error}; `{command}` makes one");
            Err(Error::image(
                ErrorKind::InvalidImage,
                key.origin(),
                None,
                message,
            ))
        }
    }
}

/// The texts of DH-HMAC-CHAP secrets (NVM Express Base Specification 2.1, section 8.3.5.5.8).
const DHCHAP: Form = Form {
    name: "DHHC-1:",
    lengths: &[
        (&[32, 48, 64], "32, 48 or 64"),
        (&[32], "32 (SHA-256)"),
        (&[48], "48 (SHA-384)"),
        (&[64], "64 (SHA-512)"),
    ],
    digits: "00, 01, 02 and 03",
};

/// The texts of configured PSKs (NVM Express TCP Transport Specification 1.1, section 3.6.1.5: PSK
/// interchange format).
const TLS: Form = Form {
    name: "NVMeTLSkey-1:",
    lengths: &[
        (&[32, 48], "32 or 48"),
        (&[32], "32 (SHA-256)"),
        (&[48], "48 (SHA-384)"),
    ],
    digits: "00, 01 and 02",
};

/// The secret of a host, or of a subsystem, for DH-HMAC-CHAP: `DHHC-1:XX:BASE64:`.
pub struct DhChapSecret {
    key: Bytes,
    transformation: Option<Hash>,
    origin: Origin,
}

impl DhChapSecret {
    /// From its text; one newline at the end may be there.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> std::result::Result<Self, SecretError> {
        let (id, key) = DHCHAP.parse(text)?;
        Ok(Self {
            key,
            transformation: Hash::by_id(id),
            origin: Origin::default(),
        })
    }

    /// Reads it from where it is. A file that others may read is warned of.
    ///
    /// # Errors
    /// Those of reading; [`ErrorKind::InvalidImage`] for something else than a secret.
    pub fn load(source: &KeySource) -> Result<Self> {
        let (secret, origin) = load(
            source,
            "DH-HMAC-CHAP secret",
            "nvme gen-dhchap-key",
            Self::parse,
        )?;
        Ok(Self { origin, ..secret })
    }

    /// The key of responses by the entity of that NQN (NVM Express Base Specification 2.1, section
    /// 8.3.5.5.8: `HMAC(key, NQN || "NVMe-over-Fabrics")`, or the key itself).
    pub(super) fn transformed(
        &self,
        nqn: &str,
    ) -> std::result::Result<Zeroizing<Vec<u8>>, openssl::error::ErrorStack> {
        match self.transformation {
            None => Ok(Zeroizing::new(self.key.get().to_vec())),
            Some(hash) => hash.hmac(self.key.get(), &[nqn.as_bytes(), b"NVMe-over-Fabrics"]),
        }
    }

    /// If it was read from a descriptor: that one's number, and a pipe with the text, for a successor.
    pub fn descriptor(&self) -> Option<io::Result<(RawFd, File)>> {
        self.origin.descriptor()
    }
}

impl fmt::Debug for DhChapSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// The configured PSK of a host and a subsystem, for TLS: `NVMeTLSkey-1:XX:BASE64:`.
pub struct TlsSecret {
    key: Bytes,
    retained: Option<Hash>,
    origin: Origin,
}

impl TlsSecret {
    /// From its text; one newline at the end may be there.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &[u8]) -> std::result::Result<Self, SecretError> {
        let (id, key) = TLS.parse(text)?;
        Ok(Self {
            key,
            retained: Hash::by_id(id),
            origin: Origin::default(),
        })
    }

    /// Reads it from where it is. A file that others may read is warned of.
    ///
    /// # Errors
    /// As [`DhChapSecret::load`].
    pub fn load(source: &KeySource) -> Result<Self> {
        let (secret, origin) = load(
            source,
            "TLS pre-shared key",
            "nvme gen-tls-key",
            Self::parse,
        )?;
        Ok(Self { origin, ..secret })
    }

    /// The bytes of the configured PSK: 32 or 48.
    pub(super) fn key(&self) -> &[u8] {
        self.key.get()
    }

    /// By which hash it becomes the retained PSK; none: it is that already.
    pub(super) fn retained_by(&self) -> Option<Hash> {
        self.retained
    }

    /// As [`DhChapSecret::descriptor`].
    pub fn descriptor(&self) -> Option<io::Result<(RawFd, File)>> {
        self.origin.descriptor()
    }
}

impl fmt::Debug for TlsSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}
