//! Descriptor chains, right and wrong.

use super::*;
use crate::virtio::testing::{INDIRECT, NEXT, WRITE, desc, write_bytes};

fn chain_of(driver: &Driver, head: u16) -> Result<ChainBuf, ChainError> {
    let mut chain = ChainBuf::with_capacity(4);
    ring(driver).read_chain(driver.mem, head, &mut chain)?;
    Ok(chain)
}

#[test]
fn readable_parts_come_before_writable_ones() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(
        2,
        &[
            (DATA, 16, false),
            (DATA + 16, 512, false),
            (DATA + 1024, 1, true),
        ],
    );
    let chain = chain_of(&driver, 2).unwrap();
    assert_eq!(lens(chain.readable()), [16, 512]);
    assert_eq!(lens(chain.writable()), [1]);
    assert_eq!((chain.readable_len(), chain.writable_len()), (528, 1));
    let host = mem.host_ptr(DATA + 1024, 1).unwrap();
    assert_eq!(chain.writable()[0].iov_base.cast(), host);
}

#[test]
fn a_direct_chain_that_loops_ends_in_an_error() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_desc(0, desc(DATA, 16, NEXT, 1));
    driver.set_desc(1, desc(DATA, 16, NEXT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Loop { count: 8 }
    );
    // A descriptor of no bytes loops as well.
    driver.set_desc(3, desc(0, 0, NEXT, 3));
    assert_eq!(
        chain_of(&driver, 3).unwrap_err(),
        ChainError::Loop { count: 8 }
    );
}

#[test]
fn a_direct_chain_may_use_the_whole_queue() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let parts: Vec<_> = (0..8).map(|i| (DATA + 64 * i, 64, i > 3)).collect();
    driver.direct(0, &parts);
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!((chain.readable().len(), chain.writable().len()), (4, 4));
}

#[test]
fn next_out_of_range_ends_in_an_error() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_desc(0, desc(DATA, 16, NEXT, 8));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Index { index: 8, count: 8 }
    );
    driver.set_table(DATA, &[desc(DATA, 16, NEXT, 2), desc(DATA, 1, WRITE, 0)]);
    driver.set_desc(0, desc(DATA, 32, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Index { index: 2, count: 2 }
    );
}

#[test]
fn a_readable_part_after_a_writable_one_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(0, &[(DATA, 16, true), (DATA, 16, false)]);
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::ReadableAfterWritable
    );
}

#[test]
fn zero_length_descriptors_are_skipped() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let nowhere = u64::MAX;
    driver.direct(
        0,
        &[
            (nowhere, 0, false),
            (DATA, 16, false),
            (0, 0, false),
            (nowhere, 0, true),
            (DATA, 1, true),
        ],
    );
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!(lens(chain.readable()), [16]);
    assert_eq!(lens(chain.writable()), [1]);
}

#[test]
fn a_buffer_outside_memory_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    for (addr, len) in [
        (RAM, 1),
        (RAM - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 1, u32::MAX),
    ] {
        driver.direct(0, &[(addr, len, true)]);
        assert!(matches!(
            chain_of(&driver, 0),
            Err(ChainError::Unmapped { .. })
        ));
    }
}

#[test]
fn a_buffer_across_adjacent_regions_becomes_two() {
    let mem = memory(&[
        (0, RAM),
        (RAM, 0x3000),
        (RAM + 0x3000, 0x1000),
        (RAM + 0x5000, 0x1000),
    ]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(0, &[(RAM - 4, 4 + 0x3000 + 8, false), (RAM - 1, 3, true)]);
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!(lens(chain.readable()), [4, 0x3000, 8]);
    assert_eq!(lens(chain.writable()), [1, 2]);
    assert_eq!(chain.readable_len(), 0x300c);
    assert_eq!(
        chain.readable()[1].iov_base.cast(),
        mem.regions()[1].as_ptr()
    );
    // But not across a hole.
    driver.direct(0, &[(RAM + 0x3fff, 2, true)]);
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Unmapped {
            addr: RAM + 0x4000,
            len: 1
        }
    );
}

