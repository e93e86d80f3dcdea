//! Rings as the VMM sets them up, starts and stops them.

mod common;

use common::{Rig, SOON, fill_with_reads, refused};
use vhost_user_frontend as frontend;

use frontend::blk::status;
use frontend::message::VringAddr;
use frontend::protocol::feature;
use frontend::sys::EventFd;
use frontend::{Client, Completion, Device, DeviceOptions, Notify, Op};

const MIB: u64 = 1 << 20;

// Numbers.

#[test]
fn queue_index_out_of_range_is_refused_in_every_message() {
    let mut rig = Rig::with("raw", MIB, |d| d.queues(2));
    for index in [2, 99, 9999, 0x1_0000, u32::MAX] {
        refused(&mut rig, "num", |c| c.set_vring_num(index, 128));
        refused(&mut rig, "addr", |c| {
            c.set_vring_addr(index, &VringAddr::default())
        });
        refused(&mut rig, "base", |c| c.set_vring_base(index, 0));
        refused(&mut rig, "enable", |c| c.set_vring_enable(index, true));
        refused(&mut rig, "get base", |c| c.get_vring_base(index).map(drop));
    }
    let event = EventFd::new().unwrap();
    for index in [2, 99, 255] {
        refused(&mut rig, "kick", |c| {
            c.set_vring_kick(index, Some(event.raw()))
        });
        refused(&mut rig, "call", |c| {
            c.set_vring_call(index, Some(event.raw()))
        });
        refused(&mut rig, "err", |c| {
            c.set_vring_err(index, Some(event.raw()))
        });
        refused(&mut rig, "kick without fd", |c| {
            c.set_vring_kick(index, None)
        });
    }
}

#[test]
fn queue_size_that_cannot_be_is_refused() {
    let mut rig = Rig::raw(MIB);
    for size in [0, 3, 100, 65536, 0x8001, u32::MAX] {
        refused(&mut rig, "size", |c| c.set_vring_num(0, size));
    }
}

#[test]
fn ring_base_that_cannot_be_is_refused() {
    let mut rig = Rig::raw(MIB);
    refused(&mut rig, "base", |c| c.set_vring_base(0, 0x1_0000));
}

#[test]
fn small_and_large_queues_work() {
    let rig = Rig::with("raw", 16 * MIB, |d| d.queue_size(1024));
    for queue_size in [4u16, 8, 64, 256, 1024] {
        let options = DeviceOptions {
            queue_size,
            ..DeviceOptions::default()
        };
        let mut device = rig.device_with(options);
        for i in 0..3 * u64::from(queue_size) {
            device.write(i, &[i as u8; 512]).unwrap();
        }
        assert_eq!(device.read(2, 512).unwrap(), [2; 512]);
        device.shut_down().unwrap();
    }
}

#[test]
fn indices_wrap_around_at_65536() {
    let rig = Rig::raw(16 * MIB);
    let options = DeviceOptions::default();
    let mut device = Device::negotiate(rig.daemon.socket(), options).unwrap();
    device.queue(0).ring.split().start_at(65_500);
    device.start_queue(0, 65_500).unwrap();
    for i in 0..200u64 {
        device.write(i, &[i as u8; 512]).unwrap();
    }
    assert_eq!(device.stop_queue(0).unwrap(), 164);
}

// Starting rings.

#[test]
fn kick_before_enable_is_not_lost() {
    let rig = Rig::raw(MIB);
    let mut device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    let queue = device.queue(0);
    queue.submit(Op::Flush, 1).unwrap();
    queue.ring.publish();
    let addr = queue.ring.vring_addr(0);
    let (kick, call) = (queue.ring.kick_fd().clone(), queue.ring.call_fd().clone());
    let client = device.client().unwrap();
    client.set_vring_num(0, 128).unwrap();
    client.set_vring_base(0, 0).unwrap();
    client.set_vring_addr(0, &addr).unwrap();
    client.set_vring_call(0, Some(call.raw())).unwrap();
    client.set_vring_kick(0, Some(kick.raw())).unwrap();
    // The kick is in the descriptor already, and may be consumed while the ring is disabled.
    client.set_vring_enable(0, true).unwrap();
    assert_eq!(device.queue(0).wait(SOON).unwrap().status, status::OK);
}

