//! The LUKS1 header, and from a passphrase to the key of the payload.
//!
//! "LUKS On-Disk Format Specification" 1.2.3; sections are cited by its figures and names. The header is
//! untrusted input: everything is bounded before it is used, also the time that key derivation takes.

use std::fmt::{self, Display};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use zeroize::Zeroizing;

use super::cipher::{CipherSpec, SECTOR, SectorCipher};
use super::hash::Hash;
use super::key::Keys;
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

/// Bytes of the header itself ("phdr", figure 1).
pub const HEADER: usize = 592;
const MAGIC: &[u8] = b"LUKS\xba\xbe";
const SLOTS: usize = 8;
const SLOT_BYTES: usize = 48;
const SALT: usize = 32;
const DIGEST: usize = 20;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
/// "LUKS_STRIPES": what every implementation writes, and QEMU demands.
const STRIPES: usize = 4000;
/// Iterations of one derivation at most. cryptsetup and QEMU take as many as fit into two seconds, some
/// millions; this takes about half a minute.
const MAX_ITERATIONS: u32 = 1 << 26;
/// Hash calls for all key slots together at most: a minute or two.
const MAX_WORK: u64 = 1 << 28;

/// Where the fields are.
mod field {
    pub(super) const VERSION: usize = 6;
    pub(super) const CIPHER_NAME: usize = 8;
    pub(super) const CIPHER_MODE: usize = 40;
    pub(super) const HASH_SPEC: usize = 72;
    pub(super) const PAYLOAD_OFFSET: usize = 104;
    pub(super) const KEY_BYTES: usize = 108;
    pub(super) const MK_DIGEST: usize = 112;
    pub(super) const MK_DIGEST_SALT: usize = 132;
    pub(super) const MK_DIGEST_ITER: usize = 164;
    pub(super) const KEY_SLOTS: usize = 208;
}

/// The part of a file that a header and its key material are in, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where the header begins. Offsets in it count from here.
    pub offset: u64,
    /// How far the header and the key material may reach.
    pub len: u64,
}

/// A header, checked. `Debug` leaves its salts and digests out.
#[derive(Clone)]
pub struct Header {
    raw: Box<[u8; HEADER]>,
    spec: CipherSpec,
    hash: Hash,
    payload: u64,
    slots: Vec<Slot>,
}

/// An enabled key slot.
#[derive(Clone, Debug)]
struct Slot {
    number: usize,
    iterations: u32,
    /// The key material, from the header's beginning.
    material: Range<u64>,
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("spec", &self.spec)
            .field("hash", &self.hash)
            .field("payload", &self.payload)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    bytes.map_or(0, u32::from_be_bytes)
}

async fn read_raw(io: &Io, storage: &Storage, place: Place) -> Result<[u8; HEADER]> {
    let mut buf = io.buf(HEADER);
    storage.read(io, place.offset, buf.sg()).await?;
    let mut raw = [0; HEADER];
    raw.copy_from_slice(&buf);
    Ok(raw)
}

impl Header {
    /// Reads and checks the header of a LUKS file.
    ///
    /// # Errors
    /// Those of reading, and of [`Header::parse`].
    pub async fn read(io: &Io, storage: &Storage) -> Result<Self> {
        let place = Place {
            offset: 0,
            len: storage.len(),
        };
        let raw = read_raw(io, storage, place).await?;
        Self::parse(storage.path(), &raw, place)
    }