#[test]
fn an_indirect_table_may_follow_direct_descriptors() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_table(
        DATA,
        &[
            desc(DATA, 32, NEXT, 2),
            desc(DATA, 1, WRITE, 0),
            desc(DATA, 512, NEXT | WRITE, 1),
        ],
    );
    driver.set_desc(5, desc(DATA, 16, NEXT, 6));
    // WRITE on the descriptor of a table is ignored.
    driver.set_desc(6, desc(DATA, 48, INDIRECT | WRITE, 0));
    let chain = chain_of(&driver, 5).unwrap();
    assert_eq!(lens(chain.readable()), [16, 32]);
    assert_eq!(lens(chain.writable()), [512, 1]);
}

#[test]
fn a_chain_longer_than_the_queue_is_taken_from_an_indirect_table() {
    // Windows sends up to 515 descriptors.
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 128, 0);
    let table: Vec<_> = (0..515u16)
        .map(|i| {
            let flags = if i < 514 { NEXT } else { WRITE };
            desc(DATA + 16 * u64::from(i), 16, flags, i + 1)
        })
        .collect();
    driver.set_table(DATA, &table);
    driver.set_desc(0, desc(DATA, 515 * 16, INDIRECT, 0));
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!(chain.readable().len(), 514);
    assert_eq!(chain.writable().len(), 1);
}

#[test]
fn an_indirect_table_of_a_broken_length_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    for len in [0, 1, 15, 17, 40, 16 * 32769, u32::MAX, !15] {
        driver.set_desc(0, desc(DATA, len, INDIRECT, 0));
        assert_eq!(
            chain_of(&driver, 0).unwrap_err(),
            ChainError::IndirectLength { len }
        );
    }
    // Longer than what is left of memory.
    driver.set_desc(0, desc(RAM - 16, 32, INDIRECT, 0));
    assert!(matches!(
        chain_of(&driver, 0),
        Err(ChainError::Unmapped { .. })
    ));
}

#[test]
fn an_indirect_table_of_the_largest_size_is_taken_and_a_loop_in_it_found() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    let table: Vec<_> = (0..32768u32)
        .map(|i| desc(0, 1, NEXT, ((i + 1) % 32768) as u16))
        .collect();
    driver.set_table(DATA, &table);
    driver.set_desc(0, desc(DATA, 32768 * 16, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::Loop { count: 32768 }
    );
    write_bytes(&mem, DATA + 32767 * 16, &desc(0, 1, WRITE, 0).bytes());
    let mut chain = chain_of(&driver, 0).unwrap();
    assert_eq!(chain.readable().len(), 32767);
    // The buffer does not stay that large.
    chain.clear();
    assert!(chain.iovecs.capacity() <= 1024);
}

#[test]
fn an_indirect_table_that_is_not_aligned_is_read() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_table(
        DATA + 3,
        &[desc(DATA, 16, NEXT, 1), desc(DATA, 1, WRITE, 0)],
    );
    driver.set_desc(0, desc(DATA + 3, 32, INDIRECT, 0));
    let chain = chain_of(&driver, 0).unwrap();
    assert_eq!((chain.readable_len(), chain.writable_len()), (16, 1));
}

#[test]
fn nested_indirect_and_indirect_with_next_are_refused() {
    let mem = memory(&[(0, RAM)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.set_table(DATA, &[desc(DATA, 16, INDIRECT, 0)]);
    driver.set_desc(0, desc(DATA, 16, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::NestedIndirect
    );
    driver.set_desc(0, desc(DATA, 16, INDIRECT | NEXT, 1));
    assert_eq!(chain_of(&driver, 0).unwrap_err(), ChainError::IndirectNext);
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_refused() {
    let mem = memory(&[(0, RAM)]);
    let mut driver = Driver::new(&mem, 0, 8, 0);
    driver.cfg.indirect = false;
    driver.set_table(DATA, &[desc(DATA, 16, WRITE, 0)]);
    driver.set_desc(0, desc(DATA, 16, INDIRECT, 0));
    assert_eq!(
        chain_of(&driver, 0).unwrap_err(),
        ChainError::IndirectNotNegotiated
    );
}

#[test]
fn lengths_are_summed_in_64_bits() {
    // Four descriptors of 2 GiB over the same memory: more than a u32 holds.
    let mem = memory(&[(0, 1 << 31)]);
    let driver = Driver::new(&mem, 0, 8, 0);
    driver.direct(0, &[(0, 1 << 31, true); 4]);
    assert_eq!(chain_of(&driver, 0).unwrap().writable_len(), 1 << 33);
}
