//! What comes in: responses, data, and requests for data.

use libc::iovec;

use super::super::wire::digest::{self, DIGEST};
use super::super::wire::pdu::{
    self, Agreed, COMMON_HEADER, CommonHeader, DATA_HEADER, DataHeader, FLAG_DDGST, FLAG_HDGST,
    FLAG_LAST_PDU, FLAG_SUCCESS, PduType, R2T, TermReq,
};
use super::super::wire::{ProtocolError, Status, Violation};
use super::slot::Kind;
use super::{Ended, MAX_IOVECS, Machine};

/// Bytes of the buffer that headers, and payloads that come with them, are received into.
pub(super) const STAGING: usize = 16 << 10;

/// The header of every PDU that comes on a connected queue, but not its digest.
type Header = [u8; DATA_HEADER];

/// Where in the stream we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before a header, or in it.
    Header,
    /// In the padding, payload or data digest of a C2HData.
    Data,
}

/// The C2HData whose payload is coming.
#[derive(Clone, Copy, Debug)]
struct Incoming {
    slot: u16,
    flags: u8,
    /// Bytes of padding that have not come.
    padding: u8,
    /// Bytes of payload.
    length: u32,
    /// Those of them that have not come.
    left: u32,
}

#[derive(Debug)]
pub(super) struct Receiver {
    agreed: Agreed,
    state: State,
    incoming: Incoming,
    staging: Box<[u8]>,
    /// Bytes in staging.
    filled: usize,
    /// Bytes of the last list that go elsewhere, before those that go into staging.
    direct: usize,
    /// With data digests: a payload until its digest is known. As large as the largest so far.
    unverified: Vec<u8>,
    /// The bits that are looked at in the first dword's bytes and PLEN of a header, and what they must be.
    response: (u64, u64),
    r2t: (u64, u64),
    data: (u64, u64),
    header_len: usize,
}

/// Mask and value of a common header; `None` is not looked at.
fn pattern(pdu: PduType, flags: (u8, u8), plen: Option<u32>) -> (u64, u64) {
    let encode = |pdu_type, flags, hlen, plen| {
        let pdo = 0;
        u64::from_le_bytes(
            CommonHeader {
                pdu_type,
                flags,
                hlen,
                pdo,
                plen,
            }
            .encode(),
        )
    };
    (
        encode(0xff, flags.0, 0xff, plen.map_or(0, |_| u32::MAX)),
        encode(pdu as u8, flags.1, pdu.header_len(), plen.unwrap_or(0)),
    )
}

impl Receiver {
    pub(super) fn new(agreed: Agreed) -> Self {
        let header_len = DATA_HEADER + agreed.header_digest_len();
        let hdgst = if agreed.header_digest { FLAG_HDGST } else { 0 };
        let ddgst = if agreed.data_digest { FLAG_DDGST } else { 0 };
        let short = |pdu| pattern(pdu, (FLAG_HDGST, hdgst), Some(header_len as u32));
        Self {
            agreed,
            state: State::Header,
            incoming: Incoming {
                slot: 0,
                flags: 0,
                padding: 0,
                length: 0,
                left: 0,
            },
            staging: vec![0; STAGING].into(),
            filled: 0,
            direct: 0,
            unverified: Vec::new(),
            response: short(PduType::CapsuleResp),
            r2t: short(PduType::R2T),
            data: pattern(
                PduType::C2HData,
                (FLAG_HDGST | FLAG_DDGST, hdgst | ddgst),
                None,
            ),
            header_len,
        }
    }

    pub(super) fn reset(&mut self) {
        self.state = State::Header;
        self.filled = 0;
        self.direct = 0;
    }

    /// What is wrong with a header that is none of those that come. `have` is as much of it as there is.
    #[cold]
    fn unusual(&self, have: &[u8]) -> Result<(), ProtocolError> {
        let Some(common) = have.first_chunk::<COMMON_HEADER>() else {
            return Ok(());
        };
        let layout = CommonHeader::decode(common).layout(&self.agreed, true, have)?;
        match layout.pdu {
            PduType::C2HTermReq => match have.first_chunk() {
                Some(header) => {
                    let TermReq { fes, fei } = TermReq::decode(header);
                    Err(ProtocolError::new(
                        Violation::Terminated { fes, fei },
                        header,
                    ))
                }
                None => Ok(()),
            },
            PduType::CapsuleResp | PduType::C2HData | PduType::R2T
                if have.len() < self.header_len =>
            {
                Ok(())
            }
            pdu => Err(ProtocolError::new(Violation::UnexpectedType(pdu), have)),
        }
    }

