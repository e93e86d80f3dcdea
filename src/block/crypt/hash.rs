//! The hash functions that a LUKS header names, and what is made of them.

use pbkdf2::pbkdf2_hmac;
use sha2::Digest;
use zeroize::Zeroizing;

/// A hash function of `hash-spec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

/// Calls a generic function for the type of a hash.
macro_rules! for_hash {
    ($hash:expr, $call:ident ( $($arg:expr),* )) => {
        match $hash {
            Hash::Sha1 => $call::<sha1::Sha1>($($arg),*),
            Hash::Sha224 => $call::<sha2::Sha224>($($arg),*),
            Hash::Sha256 => $call::<sha2::Sha256>($($arg),*),
            Hash::Sha384 => $call::<sha2::Sha384>($($arg),*),
            Hash::Sha512 => $call::<sha2::Sha512>($($arg),*),
            Hash::Ripemd160 => $call::<ripemd::Ripemd160>($($arg),*),
        }
    };
}

impl Hash {
    /// The names in headers, for messages.
    pub(super) const KNOWN: &'static str = "sha1, sha224, sha256, sha384, sha512 and ripemd160";

    pub(super) fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "sha1" => Self::Sha1,
            "sha224" => Self::Sha224,
            "sha256" => Self::Sha256,
            "sha384" => Self::Sha384,
            "sha512" => Self::Sha512,
            "ripemd160" => Self::Ripemd160,
            _ => return None,
        })
    }

    /// Bytes of a digest.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The digest of `parts`, one behind the other.
    pub(super) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        for_hash!(self, digest(parts))
    }

    /// PBKDF2 with HMAC (RFC 8018, section 5.2).
    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        for_hash!(self, pbkdf2_hmac(password, salt, iterations, key));
    }

    /// Calls of the hash that [`Hash::pbkdf2`] makes for each iteration, to bound its time.
    pub(super) fn blocks(self, key_len: usize) -> u64 {
        key_len.div_ceil(self.len()) as u64
    }
}

fn digest<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let mut hash = D::new();
    parts.iter().for_each(|part| hash.update(part));
    Zeroizing::new(hash.finalize().to_vec())
}
