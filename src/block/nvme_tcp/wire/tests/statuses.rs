//! What is done about each status: as Linux does it.

use super::super::Status;
use super::super::status::Class;
use crate::block::ErrorKind;

#[test]
fn the_parts_of_a_status_are_where_the_specification_puts_them() {
    // The upper half of dword 3: phase, SC 81h, SCT 2, CRD 3, M, DNR.
    let status = Status::from_cqe(1 | 0x81 << 1 | 2 << 9 | 3 << 12 | 1 << 14 | 1 << 15);
    assert_eq!((status.sct(), status.sc(), status.crd()), (2, 0x81, 3));
    assert!(status.more() && status.do_not_retry() && !status.is_success());
    assert_eq!(status.code(), 0x281);
    assert_eq!(status.raw(), 0x7a81);
    assert_eq!(
        status.to_string(),
        "Unrecovered Read Error (SCT 2h, SC 81h, DNR)"
    );
    // A success with flags is one all the same.
    assert!(Status::from_raw(0x7800).is_success());
    assert_eq!(Status::from_raw(0xffff).raw(), 0x7fff);
}

#[test]
fn every_class_of_failure_is_treated_as_linux_treats_it() {
    for (raw, class) in [
        (0x0000, Class::Ok),
        (0x0006, Class::Retry { crd: 0 }),
        (0x0022, Class::Retry { crd: 0 }),
        (0x0082 | 2 << 11, Class::Retry { crd: 2 }),
        (0x0280, Class::Retry { crd: 0 }),
        (0x4006, Class::Fail),
        (0x0191, Class::Authenticate),
        (0x4191, Class::Fail),
        (0x0300, Class::PathError),
        (0x0301, Class::AnaChange),
        (0x0302, Class::AnaChange),
        (0x0303, Class::AnaChange),
        (0x0360, Class::PathError),
        (0x0370, Class::PathError),
        (0x0371, Class::PathError),
        // A path error that no path will change is the command's.
        (0x4370, Class::Fail),
        (0x0380, Class::PathError),
        (0x0781, Class::Retry { crd: 0 }),
    ] {
        assert_eq!(Status::from_raw(raw).class(), class, "{raw:#x}");
    }
}

#[test]
fn statuses_become_the_kinds_of_errors_that_a_guest_is_told() {
    for (raw, kind) in [
        (0x081, ErrorKind::NoSpace),
        (0x020, ErrorKind::ReadOnly),
        (0x182, ErrorKind::ReadOnly),
        (0x080, ErrorKind::OutOfRange),
        (0x083, ErrorKind::Locked),
        (0x001, ErrorKind::Unsupported),
        (0x00b, ErrorKind::NotFound),
        (0x286, ErrorKind::NotAllowed),
        (0x280, ErrorKind::Io),
        (0x281, ErrorKind::Io),
        (0x006, ErrorKind::Io),
        (0x370, ErrorKind::Io),
    ] {
        for flags in [0, 0x4000, 0x6000] {
            assert_eq!(Status::from_raw(raw | flags).kind(), kind, "{raw:#x}");
        }
    }
    assert!(Status::CAPACITY_EXCEEDED.advice().is_some());
    assert!(Status::INTERNAL_ERROR.advice().is_none());
}

#[test]
fn every_status_has_a_text() {
    for raw in 0..0x8000 {
        let text = Status::from_raw(raw).to_string();
        assert!(text.contains("SCT") && !text.starts_with(' '), "{text}");
    }
    assert_eq!(
        Status::from_raw(0x7c1).to_string(),
        "a vendor's own status (SCT 7h, SC c1h)"
    );
    assert_eq!(
        Status::from_raw(0x0c1).to_string(),
        "unknown status (SCT 0h, SC c1h)"
    );
}
