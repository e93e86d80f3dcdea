//! Submission and completion queue entries.

use super::super::command::*;
use super::super::{Nlb, Sqe, Status};
use super::put;

fn nlb(blocks: u64) -> Nlb {
    Nlb::new(blocks).expect("a number of blocks")
}

/// Bytes, and where they are.
type Parts = Vec<(usize, &'static [u8])>;

/// An entry with these bytes, the rest as every entry has it: PSDT 01b, and an SGL descriptor of nothing.
fn entry(parts: &[(usize, &[u8])]) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[1] = 0x40;
    bytes[39] = 0x5a;
    for (at, part) in parts {
        put(&mut bytes, *at, part);
    }
    bytes
}

const NSID: u32 = 0x0403_0201;
const NSID_BYTES: &[u8] = &[1, 2, 3, 4];
const SLBA: u64 = 0x0807_0605_0403_0201;
const SLBA_BYTES: &[u8] = &[1, 2, 3, 4, 5, 6, 7, 8];

#[test]
fn commands_of_the_nvm_command_set_have_the_bytes_of_the_specification() {
    let cases: Vec<(Sqe, Parts)> = vec![
        (
            Sqe::read(NSID, SLBA, nlb(65536)),
            vec![(0, &[0x02]), (40, SLBA_BYTES), (48, &[0xff, 0xff])],
        ),
        (
            Sqe::write(NSID, SLBA, nlb(1), false),
            vec![(0, &[0x01]), (40, SLBA_BYTES)],
        ),
        // FUA is bit 30 of dword 12.
        (
            Sqe::write(NSID, SLBA, nlb(2), true),
            vec![(0, &[0x01]), (40, SLBA_BYTES), (48, &[1, 0, 0, 0x40])],
        ),
        (Sqe::flush(NSID), vec![]),
        // DEAC is bit 25.
        (
            Sqe::write_zeroes(NSID, SLBA, nlb(9), true, true),
            vec![(0, &[0x08]), (40, SLBA_BYTES), (48, &[8, 0, 0, 0x42])],
        ),
        (
            Sqe::write_zeroes(NSID, SLBA, nlb(9), false, false),
            vec![(0, &[0x08]), (40, SLBA_BYTES), (48, &[8])],
        ),
        // NR less one; AD is bit 2 of dword 11.
        (
            Sqe::deallocate(NSID, 256).expect("ranges"),
            vec![(0, &[0x09]), (40, &[0xff]), (44, &[4])],
        ),
        (
            Sqe::reservation_register(NSID, RegisterAction::Replace, true),
            vec![(0, &[0x0d]), (40, &[0x0a])],
        ),
        (
            Sqe::reservation_acquire(
                NSID,
                AcquireAction::PreemptAndAbort,
                ReservationType::ExclusiveAccessAllRegistrants,
            ),
            vec![(0, &[0x11]), (40, &[2, 6])],
        ),
        (
            Sqe::reservation_release(
                NSID,
                ReleaseAction::Release,
                ReservationType::WriteExclusive,
            ),
            vec![(0, &[0x15]), (40, &[0, 1])],
        ),
        // Dwords less one, and the extended data structure.
        (
            Sqe::reservation_report(NSID, 4096),
            vec![(0, &[0x0e]), (40, &[0xff, 3]), (44, &[1])],
        ),
    ];
    for (sqe, mut parts) in cases {
        parts.push((4, NSID_BYTES));
        assert_eq!(*sqe.as_bytes(), entry(&parts));
    }
    assert_eq!(Sqe::deallocate(1, 0), None);
    assert_eq!(Sqe::deallocate(1, 257), None);
}

#[test]
fn admin_commands_have_the_bytes_of_the_specification() {
    let cases: Vec<(Sqe, Parts)> = vec![
        (
            Sqe::identify(cns::NAMESPACE_DESCRIPTORS, NSID, 0),
            vec![(0, &[0x06]), (4, NSID_BYTES), (40, &[3])],
        ),
        (
            Sqe::identify(cns::COMMAND_SET_CONTROLLER, 0, 2),
            vec![(0, &[0x06]), (40, &[6]), (44, &[0, 0, 0, 2])],
        ),
        // LID, LSP, RAE, NUMDL; NUMDU; the offset.
        (
            Sqe::get_log_page(0x0c, ALL_NAMESPACES, SLBA, 0x0010_0004, true, 1),
            vec![
                (0, &[0x02]),
                (4, &[0xff; 4]),
                (40, &[0x0c, 0x81, 0x00, 0x00]),
                (44, &[4, 0]),
                (48, SLBA_BYTES),
            ],
        ),
        (
            Sqe::get_log_page(0x70, 0, 0, 1024, false, 0),
            vec![(0, &[0x02]), (40, &[0x70, 0, 0xff, 0])],
        ),
        (
            Sqe::set_features(feature::NUMBER_OF_QUEUES, 0x0003_0003),
            vec![(0, &[0x09]), (40, &[7]), (44, &[3, 0, 3, 0])],
        ),
        (
            Sqe::get_features(feature::VOLATILE_WRITE_CACHE),
            vec![(0, &[0x0a]), (40, &[6])],
        ),
        (Sqe::keep_alive(), vec![(0, &[0x18])]),
        (Sqe::async_event_request(), vec![(0, &[0x0c])]),
        (
            Sqe::abort(0x0102, 0x0304),
            vec![(0, &[0x08]), (40, &[2, 1, 4, 3])],
        ),
    ];
    for (sqe, parts) in cases {
        assert_eq!(*sqe.as_bytes(), entry(&parts));
    }
}

