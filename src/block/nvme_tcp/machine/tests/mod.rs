//! The machine against a target made by hand: PDUs are put together byte by byte from the figures of the
//! specification, with a CRC of the tests' own.

mod data;
mod ends;
mod fatal;
mod flow;

use libc::iovec;

use super::super::wire::{FatalErrorStatus, Nlb, ProtocolError, Sqe, Status};
use super::{Data, Ended, Machine, QueueParams, Tag};
use crate::reactor::Sg;

/// No digests, 8 KiB in a capsule, four R2Ts.
pub(super) fn plain() -> QueueParams {
    QueueParams {
        depth: 8,
        header_digest: false,
        data_digest: false,
        host_pdu_alignment: 4,
        controller_pdu_alignment: 4,
        max_h2c_data: 8192,
        in_capsule: 8192,
        max_r2t: 4,
    }
}

/// No data in capsules.
pub(super) fn by_r2t() -> QueueParams {
    QueueParams {
        in_capsule: 0,
        ..plain()
    }
}

pub(super) fn with_digests(params: QueueParams) -> QueueParams {
    QueueParams {
        header_digest: true,
        data_digest: true,
        ..params
    }
}

/// CRC32C bit by bit (RFC 3385, the reflected polynomial).
pub(super) fn crc(bytes: &[u8]) -> [u8; 4] {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let odd = crc & 1 != 0;
            crc = crc >> 1 ^ if odd { 0x82f6_3b78 } else { 0 };
        }
    }
    (!crc).to_le_bytes()
}

/// Memory of a command in several pieces, with guards around each.
pub(super) struct Memory {
    pieces: Vec<Vec<u8>>,
    iovecs: Box<[iovec]>,
}

const GUARD: usize = 16;
const GUARD_BYTE: u8 = 0xa5;

impl Memory {
    pub(super) fn new(sizes: &[usize]) -> Self {
        let mut pieces: Vec<Vec<u8>> = sizes
            .iter()
            .map(|size| vec![GUARD_BYTE; size + 2 * GUARD])
            .collect();
        let iovecs = pieces
            .iter_mut()
            .zip(sizes)
            .map(|(piece, size)| {
                piece[GUARD..GUARD + size].fill(0);
                iovec {
                    iov_base: piece.as_mut_ptr().wrapping_add(GUARD).cast(),
                    iov_len: *size,
                }
            })
            .collect();
        Self { pieces, iovecs }
    }

    pub(super) fn holding(bytes: &[u8], sizes: &[usize]) -> Self {
        let memory = Self::new(sizes);
        assert_eq!(memory.sg().copy_from(bytes), bytes.len());
        memory
    }

    pub(super) fn sg(&self) -> Sg<'static> {
        let iovecs: &[iovec] = &self.iovecs;
        // SAFETY: the tests keep the memory until its command has ended or the machine is gone; it is on
        // the heap and does not move.
        unsafe { Sg::new(&*std::ptr::from_ref(iovecs)) }
    }

    /// What is in it. The guards must be untouched.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for piece in &self.pieces {
            let (guard, rest) = piece.split_at(GUARD);
            let (bytes, end) = rest.split_at(rest.len() - GUARD);
            assert!(guard.iter().chain(end).all(|byte| *byte == GUARD_BYTE));
            all.extend_from_slice(bytes);
        }
        all
    }
}

/// Bytes that tell where they are.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 251) as u8).collect()
}

/// A machine, what it told, and the other end of its connection.
pub(super) struct Rig {
    pub(super) machine: Machine,
    pub(super) params: QueueParams,
    pub(super) ended: Vec<Ended>,
    list: Vec<iovec>,
}

impl Rig {
    pub(super) fn new(params: QueueParams) -> Self {
        Self {
            machine: Machine::new(params),
            params,
            ended: Vec::new(),
            list: Vec::with_capacity(super::MAX_IOVECS),
        }
    }

    pub(super) fn begin(&mut self, sqe: Sqe, data: Data, user: u32) -> Tag {
        // SAFETY: the tests keep the memory as long as it has to be.
        unsafe { self.machine.begin(sqe, data, user) }.expect("a free slot")
    }

    pub(super) fn read(&mut self, memory: &Memory, user: u32) -> Tag {
        let sqe = Sqe::read(1, 0, Nlb::new(8).expect("blocks"));
        self.begin(sqe, Data::Read(memory.sg()), user)
    }

    pub(super) fn write(&mut self, memory: &Memory, user: u32) -> Tag {
        let sqe = Sqe::write(1, 0, Nlb::new(8).expect("blocks"), false);
        self.begin(sqe, Data::Write(memory.sg()), user)
    }

    pub(super) fn flush(&mut self, user: u32) -> Tag {
        self.begin(Sqe::flush(1), Data::None, user)
    }

    /// What the machine lists, not yet accounted for.
    pub(super) fn list(&mut self) -> Vec<u8> {
        let bytes = self.machine.send_list(&mut self.list);
        let mut all = Vec::new();
        for piece in &self.list {
            let base: *const u8 = piece.iov_base.cast();
            assert!(piece.iov_len > 0);
            for at in 0..piece.iov_len {
                // SAFETY: the machine's list names memory of its own or of a command that has not ended.
                all.push(unsafe { base.add(at).read() });
            }
        }
        assert_eq!(all.len(), bytes);
        assert!(self.list.len() <= super::MAX_IOVECS && bytes <= super::MAX_SEND_BYTES);
        all
    }

