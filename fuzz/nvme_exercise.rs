//! The state machine of an NVMe/TCP queue against a target that may say anything. The fuzz target runs it on
//! what libFuzzer makes, and `tests/nvme_mutations.rs` on seeded bytes.
//!
//! The bytes choose what was agreed on, which commands are begun, how much of what is listed is sent and
//! received at a time, and what the target says. What must hold of any bytes: no panic; no memory is
//! written but that of a read that has not ended; no memory is listed of a command that has ended; each
//! command ends once, or is abandoned once. And as long as nothing is mutated: no error, every PDU that is
//! sent answers something, and every read that succeeds has its data.

use std::collections::VecDeque;

use libc::iovec;
use virtioblkd::block::nvme_tcp::machine::{Data, Ended, Machine, QueueParams, Tag};
use virtioblkd::block::nvme_tcp::wire::digest::digest;
use virtioblkd::block::nvme_tcp::wire::{Nlb, Sqe, Status};
use virtioblkd::reactor::Sg;

/// What became of the commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Commands that succeeded.
    pub succeeded: u64,
    /// Commands that failed, by the target's word or by a digest.
    pub failed: u64,
    /// Commands that were abandoned.
    pub abandoned: u64,
    /// Connections that ended with an error.
    pub fatal: u64,
}

const GUARD: usize = 8;
const GUARD_BYTE: u8 = 0xa5;
const LAST: u8 = 4;
const SUCCESS: u8 = 8;

/// The input. Behind its end is what makes everything go on, whole.
struct Input<'a>(&'a [u8]);

const END: usize = 2;

impl Input<'_> {
    fn byte(&mut self) -> usize {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                usize::from(*first)
            }
            None => END,
        }
    }

    /// Less than `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        (self.byte() << 8 | self.byte()) % bound
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Read,
    Write,
}

/// One command, kept to the end so that its memory can be looked at.
struct Command {
    kind: Kind,
    tag: Option<Tag>,
    piece: Box<[u8]>,
    /// What a write sends, and what a read is given.
    content: Box<[u8]>,
    iovecs: Box<[iovec]>,
    length: usize,
    /// The target has its capsule.
    known: bool,
    /// Bytes that the target has sent, or has asked for.
    offset: usize,
    /// What it asked for: (tag, offset, length), in order, without what has come.
    asked: VecDeque<(u16, usize, usize)>,
    /// Bytes that have come to it.
    came: usize,
    last_said: bool,
    answered: bool,
    /// It has ended, or was abandoned; and what its memory held then.
    gone: Option<Box<[u8]>>,
}

fn content(user: usize, length: usize) -> Box<[u8]> {
    (0..length)
        .map(|at| (user * 31 + at * 7 + at / 256) as u8)
        .collect()
}

impl Command {
    fn new(kind: Kind, user: usize, length: usize, pieces: usize) -> Self {
        let mut piece = vec![GUARD_BYTE; length + 2 * GUARD].into_boxed_slice();
        let content = content(user, length);
        let inside = &mut piece[GUARD..GUARD + length];
        match kind {
            Kind::Write => inside.copy_from_slice(&content),
            _ => inside.fill(0),
        }
        let base = piece.as_mut_ptr();
        let step = length.div_ceil(pieces).max(1);
        let iovecs = (0..length)
            .step_by(step)
            .map(|at| iovec {
                iov_base: base.wrapping_add(GUARD + at).cast(),
                iov_len: step.min(length - at),
            })
            .collect();
        Self {
            kind,
            tag: None,
            piece,
            content,
            iovecs,
            length,
            known: false,
            offset: 0,
            asked: VecDeque::new(),
            came: 0,
            last_said: false,
            answered: false,
            gone: None,
        }
    }

    fn data(&self) -> Data {
        let iovecs: &[iovec] = &self.iovecs;
        // SAFETY: memory and iovecs are on the heap and kept until the machine is dropped.
        let sg = unsafe { Sg::new(&*std::ptr::from_ref(iovecs)) };
        match self.kind {
            Kind::Plain => Data::None,
            Kind::Read => Data::Read(sg),
            Kind::Write => Data::Write(sg),
        }
    }

    fn check(&self, user: usize) {
        let (guard, rest) = self.piece.split_at(GUARD);
        let (bytes, end) = rest.split_at(self.length);
        assert!(
            guard.iter().chain(end).all(|byte| *byte == GUARD_BYTE),
            "outside of {user}"
        );
        if let Some(then) = &self.gone {
            assert_eq!(bytes, &**then, "{user} was written to after its end");
        }
        if self.kind == Kind::Write {
            assert_eq!(bytes, &*self.content);
        }
    }