    /// TCP 3.5.2: a header whose digest is wrong says nothing that can be relied on.
    #[inline]
    fn check_digest(&self, header: &Header, have: &[u8]) -> Result<(), ProtocolError> {
        if !self.agreed.header_digest {
            return Ok(());
        }
        let computed = digest::crc32c(header);
        let received = have
            .get(DATA_HEADER..)
            .and_then(<[u8]>::first_chunk)
            .map(|bytes| u32::from_le_bytes(*bytes));
        match (received, PduType::from_number(header[0])) {
            (Some(received), _) if received == computed => Ok(()),
            (_, None) => Err(ProtocolError::new(
                Violation::UnknownType(header[0]),
                header,
            )),
            (received, Some(pdu)) => Err(ProtocolError::new(
                Violation::HeaderDigest {
                    pdu,
                    received: received.unwrap_or(0),
                    computed,
                },
                header,
            )),
        }
    }
}

impl Machine {
    /// Lists places for bytes to come, in order, and returns their bytes: first what is missing of a
    /// payload, then the machine's own buffer. At most [`MAX_IOVECS`] pieces; `out` is cleared first. Zero
    /// only after an error.
    ///
    /// The addresses stay valid until [`Machine::received`] is called, or the machine is dropped. A list
    /// of which nothing was received may be made anew.
    pub fn recv_list(&mut self, out: &mut Vec<iovec>) -> usize {
        out.clear();
        let receive = &mut self.receive;
        receive.direct = 0;
        if self.failed.is_some() {
            return 0;
        }
        let incoming = &receive.incoming;
        let mut bytes = 0;
        if receive.state == State::Data && incoming.padding == 0 && incoming.left > 0 {
            if self.host.data_digest {
                let from = (incoming.length - incoming.left) as usize;
                let missing = &mut receive.unverified[from..incoming.length as usize];
                bytes = missing.len();
                out.push(iovec {
                    iov_base: missing.as_mut_ptr().cast(),
                    iov_len: missing.len(),
                });
            } else {
                let rest = self.slots.get(incoming.slot).rest;
                let missing = rest.split_at(incoming.left as usize).0;
                for (ptr, len) in missing.iter().take(MAX_IOVECS) {
                    bytes += len;
                    out.push(iovec {
                        iov_base: ptr.cast(),
                        iov_len: len,
                    });
                }
            }
            receive.direct = bytes;
            if bytes < incoming.left as usize || out.len() == MAX_IOVECS {
                return bytes;
            }
        }
        let free = &mut receive.staging[receive.filled..];
        out.push(iovec {
            iov_base: free.as_mut_ptr().cast(),
            iov_len: free.len(),
        });
        bytes + free.len()
    }

