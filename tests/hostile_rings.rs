//! Rings that break the rules. Whatever is in them, the request is refused or the queue is declared broken by
//! its error descriptor; the daemon neither hangs nor dies, and serves the next VM.

mod common;

use common::{Raw, Rig, offer, offer_head, silence};
use vhost_user_frontend as frontend;

use frontend::blk::{request_type, status};
use frontend::ring::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use frontend::{Buf, Desc, Device, Memory, Op, Outcome};

const MIB: u64 = 1 << 20;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

/// Runs `case` on a fresh ring with a write request at hand; the outcome must be an answer, not silence, and
/// nothing may be written to the disk.
fn refused(case: impl FnOnce(&mut Device, &Raw) -> Outcome) -> (Outcome, u8) {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    let raw = Raw::new(&device.memory, request_type::OUT, 0, 4096);
    device.memory.fill(raw.data, 4096, 0xbd);
    let outcome = case(&mut device, &raw);
    assert_ne!(
        outcome,
        Outcome::Silence,
        "the request was dropped without a word"
    );
    let answer = raw.status(&device.memory);
    assert_ne!(answer, status::OK, "{outcome:?}");
    device.disconnect();
    rig.assert_serves_a_new_client();
    let mut device = rig.device();
    assert_eq!(device.read(0, 4096).unwrap(), [0; 4096]);
    (outcome, answer)
}

/// Offers an indirect table of these bytes as the whole chain.
fn offer_table(device: &mut Device, table: &[u8], len: u32, flags: u16) -> Outcome {
    let at = device.memory.alloc(table.len().max(16) as u64, 16);
    device.memory.write(at, table);
    let ring = &mut device.queue(0).ring;
    offer(ring, &[desc(at, len, flags, 1), desc(at, 16, 0, 0)])
}

fn good_bufs(raw: &Raw) -> [Buf; 3] {
    [
        raw.header_buf(),
        Buf::readable(raw.data, 512),
        raw.status_buf(),
    ]
}

#[test]
fn descriptor_that_points_at_itself() {
    refused(|device, raw| {
        offer(
            &mut device.queue(0).ring,
            &[desc(raw.header, 16, DESC_F_NEXT, 0)],
        )
    });
}

#[test]
fn loop_of_descriptors() {
    refused(|device, raw| {
        let table = [
            desc(raw.header, 16, DESC_F_NEXT, 1),
            desc(raw.data, 512, DESC_F_NEXT, 2),
            desc(raw.data, 512, DESC_F_NEXT, 1),
        ];
        offer(&mut device.queue(0).ring, &table)
    });
}

#[test]
fn loop_of_descriptors_without_length() {
    refused(|device, raw| {
        let table = [
            desc(raw.header, 16, DESC_F_NEXT, 1),
            desc(raw.data, 0, DESC_F_NEXT, 1),
        ];
        offer(&mut device.queue(0).ring, &table)
    });
}

#[test]
fn loop_in_an_indirect_table() {
    refused(|device, raw| {
        let mut table = desc(raw.header, 16, DESC_F_NEXT, 1).to_bytes().to_vec();
        table.extend(desc(raw.data, 512, DESC_F_NEXT, 0).to_bytes());
        offer_table(device, &table, 32, DESC_F_INDIRECT)
    });
}

#[test]
fn next_beyond_the_table() {
    for next in [128, 200, 0x8000, 0xffff] {
        refused(|device, raw| {
            offer(
                &mut device.queue(0).ring,
                &[desc(raw.header, 16, DESC_F_NEXT, next)],
            )
        });
    }
}

#[test]
fn nested_indirect_table() {
    refused(|device, raw| {
        let inner = device.memory.alloc(48, 16);
        device
            .memory
            .write(inner, &frontend::ring::indirect_table(&good_bufs(raw)));
        let outer = desc(inner, 48, DESC_F_INDIRECT, 0).to_bytes();
        offer_table(device, &outer, 16, DESC_F_INDIRECT)
    });
}

