//! Header and data digests: CRC32C (TCP 3.3.1.1), little-endian on the wire.

/// Bytes of a digest on the wire.
pub const DIGEST: usize = 4;

/// The digest of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// The digest of what `so_far` is the digest of, followed by `bytes`.
pub fn crc32c_append(so_far: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(so_far, bytes)
}

/// The digest of `bytes` as it is sent.
pub fn digest(bytes: &[u8]) -> [u8; DIGEST] {
    crc32c(bytes).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vectors_of_rfc_3720_come_out() {
        // RFC 3720, appendix B.4; the bytes there are in the order in which they are sent.
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        assert_eq!(digest(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(digest(&[0xff; 32]), [0x43, 0xab, 0xa8, 0x62]);
        assert_eq!(digest(&ascending), [0x4e, 0x79, 0xdd, 0x46]);
        assert_eq!(digest(&descending), [0x5c, 0xdb, 0x3f, 0x11]);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn a_digest_can_be_computed_in_pieces() {
        let bytes: Vec<u8> = (0..200u32).map(|n| (n * 7) as u8).collect();
        for at in 0..bytes.len() {
            let (a, b) = bytes.split_at(at);
            assert_eq!(crc32c_append(crc32c(a), b), crc32c(&bytes));
        }
    }
}
