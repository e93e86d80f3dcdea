//! A small blocking initiator that speaks by bytes written by hand: nothing here comes from the target's crate.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

pub const NQN: &str = "nqn.2026-01.org.example:disk";
pub const HOST_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:11111111-2222-3333-4444-555555555555";

/// CRC32C, bit by bit (RFC 3720, appendix B.4: the reflected polynomial 82F63B78h).
pub fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

/// A connection, and what was agreed on.
pub struct Host {
    pub stream: TcpStream,
    pub hdgst: bool,
    pub ddgst: bool,
    /// The controller's alignment of data to it, in bytes.
    pub align: usize,
    pub max_h2c: u32,
    pub next_cid: u16,
}

/// A PDU as it came: the whole of it.
#[derive(Debug, Clone)]
pub struct Pdu(pub Vec<u8>);

impl Pdu {
    pub fn kind(&self) -> u8 {
        self.0[0]
    }
    pub fn flags(&self) -> u8 {
        self.0[1]
    }
    pub fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }
    pub fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }
    pub fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }
    /// Of a CapsuleResp: the command identifier.
    pub fn cid(&self) -> u16 {
        self.u16(8 + 12)
    }
    /// Of a CapsuleResp: status code type and status code, and the Do Not Retry bit.
    pub fn status(&self) -> (u8, u8, bool) {
        let field = self.u16(8 + 14) >> 1;
        ((field >> 8 & 7) as u8, field as u8, field >> 14 & 1 == 1)
    }
    pub fn ok(&self) -> bool {
        self.kind() == 5 && self.status().0 == 0 && self.status().1 == 0
    }
    /// Of a C2HData: the data, by PDO.
    pub fn data(&self) -> &[u8] {
        let (pdo, len) = (usize::from(self.0[3]), self.u32(16) as usize);
        &self.0[pdo..pdo + len]
    }
}

/// What is asked for in ICReq.
#[derive(Clone, Copy, Default)]
pub struct Ask {
    pub hpda: u8,
    pub digests: u8,
    /// Zero-based.
    pub max_r2t: u32,
}

/// A submission queue entry with an SGL that says `len` bytes in a transport data block.
pub fn sqe(opcode: u8, cid: u16, nsid: u32, len: u32) -> [u8; 64] {
    let mut e = [0; 64];
    e[0] = opcode;
    e[1] = 0x40;
    e[2..4].copy_from_slice(&cid.to_le_bytes());
    e[4..8].copy_from_slice(&nsid.to_le_bytes());
    e[32..36].copy_from_slice(&len.to_le_bytes());
    e[39] = 0x5a;
    e
}

/// Read (2) or Write (1).
pub fn rw(opcode: u8, cid: u16, nsid: u32, slba: u64, blocks: u32, len: u32) -> [u8; 64] {
    let mut e = sqe(opcode, cid, nsid, len);
    e[40..48].copy_from_slice(&slba.to_le_bytes());
    e[48..50].copy_from_slice(&((blocks - 1) as u16).to_le_bytes());
    e
}

impl Host {
    /// A TCP connection, and nothing said yet.
    pub fn dial(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        Self {
            stream,
            hdgst: false,
            ddgst: false,
            align: 4,
            max_h2c: 0,
            next_cid: 0,
        }
    }

    pub fn ic_req(ask: Ask) -> Vec<u8> {
        let mut b = vec![0; 128];
        b[2] = 128;
        b[4] = 128;
        b[10] = ask.hpda;
        b[11] = ask.digests;
        b[12..16].copy_from_slice(&ask.max_r2t.to_le_bytes());
        b
    }

    /// A connection after ICReq and ICResp.
    pub fn initialized(address: SocketAddr, ask: Ask) -> Self {
        let mut host = Self::dial(address);
        host.stream.write_all(&Self::ic_req(ask)).unwrap();
        let resp = host.recv().unwrap();
        assert_eq!((resp.kind(), resp.0[2], resp.0.len()), (1, 128, 128));
        host.hdgst = resp.0[11] & 1 == 1;
        host.ddgst = resp.0[11] & 2 == 2;
        host.align = (usize::from(resp.0[10]) + 1) * 4;
        host.max_h2c = resp.u32(12);
        host
    }

