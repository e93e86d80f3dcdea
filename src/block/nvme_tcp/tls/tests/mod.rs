//! Sessions with OpenSSL's own server, with programs and libraries of others, and with targets that do it
//! wrong; identities and keys as others derive them.

mod derivation;
mod gnutls;
pub(in crate::block::nvme_tcp) mod server;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use foreign_types::ForeignType;
use libc::iovec;
use openssl::ssl::{Ssl, SslContextBuilder, SslMethod, SslSession};

use self::server::{Server, request_key_update};
use super::{Derivation, TlsError, TlsPsk, TlsSession, TlsStream, ffi::PskSession};
use crate::block::nvme_tcp::secret::TlsSecret;

const HOST: &str = "nqn.psk-test-host";
const SUBSYSTEM: &str = "nqn.psk-test-subsys";

/// Keys of 32 and of 48 bytes, from libnvme's tests.
const KEYS: [&str; 2] = [
    "NVMeTLSkey-1:01:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwNf9LrZ:",
    "NVMeTLSkey-1:02:VRLbtnN9AQb2WXW3c9+wEf/DRLz0QuLdbYvEhwtdWwP/w0S89ELi3W2LxIcLXVsDn8kXZQ==:",
];

fn psk(text: &str, derivation: Derivation) -> TlsPsk {
    let secret = TlsSecret::parse(text.as_bytes()).unwrap();
    TlsPsk::derive(&secret, derivation, HOST, SUBSYSTEM).unwrap()
}

/// Two keys of one host and one subsystem.
pub(in crate::block::nvme_tcp) fn psks() -> [TlsPsk; 2] {
    KEYS.map(|text| psk(text, Derivation::Version1))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that differ everywhere.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n ^ (n >> 8) ^ (n >> 16)) as u8).collect()
}

fn echo(mut stream: openssl::ssl::SslStream<TcpStream>) {
    let mut buffer = vec![0; 50_000];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        stream.write_all(&buffer[..count]).unwrap();
    }
}

/// A connection to a server that knows `psk`, and the session on it.
fn session(
    psk: &TlsPsk,
    serve: impl FnOnce(openssl::ssl::SslStream<TcpStream>) + Send + 'static,
) -> (TcpStream, TlsSession, std::thread::JoinHandle<Option<()>>) {
    let (address, thread) = Server::Psk(psk.clone()).start(serve);
    let stream = TcpStream::connect(address).unwrap();
    let session = TlsSession::connect(&stream, psk, soon()).unwrap();
    (stream, session, thread)
}

/// Sends what the session has to send.
fn send(mut stream: &TcpStream, session: &mut TlsSession) {
    while !session.output().is_empty() {
        let count = stream.write(session.output()).unwrap();
        session.sent(count);
    }
}

/// One read of the connection; false at its end.
fn feed(mut stream: &TcpStream, session: &mut TlsSession, most: usize) -> bool {
    let mut buffer = vec![0; most];
    let count = stream.read(&mut buffer).unwrap();
    session.feed(&buffer[..count]);
    count > 0
}

fn read_exact(stream: &TcpStream, session: &mut TlsSession, len: usize) -> Vec<u8> {
    let mut all = vec![0; len];
    let mut done = 0;
    while done < len {
        match session.read(&mut all[done..]).unwrap() {
            0 => assert!(feed(stream, session, 1 << 14)),
            count => done += count,
        }
    }
    all
}