    /// Checks `raw`, the first bytes at `place`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`] for what is no LUKS1 header or contradicts the specification,
    /// [`ErrorKind::Unsupported`] for ciphers, hashes and versions that this program does not have.
    pub fn parse(path: &Path, raw: &[u8; HEADER], place: Place) -> Result<Self> {
        let refuse = |kind, at: usize, what: &dyn Display| {
            Err(Error::image(kind, path, place.offset + at as u64, what))
        };
        let bad = |at, what: &dyn Display| refuse(ErrorKind::InvalidImage, at, what);
        let unsupported = |at, what: &dyn Display| {
            let what = format!("the LUKS header asks for {what}");
            refuse(ErrorKind::Unsupported, at, &what)
        };
        if !raw.starts_with(MAGIC) {
            return bad(0, &"no LUKS header is there (no LUKS\\xba\\xbe magic)");
        }
        let version = u16::from_be_bytes([raw[field::VERSION], raw[field::VERSION + 1]]);
        if version != 1 {
            let what = format!(
                "LUKS version {version}; version 1 is supported, which `qemu-img create -f luks` and \
                 `cryptsetup luksFormat --type luks1` make"
            );
            return refuse(ErrorKind::Unsupported, field::VERSION, &what);
        }
        let text = |at: usize| {
            let field = &raw[at..at + 32];
            let end = field.iter().position(|b| *b == 0)?;
            let text = std::str::from_utf8(&field[..end]).ok()?;
            text.bytes().all(|b| b.is_ascii_graphic()).then_some(text)
        };
        let (Some(name), Some(mode), Some(hash_name)) = (
            text(field::CIPHER_NAME),
            text(field::CIPHER_MODE),
            text(field::HASH_SPEC),
        ) else {
            return bad(
                field::CIPHER_NAME,
                &"the names of cipher and hash are not text",
            );
        };
        let spec = match CipherSpec::parse(name, mode, u32_at(raw, field::KEY_BYTES)) {
            Ok(spec) => spec,
            Err(what) => return unsupported(field::CIPHER_NAME, &what),
        };
        let Some(hash) = Hash::by_name(hash_name) else {
            let what = format!("the hash {hash_name:?}; {} are supported", Hash::KNOWN);
            return unsupported(field::HASH_SPEC, &what);
        };
        let sector = SECTOR as u64;
        let payload = u64::from(u32_at(raw, field::PAYLOAD_OFFSET)) * sector;
        if payload < HEADER as u64 {
            let what = format!("a payload at {payload:#x}, in the header (or in another file)");
            return bad(field::PAYLOAD_OFFSET, &what);
        }
        let digest_iterations = u32_at(raw, field::MK_DIGEST_ITER);
        let mut work = u64::from(digest_iterations);
        if !(1..=MAX_ITERATIONS).contains(&digest_iterations) {
            let what = format!("{digest_iterations} iterations for the digest of the master key");
            return bad(field::MK_DIGEST_ITER, &what);
        }
        let material_len = (spec.key_len() * STRIPES) as u64;
        let limit = payload.min(place.len);
        let mut slots: Vec<Slot> = Vec::with_capacity(SLOTS);
        for number in 0..SLOTS {
            let at = field::KEY_SLOTS + number * SLOT_BYTES;
            let slot_bad = |what: &dyn Display| bad(at, &format!("key slot {number}: {what}"));
            match u32_at(raw, at) {
                ENABLED => {}
                DISABLED => continue,
                state => return slot_bad(&format!("its state is {state:#x}")),
            }
            let iterations = u32_at(raw, at + 4);
            if !(1..=MAX_ITERATIONS).contains(&iterations) {
                return slot_bad(&format!(
                    "{iterations} iterations; 1 to {MAX_ITERATIONS} are accepted"
                ));
            }
            work += u64::from(iterations) * hash.blocks(spec.key_len());
            let stripes = u32_at(raw, at + 44);
            if stripes != STRIPES as u32 {
                return slot_bad(&format!("{stripes} stripes instead of {STRIPES}"));
            }
            let start = u64::from(u32_at(raw, at + 40)) * sector;
            let material = start..start + material_len;
            if start < HEADER as u64 || material.end > limit {
                return slot_bad(&format!(
                    "its key material, {material_len} bytes at {start:#x}, is not between the header \
                     and {limit:#x}"
                ));
            }
            let overlaps = |other: &Slot| {
                material.start < other.material.end && other.material.start < material.end
            };
            if slots.iter().any(overlaps) {
                return slot_bad(&"its key material overlaps another slot's");
            }
            slots.push(Slot {
                number,
                iterations,
                material,
            });
        }
        if slots.is_empty() {
            return bad(
                field::KEY_SLOTS,
                &"no key slot is enabled: nothing can open it",
            );
        }
        if work > MAX_WORK {
            let what = format!(
                "its key slots ask for {work} rounds of hashing; {MAX_WORK} are accepted \
                 (`cryptsetup luksChangeKey --pbkdf-force-iterations N` makes it fewer)"
            );
            return bad(field::KEY_SLOTS, &what);
        }
        Ok(Self {
            raw: Box::new(*raw),
            spec,
            hash,
            payload,
            slots,
        })
    }

    /// Where the payload begins, in bytes from the header's beginning. Means nothing in a qcow2 image.
    pub fn payload(&self) -> u64 {
        self.payload
    }