    pub(super) fn sent(&mut self, n: usize) {
        let ended = &mut self.ended;
        self.machine.sent(n, &mut |end| ended.push(end));
    }

    /// Sends all that there is to send.
    pub(super) fn drain(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while self.machine.wants_to_send() {
            let bytes = self.list();
            assert!(!bytes.is_empty());
            self.sent(bytes.len());
            all.extend_from_slice(&bytes);
        }
        assert!(self.machine.between_pdus());
        all
    }

    /// Lets `bytes` come in one piece, or as the lists of places are too short, in several.
    pub(super) fn feed(&mut self, mut bytes: &[u8]) -> Result<(), ProtocolError> {
        while !bytes.is_empty() {
            let room = self.machine.recv_list(&mut self.list);
            assert!(room > 0);
            let mut n = 0;
            for piece in &self.list {
                let part = piece.iov_len.min(bytes.len());
                let base: *mut u8 = piece.iov_base.cast();
                for (at, byte) in bytes[..part].iter().enumerate() {
                    // SAFETY: the machine's list names memory of its own or of a command that has not
                    // ended.
                    unsafe { base.add(at).write(*byte) };
                }
                bytes = &bytes[part..];
                n += part;
            }
            let ended = &mut self.ended;
            self.machine.received(n, &mut |end| ended.push(end))?;
        }
        Ok(())
    }

    /// Lets `bytes` come in pieces of the given lengths, the last again and again.
    pub(super) fn feed_split(&mut self, bytes: &[u8], at: usize) -> Result<(), ProtocolError> {
        let (first, second) = bytes.split_at(at);
        self.feed(first)?;
        self.feed(second)
    }

    /// Takes the one command that has ended since the last call.
    pub(super) fn one_end(&mut self) -> Ended {
        assert_eq!(self.ended.len(), 1, "{:?}", self.ended);
        self.ended.remove(0)
    }

    fn header(&self, mut header: Vec<u8>) -> Vec<u8> {
        if self.params.header_digest {
            header[1] |= 1;
            let digest = crc(&header);
            header.extend_from_slice(&digest);
        }
        header
    }

    /// Without data, PLEN is that of header and digest.
    fn short(&self, pdu_type: u8, specific: &[u8]) -> Vec<u8> {
        let plen = 24 + if self.params.header_digest { 4 } else { 0 };
        let mut header = vec![pdu_type, 0, 24, 0, plen, 0, 0, 0];
        header.extend_from_slice(specific);
        self.header(header)
    }

    /// A response capsule.
    pub(super) fn response(&self, tag: Tag, status: u16, result: u64) -> Vec<u8> {
        let mut cqe = result.to_le_bytes().to_vec();
        cqe.extend_from_slice(&[9, 0, 1, 0]);
        cqe.extend_from_slice(&tag.cid().to_le_bytes());
        cqe.extend_from_slice(&(status << 1).to_le_bytes());
        self.short(5, &cqe)
    }

    /// An R2T.
    pub(super) fn r2t(&self, tag: Tag, ttag: u16, offset: u32, length: u32) -> Vec<u8> {
        let mut specific = tag.cid().to_le_bytes().to_vec();
        specific.extend_from_slice(&ttag.to_le_bytes());
        specific.extend_from_slice(&offset.to_le_bytes());
        specific.extend_from_slice(&length.to_le_bytes());
        specific.extend_from_slice(&[0; 4]);
        self.short(9, &specific)
    }

    /// A C2HData; `flags` are LAST_PDU (4) and SUCCESS (8).
    pub(super) fn c2h(&self, tag: Tag, offset: u32, data: &[u8], flags: u8) -> Vec<u8> {
        let hdgst = if self.params.header_digest { 4 } else { 0 };
        let ddgst = if self.params.data_digest { 4 } else { 0 };
        let align = self.params.controller_pdu_alignment as usize;
        let pdo = usize::next_multiple_of(24 + hdgst, align);
        let plen = (pdo + data.len() + ddgst) as u32;
        let ddgstf = if ddgst > 0 { 2 } else { 0 };
        let mut pdu = vec![7, flags | ddgstf, 24, pdo as u8];
        pdu.extend_from_slice(&plen.to_le_bytes());
        pdu.extend_from_slice(&tag.cid().to_le_bytes());
        pdu.extend_from_slice(&[0, 0]);
        pdu.extend_from_slice(&offset.to_le_bytes());
        pdu.extend_from_slice(&(data.len() as u32).to_le_bytes());
        pdu.extend_from_slice(&[0; 4]);
        let mut pdu = self.header(pdu);
        // Padding is reserved: whatever is in it does not matter.
        pdu.resize(pdo, 0x77);
        pdu.extend_from_slice(data);
        if ddgst > 0 {
            pdu.extend_from_slice(&crc(data));
        }
        pdu
    }
}

pub(super) const LAST: u8 = 4;
pub(super) const SUCCESS: u8 = 8;

/// What has to be told the controller of an error: status and information.
pub(super) fn fatal(result: Result<(), ProtocolError>) -> (FatalErrorStatus, u32) {
    let error = result.expect_err("an error");
    error.fatal_error().expect("one that is answered")
}

#[test]
fn the_tests_crc_is_the_one_of_the_rfc() {
    assert_eq!(crc(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
    let status = Status::from_raw(0x81);
    assert_eq!(status, Status::CAPACITY_EXCEEDED);
}
