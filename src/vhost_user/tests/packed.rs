//! Packed rings: their sizes, areas and bases are other ones.

use super::*;

const PACKED: u64 = 1 << 34;

fn bench(features: u64) -> Bench {
    let mut bench = Bench::new();
    bench.device.more_features.store(PACKED, Ordering::Relaxed);
    bench.negotiate(features | BIT_30);
    bench.share_memory();
    bench
}

#[test]
fn packed_ring_may_have_any_size_and_a_base_of_32_bits() {
    let mut bench = bench(FEATURES | PACKED);
    for num in [0, 257, 0x10064, u32::MAX] {
        let message = state(0, num);
        assert!(!bench.try_set(Req::SET_VRING_NUM, &message, &[]), "{num}");
    }
    for num in [1, 3, 255, 100] {
        bench.set(Req::SET_VRING_NUM, &state(0, num), &[]);
    }
    bench.set(Req::SET_VRING_BASE, &state(0, 0x8007_8063), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    let config = bench.device.starts().pop().unwrap().config;
    assert!(config.packed && config.event_idx && config.indirect);
    assert_eq!((config.size, config.base), (100, 0x8007_8063));
    let addresses = (config.desc_table, config.avail_ring, config.used_ring);
    assert_eq!(addresses, (0, 0x2000, 0x4000));
    bench.device.fetched.store(0x8001_0001, Ordering::Relaxed);
    assert_eq!(bench.stop_ring(0), 0x8001_0001);
}

#[test]
fn packed_ring_needs_its_own_areas_and_no_more() {
    // The driver's area, which is the last but one word, ends with the memory; then it does not.
    for (avail, fits) in [(MEMORY_SIZE - 4, true), (MEMORY_SIZE, false)] {
        let mut bench = bench(FEATURES | PACKED);
        let mut message = state(0, 0);
        message.extend(words(&[
            USER_BASE + MEMORY_SIZE - 16 * 100,
            USER_BASE,
            USER_BASE + avail,
            0,
        ]));
        bench.set(Req::SET_VRING_NUM, &state(0, 100), &[]);
        bench.set(Req::SET_VRING_BASE, &state(0, 0x8000_8000), &[]);
        bench.set(Req::SET_VRING_ADDR, &message, &[]);
        let kick = words(&[NOFD]);
        assert_eq!(bench.try_set(Req::SET_VRING_KICK, &kick, &[]), fits);
        assert_eq!(bench.device.starts().len(), usize::from(fits));
    }
}

#[test]
fn packed_ring_without_a_base_begins_with_its_wrap_counters_at_one() {
    let mut bench = bench(FEATURES | PACKED);
    assert_eq!(bench.stop_ring(1), 0x8000_8000);
    bench.set(Req::SET_VRING_NUM, &state(0, 7), &[]);
    bench.set(Req::SET_VRING_ADDR, &addresses(0, 0), &[]);
    bench.set(Req::SET_VRING_KICK, &words(&[NOFD]), &[]);
    bench.set(Req::SET_VRING_ENABLE, &state(0, 1), &[]);
    assert_eq!(bench.device.calls(), [Asked::Start(0, 0x8000_8000)]);
}

#[test]
fn split_ring_keeps_its_rules_where_packed_ones_are_offered() {
    let mut bench = bench(FEATURES);
    assert!(!bench.try_set(Req::SET_VRING_NUM, &state(0, 100), &[]));
    assert!(!bench.try_set(Req::SET_VRING_BASE, &state(0, 0x1_0000), &[]));
    bench.start_ring(0, 7);
    assert!(!bench.device.starts().pop().unwrap().config.packed);
}

#[test]
fn base_of_one_layout_is_forgotten_with_the_other() {
    let mut bench = bench(FEATURES | PACKED);
    bench.set(Req::SET_VRING_BASE, &state(0, 0x8005_8005), &[]);
    bench.set(Req::SET_FEATURES, &words(&[FEATURES | BIT_30]), &[]);
    assert_eq!(bench.stop_ring(0), 0);
}
