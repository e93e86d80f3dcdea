//! What goes out: capsules, and data that were asked for.

use std::collections::VecDeque;

use libc::iovec;

use crate::reactor::Sg;

use super::super::wire::digest::{self, DIGEST};
use super::super::wire::pdu::{Agreed, CAPSULE_CMD_HEADER, DATA_HEADER, DataHeader, MAX_ALIGNMENT};
use super::slot::PendingR2t;
use super::{Ended, MAX_IOVECS, MAX_SEND_BYTES, Machine, NIL};

/// H2CData that may be in the queue at a time. More wait in their slots; a list of 1 MiB has room for it
/// where they are 16 KiB or more.
pub(super) const H2C_HEADERS: u16 = 64;

/// What padding is sent from.
static ZEROS: [u8; MAX_ALIGNMENT as usize] = [0; MAX_ALIGNMENT as usize];

/// The header of an H2CData with its digest, and the digest of its data: where they are while it is sent.
#[derive(Clone, Copy, Debug)]
struct H2cHeader {
    bytes: [u8; DATA_HEADER + DIGEST],
    data_digest: [u8; DIGEST],
}

/// A PDU in the queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pdu {
    /// The data in the command's memory; with data digests, in the slot's copy instead.
    data: Sg<'static>,
    /// Bytes of all of it.
    total: usize,
    /// Where in the command's data.
    offset: u32,
    pub(super) slot: u16,
    /// Which header; [`NIL`] for a capsule, whose header is in the slot.
    h2c: u16,
    header_len: u8,
    padding: u8,
    /// It was in a list.
    listed: bool,
    /// The last of its R2T, which counts against the limit until this was listed.
    ends_r2t: bool,
}

/// The queue to send, in order.
#[derive(Debug)]
pub(super) struct Sender {
    queue: VecDeque<Pdu>,
    /// Bytes of the first PDU that were sent.
    head_sent: usize,
    /// PDUs of the last list, the last maybe in part, while it is being sent.
    listed: usize,
    headers: Box<[H2cHeader]>,
    free_headers: Vec<u16>,
    /// Slots with R2Ts that found no header.
    waiting: VecDeque<u16>,
    capsule_header: u8,
    capsule_padding: u8,
    data_header: u8,
    data_padding: u8,
    data_digest: u8,
}

impl Sender {
    pub(super) fn new(depth: u16, host: &Agreed) -> Self {
        let header = |len| (len + host.header_digest_len()) as u8;
        let padding = |len| (host.data_offset(len) - len - host.header_digest_len()) as u8;
        let header_bytes = H2cHeader {
            bytes: [0; DATA_HEADER + DIGEST],
            data_digest: [0; DIGEST],
        };
        Self {
            queue: VecDeque::with_capacity(usize::from(depth) + usize::from(H2C_HEADERS)),
            head_sent: 0,
            listed: 0,
            headers: vec![header_bytes; usize::from(H2C_HEADERS)].into(),
            free_headers: (0..H2C_HEADERS).rev().collect(),
            waiting: VecDeque::with_capacity(usize::from(depth)),
            capsule_header: header(CAPSULE_CMD_HEADER),
            capsule_padding: padding(CAPSULE_CMD_HEADER),
            data_header: header(DATA_HEADER),
            data_padding: padding(DATA_HEADER),
            data_digest: host.data_digest_len() as u8,
        }
    }

    #[inline]
    pub(super) fn push_capsule(&mut self, slot: u16, sg: Sg<'static>, in_capsule: u32) {
        let mut pdu = Pdu {
            data: Sg::empty(),
            total: self.capsule_header.into(),
            offset: 0,
            slot,
            h2c: NIL,
            header_len: self.capsule_header,
            padding: 0,
            listed: false,
            ends_r2t: false,
        };
        if in_capsule > 0 {
            pdu.data = sg;
            pdu.padding = self.capsule_padding;
            pdu.total += usize::from(pdu.padding) + sg.len() + usize::from(self.data_digest);
        }
        self.queue.push_back(pdu);
    }

    pub(super) fn between_pdus(&self) -> bool {
        self.head_sent == 0
    }

