//! Identities and keys as others derive them.

use super::super::{Derivation, TlsPsk};
use super::{KEYS, hex, psk};
use crate::block::nvme_tcp::auth::Hash;

/// The values are those of libnvme's `test/psk.c`.
#[test]
fn identities_are_those_of_libnvme() {
    let cases = [
        (
            0,
            Derivation::Version1,
            "NVMe1R01 nqn.psk-test-host nqn.psk-test-subsys iSbjiStwJ/1TrTvDlt2fjFmzvsytOJelidNnA+X5lEU=",
        ),
        (
            1,
            Derivation::Version1,
            "NVMe1R02 nqn.psk-test-host nqn.psk-test-subsys QhW2+Rp6RzHlNtCslyRxMnwJ11tKKhz8JCAQpQ+XUD8f9td1VeH5h53yz2wKJG1a",
        ),
        (
            0,
            Derivation::Version1Compat,
            "NVMe1R01 nqn.psk-test-host nqn.psk-test-subsys 66GuqV08TsAGII39teWUfwQwizjv06Jy8jOcX3NAAzM=",
        ),
        (
            1,
            Derivation::Version1Compat,
            "NVMe1R02 nqn.psk-test-host nqn.psk-test-subsys RsKmYJ3nAn1ApjjMloJFbAkLPivONDAX/xW327YBUsn2eGShXSjCZvBaOxscLqmz",
        ),
        (
            0,
            Derivation::Version0,
            "NVMe0R01 nqn.psk-test-host nqn.psk-test-subsys",
        ),
        (
            1,
            Derivation::Version0Compat,
            "NVMe0R02 nqn.psk-test-host nqn.psk-test-subsys",
        ),
    ];
    for (key, derivation, identity) in cases {
        assert_eq!(psk(KEYS[key], derivation).identity(), identity);
    }
}

/// The values are those of Linux' `drivers/nvme/common/tests/auth_kunit.c`.
#[test]
fn keys_are_those_of_linux() {
    let (digest, key) = (
        [
            "OldoKuTfKddMuyCznAZojkWD7P4D9/AtzDzLimtOxqI=",
            "cffMWk8TSS7HOQebjgYEIkrPrjWPV4JE5cdPB8WhEvY4JBW5YynKyv66XscN4A9n",
        ],
        [
            "3c17da628474a04d2247c4cab47968c915388193f7c071bd9489cc3666cd7cc8",
            "2774753233537b3fa50eb7d16a8e43457d85f4906c005b2236616c5d80939d08\
          98fff15bb8b77119d2be0aac423e7590",
        ],
    );
    for (n, hash) in [Hash::Sha256, Hash::Sha384].into_iter().enumerate() {
        let len = hash.digest_len() as u8;
        let session_key: Vec<u8> = (0..len).map(|i| b'A' + i).collect();
        let c1: Vec<u8> = (0..len).collect();
        let c2: Vec<u8> = (0..len).map(|i| 0xff - i).collect();
        let input = hash.hmac(&session_key, &[&c1, &c2]).unwrap();
        let psk = TlsPsk::generated(hash, &input, "hostnqn", "subsysnqn").unwrap();
        let want = format!("NVMe1G0{} hostnqn subsysnqn {}", n + 1, digest[n]);
        assert_eq!(psk.identity(), want);
        assert_eq!(hex(psk.key()), key[n]);
    }
}

/// Made with Python's hmac: `prk = hmac(bytes(32), configured)`, `retained = hmac(prk, b"\0\x20" +
/// b"\x0dtls13 HostNQN" + bytes([len(host)]) + host + b"\1")`; the same with the label "nvme-tls-psk" and the
/// identity; with "compat" the length is little-endian and the label and the context have none.
#[test]
fn keys_of_version_0_are_those_of_an_implementation_in_python() {
    let unhashed = KEYS[0].replace(":01:", ":00:");
    let cases = [
        (
            KEYS[0],
            Derivation::Version0,
            "05c6503551ad136e6ee32e6eeb3f6d500b69701d84ec71e328f65c7f51566f68",
        ),
        (
            unhashed.as_str(),
            Derivation::Version0,
            "ec85300ba827726bd3bc4fc07f3a34aec5fe7c8ccac05fefc2f021c74e0df9ef",
        ),
        (
            KEYS[1],
            Derivation::Version0Compat,
            "2ee4754186a625b28a3936ef4a40d839c3ad958b2e017562ee07e2501f172ce999dc9c29033ea7ee33f814f192c13f47",
        ),
    ];
    for (text, derivation, want) in cases {
        assert_eq!(hex(psk(text, derivation).key()), want, "{derivation:?}");
    }
}
