//! TLS 1.3 with pre-shared keys: the keys are derived here by hand, the handshake is OpenSSL's on both sides.

mod host;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use host::{Ask, HOST_NQN, Host, NQN, rw};
use openssl::base64::encode_block;
use openssl::ssl::{Ssl, SslContext, SslMethod, SslStream, SslVersion};
use sha2::Sha256;
use virtioblkd_test_target::{DISCOVERY_NQN, PortSpec, Target, TlsFault, TlsOptions};

/// 32 zero bytes and their CRC-32; 00: used as it is, 01: transformed by SHA-256.
const RETAINED: &str = "NVMeTLSkey-1:00:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACtVQoZ:";
const CONFIGURED: &str = "NVMeTLSkey-1:01:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAACtVQoZ:";

fn hmac(key: &[u8], data: &[u8]) -> Vec<u8> {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).unwrap();
    mac.update(data);
    mac.finalize().into_bytes().to_vec()
}

/// HKDF-Expand-Label of HKDF-Extract, 32 bytes of SHA-256.
fn derive(key: &[u8], label: &str, context: &str) -> Vec<u8> {
    let mut info = vec![0, 32, label.len() as u8];
    info.extend_from_slice(label.as_bytes());
    info.push(context.len() as u8);
    info.extend_from_slice(context.as_bytes());
    info.push(1);
    hmac(&hmac(&[0; 32], key), &info)
}

/// The identity and the key of version 0, of a retained PSK.
fn version0(retained: &[u8], nqn: &str) -> (String, Vec<u8>) {
    let identity = format!("NVMe0R01 {HOST_NQN} {nqn}");
    let key = derive(retained, "tls13 nvme-tls-psk", &identity);
    (identity, key)
}

/// The same of version 1.
fn version1(retained: &[u8], nqn: &str) -> (String, Vec<u8>) {
    let digest = encode_block(&hmac(
        retained,
        format!("{HOST_NQN} {nqn} NVMe-over-Fabrics").as_bytes(),
    ));
    let key = derive(retained, "tls13 nvme-tls-psk", &format!("01 {digest}"));
    (format!("NVMe1R01 {HOST_NQN} {nqn} {digest}"), key)
}

fn target(tls: TlsOptions) -> Target {
    Target::builder()
        .port(PortSpec::loopback().with(|t| t.tls = Some(tls)))
        .start()
        .unwrap()
}

fn dial(
    target: &Target,
    (identity, key): (String, Vec<u8>),
) -> Result<SslStream<TcpStream>, String> {
    let mut context = SslContext::builder(SslMethod::tls_client()).unwrap();
    context
        .set_min_proto_version(Some(SslVersion::TLS1_3))
        .unwrap();
    context.set_psk_client_callback(move |_, _, id, psk| {
        id[..identity.len()].copy_from_slice(identity.as_bytes());
        id[identity.len()] = 0;
        psk[..key.len()].copy_from_slice(&key);
        Ok(key.len())
    });
    let socket = TcpStream::connect(target.address()).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    let ssl = Ssl::new(&context.build()).unwrap();
    ssl.connect(socket).map_err(|e| e.to_string())
}

/// Connect after ICReq: the whole of its completion.
fn connect(stream: &mut SslStream<TcpStream>, qid: u16, cntlid: u16, nqn: &str) -> [u8; 24] {
    stream.write_all(&Host::ic_req(Ask::default())).unwrap();
    stream.read_exact(&mut [0; 128]).unwrap();
    let mut b = vec![0; 72 + 1024];
    b[..8].copy_from_slice(&[4, 0, 72, 72, 0x48, 4, 0, 0]);
    b[8] = 0x7f;
    b[9] = 0x40;
    b[12] = 1;
    b[8 + 32..8 + 36].copy_from_slice(&1024u32.to_le_bytes());
    b[8 + 39] = 1;
    b[8 + 42..8 + 44].copy_from_slice(&qid.to_le_bytes());
    b[8 + 44] = 31;
    b[8 + 46] = 4;
    let data = &mut b[72..];
    data[16..18].copy_from_slice(&cntlid.to_le_bytes());
    data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
    data[512..512 + HOST_NQN.len()].copy_from_slice(HOST_NQN.as_bytes());
    stream.write_all(&b).unwrap();
    let mut resp = [0; 24];
    stream.read_exact(&mut resp).unwrap();
    resp
}

