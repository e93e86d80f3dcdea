use super::*;
use crate::virtio::testing::{USER_BASE, memfd, memory, read_bytes, region, write_bytes};

const PAGE: u64 = 4096;

#[test]
fn empty_memory_translates_nothing() {
    let mem = GuestMemory::empty();
    assert_eq!(mem.host_ptr(0, 0), None);
    assert_eq!(mem.host_ptr(0, 1), None);
    assert_eq!(mem.user_to_guest(0, 0), None);
}

#[test]
fn translation_stays_inside_one_region() {
    let mem = memory(&[(0x1000, PAGE), (0x10_0000, 3 * PAGE)]);
    let first = mem.regions()[0].as_ptr();
    assert_eq!(mem.host_ptr(0x1000, PAGE), Some(first));
    assert_eq!(mem.host_ptr(0x1ffe, 2), Some(first.wrapping_add(0xffe)));
    assert_eq!(mem.host_ptr(0x1ffe, 3), None);
    assert_eq!(mem.host_ptr(0xfff, 1), None);
    assert_eq!(mem.host_ptr(0x2000, 0), None);
    assert_eq!(mem.host_ptr(u64::MAX, 1), None);
    assert_eq!(mem.host_ptr(0x1000, u64::MAX), None);
    assert_eq!(mem.host_ptr(0x10_0000 + 3 * PAGE, 1), None);
}

#[test]
fn many_regions_are_found_as_few_are() {
    let list: Vec<_> = (0..20)
        .map(|i| (i * 0x10_0000, PAGE * (1 + i % 3)))
        .collect();
    let mem = memory(&list);
    for (i, (addr, len)) in list.iter().enumerate() {
        let host = mem.regions()[i].as_ptr();
        assert_eq!(mem.host_ptr(*addr, *len), Some(host));
        assert_eq!(
            mem.host_ptr(addr + len - 1, 1),
            Some(host.wrapping_add((len - 1) as usize))
        );
        assert_eq!(mem.host_ptr(addr + len, 1), None);
        assert_eq!(mem.host_to_guest(host.wrapping_add(5)), Some(addr + 5));
    }
}

#[test]
fn vmm_addresses_translate_within_their_region() {
    let mem = memory(&[(0x1000, PAGE), (0x10_0000, PAGE)]);
    assert_eq!(mem.user_to_guest(USER_BASE + 0x1010, 16), Some(0x1010));
    assert_eq!(mem.user_to_guest(USER_BASE + 0x1ff0, 17), None);
    assert_eq!(
        mem.user_to_guest(USER_BASE + 0x10_0000, PAGE),
        Some(0x10_0000)
    );
    assert_eq!(mem.user_to_guest(0x1000, 1), None);
    assert_eq!(mem.user_to_guest(u64::MAX, u64::MAX), None);
}

#[test]
fn overlapping_guest_ranges_are_refused() {
    let one = region(0x1000, 2 * PAGE);
    let mut two = region(0x2000, PAGE);
    two.user_addr = 0x10_0000;
    assert!(matches!(
        GuestMemory::new(vec![two, one]),
        Err(MemoryError::GuestOverlap {
            first: 0x1000,
            second: 0x2000
        })
    ));
}

#[test]
fn overlapping_vmm_ranges_are_refused() {
    let one = region(0x1000, 2 * PAGE);
    let mut two = region(0x10_0000, PAGE);
    two.user_addr = one.user_addr + PAGE;
    assert!(matches!(
        GuestMemory::new(vec![one, two]),
        Err(MemoryError::UserOverlap { .. })
    ));
}

#[test]
fn regions_come_and_go_and_share_their_mappings() {
    let mem = memory(&[(0x1000, PAGE)]);
    write_bytes(&mem, 0x1000, b"kept");
    let more = mem.with_region(region(0x10_0000, PAGE)).unwrap();
    assert!(more.with_region(region(0x1000, PAGE)).is_err());
    assert_eq!(read_bytes(&more, 0x1000, 4), b"kept");
    assert!(matches!(
        more.without_region(0x1000, USER_BASE, PAGE),
        Err(MemoryError::NoSuchRegion { .. })
    ));
    let less = more
        .without_region(0x10_0000, USER_BASE + 0x10_0000, PAGE)
        .unwrap();
    assert_eq!(less.host_ptr(0x10_0000, 1), None);
    drop((mem, more));
    assert_eq!(read_bytes(&less, 0x1000, 4), b"kept");
}

#[test]
fn a_region_need_not_be_a_multiple_of_the_page_size() {
    let mem = memory(&[(0, PAGE + 1)]);
    write_bytes(&mem, PAGE, b"x");
    assert_eq!(mem.host_ptr(PAGE + 1, 1), None);
}

