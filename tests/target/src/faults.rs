//! The script of a target's misbehaviour.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::status::Status;
use crate::sync::Locked;
use crate::wire::{FatalErrorStatus, Sqe, op};

/// What goes wrong with a command. "The answer" is all PDUs that answer it: C2HData and CapsuleResp.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// The command fails with a status and is not executed.
    Status(Status),
    /// The answer comes so much later; what other commands are answered with passes it.
    Delay(Duration),
    /// The answer comes later by a random time up to this.
    DelayUpTo(Duration),
    /// The answer is held back until so many later answers have left (100 ms at most).
    Reorder(u32),
    /// The command is never answered. It is executed first, or not; an Abort ends it with Command Abort
    /// Requested, or is told that nothing was aborted.
    NoAnswer {
        /// The command is executed.
        execute: bool,
        /// An Abort ends it.
        abortable: bool,
    },
    /// The connection ends before the command is executed.
    DropBefore,
    /// The connection ends after the command is executed and before it is answered.
    DropAfterExecution,
    /// The connection ends after so many bytes of the answer (all but the last byte at most).
    DropMidAnswer(usize),
    /// The connection ends after the answer.
    DropAfterAnswer,
    /// The connection is reset (RST) before the command is executed.
    Reset,
    /// Nothing is read from the socket or written to it for a time; then the command is executed.
    Stall(Duration),
    /// C2HTermReq comes instead of the answer; the command is not executed.
    Terminate(FatalErrorStatus),
    /// CSTS.CFS is set and the command is not answered.
    Fatal,
    /// The header digest of the answer's first PDU is wrong (where header digests are on).
    CorruptHeaderDigest,
    /// The data digest of the first C2HData is wrong (where data digests are on).
    CorruptDataDigest,
    /// A byte of the first C2HData's data is wrong, and its digest is that of the right data.
    CorruptData,
    /// PLEN of the answer's first PDU is off by this.
    WrongPlen(i32),
    /// HLEN of the answer's first PDU.
    WrongHlen(u8),
    /// PDO of the first C2HData, or of the answer's first PDU.
    WrongPdo(u8),
    /// The type of the answer's first PDU.
    WrongType(u8),
    /// DATAO of the first C2HData is behind the end of the command's data.
    DataOutOfRange,
    /// The first C2HData names a command that is not outstanding.
    DataUnknownTag,
    /// The first C2HData comes twice.
    DataTwice,
    /// The last C2HData comes again after the one with the SUCCESS flag.
    DataAfterSuccess,
    /// The first C2HData is left out, and the command completed all the same.
    DataMissing,
    /// The last C2HData has the SUCCESS flag without LAST.
    SuccessWithoutLast,
    /// The R2T names a command that is not outstanding.
    R2tUnknownTag,
    /// The R2T asks for data behind the end of the command's.
    R2tOutOfRange,
    /// The R2T comes twice.
    R2tTwice,
    /// The R2T asks for nothing.
    R2tEmpty,
    /// A read is answered by R2T, before its data.
    R2tForRead,
    /// The completion names a command that is not outstanding; the command itself is not completed.
    ResponseUnknownCid,
    /// The completion comes twice.
    ResponseTwice,
    /// The completion comes before the data.
    ResponseBeforeData,
}

/// Which commands a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// All commands of all queues.
    Any,
    /// All commands of I/O queues, without Connect.
    Io,
    /// All commands of admin queues, without fabrics commands.
    Admin,
    /// Read.
    Read,
    /// Write.
    Write,
    /// Flush.
    Flush,
    /// Any I/O command with this opcode.
    IoOpcode(u8),
    /// Any admin command with this opcode.
    AdminOpcode(u8),
    /// Keep Alive.
    KeepAlive,
    /// Abort.
    Abort,
    /// Identify.
    Identify,
    /// Connect of any queue.
    Connect,
    /// Property Get and Property Set.
    Property,
}

