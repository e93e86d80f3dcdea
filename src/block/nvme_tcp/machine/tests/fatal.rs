//! What ends a connection, and what the controller is told of it.

use super::*;
use FatalErrorStatus::*;

/// A read of 64 bytes that was sent.
fn reading(params: QueueParams) -> (Rig, Memory, Tag) {
    let mut rig = Rig::new(params);
    let memory = Memory::new(&[64]);
    let tag = rig.read(&memory, 1);
    rig.drain();
    (rig, memory, tag)
}

/// A write of 64 bytes that was sent, without its data.
fn writing(params: QueueParams) -> (Rig, Memory, Tag) {
    let mut rig = Rig::new(params);
    let memory = Memory::holding(&pattern(64), &[64]);
    let tag = rig.write(&memory, 1);
    rig.drain();
    (rig, memory, tag)
}

const NOBODY: Tag = Tag(0x7ff7);

#[test]
fn an_r2t_for_an_unknown_tag_is_fatal() {
    let (mut rig, _memory, _) = writing(by_r2t());
    // CCCID is at byte 8.
    assert_eq!(
        fatal(rig.feed(&rig.r2t(NOBODY, 1, 0, 64))),
        (InvalidPduHeaderField, 8)
    );
}

#[test]
fn an_r2t_for_a_finished_command_is_fatal() {
    let (mut rig, _memory, tag) = writing(by_r2t());
    rig.feed(&rig.response(tag, 0x4004, 0))
        .expect("an error status");
    assert_eq!(
        fatal(rig.feed(&rig.r2t(tag, 1, 0, 64))),
        (InvalidPduHeaderField, 8)
    );
}

#[test]
fn an_r2t_for_a_command_that_was_not_sent_is_fatal() {
    let mut rig = Rig::new(by_r2t());
    let memory = Memory::new(&[64]);
    let tag = rig.write(&memory, 1);
    assert_eq!(
        fatal(rig.feed(&rig.r2t(tag, 1, 0, 64))),
        (InvalidPduHeaderField, 8)
    );
    // Whatever was answered is not sent any more: the memory is given back by `abandon_all`.
    assert!(!rig.machine.wants_to_send());
    assert_eq!(rig.machine.free(), 0);
}

#[test]
fn an_r2t_that_asks_for_the_same_data_twice_is_fatal() {
    let (mut rig, _memory, tag) = writing(by_r2t());
    rig.feed(&rig.r2t(tag, 1, 0, 32)).expect("an R2T");
    assert_eq!(
        fatal(rig.feed(&rig.r2t(tag, 1, 0, 32))),
        (PduSequenceError, 0)
    );
}

#[test]
fn an_r2t_that_overlaps_or_leaves_a_gap_is_fatal() {
    for offset in [16, 28, 36, 48] {
        let (mut rig, _memory, tag) = writing(by_r2t());
        rig.feed(&rig.r2t(tag, 1, 0, 32)).expect("an R2T");
        assert_eq!(
            fatal(rig.feed(&rig.r2t(tag, 2, offset, 8))),
            (PduSequenceError, 0)
        );
    }
}

#[test]
fn an_r2t_beyond_the_data_is_fatal() {
    for (offset, length) in [
        (0, 68),
        (0, u32::MAX),
        (64, 4),
        (u32::MAX, 1),
        (u32::MAX - 3, 4),
    ] {
        let (mut rig, _memory, tag) = writing(by_r2t());
        let result = rig.feed(&rig.r2t(tag, 1, offset, length));
        assert_eq!(fatal(result), (DataTransferOutOfRange, 0));
    }
}

#[test]
fn an_r2t_for_nothing_or_for_part_of_a_dword_is_fatal() {
    for length in [0, 1, 6, 63] {
        let (mut rig, _memory, tag) = writing(by_r2t());
        // R2TL is at byte 16.
        let result = rig.feed(&rig.r2t(tag, 1, 0, length));
        assert_eq!(fatal(result), (InvalidPduHeaderField, 16));
    }
}

