use super::*;

fn limits() -> DeviceLimits {
    DeviceLimits {
        capacity_bytes: 1 << 30,
        read_only: false,
        block_size: 512,
        max_discard_bytes: 1 << 30,
        max_discard_segments: 16,
        discard_alignment: 65536,
        max_write_zeroes_bytes: 1 << 20,
        max_write_zeroes_segments: 8,
        write_zeroes_may_unmap: true,
    }
}

fn config() -> DeviceConfig {
    DeviceConfig::new(&limits(), &Topology::default(), 4, 256, true).unwrap()
}

fn u32_at(config: &DeviceConfig, offset: u32) -> u32 {
    u32::from_le_bytes(config.read(offset, 4).unwrap().try_into().unwrap())
}

fn u16_at(config: &DeviceConfig, offset: u32) -> u16 {
    u16::from_le_bytes(config.read(offset, 2).unwrap().try_into().unwrap())
}

/// Offset of `writeback`, counted by hand from the specification.
const WRITEBACK: u32 = 32;

#[test]
fn every_field_is_where_the_specification_puts_it() {
    let limits = DeviceLimits {
        block_size: 4096,
        ..limits()
    };
    let topology = Topology {
        physical_block_size: 16384,
        min_io_size: 65536,
        opt_io_size: 1 << 20,
    };
    let config = DeviceConfig::new(&limits, &topology, 4, 256, true).unwrap();
    assert_eq!(config.read(0, 8).unwrap(), (1u64 << 21).to_le_bytes());
    assert_eq!(u32_at(&config, 8), 0, "size_max");
    assert_eq!(u32_at(&config, 12), 254, "seg_max");
    assert_eq!(u32_at(&config, 16), 0, "geometry");
    assert_eq!(u32_at(&config, 20), 4096, "blk_size");
    assert_eq!(
        config.read(24, 2).unwrap(),
        [2, 0],
        "physical_block_exp, alignment_offset"
    );
    assert_eq!(u16_at(&config, 26), 16, "min_io_size");
    assert_eq!(u32_at(&config, 28), 256, "opt_io_size");
    assert_eq!(
        config.read(WRITEBACK, 2).unwrap(),
        [1, 0],
        "writeback, unused0"
    );
    assert_eq!(u16_at(&config, 34), 4, "num_queues");
    assert_eq!(u32_at(&config, 36), 1 << 21, "max_discard_sectors");
    assert_eq!(u32_at(&config, 40), 16, "max_discard_seg");
    assert_eq!(u32_at(&config, 44), 128, "discard_sector_alignment");
    assert_eq!(u32_at(&config, 48), 2048, "max_write_zeroes_sectors");
    assert_eq!(u32_at(&config, 52), 8, "max_write_zeroes_seg");
    assert_eq!(
        config.read(56, 4).unwrap(),
        [1, 0, 0, 0],
        "write_zeroes_may_unmap, unused1"
    );
    assert!(config.read(60, 36).unwrap().iter().all(|b| *b == 0));
}

#[test]
fn a_reply_has_exactly_the_size_asked_for() {
    let config = config();
    for len in [0, 1, 8, 24, 36, 60, 96, 97, 256, 4096] {
        let answer = config.read(0, len).unwrap();
        assert_eq!(answer.len(), len as usize);
        let known = answer.len().min(CONFIG_SIZE);
        assert_eq!(answer[..known], config.bytes[..known]);
        assert!(
            answer[known..].iter().all(|b| *b == 0),
            "zeros beyond the structure"
        );
    }
}

#[test]
fn offsets_from_0_and_from_0x100_name_the_same_bytes() {
    let config = config();
    for offset in [0, 5, 32, 90, 96, 200, 255] {
        let answer = config.read(offset, 60).unwrap();
        assert_eq!(answer, config.read(offset + 0x100, 60).unwrap());
        assert_eq!(answer.len(), 60);
    }
}

#[test]
fn a_read_beyond_all_reason_is_an_error() {
    let config = config();
    assert!(config.read(0x1001, 1).is_err());
    assert!(config.read(u32::MAX, 8).is_err());
    assert!(config.read(0, u32::MAX).is_err());
}

#[test]
fn writeback_is_switched_both_ways() {
    let mut config = config();
    assert_eq!(config.write(WRITEBACK, &[0]), Ok(false));
    assert!(!config.write_cache());
    assert_eq!(config.read(WRITEBACK, 1).unwrap(), [0]);
    assert_eq!(config.write(WRITEBACK + 0x100, &[1]), Ok(true));
    assert_eq!(config.read(WRITEBACK, 1).unwrap(), [1]);
}

#[test]
fn the_driver_writes_nothing_but_writeback() {
    let mut config = config();
    let before = config.clone();
    for offset in (0..0x110).filter(|o| *o != WRITEBACK) {
        assert!(matches!(
            config.write(offset, &[0]),
            Err(ConfigError::NotWritable { .. })
        ));
    }
    for data in [&[][..], &[0, 0], &[1; 8], &[0; 60]] {
        assert!(config.write(WRITEBACK, data).is_err());
        assert!(config.write(0, data).is_err());
    }
    for value in 2..=255 {
        assert_eq!(
            config.write(WRITEBACK, &[value]),
            Err(ConfigError::BadWriteback(value))
        );
    }
    assert!(config.write(u32::MAX, &[0]).is_err());
    assert_eq!(config, before);
}

#[test]
fn a_driver_that_switches_the_cache_but_cannot_flush_starts_write_through() {
    let mut config = config();
    config.negotiated(FLUSH | CONFIG_WCE);
    assert!(config.write_cache());
    config.negotiated(FLUSH);
    assert!(config.write_cache());
    config.negotiated(CONFIG_WCE);
    assert!(!config.write_cache());
}

#[test]
fn the_capacity_is_rounded_down_to_whole_blocks() {
    let odd = DeviceLimits {
        capacity_bytes: (1 << 20) + 4095,
        block_size: 4096,
        ..limits()
    };
    let mut config = DeviceConfig::new(&odd, &Topology::default(), 1, 128, true).unwrap();
    assert_eq!(config.capacity_bytes(), 1 << 20);
    let grown = DeviceLimits {
        capacity_bytes: 2 << 20,
        ..odd
    };
    assert!(config.set_capacity(&grown));
    assert!(!config.set_capacity(&grown), "nothing new to tell");
    assert_eq!(config.capacity_bytes(), 2 << 20);
    assert_eq!(u32_at(&config, 0), 4096);
}

#[test]
fn sizes_that_cannot_be_told_are_refused() {
    for block_size in [0, 1, 256, 513, 3072, 8192] {
        let limits = DeviceLimits {
            block_size,
            ..limits()
        };
        assert_eq!(
            DeviceConfig::new(&limits, &Topology::default(), 1, 128, true),
            Err(ConfigError::BlockSize(block_size))
        );
    }
    let with = |topology| DeviceConfig::new(&limits(), &topology, 1, 128, true);
    for physical_block_size in [256, 513, 4095] {
        let topology = Topology {
            physical_block_size,
            ..Default::default()
        };
        assert!(matches!(
            with(topology),
            Err(ConfigError::PhysicalBlockSize { .. })
        ));
    }
    for min_io_size in [1, 513, 65536 * 512] {
        let topology = Topology {
            min_io_size,
            ..Default::default()
        };
        assert!(matches!(with(topology), Err(ConfigError::IoSize { .. })));
    }
    assert_eq!(
        DeviceConfig::new(&limits(), &Topology::default(), 0, 128, true),
        Err(ConfigError::NoQueue)
    );
}
