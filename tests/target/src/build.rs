//! PDUs that a controller sends.

use crate::status::Status;
use crate::wire::{FatalErrorStatus, pdu, put};

/// What a host and a port have agreed on about the format of PDUs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Format {
    pub hdgst: bool,
    pub ddgst: bool,
    /// The host's alignment of data in PDUs to it, in bytes.
    pub host_align: usize,
}

/// The completion of a command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Completion {
    pub cid: u16,
    pub status: Status,
    /// Dwords 0 and 1.
    pub result: u64,
    pub sqhd: u16,
}

impl Format {
    fn common(
        &self,
        to: &mut Vec<u8>,
        kind: u8,
        flags: u8,
        hlen: usize,
        pdo: usize,
        plen: usize,
    ) -> usize {
        let at = to.len();
        let flags = flags | if self.hdgst { pdu::HDGSTF } else { 0 };
        to.extend_from_slice(&[kind, flags, hlen as u8, pdo as u8]);
        to.extend_from_slice(&(plen as u32).to_le_bytes());
        at
    }

    fn header_digest(&self, to: &mut Vec<u8>, at: usize) {
        if self.hdgst {
            let digest = crc32c::crc32c(&to[at..]);
            to.extend_from_slice(&digest.to_le_bytes());
        }
    }

    fn hdgst_len(&self) -> usize {
        if self.hdgst { pdu::DIGEST } else { 0 }
    }

    /// C2HData without its data (transport specification, section 3.6.2.11): the data is to follow, and then
    /// `data_digest`.
    pub fn c2h_data(&self, to: &mut Vec<u8>, cid: u16, offset: u32, len: u32, flags: u8) {
        let pdo = (pdu::SHORT_HLEN + self.hdgst_len()).next_multiple_of(self.host_align.max(4));
        let ddgst = if self.ddgst { pdu::DIGEST } else { 0 };
        let flags = flags | if self.ddgst { pdu::DDGSTF } else { 0 };
        let at = self.common(
            to,
            pdu::C2H_DATA,
            flags,
            pdu::SHORT_HLEN,
            pdo,
            pdo + len as usize + ddgst,
        );
        to.extend_from_slice(&cid.to_le_bytes());
        to.extend_from_slice(&[0; 2]);
        to.extend_from_slice(&offset.to_le_bytes());
        to.extend_from_slice(&len.to_le_bytes());
        to.extend_from_slice(&[0; 4]);
        self.header_digest(to, at);
        to.resize(at + pdo, 0);
    }

    /// The digest of the last `len` bytes, if digests are on.
    pub fn data_digest(&self, to: &mut Vec<u8>, len: usize) {
        if self.ddgst {
            let digest = crc32c::crc32c(&to[to.len() - len..]);
            to.extend_from_slice(&digest.to_le_bytes());
        }
    }

    /// CapsuleResp (section 3.6.2.8).
    pub fn capsule_resp(&self, to: &mut Vec<u8>, c: &Completion, sqid: u16) {
        let plen = pdu::SHORT_HLEN + self.hdgst_len();
        let at = self.common(to, pdu::CAPSULE_RESP, 0, pdu::SHORT_HLEN, 0, plen);
        let mut cqe = [0; 16];
        put(&mut cqe, 0, &c.result.to_le_bytes());
        put(&mut cqe, 8, &c.sqhd.to_le_bytes());
        put(&mut cqe, 10, &sqid.to_le_bytes());
        put(&mut cqe, 12, &c.cid.to_le_bytes());
        // Bit 0 is the phase tag, which fabrics do not use.
        put(&mut cqe, 14, &(c.status.0 << 1).to_le_bytes());
        to.extend_from_slice(&cqe);
        self.header_digest(to, at);
    }

    /// R2T (section 3.6.2.10).
    pub fn r2t(&self, to: &mut Vec<u8>, cid: u16, ttag: u16, offset: u32, len: u32) {
        let plen = pdu::SHORT_HLEN + self.hdgst_len();
        let at = self.common(to, pdu::R2T, 0, pdu::SHORT_HLEN, 0, plen);
        to.extend_from_slice(&cid.to_le_bytes());
        to.extend_from_slice(&ttag.to_le_bytes());
        to.extend_from_slice(&offset.to_le_bytes());
        to.extend_from_slice(&len.to_le_bytes());
        to.extend_from_slice(&[0; 4]);
        self.header_digest(to, at);
    }
}

/// ICResp (section 3.6.2.3).
pub(crate) fn ic_resp(pfv: u16, cpda: u8, digests: u8, max_h2c_data: u32) -> [u8; pdu::IC_LEN] {
    let mut b = [0; pdu::IC_LEN];
    b[0] = pdu::IC_RESP;
    b[2] = pdu::IC_LEN as u8;
    put(&mut b, 4, &(pdu::IC_LEN as u32).to_le_bytes());
    put(&mut b, 8, &pfv.to_le_bytes());
    b[10] = cpda;
    b[11] = digests;
    put(&mut b, 12, &max_h2c_data.to_le_bytes());
    b
}

/// C2HTermReq (section 3.6.2.5) with the header that was in error; it carries no digests.
pub(crate) fn c2h_term_req(to: &mut Vec<u8>, fes: FatalErrorStatus, fei: u32, header: &[u8]) {
    let header = &header[..header.len().min(128)];
    to.extend_from_slice(&[pdu::C2H_TERM_REQ, 0, pdu::SHORT_HLEN as u8, 0]);
    to.extend_from_slice(&((pdu::SHORT_HLEN + header.len()) as u32).to_le_bytes());
    to.extend_from_slice(&(fes as u16).to_le_bytes());
    to.extend_from_slice(&fei.to_le_bytes());
    to.extend_from_slice(&[0; 10]);
    to.extend_from_slice(header);
}
