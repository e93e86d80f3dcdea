//! In-band authentication, with the host's side computed by hand.

mod host;

use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use host::{Ask, HOST_NQN, Host, NQN, Pdu, sqe};
use num_bigint::BigUint;
use sha2::{Digest, Sha256, Sha384};
use virtioblkd_test_target::{
    AuthFault, AuthOptions, Group, Hash, NamespaceSpec, SubsystemSpec, Target,
};

/// 32 zero bytes and their CRC-32, used as they are; the second is transformed by SHA-384.
const SECRET: &str = "DHHC-1:00:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACtVQoZ:";
const TRANSFORMED: &str = "DHHC-1:02:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACtVQoZ:";

/// The prime of ffdhe2048 (RFC 7919, appendix A.1).
const FFDHE2048: &str = "\
    ffffffffffffffffadf85458a2bb4a9aafdc5620273d3cf1d8b9c583ce2d3695a9e13641146433fbcc939dce249b3ef9\
    7d2fe363630c75d8f681b202aec4617ad3df1ed5d5fd65612433f51f5f066ed0856365553ded1af3b557135e7f57c935\
    984f0c70e0e68b77e2a689daf3efe8721df158a136ade73530acca4f483a797abc0ab182b324fb61d108a94bb2c8e3fb\
    b96adab760d7f4681d4f42a3de394df4ae56ede76372bb190b07a7c8ee0a6d709e02fce1cdf7e2ecc03404cd28342f61\
    9172fe9ce98583ff8e4f1232eef28183c3fe3b1b4c6fad733bb5fcbc2ec22005c58ef1837d1683b2c6f34a26c1b2effa\
    886b423861285c97ffffffffffffffff";

fn hmac256(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).unwrap();
    mac.update(data);
    mac.finalize().into_bytes().to_vec()
}

fn hmac384(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut mac = <Hmac<Sha384> as KeyInit>::new_from_slice(key).unwrap();
    mac.update(data);
    mac.finalize().into_bytes().to_vec()
}

fn target(auth: AuthOptions) -> Target {
    let subsystem = SubsystemSpec::new(NQN).namespace(NamespaceSpec::new(1, 1 << 20));
    Target::builder()
        .subsystem(subsystem.with(|o| o.auth = Some(auth)))
        .start()
        .unwrap()
}

fn auth_sqe(fctype: u8, cid: u16, len: u32, in_capsule: bool) -> [u8; 64] {
    let mut e = sqe(0x7f, cid, 0, len);
    e[4] = fctype;
    e[39] = if in_capsule { 0x01 } else { 0x5a };
    // SPSP0, SPSP1, SECP, and the length again.
    e[41..44].copy_from_slice(&[1, 1, 0xe9]);
    e[44..48].copy_from_slice(&len.to_le_bytes());
    e
}

fn auth_send(host: &mut Host, message: &[u8]) -> Pdu {
    let e = auth_sqe(5, host.cid(), message.len() as u32, true);
    host.send(&e, message);
    host.recv_checked()
}

fn auth_receive(host: &mut Host) -> Vec<u8> {
    let e = auth_sqe(6, host.cid(), 4096, false);
    let (data, resp) = host.fetch(&e);
    assert!(resp.unwrap().ok());
    data
}

/// AUTH_Negotiate of transaction 9 with one descriptor.
fn negotiate(hashes: &[u8], groups: &[u8]) -> Vec<u8> {
    let mut m = vec![0; 72];
    m[4] = 9;
    m[7] = 1;
    m[8] = 1;
    m[10] = hashes.len() as u8;
    m[11] = groups.len() as u8;
    m[12..12 + hashes.len()].copy_from_slice(hashes);
    m[42..42 + groups.len()].copy_from_slice(groups);
    m
}

/// DH-HMAC-CHAP_Reply of transaction 9.
fn reply(response: &[u8], challenge: Option<&[u8]>, sequence: u32, exponential: &[u8]) -> Vec<u8> {
    let mut m = vec![
        1,
        2,
        0,
        0,
        9,
        0,
        response.len() as u8,
        0,
        u8::from(challenge.is_some()),
        0,
    ];
    m.extend_from_slice(&(exponential.len() as u16).to_le_bytes());
    m.extend_from_slice(&sequence.to_le_bytes());
    m.extend_from_slice(response);
    m.extend_from_slice(challenge.unwrap_or(&vec![0; response.len()]));
    m.extend_from_slice(exponential);
    m
}

/// What a response is the HMAC of.
fn signed(challenge: &[u8], sequence: &[u8], role: &[u8], first: &str, second: &str) -> Vec<u8> {
    [
        challenge,
        sequence,
        &[9, 0],
        &[0],
        role,
        first.as_bytes(),
        &[0],
        second.as_bytes(),
    ]
    .concat()
}

