//! Encryption: LUKS1 headers, the ciphers of sectors, and where keys come from.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`luks`] | the header, and from a passphrase to the key of the payload |
//! | [`cipher`], `hash` | sectors to and from ciphertext; digests and key derivation |
//! | [`storage`] | a storage whose bytes are the plaintext of another's |
//! | [`key`], `secret` | where passphrases come from, and the memory they are in |

pub mod cipher;
mod hash;
pub mod key;
pub mod luks;
mod secret;
pub mod storage;

#[cfg(test)]
mod tests;

pub use cipher::SectorCipher;
pub(in crate::block) use key::Key;
pub use key::{KeySource, KeySpec, Keys};
pub use luks::Unlocked;
pub use storage::CryptStorage;