#[test]
fn both_suites_carry_large_transfers_in_odd_pieces() {
    for psk in psks() {
        let (stream, mut session, thread) = session(&psk, echo);
        let data = pattern(3_000_001);
        let mut back = Vec::new();
        let (mut at, mut n) = (0, 0usize);
        while back.len() < data.len() {
            n += 1;
            // Pieces of 1 byte to some records, several of them as one write.
            let count = (n * n * 1237 % 70_000 + 1).min(data.len() - at);
            let (first, second) = data[at..at + count].split_at(count / 3);
            let pieces = [first, &[], second].map(|piece| iovec {
                iov_base: piece.as_ptr().cast_mut().cast(),
                iov_len: piece.len(),
            });
            // SAFETY: the pieces are parts of `data`.
            unsafe { session.write_pieces(&pieces).unwrap() };
            at += count;
            send(&stream, &mut session);
            while back.len() < at {
                let mut parts = [vec![0; n % 13 + 1], vec![0; n * 31 % 40_000 + 1]];
                let pieces = parts.each_mut().map(|part| iovec {
                    iov_base: part.as_mut_ptr().cast(),
                    iov_len: part.len(),
                });
                // SAFETY: the pieces are this loop's own.
                match unsafe { session.read_pieces(&pieces).unwrap() } {
                    0 => assert!(feed(&stream, &mut session, n % 3000 + 1)),
                    count => {
                        let both = parts.concat();
                        back.extend_from_slice(&both[..count]);
                    }
                }
            }
        }
        assert!(back == data, "{}", psk.cipher_suite());
        drop(stream);
        thread.join().unwrap();
    }
}

#[test]
fn a_session_can_move_to_a_worker() {
    fn is_send<T: Send>() {}
    is_send::<TlsSession>();
    is_send::<TlsStream>();
    is_send::<TlsPsk>();
}

#[test]
fn the_cipher_suite_is_that_of_the_key() {
    for (psk, want) in psks()
        .iter()
        .zip(["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"])
    {
        let (address, thread) = Server::Psk(psk.clone())
            .start(|stream| stream.ssl().current_cipher().unwrap().name().to_owned());
        let stream = TcpStream::connect(address).unwrap();
        TlsSession::connect(&stream, psk, soon()).unwrap();
        assert_eq!(thread.join().unwrap().as_deref(), Some(want));
    }
}

#[test]
fn a_wrong_key_and_an_unknown_identity_are_refused() {
    for (text, other) in [
        (
            KEYS[0],
            "NVMeTLSkey-1:01:LFKHx3GLh/WxQ3Qix/hiXhgJO/Ixkvwbye6I1Ys3uH5JBiAx:",
        ),
        (
            KEYS[1],
            "NVMeTLSkey-1:00:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4vcSEgBQ==:",
        ),
    ] {
        // Version 0 has the same identity for all keys; version 1 another for each.
        for derivation in [Derivation::Version0, Derivation::Version1] {
            let (address, thread) = Server::Psk(psk(text, derivation)).start(drop);
            let stream = TcpStream::connect(address).unwrap();
            let error = TlsSession::connect(&stream, &psk(other, derivation), soon()).unwrap_err();
            assert!(matches!(error, TlsError::Refused(_)), "{error:?}");
            assert!(error.is_refusal());
            assert!(
                error.to_string().contains("refused the pre-shared key"),
                "{error}"
            );
            assert!(thread.join().unwrap().is_none());
        }
    }
}

#[test]
fn a_key_of_the_other_suite_is_refused() {
    let (address, thread) = Server::Psk(psks()[0].clone()).start(drop);
    let stream = TcpStream::connect(address).unwrap();
    let error = TlsSession::connect(&stream, &psks()[1], soon()).unwrap_err();
    assert!(matches!(error, TlsError::Refused(_)), "{error:?}");
    assert!(thread.join().unwrap().is_none());
}

#[test]
fn a_server_with_a_certificate_instead_of_the_key_is_refused() {
    let (address, thread) = Server::Certificate.start(drop);
    let stream = TcpStream::connect(address).unwrap();
    let error = TlsSession::connect(&stream, &psks()[0], soon()).unwrap_err();
    assert!(
        matches!(&error, TlsError::Refused(why) if why.contains("certificate")),
        "{error:?}"
    );
    assert!(thread.join().unwrap().is_none());
}

/// A server that sends `bytes` to whatever comes, and closes if it should.
fn rude(bytes: &'static [u8], closes: bool) -> TlsError {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    other.write_all(bytes).unwrap();
    if closes {
        other.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let deadline = match closes {
        true => soon(),
        false => Instant::now() + Duration::from_millis(50),
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(77)))
        .unwrap();
    let error = TlsSession::connect(&stream, &psks()[0], deadline).unwrap_err();
    assert_eq!(
        stream.read_timeout().unwrap(),
        Some(Duration::from_secs(77))
    );
    error
}

