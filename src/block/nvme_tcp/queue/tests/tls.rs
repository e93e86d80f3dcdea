//! Queues through TLS: another implementation's server stands before the controller.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use openssl::ssl::SslStream;

use super::peer::Peer;
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::tls::TlsSession;
use crate::block::nvme_tcp::tls::tests::psks;
use crate::block::nvme_tcp::tls::tests::server::{Server, request_key_update};

/// A connection to the peer through a TLS server.
pub fn connect(peer: &Peer) -> Wire {
    let [psk, _] = psks();
    let plain = peer.connect();
    let (address, _thread) = Server::Psk(psk).start(move |tls| bridge(tls, plain));
    let stream = TcpStream::connect(address).unwrap();
    let [psk, _] = psks();
    let deadline = Instant::now() + Duration::from_secs(30);
    let session = TlsSession::connect(&stream, &psk, deadline).unwrap();
    Wire::Tls(stream, Box::new(session))
}

/// Waits until one of them can be read, or written to where that is wanted.
fn wait(tls: &TcpStream, write: bool, plain: &TcpStream) {
    let entry = |stream: &TcpStream, events| libc::pollfd {
        fd: stream.as_raw_fd(),
        events,
        revents: 0,
    };
    let out = if write { libc::POLLOUT } else { 0 };
    let more = if write { 0 } else { libc::POLLIN };
    let mut both = [entry(tls, libc::POLLIN | out), entry(plain, more)];
    // SAFETY: two entries, valid through the call.
    unsafe { libc::poll(both.as_mut_ptr(), 2, -1) };
}

fn would_block(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::WouldBlock
}

/// Carries bytes both ways until one side ends.
fn bridge(mut tls: SslStream<TcpStream>, mut plain: TcpStream) {
    tls.get_ref().set_nonblocking(true).unwrap();
    plain.set_nonblocking(true).unwrap();
    let mut buf = vec![0; 64 << 10];
    let (mut rest, mut chunks) = (Vec::new(), 0u32);
    loop {
        // From the host: as much as there is.
        match tls.read(&mut buf) {
            Ok(0) => return,
            Ok(count) => {
                plain.set_nonblocking(false).unwrap();
                if plain.write_all(&buf[..count]).is_err() {
                    return;
                }
                plain.set_nonblocking(true).unwrap();
                continue;
            }
            Err(error) if would_block(&error) => {}
            Err(_) => return,
        }
        if rest.is_empty() {
            match plain.read(&mut buf) {
                Ok(0) => return,
                Ok(count) => {
                    rest.extend_from_slice(&buf[..count]);
                    chunks += 1;
                    if chunks % 8 == 0 {
                        request_key_update(&tls);
                    }
                }
                Err(error) if would_block(&error) => {}
                Err(_) => return,
            }
        }
        if rest.is_empty() {
            wait(tls.get_ref(), false, &plain);
            continue;
        }
        match tls.write(&rest) {
            Ok(count) => drop(rest.drain(..count)),
            Err(error) if would_block(&error) => wait(tls.get_ref(), true, &plain),
            Err(_) => return,
        }
    }
}