impl On {
    fn matches(self, qid: u16, sqe: &Sqe) -> bool {
        let opcode = sqe.opcode();
        let fabrics = (opcode == op::FABRICS).then_some(sqe.fctype());
        let io = |code: u8| qid != 0 && opcode == code;
        let admin = |code: u8| qid == 0 && opcode == code;
        match self {
            Self::Any => true,
            Self::Io => qid != 0 && fabrics.is_none(),
            Self::Admin => qid == 0 && fabrics.is_none(),
            Self::Read => io(op::READ),
            Self::Write => io(op::WRITE),
            Self::Flush => io(op::FLUSH),
            Self::IoOpcode(code) => io(code),
            Self::AdminOpcode(code) => admin(code),
            Self::KeepAlive => admin(op::KEEP_ALIVE),
            Self::Abort => admin(op::ABORT),
            Self::Identify => admin(op::IDENTIFY),
            Self::Connect => fabrics == Some(op::CONNECT),
            Self::Property => matches!(fabrics, Some(op::PROPERTY_GET | op::PROPERTY_SET)),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum When {
    /// So many of 10,000 commands.
    Rate(u32),
    /// This one, counted from 1 when the rule was added.
    Nth(u64),
    Always,
}

/// When a fault happens.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    on: On,
    when: When,
    fault: Fault,
    port: Option<u16>,
    queue: Option<u16>,
    times: u64,
}

impl Rule {
    fn new(on: On, when: When, fault: Fault) -> Self {
        Self {
            on,
            when,
            fault,
            port: None,
            queue: None,
            times: u64::MAX,
        }
    }
    /// The `n`-th such command after the rule was added, counted from 1.
    pub fn nth(on: On, n: u64, fault: Fault) -> Self {
        Self::new(on, When::Nth(n), fault)
    }
    /// The next such command.
    pub fn once(on: On, fault: Fault) -> Self {
        Self::nth(on, 1, fault)
    }
    /// All such commands.
    pub fn always(on: On, fault: Fault) -> Self {
        Self::new(on, When::Always, fault)
    }
    /// `rate` of 10,000 such commands, chosen by the seed and the command's number.
    pub fn rate(on: On, rate: u32, fault: Fault) -> Self {
        Self::new(on, When::Rate(rate), fault)
    }
    /// Only on a port, by its id (1 is the first).
    pub fn port(mut self, id: u16) -> Self {
        self.port = Some(id);
        self
    }
    /// Only on the queue with this id (0 is the admin queue).
    pub fn queue(mut self, qid: u16) -> Self {
        self.queue = Some(qid);
        self
    }
    /// At most so often.
    pub fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }
}

/// A rule's name, for asking how often it fired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RuleId(usize);

struct Entry {
    rule: Rule,
    alive: bool,
    seen: u64,
    chosen: u64,
    fired: u64,
}

#[derive(Default)]
struct State {
    seed: u64,
    entries: Vec<Entry>,
}

/// The rules of a target.
#[derive(Default)]
pub struct Faults {
    active: AtomicBool,
    state: Mutex<State>,
}

/// A fault that was chosen for a command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chosen {
    pub fault: Fault,
    rule: usize,
    /// A random number that goes with it.
    pub random: u64,
}

impl Faults {
    /// What the random choices are made from; the same seed and the same order of commands give the same faults.
    pub fn seed(&self, seed: u64) {
        self.state.locked().seed = seed;
    }

    /// Adds a rule. The first rule that chooses a command decides; the others count it all the same.
    pub fn add(&self, rule: Rule) -> RuleId {
        let mut state = self.state.locked();
        state.entries.push(Entry {
            rule,
            alive: true,
            seen: 0,
            chosen: 0,
            fired: 0,
        });
        self.active.store(true, Ordering::Release);
        RuleId(state.entries.len() - 1)
    }

    /// Takes a rule away; what it counted can still be asked.
    pub fn remove(&self, id: RuleId) {
        let mut state = self.state.locked();
        if let Some(entry) = state.entries.get_mut(id.0) {
            entry.alive = false;
        }
        self.active
            .store(state.entries.iter().any(|e| e.alive), Ordering::Release);
    }

    /// Takes all rules away; what they counted can still be asked.
    pub fn clear(&self) {
        self.state
            .locked()
            .entries
            .iter_mut()
            .for_each(|e| e.alive = false);
        self.active.store(false, Ordering::Release);
    }

    /// How often the rule's fault really happened. A fault that a command gives no occasion for (a wrong data
    /// digest where digests are off) is not counted.
    pub fn fired(&self, id: RuleId) -> u64 {
        self.state.locked().entries.get(id.0).map_or(0, |e| e.fired)
    }

    /// How often any rule's fault really happened.
    pub fn fired_in_all(&self) -> u64 {
        self.state.locked().entries.iter().map(|e| e.fired).sum()
    }

    /// How many commands the rule was about.
    pub fn seen(&self, id: RuleId) -> u64 {
        self.state.locked().entries.get(id.0).map_or(0, |e| e.seen)
    }

    /// What happens to a command. Without rules this costs one load.
    pub(crate) fn choose(&self, port: u16, qid: u16, sqe: &Sqe) -> Option<Chosen> {
        if !self.active.load(Ordering::Acquire) {
            return None;
        }
        let mut state = self.state.locked();
        let seed = state.seed;
        let mut chosen = None;
        for (i, entry) in state.entries.iter_mut().enumerate() {
            let rule = entry.rule;
            let here = rule.port.is_none_or(|p| p == port) && rule.queue.is_none_or(|q| q == qid);
            if !entry.alive || !here || !rule.on.matches(qid, sqe) {
                continue;
            }
            entry.seen += 1;
            let random = mix(seed ^ mix((i as u64) << 48 ^ entry.seen));
            let hit = match rule.when {
                When::Rate(rate) => random % 10_000 < u64::from(rate),
                When::Nth(n) => entry.seen == n,
                When::Always => true,
            };
            if hit && chosen.is_none() && entry.chosen < rule.times {
                entry.chosen += 1;
                chosen = Some(Chosen {
                    fault: rule.fault,
                    rule: i,
                    random: mix(random),
                });
            }
        }
        chosen
    }

    pub(crate) fn happened(&self, chosen: &Chosen) {
        self.state.locked().entries[chosen.rule].fired += 1;
    }
}

/// A number that looks random, of one that does not (the finalizer of splitmix64).
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
