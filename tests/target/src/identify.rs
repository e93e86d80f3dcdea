//! Identify (base specification, section 5.17; NVM command set specification, section 4.1.5).

use crate::admin::Reply;
use crate::connection::Connection;
use crate::controller::Controller;
use crate::status::Status;
use crate::subsystem::Namespace;
use crate::wire::{Sqe, put, put_nqn, put_text};

const LEN: usize = 4096;

impl Connection {
    pub fn identify(&self, sqe: &Sqe) -> Reply {
        let Some(queue) = &self.queue else {
            return Status::INTERNAL_ERROR.into();
        };
        let c = &queue.controller;
        let (cns, csi) = (sqe.cdw(10) as u8, (sqe.cdw(11) >> 24) as u8);
        let subsystem = &c.subsystem;
        if c.subsystem.is_discovery() && cns != 0x01 {
            return Status::INVALID_FIELD.dnr().into();
        }
        let nsid = sqe.nsid();
        let namespace = || subsystem.namespace(nsid);
        let known = nsid != 0 && nsid < 0xffff_fffe;
        match cns {
            0x00 | 0x03 | 0x05 | 0x08 if !known => Status::INVALID_NAMESPACE.dnr().into(),
            // An inactive namespace is a page of zeros; of the descriptor list it is an error.
            0x00 => Reply::Data(namespace().map_or_else(zeros, |ns| self.namespace_data(&ns))),
            0x01 => Reply::Data(controller_data(c)),
            0x02 => active_list(c, nsid),
            0x03 => match namespace() {
                Some(ns) => Reply::Data(descriptors(&ns, c.port)),
                None => Status::INVALID_NAMESPACE.dnr().into(),
            },
            0x05 if csi == 0 => Reply::Data(zeros()),
            0x06 if csi == 0 => Reply::Data(nvm_controller_data(c)),
            0x07 if csi == 0 => active_list(c, nsid),
            0x08 => Reply::Data(namespace().map_or_else(zeros, |ns| independent_data(&ns))),
            _ => Status::INVALID_FIELD.dnr().into(),
        }
    }

    /// Identify Namespace, CNS 00h.
    fn namespace_data(&self, ns: &Namespace) -> Vec<u8> {
        let mut b = zeros();
        let o = ns.options();
        for at in [0, 8, 16] {
            put(&mut b, at, &ns.blocks().to_le_bytes());
        }
        b[24] = o.nsfeat;
        // NLBAF (zero-based) and FLBAS: one format, in use.
        b[25] = 0;
        b[26] = 0;
        if o.metadata_bytes != 0 {
            // MC: metadata in a separate buffer.
            b[27] = 1 << 1;
        }
        b[30] = u8::from(o.shared);
        b[31] = o.rescap;
        b[33] = o.dlfeat;
        put(&mut b, 36, &o.nawupf.to_le_bytes());
        if o.nawupf != 0 {
            b[24] |= 1 << 1;
        }
        put(&mut b, 46, &o.noiob.to_le_bytes());
        for (i, value) in o.preferred.iter().enumerate() {
            put(&mut b, 64 + 2 * i, &value.to_le_bytes());
        }
        put(&mut b, 92, &o.ana_group.to_le_bytes());
        b[99] = u8::from(ns.write_protected());
        let identity = self.identity_of(ns);
        put(&mut b, 104, &identity.nguid);
        put(&mut b, 120, &identity.eui64);
        // LBA format 0: metadata size, data size as a shift, relative performance.
        put(&mut b, 128, &o.metadata_bytes.to_le_bytes());
        b[130] = ns.lba_shift();
        b
    }

    fn identity_of(&self, ns: &Namespace) -> crate::options::Identity {
        ns.identity_at(self.port.id())
    }
}

fn zeros() -> Vec<u8> {
    vec![0; LEN]
}