    /// True while a list is being sent.
    pub(super) fn is_listed(&self) -> bool {
        self.listed > 0
    }

    /// True if the slot's capsule was listed or sent, so that the controller can know of it.
    pub(super) fn capsule_listed(&self, slot: u16) -> bool {
        let mut rest = self
            .queue
            .iter()
            .skip(self.listed.max(usize::from(self.head_sent > 0)));
        !rest.any(|pdu| pdu.slot == slot && pdu.h2c == NIL)
    }

    /// Asks of every PDU that is not on its way whether it stays.
    pub(super) fn retain_unstarted(&mut self, mut stays: impl FnMut(&Pdu) -> bool) {
        let started = self.listed.max(usize::from(self.head_sent > 0));
        let mut index = 0;
        let free_headers = &mut self.free_headers;
        self.queue.retain(|pdu| {
            index += 1;
            let stays = index <= started || stays(pdu);
            if !stays && pdu.h2c != NIL {
                free_headers.push(pdu.h2c);
            }
            stays
        });
    }

    pub(super) fn reset(&mut self) {
        self.queue.clear();
        self.head_sent = 0;
        self.listed = 0;
        self.free_headers.clear();
        self.free_headers.extend((0..H2C_HEADERS).rev());
        self.waiting.clear();
    }
}

/// Gathers a list that begins in the middle of a PDU and has limits.
struct List<'a> {
    out: &'a mut Vec<iovec>,
    skip: usize,
    bytes: usize,
}

impl List<'_> {
    /// True if all of it had room.
    #[inline]
    fn push(&mut self, ptr: *const u8, len: usize) -> bool {
        let skip = self.skip.min(len);
        self.skip -= skip;
        let len = len - skip;
        if len == 0 {
            return true;
        }
        if self.out.len() >= MAX_IOVECS {
            return false;
        }
        let part = len.min(MAX_SEND_BYTES - self.bytes);
        if part > 0 {
            self.out.push(iovec {
                iov_base: ptr.wrapping_add(skip).cast_mut().cast(),
                iov_len: part,
            });
            self.bytes += part;
        }
        part == len
    }
}

impl Machine {
    /// True if there is something to send.
    #[inline]
    pub fn wants_to_send(&self) -> bool {
        !self.send.queue.is_empty() && self.failed.is_none()
    }

    /// Lists what is to be sent, in order, and returns its bytes: at most [`MAX_IOVECS`] pieces and
    /// [`MAX_SEND_BYTES`] bytes. `out` is cleared first. Give it that capacity once, and nothing is
    /// allocated here.
    ///
    /// The addresses stay valid until [`Machine::sent`] is told what became of the list, or the machine is
    /// dropped. A list that is not empty is followed by one call of that, also if nothing was sent.
    pub fn send_list(&mut self, out: &mut Vec<iovec>) -> usize {
        out.clear();
        if self.failed.is_some() {
            return 0;
        }
        let Self { slots, send, .. } = self;
        let digest_len = usize::from(send.data_digest);
        let mut list = List {
            out,
            skip: send.head_sent,
            bytes: 0,
        };
        let mut listed = 0;
        for pdu in &mut send.queue {
            if list.bytes == MAX_SEND_BYTES || list.out.len() == MAX_IOVECS {
                break;
            }
            listed += 1;
            let slot = slots.get_mut(pdu.slot);
            if !pdu.listed {
                pdu.listed = true;
                slot.unlisted -= 1;
            }
            let (header, data_digest) = match send.headers.get(usize::from(pdu.h2c)) {
                None => (slot.header.as_ptr(), slot.digest.as_ptr()),
                Some(header) => (header.bytes.as_ptr(), header.data_digest.as_ptr()),
            };
            let mut whole = list.push(header, pdu.header_len.into());
            if !pdu.data.is_empty() {
                whole = whole && list.push(ZEROS.as_ptr(), pdu.padding.into());
                if digest_len == 0 {
                    whole = whole && pdu.data.iter().all(|(ptr, len)| list.push(ptr, len));
                } else {
                    let staged = slot.staged.as_ptr().wrapping_add(pdu.offset as usize);
                    whole = whole && list.push(staged, pdu.data.len());
                    whole = whole && list.push(data_digest, digest_len);
                }
            }
            if !whole {
                break;
            }
            if pdu.ends_r2t {
                // The controller may have it all and ask for more before we hear that it was sent.
                pdu.ends_r2t = false;
                slot.r2ts_outstanding -= 1;
            }
        }
        send.listed = listed;
        list.bytes
    }

