//! Whole transactions with an independent controller, known answers, and controllers that do it wrong.

mod controller;

use std::sync::Arc;

use openssl::bn::{BigNum, BigNumContext};

use self::controller::{Controller, HOST, SUBSYSTEM, TargetSecret, prime};
use super::transaction::Response;
use super::{AuthConfig, AuthError, Authentication, DhGroup, Hash, Outcome, Reason, Step};
use crate::block::nvme_tcp::secret::DhChapSecret;

fn secret(of: &TargetSecret) -> Arc<DhChapSecret> {
    Arc::new(DhChapSecret::parse(of.text().as_bytes()).unwrap())
}

/// A host and a controller that agree.
fn pair(hash: u8, group: u8, both: bool, secure_channel: bool) -> (Authentication, Controller) {
    let len = [32, 48, 64][usize::from(hash) - 1];
    let host = TargetSecret::new(hash, len, 0x11);
    let controller = both.then(|| TargetSecret::new(0, 48, 0x22));
    let config = AuthConfig::new(secret(&host), controller.as_ref().map(secret));
    let host_side = Authentication::new(&config, HOST, SUBSYSTEM, 0x1234, secure_channel);
    (host_side, Controller::new(hash, group, host, controller))
}

fn sends(host: &mut Authentication) -> Vec<u8> {
    match host.next() {
        Step::Send(message) => message,
        other => panic!("{other:?}"),
    }
}

fn asks(host: &mut Authentication) -> usize {
    match host.next() {
        Step::Receive(len) => len,
        other => panic!("{other:?}"),
    }
}

/// Gives the host a message as a command does: with zeros behind it, up to the length that was asked for.
fn give(host: &mut Authentication, mut message: Vec<u8>) -> Result<(), AuthError> {
    let len = asks(host);
    assert!(message.len() <= len, "{} > {len}", message.len());
    message.resize(len, 0);
    host.received(&message)
}

/// The transaction to its end.
fn run(host: &mut Authentication, target: &mut Controller) -> Result<Outcome, AuthError> {
    let challenge = target.challenge(&sends(host));
    give(host, challenge)?;
    let success = target.success1(&sends(host));
    give(host, success)?;
    let mut step = host.next();
    if let Step::Send(message) = step {
        assert_eq!(message, target.success2());
        assert!(target.controller.is_some());
        step = host.next();
    }
    match step {
        Step::Done(outcome) => Ok(outcome),
        other => panic!("{other:?}"),
    }
}

