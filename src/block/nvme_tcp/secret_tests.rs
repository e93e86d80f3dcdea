//! Texts of secrets: good ones, wrong ones, and where they are read from.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use super::secret::{DhChapSecret, SecretError, TlsSecret};
use crate::block::crypt::KeySource;
use crate::block::error::ErrorKind;

/// The key of all of these is bytes 0, 1, 2 and so on.
const GOOD: [&str; 6] = [
    "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
    "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
    "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
    "DHHC-1:02:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
    "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P4zODhA=:",
    "DHHC-1:03:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+P4zODhA=:",
];
const NQN: &str = "nqn.2014-08.org.example:host";

fn dhchap(text: &str) -> Result<DhChapSecret, SecretError> {
    DhChapSecret::parse(text.as_bytes())
}

/// The keys were transformed in Python: `hmac.new(key, nqn + b"NVMe-over-Fabrics", hash)`.
#[test]
fn keys_are_transformed_by_the_nqn() {
    for text in [GOOD[0], GOOD[2], GOOD[4]] {
        let key = dhchap(text).unwrap().transformed(NQN).unwrap();
        assert!([32, 48, 64].contains(&key.len()));
        assert!(key.iter().copied().eq(0..key.len() as u8));
    }
    for (text, want) in [
        (
            GOOD[1],
            "7863a339224010efc7e5b0e158ccc774c033e64ca11d995ba94d47581974e625",
        ),
        (
            GOOD[3],
            "392151a6ce7106525d19897fd90da4cb964987ba8fd099b8a214e06355c4a014\
                   da7d42ec776b67a36921d94d43e85f4c",
        ),
        (
            GOOD[5],
            "f05f252ae9a293af4091e81f2c2a17b4a2cea2884e79b4947980ab67c38f8940\
                   5c8d42bfb9c41b49b3ae6086a8d35acae1f0ed6ecc881343ab2836ed1803a1d8",
        ),
    ] {
        let key = dhchap(text).unwrap().transformed(NQN).unwrap();
        let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(key, want);
    }
}

#[test]
fn one_newline_at_the_end_is_cut() {
    for end in ["\n", "\r\n"] {
        assert!(dhchap(&format!("{}{end}", GOOD[0])).is_ok());
    }
    assert_eq!(
        dhchap(&format!("{}\n\n", GOOD[0])).err(),
        Some(SecretError::End)
    );
    assert_eq!(
        dhchap(&format!("{} ", GOOD[0])).err(),
        Some(SecretError::End)
    );
}

#[test]
fn each_mistake_is_named() {
    let good = GOOD[1];
    let mistyped = good.replace("AAEC", "AAED");
    let cases = [
        ("", SecretError::Name("DHHC-1:")),
        ("NVMeTLSkey-1:01:x:", SecretError::Name("DHHC-1:")),
        ("dhhc-1:01:x:", SecretError::Name("DHHC-1:")),
        (
            "DHHC-1:04:x:",
            SecretError::Transformation("DHHC-1:", "00, 01, 02 and 03"),
        ),
        (
            "DHHC-1:1:x:",
            SecretError::Transformation("DHHC-1:", "00, 01, 02 and 03"),
        ),
        (
            "DHHC-1:11:x:",
            SecretError::Transformation("DHHC-1:", "00, 01, 02 and 03"),
        ),
        (
            "DHHC-1:01",
            SecretError::Transformation("DHHC-1:", "00, 01, 02 and 03"),
        ),
        ("DHHC-1:01:", SecretError::End),
        (&good[..good.len() - 1], SecretError::End),
        (&format!("{good}:"), SecretError::End),
        ("DHHC-1:01::", SecretError::Base64),
        ("DHHC-1:01:A:", SecretError::Base64),
        ("DHHC-1:01:A===:", SecretError::Base64),
        ("DHHC-1:01:====:", SecretError::Base64),
        ("DHHC-1:01:A=AA:", SecretError::Base64),
        ("DHHC-1:01:AAE_:", SecretError::Base64),
        ("DHHC-1:01:AB==:", SecretError::Base64),
        (
            "DHHC-1:01:AAAA:",
            SecretError::Length {
                got: 0,
                want: "32 (SHA-256)",
            },
        ),
        (
            &GOOD[2].replace(":00:", ":01:"),
            SecretError::Length {
                got: 48,
                want: "32 (SHA-256)",
            },
        ),
        (
            &GOOD[0].replace(":00:", ":03:"),
            SecretError::Length {
                got: 32,
                want: "64 (SHA-512)",
            },
        ),
        (
            &format!("DHHC-1:00:{}:", "AAAA".repeat(40)),
            SecretError::Length {
                got: 116,
                want: "32, 48 or 64",
            },
        ),
        (&mistyped, SecretError::Crc),
    ];
    for (text, want) in cases {
        assert_eq!(dhchap(text).err(), Some(want), "{text}");
    }
    // 64 bytes are no TLS key, and 03 is no hash of one.
    let tls = |text: &str| TlsSecret::parse(text.replace("DHHC", "NVMeTLSkey").as_bytes()).err();
    assert_eq!(tls(GOOD[0]), None);
    assert_eq!(tls(GOOD[1]), None);
    assert_eq!(tls(GOOD[2]), None);
    assert_eq!(tls(GOOD[3]), None);
    assert_eq!(
        tls(GOOD[4]),
        Some(SecretError::Length {
            got: 64,
            want: "32 or 48"
        })
    );
    assert_eq!(
        tls(GOOD[5]),
        Some(SecretError::Transformation(
            "NVMeTLSkey-1:",
            "00, 01 and 02"
        ))
    );
    // A text of the one is none of the other.
    assert_eq!(
        TlsSecret::parse(good.as_bytes()).err(),
        Some(SecretError::Name("NVMeTLSkey-1:"))
    );
}