    /// The payload's cipher and key, opened by the first key slot that `passphrase` fits. None: it fits
    /// none. Takes seconds: not for a worker.
    ///
    /// # Errors
    /// Those of reading the key material.
    pub async fn unlock(
        &self,
        io: &Io,
        storage: &Storage,
        place: Place,
        passphrase: &[u8],
    ) -> Result<Option<SectorCipher>> {
        let key_len = self.spec.key_len();
        for slot in &self.slots {
            let salt = field::KEY_SLOTS + slot.number * SLOT_BYTES + 8;
            let mut slot_key = Zeroizing::new(vec![0; key_len]);
            let (raw, salt) = (&self.raw[..], salt..salt + SALT);
            self.hash
                .pbkdf2(passphrase, &raw[salt], slot.iterations, &mut slot_key);
            let Some(cipher) = SectorCipher::new(self.spec, &slot_key) else {
                continue;
            };
            let len = (slot.material.end - slot.material.start) as usize;
            // Whole sectors: a key of 192 bits ends in the middle of one.
            let mut split = Zeroizing::new(vec![0; len.next_multiple_of(SECTOR)]);
            let mut buf = io.buf(split.len());
            let at = place.offset + slot.material.start;
            storage.read(io, at, buf.sg()).await?;
            split.copy_from_slice(&buf);
            cipher.decrypt(0, &mut split);
            let key = merge(&split[..len], key_len, self.hash);
            if self.is_master_key(&key) {
                return Ok(SectorCipher::new(self.spec, &key));
            }
        }
        Ok(None)
    }

    fn is_master_key(&self, key: &[u8]) -> bool {
        let salt = &self.raw[field::MK_DIGEST_SALT..field::MK_DIGEST_SALT + SALT];
        let iterations = u32_at(&self.raw[..], field::MK_DIGEST_ITER);
        let mut digest = [0; DIGEST];
        self.hash.pbkdf2(key, salt, iterations, &mut digest);
        digest == self.raw[field::MK_DIGEST..field::MK_DIGEST + DIGEST]
    }
}

/// The anti-forensic splitter's way back ("AFmerge"): `split` has [`STRIPES`] pieces of `len` bytes.
fn merge(split: &[u8], len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0u8; len]);
    let mut pieces = split.chunks_exact(len).peekable();
    while let Some(piece) = pieces.next() {
        key.iter_mut().zip(piece).for_each(|(to, with)| *to ^= with);
        if pieces.peek().is_some() {
            for (number, part) in (0u32..).zip(key.chunks_mut(hash.len())) {
                let diffused = hash.digest(&[&number.to_be_bytes(), part]);
                part.copy_from_slice(&diffused[..part.len()]);
            }
        }
    }
    key
}

/// A header that was opened with its key. It is kept over activations: while the header stays as it is,
/// the seconds of key derivation are spent once.
#[derive(Debug)]
pub struct Unlocked {
    header: Header,
    place: Place,
    cipher: SectorCipher,
}

impl Unlocked {
    /// Reads the header at `place` and opens it with the image's key, or takes `known` if it is what was
    /// opened before. Takes seconds: not for a worker.
    ///
    /// # Errors
    /// Those of [`Header::parse`]; [`ErrorKind::NotAllowed`] without a key, and with a wrong one.
    pub async fn open(
        io: &Io,
        storage: &Storage,
        place: Place,
        keys: &Keys,
        known: Option<Arc<Self>>,
    ) -> Result<Arc<Self>> {
        let path = storage.path();
        let raw = read_raw(io, storage, place).await?;
        if let Some(known) = known.filter(|known| *known.header.raw == raw && known.place == place)
        {
            return Ok(known);
        }
        let header = Header::parse(path, &raw, place)?;
        let refuse = |what: String| Err(Error::image(ErrorKind::NotAllowed, path, None, what));
        let Some(key) = keys.find(storage) else {
            return refuse(format!(
                "is encrypted, and no key was given for it; name one with key-file, key-fd or \
                 key-keyring (for this image alone: image-key={}=file:PATH)",
                path.display()
            ));
        };
        let passphrase = key.secret();
        match header.unlock(io, storage, place, passphrase).await? {
            Some(cipher) => Ok(Arc::new(Self {
                header,
                place,
                cipher,
            })),
            None => refuse(format!(
                "the key from {} opens none of its {} key slots; name the right one with key-file, key-fd, \
                 key-keyring or image-key{}",
                key.origin(),
                header.slots.len(),
                match passphrase.ends_with(b"\n") {
                    true => " (this one ends with a newline, which counts: `printf` writes none)",
                    false => "",
                }
            )),
        }
    }

    /// Where the payload begins, in bytes from the header's beginning. Means nothing in a qcow2 image.
    pub fn payload(&self) -> u64 {
        self.header.payload()
    }

    /// The payload's cipher.
    pub fn cipher(&self) -> &SectorCipher {
        &self.cipher
    }
}