#[test]
fn targets_without_tls_are_told_from_those_that_refuse() {
    // A C2HTermReq, an HTTP server, silence, a closed connection, one closed in the middle.
    let error = rude(&[3, 0, 24, 24, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0], true);
    assert!(matches!(error, TlsError::NoTls(_)), "{error:?}");
    let error = rude(b"HTTP/1.1 400 Bad Request\r\n", true);
    assert!(matches!(error, TlsError::NoTls(_)), "{error:?}");
    assert!(matches!(rude(&[], false), TlsError::TimedOut));
    assert!(matches!(rude(&[], true), TlsError::Hangup));
    assert!(matches!(rude(&[0x16, 3, 3, 1], true), TlsError::Hangup));
    // handshake_failure.
    let error = rude(&[0x15, 3, 3, 0, 2, 2, 40], true);
    assert!(
        matches!(&error, TlsError::Refused(why) if why.contains("40")),
        "{error:?}"
    );
    let error = rude(&[0x15, 3, 3, 0, 2, 2, 70], true);
    assert!(matches!(error, TlsError::NoTls(_)), "{error:?}");
}

#[test]
fn a_changed_record_ends_the_session() {
    let psk = &psks()[0];
    // In the header: the type, the length; in the body: the first byte, the tag.
    for (at, bit) in [(0, 1), (4, 1), (5, 0x80), (40, 1), (104, 1), (120, 0x10)] {
        let (stream, mut session, thread) = session(psk, |mut stream| {
            stream.write_all(&pattern(100)).unwrap();
            let _ = stream.read(&mut [0; 8]);
        });
        // The tickets first, then the record of 100 bytes: 5 of header, 100, 1 of type, 16 of tag.
        let mut bytes = Vec::new();
        let record = loop {
            let mut buffer = [0; 4096];
            let count = (&stream).read(&mut buffer).unwrap();
            assert!(count > 0);
            bytes.extend_from_slice(&buffer[..count]);
            let (mut from, mut found) = (0, None);
            while let Some(&[kind, _, _, high, low]) = bytes.get(from..from + 5) {
                let len = 5 + usize::from(u16::from_be_bytes([high, low]));
                if kind == 0x17 && len == 122 && bytes.len() >= from + len {
                    found = Some(from);
                }
                from += len;
            }
            if let Some(found) = found {
                break found;
            }
        };
        bytes[record + at] ^= bit;
        session.feed(&bytes);
        let mut to = [0; 200];
        let error = session.read(&mut to).unwrap_err();
        assert!(matches!(error, TlsError::Record(_)), "{at}: {error:?}");
        assert_eq!(to, [0; 200], "{at}: nothing of it is given out");
        assert!(matches!(session.read(&mut to), Err(TlsError::Dead)));
        assert!(matches!(session.write(&[1]), Err(TlsError::Dead)));
        // The alert tells the target.
        send(&stream, &mut session);
        drop(stream);
        thread.join().unwrap();
    }
}

#[test]
fn a_record_that_is_left_out_is_noticed() {
    let psk = &psks()[1];
    let (stream, mut session, thread) = session(psk, |mut stream| {
        let mut one = [0];
        for n in 0..3 {
            stream.read_exact(&mut one).unwrap();
            stream.write_all(&[n; 50]).unwrap();
        }
        let _ = stream.read(&mut one);
    });
    let next = |session: &mut TlsSession, drops: bool| {
        session.write(&[0]).unwrap();
        send(&stream, session);
        let mut buffer = [0; 4096];
        let count = (&stream).read(&mut buffer).unwrap();
        if !drops {
            session.feed(&buffer[..count]);
        }
    };
    next(&mut session, false);
    assert_eq!(read_exact(&stream, &mut session, 50), [0; 50]);
    next(&mut session, true);
    next(&mut session, false);
    let error = session.read(&mut [0; 50]).unwrap_err();
    assert!(matches!(error, TlsError::Record(_)), "{error:?}");
    drop(stream);
    thread.join().unwrap();
}

