//! The connection between VMM and daemon: what is sent in it, in what order, and how it ends.

mod common;

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use common::{Rig, SOON};
use vhost_user_frontend as frontend;

use frontend::blk::status;
use frontend::client::{self, VringAddr};
use frontend::protocol::{feature, flag, request};
use frontend::sys::EventFd;
use frontend::{
    Client, Completion, Device, DeviceOptions, Error, Notify, Op, RegionSpec, SplitQueue, process,
};

const MIB: u64 = 1 << 20;

/// Sends one bad thing on a fresh, negotiated connection; it must be refused, and the daemon serve on.
fn refused(rig: &mut Rig, what: &str, send: impl FnOnce(&Client) -> frontend::Result<()>) {
    let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    let answer = send(device.client().unwrap());
    assert!(
        answer.as_ref().is_err_and(Error::is_refusal),
        "{what}: {answer:?}"
    );
    drop(device);
    rig.assert_serves_a_new_client();
}

/// Waits until `probe` holds.
fn until(what: &str, mut probe: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !probe() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

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
    let rig = Rig::raw(16 * MIB);
    for queue_size in [4u16, 8, 64, 256, 1024] {
        let options = DeviceOptions {
            queue_size,
            ..DeviceOptions::default()
        };
        let mut device = match Device::start(rig.daemon.socket(), options) {
            Ok(device) => device,
            // A limit of the backend is fine above the usual sizes.
            Err(e) if queue_size > 256 && e.is_refusal() => continue,
            Err(e) => panic!("queue size {queue_size}: {e}"),
        };
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
    device.queue(0).ring.start_at(65_500);
    device.start_queue(0, 65_500).unwrap();
    for i in 0..200u64 {
        device.write(i, &[i as u8; 512]).unwrap();
    }
    assert_eq!(device.stop_queue(0).unwrap(), 164);
}

// Descriptors and messages.

#[test]
fn descriptors_that_no_message_asked_for_are_closed() {
    let mut rig = Rig::raw(MIB);
    let idle = process::fd_count(rig.daemon.pid()).unwrap();
    let event = EventFd::new().unwrap();
    let fds = [event.raw(); 8];
    for request in [
        request::GET_FEATURES,
        request::SET_OWNER,
        request::GET_QUEUE_NUM,
        request::SET_VRING_NUM,
        request::GET_CONFIG,
        request::SET_VRING_KICK,
        request::SET_MEM_TABLE,
    ] {
        for _ in 0..5 {
            let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
            client.send(request, flag::VERSION, &[0; 8], &fds).unwrap();
            // Whatever the daemon makes of it: it must have seen it before the connection goes.
            let _ = client.call(request::GET_FEATURES, &[], &fds);
        }
    }
    let pid = rig.daemon.pid();
    until("all descriptors are closed", || {
        process::fd_count(pid).unwrap() <= idle
    });
    rig.assert_serves_a_new_client();
}

#[test]
fn truncated_message_and_then_end_of_file() {
    let mut rig = Rig::raw(MIB);
    let whole = {
        let mut bytes = client::header(request::SET_FEATURES, flag::VERSION, 8).to_vec();
        bytes.extend([0; 8]);
        bytes
    };
    for len in 1..whole.len() {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        client.send_raw(&whole[..len], &[]).unwrap();
        drop(client);
    }
    rig.assert_serves_a_new_client();
}

#[test]
fn message_that_comes_byte_by_byte_is_understood_or_ends_the_connection() {
    let mut rig = Rig::raw(MIB);
    let client = Client::connect(rig.daemon.socket()).unwrap();
    for byte in client::header(request::GET_FEATURES, flag::VERSION, 0) {
        if client.send_raw(&[byte], &[]).is_err() {
            break;
        }
    }
    match client.recv() {
        Ok(reply) => assert_eq!(reply.request, request::GET_FEATURES),
        Err(e) => assert!(e.is_refusal(), "{e}"),
    }
    drop(client);
    rig.assert_serves_a_new_client();
}

#[test]
fn stalled_half_message_does_not_outlive_its_sender() {
    let mut rig = Rig::raw(MIB);
    let client = Client::connect(rig.daemon.socket()).unwrap();
    client
        .send_raw(
            &client::header(request::SET_FEATURES, flag::VERSION, 8),
            &[],
        )
        .unwrap();
    drop(client);
    rig.assert_serves_a_new_client();
}

#[test]
fn oversized_message_is_refused() {
    let mut rig = Rig::raw(MIB);
    for size in [4097, 65536, 0x7fff_ffff, u32::MAX] {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        client
            .send_raw(
                &client::header(request::SET_FEATURES, flag::VERSION, size),
                &[],
            )
            .unwrap();
        let _ = client.send_raw(&[0; 4096], &[]);
        assert!(client.closed_within(SOON).unwrap(), "size {size}");
        drop(client);
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn payload_of_the_wrong_size_is_refused() {
    let mut rig = Rig::raw(MIB);
    let cases = [
        (request::SET_FEATURES, 0),
        (request::SET_FEATURES, 7),
        (request::SET_FEATURES, 16),
        (request::SET_VRING_NUM, 4),
        (request::SET_VRING_ADDR, 8),
        (request::SET_MEM_TABLE, 0),
        (request::SET_MEM_TABLE, 39),
        (request::ADD_MEM_REG, 8),
        (request::GET_VRING_BASE, 1),
    ];
    for (request, len) in cases {
        refused(&mut rig, "payload", |c| c.tell(request, &vec![0; len], &[]));
    }
}

#[test]
fn unknown_message_is_refused() {
    let mut rig = Rig::raw(MIB);
    for request in [0, 41, 47, 1000, u32::MAX] {
        refused(&mut rig, "unknown", |c| c.tell(request, &[], &[]));
    }
}

#[test]
fn header_of_another_version_is_refused() {
    let mut rig = Rig::raw(MIB);
    for flags in [0, 2, 3] {
        let client = Client::connect_within(rig.daemon.socket(), SOON).unwrap();
        client.send(request::GET_FEATURES, flags, &[], &[]).unwrap();
        assert!(client.closed_within(SOON).unwrap(), "flags {flags}");
        drop(client);
        rig.assert_serves_a_new_client();
    }
}

#[test]
fn second_client_is_turned_away_at_once_and_the_first_goes_on() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    for _ in 0..3 {
        match Client::connect(rig.daemon.socket()) {
            Ok(second) => {
                let _ = second.send(request::GET_FEATURES, flag::VERSION, &[], &[]);
                assert!(second.closed_within(SOON).unwrap());
            }
            Err(e) => println!("not even accepted: {e}"),
        }
        device.write(0, &[8; 512]).unwrap();
    }
    device.shut_down().unwrap();
    rig.assert_serves_a_new_client();
}

#[test]
fn features_that_were_not_offered_are_refused_or_ignored() {
    let mut rig = Rig::raw(MIB);
    let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    let _ = device.client().unwrap().set_features(u64::MAX);
    drop(device);
    rig.assert_serves_a_new_client();
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
    device.queue(0).ring.start_at(7);
    let ring = &mut device.queue(0).ring;
    for _ in 0..3 {
        ring.push_raw(0);
    }
    ring.set_avail_idx(10);
    device.queue(0).submit(Op::Flush, 5).unwrap();
    device.queue(0).ring.set_avail_idx(11);
    device.start_queue(0, 10).unwrap();
    let done = device.queue(0).wait(SOON).unwrap();
    assert_eq!((done.token, done.status), (5, status::OK));
    assert_eq!(device.queue(0).ring.used_idx(), 8);
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

#[test]
fn ring_outside_guest_memory_is_refused_and_nothing_is_touched() {
    let mut rig = Rig::raw(MIB);
    for bad in [0u64, 0xdead_0000, u64::MAX - 15] {
        let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
        let ring = SplitQueue::new(&device.memory, 128).unwrap();
        let client = device.client().unwrap();
        let mut addr = ring.vring_addr(0);
        addr.used = bad;
        client.set_vring_num(0, 128).unwrap();
        let answer = client.set_vring_addr(0, &addr);
        assert!(
            answer.is_err_and(|e| e.is_refusal()),
            "used ring at {bad:#x}"
        );
        drop(device);
        rig.assert_serves_a_new_client();
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
        refused(&mut rig, "addresses", |c| {
            c.set_vring_num(0, 128)?;
            let addr = VringAddr {
                desc,
                avail,
                used,
                ..VringAddr::default()
            };
            c.set_vring_addr(0, &addr)?;
            // A backend that checks later must do so here at the latest.
            let event = EventFd::new()?;
            c.set_vring_kick(0, Some(event.raw()))?;
            c.set_vring_enable(0, true)
        });
    }
}

// Stopping rings.

/// Submits reads until the ring or the slots are full; returns how many.
fn fill_with_reads(device: &mut Device, len: u32) -> u64 {
    let queue = device.queue(0);
    let mut n = 0;
    while queue.submit(Op::Read { sector: 8 * n, len }, n).is_ok() {
        n += 1;
    }
    queue.ring.publish();
    n
}

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
    for _ in 0..20 {
        let submitted = fill_with_reads(&mut device, 65536);
        let base = device.stop_queue(0).unwrap();
        // Everything that was taken off the ring is completed by now; the rest is still there.
        let used = device.queue(0).ring.used_idx();
        assert_eq!(used, base, "taken and not completed");
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
    assert_eq!(device.queue(0).ring.used_idx(), base);
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

// Memory.

#[test]
fn overlapping_regions_are_refused() {
    let mut rig = Rig::raw(MIB);
    let size = 2 * MIB;
    let cases = [
        [RegionSpec::new(0, size), RegionSpec::new(0, size)],
        [RegionSpec::new(0, size), RegionSpec::new(size - 4096, size)],
        [RegionSpec::new(MIB, size), RegionSpec::new(0, size)],
    ];
    for specs in cases {
        let memory = frontend::Memory::new(&specs).unwrap();
        refused(&mut rig, "overlap", |c| c.set_mem_table(&memory));
        refused(&mut rig, "overlap by slots", |c| {
            // The table of the handshake covers 0..16 MiB already.
            c.add_mem_reg(&memory.regions()[0])
        });
    }
}

#[test]
fn region_with_hostile_numbers_is_refused() {
    let mut rig = Rig::raw(MIB);
    let memory = frontend::Memory::new(&[RegionSpec::new(1 << 40, MIB)]).unwrap();
    let fd = memory.regions()[0].fd();
    let good = memory.regions()[0].spec();
    let bad = [
        RegionSpec { size: 0, ..good },
        RegionSpec {
            size: u64::MAX,
            ..good
        },
        RegionSpec {
            guest_addr: u64::MAX - 4095,
            ..good
        },
        RegionSpec {
            user_addr: u64::MAX - 4095,
            ..good
        },
        RegionSpec {
            mmap_offset: u64::MAX - 4095,
            ..good
        },
        RegionSpec {
            mmap_offset: 1 << 62,
            ..good
        },
        RegionSpec {
            size: 1 << 62,
            ..good
        },
    ];
    for spec in bad {
        refused(&mut rig, "region", |c| {
            c.tell(request::ADD_MEM_REG, &client::single_region(&spec), &[fd])
        });
        refused(&mut rig, "table", |c| {
            c.tell(
                request::SET_MEM_TABLE,
                &client::memory_table(&[spec]),
                &[fd],
            )
        });
    }
    refused(&mut rig, "no descriptor", |c| {
        c.tell(request::ADD_MEM_REG, &client::single_region(&good), &[])
    });
    refused(&mut rig, "a descriptor too many", |c| {
        c.tell(
            request::SET_MEM_TABLE,
            &client::memory_table(&[good]),
            &[fd, fd],
        )
    });
    let other = RegionSpec {
        size: 2 * MIB,
        ..good
    };
    refused(&mut rig, "removal of what is not there", |c| {
        c.rem_mem_reg(&other)
    });
}

/// Keeps reads running while `change` is called `rounds` times; every read must complete, and rightly.
fn under_load(rig: &Rig, rounds: usize, mut change: impl FnMut(&mut Device, usize)) {
    let mut device = rig.device();
    for i in 0..64u64 {
        device.write(8 * i, &[i as u8 + 1; 4096]).unwrap();
    }
    for round in 0..rounds {
        let n = fill_with_reads(&mut device, 4096);
        change(&mut device, round);
        for _ in 0..n {
            let done = device.queue(0).wait(SOON).unwrap();
            assert_eq!(done.status, status::OK);
            let mut data = vec![0; 4096];
            device.queue(0).copy_data(done.slot, &mut data);
            if done.token < 64 {
                assert!(data.iter().all(|b| u64::from(*b) == done.token + 1));
            }
            device.queue(0).release(done);
        }
    }
    device.shut_down().unwrap();
}

#[test]
fn memory_table_is_replaced_under_load() {
    let rig = Rig::raw(16 * MIB);
    under_load(&rig, 200, |device, _| {
        device
            .client()
            .unwrap()
            .set_mem_table(&device.memory)
            .unwrap();
    });
    assert!(process::mappings_of(rig.daemon.pid(), "guest-memory").unwrap() <= 2);
}

#[test]
fn regions_come_and_go_under_load() {
    let rig = Rig::raw(16 * MIB);
    under_load(&rig, 200, |device, round| {
        let spec = RegionSpec::new((1 << 34) + ((round as u64 % 7) << 24), MIB);
        let extra = frontend::memory::Region::new(spec).unwrap();
        let client = device.client().unwrap();
        client.add_mem_reg(&extra).unwrap();
        client.rem_mem_reg(&spec).unwrap();
    });
}

#[test]
fn region_that_was_added_can_be_used_and_one_that_was_removed_cannot() {
    let rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[0x6b; 512]).unwrap();
    let spec = RegionSpec::new(1 << 34, 2 * MIB);
    let extra = device.memory.add(spec).unwrap();
    device.client().unwrap().add_mem_reg(&extra).unwrap();
    let raw = common::Raw::new(&device.memory, 0, 0, 512);
    let bufs = [
        raw.header_buf(),
        frontend::Buf::writable(1 << 34, 512),
        raw.status_buf(),
    ];
    assert_eq!(common::run_chain(&mut device, &bufs), 513);
    assert_eq!(device.memory.read_vec(1 << 34, 512), [0x6b; 512]);
    device.client().unwrap().rem_mem_reg(&spec).unwrap();
    let ring = &mut device.queue(0).ring;
    ring.add(&bufs, 0).unwrap();
    ring.publish();
    let outcome = ring.wait_outcome(common::silence()).unwrap();
    assert_ne!(outcome, frontend::Outcome::Silence);
    let answer = device.memory.read_vec(raw.status, 1)[0];
    assert!(outcome == frontend::Outcome::Broken || answer != status::OK);
}

#[test]
fn all_memory_slots_that_are_promised_can_be_used() {
    let rig = Rig::raw(MIB);
    let options = DeviceOptions {
        memory_slots: true,
        ..DeviceOptions::default()
    };
    let mut device = rig.device_with(options);
    let slots = device.client().unwrap().get_max_mem_slots().unwrap();
    assert!(slots >= 8);
    let start = device.memory.regions().len() as u64;
    for i in start..slots.min(64) {
        let spec = RegionSpec::new((1 << 36) + (i << 20), 4096);
        let region = device.memory.add(spec).unwrap();
        device.client().unwrap().add_mem_reg(&region).unwrap();
    }
    device.write(0, &[1; 512]).unwrap();
}

#[test]
fn truncated_guest_memory_does_not_take_the_daemon_down_silently() {
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    let spec = RegionSpec::new(1 << 34, 2 * MIB);
    let extra = device.memory.add(spec).unwrap();
    device.client().unwrap().add_mem_reg(&extra).unwrap();
    extra.truncate(0).unwrap();
    // A header in memory that is mapped and not there: reading it raises SIGBUS.
    let raw = common::Raw::new(&device.memory, 0, 0, 512);
    let ring = &mut device.queue(0).ring;
    let bufs = [
        frontend::Buf::readable(1 << 34, 16),
        frontend::Buf::writable(raw.data, 512),
        raw.status_buf(),
    ];
    ring.add(&bufs, 0).unwrap();
    ring.publish();
    let deadline = Instant::now() + SOON;
    loop {
        if rig.daemon.try_exit().is_some() {
            let log = rig.daemon.log().to_lowercase();
            assert!(
                log.contains("sigbus") || log.contains("guest memory"),
                "it died without a word:\n{log}"
            );
            return;
        }
        let outcome = device
            .queue(0)
            .ring
            .wait_outcome(Duration::from_millis(5))
            .unwrap();
        let gone = device
            .client()
            .unwrap()
            .closed_within(Duration::ZERO)
            .unwrap();
        if gone || outcome != frontend::Outcome::Silence {
            break;
        }
        assert!(Instant::now() < deadline, "neither an answer nor an end");
    }
    device.disconnect();
    rig.assert_serves_a_new_client();
}

#[test]
fn guest_memory_file_shorter_than_its_region_is_refused() {
    let mut rig = Rig::raw(MIB);
    let region = frontend::memory::Region::new(RegionSpec::new(1 << 34, 2 * MIB)).unwrap();
    region.truncate(MIB).unwrap();
    refused(&mut rig, "short file", |c| c.add_mem_reg(&region));
}

// Ends.

#[test]
fn client_that_vanishes_under_load_is_forgotten_entirely() {
    let mut rig = Rig::with("raw", 64 * MIB, |d| d.queues(2));
    let pid = rig.daemon.pid();
    rig.assert_serves_a_new_client();
    let idle = process::fd_count(pid).unwrap();
    for _ in 0..20 {
        let mut device = rig.device();
        fill_with_reads(&mut device, 65536);
        device.disconnect();
        until("guest memory is unmapped", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
        });
        until("its descriptors are closed", || {
            process::fd_count(pid).unwrap() <= idle
        });
    }
    rig.assert_serves_a_new_client();
}

#[test]
fn killed_client_process_is_forgotten_too() {
    let mut rig = Rig::raw(16 * MIB);
    // A child that holds a copy of the connection: the daemon sees the end of file when it is killed.
    let device = rig.device();
    let fd = device.client().unwrap().stream().as_raw_fd();
    // SAFETY: clearing close-on-exec of our own descriptor.
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    let mut child = std::process::Command::new("sleep")
        .arg("1000")
        .spawn()
        .unwrap();
    drop(device);
    child.kill().unwrap();
    child.wait().unwrap();
    rig.assert_serves_a_new_client();
}

#[test]
fn many_sessions_leak_nothing() {
    let mut rig = Rig::with("raw", 16 * MIB, |d| d.queues(2));
    let pid = rig.daemon.pid();
    let session = |rig: &Rig| {
        let options = DeviceOptions {
            queues: 2,
            ..DeviceOptions::default()
        };
        let mut device = rig.device_with(options);
        device.write(0, &[1; 512]).unwrap();
        if device.options().queues == 2 {
            device.shut_down().unwrap();
        }
    };
    for _ in 0..3 {
        session(&rig);
    }
    until("idle again", || {
        process::mappings_of(pid, "guest-memory").unwrap() == 0
    });
    let (fds, maps, threads) = (
        process::fd_count(pid).unwrap(),
        process::mapping_count(pid).unwrap(),
        process::thread_count(pid).unwrap(),
    );
    for _ in 0..50 {
        session(&rig);
    }
    until("idle again", || {
        process::mappings_of(pid, "guest-memory").unwrap() == 0
    });
    until("descriptors are back", || {
        process::fd_count(pid).unwrap() <= fds
    });
    assert!(process::mapping_count(pid).unwrap() <= maps + 8);
    assert!(process::thread_count(pid).unwrap() <= threads);
    rig.assert_serves_a_new_client();
}

#[test]
fn target_whose_source_never_hands_over() {
    let mut rig = Rig::with("qcow2", 16 * MIB, |d| d);
    // The handshake and the configuration space, then the end: no ring was ever started.
    let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    assert_eq!(device.capacity(), 16 * MIB);
    drop(device);
    rig.assert_serves_a_new_client();
}