    fn go(&mut self) {
        assert!(self.gone.is_none(), "ended twice");
        self.gone = Some(self.piece[GUARD..GUARD + self.length].into());
    }

    fn contains(&self, piece: &iovec) -> bool {
        self.piece
            .as_ptr_range()
            .contains(&piece.iov_base.cast_const().cast::<u8>())
    }
}

struct Run<'a> {
    input: Input<'a>,
    params: QueueParams,
    machine: Machine,
    commands: Vec<Command>,
    /// Commands that have not ended, in the order of their beginning.
    in_flight: Vec<usize>,
    /// Bytes that the target has sent and that have not come.
    stream: VecDeque<u8>,
    /// What the target has of a PDU that is not complete.
    partial: Vec<u8>,
    /// The list that is being sent: its pieces, their bytes, and how many of them are sent.
    listed: Option<(Vec<iovec>, Vec<u8>, usize)>,
    list: Vec<iovec>,
    /// Nothing was mutated on this connection.
    clean: bool,
    outcome: Outcome,
}

fn gather(list: &[iovec]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in list {
        let base: *const u8 = piece.iov_base.cast();
        // SAFETY: the list names memory of the machine, or of commands, which are all kept.
        bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(base, piece.iov_len) });
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> usize {
    usize::from(bytes[at]) | usize::from(bytes[at + 1]) << 8
}

fn dword(bytes: &[u8], at: usize) -> usize {
    word(bytes, at) | word(bytes, at + 2) << 16
}

/// Does what `bytes` say.
///
/// # Panics
/// If something does not hold that must.
pub fn exercise(bytes: &[u8]) -> Outcome {
    let mut input = Input(bytes);
    let flags = input.byte();
    let alignment = |n: usize| (n as u32 % 32 + 1) * 4;
    let params = QueueParams {
        depth: [1, 3, 8, 100][input.byte() % 4],
        header_digest: flags & 1 != 0,
        data_digest: flags & 2 != 0,
        host_pdu_alignment: if flags & 4 != 0 {
            alignment(input.byte())
        } else {
            4
        },
        controller_pdu_alignment: if flags & 8 != 0 {
            alignment(input.byte())
        } else {
            4
        },
        max_h2c_data: 4096,
        in_capsule: if flags & 16 != 0 { 1024 } else { 0 },
        max_r2t: 1 + input.byte() as u32 % 4,
    };
    let may_mutate = flags & 32 != 0;
    let mut run = Run {
        machine: Machine::new(params),
        input,
        params,
        commands: Vec::new(),
        in_flight: Vec::new(),
        stream: VecDeque::new(),
        partial: Vec::new(),
        listed: None,
        list: Vec::new(),
        clean: true,
        outcome: Outcome::default(),
    };
    while !run.input.0.is_empty() {
        // One step in sixteen is not what a target does.
        let step = run.input.byte() % 48;
        match if may_mutate && step > 44 {
            step - 33
        } else {
            step % 12
        } {
            0 | 1 => run.begin(),
            2 | 3 => run.list(),
            4 | 5 => run.account(),
            6..9 => run.target_speaks(),
            9 | 10 => run.receive(),
            11 => run.target_fails(),
            12 => run.flip(),
            13 => run.garbage(),
            _ => run.abandon(),
        }
        run.check();
    }
    run.finish();
    run.outcome
}