    /// The next PDU, digests unchecked.
    pub fn recv(&mut self) -> io::Result<Pdu> {
        let mut header = [0; 8];
        self.stream.read_exact(&mut header)?;
        let plen = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
        assert!((8..16 << 20).contains(&plen), "PLEN {plen}");
        let mut b = header.to_vec();
        b.resize(plen, 0);
        self.stream.read_exact(&mut b[8..])?;
        Ok(Pdu(b))
    }

    /// The next PDU, with its digests checked.
    pub fn recv_checked(&mut self) -> Pdu {
        let p = self.recv().unwrap();
        let hlen = usize::from(p.0[2]);
        assert_eq!(p.flags() & 1 == 1, self.hdgst && p.kind() != 3);
        if self.hdgst {
            assert_eq!(p.u32(hlen), crc32c(&p.0[..hlen]), "header digest");
        }
        if self.ddgst && p.kind() == 7 {
            assert_eq!(p.flags() & 2, 2);
            assert_eq!(p.u32(p.0.len() - 4), crc32c(p.data()), "data digest");
        }
        p
    }

    /// Sends a command capsule, with data in it or without.
    pub fn send(&mut self, sqe: &[u8; 64], data: &[u8]) {
        let bytes = self.capsule(sqe, data);
        self.stream.write_all(&bytes).unwrap();
    }

    pub fn capsule(&self, sqe: &[u8; 64], data: &[u8]) -> Vec<u8> {
        self.pdu(4, 0, sqe, data)
    }

    /// A PDU with `rest` after the common header.
    pub fn pdu(&self, kind: u8, flags: u8, rest: &[u8], data: &[u8]) -> Vec<u8> {
        let hlen = 8 + rest.len();
        let mut b = vec![kind, flags | u8::from(self.hdgst), hlen as u8, 0];
        b.extend_from_slice(&[0; 4]);
        b.extend_from_slice(rest);
        let mut pdo = hlen + if self.hdgst { 4 } else { 0 };
        let mut plen = pdo;
        if !data.is_empty() {
            pdo = pdo.next_multiple_of(self.align);
            plen = pdo + data.len() + if self.ddgst { 4 } else { 0 };
            b[3] = pdo as u8;
            b[1] |= u8::from(self.ddgst) << 1;
        }
        b[4..8].copy_from_slice(&(plen as u32).to_le_bytes());
        if self.hdgst {
            let digest = crc32c(&b);
            b.extend_from_slice(&digest.to_le_bytes());
        }
        if !data.is_empty() {
            b.resize(pdo, 0);
            b.extend_from_slice(data);
            if self.ddgst {
                b.extend_from_slice(&crc32c(data).to_le_bytes());
            }
        }
        assert_eq!(b.len(), plen);
        b
    }

    pub fn cid(&mut self) -> u16 {
        self.next_cid += 1;
        self.next_cid
    }

    /// Sends Connect and returns the completion.
    pub fn connect(&mut self, qid: u16, cntlid: u16, sqsize: u16, kato_ms: u32, nqn: &str) -> Pdu {
        self.connect_as(qid, cntlid, sqsize, kato_ms, nqn, HOST_NQN, [7; 16])
    }

