//! Secrets in their text form, `DHHC-1:hh:base64:` (base specification, section 8.13.5.8).

use super::Hash;

/// A secret, and the hash that it is transformed with before its use; none: it is used as it is.
pub(super) struct Secret {
    key: Vec<u8>,
    transform: Option<Hash>,
}

impl Secret {
    /// Reads the text form.
    pub fn parse(text: &str) -> Option<Self> {
        let (key, hash) = interchange(text, "DHHC-1:")?;
        let transform = if hash == 0 {
            None
        } else {
            Some(Hash::from_id(hash)?)
        };
        Some(Self { key, transform })
    }

    /// The key of an entity: the secret, or its HMAC of the NQN and a fixed text.
    pub fn key_for(&self, nqn: &str) -> Vec<u8> {
        match self.transform {
            None => self.key.clone(),
            Some(hash) => hash.hmac(&self.key, &[nqn.as_bytes(), b"NVMe-over-Fabrics"]),
        }
    }
}

/// A key in the text form `PREFIXhh:base64:`, and hh. The key is followed by its CRC-32, little-endian.
pub(crate) fn interchange(text: &str, prefix: &str) -> Option<(Vec<u8>, u8)> {
    let (hash, rest) = text.trim().strip_prefix(prefix)?.split_once(':')?;
    let bytes = decode_base64(rest.strip_suffix(':')?)?;
    if ![36, 52, 68].contains(&bytes.len()) {
        return None;
    }
    let (key, crc) = bytes.split_at(bytes.len() - 4);
    (crc32(key).to_le_bytes() == crc).then_some((key.to_vec(), hash.parse().ok()?))
}

/// CRC-32 as in gzip (RFC 1952), bit by bit.
fn crc32(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

/// Base64 with padding (RFC 4648, section 4).
pub(crate) fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let body = text.trim_end_matches('=');
    if text.len() % 4 != 0 || text.len() - body.len() > 2 {
        return None;
    }
    let (mut bytes, mut bits, mut held) = (Vec::new(), 0u32, 0u32);
    for c in body.bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        held = held << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
            held &= (1 << bits) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_those_of_the_rfcs() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(decode_base64("Zm9vYmE=").unwrap(), b"fooba");
        assert_eq!(decode_base64("Zm9vYg==").unwrap(), b"foob");
        assert_eq!(decode_base64("Zm9vYg="), None);
    }

    #[test]
    fn a_secret_with_a_wrong_checksum_is_refused() {
        // 32 zero bytes and their CRC-32, 190A55ADh.
        let good = "DHHC-1:00:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACtVQoZ:";
        assert_eq!(Secret::parse(good).unwrap().key_for("x"), [0; 32]);
        assert!(Secret::parse(&good.replace("tVQ", "tVR")).is_none());
        assert!(Secret::parse(&good.replace(":00:", ":04:")).is_none());
        let transformed = Secret::parse(&good.replace(":00:", ":02:")).unwrap();
        assert_eq!(transformed.key_for("nqn").len(), 48);
    }
}