#[test]
fn requests_in_the_ring_at_its_start_are_found_without_a_kick() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    let base = device.stop_queue(0).unwrap();
    let queue = device.queue(0);
    queue.submit(Op::Flush, 1).unwrap();
    queue.ring.publish();
    queue.ring.kick_fd().take();
    // `start_queue` kicks once, as every VMM must: a ring starts by a kick. QEMU does it at each start.
    device.start_queue(0, base).unwrap();
    assert_eq!(device.queue(0).wait(SOON).unwrap().status, status::OK);
}

#[test]
fn new_call_descriptor_is_signalled_once_on_its_arrival() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    device.queue(0).ring.renew_call().unwrap();
    let call = device.queue(0).ring.call_fd().clone();
    let client = device.client().unwrap();
    client.set_vring_call(0, Some(call.raw())).unwrap();
    // A completion between the old and the new descriptor may have gone to the old one: this guest would
    // wait for ever.
    assert!(
        call.wait(SOON).unwrap(),
        "nobody signalled the new descriptor"
    );
    device.write(1, &[2; 512]).unwrap();
}

#[test]
fn ring_without_a_kick_descriptor_is_polled() {
    let rig = Rig::raw(MIB);
    let options = DeviceOptions {
        kick_fd: false,
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    for i in 0..100 {
        device.write(i, &[i as u8; 512]).unwrap();
    }
    assert_eq!(device.read(99, 512).unwrap(), [99; 512]);
}

#[test]
fn ring_without_a_call_descriptor_is_served() {
    let rig = Rig::raw(MIB);
    let options = DeviceOptions {
        notify: Notify::Poll,
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    device.client().unwrap().set_vring_call(0, None).unwrap();
    for i in 0..100 {
        device.write(i, &[i as u8; 512]).unwrap();
    }
}

#[test]
fn used_index_is_read_from_the_ring_at_the_start() {
    let rig = Rig::raw(MIB);
    let mut device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    // Seven chains were used, three more taken by a backend that died: the next to be taken is the eleventh,
    // and the next used entry the eighth.
    device.queue(0).ring.split().start_at(7);
    let ring = device.queue(0).ring.split();
    for _ in 0..3 {
        ring.push_raw(0);
    }
    ring.set_avail_idx(10);
    device.queue(0).submit(Op::Flush, 5).unwrap();
    device.queue(0).ring.split().set_avail_idx(11);
    device.start_queue(0, 10).unwrap();
    let done = device.queue(0).wait(SOON).unwrap();
    assert_eq!((done.token, done.status), (5, status::OK));
    assert_eq!(device.queue(0).ring.split().used_idx(), 8);
}

#[test]
fn firmware_uses_one_queue_and_the_kernel_several() {
    let rig = Rig::with("raw", 16 * MIB, |d| d.queues(4));
    let options = DeviceOptions {
        queues: 4,
        features: 0x1_4000_0046,
        ..DeviceOptions::default()
    };
    let mut device = Device::negotiate(rig.daemon.socket(), options).unwrap();
    device.start_queue(0, 0).unwrap();
    device.write(0, &[1; 512]).unwrap();
    assert_eq!(device.stop_queue(0).unwrap(), 1);
    // Same connection: the kernel's driver resets the device, and starts anew.
    let features = device.offered() & (feature::LINUX | feature::PROTOCOL_FEATURES);
    let client = device.client().unwrap();
    client.set_features(features).unwrap();
    client.set_mem_table(&device.memory).unwrap();
    for index in 0..4 {
        device.queue(index).reset();
        device
            .queue(index)
            .ring
            .set_event_idx(features & feature::EVENT_IDX != 0);
        device.start_queue(index, 0).unwrap();
    }
    for index in 0..4u64 {
        let op = Op::Write {
            sector: 10 + index,
            data: &[index as u8; 512],
        };
        let (done, _) = device.run_on(index as usize, op).unwrap();
        assert_eq!(done.status, status::OK);
    }
    assert_eq!(device.read(0, 512).unwrap(), [1; 512]);
    assert_eq!(device.read(13, 512).unwrap(), [3; 512]);
}

/// Gives ring 0 these addresses and starts it; a backend that checks late must do so here at the latest.
fn start_at(client: &Client, addr: &VringAddr) -> frontend::Result<()> {
    client.set_vring_num(0, 128)?;
    client.set_vring_base(0, 0)?;
    client.set_vring_addr(0, addr)?;
    let event = EventFd::new()?;
    event.signal()?;
    client.set_vring_kick(0, Some(event.raw()))?;
    client.set_vring_enable(0, true)
}

#[test]
fn ring_outside_guest_memory_is_refused() {
    let mut rig = Rig::raw(MIB);
    let shift = frontend::memory::DEFAULT_USER_SHIFT;
    for bad in [
        0,
        0xdead_0000,
        u64::MAX - 15,
        shift - 4096,
        shift + (16 << 20),
    ] {
        for part in 0..3 {
            let mut parts = [shift, shift + 0x4000, shift + 0x8000];
            parts[part] = bad;
            let addr = VringAddr {
                desc: parts[0],
                avail: parts[1],
                used: parts[2],
                ..VringAddr::default()
            };
            refused(&mut rig, &format!("part {part} at {bad:#x}"), |c| {
                start_at(c, &addr)
            });
        }
    }
}

#[test]
fn ring_that_is_misaligned_or_ends_outside_its_region_is_refused() {
    let mut rig = Rig::raw(MIB);
    let shift = frontend::memory::DEFAULT_USER_SHIFT;
    let cases = [
        (shift + 8, shift + 0x4000, shift + 0x8000),
        (shift, shift + 0x4001, shift + 0x8000),
        (shift, shift + 0x4000, shift + 0x8002),
        (shift + (16 << 20) - 2032, shift + 0x4000, shift + 0x8000),
        (shift, shift + 0x4000, shift + (16 << 20) - 1024),
    ];
    for (desc, avail, used) in cases {
        let addr = VringAddr {
            desc,
            avail,
            used,
            ..VringAddr::default()
        };
        refused(&mut rig, "addresses", |c| start_at(c, &addr));
    }
}

// Stopping rings.

/// Takes all completions there are.
fn take_completions(device: &mut Device) -> Vec<Completion> {
    let mut all = Vec::new();
    while let Some(done) = device.queue(0).poll().unwrap() {
        device.queue(0).release(done);
        all.push(done);
    }
    all
}

#[test]
fn get_vring_base_drains_the_ring_before_it_answers() {
    let rig = Rig::raw(64 * MIB);
    let mut device = rig.device();
    // Data that storage must be asked for: reads of holes are over too soon to be caught in flight.
    for i in 0..16 {
        device.write(128 * i, &[0x61; 65536]).unwrap();
    }
    device.flush().unwrap();
    for _ in 0..50 {
        let submitted = fill_with_reads(&mut device, 65536);
        let base = device.stop_queue(0).unwrap();
        // Everything that was taken off the ring is completed by now; the rest is still there.
        let used = device.queue(0).ring.split().used_idx();
        assert_eq!(u32::from(used), base, "taken and not completed");
        let first = take_completions(&mut device);
        assert!(first.iter().all(|c| c.status == status::OK));
        // Started where it stood, the rest comes, each once.
        device.start_queue(0, base).unwrap();
        let mut seen: Vec<u64> = first.iter().map(|c| c.token).collect();
        while (seen.len() as u64) < submitted {
            let done = device.queue(0).wait(SOON).unwrap();
            assert_eq!(done.status, status::OK);
            seen.push(done.token);
            device.queue(0).release(done);
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..submitted));
    }
}

#[test]
fn stopped_ring_is_left_alone() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    let base = device.stop_queue(0).unwrap();
    let queue = device.queue(0);
    queue.submit(Op::Flush, 9).unwrap();
    queue.ring.publish();
    queue.ring.kick();
    // A question and its answer: the daemon had every chance to look at the ring.
    for _ in 0..50 {
        device.read_config().unwrap();
    }
    let used = device.queue(0).ring.split().used_idx();
    assert_eq!(u32::from(used), base);
    device.start_queue(0, base).unwrap();
    assert_eq!(device.queue(0).wait(SOON).unwrap().token, 9);
}

#[test]
fn stopping_a_ring_that_never_ran_answers_its_base() {
    let rig = Rig::raw(MIB);
    let mut device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    device.client().unwrap().set_vring_base(0, 77).unwrap();
    assert_eq!(device.stop_queue(0).unwrap(), 77);
}
