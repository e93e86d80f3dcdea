//! How many commands there are at a time, and how they share what there is.

use std::collections::HashSet;

use super::super::send::H2C_HEADERS;
use super::*;

#[test]
fn no_more_commands_are_begun_than_the_queue_has_room_for() {
    for depth in [1, 2, 3, 127, 128, 1023] {
        let mut rig = Rig::new(QueueParams { depth, ..plain() });
        let tags: Vec<Tag> = (0..depth).map(|n| rig.flush(n.into())).collect();
        assert_eq!((rig.machine.free(), rig.machine.in_flight()), (0, depth));
        // SAFETY: there are no data.
        let more = unsafe { rig.machine.begin(Sqe::flush(1), Data::None, 0) };
        assert_eq!(more, None);
        let cids: HashSet<u16> = tags.iter().map(|tag| tag.cid()).collect();
        assert_eq!(cids.len(), usize::from(depth));
        rig.drain();
        for tag in tags.iter().rev() {
            rig.feed(&rig.response(*tag, 0, 0)).expect("a response");
        }
        let order: Vec<u32> = rig.ended.iter().map(|end| end.user).collect();
        assert!(order.iter().rev().copied().eq(0..depth.into()));
        assert_eq!((rig.machine.free(), rig.machine.in_flight()), (depth, 0));
    }
}

#[test]
fn no_identifier_is_ffff_and_none_comes_back_soon() {
    for depth in [1, 2, 7, 8, 255, 256, 32767, 32768, 65534] {
        let mut machine = Machine::new(QueueParams {
            depth,
            max_r2t: 1,
            ..plain()
        });
        // The last slot has the highest index, and so the most ones.
        for _ in 1..depth {
            // SAFETY: there are no data.
            unsafe { machine.begin(Sqe::flush(1), Data::None, 0) };
        }
        let mut list = Vec::new();
        let mut ignored = |_| {};
        while machine.wants_to_send() {
            let n = machine.send_list(&mut list);
            machine.sent(n, &mut ignored);
        }
        let mut seen = HashSet::new();
        let generations = 1usize << depth.leading_zeros();
        for round in 0..2 * generations {
            // SAFETY: there are no data.
            let tag = unsafe { machine.begin(Sqe::flush(1), Data::None, 0) }.expect("a slot");
            assert_ne!(tag.cid(), 0xffff);
            if round < generations {
                assert!(
                    seen.insert(tag),
                    "{tag:?} again in round {round} of {depth}"
                );
            }
            let n = machine.send_list(&mut list);
            machine.sent(n, &mut ignored);
            let mut response = [0; 24];
            response[..8].copy_from_slice(&[5, 0, 24, 0, 24, 0, 0, 0]);
            response[20..22].copy_from_slice(&tag.cid().to_le_bytes());
            machine.recv_list(&mut list);
            let base: *mut u8 = list[0].iov_base.cast();
            for (at, byte) in response.iter().enumerate() {
                // SAFETY: the first piece is the machine's own buffer, which is longer.
                unsafe { base.add(at).write(*byte) };
            }
            machine.received(24, &mut ignored).expect("a response");
        }
    }
}

#[test]
fn commands_in_flight_are_told_in_the_order_of_their_beginning() {
    let mut rig = Rig::new(plain());
    let mut tags: Vec<Tag> = (0..8).map(|n| rig.flush(n)).collect();
    rig.drain();
    for at in [3, 0, 5] {
        rig.feed(&rig.response(tags.remove(at), 0, 0))
            .expect("a response");
    }
    tags.push(rig.flush(100));
    tags.push(rig.flush(101));
    let commands: Vec<_> = rig.machine.commands().collect();
    let users: Vec<u32> = commands.iter().map(|command| command.user).collect();
    assert_eq!(users, [1, 2, 4, 5, 6, 100, 101]);
    assert!(
        commands
            .windows(2)
            .all(|pair| pair[0].sequence < pair[1].sequence)
    );
    for (command, tag) in commands.iter().zip(&tags) {
        assert_eq!(rig.machine.command(*tag), Some(*command));
    }
}

/// Takes H2CData apart: (CCCID, TTAG, offset, bytes, last).
fn h2c_data(stream: &[u8]) -> Vec<(u16, u16, u32, Vec<u8>, bool)> {
    let mut all = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        assert_eq!(rest[0], 6);
        let plen = u32::from_le_bytes([rest[4], rest[5], rest[6], rest[7]]) as usize;
        let word = |at: usize| u16::from_le_bytes([rest[at], rest[at + 1]]);
        let offset = u32::from_le_bytes([rest[12], rest[13], rest[14], rest[15]]);
        let data = rest[24..plen].to_vec();
        all.push((word(8), word(10), offset, data, rest[1] & LAST != 0));
        rest = &rest[plen..];
    }
    all
}