impl Run<'_> {
    fn begin(&mut self) {
        let kind = [Kind::Plain, Kind::Read, Kind::Write][self.input.byte() % 3];
        let bits = self.input.byte() % 14;
        let length = match kind {
            Kind::Plain => 0,
            _ => self.input.below(1 << bits) + 1,
        };
        let pieces = self.input.byte() % 5 + 1;
        let user = self.commands.len();
        let mut command = Command::new(kind, user, length, pieces);
        let sqe = match kind {
            Kind::Plain => Sqe::flush(1),
            Kind::Read => Sqe::read(1, 0, Nlb::new(1).expect("one")),
            Kind::Write => Sqe::write(1, 0, Nlb::new(1).expect("one"), true),
        };
        let free = self.machine.free();
        // SAFETY: what a command refers to is kept until the machine is dropped.
        command.tag = unsafe { self.machine.begin(sqe, command.data(), user as u32) };
        assert_eq!(command.tag.is_some(), free > 0);
        if command.tag.is_some() {
            // One that the target may name by an identifier which was another's, long ago.
            for other in &mut self.commands {
                if other.tag == command.tag {
                    other.tag = None;
                }
            }
            self.in_flight.push(user);
            self.commands.push(command);
        }
    }

    fn list(&mut self) {
        if self.listed.is_some() || !self.machine.wants_to_send() {
            return;
        }
        let mut list = Vec::new();
        let bytes = self.machine.send_list(&mut list);
        let all = gather(&list);
        assert_eq!(all.len(), bytes);
        let gone = |command: &&Command| command.gone.is_some();
        for command in self.commands.iter().filter(gone) {
            assert!(!list.iter().any(|piece| command.contains(piece)));
        }
        let n = match self.input.byte() % 4 {
            0 => self.input.below(bytes + 1),
            1 => self.input.below(bytes.min(100) + 1),
            _ => bytes,
        };
        // The target has it before we hear that it was sent.
        self.partial.extend_from_slice(&all[..n]);
        self.listed = Some((list, all, n));
        self.target_takes();
    }

    fn account(&mut self) {
        let Some((list, then, n)) = self.listed.take() else {
            return;
        };
        assert_eq!(gather(&list), then, "a list changed while it was sent");
        let mut ends = Vec::new();
        self.machine.sent(n, &mut |end| ends.push(end));
        self.ended(&ends);
    }

    /// The target takes PDUs apart, which must be as agreed.
    fn target_takes(&mut self) {
        loop {
            let have = &self.partial;
            if have.len() < 8 || have.len() < dword(have, 4) {
                return;
            }
            let plen = dword(have, 4);
            let pdu: Vec<u8> = self.partial.drain(..plen).collect();
            let (hlen, cid_at) = match pdu[0] {
                4 => (72, 10),
                6 => (24, 8),
                other => panic!("PDU of type {other}"),
            };
            assert_eq!(usize::from(pdu[2]), hlen);
            let hdgst = if self.params.header_digest { 4 } else { 0 };
            assert_eq!(usize::from(pdu[1] & 1) * 4, hdgst);
            if hdgst > 0 {
                assert_eq!(pdu[hlen..hlen + 4], digest(&pdu[..hlen]));
            }
            let pdo = usize::from(pdu[3]);
            let data = if plen > hlen + hdgst {
                let align = self.params.host_pdu_alignment as usize;
                assert_eq!(pdo, (hlen + hdgst).next_multiple_of(align));
                let ddgst = if self.params.data_digest { 4 } else { 0 };
                assert_eq!(usize::from(pdu[1] >> 1 & 1) * 4, ddgst);
                let (data, end) = pdu[pdo..].split_at(plen - pdo - ddgst);
                if ddgst > 0 {
                    assert_eq!(end, digest(data));
                }
                data
            } else {
                &[]
            };
            let cid = word(&pdu, cid_at);
            let named =
                |command: &Command| command.tag.is_some_and(|tag| usize::from(tag.cid()) == cid);
            let Some(user) = self.commands.iter().rposition(named) else {
                assert!(!self.clean, "a command that was not begun");
                continue;
            };
            self.target_has(user, &pdu, data);
        }
    }

    fn target_has(&mut self, user: usize, pdu: &[u8], data: &[u8]) {
        let clean = self.clean;
        let command = &mut self.commands[user];
        let from = if pdu[0] == 4 {
            assert!(!command.known, "a capsule twice");
            command.known = true;
            0
        } else {
            dword(pdu, 12)
        };
        assert_eq!(data, &command.content[from..from + data.len()]);
        if pdu[0] == 4 {
            command.came = data.len();
        } else if clean {
            let asked = command
                .asked
                .front_mut()
                .expect("data that were not asked for");
            let (ttag, offset, left) = asked;
            assert_eq!((word(pdu, 10), from), (usize::from(*ttag), *offset));
            assert!(data.len() <= *left && data.len() <= 4096 && !data.is_empty());
            *offset += data.len();
            *left -= data.len();
            assert_eq!(pdu[1] & LAST != 0, *left == 0);
            if *left == 0 {
                command.asked.pop_front();
            }
            command.came += data.len();
        }
    }

    /// A header from a target: type, flags, and what is behind the common header.
    fn pdu(&self, pdu_type: u8, flags: u8, specific: &[u8], data: Option<&[u8]>) -> Vec<u8> {
        let hdgst = if self.params.header_digest { 4 } else { 0 };
        let mut flags = flags | u8::from(hdgst > 0);
        let (mut pdo, mut plen) = (0, 24 + hdgst);
        if let Some(data) = data {
            let align = self.params.controller_pdu_alignment as usize;
            pdo = usize::next_multiple_of(24 + hdgst, align);
            plen = pdo + data.len();
            if self.params.data_digest {
                flags |= 2;
                plen += 4;
            }
        }
        let mut pdu = vec![pdu_type, flags, 24, pdo as u8];
        pdu.extend_from_slice(&(plen as u32).to_le_bytes());
        pdu.extend_from_slice(specific);
        pdu.resize(24, 0);
        if hdgst > 0 {
            let header = digest(&pdu);
            pdu.extend_from_slice(&header);
        }
        if let Some(data) = data {
            pdu.resize(pdo, 0);
            pdu.extend_from_slice(data);
            if self.params.data_digest {
                pdu.extend_from_slice(&digest(data));
            }
        }
        pdu
    }

    fn data_pdu(
        &self,
        pdu_type: u8,
        flags: u8,
        fields: (u16, u16, usize, usize),
        data: Option<&[u8]>,
    ) -> Vec<u8> {
        let (cid, ttag, offset, length) = fields;
        let mut specific = cid.to_le_bytes().to_vec();
        specific.extend_from_slice(&ttag.to_le_bytes());
        specific.extend_from_slice(&(offset as u32).to_le_bytes());
        specific.extend_from_slice(&(length as u32).to_le_bytes());
        self.pdu(pdu_type, flags, &specific, data)
    }

    fn response(&mut self, user: usize, status: u16) {
        let Some(tag) = self.commands[user].tag else {
            return;
        };
        let mut cqe = vec![user as u8; 12];
        cqe.extend_from_slice(&tag.cid().to_le_bytes());
        cqe.extend_from_slice(&(status << 1).to_le_bytes());
        let pdu = self.pdu(5, 0, &cqe, None);
        self.stream.extend(pdu);
        self.commands[user].answered = true;
    }

    /// A command that the target knows and has not answered. On a connection that is not clean, any.
    fn someone(&mut self) -> Option<usize> {
        let chosen = self.input.byte();
        let fits = |user: &&usize| {
            let command = &self.commands[**user];
            !self.clean || command.known && !command.answered
        };
        let all: Vec<usize> = self.in_flight.iter().filter(fits).copied().collect();
        (!all.is_empty()).then(|| all[chosen % all.len()])
    }

    /// The target does the next thing for a command, and all of it right.
    fn target_speaks(&mut self) {
        let Some(user) = self.someone() else { return };
        let command = &self.commands[user];
        let (kind, length, offset) = (command.kind, command.length, command.offset);
        let Some(tag) = command.tag else { return };
        let (cid, max_r2t) = (tag.cid(), self.params.max_r2t as usize);
        let missing = length - offset;
        let part = match self.input.byte() % 3 {
            // Parts are of whole dwords, but the last.
            0 => (self.input.below(missing.max(1)) & !3).max(4).min(missing),
            _ => missing,
        };
        match kind {
            Kind::Read if !command.last_said => {
                let data = command.content[offset..offset + part].to_vec();
                let last = part == missing;
                let success = last && self.input.byte() % 2 == 0;
                let flags = if last { LAST } else { 0 } | if success { SUCCESS } else { 0 };
                let pdu = self.data_pdu(7, flags, (cid, 0, offset, part), Some(&data));
                self.stream.extend(pdu);
                let command = &mut self.commands[user];
                command.offset += part;
                command.last_said = last;
                command.answered = success;
            }
            Kind::Write
                if missing > 0
                    && command.came < length
                    && part > 0
                    && length > self.params.in_capsule as usize =>
            {
                if command.asked.len() < max_r2t {
                    let ttag = self.input.below(1 << 16) as u16;
                    let pdu = self.data_pdu(9, 0, (cid, ttag, offset, part), None);
                    self.stream.extend(pdu);
                    let command = &mut self.commands[user];
                    command.offset += part;
                    command.asked.push_back((ttag, offset, part));
                }
            }
            Kind::Write if self.clean && command.came < length => {}
            _ => self.response(user, 0),
        }
    }

    /// The target fails a command, whatever it has done for it.
    fn target_fails(&mut self) {
        if let Some(user) = self.someone() {
            self.response(user, 0x4006);
        }
    }

    fn flip(&mut self) {
        if !self.stream.is_empty() {
            // Mostly in what comes next, which is a header more often than not.
            let near = self.stream.len().min(40);
            let at = match self.input.byte() % 4 {
                0 => self.input.below(self.stream.len()),
                _ => self.input.below(near),
            };
            self.stream[at] ^= self.input.byte() as u8 | 1;
            self.clean = false;
        }
    }

    fn garbage(&mut self) {
        let types = [3, 5, 7, 9, 1, 8, 6, 0xff];
        let mut header = vec![types[self.input.byte() % 8]];
        header.extend((1..24).map(|_| self.input.byte() as u8));
        if self.input.byte() % 2 == 0 {
            header[2] = 24;
            header[4..8].copy_from_slice(&24_u32.to_le_bytes());
        }
        self.stream.extend(header);
        self.clean = false;
    }

    fn receive(&mut self) {
        if self.stream.is_empty() {
            return;
        }
        let room = self.machine.recv_list(&mut self.list);
        let have = self.stream.len().min(room);
        let n = match self.input.byte() % 4 {
            0 => self.input.below(have + 1).max(1),
            1 => self.input.below(have.min(64) + 1).max(1),
            _ => have,
        };
        assert!(n > 0 && n <= room);
        let bytes: Vec<u8> = self.stream.drain(..n).collect();
        let mut rest = &bytes[..];
        for piece in &self.list {
            let (now, later) = rest.split_at(piece.iov_len.min(rest.len()));
            let base: *mut u8 = piece.iov_base.cast();
            // SAFETY: the list names memory of the machine, or of commands, which are all kept.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), base, now.len()) };
            rest = later;
        }
        let mut ends = Vec::new();
        let result = self.machine.received(n, &mut |end| ends.push(end));
        self.ended(&ends);
        if let Err(error) = result {
            assert!(!self.clean, "{error}");
            assert_eq!(self.machine.recv_list(&mut self.list), 0);
            assert!(Machine::term_req(&error).len() <= 152);
            self.outcome.fatal += 1;
            self.account();
            self.abandon();
        }
    }

    fn ended(&mut self, ends: &[Ended]) {
        for end in ends {
            let user = end.user as usize;
            let place = self.in_flight.iter().position(|other| *other == user);
            self.in_flight
                .remove(place.expect("a command that was under way"));
            let clean = self.clean;
            let command = &mut self.commands[user];
            assert_eq!(command.tag, Some(end.tag));
            command.go();
            if let Some((list, ..)) = &self.listed {
                let used = list.iter().any(|piece| command.contains(piece));
                assert!(!used, "{user} ended while its memory is being sent");
            }
            if end.status == Status::SUCCESS {
                self.outcome.succeeded += 1;
                let bytes = &command.piece[GUARD..GUARD + command.length];
                let whole = command.kind != Kind::Read || bytes == &*command.content;
                // With data digests no damage of the data goes by.
                assert!(whole || !clean && !self.params.data_digest);
            } else {
                self.outcome.failed += 1;
            }
        }
    }

    fn abandon(&mut self) {
        // The kernel is done with its list first.
        self.account();
        let mut users = Vec::new();
        self.machine
            .abandon_all(&mut |user| users.push(user as usize));
        assert_eq!(users, self.in_flight);
        for user in self.in_flight.drain(..) {
            self.commands[user].go();
            self.outcome.abandoned += 1;
        }
        for command in &mut self.commands {
            command.tag = None;
        }
        assert_eq!(self.machine.free(), self.params.depth);
        self.stream.clear();
        self.partial.clear();
        self.clean = true;
    }

    fn check(&self) {
        let in_flight = self.machine.commands().map(|command| command.user as usize);
        assert!(in_flight.eq(self.in_flight.iter().copied()));
        assert_eq!(usize::from(self.machine.in_flight()), self.in_flight.len());
        for (user, command) in self.commands.iter().enumerate() {
            command.check(user);
        }
    }

    /// Everything comes to its end: by the target's word where nothing was mutated.
    fn finish(&mut self) {
        let mut rounds = 0;
        while self.clean && !self.in_flight.is_empty() {
            self.account();
            self.list();
            self.account();
            self.target_speaks();
            while !self.stream.is_empty() {
                self.receive();
            }
            rounds += 1;
            assert!(rounds < 100_000, "a command that does not end");
        }
        self.check();
        self.abandon();
        self.check();
    }
}
