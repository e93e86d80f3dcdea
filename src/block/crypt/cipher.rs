//! The ciphers of sectors: what `cipher-name` and `cipher-mode` of a LUKS header stand for.
//!
//! The modes are written out here, on the blocks of several sectors at a time, because the speed of AES
//! instructions lies in the blocks that are under way at once. Measured with AES-256-XTS on 64 KiB of
//! 512-byte sectors, one thread: the crate `xts-mode` 0.22 GiB/s, this 10 to 15 times as much, and the
//! AES instructions alone 2 to 3 times as much as this.

use std::fmt;

use aes::cipher::array::{Array, ArraySize};
use aes::cipher::consts::{U8, U16};
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use serpent::Serpent;
use twofish::Twofish;

use super::hash::Hash;

/// Bytes of a sector: the unit of encryption.
pub const SECTOR: usize = 512;
/// Sectors whose blocks are under way at once.
const GROUP: usize = 8;
/// Largest block of a cipher, and the bytes of an IV.
const BLOCK: usize = 16;

/// A block cipher, without the size of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Aes,
    Cast5,
    Serpent,
    Twofish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Xts,
    Cbc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IvGen {
    /// The sector's number, 32 bits.
    Plain,
    /// The sector's number, 64 bits.
    Plain64,
    /// The sector's number, encrypted with the hash of the key.
    Essiv(Hash),
}

/// A cipher, its mode, IVs and key size: everything but the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherSpec {
    algorithm: Algorithm,
    mode: Mode,
    iv: IvGen,
    /// Bytes; in XTS mode those of both keys.
    key_len: usize,
}

impl CipherSpec {
    /// The cipher of a header's fields: `aes`, `xts-plain64`, 64.
    ///
    /// # Errors
    /// What is not supported, by name, or makes no sense.
    pub fn parse(name: &str, mode: &str, key_len: u32) -> Result<Self, String> {
        let algorithm = match name {
            "aes" => Algorithm::Aes,
            "cast5" => Algorithm::Cast5,
            "serpent" => Algorithm::Serpent,
            "twofish" => Algorithm::Twofish,
            _ => {
                return Err(format!(
                    "the cipher {name:?}; aes, serpent, twofish and cast5 are supported"
                ));
            }
        };
        let (mode, iv) = mode.split_once('-').unwrap_or((mode, ""));
        let mode = match mode {
            "xts" => Mode::Xts,
            "cbc" => Mode::Cbc,
            _ => {
                return Err(format!(
                    "the cipher mode {mode:?}; xts and cbc are supported"
                ));
            }
        };
        let iv = match (iv, iv.strip_prefix("essiv:")) {
            ("plain", _) => IvGen::Plain,
            ("plain64", _) => IvGen::Plain64,
            (_, Some(hash)) => match Hash::by_name(hash) {
                Some(hash) => IvGen::Essiv(hash),
                None => return Err(format!("essiv with the hash {hash:?}; sha256 is supported")),
            },
            _ => {
                return Err(format!(
                    "the IV generator {iv:?}; plain, plain64 and essiv are supported"
                ));
            }
        };
        let spec = Self {
            algorithm,
            mode,
            iv,
            key_len: key_len as usize,
        };
        let one = match mode {
            Mode::Xts => spec.key_len / 2,
            Mode::Cbc => spec.key_len,
        };
        let sizes: &[usize] = match algorithm {
            Algorithm::Cast5 => &[16],
            _ => &[16, 24, 32],
        };
        if !sizes.contains(&one) || (mode == Mode::Xts && spec.key_len % 2 != 0) {
            return Err(format!(
                "{name} in {mode:?} mode with a key of {key_len} bytes"
            ));
        }
        if algorithm == Algorithm::Cast5 && (mode == Mode::Xts || matches!(iv, IvGen::Essiv(_))) {
            return Err("cast5, whose blocks have 64 bits, with xts or essiv".into());
        }
        match iv {
            // The hash of the key is a key again. As dm-crypt does, whatever the size of the first.
            IvGen::Essiv(hash) if !sizes.contains(&hash.len()) => Err(format!(
                "essiv with {hash:?}: no {name} key has {} bytes; sha256 is supported",
                hash.len()
            )),
            _ => Ok(spec),
        }
    }

    /// Bytes of the key; in XTS mode of both.
    pub fn key_len(&self) -> usize {
        self.key_len
    }
}