#[test]
fn an_r2t_for_a_command_of_another_kind_is_fatal() {
    let (mut rig, _memory, tag) = reading(by_r2t());
    assert_eq!(
        fatal(rig.feed(&rig.r2t(tag, 1, 0, 64))),
        (PduSequenceError, 0)
    );
    // Its data were in the capsule.
    let (mut rig, _memory, tag) = writing(plain());
    assert_eq!(
        fatal(rig.feed(&rig.r2t(tag, 1, 0, 64))),
        (PduSequenceError, 0)
    );
    let mut rig = Rig::new(plain());
    let tag = rig.flush(1);
    rig.drain();
    assert_eq!(
        fatal(rig.feed(&rig.r2t(tag, 1, 0, 64))),
        (PduSequenceError, 0)
    );
}

#[test]
fn more_r2ts_than_agreed_on_are_fatal() {
    let (mut rig, _memory, tag) = writing(by_r2t());
    for n in 0..4 {
        rig.feed(&rig.r2t(tag, n, u32::from(n) * 4, 4))
            .expect("an R2T");
    }
    assert_eq!(fatal(rig.feed(&rig.r2t(tag, 4, 16, 4))), (LimitExceeded, 0));
}

#[test]
fn c2h_data_for_an_unknown_tag_is_fatal() {
    let (mut rig, memory, _) = reading(plain());
    let stream = rig.c2h(NOBODY, 0, &[1; 64], LAST);
    assert_eq!(fatal(rig.feed(&stream)), (InvalidPduHeaderField, 8));
    assert_eq!(memory.bytes(), [0; 64]);
}

#[test]
fn c2h_data_for_a_finished_command_are_fatal() {
    let (mut rig, memory, tag) = reading(plain());
    let stream = rig.c2h(tag, 0, &[1; 64], LAST | SUCCESS);
    rig.feed(&stream).expect("a valid stream");
    let again = rig.c2h(tag, 0, &[2; 64], LAST | SUCCESS);
    assert_eq!(fatal(rig.feed(&again)), (InvalidPduHeaderField, 8));
    assert_eq!(memory.bytes(), [1; 64]);
    assert_eq!(rig.ended.len(), 1);
}

#[test]
fn c2h_data_out_of_range_are_fatal() {
    for (offset, length) in [(0, 68), (4, 64), (64, 4), (u32::MAX, 4), (0xffff_fffc, 4)] {
        let (mut rig, memory, tag) = reading(plain());
        let stream = rig.c2h(tag, offset, &vec![9; length], LAST);
        assert_eq!(fatal(rig.feed(&stream)), (DataTransferOutOfRange, 0));
        assert_eq!(memory.bytes(), [0; 64]);
    }
}

#[test]
fn c2h_data_twice_or_out_of_order_are_fatal() {
    for offset in [0, 16, 28, 36] {
        let (mut rig, memory, tag) = reading(plain());
        let first = rig.c2h(tag, 0, &[1; 32], 0);
        rig.feed(&first).expect("a valid stream");
        let second = rig.c2h(tag, offset, &[2; 4], 0);
        assert_eq!(fatal(rig.feed(&second)), (PduSequenceError, 0));
        assert_eq!(memory.bytes()[..32], [1; 32]);
        assert_eq!(memory.bytes()[32..], [0; 32]);
    }
}

#[test]
fn c2h_data_behind_the_last_ones_are_fatal() {
    let (mut rig, _memory, tag) = reading(plain());
    let first = rig.c2h(tag, 0, &[1; 32], LAST);
    rig.feed(&first).expect("a valid stream");
    let second = rig.c2h(tag, 32, &[2; 32], LAST);
    assert_eq!(fatal(rig.feed(&second)), (PduSequenceError, 0));
}

#[test]
fn c2h_data_for_a_command_of_another_kind_are_fatal() {
    for params in [plain(), by_r2t()] {
        let (mut rig, memory, tag) = writing(params);
        let stream = rig.c2h(tag, 0, &[9; 64], LAST);
        assert_eq!(fatal(rig.feed(&stream)), (PduSequenceError, 0));
        assert_eq!(memory.bytes(), pattern(64));
    }
}

#[test]
fn success_without_last_pdu_is_fatal() {
    let (mut rig, _memory, tag) = reading(plain());
    let stream = rig.c2h(tag, 0, &[1; 64], SUCCESS);
    // FLAGS is at byte 1.
    assert_eq!(fatal(rig.feed(&stream)), (InvalidPduHeaderField, 1));
}