#[test]
fn a_region_starts_at_its_offset_in_the_file() {
    let file = memfd(3 * PAGE);
    let whole = Region::map(file.try_clone().unwrap(), 0, 0, 0, 3 * PAGE).unwrap();
    let tail = Region::map(file, 2 * PAGE, 0x10_0000, 0x10_0000, PAGE).unwrap();
    let mem = GuestMemory::new(vec![whole, tail]).unwrap();
    write_bytes(&mem, 2 * PAGE + 7, b"same");
    assert_eq!(read_bytes(&mem, 0x10_0007, 4), b"same");
}

#[test]
fn a_region_of_huge_pages_may_begin_and_end_inside_one() {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"huge".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_HUGETLB) };
    if fd < 0 {
        println!(
            "no hugetlbfs in this kernel: {}",
            io::Error::last_os_error()
        );
        return;
    }
    // SAFETY: the descriptor is new and ours.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let huge = page_size_of(&file).unwrap();
    assert!(huge > PAGE && huge.is_power_of_two());
    file.set_len(3 * huge).unwrap();
    // Without MAP_NORESERVE this would need huge pages; nothing is touched here.
    let region = Region::map(file, huge + PAGE, 0x1000, 0x1000, huge).unwrap();
    assert_eq!(region.mapping().region().size() as u64, 2 * huge);
    assert_eq!(
        region.as_ptr() as u64 - region.mapping().region().as_ptr() as u64,
        PAGE
    );
    let mem = GuestMemory::new(vec![region]).unwrap();
    assert!(mem.host_ptr(0x1000, huge).is_some());
    assert!(mem.host_ptr(0x1000, huge + 1).is_none());
}

#[test]
fn a_region_is_widened_to_whole_huge_pages_only() {
    const GIB: u64 = 1 << 30;
    for (start, end, page, widened) in [
        (0, 1, GIB, Some((0, GIB))),
        (0, GIB, GIB, Some((0, GIB))),
        (GIB - PAGE, GIB + 1, GIB, Some((0, 2 * GIB))),
        (GIB, 3 * GIB - 1, GIB, Some((GIB, 3 * GIB))),
        (
            5 * GIB + PAGE,
            5 * GIB + 2 * PAGE,
            GIB,
            Some((5 * GIB, 6 * GIB)),
        ),
        (
            1 << 40,
            (1 << 40) + 1,
            GIB,
            Some((1 << 40, (1 << 40) + GIB)),
        ),
        // Ordinary pages are left to the kernel.
        (PAGE, 3 * PAGE + 1, PAGE, Some((PAGE, 3 * PAGE + 1))),
        // The end of a file, and of numbers.
        (0, i64::MAX as u64, GIB, None),
        (
            0,
            i64::MAX as u64 - GIB + 1,
            GIB,
            Some((0, i64::MAX as u64 - GIB + 1)),
        ),
        (u64::MAX - PAGE, u64::MAX, GIB, None),
    ] {
        assert_eq!(
            whole_pages(start, end, page),
            widened,
            "{start:#x} to {end:#x}"
        );
    }
}

#[test]
fn a_truncated_memfd_is_refused_by_its_size() {
    let error = Region::map(memfd(PAGE), 0, 0, 0, PAGE + 1).unwrap_err();
    assert!(matches!(
        error,
        MemoryError::FileTooShort {
            needed: 4097,
            size: 4096,
            ..
        }
    ));
    assert!(error.to_string().contains("truncated"), "{error}");
    assert!(Region::map(memfd(PAGE), PAGE, 0, 0, 1).is_err());
}

#[test]
fn impossible_regions_are_refused() {
    let map = |offset, guest, user, len| Region::map(memfd(2 * PAGE), offset, guest, user, len);
    assert!(matches!(map(0, 0, 0, 0), Err(MemoryError::Empty { .. })));
    assert!(matches!(
        map(1, 0, 0, PAGE),
        Err(MemoryError::UnalignedOffset { offset: 1, .. })
    ));
    for (offset, guest, user, len) in [
        (0, u64::MAX, 0, PAGE),
        (0, 0, u64::MAX - 5, PAGE),
        (u64::MAX - PAGE + 1, 0, 0, 2 * PAGE),
        (1 << 63, 0, 0, PAGE),
    ] {
        assert!(matches!(
            map(offset, guest, user, len),
            Err(MemoryError::Overflow { .. })
        ));
    }
}

#[test]
fn a_descriptor_that_is_no_memory_is_refused() {
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = File::from(std::os::fd::OwnedFd::from(socket));
    assert!(matches!(
        Region::map(file, 0, 0, 0, PAGE),
        Err(MemoryError::NotMappable { .. })
    ));
}

#[test]
fn a_file_opened_for_reading_only_is_refused_by_mmap() {
    let file = File::open("/proc/self/exe").unwrap();
    assert!(matches!(
        Region::map(file, 0, 0, 0, PAGE),
        Err(MemoryError::Map {
            operation: "mmap",
            ..
        })
    ));
}

#[test]
fn memory_is_shared_among_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<GuestMemory>();
}