/// A cipher with its key, for whole sectors. Its key is wiped when it goes, and shown to nobody.
pub struct SectorCipher {
    spec: CipherSpec,
    sectors: Box<dyn Sectors>,
    essiv: Option<Box<dyn OneBlock>>,
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

impl SectorCipher {
    /// None if the key does not have the length that `spec` says.
    pub fn new(spec: CipherSpec, key: &[u8]) -> Option<Self> {
        if key.len() != spec.key_len {
            return None;
        }
        let sectors = match (spec.algorithm, spec.mode) {
            (Algorithm::Aes, Mode::Xts) => match key.len() {
                32 => xts::<Aes128>(key),
                48 => xts::<Aes192>(key),
                _ => xts::<Aes256>(key),
            },
            (Algorithm::Aes, Mode::Cbc) => match key.len() {
                16 => cbc::<Aes128, U16>(key),
                24 => cbc::<Aes192, U16>(key),
                _ => cbc::<Aes256, U16>(key),
            },
            (Algorithm::Serpent, Mode::Xts) => xts::<Serpent>(key),
            (Algorithm::Serpent, Mode::Cbc) => cbc::<Serpent, U16>(key),
            (Algorithm::Twofish, Mode::Xts) => xts::<Twofish>(key),
            (Algorithm::Twofish, Mode::Cbc) => cbc::<Twofish, U16>(key),
            (Algorithm::Cast5, Mode::Cbc) => cbc::<Cast5, U8>(key),
            (Algorithm::Cast5, Mode::Xts) => None,
        }?;
        let essiv = match spec.iv {
            IvGen::Essiv(hash) => Some(one_block(spec.algorithm, &hash.digest(&[key]))?),
            IvGen::Plain | IvGen::Plain64 => None,
        };
        Some(Self {
            spec,
            sectors,
            essiv,
        })
    }

    /// Encrypts whole sectors in place; `first` is the number of the first one, for the IV.
    pub fn encrypt(&self, first: u64, sectors: &mut [u8]) {
        self.each_group(first, sectors, true);
    }

    /// Decrypts whole sectors in place.
    pub fn decrypt(&self, first: u64, sectors: &mut [u8]) {
        self.each_group(first, sectors, false);
    }

    fn each_group(&self, mut first: u64, sectors: &mut [u8], encrypt: bool) {
        debug_assert_eq!(sectors.len() % SECTOR, 0, "only whole sectors have an IV");
        for group in sectors.chunks_mut(GROUP * SECTOR) {
            let mut ivs = [[0; BLOCK]; GROUP];
            let ivs = &mut ivs[..group.len() / SECTOR];
            for (number, iv) in (first..).zip(ivs.iter_mut()) {
                self.fill_iv(number, iv);
            }
            self.sectors.apply(ivs, group, encrypt);
            first += GROUP as u64;
        }
    }

    fn fill_iv(&self, sector: u64, iv: &mut [u8; BLOCK]) {
        let number = match self.spec.iv {
            IvGen::Plain => u64::from(sector as u32),
            IvGen::Plain64 | IvGen::Essiv(_) => sector,
        };
        iv[..8].copy_from_slice(&number.to_le_bytes());
        if let Some(essiv) = &self.essiv {
            essiv.encrypt_one(iv);
        }
    }
}

/// A mode with its keys.
trait Sectors: Send + Sync {
    /// Encrypts or decrypts at most [`GROUP`] sectors in place, an IV each.
    fn apply(&self, ivs: &[[u8; BLOCK]], sectors: &mut [u8], encrypt: bool);
}

/// XEX with two keys, IEEE 1619-2007: no ciphertext stealing, since sectors are whole blocks.
struct Xts<C> {
    data: C,
    tweak: C,
}

fn xts<C>(key: &[u8]) -> Option<Box<dyn Sectors>>
where
    C: KeyInit + Send + Sync + 'static,
    Xts<C>: Sectors,
{
    let (data, tweak) = key.split_at(key.len() / 2);
    Some(Box::new(Xts {
        data: C::new_from_slice(data).ok()?,
        tweak: C::new_from_slice(tweak).ok()?,
    }))
}

/// The tweak of the next block: times x in GF(2^128).
#[inline(always)]
fn doubled(tweak: u128) -> u128 {
    let carry = (tweak as i128 >> 127) as u128;
    (tweak << 1) ^ (carry & 0x87)
}

impl<C> Sectors for Xts<C>
where
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = U16> + Send + Sync,
{
    fn apply(&self, ivs: &[[u8; BLOCK]], sectors: &mut [u8], encrypt: bool) {
        const BLOCKS: usize = SECTOR / BLOCK;
        let mut first: [Array<u8, U16>; GROUP] = Default::default();
        for (to, iv) in first.iter_mut().zip(ivs) {
            to.0 = *iv;
        }
        self.tweak.encrypt_blocks(&mut first[..ivs.len()]);
        // Column by column: the doublings of one sector wait for each other, those of eight do not.
        let mut tweaks = [[0; BLOCKS]; GROUP];
        let mut column = first.map(|iv| u128::from_le_bytes(iv.0));
        for block in 0..BLOCKS {
            for (row, tweak) in tweaks.iter_mut().zip(&mut column) {
                row[block] = *tweak;
                *tweak = doubled(*tweak);
            }
        }
        let (blocks, _) = Array::<u8, U16>::slice_as_chunks_mut(sectors);
        mask(blocks, tweaks.as_flattened());
        match encrypt {
            true => self.data.encrypt_blocks(blocks),
            false => self.data.decrypt_blocks(blocks),
        }
        mask(blocks, tweaks.as_flattened());
    }
}

#[inline(always)]
fn mask(blocks: &mut [Array<u8, U16>], tweaks: &[u128]) {
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        block.0 = (u128::from_le_bytes(block.0) ^ tweak).to_le_bytes();
    }
}

