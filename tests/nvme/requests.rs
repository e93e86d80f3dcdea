//! What requests come to on a target that is well.

use nvme_target::{NamespaceSpec, PortSpec};
use vhost_user_frontend::Segment;
use vhost_user_frontend::guest::Random;
use vhost_user_frontend::guest::model::Model;

use crate::load::{self, Load, Shape};
use crate::rig::{MIB, Rig, Setup};

const SIZES: [u64; 9] = [1, 2, 7, 8, 16, 17, 64, 255, 1024];

/// Writes, reads, zeroes and discards of many sizes around `grain` sectors, each checked at the target.
fn sizes(setup: &Setup, align: u64, grain: u64) {
    let mut rig = Rig::start(setup);
    let mut device = rig.device(8, 1 << 20);
    let mut random = Random::new(11);
    let sectors = device.capacity() / 512;
    for len in SIZES.into_iter().filter(|n| n % align == 0) {
        let starts = [0, grain - align, grain, 3 * grain + align, sectors - len];
        for first in starts.into_iter().filter(|s| s + len <= sectors) {
            let bytes = (len * 512) as usize;
            let data = random.bytes(bytes);
            device.write(first, &data).unwrap();
            assert!(rig.stored(first * 512, bytes) == data, "{len} at {first}");
            assert!(device.read(first, bytes as u32).unwrap() == data);
            device.flush().unwrap();
            let half = (len / 2).next_multiple_of(align).min(len);
            let zeroed = (half * 512) as usize;
            device
                .write_zeroes(&[Segment::new(first, half as u32)])
                .unwrap();
            let got = device.read(first, bytes as u32).unwrap();
            assert!(got[..zeroed].iter().all(|b| *b == 0) && got[zeroed..] == data[zeroed..]);
            device.discard(&[Segment::new(first, len as u32)]).unwrap();
            let got = device.read(first, bytes as u32).unwrap();
            let kept = |(i, b): (usize, &u8)| *b == 0 || i >= zeroed && *b == data[i];
            assert!(got.iter().enumerate().all(kept), "{len} at {first}");
        }
    }
    // Nothing beyond the end, and nothing was written by trying.
    assert!(
        device
            .write(sectors, &vec![1; 512 * align as usize])
            .is_err()
    );
    assert!(device.read(sectors, 512 * align as u32).is_err());
    let last = random.bytes(512 * align as usize);
    device.write(sectors - align, &last).unwrap();
    device.shut_down().unwrap();
    drop(device);

    // The end of the daemon and a new one.
    rig.restart();
    let mut device = rig.device(8, 1 << 20);
    assert!(device.read(sectors - align, last.len() as u32).unwrap() == last);
    assert!(rig.target.counters().flushes() > 0);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}

#[test]
fn requests_larger_than_mdts_and_across_noiob() {
    // MDTS 32 KiB; no command across a multiple of 24 KiB.
    let namespace = NamespaceSpec::new(1, 16 * MIB).with(|n| n.noiob = 48);
    let setup = Setup::new(namespace).subsystem(|c| c.mdts = 3);
    sizes(&setup, 1, 48);
}

#[test]
fn requests_on_blocks_of_4096_bytes() {
    let namespace = NamespaceSpec::new(1, 16 * MIB).lba_size(4096);
    let setup = Setup::new(namespace).subsystem(|c| (c.mdts, c.wzsl) = (2, 1));
    sizes(&setup, 8, 32);
}

#[test]
fn requests_of_512_bytes_on_blocks_of_4096_bytes() {
    let namespace = NamespaceSpec::new(1, 16 * MIB).lba_size(4096);
    sizes(&Setup::new(namespace).args("--block-size 512"), 1, 8);
}

#[test]
fn requests_by_r2t_of_odd_sizes_with_digests_and_nothing_in_capsules() {
    let port = PortSpec::loopback().with(|t| {
        (t.r2t_size, t.max_r2t) = (4096 + 512, 4);
        (t.max_h2c_data, t.c2h_size, t.c2h_success) = (4096, 1000, false);
    });
    let setup = Setup::new(NamespaceSpec::new(1, 16 * MIB))
        .ports([port])
        .subsystem(|c| c.in_capsule = 0)
        .args("--nvme-header-digest --nvme-data-digest");
    sizes(&setup, 1, 8);
}

#[test]
fn requests_of_one_controller_without_write_zeroes_and_deallocate() {
    let setup = Setup::new(NamespaceSpec::new(1, 16 * MIB)).subsystem(|c| c.oncs = 0);
    let mut rig = Rig::start(&setup);
    let mut device = rig.device(8, 1 << 20);
    let data = Random::new(3).bytes(64 << 10);
    device.write(100, &data).unwrap();
    // The guest is promised zeroes, whoever writes them.
    device.write_zeroes(&[Segment::new(101, 100)]).unwrap();
    let got = device.read(100, data.len() as u32).unwrap();
    let zeroed = 512..101 * 512;
    assert!(got[zeroed.clone()].iter().all(|b| *b == 0));
    assert!(got[..512] == data[..512] && got[zeroed.end..] == data[zeroed.end..]);
    device.shut_down().unwrap();
    rig.daemon.terminate();
    rig.assert_no_violations();
}

/// Random requests on queues and workers, with a restart in their middle.
fn random(name: &str, setup: &Setup, align: u64) {
    const SIZE: u64 = 8 * MIB;
    let shape = Shape {
        depth: 16,
        max_sectors: 256,
        align,
        grain: 48,
    };
    let mut rig = Rig::start(setup);
    rig.target.keep_journal(true);
    let mut load = Load::new(
        name,
        load::seed(5),
        shape,
        Model::new(vec![0; SIZE as usize]),
    );
    for until in [750, 1500] {
        let mut device = rig.device(shape.depth, load.bytes());
        load.go(&mut device, until, |_| ());
        load.read_all(&mut device);
        device.shut_down().unwrap();
        drop(device);
        rig.restart();
    }
    rig.daemon.terminate();
    assert!(rig.stored(0, SIZE as usize) == load.model.bytes);
    let again = load.check_journal(&rig.target.journal(), align as usize * 512);
    assert_eq!(again, 0, "executed twice without need");
    rig.assert_no_violations();
}

#[test]
fn requests_of_two_queues_and_one_worker() {
    let setup = Setup::new(NamespaceSpec::new(1, 8 * MIB)).queues(2, 1);
    random("two queues, one worker", &setup, 1);
}

#[test]
fn requests_of_four_queues_and_two_workers_over_two_paths() {
    let setup = Setup::new(NamespaceSpec::new(1, 8 * MIB).lba_size(4096))
        .queues(4, 2)
        .ports([PortSpec::loopback(), PortSpec::loopback()])
        .args("--nvme-io-policy round-robin");
    random("four queues, two workers, two paths", &setup, 8);
}
