//! Layouts and lengths of requests of guests that are odd or hostile. Each test is a case that went wrong in a released system.

mod common;

use common::{Raw, Rig, file_bytes, run_chain, run_indirect, status_of};
use vhost_user_frontend as frontend;

use frontend::blk::{request_type, status};
use frontend::{Buf, Device, DeviceOptions, Op, RegionSpec, Segment, SlotOptions};

const MIB: u64 = 1 << 20;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(13) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

// Layout of descriptors.

#[test]
fn header_split_over_many_descriptors() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(5, &pattern(512, 1)).unwrap();
    for cut in [1, 4, 8, 15] {
        let raw = Raw::new(&device.memory, request_type::IN, 5, 512);
        let used = run_chain(
            &mut device,
            &[
                Buf::readable(raw.header, cut),
                Buf::readable(raw.header + u64::from(cut), 16 - cut),
                Buf::writable(raw.data, 512),
                raw.status_buf(),
            ],
        );
        assert_eq!((used, raw.status(&device.memory)), (513, status::OK));
        assert_eq!(device.memory.read_vec(raw.data, 512), pattern(512, 1));
    }
    let raw = Raw::new(&device.memory, request_type::IN, 5, 512);
    let mut bufs: Vec<Buf> = (0..16).map(|i| Buf::readable(raw.header + i, 1)).collect();
    bufs.extend([Buf::writable(raw.data, 512), raw.status_buf()]);
    assert_eq!(run_chain(&mut device, &bufs), 513);
    assert_eq!(raw.status(&device.memory), status::OK);
}

#[test]
fn header_and_written_data_in_one_descriptor() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let memory = &device.memory;
    let block = memory.alloc(16 + 1024, 4096);
    memory.write(block, &frontend::blk::header(request_type::OUT, 9));
    memory.write(block + 16, &pattern(1024, 2));
    let raw = Raw::new(memory, request_type::OUT, 9, 1);
    let used = run_chain(
        &mut device,
        &[Buf::readable(block, 16 + 1024), raw.status_buf()],
    );
    assert_eq!((used, raw.status(&device.memory)), (1, status::OK));
    assert_eq!(device.read(9, 1024).unwrap(), pattern(1024, 2));

    // And the same with the cut inside the data: header and 100 bytes, then the rest.
    let used = run_chain(
        &mut device,
        &[
            Buf::readable(block, 116),
            Buf::readable(block + 116, 924),
            raw.status_buf(),
        ],
    );
    assert_eq!((used, raw.status(&device.memory)), (1, status::OK));
}

#[test]
fn status_shares_a_descriptor_with_read_data() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(3, &pattern(1024, 3)).unwrap();
    let raw = Raw::new(&device.memory, request_type::IN, 3, 2048);
    device.memory.fill(raw.data, 2048, 0xee);
    let used = run_chain(
        &mut device,
        &[raw.header_buf(), Buf::writable(raw.data, 1025)],
    );
    assert_eq!(used, 1025);
    let got = device.memory.read_vec(raw.data, 1026);
    assert_eq!(got[..1024], pattern(1024, 3));
    assert_eq!(got[1024], status::OK, "the last byte is the status");
    assert_eq!(got[1025], 0xee, "nothing is written past the descriptor");

    // The status as the last byte of a second, longer descriptor.
    let used = run_chain(
        &mut device,
        &[
            raw.header_buf(),
            Buf::writable(raw.data, 700),
            Buf::writable(raw.data + 700, 325),
        ],
    );
    assert_eq!(used, 1025);
    let got = device.memory.read_vec(raw.data, 1025);
    assert_eq!(
        (&got[..1024], got[1024]),
        (&pattern(1024, 3)[..], status::OK)
    );
}

#[test]
fn data_in_descriptors_of_odd_length() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let raw = Raw::new(&device.memory, request_type::OUT, 7, 4096);
    device.memory.write(raw.data, &pattern(1536, 4));
    let mut bufs = vec![raw.header_buf()];
    let mut at = 0;
    for len in [1, 510, 2, 511, 3, 509] {
        bufs.push(Buf::readable(raw.data + u64::from(at), len));
        at += len;
    }
    bufs.push(raw.status_buf());
    assert_eq!(run_chain(&mut device, &bufs), 1);
    assert_eq!(raw.status(&device.memory), status::OK);
    assert_eq!(device.read(7, 1536).unwrap(), pattern(1536, 4));
}