/// Cipher block chaining, each sector by itself (NIST SP 800-38A, section 6.2).
struct Cbc<C>(C);

fn cbc<C, B>(key: &[u8]) -> Option<Box<dyn Sectors>>
where
    B: ArraySize,
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = B>,
    C: Send + Sync + 'static,
{
    Some(Box::new(Cbc(C::new_from_slice(key).ok()?)))
}

impl<C, B> Sectors for Cbc<C>
where
    B: ArraySize,
    C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser<BlockSize = B> + Send + Sync,
{
    fn apply(&self, ivs: &[[u8; BLOCK]], sectors: &mut [u8], encrypt: bool) {
        let size = B::USIZE;
        if encrypt {
            // A block waits for the one before it in its sector: the sectors go side by side.
            let mut chain: [Array<u8, B>; GROUP] = Default::default();
            for (to, iv) in chain.iter_mut().zip(ivs) {
                to.copy_from_slice(&iv[..size]);
            }
            let chain = &mut chain[..ivs.len()];
            for at in (0..SECTOR).step_by(size) {
                for (last, sector) in chain.iter_mut().zip(sectors.chunks_exact(SECTOR)) {
                    xor(last, &sector[at..at + size]);
                }
                self.0.encrypt_blocks(chain);
                for (last, sector) in chain.iter().zip(sectors.chunks_exact_mut(SECTOR)) {
                    sector[at..at + size].copy_from_slice(last);
                }
            }
            return;
        }
        let mut copy = [0; GROUP * SECTOR];
        let copy = &mut copy[..sectors.len()];
        copy.copy_from_slice(sectors);
        let (blocks, _) = Array::<u8, B>::slice_as_chunks_mut(sectors);
        self.0.decrypt_blocks(blocks);
        let both = sectors
            .chunks_exact_mut(SECTOR)
            .zip(copy.chunks_exact(SECTOR));
        for ((plain, cipher), iv) in both.zip(ivs) {
            xor(&mut plain[..size], &iv[..size]);
            xor(&mut plain[size..], &cipher[..SECTOR - size]);
        }
    }
}

#[inline(always)]
fn xor(to: &mut [u8], with: &[u8]) {
    to.iter_mut().zip(with).for_each(|(to, with)| *to ^= with);
}

/// The cipher of ESSIV.
trait OneBlock: Send + Sync {
    fn encrypt_one(&self, block: &mut [u8; BLOCK]);
}

impl<C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + Send + Sync> OneBlock for C {
    fn encrypt_one(&self, block: &mut [u8; BLOCK]) {
        let mut array = Array(*block);
        self.encrypt_block(&mut array);
        *block = array.0;
    }
}