#[test]
fn keys_are_updated_by_either_side() {
    for psk in psks() {
        let (stream, mut session, thread) = session(&psk, |mut stream| {
            let mut buffer = vec![0; 40_000];
            for _ in 0..20 {
                stream.read_exact(&mut buffer).unwrap();
                request_key_update(&stream);
                stream.write_all(&buffer).unwrap();
            }
        });
        session.set_records_of_a_key(2);
        let data = pattern(40_000);
        for _ in 0..20 {
            session.write(&data).unwrap();
            // 3 records of 22 bytes more, and at least one KeyUpdate: 5 of header, 5, 1 of type, 16 of tag.
            let more = session.output().len() - data.len();
            assert!(more >= 3 * 22 + 27, "{more}");
            send(&stream, &mut session);
            assert!(read_exact(&stream, &mut session, data.len()) == data);
        }
        drop(stream);
        thread.join().unwrap();
    }
}

#[test]
fn what_came_before_the_end_is_read_first() {
    let psk = &psks()[0];
    let (stream, mut session, thread) = session(psk, |mut stream| {
        stream.write_all(&[7; 1000]).unwrap();
        let _ = stream.shutdown();
    });
    thread.join().unwrap();
    while feed(&stream, &mut session, 4096) {}
    let mut to = [0; 4096];
    assert_eq!(session.read(&mut to).unwrap(), 1000);
    assert!(matches!(session.read(&mut to), Err(TlsError::Closed)));
    assert!(matches!(session.read(&mut to), Err(TlsError::Dead)));
}

#[test]
fn an_alert_of_the_target_is_told() {
    let psk = &psks()[0];
    let (stream, mut session, thread) = session(psk, |mut stream| {
        // The record that comes is no good: OpenSSL answers with bad_record_mac.
        assert!(stream.read(&mut [0; 10]).is_err());
    });
    session.write(&[1; 10]).unwrap();
    let mut bytes = session.output().to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    (&stream).write_all(&bytes).unwrap();
    let error = loop {
        match session.read(&mut [0; 10]) {
            Ok(0) => assert!(feed(&stream, &mut session, 4096)),
            Ok(_) => panic!("there is nothing to read"),
            Err(error) => break error,
        }
    };
    assert!(
        matches!(&error, TlsError::Alert(name) if name.contains("bad record mac")),
        "{error:?}"
    );
    thread.join().unwrap();
}

#[test]
fn closing_tells_the_target() {
    let psk = &psks()[0];
    let (address, thread) = Server::Psk(psk.clone()).start(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).map(|_| all)
    });
    let stream = TcpStream::connect(address).unwrap();
    let mut session = TlsSession::connect(&stream, psk, soon()).unwrap();
    session.write(b"bye").unwrap();
    session.close();
    send(&stream, &mut session);
    assert_eq!(thread.join().unwrap().unwrap().unwrap(), b"bye");
    assert!(matches!(session.write(&[1]), Err(TlsError::Dead)));
}

