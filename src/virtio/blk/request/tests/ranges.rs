//! Discard and write-zeroes.

use super::*;

#[test]
fn discard_ranges_are_copied_out_before_anything_is_done() {
    let mem = ram();
    write_bytes(&mem, DATA, &segment(1, 2, 0));
    write_bytes(&mem, DATA + 16, &segment(100, 2048, 0));
    let mut chain = usual(&mem, 11, 0, &[(DATA, 32, false)]);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(parsed.command, Command::Discard);
    assert!(parsed.data(&chain).is_empty());
    // What the guest writes now comes too late.
    write_bytes(&mem, DATA, &[0xff; 32]);
    let segments: Vec<_> = parsed.segments(&chain).collect();
    assert_eq!(
        segments,
        [
            Segment {
                offset: 512,
                len: 1024,
                unmap: false
            },
            Segment {
                offset: 51200,
                len: 1 << 20,
                unmap: false
            },
        ]
    );
}

#[test]
fn ranges_may_be_cut_anywhere() {
    let mem = ram();
    let mut bytes = segment(7, 1, 1).to_vec();
    bytes.extend(segment(9, 3, 0));
    for first in 1..32 {
        write_bytes(&mem, DATA, &bytes);
        let parts = [
            (DATA, first, false),
            (DATA + u64::from(first), 32 - first, false),
        ];
        let mut chain = usual(&mem, 13, 0, &parts);
        let parsed = execute(&mut chain, &limits());
        assert_eq!(parsed.command, Command::WriteZeroes);
        let segments: Vec<_> = parsed.segments(&chain).collect();
        assert_eq!(
            segments,
            [
                Segment {
                    offset: 7 * 512,
                    len: 512,
                    unmap: true
                },
                Segment {
                    offset: 9 * 512,
                    len: 1536,
                    unmap: false
                },
            ]
        );
    }
}

#[test]
fn unknown_flags_and_unmap_on_a_discard_are_unsupported() {
    let mem = ram();
    for (kind, flags) in [
        (11, 1),
        (11, 2),
        (11, 1 << 31),
        (13, 2),
        (13, 3),
        (13, u32::MAX),
    ] {
        write_bytes(&mem, DATA, &segment(0, 1, flags));
        let mut chain = usual(&mem, kind, 0, &[(DATA, 16, false)]);
        assert_eq!(refused(&mut chain, &limits(), ALL), Status::Unsupp);
        // Also after a range that is outside the disk.
        write_bytes(&mem, DATA, &segment(u64::MAX, 1, 0));
        write_bytes(&mem, DATA + 16, &segment(0, 1, flags));
        let mut chain = usual(&mem, kind, 0, &[(DATA, 32, false)]);
        assert_eq!(refused(&mut chain, &limits(), ALL), Status::Unsupp);
    }
}

#[test]
fn discard_and_write_zeroes_that_were_not_negotiated_are_unsupported() {
    let mem = ram();
    write_bytes(&mem, DATA, &segment(0, 1, 0));
    for (kind, bit) in [(11, features::DISCARD), (13, features::WRITE_ZEROES)] {
        let mut chain = usual(&mem, kind, 0, &[(DATA, 16, false)]);
        assert_eq!(refused(&mut chain, &limits(), !bit), Status::Unsupp);
        let mut chain = usual(&mem, kind, 0, &[(DATA, 16, false)]);
        assert!(matches!(
            parse(&mut chain, &limits(), bit),
            Outcome::Execute(_)
        ));
    }
}

#[test]
fn ranges_outside_the_disk_or_beyond_the_limits_are_io_errors() {
    let mem = ram();
    let capacity = (1u64 << 30) / 512;
    // `num_sectors * 512` is 2 TiB here and must not wrap to something small.
    for (sector, sectors) in [
        (capacity, 1),
        (capacity - 1, 2),
        (u64::MAX, 1),
        (u64::MAX / 512, 1),
        (0, u32::MAX),
        (0, 1 << 23),
        (0, 4097),
    ] {
        for kind in [11, 13] {
            // The second range of two: the first is not to be executed either.
            write_bytes(&mem, DATA, &segment(0, 1, 0));
            write_bytes(&mem, DATA + 16, &segment(sector, sectors, 0));
            let mut chain = usual(&mem, kind, 0, &[(DATA, 32, false)]);
            assert_eq!(refused(&mut chain, &limits(), ALL), Status::IoErr);
            assert!(chain.segments.is_empty());
        }
    }
    // Each has its own limit: 2048 sectors a discard, 4096 a write-zeroes.
    write_bytes(&mem, DATA, &segment(0, 4096, 0));
    execute(&mut usual(&mem, 13, 0, &[(DATA, 16, false)]), &limits());
    let mut chain = usual(&mem, 11, 0, &[(DATA, 16, false)]);
    assert_eq!(refused(&mut chain, &limits(), ALL), Status::IoErr);
}

#[test]
fn a_wrong_number_of_range_bytes_is_an_io_error() {
    let mem = ram();
    write_bytes(&mem, DATA, &[0; 4096]);
    // 4 ranges are allowed in a discard, 2 in a write-zeroes.
    for (kind, lens) in [(11, [0, 15, 17, 80]), (13, [0, 8, 31, 48])] {
        for len in lens {
            let mut chain = usual(&mem, kind, 0, &[(DATA, len, false)]);
            assert_eq!(
                refused(&mut chain, &limits(), ALL),
                Status::IoErr,
                "{kind} {len}"
            );
        }
    }
}

#[test]
fn ranges_of_no_sectors_are_left_out() {
    let mem = ram();
    write_bytes(&mem, DATA, &segment(5, 0, 0));
    write_bytes(&mem, DATA + 16, &segment(6, 1, 0));
    let mut chain = usual(&mem, 11, 0, &[(DATA, 32, false)]);
    let parsed = execute(&mut chain, &limits());
    let segments: Vec<_> = parsed.segments(&chain).collect();
    assert_eq!(
        segments,
        [Segment {
            offset: 3072,
            len: 512,
            unmap: false
        }]
    );
}