    /// `n` bytes have come, into the places of the last list. Commands that have ended are told.
    ///
    /// # Errors
    /// The controller broke the protocol, or ended the connection. The connection is of no use any more:
    /// send [`Machine::term_req`], close it, and [`Machine::abandon_all`]. Every further call gives the
    /// same error.
    pub fn received(
        &mut self,
        n: usize,
        ended: &mut impl FnMut(Ended),
    ) -> Result<(), ProtocolError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let direct = n.min(std::mem::take(&mut self.receive.direct));
        if direct > 0 {
            self.place(direct as u32);
        }
        let filled = self.receive.filled + (n - direct);
        self.receive.filled = filled.min(self.receive.staging.len());
        let result = self.parse(ended);
        if let Err(error) = &result {
            self.failed = Some(error.clone());
        }
        result
    }

    /// Bytes of the payload have come to where they belong.
    #[inline]
    fn place(&mut self, len: u32) {
        let incoming = &mut self.receive.incoming;
        incoming.left -= len;
        if !self.host.data_digest {
            let slot = self.slots.get_mut(incoming.slot);
            slot.rest = slot.rest.split_at(len as usize).1;
        }
    }

    fn parse(&mut self, ended: &mut impl FnMut(Ended)) -> Result<(), ProtocolError> {
        let mut pos = 0;
        loop {
            if self.receive.state == State::Data && !self.data(&mut pos, ended) {
                break;
            }
            let receive = &self.receive;
            let have = &receive.staging[pos..receive.filled];
            let header: Header = match have.first_chunk() {
                Some(header) if have.len() >= receive.header_len => *header,
                _ => {
                    receive.unusual(have)?;
                    break;
                }
            };
            let common = u64::from_le_bytes([
                header[0], header[1], header[2], header[3], header[4], header[5], header[6],
                header[7],
            ]);
            let is = |(mask, value): (u64, u64)| common & mask == value;
            if header[0] != PduType::C2HTermReq as u8 {
                receive.check_digest(&header, have)?;
            }
            pos += receive.header_len;
            if is(receive.response) {
                self.capsule_resp(&header, ended)?;
            } else if is(receive.data) {
                self.c2h_data(&header)?;
            } else if is(receive.r2t) {
                self.r2t(&header)?;
            } else {
                receive.unusual(have)?;
                // Nothing that is none of the three comes back from there without an error.
                break;
            }
        }
        let receive = &mut self.receive;
        receive.staging.copy_within(pos..receive.filled, 0);
        receive.filled -= pos;
        Ok(())
    }

    /// The slot of the command that the controller speaks of.
    #[inline]
    fn named(&self, pdu: PduType, cid: u16, header: &Header) -> Result<u16, ProtocolError> {
        match self.slots.by_cid(cid) {
            // A command that was not sent yet is not known to the controller.
            Some(index)
                if !self.slots.get(index).capsule_queued || self.send.capsule_listed(index) =>
            {
                Ok(index)
            }
            _ => {
                let violation = Violation::UnknownCommand { pdu, cid };
                Err(ProtocolError::new(violation, header))
            }
        }
    }

    /// TCP 3.6.2.7.
    #[inline]
    fn capsule_resp(
        &mut self,
        header: &Header,
        ended: &mut impl FnMut(Ended),
    ) -> Result<(), ProtocolError> {
        let cqe = pdu::capsule_resp(header);
        let index = self.named(PduType::CapsuleResp, cqe.cid, header)?;
        if cqe.status.is_success() {
            let slot = self.slots.get(index);
            let why = match slot.kind {
                Kind::Read if slot.done != slot.length && !slot.may_be_short => {
                    "success without all of its data"
                }
                Kind::Write if slot.done != slot.length || slot.r2ts_outstanding > 0 => {
                    "success before all of its data were sent"
                }
                _ => "",
            };
            if !why.is_empty() {
                return Err(sequence(PduType::CapsuleResp, cqe.cid, why, header));
            }
        }
        self.conclude(index, cqe.status, cqe.result, ended);
        Ok(())
    }

    /// The header of a C2HData (TCP 3.3.2.1, 3.6.2.9), whose type, digest flags and HLEN are right. What is
    /// wrong is looked for in the order of the fields.
    #[inline]
    fn c2h_data(&mut self, header: &Header) -> Result<(), ProtocolError> {
        let pdu = PduType::C2HData;
        let [_, flags, _, pdo, plen @ ..] =
            *header.first_chunk::<COMMON_HEADER>().unwrap_or(&[0; 8]);
        let DataHeader {
            cccid: cid,
            datao: offset,
            datal: length,
            ..
        } = DataHeader::decode(header);
        let agreed = &self.receive.agreed;
        let layout = CommonHeader {
            pdu_type: pdu as u8,
            flags,
            hlen: header[2],
            pdo,
            plen: u32::from_le_bytes(plen),
        }
        .layout(agreed, true, header)?;
        if layout.data_len != length as usize {
            let plen = u32::from_le_bytes(plen);
            return Err(ProtocolError::new(
                Violation::PduLength { pdu, plen },
                header,
            ));
        }
        let index = self.named(pdu, cid, header)?;
        let slot = self.slots.get_mut(index);
        if slot.kind != Kind::Read {
            return Err(sequence(pdu, cid, "the command reads no data", header));
        }
        if slot.last_seen {
            return Err(sequence(pdu, cid, "data after LAST_PDU", header));
        }
        let size = slot.length;
        let end = check_range(pdu, cid, (offset, length), (slot.done, size), header)?;
        if length % 4 != 0 && end != size {
            return Err(unaligned(pdu, "DATAL", length, header));
        }
        if flags & FLAG_SUCCESS != 0 && end != size && !slot.may_be_short {
            let why = "SUCCESS without all of its data";
            return Err(sequence(pdu, cid, why, header));
        }
        slot.done = end;
        slot.last_seen = flags & FLAG_LAST_PDU != 0;
        self.receive.state = State::Data;
        self.receive.incoming = Incoming {
            slot: index,
            flags,
            padding: layout.padding as u8,
            length,
            left: length,
        };
        Ok(())
    }

    /// Takes padding, payload and digest of a C2HData from staging. False if more has to come first.
    #[inline]
    fn data(&mut self, pos: &mut usize, ended: &mut impl FnMut(Ended)) -> bool {
        let receive = &mut self.receive;
        let incoming = &mut receive.incoming;
        let padding = usize::from(incoming.padding).min(receive.filled - *pos);
        incoming.padding -= padding as u8;
        *pos += padding;
        if incoming.padding > 0 {
            return false;
        }
        let slot = self.slots.get_mut(incoming.slot);
        let here = (incoming.left as usize).min(receive.filled - *pos);
        let bytes = &receive.staging[*pos..*pos + here];
        if !receive.agreed.data_digest {
            let (place, rest) = slot.rest.split_at(here);
            place.copy_from(bytes);
            slot.rest = rest;
            incoming.left -= here as u32;
            *pos += here;
            if incoming.left > 0 {
                return false;
            }
        } else {
            let length = incoming.length as usize;
            let have = receive.filled - *pos;
            let whole = incoming.left == incoming.length && have >= length + DIGEST;
            let payload = if whole {
                // All of it is here: no need for another copy.
                bytes
            } else {
                if receive.unverified.len() < length {
                    receive.unverified.resize(length, 0);
                }
                let from = length - incoming.left as usize;
                receive.unverified[from..from + here].copy_from_slice(bytes);
                incoming.left -= here as u32;
                *pos += here;
                if incoming.left > 0 || receive.filled - *pos < DIGEST {
                    return false;
                }
                &receive.unverified[..length]
            };
            if whole {
                incoming.left = 0;
                *pos += here;
            }
            let received = &receive.staging[*pos..*pos + DIGEST];
            *pos += DIGEST;
            let (place, rest) = slot.rest.split_at(length);
            slot.rest = rest;
            if digest::digest(payload) == *received {
                place.copy_from(payload);
            } else {
                slot.digest_failed = true;
            }
        }
        let Incoming { slot, flags, .. } = *incoming;
        receive.state = State::Header;
        if flags & FLAG_SUCCESS != 0 {
            self.conclude(slot, Status::SUCCESS, 0, ended);
        }
        true
    }

    /// An R2T (TCP 3.3.2.2, 3.6.2.10) whose common header is right.
    fn r2t(&mut self, header: &Header) -> Result<(), ProtocolError> {
        let pdu = PduType::R2T;
        let R2T {
            cccid: cid,
            ttag,
            r2to: offset,
            r2tl: length,
        } = R2T::decode(header);
        let index = self.named(pdu, cid, header)?;
        let limit = self.params.max_r2t;
        let slot = self.slots.get_mut(index);
        if slot.kind != Kind::Write {
            return Err(sequence(
                pdu,
                cid,
                "the command has no data to ask for",
                header,
            ));
        }
        let size = slot.length;
        let end = check_range(pdu, cid, (offset, length), (slot.done, size), header)?;
        if length == 0 || length % 4 != 0 && end != size {
            return Err(unaligned(pdu, "R2TL", length, header));
        }
        if slot.r2ts_outstanding == limit {
            let violation = Violation::R2tLimit { cid, limit };
            return Err(ProtocolError::new(violation, header));
        }
        slot.done = end;
        slot.r2ts_outstanding += 1;
        self.answer_r2t(index, ttag, length);
        Ok(())
    }
}

