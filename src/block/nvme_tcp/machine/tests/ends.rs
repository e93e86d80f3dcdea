//! When a command ends, and with what.

use super::*;

#[test]
fn a_wrong_data_digest_fails_the_command_and_not_the_connection() {
    for split in [usize::MAX, 40, 90] {
        let mut rig = Rig::new(with_digests(plain()));
        let (one, two) = (Memory::new(&[64]), Memory::new(&[64]));
        let (first, second) = (rig.read(&one, 1), rig.read(&two, 2));
        rig.drain();
        let mut stream = rig.c2h(first, 0, &[7; 64], LAST | SUCCESS);
        stream[50] ^= 1;
        stream.extend(rig.c2h(second, 0, &[8; 64], LAST | SUCCESS));
        rig.feed_split(&stream, split.min(stream.len()))
            .expect("no fatal error");
        assert_eq!(rig.ended.len(), 2);
        assert_eq!(rig.ended[0].status, Status::TRANSIENT_TRANSPORT_ERROR);
        assert_eq!(rig.ended[1].status, Status::SUCCESS);
        // The guest never sees what was damaged.
        assert_eq!(one.bytes(), [0; 64]);
        assert_eq!(two.bytes(), [8; 64]);
    }
}

#[test]
fn a_wrong_data_digest_does_not_hide_the_controllers_own_error() {
    for (status, expected) in [
        (0, Status::TRANSIENT_TRANSPORT_ERROR),
        (0x281, Status::UNRECOVERED_READ_ERROR),
    ] {
        let mut rig = Rig::new(with_digests(plain()));
        let memory = Memory::new(&[64]);
        let tag = rig.read(&memory, 1);
        rig.drain();
        let mut stream = rig.c2h(tag, 0, &[7; 32], 0);
        stream[30] ^= 1;
        stream.extend(rig.c2h(tag, 32, &[7; 32], LAST));
        stream.extend(rig.response(tag, status, 0));
        rig.feed(&stream).expect("no fatal error");
        assert_eq!(rig.one_end().status, expected);
        assert_eq!(memory.bytes()[..32], [0; 32]);
        assert_eq!(memory.bytes()[32..], [7; 32]);
    }
}

#[test]
fn an_error_may_come_at_any_time() {
    // Before any data, between them, and behind the last.
    for sent in [0, 32, 64] {
        let mut rig = Rig::new(plain());
        let memory = Memory::new(&[64]);
        let tag = rig.read(&memory, 1);
        rig.drain();
        let mut stream = rig.c2h(tag, 0, &vec![1; sent], if sent == 64 { LAST } else { 0 });
        stream.extend(rig.response(tag, 0x4281, 0));
        rig.feed(&stream).expect("a valid stream");
        let status = rig.one_end().status;
        assert_eq!(status.code(), 0x281);
        assert!(status.do_not_retry());
    }
}

#[test]
fn a_write_that_fails_early_ends_when_its_half_sent_data_are_out() {
    for params in [by_r2t(), with_digests(by_r2t())] {
        let mut rig = Rig::new(params);
        let memory = Memory::holding(&pattern(20_000), &[20_000]);
        let tag = rig.write(&memory, 5);
        rig.drain();
        let mut requests = rig.r2t(tag, 1, 0, 10_000);
        requests.extend(rig.r2t(tag, 2, 10_000, 10_000));
        rig.feed(&requests).expect("valid R2Ts");
        // Four PDUs of data; part of the first is sent.
        let listed = rig.list().len();
        rig.sent(1000);
        rig.feed(&rig.response(tag, 0x4080, 0))
            .expect("an error status");
        assert!(rig.ended.is_empty(), "its memory is still being sent");
        assert_eq!(
            rig.machine.command(tag).map(|command| command.user),
            Some(5)
        );
        // What was begun is finished, and nothing else of it is sent.
        let rest = rig.list();
        let first = 24 + 8192 + if params.header_digest { 8 } else { 0 };
        assert!(listed > first && rest.len() == first - 1000);
        rig.sent(rest.len());
        assert_eq!(
            rig.one_end().status,
            Status::LBA_OUT_OF_RANGE.with_do_not_retry()
        );
        assert!(!rig.machine.wants_to_send());
        assert_eq!(rig.machine.command(tag), None);
    }
}

