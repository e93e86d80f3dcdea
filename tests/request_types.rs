//! Types, flags and answers of requests. Each test is a case that went wrong in a released system.

mod common;

use common::{Rig, allocated, dirty_pages, file_bytes, status_of};
use vhost_user_frontend as frontend;

use frontend::blk::{request_type, status};
use frontend::protocol::feature;
use frontend::{Device, DeviceOptions, Op, Segment};

const MIB: u64 = 1 << 20;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(13) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

#[test]
fn get_id_is_padded_with_nul_and_may_fill_twenty_bytes() {
    for (serial, want) in [
        ("disk-7", b"disk-7\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("exactly-twenty-bytes", b"exactly-twenty-bytes"),
    ] {
        let rig = Rig::with("raw", MIB, |d| d.serial(serial));
        let (done, id) = rig.device().run(Op::GetId).unwrap();
        assert_eq!((done.status, done.used_len), (status::OK, 21));
        assert_eq!(id, want);
    }
}

#[test]
fn get_id_with_more_or_fewer_than_twenty_bytes() {
    let rig = Rig::with("raw", MIB, |d| d.serial("abcdefghijklmnop"));
    let mut device = rig.device();
    for in_len in [1u32, 5, 19, 21, 64, 512] {
        let op = Op::Raw {
            request_type: request_type::GET_ID,
            sector: 0,
            out: &[],
            in_len,
        };
        let (done, id) = device.run(op).unwrap();
        assert_ne!(done.status, status::UNTOUCHED);
        if done.status == status::OK {
            let n = id.len().min(16);
            assert_eq!(id[..n], b"abcdefghijklmnop"[..n]);
            assert!(done.used_len <= in_len + 1);
        }
    }
}

#[test]
fn get_id_without_a_data_descriptor() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    let op = Op::Raw {
        request_type: request_type::GET_ID,
        sector: 0,
        out: &[],
        in_len: 0,
    };
    let (done, _) = device.run(op).unwrap();
    assert_ne!(done.status, status::UNTOUCHED);
    assert_eq!(done.used_len, 1);
    device.disconnect();
    rig.assert_serves_a_new_client();
}

#[test]
fn read_only_refuses_every_mutating_request_whatever_was_acked() {
    let dir = frontend::TempDir::new();
    let image = dir.join("disk");
    std::fs::write(&image, pattern(MIB as usize, 8)).unwrap();
    let rig = Rig::start(dir, frontend::Disk::new(&image, "raw").read_only());
    for features in [
        feature::LINUX,
        feature::LINUX & !feature::BLK_RO,
        feature::VERSION_1,
    ] {
        let mut device = rig.device_with(DeviceOptions {
            features,
            ..DeviceOptions::default()
        });
        assert_ne!(device.offered() & feature::BLK_RO, 0);
        let plain = [Segment::new(0, 8)];
        let unmap = [Segment::new(0, 8).unmap()];
        for op in [
            Op::Write {
                sector: 0,
                data: &[1; 512],
            },
            Op::Discard(&plain),
            Op::WriteZeroes(&plain),
            Op::WriteZeroes(&unmap),
        ] {
            let answer = status_of(&mut device, op);
            assert!(
                answer == status::IOERR || answer == status::UNSUPP,
                "{op:?}: {answer}"
            );
        }
        assert_eq!(device.read(0, 4096).unwrap(), pattern(4096, 8));
        device.shut_down().unwrap();
    }
    assert!(std::fs::read(&image).unwrap() == pattern(MIB as usize, 8));
}

#[test]
fn flush_makes_written_data_durable() {
    let rig = Rig::with("raw", 16 * MIB, |d| d.args(["--cache", "writeback"]));
    if dirty_pages(&rig.image()).is_none() {
        println!("skipped: this kernel has no cachestat(2)");
        return;
    }
    let mut device = rig.device();
    for i in 0..64 {
        device.write(128 * i, &[0x99; 65536]).unwrap();
    }
    device.flush().unwrap();
    assert_eq!(dirty_pages(&rig.image()), Some(0));
}

#[test]
fn flush_makes_the_mappings_of_qcow2_survive_a_kill() {
    let mut rig = Rig::with("qcow2", 64 * MIB, |d| d);
    let mut device = rig.device();
    let data = pattern(65536, 9);
    for i in 0..20 {
        device.write(i * 4096, &data).unwrap();
    }
    device.flush().unwrap();
    rig.daemon.kill();
    device.disconnect();
    frontend::qemu::wait_unlocked(&rig.image(), "qcow2");
    frontend::qemu::check_no_corruption(&rig.image());
    let raw = rig.dir.join("raw");
    let image = rig.image();
    frontend::qemu::img_ok([
        "convert".as_ref(),
        "-O".as_ref(),
        "raw".as_ref(),
        image.as_os_str(),
        raw.as_os_str(),
    ]);
    for i in 0..20 {
        assert!(
            file_bytes(&raw, i * 4096 * 512, 65536) == data,
            "write {i} is lost"
        );
    }
}

#[test]
fn flush_with_a_sector_or_a_data_descriptor_is_a_flush() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let (done, _) = device.run(Op::Flush).unwrap();
    assert_eq!((done.status, done.used_len), (status::OK, 1));
    for sector in [1, MIB / 512 - 1, MIB / 512, u64::MAX] {
        let op = Op::Raw {
            request_type: request_type::FLUSH,
            sector,
            out: &[],
            in_len: 0,
        };
        assert_eq!(status_of(&mut device, op), status::OK, "sector {sector}");
    }
}

