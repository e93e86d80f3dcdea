//! PDUs over a connection that does not block, one at a time: what the admin queue and the beginnings of I/O
//! queues need. A path's thread runs it, not a worker.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::trouble::{Result, later, never};
use super::wait::{Patience, Waiter, Want};
use crate::block::error::ErrorKind;
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::machine::QueueParams;
use crate::block::nvme_tcp::tls::{TlsError, TlsSession};
use crate::block::nvme_tcp::wire::digest::{crc32c, digest};
use crate::block::nvme_tcp::wire::pdu::{
    Agreed, CAPSULE_CMD_HEADER, COMMON_HEADER, CapsuleCmd, CommonHeader, IC_PDU, ICReq, ICResp,
    Layout, MAX_TERM_REQ, PduType, TERM_REQ_HEADER, TermReq,
};
use crate::block::nvme_tcp::wire::{ProtocolError, Sqe, Violation};

/// Bytes of data that one command of ours brings, at most.
pub(crate) const MAX_DATA: u32 = 64 << 10;
/// Bytes of a PDU that comes, at most: data, header, padding and digests.
const MAX_PDU: u32 = MAX_DATA + 1024;
/// Bytes read at a time.
const PIECE: usize = 16 << 10;
/// How long the other side gets to take a termination request before the connection is closed.
const FAREWELL: Duration = Duration::from_millis(200);
/// R2Ts that a command of an I/O queue may have outstanding, less one (MAXR2T).
const MAX_R2T: u32 = 15;

/// A connection on which PDUs are exchanged.
#[derive(Debug)]
pub(crate) struct Transport {
    wire: Wire,
    input: Vec<u8>,
    begin: usize,
    /// How PDUs of the controller look.
    incoming: Agreed,
    /// How ours look.
    outgoing: Agreed,
    max_h2c_data: u32,
}

/// A PDU that came.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) layout: Layout,
    pub(crate) flags: u8,
    pub(crate) header: [u8; 24],
    pub(crate) data: Vec<u8>,
    /// False if the data digest does not fit the data.
    pub(crate) intact: bool,
}

/// What is asked of the transport.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wishes {
    pub(crate) header_digest: bool,
    pub(crate) data_digest: bool,
}

