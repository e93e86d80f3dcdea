//! Guest memory that loses its pages: the VM it belongs to ends, and nobody else notices.

mod common;

use std::fs::File;
use std::process::Command;
use std::time::Duration;

use common::{Raw, Rig, SOON, file_bytes, fill_with_reads, program, until};
use vhost_user_frontend as frontend;

use frontend::blk::{request_type, status};
use frontend::memory::Region;
use frontend::{
    Buf, Client, Daemon, Device, DeviceOptions, Outcome, Program, RegionSpec, TempDir, process,
};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Where the region that is lost begins.
const LOST: u64 = 1 << 34;

/// A device with one region more, whose file is to be truncated.
fn with_region(rig: &Rig, size: u64) -> (Device, std::sync::Arc<Region>) {
    let mut device = rig.device();
    let region = device.memory.add(RegionSpec::new(LOST, size)).unwrap();
    device.client().unwrap().add_mem_reg(&region).unwrap();
    (device, region)
}

/// What becomes of a chain that touches lost memory: it is never completed, and the connection ends.
fn never_completed(device: &mut Device, bufs: &[Buf]) {
    let ring = &mut device.queue(0).ring;
    ring.add(bufs, 0).unwrap();
    ring.publish();
    let outcome = ring.split().wait_outcome(SOON).unwrap();
    assert_eq!(outcome, Outcome::Broken, "the error file is signalled");
    let client = device.client().unwrap();
    assert!(client.closed_within(SOON).unwrap(), "the connection ends");
    assert_eq!(device.queue(0).ring.split().pop_used_raw(), None);
}

fn assert_said(rig: &mut Rig) {
    rig.daemon.assert_alive();
    let log = rig.daemon.log();
    assert!(log.contains("has lost its pages"), "{log}");
    assert!(log.contains("Restart the VM"), "{log}");
}

fn is_ours() -> bool {
    matches!(program(), Program::Virtioblkd(_))
}

#[test]
fn truncated_memory_of_one_vm_ends_its_session_and_no_other() {
    let Program::Virtioblkd(path) = program() else {
        return;
    };
    let dir = TempDir::new();
    let mut config = String::from("[workers]\ncount = 1\n");
    for name in ["one", "two"] {
        let image = dir.join(name);
        File::create(&image).unwrap().set_len(16 * MIB).unwrap();
        config += &format!(
            "[[disk]]\nname = '{name}'\nblk-file = '{}'\nformat = 'raw'\nsocket-path = '{}'\n",
            image.display(),
            dir.join(format!("{name}.sock")).display()
        );
    }
    std::fs::write(dir.join("vm.toml"), config).unwrap();
    let socket = |name: &str| dir.join(format!("{name}.sock"));
    let mut command = Command::new(path);
    command.arg("--config").arg(dir.join("vm.toml"));
    let mut daemon = Daemon::spawn_command(&mut command, &socket("one"), dir.path());
    daemon.wait_listening(SOON);
    until("the second disk is served", || {
        process::is_listening(&socket("two")).unwrap()
    });

    let start = |name| Device::start(&socket(name), DeviceOptions::default()).unwrap();
    let mut other = start("two");
    other.write(0, &[0x22; 65536]).unwrap();
    let descriptors = process::fd_count(daemon.pid()).unwrap();
    let mappings = process::mappings_of(daemon.pid(), "guest-memory").unwrap();
    for round in 0..10u8 {
        let mut device = start("one");
        device.write(0, &[round; 65536]).unwrap();
        device.flush().unwrap();
        // Under load, with reads of both in flight.
        fill_with_reads(&mut device, 65536);
        let waiting = fill_with_reads(&mut other, 4096);
        for region in device.memory.regions() {
            region.truncate(0).unwrap();
        }
        let client = device.client().unwrap();
        assert!(client.closed_within(SOON).unwrap(), "round {round}");
        device.disconnect();
        for _ in 0..waiting {
            let done = other.queue(0).wait(SOON).unwrap();
            assert_eq!(done.status, status::OK);
            other.queue(0).release(done);
        }
        assert_eq!(other.read(0, 65536).unwrap(), vec![0x22; 65536]);
        // The disk was flushed and let go, and is served to the next VMM.
        let mut again = start("one");
        assert_eq!(again.read(0, 65536).unwrap(), vec![round; 65536]);
        again.shut_down().unwrap();
    }
    until("nothing is left of the memory", || {
        process::mappings_of(daemon.pid(), "guest-memory").unwrap() == mappings
            && process::fd_count(daemon.pid()).unwrap() <= descriptors
    });
    other.shut_down().unwrap();
    let log = daemon.log();
    assert_eq!(
        log.matches("has lost its pages: the VMM").count(),
        10,
        "{log}"
    );
    assert!(!log.contains("two: the connection ends"), "{log}");
    daemon.terminate();
}

