//! Finite field Diffie-Hellman in the groups of RFC 7919.

use std::io;

use num_bigint::BigUint;

use super::Group;

/// Bytes of a private exponent: twice the strength of the strongest group.
const EXPONENT: usize = 64;

impl Group {
    /// Bits of the prime, and the number X that makes it one (RFC 7919, appendix A).
    fn parameters(self) -> Option<(u32, u32)> {
        match self {
            Self::Null => None,
            Self::Ffdhe2048 => Some((2048, 560_316)),
            Self::Ffdhe3072 => Some((3072, 2_625_351)),
            Self::Ffdhe4096 => Some((4096, 5_736_041)),
            Self::Ffdhe6144 => Some((6144, 15_705_020)),
            Self::Ffdhe8192 => Some((8192, 10_965_728)),
        }
    }

    /// Bytes of an exponential; 0 of the null group.
    pub(crate) fn len(self) -> usize {
        self.parameters().map_or(0, |(bits, _)| bits as usize / 8)
    }

    /// p = 2^b - 2^(b-64) + (floor(2^(b-130) e) + X) 2^64 - 1.
    fn prime(self) -> Option<BigUint> {
        let (bits, x) = self.parameters()?;
        let one = BigUint::from(1u8);
        let top = (&one << bits) - (&one << (bits - 64));
        Some(top + ((e_scaled(bits - 130) + x) << 64u32) - one)
    }
}

/// floor(2^bits e), by the sum of 1/n!.
fn e_scaled(bits: u32) -> BigUint {
    // So many more bits that what is cut off in all terms does not reach the last one that counts.
    const GUARD: u32 = 64;
    let mut term = BigUint::from(1u8) << (bits + GUARD);
    let mut sum = term.clone();
    let mut n = 1u32;
    while term.bits() > 0 {
        term /= n;
        sum += &term;
        n += 1;
    }
    sum >> GUARD
}

/// Half of an exchange.
pub(super) struct Exchange {
    prime: BigUint,
    exponent: BigUint,
    len: usize,
    /// g^x mod p.
    pub exponential: Vec<u8>,
}

impl Exchange {
    /// A fresh exchange; none in the null group.
    pub fn new(group: Group) -> io::Result<Option<Self>> {
        let Some(prime) = group.prime() else {
            return Ok(None);
        };
        let exponent = BigUint::from_bytes_be(&random(EXPONENT)?);
        let len = group.len();
        let exponential = padded(&BigUint::from(2u8).modpow(&exponent, &prime), len);
        Ok(Some(Self {
            prime,
            exponent,
            len,
            exponential,
        }))
    }

    /// g^xy mod p of the other half; none if that is not a number between 2 and p - 2.
    pub fn shared(&self, theirs: &[u8]) -> Option<Vec<u8>> {
        let one = BigUint::from(1u8);
        let theirs = BigUint::from_bytes_be(theirs);
        if theirs <= one || theirs >= &self.prime - &one {
            return None;
        }
        Some(padded(
            &theirs.modpow(&self.exponent, &self.prime),
            self.len,
        ))
    }
}

/// Big-endian, with zeros in front.
fn padded(number: &BigUint, len: usize) -> Vec<u8> {
    let bytes = number.to_bytes_be();
    let mut padded = vec![0; len.saturating_sub(bytes.len())];
    padded.extend_from_slice(&bytes);
    padded
}

/// Random bytes of the kernel.
pub(super) fn random(len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    // SAFETY: a buffer of the length that is told. Up to 256 bytes come whole.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), len, 0) };
    if got != len as isize {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_primes_are_those_of_rfc_7919() {
        let all = [
            Group::Ffdhe2048,
            Group::Ffdhe3072,
            Group::Ffdhe4096,
            Group::Ffdhe6144,
            Group::Ffdhe8192,
        ];
        // What stands in front of the last 64 ones; all begin as e does.
        let ends = [
            "886b423861285c97",
            "25e41d2b66c62e37",
            "c68a007e5e655f6a",
            "a40e329cd0e40e65",
            "d68c8bb7c5c6424c",
        ];
        for (group, end) in all.into_iter().zip(ends) {
            let text = group.prime().unwrap().to_str_radix(16);
            assert_eq!(text.len(), group.len() * 2);
            assert!(text.starts_with("ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1"));
            assert!(text.ends_with(&format!("{end}ffffffffffffffff")));
        }
        // Fermat's test for the smallest: 2^(p-1) = 1 mod p.
        let p = Group::Ffdhe2048.prime().unwrap();
        let one = BigUint::from(1u8);
        assert_eq!(BigUint::from(2u8).modpow(&(&p - &one), &p), one);
    }

    #[test]
    fn both_halves_come_to_the_same_secret_and_refuse_trivial_ones() {
        let a = Exchange::new(Group::Ffdhe2048).unwrap().unwrap();
        let b = Exchange::new(Group::Ffdhe2048).unwrap().unwrap();
        assert_eq!(a.shared(&b.exponential), b.shared(&a.exponential));
        assert_eq!((a.shared(&[0]), a.shared(&[1])), (None, None));
        let p = Group::Ffdhe2048.prime().unwrap();
        assert_eq!(a.shared(&(p - 1u8).to_bytes_be()), None);
    }
}