fn ok(resp: &[u8; 24]) -> bool {
    resp[0] == 5 && resp[22..] == [0, 0]
}

#[test]
fn queues_work_over_tls_with_either_version_of_the_identity() {
    let retained = derive(&[0; 32], "tls13 HostNQN", HOST_NQN);
    for (text, psk) in [(RETAINED, vec![0; 32]), (CONFIGURED, retained)] {
        for derived in [version0, version1] {
            let target = target(TlsOptions::new(text));
            let mut admin = dial(&target, derived(&psk, NQN)).unwrap();
            assert_eq!(admin.ssl().version_str(), "TLSv1.3");
            let resp = connect(&mut admin, 0, 0xffff, NQN);
            assert!(ok(&resp));
            // Property Set of CC.
            let mut b = [0; 72];
            b[..5].copy_from_slice(&[4, 0, 72, 0, 72]);
            b[8] = 0x7f;
            b[9] = 0x40;
            b[8 + 44] = 0x14;
            b[8 + 48..8 + 52].copy_from_slice(&0x0046_0001u32.to_le_bytes());
            admin.write_all(&b).unwrap();
            let mut done = [0; 24];
            admin.read_exact(&mut done).unwrap();
            assert!(ok(&done));
            let mut io = dial(&target, derived(&psk, NQN)).unwrap();
            assert!(ok(&connect(
                &mut io,
                1,
                u16::from_le_bytes([resp[8], resp[9]]),
                NQN
            )));
            let namespace = target.subsystem(0).namespace(1).unwrap();
            let pattern: Vec<u8> = (0..1 << 20).map(|i| (i / 7) as u8).collect();
            namespace.write(0, &pattern);
            // Many records at once both ways: eight reads of 128 KiB in one write.
            let mut batch = Vec::new();
            for cid in 0..8 {
                batch.extend_from_slice(&[4, 0, 72, 0, 72, 0, 0, 0]);
                batch.extend_from_slice(&rw(2, cid, 1, u64::from(cid) * 256, 256, 128 << 10));
            }
            io.write_all(&batch).unwrap();
            for cid in 0..8 {
                let mut pdu = vec![0; 24 + (128 << 10)];
                io.read_exact(&mut pdu).unwrap();
                assert!(pdu[24..] == pattern[cid << 17..(cid + 1) << 17]);
            }
            assert_eq!(target.violations(), Vec::<String>::new());
        }
    }
}

#[test]
fn another_key_or_identity_ends_the_handshake() {
    let target = target(TlsOptions::new(RETAINED));
    dial(&target, version0(&[1; 32], NQN)).unwrap_err();
    dial(&target, version1(&[1; 32], NQN)).unwrap_err();
    dial(&target, (format!("NVMe0R07 {HOST_NQN} {NQN}"), vec![0; 32])).unwrap_err();
    dial(&target, version0(&[0; 32], NQN)).unwrap();
    // A host that does not speak TLS gets nothing that looks like ICResp.
    let mut plain = Host::dial(target.address());
    plain
        .stream
        .write_all(&Host::ic_req(Ask::default()))
        .unwrap();
    assert_ne!(plain.rest().first(), Some(&1));
}

#[test]
fn connect_has_to_name_whom_the_identity_names() {
    let target = target(TlsOptions::new(RETAINED));
    let mut stream = dial(&target, version0(&[0; 32], DISCOVERY_NQN)).unwrap();
    let resp = connect(&mut stream, 0, 0xffff, NQN);
    // Connect Invalid Host, 1/84h.
    assert_eq!(u16::from_le_bytes([resp[22], resp[23]]) >> 1 & 0x7ff, 0x184);
}

#[test]
fn tls_goes_wrong_as_told() {
    let wrong = TlsOptions {
        fault: Some(TlsFault::WrongKey),
        ..TlsOptions::new(RETAINED)
    };
    dial(&target(wrong), version0(&[0; 32], NQN)).unwrap_err();
    let hangs = TlsOptions {
        fault: Some(TlsFault::Hang),
        ..TlsOptions::new(RETAINED)
    };
    let target = target(hangs);
    let mut host = Host::dial(target.address());
    host.stream.write_all(&[0x16, 3, 1]).unwrap();
    host.stream
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    host.stream.read_exact(&mut [0]).unwrap_err();
    host.stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    drop(target);
    assert!(host.rest().is_empty());
}
