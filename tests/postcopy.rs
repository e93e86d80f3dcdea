//! Postcopy migration, seen by a backend that the VM comes to: its pages come late, or never.

mod common;

use std::os::fd::AsRawFd;

use common::{Rig, SOON, fill_with_reads, until};
use vhost_user_frontend as frontend;

use frontend::blk::{request_type, status};
use frontend::protocol::protocol_feature::PAGEFAULT;
use frontend::protocol::{flag, request};
use frontend::{Device, DeviceOptions, Op, message, process, sys};

const MIB: u64 = 1 << 20;

/// A VM that has written to its disk, about to move; none where the daemon may not have a userfaultfd.
fn vm(rig: &Rig) -> Option<Device> {
    let mut device = rig.device_with(DeviceOptions {
        queues: 2,
        ..DeviceOptions::default()
    });
    let offered = device.client().unwrap().get_protocol_features().unwrap();
    if offered & PAGEFAULT == 0 {
        println!("not tested: the daemon may not have a userfaultfd");
        return None;
    }
    for n in 0..64u8 {
        device.write(u64::from(n) * 8, &[n + 1; 4096]).unwrap();
    }
    Some(device)
}

fn rig(format: &str) -> Rig {
    Rig::with(format, 16 * MIB, |disk| disk.queues(2).workers(2))
}

#[test]
fn vm_runs_while_its_pages_come() {
    for format in ["raw", "qcow2"] {
        let rig = rig(format);
        let Some(mut device) = vm(&rig) else { return };
        for round in 0..3u8 {
            // The same daemon is source and target: what it had mapped of the memory is gone with the connection.
            device.move_by_postcopy(rig.daemon.socket()).unwrap();
            let present = device.memory.regions().iter();
            let present: u64 = present.map(|r| r.allocated().unwrap()).sum();
            assert!(present < MIB, "{present} bytes came before anybody asked");

            // Reads land in pages that are missing, and all requests lie in some.
            for n in 0..64u64 {
                let len = 4096 + 512 * (n as u32 % 3);
                let queue = (n % 2) as usize;
                let (done, data) = device
                    .run_on(queue, Op::Read { sector: 8 * n, len })
                    .unwrap();
                assert_eq!(done.status, status::OK);
                assert!(data[..4096].iter().all(|byte| u64::from(*byte) == n + 1));
            }
            // A write from a page that has not come carries what the source had there.
            let address = device.memory.alloc(2 * 4096, 4096);
            device.memory.fill(address, 4096, 0xa0 + round);
            let waiting = fill_with_reads(&mut device, 4096);
            for _ in 0..waiting {
                let done = device.queue(0).wait(SOON).unwrap();
                assert_eq!(done.status, status::OK);
                device.queue(0).release(done);
            }
            let served = device.pages().served();
            assert!(served > 0, "the backend faulted on no page");
            device.end_postcopy().unwrap();

            device.write(1024, &[0xc0 + round; 512]).unwrap();
            assert_eq!(device.read(1024, 512).unwrap(), [0xc0 + round; 512]);
            assert_eq!(device.memory.read_vec(address, 4096), [0xa0 + round; 4096]);
        }
        device.shut_down().unwrap();
        let pid = rig.daemon.pid();
        until("nothing is left", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
                && process::mappings_of(pid, "userfaultfd").unwrap() == 0
        });
    }
}

#[test]
fn write_from_a_page_that_has_not_come_carries_what_the_source_had_there() {
    let rig = rig("raw");
    let Some(mut device) = vm(&rig) else { return };
    let raws: Vec<_> = (0..32u64)
        .map(|n| {
            let raw = common::Raw::new(&device.memory, request_type::OUT, 4096 + 8 * n, 8192);
            device.memory.fill(raw.data, 8192, n as u8 + 0x80);
            raw
        })
        .collect();
    device.move_by_postcopy(rig.daemon.socket()).unwrap();
    for (n, raw) in raws.iter().enumerate() {
        // Every other one off the sectors, so that the processor copies, too.
        let bufs = [
            raw.header_buf(),
            frontend::Buf::readable(raw.data + 256 * (n as u64 % 2), 4096),
            raw.status_buf(),
        ];
        assert_eq!(common::run_chain(&mut device, &bufs), 1);
        assert_eq!(raw.status(&device.memory), status::OK);
    }
    device.end_postcopy().unwrap();
    for n in 0..32u64 {
        let data = device.read(4096 + 8 * n, 4096).unwrap();
        assert!(data.iter().all(|byte| *byte == n as u8 + 0x80), "write {n}");
    }
    device.shut_down().unwrap();
}

#[test]
fn vmm_that_dies_while_workers_wait_for_pages_leaves_nothing_behind() {
    let mut rig = rig("qcow2");
    for round in 0..10 {
        let Some(mut device) = vm(&rig) else { return };
        device.move_by_postcopy(rig.daemon.socket()).unwrap();
        // A first request that works, then the source dies: what the next ones need never comes.
        if round % 2 == 0 {
            device.read(0, 4096).unwrap();
        }
        let raw = common::Raw::new(&device.memory, request_type::IN, 0, 65536);
        let bufs = [
            raw.header_buf(),
            frontend::Buf::writable(raw.data, 65536),
            raw.status_buf(),
        ];
        device.queue(0).ring.add(&bufs, 0).unwrap();
        device.pages().die();
        device.queue(0).ring.publish();
        until("a worker waits for a page", || {
            device.pages().unserved() > 0
        });
        if round % 4 < 2 {
            // Now the control thread waits for that worker.
            let client = device.client().unwrap();
            let ring = message::vring_state(0, 0);
            client
                .send(request::GET_VRING_BASE, flag::VERSION, &ring, &[])
                .unwrap();
            let unread = || sys::queued_bytes(client.stream().as_raw_fd()).unwrap();
            until("the message is taken", || unread() == 0);
        }
        device.disconnect();
        drop(device);
        rig.assert_serves_a_new_client();
        let pid = rig.daemon.pid();
        until("the memory is let go", || {
            process::mappings_of(pid, "guest-memory").unwrap() == 0
        });
    }
    rig.daemon.terminate();
    frontend::qemu::check_clean(&rig.image());
}
