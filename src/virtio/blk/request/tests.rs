use super::*;
use crate::virtio::blk::features;
use crate::virtio::memory::GuestMemory;
use crate::virtio::testing::{memory, read_bytes, write_bytes};

mod ranges;

const RAM: u64 = 0x10_0000;
const HEADER: u64 = 0x100;
const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x8_0000;
const UNTOUCHED: u8 = 0xee;
const ALL: u64 = !0;

fn limits() -> DeviceLimits {
    DeviceLimits {
        capacity_bytes: 1 << 30,
        read_only: false,
        block_size: 512,
        max_discard_bytes: 1 << 20,
        max_discard_segments: 4,
        discard_alignment: 512,
        max_write_zeroes_bytes: 1 << 21,
        max_write_zeroes_segments: 2,
        write_zeroes_may_unmap: true,
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    // The former priority: to be ignored.
    bytes[4..8].copy_from_slice(&[0xff; 4]);
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Memory in which every byte that matters is marked.
fn ram() -> GuestMemory {
    let mem = memory(&[(0, RAM)]);
    write_bytes(&mem, DATA, &[UNTOUCHED; 4096]);
    write_bytes(&mem, STATUS, &[UNTOUCHED; 16]);
    mem
}

fn chain(mem: &GuestMemory, parts: &[(u64, u32, bool)]) -> ChainBuf {
    let mut chain = ChainBuf::with_capacity(4);
    for (addr, len, writable) in parts {
        chain.push(mem, *addr, *len, *writable).unwrap();
    }
    chain
}

/// The usual layout: header, data, status.
fn usual(mem: &GuestMemory, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> ChainBuf {
    write_bytes(mem, HEADER, &header(kind, sector));
    let mut parts = vec![(HEADER, 16, false)];
    parts.extend(data);
    parts.push((STATUS, 1, true));
    chain(mem, &parts)
}

fn execute(chain: &mut ChainBuf, limits: &DeviceLimits) -> Parsed {
    match parse(chain, limits, ALL) {
        Outcome::Execute(parsed) => parsed,
        other => panic!("{other:?}"),
    }
}

fn refused(chain: &mut ChainBuf, limits: &DeviceLimits, features: u64) -> Status {
    match parse(chain, limits, features) {
        Outcome::Finish { status, .. } => status,
        other => panic!("{other:?}"),
    }
}

fn buffers(mem: &GuestMemory, parsed: &Parsed, chain: &ChainBuf) -> Vec<(u64, usize)> {
    parsed
        .data(chain)
        .iter()
        .map(|v| (mem.host_to_guest(v.iov_base.cast()).unwrap(), v.iov_len))
        .collect()
}

fn status(mem: &GuestMemory) -> u8 {
    read_bytes(mem, STATUS, 1)[0]
}

#[test]
fn a_read_is_taken_apart() {
    let mem = ram();
    let mut chain = usual(&mem, 0, 8, &[(DATA, 512, true), (DATA + 1024, 512, true)]);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(
        parsed.command,
        Command::Read {
            offset: 4096,
            len: 1024
        }
    );
    assert_eq!(
        buffers(&mem, &parsed, &chain),
        [(DATA, 512), (DATA + 1024, 512)]
    );
    assert_eq!(parsed.finish(Status::Ok), 1025, "data and status");
    assert_eq!(status(&mem), 0);
}

#[test]
fn a_write_is_taken_apart() {
    let mem = ram();
    let mut chain = usual(&mem, 1, 1, &[(DATA, 1024, false)]);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(
        parsed.command,
        Command::Write {
            offset: 512,
            len: 1024
        }
    );
    assert_eq!(buffers(&mem, &parsed, &chain), [(DATA, 1024)]);
    assert_eq!(parsed.finish(Status::Ok), 1, "only the status");
}

#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    let mem = ram();
    // A write: 16 bytes of header and 1024 of data lie in one piece, cut at every pair of places.
    let whole = 16 + 1024;
    for first in [1, 8, 15, 16, 17, 100, 1039] {
        for second in [first + 1, first + 7, 528, 1040] {
            if second <= first || second > whole {
                continue;
            }
            write_bytes(&mem, HEADER, &header(1, 3));
            let mut cuts = vec![0, first, second, whole];
            cuts.dedup();
            let parts: Vec<_> = cuts
                .windows(2)
                .map(|c| (HEADER + u64::from(c[0]), c[1] - c[0], false))
                .chain([(STATUS, 1, true)])
                .collect();
            let mut chain = chain(&mem, &parts);
            let parsed = execute(&mut chain, &limits());
            let command = Command::Write {
                offset: 1536,
                len: 1024,
            };
            assert_eq!(parsed.command, command, "{first} {second}");
            let mut at = HEADER + 16;
            for (addr, len) in buffers(&mem, &parsed, &chain) {
                assert_eq!(addr, at);
                assert!(len > 0);
                at += len as u64;
            }
            assert_eq!(at, HEADER + u64::from(whole));
        }
    }
}

#[test]
fn a_header_of_sixteen_descriptors_is_read() {
    let mem = ram();
    write_bytes(&mem, HEADER, &header(0, 2));
    let mut parts: Vec<_> = (0..16).map(|i| (HEADER + i, 1, false)).collect();
    parts.push((DATA, 512, true));
    parts.push((STATUS, 1, true));
    let mut chain = chain(&mem, &parts);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(
        parsed.command,
        Command::Read {
            offset: 1024,
            len: 512
        }
    );
    assert_eq!(buffers(&mem, &parsed, &chain), [(DATA, 512)]);
}

#[test]
fn the_status_may_share_a_descriptor_with_data() {
    let mem = ram();
    write_bytes(&mem, HEADER, &header(0, 0));
    let mut chain = chain(
        &mem,
        &[
            (HEADER, 16, false),
            (DATA, 500, true),
            (DATA + 500, 13, true),
        ],
    );
    let parsed = execute(&mut chain, &limits());
    assert_eq!(
        buffers(&mem, &parsed, &chain),
        [(DATA, 500), (DATA + 500, 12)]
    );
    assert_eq!(parsed.finish(Status::Ok), 513);
    assert_eq!(read_bytes(&mem, DATA + 511, 3), [UNTOUCHED, 0, UNTOUCHED]);
    assert_eq!(
        mem.host_to_guest(parsed.reply.status_ptr()),
        Some(DATA + 512)
    );
}

#[test]
fn a_chain_with_no_writable_byte_is_broken() {
    let mem = ram();
    for parts in [
        &[][..],
        &[(HEADER, 16, false)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
    ] {
        let mut chain = chain(&mem, parts);
        assert!(matches!(parse(&mut chain, &limits(), ALL), Outcome::Broken));
    }
}

#[test]
fn a_header_that_is_too_short_is_an_io_error() {
    let mem = ram();
    for len in 0..16 {
        let mut chain = chain(&mem, &[(HEADER, len, false), (STATUS, 1, true)]);
        let Outcome::Finish {
            status: answer,
            reply,
        } = parse(&mut chain, &limits(), ALL)
        else {
            panic!();
        };
        assert_eq!(answer, Status::IoErr);
        assert_eq!(reply.finish(answer), 1);
        assert_eq!(status(&mem), 1);
        write_bytes(&mem, STATUS, &[UNTOUCHED]);
    }
}

#[test]
fn an_unknown_request_type_is_unsupported() {
    let mem = ram();
    // SCSI, flush with the write bit, lifetime, secure erase, zones, the old barrier bit.
    for kind in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        15,
        16,
        26,
        0x8000_0000,
        0x8000_0001,
        u32::MAX,
    ] {
        let mut chain = usual(&mem, kind, 0, &[(DATA, 512, true)]);
        assert_eq!(
            refused(&mut chain, &limits(), ALL),
            Status::Unsupp,
            "{kind}"
        );
    }
}

#[test]
fn a_length_that_is_no_multiple_of_512_is_an_io_error() {
    let mem = ram();
    for len in [1, 511, 513, 1000] {
        let mut read = usual(&mem, 0, 0, &[(DATA, len, true)]);
        assert_eq!(refused(&mut read, &limits(), ALL), Status::IoErr);
        let mut write = usual(&mem, 1, 0, &[(DATA, len, false)]);
        assert_eq!(refused(&mut write, &limits(), ALL), Status::IoErr);
    }
}

#[test]
fn a_read_or_write_of_nothing_is_executed() {
    let mem = ram();
    for kind in [0, 1] {
        let mut chain = usual(&mem, kind, 1, &[]);
        let parsed = execute(&mut chain, &limits());
        assert!(parsed.data(&chain).is_empty());
        assert_eq!(parsed.finish(Status::Ok), 1);
    }
}

#[test]
fn the_last_sector_is_inside_and_the_next_is_not() {
    let mem = ram();
    let limits = DeviceLimits {
        capacity_bytes: 10 * 512 + 300,
        ..limits()
    };
    for kind in [0, 1] {
        let writable = kind == 0;
        let data = [(DATA, 512, writable)];
        execute(&mut usual(&mem, kind, 9, &data), &limits);
        for sector in [10, 11, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX] {
            let mut chain = usual(&mem, kind, sector, &data);
            assert_eq!(refused(&mut chain, &limits, ALL), Status::IoErr, "{sector}");
        }
        let mut chain = usual(&mem, kind, 9, &[(DATA, 1024, writable)]);
        assert_eq!(refused(&mut chain, &limits, ALL), Status::IoErr);
    }
}

#[test]
fn a_capacity_of_half_a_block_does_not_reach_beyond_whole_blocks() {
    let mem = ram();
    let limits = DeviceLimits {
        capacity_bytes: 4096 + 512,
        block_size: 4096,
        ..limits()
    };
    execute(&mut usual(&mem, 0, 7, &[(DATA, 512, true)]), &limits);
    let mut chain = usual(&mem, 0, 8, &[(DATA, 512, true)]);
    assert_eq!(refused(&mut chain, &limits, ALL), Status::IoErr);
}

#[test]
fn a_sum_of_lengths_beyond_32_bits_is_refused_and_does_not_wrap() {
    let mem = memory(&[(0, 1 << 31)]);
    let huge = DeviceLimits {
        capacity_bytes: u64::MAX,
        ..limits()
    };
    // 4 GiB + 512 wraps to 512 in 32 bits.
    let half = (1 << 20, 1 << 30, true);
    let mut chain = usual(&mem, 0, 0, &[half, half, half, half, (DATA, 512, true)]);
    assert_eq!(refused(&mut chain, &huge, ALL), Status::IoErr);
    let largest = (1 << 20, (1 << 30) - 512, true);
    let mut chain = usual(&mem, 0, 0, &[half, largest]);
    let parsed = execute(&mut chain, &huge);
    assert_eq!(parsed.finish(Status::Ok), MAX_TRANSFER as u32 + 1);
}

#[test]
fn a_read_only_disk_refuses_every_change_whatever_was_negotiated() {
    let mem = ram();
    let limits = DeviceLimits {
        read_only: true,
        ..limits()
    };
    write_bytes(&mem, DATA, &segment(0, 1, 0));
    for negotiated in [0, ALL, features::DISCARD | features::WRITE_ZEROES] {
        for (kind, len) in [(1, 512), (11, 16), (13, 16)] {
            let mut chain = usual(&mem, kind, 0, &[(DATA, len, false)]);
            assert_eq!(
                refused(&mut chain, &limits, negotiated),
                Status::IoErr,
                "{kind}"
            );
        }
    }
    execute(&mut usual(&mem, 0, 0, &[(DATA, 512, true)]), &limits);
    execute(&mut usual(&mem, 4, 0, &[]), &limits);
    execute(&mut usual(&mem, 8, 0, &[(DATA, 20, true)]), &limits);
}

#[test]
fn a_flush_needs_no_data_and_a_sector_does_not_matter() {
    let mem = ram();
    for sector in [0, 1, u64::MAX] {
        for data in [&[][..], &[(DATA, 7, false)], &[(DATA, 512, true)]] {
            let mut chain = usual(&mem, 4, sector, data);
            let parsed = execute(&mut chain, &limits());
            assert_eq!(parsed.command, Command::Flush);
            assert!(parsed.data(&chain).is_empty());
        }
    }
    // Also where the driver did not negotiate it.
    let mut chain = usual(&mem, 4, 0, &[]);
    assert!(matches!(
        parse(&mut chain, &limits(), 0),
        Outcome::Execute(_)
    ));
}

#[test]
fn used_len_claims_nothing_of_a_failed_read() {
    let mem = ram();
    let mut chain = usual(&mem, 0, 0, &[(DATA, 512, true)]);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(parsed.finish(Status::IoErr), 0);
    assert_eq!(status(&mem), 1);
    let mut chain = usual(&mem, 1, 0, &[(DATA, 512, false)]);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(parsed.finish(Status::IoErr), 1, "the status was written");
    // A write with room that nobody writes before the status.
    let mut chain = usual(&mem, 1, 0, &[(DATA, 512, false), (DATA, 8, true)]);
    let parsed = execute(&mut chain, &limits());
    assert_eq!(parsed.finish(Status::Ok), 0);
    // A refused request with data.
    let mut chain = usual(&mem, 0, u64::MAX, &[(DATA, 512, true)]);
    let Outcome::Finish { status, reply } = parse(&mut chain, &limits(), ALL) else {
        panic!();
    };
    assert_eq!(reply.finish(status), 0);
}

#[test]
fn get_id_without_a_data_descriptor_is_an_io_error() {
    let mem = ram();
    let mut chain = usual(&mem, 8, 0, &[]);
    assert_eq!(refused(&mut chain, &limits(), ALL), Status::IoErr);
    let mut chain = usual(&mem, 8, 0, &[(DATA, 20, false)]);
    assert_eq!(refused(&mut chain, &limits(), ALL), Status::IoErr);
}

#[test]
fn get_id_fills_what_there_is_room_for_and_pads_with_nul() {
    let mem = ram();
    let id = DeviceId::new("serial-1").unwrap();
    let full = *b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0";
    for (len, used) in [(1, 2), (8, 9), (19, 20), (20, 21), (21, 20), (512, 20)] {
        write_bytes(&mem, DATA, &[UNTOUCHED; 600]);
        let mut chain = usual(&mem, 8, 0, &[(DATA, len, true)]);
        let parsed = execute(&mut chain, &limits());
        assert_eq!(parsed.command, Command::GetId);
        fill_id(&parsed, &chain, &id);
        assert_eq!(parsed.finish(Status::Ok), used, "{len}");
        let filled = len.min(20) as usize;
        let mut expected = [UNTOUCHED; 600];
        expected[..filled].copy_from_slice(&full[..filled]);
        assert_eq!(read_bytes(&mem, DATA, 600), expected);
    }
}

#[test]
fn an_id_of_20_bytes_has_no_terminator_and_may_be_scattered() {
    let mem = ram();
    let id = DeviceId::new("12345678901234567890").unwrap();
    let parts = [
        (DATA, 7, true),
        (DATA + 100, 1, true),
        (DATA + 200, 12, true),
    ];
    let mut chain = usual(&mem, 8, 0, &parts);
    let parsed = execute(&mut chain, &limits());
    fill_id(&parsed, &chain, &id);
    assert_eq!(parsed.finish(Status::Ok), 21);
    assert_eq!(read_bytes(&mem, DATA, 7), b"1234567");
    assert_eq!(read_bytes(&mem, DATA + 100, 1), b"8");
    assert_eq!(read_bytes(&mem, DATA + 200, 13), b"901234567890\xee");
}

#[test]
fn a_serial_that_is_no_device_id_is_refused() {
    assert_eq!(DeviceId::new("").unwrap().as_bytes(), &[0; 20]);
    assert!(matches!(
        DeviceId::new("123456789012345678901"),
        Err(SerialError::TooLong(_))
    ));
    for serial in ["disk\n", "plätte", "a\0b"] {
        assert!(matches!(
            DeviceId::new(serial),
            Err(SerialError::NotAscii(_))
        ));
    }
}
