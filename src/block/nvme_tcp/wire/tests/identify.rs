//! Identify data, log pages and events.

use super::super::identify::*;
use super::put;

fn structure(parts: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    for (at, part) in parts {
        put(&mut bytes, *at, part);
    }
    bytes
}

#[test]
fn identify_controller_is_read_from_the_places_of_the_specification() {
    let bytes = structure(&[
        (0, &[0x36, 0x1b]),
        (4, b"S3R1AL              "),
        (24, b"Linux                                   "),
        (64, b"6.12\x1b[2J"),
        (72, &[6]),
        (76, &[0x0b]),
        (77, &[5]),
        (78, &[0x34, 0x12]),
        (80, &[0, 1, 2, 0]),
        (92, &[0, 9, 0, 0x80]),
        (96, &[0x40]),
        (111, &[1]),
        (128, &[1, 0, 2, 0, 3, 1]),
        (256, &[8]),
        (258, &[3]),
        (259, &[7]),
        (261, &[4]),
        (320, &[100, 0]),
        (342, &[10]),
        (343, &[0x1f]),
        (344, &[128, 0, 0, 0]),
        (348, &[127, 0, 0, 0]),
        (386, &[0x10, 0x27]),
        (512, &[0x66, 0x44]),
        (514, &[0x80, 0]),
        (516, &[0, 4, 0, 0]),
        (520, &[0x2c, 0]),
        (525, &[1]),
        (526, &[7, 0, 8, 0]),
        (536, &[1, 0, 0x30, 0]),
        (540, &[9]),
        (768, b"nqn.2014-08.org.nvmexpress:uuid:x\0junk"),
        (1792, &[4, 2, 0, 0]),
        (1796, &[1]),
        (1800, &[5, 0]),
        (1802, &[1, 16, 1, 0]),
    ]);
    let controller = Controller::parse(&bytes).expect("valid");
    assert_eq!(controller.vid, 0x1b36);
    assert_eq!(
        (controller.sn.as_str(), controller.mn.as_str()),
        ("S3R1AL", "Linux")
    );
    // Nothing that a terminal would act on.
    assert_eq!(controller.fr, "6.12?[2J");
    assert_eq!((controller.rab, controller.mdts), (6, 5));
    assert!(controller.reports_ana() && controller.traffic_based_keep_alive());
    assert_eq!((controller.cntlid, controller.ver), (0x1234, 0x0002_0100));
    assert_eq!((controller.oaes, controller.cntrltype), (0x8000_0900, 1));
    assert_eq!(controller.crdt, [1, 2, 0x103]);
    assert_eq!(
        (controller.oacs, controller.acl, controller.aerl),
        (8, 3, 7)
    );
    assert_eq!((controller.lpa, controller.kas), (4, 100));
    assert_eq!((controller.anatt, controller.anacap), (10, 0x1f));
    assert_eq!((controller.anagrpmax, controller.nanagrpid), (128, 127));
    assert_eq!(controller.cqt, 10_000);
    assert_eq!((controller.sqes, controller.cqes), (0x66, 0x44));
    assert_eq!((controller.maxcmd, controller.nn), (128, 1024));
    assert!(controller.has_dataset_management() && controller.has_write_zeroes());
    assert!(controller.has_reservations() && controller.has_write_cache());
    assert_eq!((controller.awun, controller.awupf), (7, 8));
    assert_eq!((controller.sgls, controller.mnan), (0x0030_0001, 9));
    assert_eq!(controller.subnqn, "nqn.2014-08.org.nvmexpress:uuid:x");
    assert_eq!((controller.ioccsz, controller.iorcsz), (0x204, 1));
    assert_eq!(
        (controller.icdoff, controller.fcatt, controller.msdbd),
        (5, 1, 16)
    );
    assert!(controller.has_disconnect());
    assert_eq!(controller.in_capsule(), 0x204 * 16 - 64);
    assert_eq!(controller.max_transfer(4096), Some(128 << 10));
    for (mdts, most) in [
        (0, None),
        (1, Some(8192)),
        (51, Some(1 << 63)),
        (52, Some(u64::MAX)),
        (255, Some(u64::MAX)),
    ] {
        let other = Controller {
            mdts,
            ..controller.clone()
        };
        assert_eq!(other.max_transfer(4096), most, "MDTS {mdts}");
    }
    let tiny = Controller {
        ioccsz: 0,
        ..controller
    };
    assert_eq!(tiny.in_capsule(), 0);
}