#[test]
fn success_before_all_data_of_a_read_is_fatal() {
    let (mut rig, _memory, tag) = reading(plain());
    let stream = rig.c2h(tag, 0, &[1; 32], LAST | SUCCESS);
    assert_eq!(fatal(rig.feed(&stream)), (PduSequenceError, 0));
    assert!(rig.ended.is_empty());
    for sent in [0, 32] {
        let (mut rig, _memory, tag) = reading(plain());
        let mut stream = rig.c2h(tag, 0, &vec![1; sent], LAST);
        stream.extend(rig.response(tag, 0, 0));
        assert_eq!(fatal(rig.feed(&stream)), (PduSequenceError, 0));
        assert!(rig.ended.is_empty());
    }
}

#[test]
fn success_before_all_data_is_none_where_there_may_be_less() {
    for with_data in [false, true] {
        let mut rig = Rig::new(plain());
        let memory = Memory::new(&[64]);
        let sqe = Sqe::reservation_report(1, 64);
        let tag = rig.begin(sqe, Data::ReadAtMost(memory.sg()), 7);
        rig.drain();
        let stream = match with_data {
            true => rig.c2h(tag, 0, &[1; 32], LAST | SUCCESS),
            false => rig.response(tag, 0, 0),
        };
        rig.feed(&stream).expect("no violation");
        assert_eq!(rig.ended.len(), 1);
        assert_eq!(memory.bytes()[..32], [u8::from(with_data); 32]);
        assert_eq!(memory.bytes()[32..], [0; 32]);
    }
}

#[test]
fn success_of_a_write_whose_data_were_not_all_sent_is_fatal() {
    // Nothing asked for; half of it asked for; all of it asked for and not sent.
    for asked in [0, 32, 64] {
        let (mut rig, _memory, tag) = writing(by_r2t());
        if asked > 0 {
            rig.feed(&rig.r2t(tag, 1, 0, asked)).expect("an R2T");
        }
        if asked == 32 {
            rig.drain();
        }
        let result = rig.feed(&rig.response(tag, 0, 0));
        assert_eq!(fatal(result), (PduSequenceError, 0));
        assert!(rig.ended.is_empty());
    }
}

#[test]
fn a_response_for_an_unknown_tag_is_fatal() {
    let (mut rig, _memory, _) = reading(plain());
    // CID of the completion queue entry: byte 12 of it, and 8 before it.
    let result = rig.feed(&rig.response(NOBODY, 0, 0));
    assert_eq!(fatal(result), (InvalidPduHeaderField, 20));
}

#[test]
fn a_response_behind_data_that_said_success_is_fatal() {
    let (mut rig, _memory, tag) = reading(plain());
    let mut stream = rig.c2h(tag, 0, &[1; 64], LAST | SUCCESS);
    stream.extend(rig.response(tag, 0, 0));
    assert_eq!(fatal(rig.feed(&stream)), (InvalidPduHeaderField, 20));
    assert_eq!(rig.ended.len(), 1);
}

#[test]
fn a_response_twice_is_fatal_also_when_the_slot_is_in_use_again() {
    let mut rig = Rig::new(QueueParams {
        depth: 1,
        ..plain()
    });
    let first = rig.flush(1);
    rig.drain();
    rig.feed(&rig.response(first, 0, 0)).expect("a response");
    let second = rig.flush(2);
    assert_ne!(first, second);
    rig.drain();
    let result = rig.feed(&rig.response(first, 0, 0));
    assert_eq!(fatal(result), (InvalidPduHeaderField, 20));
    assert_eq!(rig.ended.len(), 1);
}

#[test]
fn a_response_to_a_command_that_was_not_sent_is_fatal() {
    let mut rig = Rig::new(plain());
    let tag = rig.flush(1);
    let result = rig.feed(&rig.response(tag, 0, 0));
    assert_eq!(fatal(result), (InvalidPduHeaderField, 20));
}