#[test]
fn any_byte_that_differs_is_noticed() {
    let good = GOOD[1].as_bytes();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut text = good.to_vec();
            text[at] ^= 1 << bit;
            // Without a transformation the key is the same, and another length of hash is none.
            if &text[..10] == b"DHHC-1:00:" {
                continue;
            }
            assert!(DhChapSecret::parse(&text).is_err(), "byte {at}, bit {bit}");
        }
        assert!(DhChapSecret::parse(&good[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn no_error_quotes_a_secret() {
    for text in GOOD {
        let mut shown = format!("{:?}", dhchap(text).unwrap());
        let tls = text.replace("DHHC", "NVMeTLSkey");
        if let Ok(secret) = TlsSecret::parse(tls.as_bytes()) {
            shown += &format!("{secret:?}");
        }
        let wrong = [
            text.replace("DHHC", "DHCC"),
            text.replace("-1:0", "-1:9"),
            text.replace("AAEC", "AAED"),
            text[..text.len() - 1].to_owned(),
            text.replace("ICQo", "I*Qo"),
            text.replace("ICQo", "ICQoICQo"),
        ];
        let directory = tempfile::tempdir().unwrap();
        for wrong in wrong {
            let error = dhchap(&wrong).unwrap_err();
            shown += &format!("{error} {error:?}");
            let path = directory.path().join("key");
            std::fs::write(&path, &wrong).unwrap();
            let error = DhChapSecret::load(&KeySource::File(path.clone())).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidImage);
            assert!(
                error.to_string().contains("`nvme gen-dhchap-key`"),
                "{error}"
            );
            assert!(error.path() == path);
            shown += &format!("{error} {error:?}");
        }
        // The keys are 0, 1, 2 and so on.
        assert!(
            !shown.contains("4, 5, 6") && !shown.contains("040506"),
            "{shown}"
        );
        // Four characters of base64 are three bytes of a key.
        let base64 = &text[10..text.len() - 1];
        for at in 0..base64.len() - 4 {
            assert!(!shown.contains(&base64[at..at + 4]), "{shown}");
        }
    }
}

#[test]
fn secrets_are_read_from_files_and_descriptors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("key");
    std::fs::write(&path, format!("{}\n", GOOD[1])).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let secret = DhChapSecret::load(&KeySource::File(path.clone())).unwrap();
    assert!(secret.descriptor().is_none());
    assert_eq!(
        secret.transformed(NQN).unwrap(),
        dhchap(GOOD[1]).unwrap().transformed(NQN).unwrap()
    );
    let error = DhChapSecret::load(&KeySource::File(directory.path().join("none"))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);

    // A pipe can be read once; a successor of this process gets another with the same text.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let text = GOOD[2].replace("DHHC", "NVMeTLSkey");
    writer.write_all(text.as_bytes()).unwrap();
    drop(writer);
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(reader));
    let number = file.as_raw_fd();
    let secret = TlsSecret::load(&KeySource::Fd(Arc::new(file))).unwrap();
    assert_eq!(secret.key().len(), 48);
    let (given, mut pipe) = secret.descriptor().unwrap().unwrap();
    assert_eq!(given, number);
    let mut again = String::new();
    pipe.read_to_string(&mut again).unwrap();
    assert_eq!(again, text);
}