impl Transport {
    /// Initializes a connection (TCP section 3.4.2): ICReq and ICResp.
    pub(crate) fn initialize(
        wire: Wire,
        wishes: Wishes,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Self> {
        let plain = Agreed {
            header_digest: false,
            data_digest: false,
            alignment: 4,
        };
        let mut transport = Self {
            wire,
            input: Vec::new(),
            begin: 0,
            incoming: plain,
            outgoing: plain,
            max_h2c_data: 0,
        };
        let request = ICReq {
            hpda: 0,
            header_digest: wishes.header_digest,
            data_digest: wishes.data_digest,
            max_r2t: MAX_R2T,
        };
        transport.send(&request.encode(), deadline, waiter)?;
        let bytes = transport.response_of_handshake(deadline, waiter)?;
        let response = ICResp::decode(&bytes, &request)
            .map_err(|error| transport.violated(&error).during("ICResp"))?;
        for (asked, given, what) in [
            (
                wishes.header_digest,
                response.header_digest,
                "header digests",
            ),
            (wishes.data_digest, response.data_digest, "data digests"),
        ] {
            if asked && !given {
                return Err(never(
                    ErrorKind::Unsupported,
                    format!(
                        "the controller does not agree to {what}; switch them on there, or off here"
                    ),
                ));
            }
        }
        let agreed = |alignment| Agreed {
            header_digest: response.header_digest,
            data_digest: response.data_digest,
            alignment,
        };
        transport.incoming = agreed(4);
        transport.outgoing = agreed(response.host_pdu_alignment());
        transport.max_h2c_data = response.max_h2c_data;
        Ok(transport)
    }

    /// The 128 bytes that should be an ICResp. A termination request is shorter; then the rest is zero.
    fn response_of_handshake(
        &mut self,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<[u8; IC_PDU]> {
        let mut want = COMMON_HEADER;
        loop {
            let have = &self.input[self.begin..];
            if have.len() >= COMMON_HEADER && want == COMMON_HEADER {
                want = IC_PDU;
                if have[0] == PduType::C2HTermReq as u8 {
                    let plen = u32::from_le_bytes([have[4], have[5], have[6], have[7]]) as usize;
                    want = plen.clamp(TERM_REQ_HEADER, MAX_TERM_REQ).min(IC_PDU);
                } else if have[0] != PduType::ICResp as u8 {
                    // Whatever it is, the rest of it may never come. TLS alerts begin with 15h.
                    let hint = match have[0] {
                        0x15 => "the controller answers with TLS; give its key (tls-key)",
                        _ => "is this the port of an NVMe/TCP controller, without TLS?",
                    };
                    let mut bytes = [0; IC_PDU];
                    let len = have.len().min(IC_PDU);
                    bytes[..len].copy_from_slice(&have[..len]);
                    let violation = Violation::UnknownType(bytes[0]);
                    let violation =
                        PduType::from_number(bytes[0]).map_or(violation, Violation::UnexpectedType);
                    let error = ProtocolError::new(violation, &bytes[..len]);
                    return Err(later(format!("{error}; {hint}")).during("instead of ICResp"));
                }
            }
            if have.len() >= want && want > COMMON_HEADER {
                let mut bytes = [0; IC_PDU];
                bytes[..want].copy_from_slice(&have[..want]);
                self.begin += want;
                return Ok(bytes);
            }
            let silent = have.is_empty() && matches!(self.wire, Wire::Plain(_));
            let filled = self.fill().map_err(|trouble| match silent {
                true => {
                    trouble.with("one that wants TLS does so; if it does, give its key (tls-key)")
                }
                false => trouble,
            });
            if !filled? {
                self.until_readable(deadline, waiter)
                    .map_err(|trouble| trouble.during("waiting for ICResp"))?;
            }
        }
    }

    /// What both sides agreed on. `in_capsule` is what the controller takes in capsules of I/O commands.
    pub(crate) fn params(&self, depth: u16, in_capsule: u32) -> QueueParams {
        QueueParams {
            depth,
            header_digest: self.outgoing.header_digest,
            data_digest: self.outgoing.data_digest,
            host_pdu_alignment: self.outgoing.alignment,
            controller_pdu_alignment: self.incoming.alignment,
            max_h2c_data: self.max_h2c_data,
            in_capsule,
            max_r2t: MAX_R2T + 1,
        }
    }

    /// The connection, for somebody else to use.
    pub(crate) fn into_wire(mut self) -> Result<Wire> {
        if self.begin != self.input.len() {
            let bytes = &self.input[self.begin..];
            let kind = PduType::from_number(bytes[0]);
            let violation =
                kind.map_or(Violation::UnknownType(bytes[0]), Violation::UnexpectedType);
            let error = ProtocolError::new(violation, &[]);
            return Err(self.violated(&error));
        }
        Ok(self.wire)
    }

    /// Where the controller is.
    pub(crate) fn peer(&self) -> io::Result<SocketAddr> {
        self.wire.socket().peer_addr()
    }

    /// Its descriptor, to wait for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wire.socket().as_fd()
    }

    /// Sends all of `bytes`.
    pub(crate) fn send(
        &mut self,
        mut bytes: &[u8],
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<()> {
        loop {
            let sent = match bytes.is_empty() {
                true => self.wire.flush().map(|()| 0),
                false => self.wire.write(bytes),
            };
            match sent {
                Ok(_) if bytes.is_empty() => return Ok(()),
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let ready = waiter.wait(Want::Write(self.wire.socket().as_fd()), deadline)?;
                    if !ready && Instant::now() >= deadline {
                        return Err(later("the controller takes no more data: timed out"));
                    }
                }
                Err(error) => return Err(later(format!("send: {error}"))),
            }
        }
    }

    /// Sends a command, with its data in the capsule.
    pub(crate) fn send_command(
        &mut self,
        sqe: Sqe,
        data: &[u8],
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<()> {
        let agreed = self.outgoing;
        let capsule = CapsuleCmd {
            sqe,
            data_len: data.len() as u32,
        };
        let header = capsule.encode(&agreed);
        let mut bytes = Vec::with_capacity(CAPSULE_CMD_HEADER + 128 + data.len());
        bytes.extend(header);
        if agreed.header_digest {
            bytes.extend(digest(&header));
        }
        if !data.is_empty() {
            bytes.resize(agreed.data_offset(CAPSULE_CMD_HEADER), 0);
            bytes.extend(data);
            if agreed.data_digest {
                bytes.extend(digest(data));
            }
        }
        self.send(&bytes, deadline, waiter)
    }

    /// The next PDU.
    pub(crate) fn receive(
        &mut self,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Received> {
        loop {
            if let Some(received) = self.receive_now()? {
                return Ok(received);
            }
            self.until_readable(deadline, waiter)?;
        }
    }

    /// The next PDU, if it is there.
    pub(crate) fn receive_now(&mut self) -> Result<Option<Received>> {
        loop {
            if let Some(received) = self.next_of_input()? {
                return Ok(Some(received));
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn next_of_input(&mut self) -> Result<Option<Received>> {
        let have = &self.input[self.begin..];
        let Some(common) = have.first_chunk::<COMMON_HEADER>() else {
            return Ok(None);
        };
        let common = CommonHeader::decode(common);
        let layout = common.layout(&self.incoming, true, have);
        let layout = match layout {
            Ok(layout) if common.plen <= MAX_PDU => layout,
            Ok(layout) => {
                let violation = Violation::PduLength {
                    pdu: layout.pdu,
                    plen: common.plen,
                };
                let error = ProtocolError::new(violation, have);
                return Err(self.violated(&error));
            }
            Err(error) => return Err(self.violated(&error)),
        };
        let Some(pdu) = have.get(..common.plen as usize) else {
            return Ok(None);
        };
        let header_len = usize::from(common.hlen);
        let mut header = [0; 24];
        let kept = header_len.min(header.len());
        header[..kept].copy_from_slice(&pdu[..kept]);
        if layout.header_len > header_len {
            let received = le32(&pdu[header_len..]);
            let computed = crc32c(&pdu[..header_len]);
            if received != computed {
                let violation = Violation::HeaderDigest {
                    pdu: layout.pdu,
                    received,
                    computed,
                };
                let error = ProtocolError::new(violation, &pdu[..header_len]);
                return Err(self.violated(&error));
            }
        }
        let at = layout.header_len + layout.padding;
        let data = pdu[at..at + layout.data_len].to_vec();
        let intact = layout.digest_len == 0 || le32(&pdu[at + layout.data_len..]) == crc32c(&data);
        self.begin += common.plen as usize;
        if layout.pdu == PduType::C2HTermReq {
            let TermReq { fes, fei } = TermReq::decode(&header);
            return Err(later(Violation::Terminated { fes, fei }));
        }
        Ok(Some(Received {
            layout,
            flags: common.flags,
            header,
            data,
            intact,
        }))
    }

    fn until_readable(&mut self, deadline: Instant, waiter: &mut dyn Waiter) -> Result<()> {
        let ready = waiter.wait(Want::Read(self.wire.socket().as_fd()), deadline)?;
        if !ready && Instant::now() >= deadline {
            return Err(later("no answer in time"));
        }
        Ok(())
    }

    /// Takes what has come. False if there was nothing.
    fn fill(&mut self) -> Result<bool> {
        if self.begin == self.input.len() {
            self.input.clear();
            self.begin = 0;
        } else if self.begin > MAX_PDU as usize {
            self.input.drain(..self.begin);
            self.begin = 0;
        }
        let end = self.input.len();
        self.input.resize(end + PIECE, 0);
        let got = self.wire.read(&mut self.input[end..]);
        self.input
            .truncate(end + got.as_ref().map_or(0, |got| *got));
        match got {
            Ok(0) => Err(later("the controller closed the connection")),
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(later(format!("receive: {error}"))),
        }
    }

    /// Ends the connection as the protocol wants it (TCP section 3.5.1): tells the controller what was wrong, and
    /// gives it a moment to read that.
    pub(crate) fn violated(&mut self, error: &ProtocolError) -> super::trouble::Trouble {
        let deadline = Instant::now() + FAREWELL;
        let told = self.send(&error.term_req(), deadline, &mut Patience);
        if told.is_ok() && self.wire.socket().shutdown(Shutdown::Write).is_ok() {
            let mut rest = [0; 4096];
            // What was not read when a connection is closed makes the kernel throw away what was sent.
            loop {
                match self.wire.read(&mut rest) {
                    Ok(0) => break,
                    Err(error) if error.kind() != io::ErrorKind::WouldBlock => break,
                    Ok(_) if Instant::now() >= deadline => break,
                    Ok(_) => {}
                    Err(_) => match Patience.wait(Want::Read(self.wire.socket().as_fd()), deadline)
                    {
                        Ok(true) => {}
                        _ => break,
                    },
                }
            }
        }
        later(format!("the controller broke the protocol: {error}"))
    }
}

fn le32(bytes: &[u8]) -> u32 {
    bytes.first_chunk().copied().map_or(0, u32::from_le_bytes)
}

impl Wire {
    /// The TCP connection.
    pub(crate) fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) | Self::Tls(stream, _) => stream,
        }
    }
}

/// What comes is [`io::ErrorKind::WouldBlock`] where a connection that does not block has nothing.
impl Read for Wire {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let (stream, session) = match self {
            Self::Plain(stream) => return stream.read(buf),
            Self::Tls(stream, session) => (stream, session),
        };
        loop {
            let read = session.read(buf);
            // The answer to a KeyUpdate, or an alert; what the connection does not take goes with the next bytes.
            match push(stream, session) {
                Err(error) if read.is_ok() && error.kind() != io::ErrorKind::WouldBlock => {
                    return Err(error);
                }
                _ => {}
            }
            match read {
                Ok(0) => {}
                Ok(count) => return Ok(count),
                Err(TlsError::Closed) => return Ok(0),
                Err(error) => return Err(error.into()),
            }
            let mut ciphertext = [0; PIECE];
            match stream.read(&mut ciphertext)? {
                // The end without close_notify may be somebody else's doing (RFC 8446, section 6.1).
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => session.feed(&ciphertext[..count]),
            }
        }
    }
}

/// With TLS, what was taken is sent as far as the connection goes along; [`Write::flush`] sends the rest.
impl Write for Wire {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let (stream, session) = match self {
            Self::Plain(stream) => return stream.write(buf),
            Self::Tls(stream, session) => (stream, session),
        };
        push(stream, session)?;
        let taken = &buf[..buf.len().min(PIECE)];
        session.write(taken)?;
        match push(stream, session) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream, session) => push(stream, session),
        }
    }
}

/// Sends what the session has to send.
fn push(stream: &mut TcpStream, session: &mut TlsSession) -> io::Result<()> {
    while !session.output().is_empty() {
        match stream.write(session.output()) {
            Ok(count) => session.sent(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