#[test]
fn a_wrong_header_length_data_offset_or_pdu_length_is_fatal() {
    let plen = |pdu: &mut Vec<u8>, change: i32| {
        let now = i32::from_le_bytes([pdu[4], pdu[5], pdu[6], pdu[7]]);
        pdu[4..8].copy_from_slice(&(now + change).to_le_bytes());
    };
    for params in [plain(), with_digests(plain())] {
        // HLEN, in each PDU; the first bytes suffice to tell.
        for pdu in 0..3 {
            for hlen in [0, 8, 23, 25, 28, 72, 128, 255] {
                let (mut rig, _memory, tag) = reading(QueueParams {
                    header_digest: false,
                    ..params
                });
                let mut bytes = match pdu {
                    0 => rig.response(tag, 0, 0),
                    1 => rig.r2t(tag, 1, 0, 64),
                    _ => rig.c2h(tag, 0, &[1; 64], LAST),
                };
                bytes[2] = hlen;
                assert_eq!(fatal(rig.feed(&bytes[..8])), (InvalidPduHeaderField, 2));
            }
        }
        // PDO: into the header, not aligned, behind the end.
        for (pdo, field) in [(0, 3), (20, 3), (25, 3), (27, 3), (255, 3), (252, 4)] {
            let (mut rig, memory, tag) = reading(QueueParams {
                header_digest: false,
                ..params
            });
            let mut bytes = rig.c2h(tag, 0, &[1; 64], LAST);
            bytes[3] = pdo;
            assert_eq!(
                fatal(rig.feed(&bytes)),
                (InvalidPduHeaderField, field),
                "{pdo}"
            );
            assert_eq!(memory.bytes(), [0; 64]);
        }
        // PLEN: shorter and longer than what the rest says.
        for change in [-64, -4, -1, 1, 4, 1 << 20] {
            let (mut rig, memory, tag) = reading(QueueParams {
                header_digest: false,
                ..params
            });
            let mut bytes = rig.c2h(tag, 0, &[1; 64], LAST);
            plen(&mut bytes, change);
            assert_eq!(fatal(rig.feed(&bytes)), (InvalidPduHeaderField, 4));
            assert_eq!(memory.bytes(), [0; 64]);
            for pdu in 0..2 {
                let (mut rig, _memory, tag) = reading(QueueParams {
                    header_digest: false,
                    ..params
                });
                let mut bytes = match pdu {
                    0 => rig.response(tag, 0, 0),
                    _ => rig.r2t(tag, 1, 0, 64),
                };
                plen(&mut bytes, change);
                assert_eq!(fatal(rig.feed(&bytes[..8])), (InvalidPduHeaderField, 4));
            }
        }
    }
}

#[test]
fn digest_flags_other_than_agreed_are_fatal() {
    for (agreed, wrong) in [
        (false, 1),
        (false, 2),
        (false, 3),
        (true, 0),
        (true, 1),
        (true, 2),
    ] {
        let params = if agreed {
            with_digests(plain())
        } else {
            plain()
        };
        let (mut rig, memory, tag) = reading(params);
        let mut bytes = rig.c2h(tag, 0, &[1; 64], LAST);
        bytes[1] = LAST | wrong;
        if agreed {
            let digest = crc(&bytes[..24]);
            bytes[24..28].copy_from_slice(&digest);
        }
        assert_eq!(fatal(rig.feed(&bytes)), (InvalidPduHeaderField, 1));
        assert_eq!(memory.bytes(), [0; 64]);
    }
    let (mut rig, _memory, tag) = reading(plain());
    let mut bytes = rig.response(tag, 0, 0);
    bytes[1] = 1;
    assert_eq!(fatal(rig.feed(&bytes)), (InvalidPduHeaderField, 1));
}

#[test]
fn a_wrong_header_digest_is_fatal_wherever_a_bit_has_flipped() {
    let (rig, _memory, tag) = reading(with_digests(plain()));
    let pdus = [
        rig.response(tag, 0, 0),
        rig.c2h(tag, 0, &[1; 64], LAST),
        rig.r2t(tag, 1, 0, 64),
    ];
    for pdu in pdus {
        for bit in 0..28 * 8 {
            let (mut rig, memory, _) = reading(with_digests(plain()));
            let mut bytes = pdu.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = rig.feed(&bytes).expect_err("an error");
            let received = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
            // A type that there is not, or that has no digest, is told as that.
            match error.fatal_error() {
                Some((HeaderDigestError, information)) => assert_eq!(information, received),
                Some((status, _)) => assert!(bit < 8, "{status:?} for bit {bit}"),
                None => assert_eq!(bytes[0], 3),
            }
            assert_eq!(memory.bytes(), [0; 64]);
            assert!(rig.ended.is_empty());
        }
    }
}

