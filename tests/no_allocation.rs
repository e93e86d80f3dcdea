//! In the steady state a request allocates no memory: not in the worker, not in the storage stack.
//!
//! The whole daemon runs in this process, under an allocator that counts what every thread but the
//! guest's allocates.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vhost_user_frontend::{Device, DeviceOptions, Op, TempDir, qemu};
use virtioblkd::assembly;
use virtioblkd::cli::{self, Invocation};
use virtioblkd::config::Host;

mod common;

use common::SOON;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// True on the thread that plays the guest.
    static GUEST: Cell<bool> = const { Cell::new(false) };
}

fn count() {
    if !GUEST.with(Cell::get) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const SIZE: u64 = 16 << 20;
const DEPTH: usize = 32;
const ROUNDS: usize = 20;

/// What a guest does, with `DEPTH` requests in flight.
#[derive(Clone, Copy, PartialEq)]
enum Load {
    /// Reads and writes 4 to 32 KiB anywhere, and flushes now and then.
    Random,
    /// The same without flushes.
    RandomUnflushed,
    /// Writes 4 KiB behind each other, and reads them behind each other: many become one transfer.
    Sequential,
}

fn load(device: &mut Device, requests: u64, load: Load) {
    let timeout = SOON;
    let mut seed = 1u64;
    let mut sent = 0;
    let mut done = 0;
    let start = Instant::now();
    let queue = device.queue(0);
    while done < requests {
        assert!(start.elapsed() < timeout * 4, "{done} of {requests}");
        while sent < requests && sent - done < DEPTH as u64 {
            seed = seed
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let len = 4096 << (seed >> 60 & 3);
            let sector = (seed >> 20) % ((SIZE - len) / 4096) * 8;
            let len = len as u32;
            let op = match seed >> 40 & 63 {
                _ if load == Load::Sequential => {
                    let sector = sent * 8 % (SIZE / 512);
                    match sent * 4096 / SIZE % 2 {
                        0 => Op::WriteInPlace { sector, len: 4096 },
                        _ => Op::Read { sector, len: 4096 },
                    }
                }
                0 if load == Load::Random => Op::Flush,
                n if n % 2 == 0 => Op::Read { sector, len },
                _ => Op::WriteInPlace { sector, len },
            };
            queue.submit(op, sent).expect("a free slot");
            sent += 1;
        }
        queue.ring.publish();
        let completion = queue.wait(timeout).expect("a completion");
        assert_eq!(completion.status, 0);
        queue.release(completion);
        done += 1;
    }
}

/// The least that a round of 20,000 requests allocates.
fn allocations(dir: &TempDir, file: &str, format: &str, what: Load) -> u64 {
    let socket = dir.join("socket");
    let args = [
        "virtioblkd",
        "--socket-path",
        socket.to_str().unwrap(),
        "--blk-file",
        file,
        "--format",
        format,
        "--num-queues",
        "1",
        "--once",
        "--log-level",
        "warn",
    ];
    let Ok(Invocation::Run(config)) = cli::load_from(args, &Host::of_this_process()) else {
        panic!("the command line was refused");
    };
    let daemon = std::thread::spawn(move || assembly::run(&config).expect("the daemon"));
    wait_for(&socket);
    let mut device = Device::start(&socket, DeviceOptions::default()).expect("a device");
    // A slot is made when its head descriptor is first used, a buffer when its size is first needed: the
    // steady state begins when a round has needed nothing new.
    let mut least = u64::MAX;
    for _ in 0..ROUNDS {
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        load(&mut device, 20_000, what);
        let made = ALLOCATIONS.load(Ordering::SeqCst) - before;
        least = least.min(made);
        if least == 0 {
            break;
        }
    }
    device.disconnect();
    daemon.join().expect("the daemon's thread");
    least
}

fn wait_for(socket: &Path) {
    let start = Instant::now();
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        assert!(start.elapsed() < SOON, "nobody listens");
        std::thread::yield_now();
    }
}

/// One test, since the count is the whole process's.
#[test]
fn a_request_in_the_steady_state_allocates_nothing() {
    GUEST.with(|guest| guest.set(true));
    let dir = TempDir::new();

    let null = allocations(&dir, "null:16M", "raw", Load::Random);
    assert_eq!(null, 0, "null");

    let raw = dir.join("raw");
    std::fs::write(&raw, vec![1; SIZE as usize]).unwrap();
    let file = raw.to_str().unwrap();
    let raw = allocations(&dir, file, "raw", Load::Random);
    assert_eq!(raw, 0, "a raw file");
    let raw = allocations(&dir, file, "raw", Load::Sequential);
    assert_eq!(raw, 0, "a raw file, sequentially");

    let qcow2 = dir.join("qcow2");
    qemu::create(&qcow2, "qcow2", SIZE, "");
    // The warm-up allocates every cluster; what follows is overwritten in place.
    let file = qcow2.to_str().unwrap();
    let qcow2 = allocations(&dir, file, "qcow2", Load::RandomUnflushed);
    assert_eq!(qcow2, 0, "a qcow2 image");
    let qcow2 = allocations(&dir, file, "qcow2", Load::Sequential);
    assert_eq!(qcow2, 0, "a qcow2 image, sequentially");
}