#[test]
fn zero_length_descriptors_are_answered_and_change_nothing() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(3, &pattern(512, 5)).unwrap();
    let raw = Raw::new(&device.memory, request_type::IN, 3, 512);
    run_chain(
        &mut device,
        &[
            raw.header_buf(),
            Buf::readable(raw.header, 0),
            Buf::writable(raw.data, 0),
            Buf::writable(raw.data, 512),
            Buf::writable(raw.data, 0),
            raw.status_buf(),
        ],
    );
    let answer = raw.status(&device.memory);
    assert_ne!(answer, status::UNTOUCHED);
    if answer == status::OK {
        assert_eq!(device.memory.read_vec(raw.data, 512), pattern(512, 5));
    }
    device.disconnect();
    rig.assert_serves_a_new_client();
}

#[test]
fn chain_longer_than_the_queue_by_an_indirect_table() {
    let rig = Rig::raw(4 * MIB);
    let options = DeviceOptions {
        queue_size: 128,
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    let count = 513u64;
    let data = pattern(count as usize * 512, 6);
    for (sector, chunk) in data.chunks(32 << 10).enumerate() {
        device.write(sector as u64 * 64, chunk).unwrap();
    }
    let raw = Raw::new(&device.memory, request_type::IN, 0, count * 512);
    let mut bufs = vec![raw.header_buf()];
    bufs.extend((0..count).map(|i| Buf::writable(raw.data + 512 * i, 512)));
    bufs.push(raw.status_buf());
    let used = run_indirect(&mut device, &bufs);
    assert_eq!(raw.status(&device.memory), status::OK);
    assert_eq!(u64::from(used), count * 512 + 1);
    assert!(device.memory.read_vec(raw.data, data.len()) == data);
}

#[test]
fn more_descriptors_than_iov_max() {
    let rig = Rig::raw(4 * MIB);
    let mut device = rig.device();
    let count = 1500u64;
    let data = pattern(count as usize * 512, 7);
    for (write, sector) in [(false, 100), (true, 100)] {
        let ty = if write {
            request_type::IN
        } else {
            request_type::OUT
        };
        let raw = Raw::new(&device.memory, ty, sector, count * 512);
        if !write {
            device.memory.write(raw.data, &data);
        }
        let mut bufs = vec![raw.header_buf()];
        bufs.extend((0..count).map(|i| Buf {
            addr: raw.data + 512 * i,
            len: 512,
            write,
        }));
        bufs.push(raw.status_buf());
        run_indirect(&mut device, &bufs);
        assert_eq!(raw.status(&device.memory), status::OK);
        assert!(device.memory.read_vec(raw.data, data.len()) == data);
    }
}

#[test]
fn buffers_at_any_address_and_of_any_sector_count() {
    let rig = Rig::raw(4 * MIB);
    for (i, misalign) in [1, 3, 512, 4095].into_iter().enumerate() {
        let options = DeviceOptions {
            slots: SlotOptions {
                misalign,
                segment_len: 1000,
                ..SlotOptions::default()
            },
            ..DeviceOptions::default()
        };
        let mut device = rig.device_with(options);
        for sectors in [1usize, 7, 8, 9, 63] {
            let data = pattern(sectors * 512, i as u8);
            device.write(11, &data).unwrap();
            assert!(device.read(11, data.len() as u32).unwrap() == data);
            assert!(file_bytes(&rig.image(), 11 * 512, data.len()) == data);
        }
        device.shut_down().unwrap();
    }
}

// Sums and limits.

#[test]
fn length_of_a_chain_is_summed_beyond_four_gib() {
    let rig = Rig::with("raw", 64 * MIB, |d| d.queue_size(512));
    let options = DeviceOptions {
        queue_size: 512,
        memory: vec![RegionSpec::new(0, 64 * MIB)],
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    for (ty, write) in [(request_type::IN, true), (request_type::OUT, false)] {
        let raw = Raw::new(&device.memory, ty, 0, 512);
        // 256 times 16 MiB, and a sector: 512 in 32 bits.
        let mut bufs = vec![raw.header_buf()];
        bufs.extend((0..256).map(|_| Buf {
            addr: 0x100_0000,
            len: 16 << 20,
            write,
        }));
        bufs.push(Buf {
            addr: raw.data,
            len: 512,
            write,
        });
        bufs.push(raw.status_buf());
        run_chain(&mut device, &bufs);
        assert_ne!(raw.status(&device.memory), status::OK);
        assert_ne!(raw.status(&device.memory), status::UNTOUCHED);
    }
}

#[test]
fn sectors_of_a_segment_times_512_do_not_wrap() {
    let rig = Rig::raw(16 * MIB);
    let mut device = rig.device();
    device.write(0, &[0x77; 4096]).unwrap();
    for num_sectors in [0x80_0000, 0x80_0001, 0x80_0008, u32::MAX] {
        let segments = [Segment::new(0, num_sectors)];
        for op in [Op::WriteZeroes(&segments), Op::Discard(&segments)] {
            let answer = status_of(&mut device, op);
            assert!(
                answer == status::IOERR || answer == status::UNSUPP,
                "{answer}"
            );
        }
        assert_eq!(device.read(0, 4096).unwrap(), [0x77; 4096]);
    }
}

#[test]
fn nothing_reaches_past_the_end_of_the_disk() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    let end = MIB / 512;
    device.write(end - 1, &[0x42; 512]).unwrap();
    let places = [
        (end, 1),
        (end - 1, 2),
        (end + 1, 1),
        (u64::MAX, 1),
        (u64::MAX - 1, 4),
        (u64::MAX / 512, 1),
        (u64::MAX / 512 + 1, 1),
        (1 << 55, 8),
    ];
    for (sector, sectors) in places {
        let data = vec![0xdd; sectors as usize * 512];
        let segment = [Segment::new(sector, sectors)];
        let unmap = [Segment::new(sector, sectors).unmap()];
        let ops = [
            Op::Read {
                sector,
                len: sectors * 512,
            },
            Op::Write {
                sector,
                data: &data,
            },
            Op::Discard(&segment),
            Op::WriteZeroes(&segment),
            Op::WriteZeroes(&unmap),
        ];
        for op in ops {
            let answer = status_of(&mut device, op);
            assert_eq!(answer, status::IOERR, "sector {sector}, {op:?}");
        }
    }
    assert_eq!(device.read(end - 1, 512).unwrap(), [0x42; 512]);
    assert_eq!(std::fs::metadata(rig.image()).unwrap().len(), MIB);
    device.disconnect();
    rig.assert_serves_a_new_client();
}

#[test]
fn a_read_of_no_multiple_of_a_sector_is_refused() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 512);
    let bufs = [
        raw.header_buf(),
        Buf::writable(raw.data, 300),
        raw.status_buf(),
    ];
    run_chain(&mut device, &bufs);
    assert_eq!(raw.status(&device.memory), status::IOERR);
}