/// The host refuses, says why to the controller, and is done.
fn refuses(host: &mut Authentication, target: &Controller, error: &AuthError, reason: Reason) {
    assert_eq!(error.reason(), reason, "{error}");
    assert!(!error.by_controller());
    assert_eq!(sends(host), target.failure2(reason.code()));
    for _ in 0..2 {
        match host.next() {
            Step::Failed(last) => assert_eq!(last, *error),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_hash_and_group_authenticates_a_host_and_both() {
    for group in DhGroup::ALL {
        for hash in Hash::ALL {
            for both in [false, true] {
                let (mut host, mut target) = pair(hash.id(), group.id(), both, false);
                let outcome = run(&mut host, &mut target).unwrap();
                assert!(target.is_host_authentic);
                assert_eq!((outcome.hash, outcome.group), (hash, group));
                assert_eq!(outcome.controller_authenticated, both);
                assert!(outcome.generated_psk.is_none());
                assert_eq!(target.s2.is_some(), both);
                assert_ne!(target.s2, Some(0));
            }
        }
    }
}

#[test]
fn secrets_of_every_transformation_and_length_work() {
    for (transformation, len) in [(0, 32), (0, 48), (0, 64), (1, 32), (2, 48), (3, 64)] {
        let host = TargetSecret::new(transformation, len, 7);
        let controller = TargetSecret::new(transformation, len, 8);
        let config = AuthConfig::new(secret(&host), Some(secret(&controller)));
        let mut side = Authentication::new(&config, HOST, SUBSYSTEM, 1, false);
        let mut target = Controller::new(2, 0, host, Some(controller));
        assert!(
            run(&mut side, &mut target)
                .unwrap()
                .controller_authenticated
        );
    }
}

#[test]
fn a_secure_channel_gets_the_psk_that_the_target_generates() {
    for (hash, both) in [(1, false), (1, true), (2, false), (2, true)] {
        let (mut host, mut target) = pair(hash, 1, both, true);
        let outcome = run(&mut host, &mut target).unwrap();
        let psk = outcome.generated_psk.as_ref().unwrap();
        assert_eq!(Some(psk.to_vec()), target.generated);
        // S2 is 0 where C2 is for the channel only.
        assert_eq!(target.s2 == Some(0), !both);
        let shown = format!("{outcome:?}");
        let decimal = format!("{}, {}, {}", psk[0], psk[1], psk[2]);
        assert!(shown.contains("[secret]") && !shown.contains(&decimal));
    }
    let host = TargetSecret::new(0, 32, 1);
    let config = AuthConfig::new(secret(&host), None);
    let mut side = Authentication::new(&config, HOST, SUBSYSTEM, 1, true);
    let negotiate = sends(&mut side);
    assert_eq!(negotiate[6], 2);
    assert_eq!(negotiate[10..14], [2, 5, 1, 2], "no SHA-512 for TLS");
    assert!(
        !negotiate[42..47].contains(&0),
        "no channel without a group"
    );
}

#[test]
fn a_wrong_host_secret_is_refused_by_the_controller() {
    let (_, mut target) = pair(1, 1, false, false);
    let other = TargetSecret::new(1, 32, 0x99);
    let config = AuthConfig::new(secret(&other), None);
    let mut host = Authentication::new(&config, HOST, SUBSYSTEM, 3, false);
    let error = run(&mut host, &mut target).unwrap_err();
    assert!(error.by_controller());
    assert_eq!(error.reason(), Reason::Failed);
    assert!(
        error.to_string().contains("check that the host's secret"),
        "{error}"
    );
    // Nothing more is sent: the controller knows.
    assert!(matches!(host.next(), Step::Failed(last) if last == error));
}

#[test]
fn a_controller_that_does_not_know_its_secret_is_refused() {
    for group in [0, 1] {
        let (mut host, mut target) = pair(3, group, true, false);
        target.controller = Some(TargetSecret::new(0, 48, 0x23));
        let error = run(&mut host, &mut target).unwrap_err();
        assert!(error.to_string().contains("response is wrong"), "{error}");
        refuses(&mut host, &target, &error, Reason::Failed);
    }
}

#[test]
fn a_controller_that_leaves_its_response_out_is_refused() {
    let (mut host, mut target) = pair(1, 0, true, false);
    target.controller = None;
    let error = run(&mut host, &mut target).unwrap_err();
    assert!(
        error.to_string().contains("did not authenticate itself"),
        "{error}"
    );
    refuses(&mut host, &target, &error, Reason::Failed);
}

#[test]
fn a_host_does_not_take_its_own_response_for_the_controllers() {
    // The same secret for both, and a controller that only echoes.
    let both = TargetSecret::new(0, 32, 5);
    let config = AuthConfig::new(secret(&both), Some(secret(&both)));
    let mut host = Authentication::new(&config, HOST, SUBSYSTEM, 3, false);
    let mut target = Controller::new(1, 0, both.clone(), Some(both));
    let challenge = target.challenge(&sends(&mut host));
    give(&mut host, challenge).unwrap();
    let reply = sends(&mut host);
    let mut success = target.success1(&reply);
    success[16..48].copy_from_slice(&reply[16..48]);
    let error = give(&mut host, success).unwrap_err();
    refuses(&mut host, &target, &error, Reason::Failed);
}

/// Changes the challenge of a controller with SHA-256, and gives what the host says of it.
fn spoiled_challenge(group: u8, spoil: impl FnOnce(&mut Vec<u8>)) -> AuthError {
    let (mut host, mut target) = pair(1, group, false, false);
    let mut challenge = target.challenge(&sends(&mut host));
    spoil(&mut challenge);
    let error = give(&mut host, challenge).unwrap_err();
    refuses(&mut host, &target, &error, error.reason());
    error
}

#[test]
fn challenges_that_make_no_sense_are_refused_with_their_reason() {
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(u8, Reason, &str, Spoil); 10] = [
        (0, Reason::HashUnusable, "hash function 04h", |c| c[8] = 4),
        (0, Reason::HashUnusable, "hash function 00h", |c| c[8] = 0),
        (0, Reason::DhGroupUnusable, "group 06h", |c| c[9] = 6),
        (0, Reason::IncorrectPayload, "have 31 bytes", |c| c[6] = 31),
        (0, Reason::IncorrectPayload, "have 1 bytes", |c| c[10] = 1),
        (1, Reason::IncorrectPayload, "have 0 bytes", |c| {
            c[10..12].fill(0)
        }),
        (1, Reason::IncorrectPayload, "have 257 bytes", |c| {
            c[10..12].copy_from_slice(&[1, 1])
        }),
        (0, Reason::IncorrectMessage, "transaction 4661", |c| {
            c[4] = 0x35
        }),
        (0, Reason::IncorrectMessage, "01h/03h", |c| c[1] = 3),
        (0, Reason::IncorrectMessage, "00h/01h", |c| c[0] = 0),
    ];
    for (group, reason, text, spoil) in cases {
        let error = spoiled_challenge(group, spoil);
        assert_eq!(error.reason(), reason, "{error}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn values_that_would_make_the_shared_one_known_are_refused() {
    let p = prime(1);
    for value in [
        num_bigint::BigUint::ZERO,
        1u8.into(),
        &p - 1u8,
        p.clone(),
        &p + 1u8,
    ] {
        let bytes = value.to_bytes_be();
        let error = spoiled_challenge(1, |challenge| {
            let at = challenge.len() - 256;
            challenge[at..].fill(0);
            let at = challenge.len() - bytes.len();
            challenge[at..].copy_from_slice(&bytes);
        });
        assert_eq!(error.reason(), Reason::IncorrectPayload);
        assert!(error.to_string().contains("between 1 and p - 1"), "{error}");
    }
}

#[test]
fn what_was_not_offered_is_not_taken() {
    let host_secret = TargetSecret::new(0, 32, 1);
    let mut config = AuthConfig::new(secret(&host_secret), None);
    config.hashes = vec![Hash::Sha512, Hash::Sha384];
    config.groups = vec![DhGroup::Ffdhe3072, DhGroup::Ffdhe2048];
    let challenge = |hash: u8, group: u8| {
        let mut host = Authentication::new(&config, HOST, SUBSYSTEM, 9, false);
        let negotiate = sends(&mut host);
        assert_eq!(
            negotiate[10..14],
            [2, 2, 3, 2],
            "in the order of preference"
        );
        assert_eq!(negotiate[42..44], [2, 1]);
        let mut all = negotiate.clone();
        all[10..15].copy_from_slice(&[3, 6, 1, 2, 3]);
        all[42..48].copy_from_slice(&[0, 1, 2, 3, 4, 5]);
        let challenge = Controller::new(hash, group, host_secret.clone(), None).challenge(&all);
        give(&mut host, challenge)
    };
    assert_eq!(challenge(2, 2), Ok(()));
    assert_eq!(challenge(1, 2).unwrap_err().reason(), Reason::HashUnusable);
    assert_eq!(
        challenge(2, 0).unwrap_err().reason(),
        Reason::DhGroupUnusable
    );
    assert_eq!(
        challenge(2, 3).unwrap_err().reason(),
        Reason::DhGroupUnusable
    );
}

#[test]
fn a_message_cut_anywhere_is_refused() {
    let (mut host, mut target) = pair(1, 1, false, false);
    let challenge = target.challenge(&sends(&mut host));
    for len in 0..challenge.len() {
        let (mut host, _) = pair(1, 1, false, false);
        sends(&mut host);
        asks(&mut host);
        let error = host.received(&challenge[..len]).unwrap_err();
        assert_eq!(error.reason(), Reason::IncorrectPayload, "{len}: {error}");
    }
    for len in 0..48 {
        let (mut host, mut target) = pair(1, 0, true, false);
        let challenge = target.challenge(&sends(&mut host));
        give(&mut host, challenge).unwrap();
        let success = target.success1(&sends(&mut host));
        assert_eq!(success.len(), 48);
        asks(&mut host);
        let error = host.received(&success[..len]).unwrap_err();
        assert_eq!(error.reason(), Reason::IncorrectPayload, "{len}: {error}");
    }
}

#[test]
fn a_success_that_makes_no_sense_is_refused() {
    type Spoil = fn(&mut Vec<u8>);
    let cases: [(Reason, &str, Spoil); 4] = [
        (Reason::IncorrectPayload, "have 48 bytes", |s| s[6] = 48),
        (Reason::IncorrectPayload, "RVALID is 02h", |s| s[8] = 2),
        (Reason::IncorrectMessage, "transaction 52", |s| s[5] = 0),
        (Reason::IncorrectMessage, "01h/01h", |s| s[1] = 1),
    ];
    for (reason, text, spoil) in cases {
        let (mut host, mut target) = pair(1, 0, true, false);
        let challenge = target.challenge(&sends(&mut host));
        give(&mut host, challenge).unwrap();
        let mut success = target.success1(&sends(&mut host));
        spoil(&mut success);
        let error = give(&mut host, success).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        refuses(&mut host, &target, &error, reason);
    }
}

#[test]
fn every_reason_of_a_controller_is_told() {
    for code in 0..=9 {
        let (mut host, mut target) = pair(1, 0, false, false);
        target.challenge(&sends(&mut host));
        let error = give(&mut host, target.failure1(code)).unwrap_err();
        assert!(error.by_controller());
        assert_eq!(error.reason().code(), code);
        assert!(matches!(host.next(), Step::Failed(_)));
    }
}

#[test]
fn a_message_that_nobody_asked_for_ends_the_transaction() {
    let (mut host, _) = pair(1, 0, false, false);
    let error = host.received(&[1, 1, 0, 0, 0x34, 0x12]).unwrap_err();
    assert_eq!(error.reason(), Reason::IncorrectMessage);
    sends(&mut host);
    assert!(matches!(host.next(), Step::Failed(_)));
    assert_eq!(host.received(&[]).unwrap_err(), error);
}

#[test]
fn challenges_and_sequence_numbers_of_the_host_are_new_each_time() {
    let mut seen = Vec::new();
    for _ in 0..4 {
        let (mut host, mut target) = pair(1, 1, true, false);
        let challenge = target.challenge(&sends(&mut host));
        give(&mut host, challenge).unwrap();
        let reply = sends(&mut host);
        seen.push((
            reply[12..16].to_vec(),
            reply[48..80].to_vec(),
            reply[80..].to_vec(),
        ));
    }
    for (n, one) in seen.iter().enumerate() {
        for other in &seen[..n] {
            assert!(one.0 != other.0 && one.1 != other.1 && one.2 != other.2);
        }
    }
}

/// Made with Python's hmac and hashlib: key = bytes(range(n)), transformed as
/// `hmac.new(key, host + b"NVMe-over-Fabrics", hash)`; c = bytes((7*i+1) % 256); with a session key
/// `ks = hash(bytes(i % 251 for i in range(256)))` the challenge is `hmac.new(ks, c, hash)`; the response is
/// `hmac.new(key, c + 0x01020304 (LE32) + 0x0506 (LE16) + b"\0HostHost" + host + b"\0" + subsystem, hash)`.
#[test]
fn responses_are_those_of_an_implementation_in_python() {
    let cases = [
        (
            "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
            Hash::Sha256,
            false,
            "07a01ef83dbf496b4ebcb410ee1835e28ac92a94874084beb02a32f9b349f955",
        ),
        (
            "DHHC-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
            Hash::Sha256,
            true,
            "524662a1ea16385732bd6e8fca46eaba2a1c6feea6624bb2c9997eda7d429247",
        ),
        (
            "DHHC-1:02:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
            Hash::Sha384,
            false,
            "feea416c1d6af3b3f44c88fb0e30d849d56ce020221ae044d701e8674c54ba67d2370085e993c26e6e539f09c99c90ce",
        ),
        (
            "DHHC-1:02:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
            Hash::Sha384,
            true,
            "b212a902b7b0a10c2ae1a312a1f369f93ed258a7eb682c2e726f4464b716c1d759ecdaa783b0547ba15e043db18b9f84",
        ),
        (
            "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
            Hash::Sha512,
            false,
            "929f62f5daed33d567a5177cf8e5a4b9106094e43d718fdf6c93a8dccd4e6a9b\
          c4e4d7ca948c1aace95df78524ed2844ad477ce962210e422d43faa49eda9658",
        ),
        (
            "DHHC-1:01:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh+KfiaR:",
            Hash::Sha512,
            true,
            "424f53acaf3ccf4355849a725c8ae8bf9d5e9fd96f649ff93c3802b9f2cdc4cb\
          905e0ac480c97375c9ae019eea4b283ede1abf95a4c8aed613f036a744ea9ba7",
        ),
    ];
    for (text, hash, with_session_key, want) in cases {
        let secret = DhChapSecret::parse(text.as_bytes()).unwrap();
        let c: Vec<u8> = (0..hash.digest_len()).map(|i| (7 * i + 1) as u8).collect();
        let shared: Vec<u8> = (0..256usize).map(|i| (i % 251) as u8).collect();
        let session_key = hash.digest(&shared).unwrap();
        let response = Response {
            hash,
            session_key: with_session_key.then_some(&session_key[..]),
            transaction_id: 0x0506,
            sc_c: 0,
        };
        let key = secret.transformed(HOST).unwrap();
        let got = response.compute(&key, (&c, 0x0102_0304), ["HostHost", HOST, SUBSYSTEM]);
        let got: String = got
            .unwrap()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(got, want, "{hash:?} {with_session_key}");
    }
}

#[test]
fn the_groups_are_those_of_rfc_7919() {
    let mut context = BigNumContext::new().unwrap();
    let one = BigNum::from_u32(1).unwrap();
    let two = BigNum::from_u32(2).unwrap();
    for group in &DhGroup::ALL[1..] {
        assert_eq!(prime(group.id()).to_bytes_be().len(), group.value_len());
        assert_eq!(format!("{:X}", prime(group.id())), group.prime_hex());
        // p = 2q + 1. 2 to the q is 1, so that 2 makes the subgroup of order q. q passes Miller and Rabin's
        // test; then p is prime as well: by Pocklington, since 2^(p-1) is 1 and 2^2 - 1 has no factor of p.
        let p = BigNum::from_hex_str(group.prime_hex()).unwrap();
        let mut q = BigNum::new().unwrap();
        q.rshift1(&p).unwrap();
        let mut power = BigNum::new().unwrap();
        power.mod_exp(&two, &q, &p, &mut context).unwrap();
        assert_eq!(power, one, "{group:?}");
        let mut q_less_one = q.to_owned().unwrap();
        q_less_one.sub_word(1).unwrap();
        // q is 3 modulo 4, so that one squaring is all there is to try.
        let mut half = BigNum::new().unwrap();
        half.rshift1(&q_less_one).unwrap();
        assert!(half.is_bit_set(0), "{group:?}");
        for base in [2, 3, 5, 7] {
            let base = BigNum::from_u32(base).unwrap();
            power.mod_exp(&base, &half, &q, &mut context).unwrap();
            assert!(power == one || power == q_less_one, "{group:?}");
        }
    }
}

#[test]
fn what_is_shown_of_an_authentication_has_no_secret() {
    let (mut host, mut target) = pair(1, 1, true, false);
    let mut shown = String::new();
    let config = AuthConfig::new(secret(&target.host), target.controller.as_ref().map(secret));
    shown += &format!("{config:?}");
    target.controller = Some(TargetSecret::new(0, 48, 0x77));
    let error = run(&mut host, &mut target).unwrap_err();
    shown += &format!("{error} {error:?} {:?}", host.next());
    for secret in [&target.host, target.controller.as_ref().unwrap()] {
        let text = secret.text();
        let decimal = format!("{}, {}, {}", secret.key[0], secret.key[1], secret.key[2]);
        assert!(!shown.contains(&text[10..20]) && !shown.contains(&decimal));
        let hex: String = secret.key[..4]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert!(!shown.to_lowercase().contains(&hex));
    }
    assert!(shown.contains("[secret]"));
}