#[test]
fn unknown_flags_and_unmap_on_discard_are_unsupported() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[0x31; 4096]).unwrap();
    for flags in [2, 3, 0x8000_0000, 0xffff_fffe] {
        let segments = [Segment::new(0, 8).with_flags(flags)];
        assert_eq!(
            status_of(&mut device, Op::Discard(&segments)),
            status::UNSUPP
        );
        assert_eq!(
            status_of(&mut device, Op::WriteZeroes(&segments)),
            status::UNSUPP
        );
    }
    let segments = [Segment::new(0, 8).unmap()];
    assert_eq!(
        status_of(&mut device, Op::Discard(&segments)),
        status::UNSUPP
    );
    assert_eq!(device.read(0, 4096).unwrap(), [0x31; 4096]);
}

#[test]
fn several_segments_in_one_request() {
    let rig = Rig::with("qcow2", 16 * MIB, |d| d);
    let mut device = rig.device();
    let config = device.config();
    device.write(0, &[0xc3; 65536]).unwrap();
    if config.max_write_zeroes_seg >= 3 {
        let three = [
            Segment::new(2, 3),
            Segment::new(64, 8).unmap(),
            Segment::new(20, 1),
        ];
        let (done, _) = device.run(Op::WriteZeroes(&three)).unwrap();
        assert_eq!((done.status, done.used_len), (status::OK, 1));
        let data = device.read(0, 65536).unwrap();
        for (i, sector) in data.chunks(512).enumerate() {
            let zero = (2..5).contains(&i) || (64..72).contains(&i) || i == 20;
            assert!(
                sector.iter().all(|b| *b == if zero { 0 } else { 0xc3 }),
                "sector {i}"
            );
        }
    }
    if config.max_discard_seg >= 2 {
        let two = [Segment::new(0, 8), Segment::new(100, 8)];
        assert_eq!(status_of(&mut device, Op::Discard(&two)), status::OK);
        let data = device.read(0, 65536).unwrap();
        assert!(
            data[9 * 512..20 * 512].iter().all(|b| *b == 0xc3),
            "only the ranges change"
        );
    }
    assert!(
        config.max_write_zeroes_seg >= 3 && config.max_discard_seg >= 2,
        "several segments are to be offered: {config:?}"
    );
    device.shut_down().unwrap();
}

#[test]
fn one_bad_segment_among_good_ones_is_an_error() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    if device.config().max_write_zeroes_seg < 2 {
        panic!("several segments are to be offered");
    }
    let bad = [Segment::new(0, 8), Segment::new(MIB / 512 - 4, 8)];
    assert_eq!(status_of(&mut device, Op::WriteZeroes(&bad)), status::IOERR);
    assert_eq!(status_of(&mut device, Op::Discard(&bad)), status::IOERR);
}

#[test]
fn unmap_of_write_zeroes_frees_the_space_and_reads_zero() {
    let rig = Rig::raw(16 * MIB);
    let mut device = rig.device();
    for i in 0..32 {
        device.write(128 * i, &[0xab; 65536]).unwrap();
    }
    device.flush().unwrap();
    let before = allocated(&rig.image());
    assert!(before >= 2 * MIB);
    let all = [Segment::new(0, 32 * 128).unmap()];
    assert_eq!(status_of(&mut device, Op::WriteZeroes(&all)), status::OK);
    device.flush().unwrap();
    assert_eq!(device.read(0, 65536).unwrap(), [0; 65536]);
    let after = allocated(&rig.image());
    assert!(after + MIB < before, "{before} bytes before, {after} after");
}

#[test]
fn write_zeroes_without_unmap_reads_zero() {
    let rig = Rig::raw(16 * MIB);
    let mut device = rig.device();
    device.write(0, &[0xab; 65536]).unwrap();
    let part = [Segment::new(3, 77)];
    assert_eq!(status_of(&mut device, Op::WriteZeroes(&part)), status::OK);
    let data = device.read(0, 65536).unwrap();
    assert!(data[..3 * 512].iter().all(|b| *b == 0xab));
    assert!(data[3 * 512..80 * 512].iter().all(|b| *b == 0));
    assert!(data[80 * 512..].iter().all(|b| *b == 0xab));
}

#[test]
fn unknown_request_types_are_unsupported() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let types = [2, 3, 6, 7, 9, 10, 12, 14, 15, 16, 17, 99, 0x7fff_ffff];
    for request_type in types {
        for (out, in_len) in [(&[][..], 0), (&[0u8; 512][..], 0), (&[][..], 512)] {
            let op = Op::Raw {
                request_type,
                sector: 0,
                out,
                in_len,
            };
            let (done, _) = device.run(op).unwrap();
            assert_eq!(done.status, status::UNSUPP, "type {request_type}");
            assert!(done.used_len <= in_len + 1);
        }
    }
}

#[test]
fn used_length_is_what_was_written_status_included() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let segment = [Segment::new(0, 1)];
    let len = |device: &mut Device, op: Op<'_>| {
        let (done, _) = device.run(op).unwrap();
        assert_eq!(done.status, status::OK, "{op:?}");
        done.used_len
    };
    for sectors in [1, 8, 100] {
        let read = Op::Read {
            sector: 0,
            len: 512 * sectors,
        };
        assert_eq!(len(&mut device, read), 512 * sectors + 1);
    }
    let write = Op::Write {
        sector: 0,
        data: &[1; 4096],
    };
    assert_eq!(len(&mut device, write), 1);
    assert_eq!(len(&mut device, Op::Flush), 1);
    assert_eq!(len(&mut device, Op::GetId), 21);
    assert_eq!(len(&mut device, Op::Discard(&segment)), 1);
    assert_eq!(len(&mut device, Op::WriteZeroes(&segment)), 1);
}
