use std::process::Command;

use super::*;

/// Makes an image with qemu-img and returns its first 64 KiB and its length.
fn image(options: &str, more: &[&str]) -> (Vec<u8>, u64) {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("a.qcow2");
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", options])
        .args(more)
        .arg(&path)
        .arg("1G")
        .output()
        .expect("qemu-img");
    assert!(output.status.success(), "{output:?}");
    let mut bytes = std::fs::read(&path).expect("image");
    let len = bytes.len() as u64;
    bytes.resize(bytes.len().max(65536), 0);
    bytes.truncate(65536);
    (bytes, len)
}

fn parse(bytes: &[u8], len: u64) -> Result<Header> {
    let bits = u32_at(bytes, 20).min(16);
    let cluster = 1usize << bits;
    Header::parse(Path::new("a.qcow2"), &bytes[..cluster.max(128)], len)
}

fn refused(bytes: &[u8], len: u64) -> (ErrorKind, String) {
    let served = parse(bytes, len).and_then(|header| header.check_supported());
    let error = served.expect_err("refused");
    (error.kind(), error.to_string())
}

#[test]
fn headers_of_qemu_img_are_understood_in_every_geometry() {
    for bits in 9..=16u32 {
        for (compat, width) in [("0.10", 16), ("1.1", 1), ("1.1", 16), ("1.1", 64)] {
            let options = format!(
                "cluster_size={},compat={compat},refcount_bits={width}",
                1 << bits
            );
            let (bytes, len) = image(&options, &[]);
            let header = parse(&bytes, len).expect("a good image");
            assert_eq!(header.version, if compat == "0.10" { 2 } else { 3 });
            assert_eq!(header.geometry.cluster_bits, bits);
            assert_eq!(header.geometry.refcount_bits(), width);
            assert_eq!(header.size, 1 << 30);
            assert_eq!(header.backing, None);
            assert!(header.check_writable().is_ok());
        }
    }
}

#[test]
fn the_backing_file_is_named_with_its_format() {
    let (bytes, len) = image("cluster_size=64k", &["-u", "-b", "base.img", "-F", "raw"]);
    let backing = parse(&bytes, len).expect("a good image").backing;
    let want = BackingName {
        name: "base.img".into(),
        format: Some("raw".into()),
    };
    assert_eq!(backing, Some(want));
}

#[test]
fn unknown_incompatible_features_are_refused_by_their_names() {
    let (mut bytes, len) = image("cluster_size=64k", &[]);
    bytes[72 + 7 - 7] = 0x80; // bit 63
    let (kind, text) = refused(&bytes, len);
    assert_eq!(kind, ErrorKind::Unsupported);
    assert!(text.contains("bit 63"), "{text}");
    // Rename the first entry of the feature name table to be bit 63.
    let table = bytes
        .windows(4)
        .position(|w| w == 0x6803_f857u32.to_be_bytes())
        .expect("feature name table");
    bytes[table + 8] = 0;
    bytes[table + 9] = 63;
    let (_, text) = refused(&bytes, len);
    assert!(text.contains("dirty bit"), "{text}");
}

#[test]
fn features_that_are_not_supported_are_refused_by_name() {
    let (good, len) = image("cluster_size=64k", &[]);
    for (method, word) in [(1, "AES"), (2, "LUKS"), (3, "method 3")] {
        let mut bytes = good.clone();
        bytes[35] = method;
        assert!(refused(&bytes, len).1.contains(word));
    }
}

#[test]
fn a_corrupt_image_is_read_and_not_written_to() {
    let (mut bytes, len) = image("cluster_size=64k", &[]);
    bytes[79] |= 2;
    let header = parse(&bytes, len).unwrap();
    assert!(header.check_supported().is_ok());
    let error = header.check_writable().unwrap_err();
    assert!(error.to_string().contains("check -r all"), "{error}");
}

#[test]
fn numbers_out_of_range_are_refused() {
    let (good, len) = image("cluster_size=64k", &["-u", "-b", "base.img", "-F", "raw"]);
    let cases: [(usize, &[u8], &str); 21] = [
        (0, b"QFJ", "magic"),
        (4, &[0, 0, 0, 4], "version"),
        (20, &[0, 0, 0, 8], "cluster_bits"),
        (20, &[0, 0, 0, 22], "cluster_bits"),
        (20, &[0xff; 4], "cluster_bits"),
        (24, &[0x7f, 0xff], "L1 entries"),
        (36, &[0, 0, 0, 1], "L1 entries"),
        (36, &[0xff; 4], "too large"),
        (40, &[0xff; 8], "L1 table's offset"),
        (47, &[1], "L1 table's offset"),
        (40, &[0; 8], "L1 table's offset"),
        (48, &[0xff; 8], "refcount table's offset"),
        (56, &[0; 4], "refcount table of"),
        (56, &[0xff; 4], "refcount table of"),
        (96, &[0, 0, 0, 7], "refcount_order"),
        (100, &[0, 0, 0, 103], "header_length"),
        (100, &[0xff; 4], "header_length"),
        (35, &[2], "header pointer"),
        (35, &[3], "encryption method"),
        (8, &[0xff; 8], "backing file name"),
        (16, &[0, 0, 4, 0], "backing file name"),
    ];
    for (at, value, word) in cases {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        let (_, text) = refused(&bytes, len);
        assert!(text.contains(word), "{at}: {text}");
    }
    // A file that was cut off before its tables.
    assert!(refused(&good, 65536).1.contains("offset"));
}

#[test]
fn no_bytes_make_the_parser_panic() {
    let (good, len) = image("cluster_size=512", &["-u", "-b", "base.img", "-F", "raw"]);
    let mut state = 1u64;
    for _ in 0..20_000 {
        let mut bytes = good[..512].to_vec();
        for _ in 0..3 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let at = (state >> 33) as usize % 240;
            bytes[at] = (state >> 55) as u8;
        }
        // Whatever it says, it says it in an orderly way.
        if let Err(error) = Header::parse(Path::new("a"), &bytes, len) {
            assert!(!error.to_string().is_empty());
        }
    }
    for cut in 0..512 {
        let _ = Header::parse(Path::new("a"), &good[..cut], len).map(|h| h.size);
    }
}