#[test]
fn idle_ring_of_lost_memory_ends_at_its_next_request() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[5; 512]).unwrap();
    for region in device.memory.regions() {
        region.truncate(0).unwrap();
    }
    device.queue(0).ring.kick_fd().signal().unwrap();
    let client = device.client().unwrap();
    assert!(client.closed_within(SOON).unwrap());
    assert!(device.queue(0).ring.err_fd().wait(SOON).unwrap());
    device.disconnect();
    assert_said(&mut rig);
    rig.assert_serves_a_new_client();
}

#[test]
fn request_whose_header_is_half_lost_is_not_executed() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    let (mut device, region) = with_region(&rig, 2 * PAGE);
    device.write(0, &[0x11; 4096]).unwrap();
    // A write to sector 64; of the header the type is in the page that stays, and the sector in the other one,
    // which would read as sector 0.
    let raw = Raw::new(&device.memory, request_type::OUT, 64, 4096);
    device.memory.fill(raw.data, 4096, 0xee);
    let header = LOST + PAGE - 8;
    let bytes = frontend::blk::header(request_type::OUT, 64);
    device.memory.write(header, &bytes);
    region.truncate(PAGE).unwrap();
    let bufs = [
        Buf::readable(header, 16),
        Buf::readable(raw.data, 4096),
        raw.status_buf(),
    ];
    never_completed(&mut device, &bufs);
    device.disconnect();
    assert_said(&mut rig);
    assert_eq!(file_bytes(&rig.image(), 0, 4096), [0x11; 4096]);
    assert_eq!(file_bytes(&rig.image(), 64 * 512, 4096), [0; 4096]);
    rig.assert_serves_a_new_client();
}

#[test]
fn range_of_a_discard_that_is_half_lost_is_not_discarded() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    let (mut device, region) = with_region(&rig, 2 * PAGE);
    device.write(0, &[0x11; 65536]).unwrap();
    let raw = Raw::new(&device.memory, request_type::WRITE_ZEROES, 0, 16);
    // Sector 0 and 128 sectors; flags in the page that goes.
    let range = LOST + PAGE - 12;
    device.memory.write(range, &0u64.to_le_bytes());
    device.memory.write(range + 8, &128u32.to_le_bytes());
    region.truncate(PAGE).unwrap();
    let bufs = [raw.header_buf(), Buf::readable(range, 16), raw.status_buf()];
    never_completed(&mut device, &bufs);
    device.disconnect();
    assert_said(&mut rig);
    assert_eq!(file_bytes(&rig.image(), 0, 65536), [0x11; 65536]);
}

#[test]
fn read_that_is_copied_into_a_lost_page_is_not_completed() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    let (mut device, region) = with_region(&rig, 2 * PAGE);
    region.truncate(0).unwrap();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 1);
    // Not aligned as O_DIRECT wants it: the processor copies.
    let bufs = [
        raw.header_buf(),
        Buf::writable(LOST + 1, 4096),
        raw.status_buf(),
    ];
    never_completed(&mut device, &bufs);
    device.disconnect();
    assert_said(&mut rig);
    rig.assert_serves_a_new_client();
}