#[test]
fn identify_namespace_is_read_from_the_places_of_the_specification() {
    let bytes = structure(&[
        (0, &[0, 0, 0, 1]),
        (8, &[0, 0, 0, 2]),
        (16, &[0, 0, 0, 3]),
        (24, &[0x12]),
        (25, &[1]),
        (26, &[1]),
        (29, &[2]),
        (30, &[1]),
        (31, &[0xff]),
        (33, &[0x09]),
        (34, &[1, 0, 2, 0]),
        (46, &[0, 1]),
        (64, &[7, 0, 6, 0, 5, 0, 4, 0, 3, 0]),
        (92, &[2, 0, 0, 0]),
        (99, &[1]),
        (104, &[0x11; 16]),
        (120, &[0x22; 8]),
        (128, &[0, 0, 9, 0, 8, 0, 12, 0]),
    ]);
    let namespace = Namespace::parse(&bytes).expect("valid");
    assert_eq!(
        (namespace.nsze, namespace.ncap, namespace.nuse),
        (1 << 24, 2 << 24, 3 << 24)
    );
    assert!(namespace.has_own_atomicity() && namespace.has_optimal_sizes());
    let format = LbaFormat {
        metadata: 8,
        lbads: 12,
    };
    assert_eq!(namespace.format, format);
    assert_eq!((namespace.block_size(), namespace.size()), (4096, 1 << 36));
    assert_eq!(
        (namespace.dps, namespace.nmic, namespace.rescap),
        (2, 1, 0xff)
    );
    assert!(namespace.deallocated_reads_zeros() && namespace.write_zeroes_deallocates());
    assert_eq!(
        (namespace.nawun, namespace.nawupf, namespace.noiob),
        (1, 2, 256)
    );
    assert_eq!((namespace.npwg, namespace.npwa, namespace.npdg), (7, 6, 5));
    assert_eq!((namespace.npda, namespace.nows), (4, 3));
    assert_eq!(namespace.anagrpid, 2);
    assert!(namespace.is_write_protected());
    assert_eq!((namespace.nguid, namespace.eui64), ([0x11; 16], [0x22; 8]));
}

#[test]
fn the_upper_bits_of_the_format_count_where_there_are_more_than_16() {
    let mut bytes = structure(&[(0, &[1]), (26, &[0x22]), (128 + 2 * 4, &[0, 0, 9, 0])]);
    put(&mut bytes, 128 + 18 * 4, &[0, 0, 12, 0]);
    assert_eq!(Namespace::parse(&bytes).expect("valid").block_size(), 512);
    bytes[25] = 63;
    assert_eq!(Namespace::parse(&bytes).expect("valid").block_size(), 4096);
    // The last format that there can be.
    bytes[26] = 0x6f;
    put(&mut bytes, 128 + 63 * 4, &[0, 0, 13, 0]);
    assert_eq!(Namespace::parse(&bytes).expect("valid").block_size(), 8192);
}

#[test]
fn a_namespace_of_impossible_blocks_or_size_is_refused() {
    for lbads in [0, 8, 32, 64, 255] {
        let bytes = structure(&[(0, &[1]), (128, &[0, 0, lbads, 0])]);
        let error = Namespace::parse(&bytes).expect_err("refused").to_string();
        assert!(error.contains("LBADS"), "{error}");
        // Of one that does not exist, nothing is asked.
        let bytes = structure(&[(128, &[0, 0, lbads, 0])]);
        assert_eq!(Namespace::parse(&bytes).expect("valid").size(), 0);
    }
    let bytes = structure(&[(0, &[0xff; 8]), (128, &[0, 0, 9, 0])]);
    let error = Namespace::parse(&bytes).expect_err("refused").to_string();
    assert!(error.contains("NSZE"), "{error}");
}

