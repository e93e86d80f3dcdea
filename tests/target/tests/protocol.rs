//! What the target says, byte by byte, against the specifications.

mod host;

use host::{Ask, Host, NQN};
use virtioblkd_test_target::{NamespaceSpec, PortSpec, SubsystemSpec, Target};

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 9) as u8) ^ seed)
        .collect()
}

#[test]
fn crc32c_of_the_test_itself_is_that_of_rfc_3720() {
    assert_eq!(host::crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(host::crc32c(b"123456789"), 0xe306_9283);
}

#[test]
fn handshake_connect_identify_read_write_flush() {
    let target = Target::builder().start().unwrap();
    let (mut admin, cntlid) = Host::admin(target.address(), Ask::default(), 0);
    let cap = admin.property_get(0, true).u64(8);
    assert_eq!((cap & 0xffff, cap >> 37 & 1), (1023, 1));
    assert_eq!(admin.property_get(8, false).u32(8), 0x0002_0000);
    assert_eq!(admin.property_get(0x1c, false).u32(8), 1, "CSTS.RDY");
    let (id, resp) = admin.identify(0x01, 0);
    assert!(resp.ok());
    assert_eq!(u16::from_le_bytes([id[78], id[79]]), cntlid);
    assert_eq!(id[111], 1, "CNTRLTYPE");
    assert_eq!((id[512], id[513]), (0x66, 0x44), "SQES, CQES");
    assert_eq!(
        u32::from_le_bytes(id[1792..1796].try_into().unwrap()),
        (64 + 8192) / 16,
        "IOCCSZ"
    );
    assert_eq!(
        &id[768..768 + NQN.len() + 1],
        [NQN.as_bytes(), &[0]].concat()
    );
    let (list, _) = admin.identify(0x02, 0);
    assert_eq!(&list[..8], [1, 0, 0, 0, 0, 0, 0, 0]);
    let (ns, _) = admin.identify(0x00, 1);
    assert_eq!(
        u64::from_le_bytes(ns[..8].try_into().unwrap()),
        (64 << 20) / 512
    );
    assert_eq!(ns[130], 9, "LBADS");
    // Number of Queues: 4 asked for, both zero-based.
    let resp = admin.simple(0x09, 0, 0x07, 3 | 3 << 16);
    assert_eq!(resp.u32(8), 3 | 3 << 16);

    let mut io = Host::io(target.address(), Ask::default(), cntlid, 1);
    let data = pattern(4096, 1);
    assert!(io.write_in_capsule(8, 512, &data).ok());
    let large = pattern(256 << 10, 2);
    let (resp, asked) = io.write_by_r2t(16, 512, &large);
    assert!(resp.ok());
    assert_eq!(asked, [(0, 128 << 10), (128 << 10, 128 << 10)]);
    let (got, resp) = io.read(8, 8, 512);
    assert!(
        got == data && resp.is_none(),
        "SUCCESS stands for the completion"
    );
    let (got, _) = io.read(16, 512, 512);
    assert!(got == large);
    assert!(io.simple(0, 1, 0, 0).ok());
    assert_eq!(
        target
            .subsystem(0)
            .namespace(1)
            .unwrap()
            .read(8 * 512, 4096),
        data
    );
    let counters = target.counters();
    assert_eq!(
        (counters.reads(), counters.writes(), counters.flushes()),
        (2, 2, 1)
    );
    assert_eq!((counters.connections, counters.associations_open), (2, 1));
    assert_eq!(target.violations(), Vec::<String>::new());
}

#[test]
fn digests_and_alignments_are_kept_to_both_ways() {
    let port = PortSpec::loopback().with(|t| {
        t.cpda = 15;
        t.max_h2c_data = 4096;
        t.r2t_size = 12 << 10;
        t.max_r2t = 3;
        t.c2h_size = 3000;
    });
    let namespace = NamespaceSpec::new(1, 16 << 20).lba_size(4096);
    let target = Target::builder()
        .port(port)
        .subsystem(SubsystemSpec::new(NQN).namespace(namespace))
        .start()
        .unwrap();
    let ask = Ask {
        hpda: 31,
        digests: 3,
        max_r2t: 7,
    };
    let (mut admin, cntlid) = Host::admin(target.address(), ask, 0);
    let (ns, _) = admin.identify(0, 1);
    assert_eq!(ns[130], 12, "LBADS");
    let mut io = Host::io(target.address(), ask, cntlid, 1);
    assert!(io.hdgst && io.ddgst && io.align == 64);
    let data = pattern(40 << 10, 3);
    let (resp, asked) = io.write_by_r2t(5, 4096, &data);
    assert!(resp.ok());
    assert_eq!(
        asked,
        [(0, 12288), (12288, 12288), (24576, 12288), (36864, 4096)]
    );
    assert!(io.write_in_capsule(1, 4096, &data[..8192]).ok());
    let e = host::rw(2, 99, 1, 5, 10, 40 << 10);
    io.send(&e, &[]);
    let first = io.recv_checked();
    assert_eq!(
        (first.0[3], first.u32(12), first.u32(16)),
        (128, 0, 3000),
        "PDO, DATAO, DATAL"
    );
    assert!(first.data() == &data[..3000]);
    let mut got = first.data().to_vec();
    while got.len() < data.len() {
        let next = io.recv_checked();
        assert_eq!(next.u32(12) as usize, got.len());
        got.extend_from_slice(next.data());
    }
    assert!(got == data);
    assert_eq!(target.violations(), Vec::<String>::new());
}