    #[allow(clippy::too_many_arguments, reason = "the fields of the command")]
    pub fn connect_as(
        &mut self,
        qid: u16,
        cntlid: u16,
        sqsize: u16,
        kato_ms: u32,
        nqn: &str,
        host_nqn: &str,
        host_id: [u8; 16],
    ) -> Pdu {
        let mut e = [0; 64];
        e[0] = 0x7f;
        e[1] = 0x40;
        e[2..4].copy_from_slice(&self.cid().to_le_bytes());
        e[4] = 0x01;
        e[32..36].copy_from_slice(&1024u32.to_le_bytes());
        e[39] = 0x01;
        e[42..44].copy_from_slice(&qid.to_le_bytes());
        e[44..46].copy_from_slice(&sqsize.to_le_bytes());
        // Flow control of the submission queue is switched off.
        e[46] = 1 << 2;
        e[48..52].copy_from_slice(&kato_ms.to_le_bytes());
        let mut data = [0; 1024];
        data[..16].copy_from_slice(&host_id);
        data[16..18].copy_from_slice(&cntlid.to_le_bytes());
        data[256..256 + nqn.len()].copy_from_slice(nqn.as_bytes());
        data[512..512 + host_nqn.len()].copy_from_slice(host_nqn.as_bytes());
        self.send(&e, &data);
        self.recv_checked()
    }

    /// An admin queue with an enabled controller: the host and the controller id.
    pub fn admin(address: SocketAddr, ask: Ask, kato_ms: u32) -> (Self, u16) {
        Self::admin_of(address, ask, kato_ms, NQN)
    }

    pub fn admin_of(address: SocketAddr, ask: Ask, kato_ms: u32, nqn: &str) -> (Self, u16) {
        let mut host = Self::initialized(address, ask);
        let resp = host.connect(0, 0xffff, 31, kato_ms, nqn);
        assert!(resp.ok(), "{:?}", resp.status());
        let cntlid = resp.u16(8);
        // CC: EN, IOSQES 6, IOCQES 4.
        assert!(host.property_set(0x14, 0x0046_0001).ok());
        (host, cntlid)
    }

    /// An I/O queue of a controller.
    pub fn io(address: SocketAddr, ask: Ask, cntlid: u16, qid: u16) -> Self {
        let mut host = Self::initialized(address, ask);
        let resp = host.connect(qid, cntlid, 127, 0, NQN);
        assert!(resp.ok(), "{:?}", resp.status());
        host
    }

    pub fn property_get(&mut self, offset: u32, eight: bool) -> Pdu {
        let mut e = [0; 64];
        e[0] = 0x7f;
        e[1] = 0x40;
        e[2..4].copy_from_slice(&self.cid().to_le_bytes());
        e[4] = 0x04;
        e[40] = u8::from(eight);
        e[44..48].copy_from_slice(&offset.to_le_bytes());
        self.send(&e, &[]);
        self.recv_checked()
    }

    pub fn property_set(&mut self, offset: u32, value: u64) -> Pdu {
        let mut e = [0; 64];
        e[0] = 0x7f;
        e[1] = 0x40;
        e[2..4].copy_from_slice(&self.cid().to_le_bytes());
        e[4] = 0x00;
        e[44..48].copy_from_slice(&offset.to_le_bytes());
        e[48..56].copy_from_slice(&value.to_le_bytes());
        self.send(&e, &[]);
        self.recv_checked()
    }

    /// A command without data: its completion.
    pub fn simple(&mut self, opcode: u8, nsid: u32, cdw10: u32, cdw11: u32) -> Pdu {
        let mut e = sqe(opcode, self.cid(), nsid, 0);
        e[40..44].copy_from_slice(&cdw10.to_le_bytes());
        e[44..48].copy_from_slice(&cdw11.to_le_bytes());
        self.send(&e, &[]);
        self.recv_checked()
    }

    /// Sends a command and collects what comes for it: the data, and the completion unless SUCCESS stood for it.
    pub fn fetch(&mut self, e: &[u8; 64]) -> (Vec<u8>, Option<Pdu>) {
        self.send(e, &[]);
        self.collect()
    }