    /// The last list is no longer in use, and `n` bytes of it were sent: all, some or none. Commands that
    /// were answered meanwhile may end now.
    pub fn sent(&mut self, n: usize, ended: &mut impl FnMut(Ended)) {
        let mut left = n;
        self.send.listed = 0;
        while let Some(pdu) = self.send.queue.front() {
            let missing = pdu.total - self.send.head_sent;
            if left < missing {
                self.send.head_sent += left;
                break;
            }
            left -= missing;
            self.send.head_sent = 0;
            let (index, h2c) = (pdu.slot, pdu.h2c);
            self.send.queue.pop_front();
            let slot = self.slots.get_mut(index);
            if h2c == NIL {
                slot.capsule_queued = false;
            } else {
                self.send.free_headers.push(h2c);
            }
            slot.unsent -= 1;
            if slot.unsent == 0 && slot.concluded {
                let (status, result) = slot.outcome;
                self.concluded -= 1;
                ended(self.slots.release(index, status, result));
            }
        }
        if self.concluded > 0 {
            self.cancel_unstarted(ended);
        }
        self.queue_waiting();
    }

    /// Queues data for those who found no header, in the order in which they came.
    #[inline]
    pub(super) fn queue_waiting(&mut self) {
        while let Some(index) = self.send.waiting.front().copied() {
            if !self.queue_data(index) {
                break;
            }
            self.send.waiting.pop_front();
            self.slots.get_mut(index).waits_for_header = false;
        }
    }

    /// An R2T of a slot that may have one more, and data for it.
    pub(super) fn answer_r2t(&mut self, index: u16, ttag: u16, length: u32) {
        self.slots
            .push_r2t(index, PendingR2t { ttag, left: length });
        if !self.slots.get(index).waits_for_header && !self.queue_data(index) {
            self.slots.get_mut(index).waits_for_header = true;
            self.send.waiting.push_back(index);
        }
    }

    /// Queues H2CData for the slot's R2Ts; false if there are not enough headers.
    fn queue_data(&mut self, index: u16) -> bool {
        let max = self.params.max_h2c_data;
        while let Some((slot, r2t)) = self.slots.first_r2t(index) {
            let Some(h2c) = self.send.free_headers.pop() else {
                return false;
            };
            let len = r2t.left.min(max);
            r2t.left -= len;
            let last = r2t.left == 0;
            let header = DataHeader {
                cccid: slot.cid(),
                ttag: r2t.ttag,
                datao: slot.queued,
                datal: len,
            };
            let place = &mut self.send.headers[usize::from(h2c)];
            let bytes = header.encode_h2c(last, &self.host);
            place.bytes[..DATA_HEADER].copy_from_slice(&bytes);
            if self.host.header_digest {
                place.bytes[DATA_HEADER..].copy_from_slice(&digest::digest(&bytes));
            }
            let (data, rest) = slot.rest.split_at(len as usize);
            slot.rest = rest;
            if self.host.data_digest {
                let from = slot.queued as usize;
                let staged = &mut slot.staged[from..from + len as usize];
                data.copy_to(staged);
                place.data_digest = digest::digest(staged);
            }
            let pdu = Pdu {
                data,
                total: usize::from(self.send.data_header)
                    + usize::from(self.send.data_padding)
                    + len as usize
                    + usize::from(self.send.data_digest),
                offset: slot.queued,
                slot: index,
                h2c,
                header_len: self.send.data_header,
                padding: self.send.data_padding,
                listed: false,
                ends_r2t: last,
            };
            slot.queued += len;
            slot.unsent += 1;
            slot.unlisted += 1;
            self.send.queue.push_back(pdu);
            if last {
                self.slots.pop_r2t(index);
            }
        }
        true
    }
}