/// A queue that has to authenticate, and the challenge by SHA-256 and without a group.
fn challenged(target: &Target) -> (Host, Vec<u8>) {
    let mut host = Host::initialized(target.address(), Ask::default());
    let resp = host.connect(0, 0xffff, 31, 0, NQN);
    assert!(resp.ok());
    assert_eq!(resp.u16(10), 2, "AUTHREQ: ATR");
    assert!(auth_send(&mut host, &negotiate(&[3, 1], &[0])).ok());
    let challenge = auth_receive(&mut host);
    (host, challenge)
}

fn response256(challenge: &[u8], key: &[u8]) -> Vec<u8> {
    hmac256(
        key,
        &signed(
            &challenge[16..48],
            &challenge[12..16],
            b"HostHost",
            HOST_NQN,
            NQN,
        ),
    )
}

#[test]
fn a_host_that_knows_the_secret_is_let_in() {
    let target = target(AuthOptions::new(SECRET));
    let mut host = Host::initialized(target.address(), Ask::default());
    let resp = host.connect(0, 0xffff, 31, 0, NQN);
    let cntlid = resp.u16(8);
    assert_eq!(
        host.property_get(0, true).status(),
        (1, 0x91, true),
        "not before it is authenticated"
    );
    assert!(auth_send(&mut host, &negotiate(&[3, 1], &[0])).ok());
    let c = auth_receive(&mut host);
    // Type, id, transaction, HL, hash, group, DHVLEN.
    assert_eq!(
        (c[0], c[1], c[4], c[6], c[8], c[9], c[10]),
        (1, 1, 9, 32, 1, 0, 0)
    );
    assert_ne!(c[12..16], [0; 4], "sequence number");
    assert!(auth_send(&mut host, &reply(&response256(&c, &[0; 32]), None, 0, &[])).ok());
    let success = auth_receive(&mut host);
    assert_eq!(success[..9], [1, 3, 0, 0, 9, 0, 32, 0, 0]);
    assert!(host.property_set(0x14, 0x0046_0001).ok());
    // An I/O queue has to authenticate as well.
    let mut io = Host::initialized(target.address(), Ask::default());
    let resp = io.connect(1, cntlid, 31, 0, NQN);
    assert!(resp.ok() && resp.u16(10) == 2);
    assert_eq!(io.read(0, 1, 512).1.unwrap().status(), (1, 0x91, true));
    let m = negotiate(&[1], &[0]);
    // By R2T this time.
    let e = auth_sqe(5, 60, m.len() as u32, false);
    io.send(&e, &[]);
    let r2t = io.recv_checked();
    io.h2c_data(60, r2t.u16(10), 0, &m);
    assert!(io.recv_checked().ok());
    let c = auth_receive(&mut io);
    assert!(auth_send(&mut io, &reply(&response256(&c, &[0; 32]), None, 0, &[])).ok());
    assert_eq!(auth_receive(&mut io)[1], 3);
    assert_eq!(io.read(0, 1, 512).0, [0; 512]);
    assert_eq!(target.violations(), Vec::<String>::new());
}

#[test]
fn a_host_with_another_secret_is_told_so() {
    let target = target(AuthOptions::new(SECRET));
    let (mut host, c) = challenged(&target);
    assert!(auth_send(&mut host, &reply(&response256(&c, &[1; 32]), None, 0, &[])).ok());
    assert_eq!(auth_receive(&mut host)[..8], [0, 0xf1, 0, 0, 9, 0, 1, 1]);
    assert_eq!(host.property_get(0, true).status(), (1, 0x91, true));
}

#[test]
fn both_sides_authenticate_over_a_group() {
    let target = target(AuthOptions {
        controller_secret: Some(TRANSFORMED.into()),
        hashes: vec![Hash::Sha384],
        groups: vec![Group::Ffdhe2048],
        ..AuthOptions::new(TRANSFORMED)
    });
    let mut host = Host::initialized(target.address(), Ask::default());
    host.connect(0, 0xffff, 31, 0, NQN);
    assert!(auth_send(&mut host, &negotiate(&[1, 2, 3], &[0, 1, 2])).ok());
    let c = auth_receive(&mut host);
    assert_eq!(
        (c[6], c[8], c[9], u16::from_le_bytes([c[10], c[11]])),
        (48, 2, 1, 256)
    );
    let p = BigUint::parse_bytes(FFDHE2048.as_bytes(), 16).unwrap();
    let y = BigUint::from(0x1234_5678_9abc_def0_u64);
    let pad = |n: BigUint| {
        let b = n.to_bytes_be();
        [vec![0; 256 - b.len()], b].concat()
    };
    let shared = pad(BigUint::from_bytes_be(&c[64..320]).modpow(&y, &p));
    let exponential = pad(BigUint::from(2u8).modpow(&y, &p));
    let session = Sha384::digest(&shared);
    let key = |nqn: &str| hmac384(&[0; 32], &[nqn.as_bytes(), b"NVMe-over-Fabrics"].concat());
    let augmented = hmac384(&session, &c[16..64]);
    let response = hmac384(
        &key(HOST_NQN),
        &signed(&augmented, &c[12..16], b"HostHost", HOST_NQN, NQN),
    );
    let m = reply(&response, Some(&[5; 48]), 77, &exponential);
    assert!(auth_send(&mut host, &m).ok());
    let s = auth_receive(&mut host);
    let mine = hmac384(&session, &[5; 48]);
    let expected = hmac384(
        &key(NQN),
        &signed(&mine, &[77, 0, 0, 0], b"Controller", NQN, HOST_NQN),
    );
    assert_eq!((s[1], s[6], s[8]), (3, 48, 1));
    assert_eq!(s[16..64], expected);
    let mut success2 = vec![0; 16];
    success2[..5].copy_from_slice(&[1, 4, 0, 0, 9]);
    assert!(auth_send(&mut host, &success2).ok());
    assert!(host.property_get(0, true).ok());
}