#[test]
fn indirect_and_next_together() {
    refused(|device, raw| {
        let table = frontend::ring::indirect_table(&good_bufs(raw));
        offer_table(device, &table, 48, DESC_F_INDIRECT | DESC_F_NEXT)
    });
}

#[test]
fn indirect_table_of_no_multiple_of_sixteen_bytes() {
    for len in [1, 8, 15, 17, 47, 49] {
        refused(|device, raw| {
            let table = frontend::ring::indirect_table(&good_bufs(raw));
            offer_table(device, &table, len, DESC_F_INDIRECT)
        });
    }
}

#[test]
fn indirect_table_of_no_length() {
    refused(|device, raw| {
        let table = frontend::ring::indirect_table(&good_bufs(raw));
        offer_table(device, &table, 0, DESC_F_INDIRECT)
    });
}

#[test]
fn indirect_table_of_huge_length() {
    for len in [1 << 24, 0x7fff_fff0, 0xffff_fff0] {
        refused(|device, raw| {
            // Well-formed at its start, but its length reaches out of guest memory.
            let table = frontend::ring::indirect_table(&good_bufs(raw));
            offer_table(device, &table, len, DESC_F_INDIRECT)
        });
    }
}

#[test]
fn indirect_table_outside_guest_memory() {
    for at in [0xffff_ffff_ffff_fff0, 0x8000_0000, (16 << 20) - 16] {
        refused(|device, _| {
            offer(
                &mut device.queue(0).ring,
                &[desc(at, 48, DESC_F_INDIRECT, 0)],
            )
        });
    }
}

#[test]
fn indirect_table_marked_as_writable_is_fine() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 512);
    let bufs = [
        raw.header_buf(),
        Buf::writable(raw.data, 512),
        raw.status_buf(),
    ];
    let table = frontend::ring::indirect_table(&bufs);
    let outcome = offer_table(&mut device, &table, 48, DESC_F_INDIRECT | DESC_F_WRITE);
    assert_eq!(outcome, Outcome::Used { id: 0, len: 513 });
    assert_eq!(raw.status(&device.memory), status::OK);
}

#[test]
fn indirect_table_after_plain_descriptors_is_fine() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 512);
    let rest = [Buf::writable(raw.data, 512), raw.status_buf()];
    let at = device.memory.alloc(32, 16);
    device
        .memory
        .write(at, &frontend::ring::indirect_table(&rest));
    let table = [
        desc(raw.header, 16, DESC_F_NEXT, 1),
        desc(at, 32, DESC_F_INDIRECT, 0),
    ];
    let outcome = offer(&mut device.queue(0).ring, &table);
    assert_eq!(outcome, Outcome::Used { id: 0, len: 513 });
    assert_eq!(raw.status(&device.memory), status::OK);
}

#[test]
fn readable_after_writable() {
    refused(|device, raw| {
        let table = [
            desc(raw.header, 16, DESC_F_NEXT, 1),
            desc(raw.status, 1, DESC_F_NEXT | DESC_F_WRITE, 2),
            desc(raw.data, 512, 0, 0),
        ];
        offer(&mut device.queue(0).ring, &table)
    });
}

#[test]
fn buffers_outside_guest_memory() {
    let addresses = [
        16 << 20,
        (16 << 20) - 256,
        0x8000_0000,
        u64::MAX,
        u64::MAX - 511,
        0x5a00_0000_0000,
    ];
    for at in addresses {
        for flags in [0, DESC_F_WRITE] {
            refused(|device, raw| {
                if flags != 0 {
                    let read = frontend::blk::header(request_type::IN, 0);
                    device.memory.write(raw.header, &read);
                }
                let table = [
                    desc(raw.header, 16, DESC_F_NEXT, 1),
                    desc(at, 512, DESC_F_NEXT | flags, 2),
                    desc(raw.status, 1, DESC_F_WRITE, 0),
                ];
                offer(&mut device.queue(0).ring, &table)
            });
        }
    }
}

#[test]
fn buffer_longer_than_guest_memory() {
    refused(|device, raw| {
        let table = [
            desc(raw.header, 16, DESC_F_NEXT, 1),
            desc(raw.data, u32::MAX, DESC_F_NEXT, 2),
            desc(raw.status, 1, DESC_F_WRITE, 0),
        ];
        offer(&mut device.queue(0).ring, &table)
    });
}

