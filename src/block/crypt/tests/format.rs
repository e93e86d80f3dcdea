//! LUKS files made here: qemu-img measures for a second how fast it derives keys, whatever it is told.

use super::*;
use crate::block::crypt::cipher::{CipherSpec, SectorCipher};
use crate::block::crypt::hash::Hash;
use crate::block::tests::pattern;

const STRIPES: usize = 4000;
const PAYLOAD: usize = 2_068_480;
const ITERATIONS: u32 = 1000;

/// A file with `size` bytes of payload, which [`SECRET`] opens.
pub(super) fn luks_file(
    cipher: &str,
    mode: &str,
    hash: &str,
    key_len: usize,
    size: usize,
) -> Vec<u8> {
    let mut file = vec![0; PAYLOAD + size];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    let number = |n: usize| (n as u32).to_be_bytes();
    let function = Hash::by_name(hash).unwrap();
    let key = pattern(key_len, 1);
    put(0, b"LUKS\xba\xbe\0\x01");
    put(8, cipher.as_bytes());
    put(40, mode.as_bytes());
    put(72, hash.as_bytes());
    put(104, &number(PAYLOAD / 512));
    put(108, &number(key_len));
    let salt = pattern(32, 2);
    let mut digest = [0; 20];
    function.pbkdf2(&key, &salt, ITERATIONS, &mut digest);
    put(112, &digest);
    put(132, &salt);
    put(164, &ITERATIONS.to_be_bytes());
    put(168, b"12345678-1234-1234-1234-123456789abc");
    let material_len = key_len * STRIPES;
    // The third slot is the enabled one, so that it is not the first that is looked at.
    let (enabled, salt) = (2, pattern(32, 3));
    let material_at = |slot: usize| 4096 + slot * material_len.next_multiple_of(4096);
    for slot in 0..8 {
        let at = 208 + slot * 48;
        let state: u32 = if slot == enabled { 0x00ac_71f3 } else { 0xdead };
        put(at, &state.to_be_bytes());
        put(at + 4, &ITERATIONS.to_be_bytes());
        put(at + 8, &salt);
        // QEMU wants the disabled ones in order, too.
        put(at + 40, &number(material_at(slot) / 512));
        put(at + 44, &number(STRIPES));
    }

    // AFsplit: all pieces but the last are noise, and the last one makes the key of them.
    let mut split = pattern(material_len, 4);
    let mut sum = vec![0u8; key_len];
    for piece in split.chunks_exact(key_len).take(STRIPES - 1) {
        sum.iter_mut().zip(piece).for_each(|(to, with)| *to ^= with);
        for (n, part) in (0u32..).zip(sum.chunks_mut(function.len())) {
            let diffused = function.digest(&[&n.to_be_bytes(), part]);
            part.copy_from_slice(&diffused[..part.len()]);
        }
    }
    let last = material_len - key_len;
    for (to, (sum, key)) in split[last..].iter_mut().zip(sum.iter().zip(&key)) {
        *to = sum ^ key;
    }
    let spec = CipherSpec::parse(cipher, mode, key_len as u32).unwrap();
    let mut slot_key = vec![0; key_len];
    function.pbkdf2(SECRET.as_bytes(), &salt, ITERATIONS, &mut slot_key);
    split.resize(material_len.next_multiple_of(512), 0);
    SectorCipher::new(spec, &slot_key)
        .unwrap()
        .encrypt(0, &mut split);
    put(material_at(enabled), &split);
    file
}
