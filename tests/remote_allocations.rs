//! In the steady state a request to a remote namespace allocates no memory on the thread that makes it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtioblkd::block::nvme_tcp::NvmeStorage;
use virtioblkd::block::nvme_tcp::link::{
    Access, ControllerLimits, Geometry, IoConnection, MemberEvent, Namespace, PathCommand,
    PathState, SharedPath, Wire,
};
use virtioblkd::block::nvme_tcp::machine::QueueParams;
use virtioblkd::block::nvme_tcp::spec::{Address, NamespaceName, NvmeOptions, NvmeSpec};
use virtioblkd::block::{Limits, Storage};
use virtioblkd::reactor::{Epochs, Io, IoConfig};

#[expect(
    dead_code,
    reason = "the controller of the queues' own tests, which have a use for all of it"
)]
#[path = "../src/block/nvme_tcp/queue/tests/peer.rs"]
mod peer;

use peer::{Options, Peer};

struct Counting;

thread_local! {
    /// Allocations of this thread; none: they are not counted.
    static COUNT: Cell<Option<u64>> = const { Cell::new(None) };
}

fn count() {
    COUNT.with(|count| count.set(count.get().map(|n| n + 1)));
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

const SIZE: usize = 16 << 20;
const DEPTH: u64 = 32;

fn namespace(path: Arc<SharedPath>) -> Namespace {
    let spec = NvmeSpec {
        addresses: vec![Address {
            host: "127.0.0.1".into(),
            port: 4420,
        }],
        subsystem: "nqn.2014-08.org.example:test".into(),
        namespace: NamespaceName::Nsid(1),
        read_only: false,
        options: Arc::new(NvmeOptions::default()),
    };
    let geometry = Geometry {
        block: 512,
        limits: Limits {
            io_align: 512,
            ..Limits::default()
        },
        boundary: 0,
        deallocated_reads_zero: true,
        identity: [1; 16],
    };
    Namespace::new(
        spec,
        PathBuf::from("test"),
        geometry,
        SIZE as u64,
        Box::new([path]),
    )
}

fn connection(peer: &Peer, digests: bool) -> IoConnection {
    IoConnection {
        path: 0,
        generation: 1,
        qid: 1,
        wire: Wire::Plain(peer.connect()),
        params: QueueParams {
            // Fewer than there are requests: some wait.
            depth: DEPTH as u16 - 4,
            header_digest: digests,
            data_digest: digests,
            host_pdu_alignment: 4,
            controller_pdu_alignment: 4,
            max_h2c_data: 16 << 10,
            in_capsule: 8192,
            max_r2t: 4,
        },
        limits: ControllerLimits {
            // Less than the longest request: some are cut.
            max_transfer: 32 << 10,
            discards: true,
            max_discard_ranges: 1,
            max_discard_range_blocks: u32::MAX,
            max_discard_blocks: u64::MAX,
            max_write_zeroes: None,
            volatile_write_cache: true,
            retry_delays: [0; 3],
        },
        nsid: 1,
    }
}

/// Reads and writes 4 to 64 KiB, and flushes, for ever.
async fn load(io: Io, storage: Rc<Storage>, n: u64, done: Rc<Cell<u64>>) {
    let mut buf = io.buf(64 << 10);
    for round in n.. {
        let len = 4096usize << (round % 5);
        let offset = (round * 7919 % 200) * 65_536;
        let data = buf.sg().split_at(len).0;
        let ended = match round % 16 {
            0 => storage.flush(&io).await,
            m if m % 2 == 0 => storage.read(&io, offset, data).await,
            _ => storage.write(&io, offset, data).await,
        };
        ended.expect("it serves");
        done.set(done.get() + 1);
    }
}

/// The least that a round of requests allocates.
fn allocations(digests: bool) -> u64 {
    let options = Options {
        header_digest: digests,
        data_digest: digests,
        ..Options::default()
    };
    let peer = Peer::new(SIZE, options);
    let path = Arc::new(SharedPath::new().unwrap());
    path.set_state(PathState::Live);
    path.set_access(Access::Optimized);
    let namespace = Arc::new(namespace(path.clone()));
    let storage = Rc::new(Storage::Nvme(Box::new(NvmeStorage::new(namespace))));
    let io = Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring");
    let done = Rc::new(Cell::new(0));
    for n in 0..DEPTH {
        io.spawn(load(io.clone(), storage.clone(), n, done.clone()));
    }
    io.turn();
    for command in path.take_commands() {
        if let PathCommand::Join(member) = command {
            let connection = Box::new(connection(&peer, digests));
            member.send(MemberEvent::Connected(connection));
        }
    }
    let start = Instant::now();
    let mut least = u64::MAX;
    for _ in 0..20 {
        let end = done.get() + 4000;
        // The peer remembers what it saw.
        peer.forget();
        COUNT.with(|count| count.set(Some(0)));
        while done.get() < end {
            if !io.turn() {
                io.park(Some(Duration::from_secs(1)));
            }
            assert!(start.elapsed() < Duration::from_secs(300), "it hangs");
        }
        let made = COUNT.with(|count| count.take()).unwrap_or(0);
        least = least.min(made);
        if least == 0 {
            break;
        }
    }
    io.close();
    least
}

#[test]
fn a_request_to_a_remote_namespace_allocates_nothing() {
    assert_eq!(allocations(false), 0, "without digests");
    assert_eq!(allocations(true), 0, "with digests");
}