#[test]
fn a_write_that_fails_while_a_list_is_with_the_kernel_ends_when_that_is_done() {
    for taken in [0, 24, 100, 5_000, usize::MAX] {
        let mut rig = Rig::new(by_r2t());
        let memory = Memory::holding(&pattern(20_000), &[20_000]);
        let tag = rig.write(&memory, 5);
        rig.drain();
        rig.feed(&rig.r2t(tag, 1, 0, 20_000)).expect("an R2T");
        let listed = rig.list().len();
        rig.feed(&rig.response(tag, 0x4080, 0))
            .expect("an error status");
        assert!(rig.ended.is_empty(), "the kernel has the list");
        rig.sent(taken.min(listed));
        if taken == 0 {
            // Nothing was begun, so nothing has to be finished.
            assert!(!rig.machine.wants_to_send());
        } else if taken < listed {
            assert!(rig.ended.is_empty());
            let rest = rig.drain();
            assert_eq!(rest.len(), 24 + 8192 - taken);
        }
        rig.one_end();
        assert_eq!(rig.machine.in_flight(), 0);
    }
}

#[test]
fn an_answer_may_overtake_the_account_of_what_was_sent() {
    // The kernel has sent the capsule, and tells so only after the answer has come.
    let mut rig = Rig::new(plain());
    let memory = Memory::new(&[64]);
    let tag = rig.read(&memory, 1);
    let n = rig.list().len();
    let stream = rig.c2h(tag, 0, &[4; 64], LAST | SUCCESS);
    rig.feed(&stream).expect("a valid stream");
    assert!(rig.ended.is_empty());
    rig.sent(n);
    rig.one_end();
    assert_eq!(memory.bytes(), [4; 64]);
    // And with one R2T allowed, the next one comes before we know that its predecessor's data are out.
    let mut rig = Rig::new(QueueParams {
        max_r2t: 1,
        ..by_r2t()
    });
    let memory = Memory::holding(&pattern(64), &[64]);
    let tag = rig.write(&memory, 1);
    let n = rig.list().len();
    rig.feed(&rig.r2t(tag, 1, 0, 32))
        .expect("the capsule was listed");
    rig.sent(n);
    let n = rig.list().len();
    rig.feed(&rig.r2t(tag, 2, 32, 32))
        .expect("the first R2T's data were listed");
    rig.sent(n);
    let n = rig.list().len();
    rig.feed(&rig.response(tag, 0, 0))
        .expect("all data were listed");
    rig.sent(n);
    assert_eq!(rig.one_end().status, Status::SUCCESS);
}

#[test]
fn the_result_and_every_bit_of_the_status_come_through() {
    let mut rig = Rig::new(plain());
    let tag = rig.flush(0xdead_beef);
    rig.drain();
    rig.feed(&rig.response(tag, 0x7fff, 0x0123_4567_89ab_cdef))
        .expect("a response");
    let end = rig.one_end();
    assert_eq!(end.status.raw(), 0x7fff);
    assert_eq!((end.user, end.result), (0xdead_beef, 0x0123_4567_89ab_cdef));
}

#[test]
fn what_is_abandoned_was_begun_and_had_not_ended() {
    let mut rig = Rig::new(by_r2t());
    let memories: Vec<Memory> = (0..8).map(|_| Memory::new(&[64])).collect();
    let tags: Vec<Tag> = (0..8)
        .map(|n| match n % 2 {
            0 => rig.read(&memories[n], n as u32),
            _ => rig.write(&memories[n], n as u32),
        })
        .collect();
    rig.drain();
    rig.feed(&rig.response(tags[3], 0x4006, 0))
        .expect("a response");
    rig.feed(&rig.c2h(tags[4], 0, &[1; 64], LAST | SUCCESS))
        .expect("data");
    // One that was answered, and whose memory is still being sent, has not ended.
    rig.feed(&rig.r2t(tags[5], 1, 0, 64)).expect("an R2T");
    rig.list();
    rig.sent(30);
    rig.feed(&rig.response(tags[5], 0x4006, 0))
        .expect("a response");
    // One in the middle of its data.
    rig.feed(&rig.c2h(tags[6], 0, &[1; 64], LAST | SUCCESS)[..40])
        .expect("data");
    let ended: Vec<u32> = rig.ended.iter().map(|end| end.user).collect();
    assert_eq!(ended, [3, 4]);
    let in_flight: Vec<u32> = rig.machine.commands().map(|command| command.user).collect();
    assert_eq!(in_flight, [0, 1, 2, 5, 6, 7]);
    let mut abandoned = Vec::new();
    rig.machine.abandon_all(&mut |user| abandoned.push(user));
    assert_eq!(abandoned, in_flight);
    assert_eq!((rig.machine.in_flight(), rig.machine.free()), (0, 8));
    assert!(!rig.machine.wants_to_send());
    // It is as new: the bytes of a new connection are taken from their beginning.
    let tag = rig.flush(1);
    assert_eq!(rig.drain().len(), 72);
    rig.ended.clear();
    rig.feed(&rig.response(tag, 0, 0)).expect("a response");
    rig.one_end();
}