#[test]
fn limits_of_the_configuration_space_are_enforced() {
    let rig = Rig::raw(256 * MIB);
    let mut device = rig.device();
    let config = device.config();
    let sets = [
        (config.max_discard_seg, config.max_discard_sectors, false),
        (
            config.max_write_zeroes_seg,
            config.max_write_zeroes_sectors,
            true,
        ),
    ];
    for (max_seg, max_sectors, zeroes) in sets {
        assert!(max_seg >= 1 && max_sectors >= 1);
        let op = |segments: &[Segment], device: &mut Device| {
            let op = if zeroes {
                Op::WriteZeroes(segments)
            } else {
                Op::Discard(segments)
            };
            status_of(device, op)
        };
        if u64::from(max_sectors) < 256 * MIB / 512 {
            let too_long = [Segment::new(0, max_sectors + 1)];
            assert_ne!(op(&too_long, &mut device), status::OK);
        }
        if max_seg < 2048 {
            let many: Vec<_> = (0..u64::from(max_seg))
                .map(|i| Segment::new(8 * i, 8))
                .collect();
            assert_eq!(
                op(&many, &mut device),
                status::OK,
                "the limit itself is allowed"
            );
            let too_many: Vec<_> = (0..=u64::from(max_seg))
                .map(|i| Segment::new(8 * i, 8))
                .collect();
            assert_ne!(op(&too_many, &mut device), status::OK);
        }
    }
}

#[test]
fn segments_cut_short_or_absent_are_refused() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    let segment = Segment::new(0, 8).to_bytes();
    for request_type in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        for len in [0, 1, 8, 15] {
            let op = Op::Raw {
                request_type,
                sector: 0,
                out: &segment[..len],
                in_len: 0,
            };
            let answer = status_of(&mut device, op);
            assert!(
                answer == status::IOERR || answer == status::UNSUPP,
                "{len}: {answer}"
            );
        }
    }
    device.disconnect();
    rig.assert_serves_a_new_client();
}