    pub fn collect(&mut self) -> (Vec<u8>, Option<Pdu>) {
        let mut data = Vec::new();
        loop {
            let p = self.recv_checked();
            match p.kind() {
                7 => {
                    assert_eq!(p.u32(12) as usize, data.len(), "DATAO");
                    data.extend_from_slice(p.data());
                    if p.flags() & 8 != 0 {
                        assert_eq!(p.flags() & 4, 4, "SUCCESS without LAST");
                        return (data, None);
                    }
                }
                5 => return (data, Some(p)),
                other => panic!("PDU type {other}"),
            }
        }
    }

    pub fn identify(&mut self, cns: u8, nsid: u32) -> (Vec<u8>, Pdu) {
        let mut e = sqe(0x06, self.cid(), nsid, 4096);
        e[40] = cns;
        let (data, resp) = self.fetch(&e);
        (data, resp.unwrap())
    }

    pub fn log_page(&mut self, page: u8, len: u32, offset: u64) -> (Vec<u8>, Pdu) {
        let mut e = sqe(0x02, self.cid(), 0xffff_ffff, len);
        let dwords = len / 4 - 1;
        e[40] = page;
        e[42..44].copy_from_slice(&(dwords as u16).to_le_bytes());
        e[44..46].copy_from_slice(&((dwords >> 16) as u16).to_le_bytes());
        e[48..56].copy_from_slice(&offset.to_le_bytes());
        let (data, resp) = self.fetch(&e);
        (data, resp.unwrap())
    }

    /// Reads blocks of `lba` bytes.
    pub fn read(&mut self, slba: u64, blocks: u32, lba: u32) -> (Vec<u8>, Option<Pdu>) {
        let e = rw(2, self.cid(), 1, slba, blocks, blocks * lba);
        self.fetch(&e)
    }

    /// Writes with the data in the capsule.
    pub fn write_in_capsule(&mut self, slba: u64, lba: u32, data: &[u8]) -> Pdu {
        let mut e = rw(
            1,
            self.cid(),
            1,
            slba,
            data.len() as u32 / lba,
            data.len() as u32,
        );
        e[39] = 0x01;
        self.send(&e, data);
        self.recv_checked()
    }

    /// Writes by R2T: the completion, and the R2Ts that came.
    pub fn write_by_r2t(&mut self, slba: u64, lba: u32, data: &[u8]) -> (Pdu, Vec<(u32, u32)>) {
        let e = rw(
            1,
            self.cid(),
            1,
            slba,
            data.len() as u32 / lba,
            data.len() as u32,
        );
        self.send(&e, &[]);
        let mut asked = Vec::new();
        loop {
            let p = self.recv_checked();
            if p.kind() == 5 {
                return (p, asked);
            }
            assert_eq!(p.kind(), 9);
            let (cid, ttag, offset, len) = (p.u16(8), p.u16(10), p.u32(12), p.u32(16));
            asked.push((offset, len));
            self.h2c_data(
                cid,
                ttag,
                offset,
                &data[offset as usize..(offset + len) as usize],
            );
        }
    }

    /// Answers an R2T, in PDUs of MAXH2CDATA at most.
    pub fn h2c_data(&mut self, cid: u16, ttag: u16, offset: u32, data: &[u8]) {
        let mut at = 0;
        for part in data.chunks(self.max_h2c as usize) {
            let last = at + part.len() == data.len();
            let mut rest = Vec::new();
            rest.extend_from_slice(&cid.to_le_bytes());
            rest.extend_from_slice(&ttag.to_le_bytes());
            rest.extend_from_slice(&offset.wrapping_add(at as u32).to_le_bytes());
            rest.extend_from_slice(&(part.len() as u32).to_le_bytes());
            rest.extend_from_slice(&[0; 4]);
            let bytes = self.pdu(6, u8::from(last) << 2, &rest, part);
            self.stream.write_all(&bytes).unwrap();
            at += part.len();
        }
    }

    /// Whether the target has ended the stream: everything up to its end.
    pub fn rest(&mut self) -> Vec<u8> {
        let mut b = Vec::new();
        let _ = self.stream.read_to_end(&mut b);
        b
    }
}