/// Where data end that are contiguous and inside the command's: `range` is offset and length, `so_far` the
/// bytes that came before and the bytes that there are.
#[inline]
fn check_range(
    pdu: PduType,
    cid: u16,
    (offset, length): (u32, u32),
    (expected, size): (u32, u32),
    header: &Header,
) -> Result<u32, ProtocolError> {
    let end = offset.checked_add(length).filter(|end| *end <= size);
    match end {
        Some(end) if offset == expected => Ok(end),
        Some(_) => Err(ProtocolError::new(
            Violation::NotContiguous {
                pdu,
                cid,
                offset,
                expected,
            },
            header,
        )),
        None => Err(ProtocolError::new(
            Violation::OutOfRange {
                pdu,
                cid,
                offset,
                length,
                size,
            },
            header,
        )),
    }
}

#[cold]
fn sequence(pdu: PduType, cid: u16, why: &'static str, header: &Header) -> ProtocolError {
    ProtocolError::new(Violation::Sequence { pdu, cid, why }, header)
}

#[cold]
fn unaligned(pdu: PduType, field: &'static str, value: u32, header: &Header) -> ProtocolError {
    let why = "not a multiple of 4 bytes, or none";
    let violation = Violation::Field {
        pdu,
        field,
        offset: 16,
        value,
        why,
    };
    ProtocolError::new(violation, header)
}
