//! The hash functions that secrets, DH-HMAC-CHAP and TLS PSKs name by a number, and HMAC with them.

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use zeroize::{Zeroize, Zeroizing};

/// A hash function (NVM Express Base Specification 2.1, section 8.3.5.5.2: HashID).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl Hash {
    /// All of them, the first one preferred.
    pub const ALL: [Self; 3] = [Self::Sha256, Self::Sha384, Self::Sha512];
    /// The longest digest, in bytes.
    pub const MAX_LEN: usize = 64;

    /// Its number, in messages and in the text of secrets.
    pub fn id(self) -> u8 {
        match self {
            Self::Sha256 => 1,
            Self::Sha384 => 2,
            Self::Sha512 => 3,
        }
    }

    /// The function of a number.
    pub fn by_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.id() == id)
    }

    /// Bytes of a digest.
    pub fn digest_len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// Its name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "SHA-256",
            Self::Sha384 => "SHA-384",
            Self::Sha512 => "SHA-512",
        }
    }

    fn openssl(self) -> MessageDigest {
        match self {
            Self::Sha256 => MessageDigest::sha256(),
            Self::Sha384 => MessageDigest::sha384(),
            Self::Sha512 => MessageDigest::sha512(),
        }
    }

    /// The digest of `data`.
    ///
    /// # Errors
    /// OpenSSL does not provide the function (a restricted configuration), or memory is short.
    pub(in crate::block::nvme_tcp) fn digest(
        self,
        data: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, ErrorStack> {
        let mut digest = openssl::hash::hash(self.openssl(), data)?;
        let result = Zeroizing::new(digest.to_vec());
        digest.zeroize();
        Ok(result)
    }

    /// HMAC (RFC 2104) of `parts`, one behind the other.
    ///
    /// # Errors
    /// As [`Hash::digest`].
    pub(in crate::block::nvme_tcp) fn hmac(
        self,
        key: &[u8],
        parts: &[&[u8]],
    ) -> Result<Zeroizing<Vec<u8>>, ErrorStack> {
        let key = PKey::hmac(key)?;
        let mut signer = Signer::new(self.openssl(), &key)?;
        for part in parts {
            signer.update(part)?;
        }
        Ok(Zeroizing::new(signer.sign_to_vec()?))
    }
}
