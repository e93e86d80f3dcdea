//! Reads and writes that go well, byte by byte.

use super::*;

/// Every way in which a read's data can be laid out on the wire.
fn layouts() -> Vec<QueueParams> {
    let mut all = Vec::new();
    for (header_digest, data_digest) in [(false, false), (true, false), (false, true), (true, true)]
    {
        for alignment in [4, 12, 64, 128] {
            all.push(QueueParams {
                header_digest,
                data_digest,
                host_pdu_alignment: alignment,
                controller_pdu_alignment: alignment,
                ..by_r2t()
            });
        }
    }
    all
}

#[test]
fn a_read_arrives_however_its_bytes_are_split() {
    for params in layouts() {
        let data = pattern(96);
        let total = {
            let mut rig = Rig::new(params);
            let memory = Memory::new(&[96]);
            let tag = rig.read(&memory, 0);
            rig.c2h(tag, 0, &data, LAST).len() + rig.response(tag, 0, 0).len()
        };
        for at in 0..=total {
            let mut rig = Rig::new(params);
            let memory = Memory::new(&[1, 30, 0, 65]);
            let tag = rig.read(&memory, 7);
            rig.drain();
            let mut stream = rig.c2h(tag, 0, &data, LAST);
            stream.extend(rig.response(tag, 0, 0x1122));
            rig.feed_split(&stream, at).expect("a valid stream");
            let end = rig.one_end();
            assert_eq!((end.tag, end.user), (tag, 7));
            assert_eq!((end.status, end.result), (Status::SUCCESS, 0x1122));
            assert_eq!(memory.bytes(), data, "{params:?}, split at {at}");
            assert_eq!(rig.machine.in_flight(), 0);
        }
    }
}

#[test]
fn a_read_arrives_byte_by_byte_and_in_pieces_of_every_size() {
    for params in layouts() {
        let data = pattern(200);
        for size in 1..=60 {
            let mut rig = Rig::new(params);
            let memory = Memory::new(&[100, 100]);
            let tag = rig.read(&memory, 7);
            rig.drain();
            let mut stream = rig.c2h(tag, 0, &data[..80], 0);
            stream.extend(rig.c2h(tag, 80, &data[80..], LAST | SUCCESS));
            for piece in stream.chunks(size) {
                rig.feed(piece).expect("a valid stream");
            }
            assert_eq!(rig.one_end().status, Status::SUCCESS);
            assert_eq!(memory.bytes(), data);
        }
    }
}

#[test]
fn a_payload_larger_than_the_staging_buffer_goes_straight_to_the_commands_memory() {
    for params in [plain(), with_digests(plain())] {
        let mut rig = Rig::new(params);
        let data = pattern(200_000);
        let memory = Memory::new(&[70_000, 130_000]);
        let tag = rig.read(&memory, 1);
        rig.drain();
        let stream = rig.c2h(tag, 0, &data, LAST | SUCCESS);
        rig.feed(&stream[..100]).expect("a valid stream");
        // What is missing is asked for first, straight into memory; then comes what follows it.
        let room = rig.machine.recv_list(&mut rig.list);
        let header = 24 + if params.header_digest { 4 } else { 0 };
        let missing = data.len() - (100 - header);
        let staging = room - missing;
        assert_eq!(rig.list.last().expect("staging").iov_len, staging);
        let own = if params.data_digest { 1 } else { 2 };
        assert_eq!(rig.list.len(), own + 1);
        rig.feed(&stream[100..]).expect("a valid stream");
        assert_eq!(rig.one_end().status, Status::SUCCESS);
        assert_eq!(memory.bytes(), data);
    }
}

#[test]
fn a_payload_in_more_pieces_than_a_list_may_have_arrives() {
    let mut rig = Rig::new(plain());
    let sizes = vec![4; 3000];
    let memory = Memory::new(&sizes);
    let data = pattern(12_000);
    let tag = rig.read(&memory, 1);
    rig.drain();
    let stream = rig.c2h(tag, 0, &data, LAST | SUCCESS);
    rig.feed(&stream[..30]).expect("a valid stream");
    let room = rig.machine.recv_list(&mut rig.list);
    // No place in staging behind a payload that is not listed to its end.
    assert_eq!(rig.list.len(), super::super::MAX_IOVECS);
    assert!(room < data.len());
    rig.feed(&stream[30..]).expect("a valid stream");
    assert_eq!(rig.one_end().status, Status::SUCCESS);
    assert_eq!(memory.bytes(), data);
}

