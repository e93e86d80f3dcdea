//! Controllers that send without end.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;
use crate::block::nvme_tcp::controller::channel::Channel;
use crate::block::nvme_tcp::controller::dial;
use crate::block::nvme_tcp::controller::transport::{Transport, Wishes};
use crate::block::nvme_tcp::controller::trouble::Trouble;
use crate::block::nvme_tcp::controller::wait::Patience;
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::wire::Sqe;

/// A controller that takes the connection (ICReq, ICResp) and answers the first command with `pdu`, again and again
/// until it is not listened to any more.
fn sending(pdu: Vec<u8>) -> (SocketAddr, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let serve = move |mut stream: TcpStream| -> std::io::Result<()> {
        stream.read_exact(&mut [0; 128])?;
        let mut answer = [0; 128];
        // ICResp (TCP section 3.6.2.3): HLEN and PLEN 128, MAXH2CDATA 4096.
        answer[..8].copy_from_slice(&[1, 0, 128, 0, 128, 0, 0, 0]);
        answer[12..16].copy_from_slice(&4096_u32.to_le_bytes());
        stream.write_all(&answer)?;
        stream.read_exact(&mut [0; 72])?;
        loop {
            stream.write_all(&pdu)?;
        }
    };
    let thread = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let _ended = serve(stream);
    });
    (address, thread)
}

/// Connects to such a controller, and asks for a log page.
fn ask(pdu: Vec<u8>, patience: Duration) -> Trouble {
    let (address, thread) = sending(pdu);
    let deadline = Instant::now() + PATIENCE;
    let stream = dial::connect(&[address], deadline, &mut Patience).unwrap();
    let wishes = Wishes {
        header_digest: false,
        data_digest: false,
    };
    let wire = Wire::Plain(stream);
    let transport = Transport::initialize(wire, wishes, deadline, &mut Patience).unwrap();
    let mut channel = Channel::new(transport);
    let sqe = Sqe::get_log_page(2, u32::MAX, 0, 512, false, 0);
    let deadline = Instant::now() + patience;
    let trouble = channel
        .run_for(sqe, 512, deadline, &mut Patience)
        .unwrap_err();
    drop(channel);
    thread.join().unwrap();
    trouble
}

/// A C2HData of the first command (CID 1) with `data`.
fn c2h_data(data: &[u8]) -> Vec<u8> {
    let mut pdu = vec![7, 0, 24, 24];
    pdu.extend((24 + data.len() as u32).to_le_bytes());
    pdu.extend([1, 0, 0, 0]);
    pdu.extend(0_u32.to_le_bytes());
    pdu.extend((data.len() as u32).to_le_bytes());
    pdu.extend([0; 4]);
    pdu.extend(data);
    pdu
}

fn text(trouble: Trouble) -> String {
    match trouble {
        Trouble::Failed(failure) => failure.text,
        Trouble::Closed => "closed".to_owned(),
    }
}

#[test]
fn data_without_bytes_are_refused() {
    let why = text(ask(c2h_data(&[]), Duration::from_secs(2)));
    assert!(why.contains("no data in it"), "{why}");
}