#[test]
fn fabrics_commands_have_the_bytes_of_the_specification() {
    let cases: Vec<(Sqe, Parts)> = vec![
        // Base 6.3: RECFMT 0, QID, SQSIZE less one, CATTR, KATO.
        (
            Sqe::connect(0x0102, 128, CATTR_DISABLE_SQ_FLOW_CONTROL, 0x0001_d4c0).expect("entries"),
            vec![
                (4, &[0x01]),
                (40, &[0, 0, 2, 1, 127, 0, 4, 0]),
                (48, &[0xc0, 0xd4, 1, 0]),
            ],
        ),
        (
            Sqe::property_get(property::CAP, true),
            vec![(4, &[0x04]), (40, &[1])],
        ),
        (
            Sqe::property_get(property::CSTS, false),
            vec![(4, &[0x04]), (44, &[0x1c])],
        ),
        (
            Sqe::property_set(property::CC, 0x0046_0001),
            vec![(4, &[0x00]), (44, &[0x14]), (48, &[1, 0, 0x46, 0])],
        ),
        // SPSP0, SPSP1 and SECP behind a reserved byte, then the length.
        (
            Sqe::authentication_send(0x0102),
            vec![(4, &[0x05]), (40, &[0, 1, 1, 0xe9, 2, 1])],
        ),
        (
            Sqe::authentication_receive(4096),
            vec![(4, &[0x06]), (40, &[0, 1, 1, 0xe9, 0, 0x10])],
        ),
        (Sqe::disconnect(), vec![(4, &[0x08])]),
    ];
    for (sqe, mut parts) in cases {
        parts.push((0, &[0x7f]));
        assert_eq!(*sqe.as_bytes(), entry(&parts));
    }
    assert_eq!(Sqe::connect(0, 0, 0, 0), None);
    assert_eq!(Sqe::connect(0, 1, 0, 0), None);
    assert!(Sqe::connect(0, 65536, 0, 0).is_some());
    assert_eq!(Sqe::connect(0, 65537, 0, 0), None);
}

#[test]
fn identifier_and_sgl_are_put_where_they_belong() {
    let sqe = Sqe::flush(0).cid(0x0201).sgl(Sgl::InCapsule {
        length: 0x0001_0200,
    });
    let expected = entry(&[(2, &[1, 2]), (32, &[0, 2, 1, 0]), (39, &[0x01])]);
    assert_eq!(*sqe.as_bytes(), expected);
    let sqe = sqe.sgl(Sgl::Transport { length: 4096 });
    let expected = entry(&[(2, &[1, 2]), (32, &[0, 0x10])]);
    assert_eq!(*sqe.as_bytes(), expected);
    // There are no dwords but 10 to 15 to set.
    assert_eq!(sqe.cdw(9, 1).cdw(16, 1), sqe);
    assert_eq!(sqe.cdw(15, 7).as_bytes()[60], 7);
}

#[test]
fn data_of_commands_have_the_bytes_of_the_specification() {
    let range = DsmRange {
        slba: SLBA,
        blocks: 0x0102_0304,
    };
    assert_eq!(
        range.encode(),
        [0, 0, 0, 0, 4, 3, 2, 1, 1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!(reservation_keys(1, SLBA)[..9], [1, 0, 0, 0, 0, 0, 0, 0, 1]);
    let data = ConnectData {
        host_id: *b"0123456789abcdef",
        cntlid: ConnectData::ANY_CONTROLLER,
        subnqn: "nqn.2014-08.org.nvmexpress.discovery".into(),
        hostnqn: "n".repeat(223),
    };
    let mut expected = [0; 1024];
    put(&mut expected, 0, b"0123456789abcdef\xff\xff");
    put(&mut expected, 256, b"nqn.2014-08.org.nvmexpress.discovery");
    put(&mut expected, 512, &[b'n'; 223]);
    assert_eq!(data.encode(), Some(expected));
    for name in ["n".repeat(224), "a\0b".into()] {
        let wrong = ConnectData {
            subnqn: name,
            ..data.clone()
        };
        assert_eq!(wrong.encode(), None);
    }
}

#[test]
fn a_completion_queue_entry_is_taken_apart() {
    let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0x03, 0x81];
    let cqe = Cqe::decode(&bytes);
    assert_eq!(cqe.result, SLBA);
    assert_eq!((cqe.sqhd, cqe.sqid, cqe.cid), (0x0a09, 0x0c0b, 0x0e0d));
    // The phase bit is dropped, and that is all that does not come back.
    assert_eq!(cqe.status, Status::from_raw(0x4081));
    let mut without_phase = bytes;
    without_phase[14] = 2;
    assert_eq!(cqe.encode(), without_phase);
    let result = ConnectResult::from_result(0x0006_0001);
    assert!(result.authentication_required && result.secure_channel_required);
    assert_eq!(result.cntlid, 1);
    let result = ConnectResult::from_result(0xffff_ffff_0002_ffff);
    assert_eq!(result.cntlid, 0xffff);
    assert!(result.authentication_required && !result.secure_channel_required);
}

#[test]
fn numbers_of_blocks_are_1_to_65536() {
    assert_eq!(Nlb::new(0), None);
    assert_eq!(nlb(1).blocks(), 1);
    assert_eq!(nlb(65536).blocks(), 65536);
    assert_eq!(Nlb::new(65537), None);
    assert_eq!(Nlb::new(u64::MAX), None);
}