#[test]
fn a_stream_keeps_its_deadline_and_what_comes_later() {
    let psk = &psks()[1];
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let (address, thread) = Server::Psk(psk.clone()).start(move |mut stream| {
        wait.recv().unwrap();
        stream.write_all(&pattern(100_000)).unwrap();
        let mut back = vec![0; 300_000];
        stream.read_exact(&mut back).unwrap();
        assert!(back == pattern(300_000));
        // No close_notify: the connection just ends.
    });
    let stream = TcpStream::connect(address).unwrap();
    let mut stream = TlsStream::connect(stream, psk, soon()).unwrap();
    stream.set_deadline(Some(Instant::now()));
    let error = stream.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    stream.set_deadline(Some(Instant::now() + Duration::from_millis(20)));
    let error = stream.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    go.send(()).unwrap();
    stream.set_deadline(Some(soon()));
    let mut all = vec![0; 100_000];
    stream.read_exact(&mut all).unwrap();
    assert!(all == pattern(100_000));
    stream.write_all(&pattern(300_000)).unwrap();
    stream.flush().unwrap();
    let error = stream.read(&mut [0; 10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{error}");
    thread.join().unwrap();
}

#[test]
fn nqns_too_long_for_version_0_are_refused() {
    let secret = TlsSecret::parse(KEYS[0].as_bytes()).unwrap();
    let long = "n".repeat(223);
    let error = TlsPsk::derive(&secret, Derivation::Version0, &long, &long).unwrap_err();
    assert!(matches!(error, TlsError::TooLong));
    let psk = TlsPsk::derive(&secret, Derivation::Version1, &long, &long).unwrap();
    // An identity that long still goes into a handshake.
    let (stream, mut session, thread) = session(&psk, echo);
    session.write(&[1, 2, 3]).unwrap();
    send(&stream, &mut session);
    assert_eq!(read_exact(&stream, &mut session, 3), [1, 2, 3]);
    drop(stream);
    thread.join().unwrap();
}

#[test]
fn a_session_talks_to_the_openssl_program() {
    if Command::new("openssl").arg("version").output().is_err() {
        eprintln!("SKIPPED: there is no openssl program");
        return;
    }
    for psk in psks() {
        let mut command = Command::new("openssl");
        command.args([
            "s_server",
            "-accept",
            "127.0.0.1:0",
            "-nocert",
            "-tls1_3",
            "-rev",
        ]);
        command.args(["-psk_identity", psk.identity()]);
        let file = tempfile::NamedTempFile::new().unwrap();
        if psk.key().len() == 32 {
            command.args(["-psk", &hex(psk.key())]);
        } else {
            // The option knows SHA-256 only.
            let context = SslContextBuilder::new(SslMethod::tls_client())
                .unwrap()
                .build();
            let session = PskSession::new(&Ssl::new(&context).unwrap(), &psk).unwrap();
            // SAFETY: the reference is the new value's own.
            let session = unsafe { SslSession::from_ptr(session.reference()) };
            file.as_file()
                .write_all(&pem(&session.to_der().unwrap()))
                .unwrap();
            command.arg("-psk_session").arg(file.path());
        }
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = loop {
            let line = lines.next().expect("the program ended").unwrap();
            if let Some(address) = line.strip_prefix("ACCEPT ") {
                break address.rsplit(':').next().unwrap().parse::<u16>().unwrap();
            }
        };
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut stream = TlsStream::connect(stream, &psk, soon()).unwrap();
        stream.set_deadline(Some(soon()));
        stream.write_all(b"0123456789\n").unwrap();
        let mut back = [0; 11];
        stream.read_exact(&mut back).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(&back, b"9876543210\n");
    }
}

fn pem(der: &[u8]) -> Vec<u8> {
    let base64 = openssl::base64::encode_block(der);
    let mut text = "-----BEGIN SSL SESSION PARAMETERS-----\n".to_owned();
    for line in base64.as_bytes().chunks(64) {
        text += std::str::from_utf8(line).unwrap();
        text.push('\n');
    }
    text += "-----END SSL SESSION PARAMETERS-----\n";
    text.into_bytes()
}

#[test]
fn what_is_shown_of_tls_has_no_key() {
    let mut shown = String::new();
    for (text, psk) in KEYS.iter().zip(psks()) {
        let secret = TlsSecret::parse(text.as_bytes()).unwrap();
        let (stream, session, thread) = session(&psk, echo);
        shown += &format!("{secret:?} {psk:?} {session:?}");
        drop(stream);
        thread.join().unwrap();
        let (address, thread) = Server::Certificate.start(drop);
        let stream = TcpStream::connect(address).unwrap();
        let error = TlsSession::connect(&stream, &psk, soon()).unwrap_err();
        shown += &format!("{error} {error:?}");
        thread.join().unwrap();
        for key in [secret.key(), psk.key()] {
            assert!(!shown.to_lowercase().contains(&hex(&key[..4])));
            assert!(!shown.contains(&format!("{}, {}, {}", key[0], key[1], key[2])));
        }
        assert!(!shown.contains(&text[16..28]));
    }
    assert!(shown.contains("[secret]"));
}
