//! Asymmetric namespace access: which paths reach which namespaces.

use super::super::{u16_at, u32_at, u64_at};
use super::{Controller, DataError, need};

/// Asymmetric namespace access state (Base 8.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AnaState {
    /// The best path.
    Optimized = 1,
    /// A path that works, less well.
    NonOptimized = 2,
    /// No I/O on this path now.
    Inaccessible = 3,
    /// No I/O on this path ever again.
    PersistentLoss = 4,
    /// About to become another.
    Change = 0xf,
}

/// One group of the ANA log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnaGroup {
    /// The group's identifier.
    pub id: u32,
    /// Change count of the group; 0: not told.
    pub change_count: u64,
    /// The state of its namespaces on this controller.
    pub state: AnaState,
    /// Its namespaces. Empty if the log was asked for without them (RGO).
    pub namespaces: Vec<u32>,
}

/// The Asymmetric Namespace Access log page (Base 5.16.1.13).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnaLog {
    /// Change count of the whole.
    pub change_count: u64,
    /// The groups.
    pub groups: Vec<AnaGroup>,
}

impl AnaLog {
    /// Bytes of the log's header.
    pub const HEADER: usize = 16;
    /// Bytes of a group, without its namespaces.
    pub const GROUP: usize = 32;

    /// Most bytes of the log of a controller, as Linux computes them; `None` if that is more than 16 MiB,
    /// which nobody needs.
    pub fn size(controller: &Controller) -> Option<u32> {
        let groups = u64::from(controller.nanagrpid) * Self::GROUP as u64;
        let namespaces = match controller.mnan {
            0 => controller.nn,
            mnan => mnan,
        };
        let size = Self::HEADER as u64 + groups + u64::from(namespaces) * 4;
        u32::try_from(size).ok().filter(|size| *size <= 16 << 20)
    }

    /// From the log page.
    ///
    /// # Errors
    /// Groups or namespaces that are not all there, a state that does not exist, or a group or namespace
    /// identifier of 0.
    pub fn parse(bytes: &[u8]) -> Result<Self, DataError> {
        const WHAT: &str = "ANA log";
        need(WHAT, bytes, Self::HEADER)?;
        let field = |field, value: u64, why| DataError::Field {
            what: WHAT,
            field,
            value,
            why,
        };
        let count = u16_at(bytes, 8);
        let mut at = Self::HEADER;
        let mut groups = Vec::new();
        for _ in 0..count {
            need(WHAT, bytes, at + Self::GROUP)?;
            let group = &bytes[at..];
            at += Self::GROUP;
            let id = u32_at(group, 0);
            let number = u32_at(group, 4);
            let state = match group[16] & 0xf {
                1 => AnaState::Optimized,
                2 => AnaState::NonOptimized,
                3 => AnaState::Inaccessible,
                4 => AnaState::PersistentLoss,
                0xf => AnaState::Change,
                other => return Err(field("ANA state", other.into(), "no such state")),
            };
            if id == 0 {
                return Err(field("ANA group", 0, "groups begin with 1"));
            }
            let len = usize::try_from(u64::from(number) * 4).unwrap_or(usize::MAX);
            let end = at.saturating_add(len);
            need(WHAT, bytes, end)?;
            let namespaces: Vec<u32> = bytes[at..end]
                .chunks_exact(4)
                .map(|chunk| u32_at(chunk, 0))
                .collect();
            if namespaces.contains(&0) {
                return Err(field("NSID", 0, "namespaces begin with 1"));
            }
            at = end;
            groups.push(AnaGroup {
                id,
                change_count: u64_at(group, 8),
                state,
                namespaces,
            });
        }
        Ok(Self {
            change_count: u64_at(bytes, 0),
            groups,
        })
    }

    /// The state of a namespace: by its own mention, or else by its group's (Identify Namespace,
    /// ANAGRPID).
    pub fn state_of(&self, nsid: u32, anagrpid: u32) -> Option<AnaState> {
        let named = |group: &&AnaGroup| group.namespaces.contains(&nsid);
        let group = self.groups.iter().find(named);
        group
            .or_else(|| self.groups.iter().find(|group| group.id == anagrpid))
            .map(|group| group.state)
    }
}