/// Identify Controller, CNS 01h.
fn controller_data(c: &Controller) -> Vec<u8> {
    let mut b = zeros();
    let o = &c.options;
    put_text(&mut b, 4, 20, &o.serial);
    put_text(&mut b, 24, 40, &o.model);
    put_text(&mut b, 64, 8, "1");
    let discovery = c.subsystem.is_discovery();
    b[77] = o.mdts;
    put(&mut b, 78, &c.id.to_le_bytes());
    put(&mut b, 80, &o.version.to_le_bytes());
    // CTRATT: 128-bit host identifier; traffic-based keep-alive in bit 6.
    let ctratt = 1u32 | u32::from(o.traffic_based_keep_alive) << 6;
    put(&mut b, 96, &ctratt.to_le_bytes());
    // CNTRLTYPE: 1 an I/O controller, 2 a discovery controller.
    b[111] = if discovery { 2 } else { 1 };
    for (i, value) in o.crdt.iter().enumerate() {
        put(&mut b, 128 + 2 * i, &value.to_le_bytes());
    }
    b[258] = o.acl;
    b[259] = o.aerl;
    // LPA: bit 2 extended data (offsets) for Get Log Page.
    b[261] = 1 << 2;
    put(&mut b, 320, &o.kas.to_le_bytes());
    put(&mut b, 514, &o.maxcmd.to_le_bytes());
    // SGLS: SGLs are supported, offset in the capsule, transport data blocks (bits 20 and 21).
    put(&mut b, 536, &(1u32 | 1 << 20 | 1 << 21).to_le_bytes());
    put_nqn(&mut b, 768, 256, c.subsystem.nqn());
    if discovery {
        // OAES: Discovery Log Page Change Notices.
        put(&mut b, 92, &(1u32 << 31).to_le_bytes());
        return b;
    }
    // CMIC: several ports, several controllers, ANA reporting in bit 3.
    b[76] = 0b11 | u8::from(o.ana) << 3;
    // OAES: Namespace Attribute Notices, ANA Change Notices.
    put(
        &mut b,
        92,
        &(1u32 << 8 | u32::from(o.ana) << 11).to_le_bytes(),
    );
    if o.ana {
        b[342] = o.anatt_s;
        // ANACAP: all five states are reported; ANAGRPID does not change while attached (bit 6).
        b[343] = 0x1f | 1 << 6;
        let groups = c.subsystem.ana_groups();
        put(
            &mut b,
            344,
            &groups.last().copied().unwrap_or(1).max(1).to_le_bytes(),
        );
        put(&mut b, 348, &(groups.len().max(1) as u32).to_le_bytes());
    }
    // SQES and CQES: required and maximum sizes, 64 and 16 bytes.
    b[512] = 0x66;
    b[513] = 0x44;
    // NN and MNAN: the largest number that a namespace can have, and how many there can be.
    put(&mut b, 516, &1024u32.to_le_bytes());
    put(&mut b, 520, &o.oncs.to_le_bytes());
    // VWC: bit 0 present; bits 2:1 = 10b: Flush does not take the broadcast NSID.
    b[525] = u8::from(o.volatile_write_cache) | 0b10 << 1;
    put(&mut b, 540, &1024u32.to_le_bytes());
    // IOCCSZ and IORCSZ in units of 16 bytes; ICDOFF is 0; one SGL descriptor a capsule.
    put(&mut b, 1792, &((64 + o.in_capsule) / 16).to_le_bytes());
    put(&mut b, 1796, &1u32.to_le_bytes());
    b[1803] = 1;
    b
}

/// Identify Controller data structure of the NVM command set, CNS 06h.
fn nvm_controller_data(c: &Controller) -> Vec<u8> {
    let mut b = zeros();
    let o = &c.options;
    // WZSL, DMRL, DMRSL, DMSL: what Write Zeroes and Dataset Management are limited to; 0: not.
    b[1] = o.wzsl;
    b[3] = o.dmrl;
    put(&mut b, 4, &o.dmrsl.to_le_bytes());
    put(&mut b, 8, &o.dmsl.to_le_bytes());
    b
}

/// Identify Namespace independent of the command set, CNS 08h.
fn independent_data(ns: &Namespace) -> Vec<u8> {
    let mut b = zeros();
    let o = ns.options();
    b[1] = u8::from(o.shared);
    b[2] = o.rescap;
    put(&mut b, 4, &o.ana_group.to_le_bytes());
    b[8] = u8::from(ns.write_protected());
    // NSTAT: ready.
    b[14] = 1;
    b
}

/// Active Namespace ID list: the numbers above `after`.
fn active_list(c: &Controller, after: u32) -> Reply {
    if after >= 0xffff_fffe {
        return Status::INVALID_NAMESPACE.dnr().into();
    }
    let mut b = zeros();
    let all = c.subsystem.namespaces();
    let above = all.iter().map(|ns| ns.nsid()).filter(|&nsid| nsid > after);
    for (i, nsid) in above.take(LEN / 4).enumerate() {
        put(&mut b, 4 * i, &nsid.to_le_bytes());
    }
    Reply::Data(b)
}

/// Namespace Identification Descriptor list, CNS 03h.
fn descriptors(ns: &Namespace, port: u16) -> Vec<u8> {
    let identity = ns.identity_at(port);
    let mut b = Vec::new();
    let mut add = |kind: u8, id: &[u8]| {
        if kind == 4 || id.iter().any(|&x| x != 0) {
            b.extend_from_slice(&[kind, id.len() as u8, 0, 0]);
            b.extend_from_slice(id);
        }
    };
    add(1, &identity.eui64);
    add(2, &identity.nguid);
    add(3, &identity.uuid);
    // CSI: the NVM command set.
    add(4, &[0]);
    b.resize(LEN, 0);
    b
}