#[test]
fn namespace_descriptors_of_every_type_are_found() {
    let mut list = vec![1, 8, 0, 0];
    list.extend_from_slice(&[1; 8]);
    list.extend_from_slice(&[9, 3, 0, 0, 7, 7, 7]);
    list.extend_from_slice(&[2, 16, 0, 0]);
    list.extend_from_slice(&[2; 16]);
    list.extend_from_slice(&[3, 16, 0, 0]);
    list.extend_from_slice(&[3; 16]);
    list.extend_from_slice(&[4, 1, 0, 0, 0]);
    let ids = NamespaceIds::parse(&structure(&[(0, &list)])).expect("valid");
    let expected = NamespaceIds {
        eui64: Some([1; 8]),
        nguid: Some([2; 16]),
        uuid: Some([3; 16]),
        csi: Some(0),
    };
    assert_eq!(ids, expected);
    assert_eq!(
        NamespaceIds::parse(&[0; 4096]).expect("valid"),
        NamespaceIds::default()
    );
    for wrong in [[1, 16], [2, 8], [3, 255], [4, 2]] {
        assert!(NamespaceIds::parse(&structure(&[(0, &wrong)])).is_err());
    }
    // One whose end is beyond the list's.
    let mut bytes = Vec::new();
    while bytes.len() < 4092 {
        bytes.extend_from_slice(&[9, 251, 0, 0]);
        bytes.resize(bytes.len() + 251, 0);
    }
    bytes.truncate(4096);
    assert!(NamespaceIds::parse(&bytes).is_err());
}

#[test]
fn lists_of_namespaces_end_with_a_zero_or_with_the_list() {
    let bytes = structure(&[(0, &[1, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0]), (16, &[9])]);
    assert_eq!(active_namespaces(&bytes).expect("valid"), [1, 2, 256]);
    assert!(active_namespaces(&[0; 4096]).expect("valid").is_empty());
    let full: Vec<u8> = (1..=1024_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(active_namespaces(&full).expect("valid").len(), 1024);
    for wrong in [[2, 0, 0, 0, 2], [3, 0, 0, 0, 1]] {
        assert!(active_namespaces(&structure(&[(0, &wrong)])).is_err());
    }
    let changed = ChangedNamespaces::parse(&bytes).expect("valid");
    assert_eq!(changed, ChangedNamespaces::These(vec![1, 2, 256]));
    let too_many = ChangedNamespaces::parse(&structure(&[(0, &[0xff; 4])])).expect("valid");
    assert_eq!(too_many, ChangedNamespaces::TooMany);
}

#[test]
fn limits_of_the_nvm_command_set_are_found() {
    let bytes = structure(&[(0, &[9, 1, 9, 2, 3, 0, 0, 0, 4])]);
    let expected = NvmController {
        wzsl: 1,
        dmrl: 2,
        dmrsl: 3,
        dmsl: 4,
    };
    assert_eq!(NvmController::parse(&bytes).expect("valid"), expected);
}

/// A log of two groups: 1 (optimized) with namespaces 1 and 3, and 2 with none.
fn ana_log(state: u8) -> Vec<u8> {
    let mut log = vec![5, 0, 0, 0, 0, 0, 0, 0, 2, 0];
    log.resize(16, 0);
    log.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1]);
    log.resize(48, 0);
    log.extend_from_slice(&[1, 0, 0, 0, 3, 0, 0, 0]);
    log.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, state]);
    log.resize(88, 0);
    log
}

#[test]
fn the_ana_log_tells_the_state_of_every_namespace() {
    use AnaState::*;
    for (number, state) in [
        (1, Optimized),
        (2, NonOptimized),
        (3, Inaccessible),
        (4, PersistentLoss),
        (0x5f, Change),
    ] {
        let log = AnaLog::parse(&ana_log(number)).expect("valid");
        assert_eq!((log.change_count, log.groups.len()), (5, 2));
        assert_eq!((log.groups[0].id, log.groups[0].change_count), (1, 7));
        assert_eq!(log.groups[0].namespaces, [1, 3]);
        assert_eq!(log.state_of(3, 2), Some(Optimized));
        assert_eq!(log.state_of(9, 2), Some(state));
        assert_eq!(log.state_of(9, 3), None);
    }
    for state in [0, 5, 0xe] {
        assert!(AnaLog::parse(&ana_log(state)).is_err());
    }
}

#[test]
fn an_ana_log_that_is_cut_or_mutated_is_refused_or_read_and_never_a_panic() {
    let good = ana_log(1);
    for len in 0..good.len() {
        assert!(AnaLog::parse(&good[..len]).is_err());
    }
    for at in 0..good.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            if let Ok(log) = AnaLog::parse(&bytes) {
                let namespaces: usize = log.groups.iter().map(|group| group.namespaces.len()).sum();
                assert!(namespaces <= good.len() / 4);
            }
        }
    }
    // Four billion namespaces that are not there.
    let mut bytes = good;
    put(&mut bytes, 20, &[0xff; 4]);
    assert!(AnaLog::parse(&bytes).is_err());
}