#[test]
fn reads_may_be_interleaved() {
    let mut rig = Rig::new(with_digests(plain()));
    let (one, two) = (Memory::new(&[64]), Memory::new(&[128]));
    let (first, second) = (rig.read(&one, 1), rig.read(&two, 2));
    rig.drain();
    let (a, b) = (pattern(64), pattern(128));
    let mut stream = rig.c2h(second, 0, &b[..40], 0);
    stream.extend(rig.c2h(first, 0, &a[..32], 0));
    stream.extend(rig.c2h(second, 40, &b[40..], LAST | SUCCESS));
    stream.extend(rig.c2h(first, 32, &a[32..], LAST));
    stream.extend(rig.response(first, 0, 0));
    rig.feed(&stream).expect("a valid stream");
    let users: Vec<u32> = rig.ended.iter().map(|end| end.user).collect();
    assert_eq!(users, [2, 1]);
    assert_eq!((one.bytes(), two.bytes()), (a, b));
}

#[test]
fn a_capsule_has_the_bytes_of_the_specification() {
    let mut rig = Rig::new(plain());
    let memory = Memory::new(&[4096]);
    let tag = rig.begin(
        Sqe::read(
            0x0102_0304,
            0x1122_3344_5566_7788,
            Nlb::new(8).expect("blocks"),
        ),
        Data::Read(memory.sg()),
        0,
    );
    let bytes = rig.drain();
    // TCP 3.6.2.6: CapsuleCmd, no flags, HLEN 72, PDO 0, PLEN 72.
    assert_eq!(bytes[..8], [4, 0, 72, 0, 72, 0, 0, 0]);
    let [low, high] = tag.cid().to_le_bytes();
    // Base 3.3.3.1: opcode, PSDT 01b, CID, NSID; CDW2 to MPTR are zero.
    assert_eq!(bytes[8..16], [2, 0x40, low, high, 4, 3, 2, 1]);
    assert_eq!(bytes[16..32], [0; 16]);
    // TCP 3.3.2: address 0, 4096 bytes, Transport SGL Data Block (5h), Ah.
    assert_eq!(
        bytes[32..48],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0x5a]
    );
    // SLBA, then NLB less one.
    assert_eq!(
        bytes[48..56],
        [0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]
    );
    assert_eq!(bytes[56..60], [7, 0, 0, 0]);
    assert_eq!(bytes[60..], [0; 12]);
}

#[test]
fn small_data_go_in_the_capsule_with_padding_and_digests() {
    let data = pattern(512);
    for alignment in [4, 32, 128] {
        let mut rig = Rig::new(with_digests(QueueParams {
            host_pdu_alignment: alignment,
            ..plain()
        }));
        let memory = Memory::holding(&data, &[100, 412]);
        rig.write(&memory, 0);
        let bytes = rig.drain();
        let pdo = if alignment == 4 {
            76
        } else {
            76_u32.next_multiple_of(alignment)
        };
        let plen = pdo + 512 + 4;
        let mut header = vec![4, 3, 72, pdo as u8];
        header.extend_from_slice(&plen.to_le_bytes());
        assert_eq!(bytes[..8], header);
        // SGL Data Block, offset: type 0h, subtype 1h (TCP 3.3.2).
        assert_eq!(
            bytes[32..48],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1]
        );
        assert_eq!(bytes[72..76], crc(&bytes[..72]));
        let pdo = pdo as usize;
        assert!(bytes[76..pdo].iter().all(|byte| *byte == 0));
        assert_eq!(bytes[pdo..pdo + 512], data);
        assert_eq!(bytes[pdo + 512..], crc(&data));
    }
}

#[test]
fn a_capsule_without_data_has_no_data_digest_whatever_was_agreed() {
    let mut rig = Rig::new(with_digests(by_r2t()));
    rig.flush(0);
    let bytes = rig.drain();
    assert_eq!(bytes[..8], [4, 1, 72, 0, 76, 0, 0, 0]);
    assert_eq!(bytes.len(), 76);
    // No data: the SGL says so as Linux's does.
    assert_eq!(
        bytes[32..48],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x5a]
    );
}