#[test]
fn read_whose_status_goes_to_a_lost_page_is_not_completed() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    let (mut device, region) = with_region(&rig, PAGE);
    region.truncate(0).unwrap();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 4096);
    let bufs = [
        raw.header_buf(),
        Buf::writable(raw.data, 4096),
        Buf::writable(LOST + 17, 1),
    ];
    never_completed(&mut device, &bufs);
    device.disconnect();
    assert_said(&mut rig);
}

#[test]
fn read_by_the_kernel_into_a_lost_page_is_an_error_and_the_vm_goes_on() {
    let mut rig = Rig::raw(MIB);
    let (mut device, region) = with_region(&rig, 2 * PAGE);
    region.truncate(0).unwrap();
    let raw = Raw::new(&device.memory, request_type::IN, 0, 1);
    let bufs = [
        raw.header_buf(),
        Buf::writable(LOST, 4096),
        raw.status_buf(),
    ];
    common::run_chain(&mut device, &bufs);
    assert_eq!(raw.status(&device.memory), status::IOERR);
    device.write(0, &[7; 512]).unwrap();
    assert_eq!(device.read(0, 512).unwrap(), [7; 512]);
    device.shut_down().unwrap();
    rig.daemon.assert_alive();
}

#[test]
fn stop_of_a_ring_whose_memory_is_lost_is_not_answered() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    device.write(0, &[1; 512]).unwrap();
    for region in device.memory.regions() {
        region.truncate(0).unwrap();
    }
    // The last look at the ring, which asks for notifications, is where the loss shows.
    assert!(device.client().unwrap().get_vring_base(0).is_err());
    device.disconnect();
    rig.assert_serves_a_new_client();
    until("it is said", || {
        rig.daemon.log().contains("lost its memory") || rig.daemon.log().contains("lost its pages")
    });
}

#[test]
fn huge_pages_that_run_out_end_the_vm_and_the_next_one_is_served() {
    if !is_ours() {
        return;
    }
    let Some(pages) = frontend::memory::HugePages::reserve(2) else {
        return;
    };
    let mut rig = Rig::raw(MIB);
    let mut device = rig.device();
    // More than there is: who maps it without reserving finds out when touching it.
    let spec = RegionSpec::new(LOST, pages.free() * pages.size() + pages.size());
    let region = Region::huge(spec).unwrap();
    let region = device.memory.push(region);
    device.client().unwrap().add_mem_reg(&region).unwrap();
    let mut lost = false;
    let mut at = LOST;
    while at < LOST + spec.size {
        // One byte over the end of a page that may be the last.
        let raw = Raw::new(&device.memory, request_type::IN, 0, 1);
        let bufs = [
            raw.header_buf(),
            Buf::writable(at + 1, 512),
            raw.status_buf(),
        ];
        let ring = &mut device.queue(0).ring;
        ring.add(&bufs, 0).unwrap();
        ring.publish();
        match ring.split().wait_outcome(SOON).unwrap() {
            Outcome::Used { .. } => at += pages.size(),
            outcome => {
                assert_eq!(outcome, Outcome::Broken);
                lost = true;
                break;
            }
        }
    }
    assert!(lost, "there were pages enough after all");
    assert!(device.client().unwrap().closed_within(SOON).unwrap());
    drop((device, region));
    assert_said(&mut rig);
    rig.assert_serves_a_new_client();
}

#[test]
fn sigbus_from_outside_still_ends_the_process_with_a_word() {
    if !is_ours() {
        return;
    }
    let mut rig = Rig::raw(MIB);
    rig.daemon.signal(libc::SIGBUS);
    let exit = rig.daemon.wait_exit(Duration::from_secs(60));
    assert_eq!(exit.code(), Some(1));
    assert!(rig.daemon.log().contains("SIGBUS"), "{}", rig.daemon.log());
    let _ = Client::connect(rig.daemon.socket());
}
