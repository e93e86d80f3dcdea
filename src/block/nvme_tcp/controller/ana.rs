//! Asymmetric namespace access (Base section 8.1): what a path is worth.

use std::time::{Duration, Instant};

use super::channel::{Channel, succeeded};
use super::facts::NamespaceFacts;
use super::transport::MAX_DATA;
use super::trouble::{Result, later};
use super::wait::Waiter;
use crate::block::nvme_tcp::link::Access;
use crate::block::nvme_tcp::wire::Sqe;
use crate::block::nvme_tcp::wire::command::log as log_page;
use crate::block::nvme_tcp::wire::identify::{AnaLog, AnaState, Controller};

/// LSP of the ANA log page: groups without their namespaces (RGO, Base section 5.16.1.13).
const RGO: u8 = 1;
/// The log is read again this often if it changes while it is read.
const TRIES: u32 = 8;

/// The ANA log page of a controller.
#[derive(Debug)]
pub(crate) struct Ana {
    /// Bytes of the log.
    size: u32,
    /// How long a change may take (ANATT).
    transition: Duration,
    changing_since: Option<Instant>,
}

impl Ana {
    /// Of a controller that reports access states; none of one that does not.
    pub(crate) fn of(controller: &Controller) -> Option<Self> {
        let groups = u64::from(controller.nanagrpid) * AnaLog::GROUP as u64;
        controller.reports_ana().then(|| Self {
            size: u32::try_from(AnaLog::HEADER as u64 + groups).unwrap_or(u32::MAX),
            transition: Duration::from_secs(controller.anatt.max(1).into()),
            changing_since: None,
        })
    }

    /// When a change has taken too long; none: there is none.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.changing_since.map(|since| since + self.transition)
    }

    /// The access that the log tells for a namespace.
    pub(crate) fn read(
        &mut self,
        channel: &mut Channel,
        facts: &NamespaceFacts,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Access> {
        let log = self.log(channel, deadline, waiter)?;
        let access = match log.state_of(facts.nsid, facts.ana_group) {
            Some(AnaState::Optimized) => Access::Optimized,
            Some(AnaState::NonOptimized) => Access::NonOptimized,
            Some(AnaState::Inaccessible) => Access::Inaccessible,
            Some(AnaState::PersistentLoss) => Access::PersistentLoss,
            Some(AnaState::Change) => Access::Change,
            None => {
                log::warn!(
                    "the ANA log has no group {} of namespace {}; it is taken for inaccessible",
                    facts.ana_group,
                    facts.nsid
                );
                Access::Inaccessible
            }
        };
        self.changing_since = match access {
            Access::Change => self.changing_since.or_else(|| Some(Instant::now())),
            _ => None,
        };
        Ok(access)
    }

    /// The log, whole. One that comes in several pieces is read until it stays the same meanwhile.
    fn log(
        &self,
        channel: &mut Channel,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<AnaLog> {
        const WHAT: &str = "Get Log Page (ANA)";
        // A controller has as many groups as it says, at most; 1 MiB of them is more than anybody has.
        if self.size > 1 << 20 {
            return Err(later(format!(
                "the ANA log has {} bytes, which cannot be",
                self.size
            )));
        }
        let mut first = None;
        for _ in 0..TRIES {
            let mut bytes: Vec<u8> = Vec::new();
            while bytes.len() < self.size as usize {
                let length = (self.size - bytes.len() as u32).min(MAX_DATA);
                let offset = bytes.len() as u64;
                let sqe = Sqe::get_log_page(log_page::ANA, u32::MAX, offset, length, false, RGO);
                let (end, piece) = channel
                    .run_for(sqe, length, deadline, waiter)
                    .map_err(|trouble| trouble.during(WHAT))?;
                succeeded(end, WHAT)?;
                if piece.is_empty() {
                    break;
                }
                bytes.extend(piece);
            }
            let log = AnaLog::parse(&bytes).map_err(|error| later(format!("{WHAT}: {error}")))?;
            if bytes.len() <= MAX_DATA as usize || first == Some(log.change_count) {
                return Ok(log);
            }
            first = Some(log.change_count);
        }
        Err(later(format!("{WHAT}: it changes all the time")))
    }
}