#[test]
fn a_write_is_sent_as_it_is_asked_for_in_pdus_of_the_agreed_size() {
    for params in layouts() {
        let mut rig = Rig::new(QueueParams {
            max_h2c_data: 4096,
            ..params
        });
        let data = pattern(12_288);
        let memory = Memory::holding(&data, &[5000, 7000, 288]);
        let tag = rig.write(&memory, 3);
        let capsule = rig.drain();
        assert_eq!(capsule[32..48][8..], [0, 0x30, 0, 0, 0, 0, 0, 0x5a]);
        // As in the specification's own example (TCP 3.3.2.2, figure 16), with sizes of this queue.
        let mut requests = rig.r2t(tag, 0xbeef, 0, 6000);
        requests.extend(rig.r2t(tag, 7, 6000, 6288));
        rig.feed(&requests).expect("valid R2Ts");
        let stream = rig.drain();
        let hdgst = if params.header_digest { 4 } else { 0 };
        let ddgst = if params.data_digest { 4 } else { 0 };
        let align = params.host_pdu_alignment as usize;
        let pdo = usize::next_multiple_of(24 + hdgst, align);
        let mut at = 0;
        let expected = [
            (0xbeef, 0, 4096, 0),
            (0xbeef, 4096, 1904, LAST),
            (7, 6000, 4096, 0),
            (7, 10_096, 2192, LAST),
        ];
        for (ttag, offset, length, last) in expected {
            let pdu = &stream[at..];
            let flags = last | u8::from(hdgst > 0) | u8::from(ddgst > 0) << 1;
            let plen = pdo + length + ddgst;
            let mut header = vec![6, flags, 24, pdo as u8];
            header.extend_from_slice(&(plen as u32).to_le_bytes());
            header.extend_from_slice(&tag.cid().to_le_bytes());
            header.extend_from_slice(&u16::to_le_bytes(ttag));
            header.extend_from_slice(&(offset as u32).to_le_bytes());
            header.extend_from_slice(&(length as u32).to_le_bytes());
            header.extend_from_slice(&[0; 4]);
            assert_eq!(pdu[..24], header);
            if hdgst > 0 {
                assert_eq!(pdu[24..28], crc(&header));
            }
            assert!(pdu[24 + hdgst..pdo].iter().all(|byte| *byte == 0));
            let sent = &pdu[pdo..pdo + length];
            assert_eq!(sent, &data[offset..offset + length]);
            if ddgst > 0 {
                assert_eq!(pdu[pdo + length..plen], crc(sent));
            }
            at += plen;
        }
        assert_eq!(at, stream.len());
        rig.feed(&rig.response(tag, 0, 0)).expect("a response");
        assert_eq!(rig.one_end().status, Status::SUCCESS);
    }
}

#[test]
fn what_is_sent_is_the_same_however_little_is_taken_at_a_time() {
    for params in [by_r2t(), with_digests(by_r2t()), with_digests(plain())] {
        let data = pattern(5000);
        let whole = |piece: usize| {
            let mut rig = Rig::new(params);
            let memory = Memory::holding(&data, &[1000, 1, 3999]);
            let tag = rig.write(&memory, 0);
            rig.flush(1);
            let mut stream = Vec::new();
            let mut asked = params.in_capsule > 0;
            loop {
                while rig.machine.wants_to_send() {
                    let bytes = rig.list();
                    let n = bytes.len().min(piece);
                    stream.extend_from_slice(&bytes[..n]);
                    rig.sent(n);
                    // Nothing is lost or doubled by a send that took nothing.
                    rig.list();
                    rig.sent(0);
                }
                if asked {
                    break;
                }
                asked = true;
                let mut requests = rig.r2t(tag, 1, 0, 2500);
                requests.extend(rig.r2t(tag, 2, 2500, 2500));
                rig.feed(&requests).expect("valid R2Ts");
            }
            assert!(rig.machine.between_pdus());
            stream
        };
        let expected = whole(usize::MAX);
        for piece in [1, 2, 3, 23, 24, 25, 71, 72, 76, 1000] {
            assert_eq!(whole(piece), expected, "{piece} bytes at a time");
        }
    }
}

#[test]
fn a_list_to_send_has_limits_and_goes_on_behind_them() {
    let mut rig = Rig::new(QueueParams {
        max_h2c_data: 4 << 20,
        ..by_r2t()
    });
    let data = pattern(3 << 20);
    let mut sizes = vec![64; 2000];
    sizes.push((3 << 20) - 128_000);
    let memory = Memory::holding(&data, &sizes);
    let tag = rig.write(&memory, 0);
    rig.drain();
    rig.feed(&rig.r2t(tag, 1, 0, 3 << 20)).expect("an R2T");
    // First the number of pieces is the limit, then that of bytes.
    assert_eq!(rig.list().len(), 24 + 1023 * 64);
    rig.sent(24 + 1023 * 64);
    assert_eq!(rig.list().len(), super::super::MAX_SEND_BYTES);
    rig.sent(0);
    let rest = rig.drain();
    assert_eq!(rest, &data[1023 * 64..]);
    rig.feed(&rig.response(tag, 0, 0)).expect("a response");
    assert_eq!(rig.one_end().status, Status::SUCCESS);
}

#[test]
fn with_data_digests_what_is_sent_is_what_the_digest_covers() {
    // The guest changes its memory after the capsule, and the data that were asked for, are queued.
    for params in [with_digests(plain()), with_digests(by_r2t())] {
        let mut rig = Rig::new(params);
        let data = pattern(512);
        let memory = Memory::holding(&data, &[512]);
        let tag = rig.write(&memory, 0);
        if params.in_capsule == 0 {
            rig.drain();
            rig.feed(&rig.r2t(tag, 1, 0, 512)).expect("an R2T");
        }
        memory.sg().zero();
        let bytes = rig.drain();
        let end = bytes.len() - 4;
        assert_eq!(bytes[end - 512..end], data);
        assert_eq!(bytes[end..], crc(&data));
    }
}
