//! Answers that leave later than they were made, and silence.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::connection::Connection;

/// An answer that is held back waits for others to overtake it no longer than this.
const REORDER_LIMIT: Duration = Duration::from_millis(100);

/// What a connection sends later.
#[derive(Default)]
pub(crate) struct Late {
    answers: Vec<LateAnswer>,
    /// Answers that have left.
    sent: u64,
    stalled_until: Option<Instant>,
    /// An answer is being made that is not sent yet: what it says is not said.
    pub capturing: bool,
    /// Executions in the journal whose commands are not answered yet, by command.
    journaled: HashMap<u16, usize>,
}

struct LateAnswer {
    cid: u16,
    bytes: Vec<u8>,
    at: Instant,
    /// Or when so many answers have left.
    after: u64,
}

impl Late {
    pub fn stall(&mut self, time: Duration) {
        self.stalled_until = Some(Instant::now() + time);
    }
    pub fn is_stalled(&self) -> bool {
        self.stalled_until
            .is_some_and(|until| Instant::now() < until)
    }
    pub fn next_deadline(&self) -> Option<Instant> {
        let stall = self.stalled_until.filter(|&until| Instant::now() < until);
        self.answers.iter().map(|a| a.at).chain(stall).min()
    }
    /// Whether an answer is due by time.
    pub fn is_due(&self, now: Instant) -> bool {
        self.answers.iter().any(|a| a.at <= now)
    }
    /// Whether an answer was overtaken as often as it was to be.
    pub fn is_overtaken(&self) -> bool {
        self.answers.iter().any(|a| a.after <= self.sent)
    }
}

impl Connection {
    /// A command is executed, and its place in the journal to be marked when it is answered.
    pub fn journaled(&mut self, cid: u16, place: Option<usize>) {
        if let Some(place) = place {
            self.late.journaled.insert(cid, place);
        }
    }

    /// The completion of a command is on its way, unless it is only being made.
    pub fn answered(&mut self, cid: u16) {
        if self.late.capturing {
            return;
        }
        self.late.sent += 1;
        if !self.late.journaled.is_empty() {
            if let Some(place) = self.late.journaled.remove(&cid) {
                self.shared.journal.answered(place);
            }
        }
    }

    /// Sends an answer that was captured.
    pub fn emit(&mut self, cid: u16, bytes: &[u8]) {
        self.out.buf.extend_from_slice(bytes);
        self.answered(cid);
    }

    /// Sends an answer that was captured when the time has passed.
    pub fn emit_after(&mut self, cid: u16, bytes: Vec<u8>, time: Duration) {
        let at = Instant::now() + time;
        self.late.answers.push(LateAnswer {
            cid,
            bytes,
            at,
            after: u64::MAX,
        });
    }

    /// Sends an answer that was captured when `others` more have left.
    pub fn emit_behind(&mut self, cid: u16, bytes: Vec<u8>, others: u32) {
        let (at, after) = (
            Instant::now() + REORDER_LIMIT,
            self.late.sent + u64::from(others),
        );
        self.late.answers.push(LateAnswer {
            cid,
            bytes,
            at,
            after,
        });
    }

    /// Sends what is due.
    pub fn release_late(&mut self) {
        let (now, sent) = (Instant::now(), self.late.sent);
        let all = std::mem::take(&mut self.late.answers);
        let (due, rest) = all
            .into_iter()
            .partition(|a| a.at <= now || a.after <= sent);
        self.late.answers = rest;
        let mut due: Vec<LateAnswer> = due;
        due.sort_by_key(|a| a.at);
        for answer in due {
            self.emit(answer.cid, &answer.bytes);
        }
    }
}
