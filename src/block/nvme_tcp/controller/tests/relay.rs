//! Somebody on the wire: PDUs go through, and a test sees and changes them on their way.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// Where a PDU comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Host,
    Controller,
}

/// Stands before `target`, without digests. `on` sees each PDU, whole, of all connections.
pub fn relay(
    target: SocketAddr,
    on: impl FnMut(Side, &mut Vec<u8>) + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let on = Arc::new(Mutex::new(on));
    thread::spawn(move || {
        while let Ok((host, _)) = listener.accept() {
            let Ok(controller) = TcpStream::connect(target) else {
                continue;
            };
            for (from, source, sink) in [
                (Side::Host, &host, &controller),
                (Side::Controller, &controller, &host),
            ] {
                let (source, sink) = (source.try_clone().unwrap(), sink.try_clone().unwrap());
                let on = on.clone();
                thread::spawn(move || {
                    carry(source, &sink, |pdu| (on.lock().unwrap())(from, pdu));
                    let _ = sink.shutdown(Shutdown::Both);
                });
            }
        }
    });
    address
}

fn carry(mut source: TcpStream, mut sink: &TcpStream, mut on: impl FnMut(&mut Vec<u8>)) {
    loop {
        let mut pdu = vec![0; 8];
        if source.read_exact(&mut pdu).is_err() {
            return;
        }
        let length = u32::from_le_bytes(pdu[4..8].try_into().unwrap());
        pdu.resize(length.max(8) as usize, 0);
        if source.read_exact(&mut pdu[8..]).is_err() {
            return;
        }
        on(&mut pdu);
        if sink.write_all(&pdu).is_err() {
            return;
        }
    }
}