/// The cipher of that family whose key has the length of the hash: not that of the payload's key.
fn one_block(algorithm: Algorithm, key: &[u8]) -> Option<Box<dyn OneBlock>> {
    Some(match (algorithm, key.len()) {
        (Algorithm::Aes, 16) => Box::new(Aes128::new_from_slice(key).ok()?),
        (Algorithm::Aes, 24) => Box::new(Aes192::new_from_slice(key).ok()?),
        (Algorithm::Aes, _) => Box::new(Aes256::new_from_slice(key).ok()?),
        (Algorithm::Serpent, _) => Box::new(Serpent::new_from_slice(key).ok()?),
        (Algorithm::Twofish, _) => Box::new(Twofish::new_from_slice(key).ok()?),
        (Algorithm::Cast5, _) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        let byte = |pair: &[u8]| {
            u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).expect("hexadecimal")
        };
        digits.chunks_exact(2).map(byte).collect()
    }

    fn cipher(name: &str, mode: &str, key: &[u8]) -> SectorCipher {
        let spec = CipherSpec::parse(name, mode, key.len() as u32).unwrap();
        SectorCipher::new(spec, key).unwrap()
    }

    /// Bytes 0 to 255, twice: the plaintext of the 512-byte vectors of IEEE 1619.
    fn counting() -> Vec<u8> {
        (0..SECTOR).map(|n| n as u8).collect()
    }

    #[test]
    fn xts_is_that_of_ieee_1619() {
        // Annex B, vector 4: AES-128, data unit 0.
        let key = hex("2718281828459045235360287471352631415926535897932384626433832795");
        let mut data = counting();
        cipher("aes", "xts-plain64", &key).encrypt(0, &mut data);
        let head = hex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c");
        assert_eq!(data[..32], head[..]);
        // Vector 10: AES-256, data unit 0xff.
        let key = hex(
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
        );
        let aes = cipher("aes", "xts-plain64", &key);
        let mut data = counting();
        aes.encrypt(0xff, &mut data);
        let head = hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b");
        let tail = hex("773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151");
        assert_eq!((&data[..32], &data[480..]), (&head[..], &tail[..]));
        aes.decrypt(0xff, &mut data);
        assert_eq!(data, counting());
    }

    #[test]
    fn cbc_is_that_of_nist() {
        // SP 800-38A, F.2.1 and F.2.5.
        let plain = hex(
            "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51\
             30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710",
        );
        let mut iv = [0; BLOCK];
        iv.iter_mut().zip(0..).for_each(|(to, n)| *to = n);
        for (key, want) in [
            (
                "2b7e151628aed2a6abf7158809cf4f3c",
                "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2\
                 73bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7",
            ),
            (
                "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d\
                 39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b",
            ),
        ] {
            let aes = cipher("aes", "cbc-plain64", &hex(key));
            let mut sector = plain.clone();
            sector.resize(SECTOR, 7);
            let before = sector.clone();
            aes.sectors.apply(&[iv], &mut sector, true);
            assert_eq!(sector[..64], hex(want)[..]);
            aes.sectors.apply(&[iv], &mut sector, false);
            assert_eq!(sector, before);
        }
    }

    #[test]
    fn sectors_of_any_number_are_as_sectors_one_by_one() {
        for (name, mode, len) in [
            ("aes", "xts-plain64", 64),
            ("serpent", "cbc-essiv:sha256", 32),
            ("cast5", "cbc-plain", 16),
        ] {
            let key: Vec<u8> = (0..len).map(|n: u8| n.wrapping_mul(7)).collect();
            let cipher = cipher(name, mode, &key);
            // Across the end of 32 bits, where plain begins anew.
            let first = u64::from(u32::MAX) - 3;
            let plain: Vec<u8> = (0..21 * SECTOR).map(|n| (n * n / 5) as u8).collect();
            let mut together = plain.clone();
            cipher.encrypt(first, &mut together);
            let mut apart = plain.clone();
            for (n, sector) in (0..).zip(apart.chunks_exact_mut(SECTOR)) {
                cipher.encrypt(first + n, sector);
            }
            assert!(together == apart, "{name}-{mode}");
            cipher.decrypt(first, &mut together);
            assert!(together == plain, "{name}-{mode}");
            let mut zero = plain[..SECTOR].to_vec();
            cipher.encrypt(0, &mut zero);
            let mut wrapped = plain[..SECTOR].to_vec();
            cipher.encrypt(1 << 32, &mut wrapped);
            assert_eq!(zero == wrapped, mode.ends_with("plain"), "{name}-{mode}");
        }
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        for (name, mode, len, told) in [
            ("sm4", "xts-plain64", 32, "the cipher \"sm4\""),
            ("aes", "ecb", 32, "the cipher mode \"ecb\""),
            ("aes", "ctr-plain64", 32, "the cipher mode \"ctr\""),
            ("aes", "cbc", 32, "the IV generator \"\""),
            ("aes", "cbc-benbi", 32, "the IV generator \"benbi\""),
            ("aes", "cbc-essiv", 32, "the IV generator \"essiv\""),
            ("aes", "cbc-essiv:md5", 32, "essiv with the hash \"md5\""),
            ("aes", "cbc-essiv:sha1", 32, "no aes key has 20 bytes"),
            ("aes", "xts-plain64", 65, "a key of 65 bytes"),
            ("aes", "cbc-plain64", u32::MAX, "a key of 4294967295 bytes"),
            (
                "cast5",
                "xts-plain64",
                32,
                "cast5, whose blocks have 64 bits",
            ),
            (
                "cast5",
                "cbc-essiv:sha256",
                16,
                "cast5, whose blocks have 64 bits",
            ),
        ] {
            let error = CipherSpec::parse(name, mode, len).unwrap_err();
            assert!(error.contains(told), "{error}");
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        let text = format!("{:?}", cipher("aes", "xts-plain64", &[0xab; 64]));
        assert!(!text.contains("ab") && !text.contains("171"), "{text}");
    }
}
