//! Headers that lie.

use super::*;
use crate::block::crypt::luks::{HEADER, Header, Place};
use crate::block::error::ErrorKind;
use crate::block::sim::random;

fn header(f: &Folder) -> ([u8; HEADER], Place) {
    f.create("a.luks", 64 << 10);
    let file = std::fs::read(f.at("a.luks")).unwrap();
    let place = Place {
        offset: 0,
        len: file.len() as u64,
    };
    (file[..HEADER].try_into().unwrap(), place)
}

fn parse(raw: &[u8; HEADER], place: Place) -> Result<Header> {
    Header::parse(std::path::Path::new("a.luks"), raw, place)
}

#[test]
fn headers_that_contradict_the_specification_are_refused_by_field() {
    let f = Folder::new();
    let (good, place) = header(&f);
    parse(&good, place).unwrap();
    let slot = |n: usize, field: usize| 208 + n * 48 + field;
    let enabled = 0x00ac_71f3u32.to_be_bytes();
    let cases: &[(usize, &[u8], ErrorKind, &str)] = &[
        (0, b"LUKX", ErrorKind::InvalidImage, "no LUKS header"),
        (6, &[0, 2], ErrorKind::Unsupported, "LUKS version 2"),
        (8, &[0xff], ErrorKind::InvalidImage, "not text"),
        (8, &[b'a'; 32], ErrorKind::InvalidImage, "not text"),
        (8, b"des\0", ErrorKind::Unsupported, "\"des\""),
        (104, &[0; 4], ErrorKind::InvalidImage, "a payload at 0x0"),
        (104, &[0, 0, 1, 0], ErrorKind::InvalidImage, "key slot 2"),
        (
            108,
            &[0xff; 4],
            ErrorKind::Unsupported,
            "a key of 4294967295 bytes",
        ),
        (164, &[0; 4], ErrorKind::InvalidImage, "0 iterations"),
        (
            164,
            &[0xff; 4],
            ErrorKind::InvalidImage,
            "4294967295 iterations",
        ),
        (slot(2, 0), &[1], ErrorKind::InvalidImage, "its state is"),
        (
            slot(2, 0),
            &[0, 0, 0xde, 0xad],
            ErrorKind::InvalidImage,
            "no key slot",
        ),
        (slot(2, 4), &[0; 4], ErrorKind::InvalidImage, "0 iterations"),
        (
            slot(2, 4),
            &[0xff; 4],
            ErrorKind::InvalidImage,
            "4294967295 iterations",
        ),
        (slot(2, 40), &[0; 4], ErrorKind::InvalidImage, "not between"),
        (
            slot(2, 40),
            &[0xff; 4],
            ErrorKind::InvalidImage,
            "not between",
        ),
        (slot(2, 44), &[0xff; 4], ErrorKind::InvalidImage, "stripes"),
        (slot(2, 44), &[0; 4], ErrorKind::InvalidImage, "stripes"),
    ];
    for (at, bytes, kind, told) in cases {
        let mut raw = good;
        raw[*at..at + bytes.len()].copy_from_slice(bytes);
        let error = parse(&raw, place).unwrap_err();
        assert_eq!(error.kind(), *kind, "{error}");
        assert!(error.to_string().contains(told), "{told}: {error}");
    }
    // The material of two slots in one place, and more work than anybody has time for.
    let mut raw = good;
    raw.copy_within(slot(2, 0)..slot(3, 0), slot(5, 0));
    let error = parse(&raw, place).unwrap_err().to_string();
    assert!(error.contains("overlaps"), "{error}");
    let mut raw = good;
    for n in 0..8 {
        raw[slot(n, 0)..slot(n, 4)].copy_from_slice(&enabled);
        raw[slot(n, 4)..slot(n, 8)].copy_from_slice(&(1u32 << 26).to_be_bytes());
        raw[slot(n, 44)..slot(n, 48)].copy_from_slice(&4000u32.to_be_bytes());
    }
    let error = parse(&raw, place).unwrap_err().to_string();
    assert!(error.contains("rounds of hashing"), "{error}");
    // A file that ends in the key material.
    let short = Place {
        len: 600_000,
        ..place
    };
    let error = parse(&good, short).unwrap_err().to_string();
    assert!(error.contains("not between"), "{error}");
}

#[test]
fn no_bytes_make_the_header_panic() {
    let f = Folder::new();
    let (good, place) = header(&f);
    let mut rng = 11;
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut raw = good;
        for _ in 0..1 + random(&mut rng) % 6 {
            let at = random(&mut rng) as usize % 300;
            raw[at] = random(&mut rng) as u8;
        }
        let place = Place {
            offset: 0,
            len: random(&mut rng) % (2 * place.len),
        };
        accepted += u32::from(parse(&raw, place).is_ok());
    }
    assert!(accepted > 100, "some changes do no harm: {accepted}");
    for seed in 0..1000u64 {
        let raw = std::array::from_fn(|n| (seed * 31 + n as u64 * (seed | 7)) as u8);
        assert!(parse(&raw, place).is_err());
    }
}

#[test]
fn a_damaged_file_is_an_error_and_no_more() {
    let f = Folder::new();
    f.create("a.luks", 64 << 10);
    let good = std::fs::read(f.at("a.luks")).unwrap();
    // Cut in the header, in the key material, before the payload and in it.
    for len in [0, 100, 592, 50_000, 600_000] {
        f.put("b.luks", &good[..len]);
        assert!(f.open(f.spec("b.luks", Format::Luks)).is_err(), "{len}");
    }
    // Key material and digest that do not belong together.
    for at in [112, 140, 530_000, 700_000] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        f.put("b.luks", &bad);
        let error = f.open(f.spec("b.luks", Format::Luks)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAllowed, "{at}: {error}");
    }
}