#[test]
fn head_out_of_range() {
    for head in [128, 129, 0x8000, 0xffff] {
        refused(|device, _| offer_head(&mut device.queue(0).ring, head));
    }
}

/// The first of the two is answered; the second would use a request slot twice.
#[test]
fn head_offered_again_while_its_request_runs() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 4096]).unwrap();
    device.flush().unwrap();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 4096);
    let ring = device.queue(0).ring.split();
    let chain = [
        desc(raw.header, 16, DESC_F_NEXT, 1),
        desc(raw.data, 4096, DESC_F_NEXT | DESC_F_WRITE, 2),
        desc(raw.status, 1, DESC_F_WRITE, 0),
    ];
    for (i, desc) in chain.iter().enumerate() {
        ring.set_desc(i as u16, *desc);
    }
    ring.push_raw(0);
    ring.push_raw(0);
    ring.publish();
    let outcomes = [(); 2].map(|()| ring.wait_outcome(silence()).unwrap());
    assert!(outcomes.contains(&Outcome::Broken), "{outcomes:?}");
    device.disconnect();
    rig.assert_serves_a_new_client();
}

#[test]
fn available_index_ahead_by_more_than_the_queue() {
    for ahead in [129, 300, 0x8000, 0xffff] {
        refused(|device, _| {
            let ring = device.queue(0).ring.split();
            ring.set_avail_idx(ahead);
            ring.kick();
            ring.wait_outcome(silence()).unwrap()
        });
    }
}

/// Chains in which there is no place for a status: completed with length 0, or the queue is broken.
#[test]
fn chain_without_a_writable_byte() {
    let chains: [fn(&Raw, &Memory) -> Vec<Desc>; 3] = [
        |raw, _| vec![desc(raw.header, 16, 0, 0)],
        |raw, _| {
            vec![
                desc(raw.header, 16, DESC_F_NEXT, 1),
                desc(raw.data, 512, 0, 0),
            ]
        },
        |raw, _| {
            vec![
                desc(raw.header, 16, DESC_F_NEXT, 1),
                desc(raw.status, 0, DESC_F_WRITE, 0),
            ]
        },
    ];
    for chain in chains {
        let (outcome, _) = refused(|device, raw| {
            let table = chain(raw, &device.memory);
            offer(&mut device.queue(0).ring, &table)
        });
        if let Outcome::Used { len, .. } = outcome {
            assert_eq!(len, 0);
        }
    }
}

#[test]
fn header_too_short() {
    for len in [0, 1, 8, 15] {
        refused(|device, raw| {
            let table = [
                desc(raw.header, len, DESC_F_NEXT, 1),
                desc(raw.status, 1, DESC_F_WRITE, 0),
            ];
            offer(&mut device.queue(0).ring, &table)
        });
    }
}

#[test]
fn chain_of_writable_descriptors_only() {
    refused(|device, raw| {
        let table = [
            desc(raw.header, 16, DESC_F_NEXT | DESC_F_WRITE, 1),
            desc(raw.status, 1, DESC_F_WRITE, 0),
        ];
        offer(&mut device.queue(0).ring, &table)
    });
}

/// A broken queue leaves the others alone.
#[test]
fn a_broken_queue_leaves_its_neighbour_alone() {
    let rig = Rig::with("raw", MIB, |d| d.queues(2));
    let options = frontend::DeviceOptions {
        queues: 2,
        ..frontend::DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    let outcome = offer_head(&mut device.queue(0).ring, 0xffff);
    assert_ne!(outcome, Outcome::Silence);
    let op = Op::Write {
        sector: 1,
        data: &[7; 512],
    };
    assert_eq!(device.run_on(1, op).unwrap().0.status, status::OK);
    // The VMM can stop the broken queue and start it afresh.
    device.stop_queue(0).unwrap();
    device.queue(0).reset();
    device.start_queue(0, 0).unwrap();
    assert_eq!(device.read(1, 512).unwrap(), [7; 512]);
}