#[test]
fn the_size_of_the_ana_log_is_bounded() {
    let controller = |nanagrpid: u32, nn: u32, mnan: u32| {
        Controller::parse(&structure(&[
            (348, &nanagrpid.to_le_bytes()),
            (516, &nn.to_le_bytes()),
            (540, &mnan.to_le_bytes()),
        ]))
        .expect("valid")
    };
    assert_eq!(
        AnaLog::size(&controller(128, 1024, 0)),
        Some(16 + 128 * 32 + 4096)
    );
    assert_eq!(
        AnaLog::size(&controller(128, u32::MAX, 8)),
        Some(16 + 128 * 32 + 32)
    );
    assert_eq!(AnaLog::size(&controller(u32::MAX, 1, 0)), None);
    assert_eq!(AnaLog::size(&controller(1, u32::MAX, 0)), None);
}

#[test]
fn the_discovery_log_is_read_from_the_places_of_the_specification() {
    let mut header = vec![3, 0, 0, 0, 0, 0, 0, 0, 2];
    header.resize(1024, 0);
    let expected = DiscoveryHeader {
        generation: 3,
        entries: 2,
    };
    assert_eq!(DiscoveryHeader::parse(&header).expect("valid"), expected);
    header[16] = 1;
    assert!(DiscoveryHeader::parse(&header).is_err());
    assert!(DiscoveryHeader::parse(&header[..17]).is_err());
    let mut bytes = vec![0; 1024];
    put(
        &mut bytes,
        0,
        &[3, 1, 2, 0x05, 1, 0, 0xff, 0xff, 32, 0, 3, 0],
    );
    put(&mut bytes, 32, b"4420 ");
    put(&mut bytes, 256, b"nqn.2024-01.test:disk");
    put(&mut bytes, 512, b"192.0.2.7");
    put(&mut bytes, 768, &[2]);
    let entry = DiscoveryEntry::parse(&bytes).expect("valid");
    let expected = DiscoveryEntry {
        trtype: TRTYPE_TCP,
        adrfam: 1,
        subtype: SubsystemType::Nvm,
        secure_channel: SecureChannel::Required,
        can_disable_sq_flow_control: true,
        portid: 1,
        cntlid: 0xffff,
        asqsz: 32,
        eflags: 3,
        port: Some(4420),
        subnqn: "nqn.2024-01.test:disk".into(),
        traddr: "192.0.2.7".into(),
        security: SecurityType::Tls13,
    };
    assert_eq!(entry, expected);
    // No port, no connection (TCP 3.1.2).
    for service in [
        &b"none\0"[..],
        b"65536",
        b"0\0\0\0\0",
        b"-1\0\0\0",
        b"\0\0\0\0\0",
    ] {
        put(&mut bytes, 32, service);
        assert_eq!(DiscoveryEntry::parse(&bytes).expect("valid").port, None);
    }
}

#[test]
fn asynchronous_events_are_told_apart() {
    for (result, kind, log_page) in [
        (0x0004_0002, AsyncEventKind::NamespaceChanged, 4),
        (0x000c_0302, AsyncEventKind::AnaChanged, 0x0c),
        (0x0070_f002, AsyncEventKind::DiscoveryChanged, 0x70),
        (0x0080_0006, AsyncEventKind::CommandSet(0), 0x80),
        (0x0001_0300, AsyncEventKind::PersistentInternalError, 1),
        (
            0x0002_0101,
            AsyncEventKind::Other {
                event: 1,
                information: 1,
            },
            2,
        ),
    ] {
        let event = AsyncEvent::from_result(result);
        assert_eq!((event.kind, event.log_page), (kind, log_page));
    }
}

#[test]
fn structures_that_are_cut_are_refused() {
    let bytes = structure(&[(0, &[1]), (128, &[0, 0, 9, 0])]);
    for len in [0, 1, 31, 1023, 4095] {
        let cut = &bytes[..len];
        assert!(Controller::parse(cut).is_err());
        assert!(Namespace::parse(cut).is_err());
        assert!(NamespaceIds::parse(cut).is_err());
        assert!(NvmController::parse(cut).is_err());
        assert!(active_namespaces(cut).is_err());
        assert!(ChangedNamespaces::parse(cut).is_err());
    }
    assert!(DiscoveryEntry::parse(&bytes[..1023]).is_err());
    let error = Controller::parse(&[0; 12])
        .expect_err("too short")
        .to_string();
    assert_eq!(error, "Identify Controller: 12 bytes of at least 4096");
}