#[test]
fn more_data_are_asked_for_than_there_are_headers_for_and_all_are_sent() {
    // 200 writes of three PDUs each, all asked for at once.
    let mut rig = Rig::new(QueueParams {
        depth: 200,
        max_h2c_data: 4096,
        ..by_r2t()
    });
    let data = pattern(12_000);
    let memories: Vec<Memory> = (0..200)
        .map(|_| Memory::holding(&data, &[12_000]))
        .collect();
    let tags: Vec<Tag> = memories
        .iter()
        .zip(0..)
        .map(|(memory, n)| rig.write(memory, n))
        .collect();
    rig.drain();
    for (n, tag) in tags.iter().enumerate() {
        rig.feed(&rig.r2t(*tag, n as u16, 0, 12_000))
            .expect("an R2T");
    }
    let first = rig.list();
    rig.sent(0);
    assert!(first.len() < (usize::from(H2C_HEADERS) + 1) * 4120);
    let sent = h2c_data(&rig.drain());
    assert_eq!(sent.len(), 600);
    for (n, tag) in tags.iter().enumerate() {
        let mine: Vec<_> = sent.iter().filter(|pdu| pdu.0 == tag.cid()).collect();
        let offsets: Vec<u32> = mine.iter().map(|pdu| pdu.2).collect();
        assert_eq!(offsets, [0, 4096, 8192]);
        let lasts: Vec<bool> = mine.iter().map(|pdu| pdu.4).collect();
        assert_eq!(lasts, [false, false, true]);
        assert!(mine.iter().all(|pdu| usize::from(pdu.1) == n));
        let bytes: Vec<u8> = mine.iter().flat_map(|pdu| pdu.3.clone()).collect();
        assert_eq!(bytes, data);
        rig.feed(&rig.response(*tag, 0, 0)).expect("a response");
    }
    assert_eq!(rig.ended.len(), 200);
}

#[test]
fn a_command_that_fails_while_it_waits_for_a_header_leaves_the_others_alone() {
    let mut rig = Rig::new(QueueParams {
        depth: 100,
        ..by_r2t()
    });
    let data = pattern(64);
    let memories: Vec<Memory> = (0..100).map(|_| Memory::holding(&data, &[64])).collect();
    let mut tags: Vec<Tag> = memories
        .iter()
        .zip(0..)
        .map(|(memory, n)| rig.write(memory, n))
        .collect();
    rig.drain();
    for tag in &tags {
        rig.feed(&rig.r2t(*tag, 1, 0, 64)).expect("an R2T");
    }
    // All that have a header fail, and some of those that wait for one; nothing is with the kernel, so
    // nothing but this makes room for the others.
    for n in (0..H2C_HEADERS).chain([70, 80]) {
        rig.feed(&rig.response(tags[usize::from(n)], 0x4006, 0))
            .expect("a response");
    }
    assert_eq!(rig.ended.len(), usize::from(H2C_HEADERS) + 2);
    // One of the free slots is used again, and asks again.
    tags[80] = rig.write(&memories[80], 1000);
    let sent = rig.drain();
    let capsule = sent
        .windows(2)
        .position(|pair| pair == [4, 0])
        .expect("a capsule");
    assert!(capsule > 0);
    rig.feed(&rig.r2t(tags[80], 1, 0, 64)).expect("an R2T");
    rig.drain();
    rig.ended.clear();
    for n in (usize::from(H2C_HEADERS)..100).filter(|n| *n != 70) {
        rig.feed(&rig.response(tags[n], 0, 0))
            .expect("its data were sent");
    }
    assert_eq!(rig.ended.len(), 100 - usize::from(H2C_HEADERS) - 1);
    assert_eq!(rig.machine.in_flight(), 0);
}

#[test]
fn params_out_of_their_limits_are_brought_inside() {
    let machine = Machine::new(QueueParams {
        depth: 0,
        host_pdu_alignment: 0,
        controller_pdu_alignment: 1 << 20,
        max_h2c_data: 5,
        max_r2t: u32::MAX,
        ..plain()
    });
    let params = machine.params();
    assert_eq!((params.depth, params.host_pdu_alignment), (1, 4));
    assert_eq!(
        (params.controller_pdu_alignment, params.max_h2c_data),
        (128, 4096)
    );
    assert_eq!(params.max_r2t, super::super::MAX_R2T);
}
