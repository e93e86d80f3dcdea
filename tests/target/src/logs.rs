//! Get Log Page (base specification, section 5.16).

use crate::admin::Reply;
use crate::connection::Connection;
use crate::controller::Controller;
use crate::status::Status;
use crate::sync::Locked;
use crate::wire::{Sqe, put};

impl Connection {
    pub fn get_log_page(&mut self, sqe: &Sqe) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let c = queue.controller.clone();
        let cdw10 = sqe.cdw(10);
        let (page, lsp, retain) = (cdw10 as u8, (cdw10 >> 8 & 0x7f) as u8, cdw10 >> 15 & 1 == 1);
        let dwords = u64::from(cdw10 >> 16) | u64::from(sqe.cdw(11) & 0xffff) << 16;
        let offset = u64::from(sqe.cdw(12)) | u64::from(sqe.cdw(13)) << 32;
        let len = (dwords + 1) * 4;
        if u64::from(sqe.sgl().1) != len {
            return Status::DATA_SGL_LENGTH_INVALID.dnr().into();
        }
        if offset % 4 != 0 {
            return Status::INVALID_FIELD.dnr().into();
        }
        let whole = match page {
            0x70 if c.subsystem.is_discovery() => self.shared.discovery_log(c.port),
            _ if c.subsystem.is_discovery() => return Status::INVALID_LOG_PAGE.dnr().into(),
            0x01 => vec![0; 64],
            0x02 => smart(),
            0x04 => changed_namespaces(&c, retain),
            0x0c if c.options.ana => ana(&c, lsp & 1 == 1),
            _ => return Status::INVALID_LOG_PAGE.dnr().into(),
        };
        if offset > whole.len() as u64 {
            return Status::INVALID_FIELD.dnr().into();
        }
        if !retain {
            c.log_page_read(page);
        }
        Reply::Data(
            whole[offset as usize..]
                .iter()
                .copied()
                .take(len as usize)
                .collect(),
        )
    }
}

/// SMART / Health Information: nothing is wrong.
fn smart() -> Vec<u8> {
    let mut b = vec![0; 512];
    // Composite temperature in kelvin, available spare and its threshold in percent.
    put(&mut b, 1, &300u16.to_le_bytes());
    b[3] = 100;
    b[4] = 10;
    b
}

/// Changed Namespace List: read once.
fn changed_namespaces(c: &Controller, retain: bool) -> Vec<u8> {
    let mut events = c.events.locked();
    let mut list = events.changed_namespaces.clone();
    if !retain {
        events.changed_namespaces.clear();
    }
    list.sort_unstable();
    list.dedup();
    if list.len() > 1024 {
        list = vec![0xffff_ffff];
    }
    let mut b = vec![0; 4096];
    for (i, nsid) in list.iter().enumerate() {
        put(&mut b, 4 * i, &nsid.to_le_bytes());
    }
    b
}

/// Asymmetric Namespace Access; `groups_only`: without the namespaces (RGO).
fn ana(c: &Controller, groups_only: bool) -> Vec<u8> {
    let changes = c.subsystem.ana_changes();
    let groups = c.subsystem.ana_groups();
    let all = c.subsystem.namespaces();
    let mut b = vec![0; 16];
    put(&mut b, 0, &changes.to_le_bytes());
    put(&mut b, 8, &(groups.len() as u16).to_le_bytes());
    for group in groups {
        let members: Vec<u32> = all
            .iter()
            .filter(|ns| ns.options().ana_group == group)
            .map(|ns| ns.nsid())
            .collect();
        let members = if groups_only { Vec::new() } else { members };
        let mut descriptor = [0; 32];
        put(&mut descriptor, 0, &group.to_le_bytes());
        put(&mut descriptor, 4, &(members.len() as u32).to_le_bytes());
        put(&mut descriptor, 8, &changes.to_le_bytes());
        descriptor[16] = c.subsystem.ana_state(c.port, group) as u8;
        b.extend_from_slice(&descriptor);
        for nsid in members {
            b.extend_from_slice(&nsid.to_le_bytes());
        }
    }
    b
}