#[test]
fn what_a_host_offers_or_says_wrong_is_explained() {
    let target = target(AuthOptions::new(SECRET));
    let explain = |message: &[u8]| {
        let mut host = Host::initialized(target.address(), Ask::default());
        host.connect(0, 0xffff, 31, 0, NQN);
        assert!(auth_send(&mut host, message).ok());
        let m = auth_receive(&mut host);
        (m[1], m[6], m[7])
    };
    assert_eq!(explain(&negotiate(&[3], &[0])), (0xf1, 1, 4), "hash");
    assert_eq!(explain(&negotiate(&[1], &[5])), (0xf1, 1, 5), "group");
    assert_eq!(
        explain(&negotiate(&[1], &[0])[..40]),
        (0xf1, 1, 6),
        "payload"
    );
    assert_eq!(
        explain(&reply(&[0; 32], None, 0, &[])),
        (0xf1, 1, 7),
        "message"
    );
    let (mut host, c) = challenged(&target);
    let mut m = reply(&response256(&c, &[0; 32]), None, 0, &[]);
    m[6] = 200;
    assert!(auth_send(&mut host, &m).ok());
    assert_eq!(auth_receive(&mut host)[7], 6, "HL");
}

#[test]
fn authentication_goes_wrong_as_told() {
    let first = |fault| {
        let target = target(AuthOptions {
            fault: Some(fault),
            ..AuthOptions::new(SECRET)
        });
        challenged(&target).1
    };
    assert_eq!(
        first(AuthFault::FailInsteadOfChallenge(1, 2))[..8],
        [0, 0xf1, 0, 0, 9, 0, 1, 2]
    );
    assert_eq!(first(AuthFault::ChallengeHashLength(48))[6], 48);
    assert_eq!(first(AuthFault::ChallengeHash(9))[8], 9);
    assert_eq!(first(AuthFault::ChallengeGroup(7))[9], 7);
    assert_eq!(
        first(AuthFault::ChallengeTooShort(5000))[10..12],
        5000u16.to_le_bytes()
    );
    assert_eq!(first(AuthFault::WrongTransaction)[4..6], [0xf6, 0xff]);
    assert_eq!(first(AuthFault::WrongMessage(0x33))[1], 0x33);
    let second = |fault| {
        let options = AuthOptions {
            controller_secret: Some(SECRET.into()),
            ..AuthOptions::new(SECRET)
        };
        let target = target(AuthOptions {
            fault: Some(fault),
            ..options
        });
        let (mut host, c) = challenged(&target);
        let m = reply(&response256(&c, &[0; 32]), Some(&[5; 32]), 3, &[]);
        assert!(auth_send(&mut host, &m).ok());
        let right = hmac256(
            &[0; 32],
            &signed(&[5; 32], &[3, 0, 0, 0], b"Controller", NQN, HOST_NQN),
        );
        (auth_receive(&mut host), right)
    };
    assert_eq!(second(AuthFault::FailInsteadOfSuccess(1, 1)).0[1], 0xf1);
    let (m, right) = second(AuthFault::WrongResponse);
    assert!(m[8] == 1 && m[16..48] != right);
    assert_eq!(second(AuthFault::NoResponse).0[8], 0);
    // Never answered, until it is aborted or the target ends.
    let target = target(AuthOptions {
        fault: Some(AuthFault::HangAtChallenge),
        ..AuthOptions::new(SECRET)
    });
    let mut host = Host::initialized(target.address(), Ask::default());
    host.connect(0, 0xffff, 31, 0, NQN);
    assert!(auth_send(&mut host, &negotiate(&[1], &[0])).ok());
    host.send(&auth_sqe(6, 50, 4096, false), &[]);
    drop(target);
    assert!(host.rest().is_empty());
}