#[test]
fn pdus_of_unknown_type_of_the_other_side_or_of_the_handshake_are_fatal() {
    let header = |pdu_type: u8, hlen: u8| [pdu_type, 0, hlen, 0, hlen, 0, 0, 0];
    for (pdu_type, hlen, expected) in [
        (0x08, 24, (InvalidPduHeaderField, 0)),
        (0x0a, 24, (InvalidPduHeaderField, 0)),
        (0xff, 24, (InvalidPduHeaderField, 0)),
        (0x00, 128, (PduSequenceError, 0)),
        (0x02, 24, (PduSequenceError, 0)),
        (0x04, 72, (PduSequenceError, 0)),
        (0x06, 24, (PduSequenceError, 0)),
        (0x01, 128, (PduSequenceError, 0)),
    ] {
        let (mut rig, _memory, _) = reading(plain());
        let mut bytes = header(pdu_type, hlen).to_vec();
        bytes.resize(hlen.into(), 0);
        assert_eq!(fatal(rig.feed(&bytes)), expected, "type {pdu_type:#x}");
    }
}

#[test]
fn a_c2h_term_req_ends_the_connection_with_its_reason() {
    for split in 0..=152 {
        let (mut rig, _memory, _) = reading(with_digests(plain()));
        let mut bytes = vec![3, 0, 24, 0, 152, 0, 0, 0, 1, 0, 8, 0, 0, 0];
        bytes.resize(152, 0);
        let error = rig.feed_split(&bytes, split).expect_err("the end");
        assert_eq!(
            error.to_string(),
            "the controller ended the connection: Invalid PDU Header Field, information 0x8"
        );
        assert!(Machine::term_req(&error).is_empty(), "it gets no answer");
    }
    // One that is too short, or too long, is none (TCP 3.5.1).
    for plen in [0, 8, 23, 153, u32::MAX] {
        let (mut rig, _memory, _) = reading(plain());
        let mut bytes = vec![3, 0, 24, 0];
        bytes.extend_from_slice(&plen.to_le_bytes());
        let error = rig.feed(&bytes).expect_err("the end");
        assert!(
            error.to_string().contains("malformed C2HTermReq"),
            "{error}"
        );
        assert!(Machine::term_req(&error).is_empty());
    }
}

#[test]
fn the_term_req_carries_status_information_and_the_wrong_header() {
    let (mut rig, _memory, _) = writing(by_r2t());
    let bytes = rig.r2t(NOBODY, 1, 0, 64);
    let error = rig.feed(&bytes).expect_err("an error");
    let term = Machine::term_req(&error);
    // TCP 3.6.2.4: H2CTermReq, HLEN 24, PLEN 48, FES 1, FEI 8, then the header.
    assert_eq!(term[..8], [2, 0, 24, 0, 48, 0, 0, 0]);
    assert_eq!(term[8..14], [1, 0, 8, 0, 0, 0]);
    assert_eq!(term[14..24], [0; 10]);
    assert_eq!(term[24..], bytes);
}

#[test]
fn after_a_fatal_error_nothing_is_taken_or_begun_any_more() {
    let (mut rig, _memory, tag) = writing(by_r2t());
    let first = rig.feed(&rig.r2t(NOBODY, 1, 0, 64)).expect_err("an error");
    let mut ignored = |_| panic!("nothing ends");
    let again = rig.machine.received(0, &mut ignored).expect_err("still");
    assert_eq!(first.violation(), again.violation());
    assert_eq!(rig.machine.recv_list(&mut rig.list), 0);
    assert_eq!(rig.machine.send_list(&mut rig.list), 0);
    // SAFETY: there are no data.
    let begun = unsafe { rig.machine.begin(Sqe::flush(1), Data::None, 9) };
    assert_eq!(begun, None);
    let mut users = Vec::new();
    rig.machine.abandon_all(&mut |user| users.push(user));
    assert_eq!(users, [1]);
    assert_eq!(rig.machine.command(tag), None);
    assert_eq!(rig.machine.free(), 8);
}
