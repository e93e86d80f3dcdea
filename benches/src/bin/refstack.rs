//! The reference stack: a vhost-user-blk backend on the crates of the rust-vmm project, as their authors use them.
//!
//! `vhost-user-backend` has the session and the event loop (one epoll thread a queue), `virtio-queue` the rings,
//! `vm-memory` the guest's memory. It is something to measure against, and nothing else: it trusts the guest where
//! that costs nothing to anybody but a benchmark, and serves one connection. What costs time is done as well as the
//! crates allow: ring indices with `EVENT_IDX`, one lock, one look at the memory map and one signal a batch, data
//! straight between guest memory and file, and a queue that is looked at for a while before its thread sleeps.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use libc::iovec;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{self, Listener};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringState, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// Serve a disk with the crates of the rust-vmm project, to measure against
#[derive(Debug, Parser)]
struct Args {
    /// The socket to listen on
    #[arg(long)]
    socket_path: PathBuf,
    /// Queues, each with a thread
    #[arg(long, default_value_t = 1)]
    num_queues: usize,
    /// Descriptors a queue can have at most
    #[arg(long, default_value_t = 256)]
    queue_size: usize,
    /// null:SIZE (with K, M, G or T), or a raw file
    #[arg(long)]
    blk_file: String,
    /// Open the file past the page cache
    #[arg(long)]
    direct: bool,
    /// Microseconds for which an empty queue is looked at before its thread sleeps
    #[arg(long, default_value_t = 50)]
    poll_us: u64,
}

type Memory = GuestMemoryMmap<()>;

const SECTOR: u64 = 512;
/// The most data descriptors a driver is told to use.
const SEG_MAX: u32 = 126;

/// Where the bytes are.
enum Disk {
    /// Reads give zeros, writes are dropped.
    Null,
    /// One synchronous system call a request.
    File(File),
}

struct Backend {
    disk: Disk,
    /// Bytes.
    capacity: u64,
    queues: usize,
    queue_size: usize,
    poll: Duration,
    memory: GuestMemoryAtomic<Memory>,
    event_idx: AtomicBool,
}

/// What a driver finds in a request, gathered for one system call.
#[derive(Default)]
struct Buffers {
    data: Vec<iovec>,
    len: u64,
}

impl Backend {
    /// Serves all that a queue has. Returns true if there was anything.
    fn serve(&self, vring: &VringRwLock, buffers: &mut Buffers) -> io::Result<bool> {
        let guard = self.memory.memory();
        let memory: &Memory = &guard;
        let mut state = vring.get_mut();
        let state: &mut VringState = &mut state;
        let queue = state.get_queue_mut();
        if !queue.ready() {
            return Ok(false);
        }
        let chains = queue.iter(memory).map_err(io::Error::other)?;
        let chains: Vec<DescriptorChain<&Memory>> = chains.collect();
        if chains.is_empty() {
            return Ok(false);
        }
        for chain in chains {
            let head = chain.head_index();
            let written = self.request(memory, chain, buffers).unwrap_or(0);
            queue
                .add_used(memory, head, written)
                .map_err(io::Error::other)?;
        }
        if state.needs_notification().map_err(io::Error::other)? {
            state.signal_used_queue()?;
        }
        Ok(true)
    }

    /// Executes one request; returns how many bytes were written to the guest. None: it has no place for a status.
    fn request(
        &self,
        memory: &Memory,
        mut chain: DescriptorChain<&Memory>,
        buffers: &mut Buffers,
    ) -> Option<u32> {
        let header = chain.next()?;
        let kind: u32 = memory.read_obj(header.addr()).ok()?;
        let sector: u64 = memory.read_obj(GuestAddress(header.addr().0 + 8)).ok()?;
        buffers.data.clear();
        buffers.len = 0;
        let mut last = chain.next()?;
        for next in chain {
            let slice = memory.get_slice(last.addr(), last.len() as usize).ok()?;
            buffers.data.push(iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            buffers.len += u64::from(last.len());
            last = next;
        }
        let done = self.execute(kind, sector, buffers);
        let (status, data) = match done {
            Ok(read) => (VIRTIO_BLK_S_OK, read),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(_) => (VIRTIO_BLK_S_IOERR, 0),
        };
        memory.write_obj(status as u8, last.addr()).ok()?;
        Some(data as u32 + 1)
    }

    /// Returns how many bytes were put into the buffers.
    fn execute(&self, kind: u32, sector: u64, buffers: &Buffers) -> io::Result<u64> {
        let offset = sector.saturating_mul(SECTOR);
        let fits = offset
            .checked_add(buffers.len)
            .is_some_and(|end| end <= self.capacity);
        match kind {
            VIRTIO_BLK_T_IN if fits => self.read(offset, buffers).map(|()| buffers.len),
            VIRTIO_BLK_T_OUT if fits => self.write(offset, buffers).map(|()| 0),
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(io::ErrorKind::InvalidInput.into()),
            VIRTIO_BLK_T_FLUSH => match &self.disk {
                Disk::Null => Ok(0),
                Disk::File(file) => file.sync_data().map(|()| 0),
            },
            VIRTIO_BLK_T_GET_ID => {
                zero(buffers);
                Ok(buffers.len)
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn read(&self, offset: u64, to: &Buffers) -> io::Result<()> {
        let Disk::File(file) = &self.disk else {
            zero(to);
            return Ok(());
        };
        // SAFETY: the buffers are guest memory that the caller keeps mapped.
        let read = unsafe {
            libc::preadv(
                file.as_raw_fd(),
                to.data.as_ptr(),
                to.data.len() as i32,
                offset as i64,
            )
        };
        whole(read, to.len)
    }

    fn write(&self, offset: u64, from: &Buffers) -> io::Result<()> {
        let Disk::File(file) = &self.disk else {
            return Ok(());
        };
        // SAFETY: as in `read`.
        let written = unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                from.data.as_ptr(),
                from.data.len() as i32,
                offset as i64,
            )
        };
        whole(written, from.len)
    }
}

fn whole(done: isize, len: u64) -> io::Result<()> {
    match done {
        done if done < 0 => Err(io::Error::last_os_error()),
        done if done as u64 == len => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn zero(buffers: &Buffers) {
    for buffer in &buffers.data {
        // SAFETY: as in `Backend::read`; no Rust reference to guest memory exists.
        unsafe { buffer.iov_base.cast::<u8>().write_bytes(0, buffer.iov_len) };
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.queues
    }

    fn max_queue_size(&self) -> usize {
        self.queue_size
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let all = bits.iter().fold(0, |all, bit| all | 1 << bit);
        all | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    /// `struct virtio_blk_config` (virtio 5.2.4), as far as the features go.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0u8; 60];
        config[0..8].copy_from_slice(&(self.capacity / SECTOR).to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..24].copy_from_slice(&(SECTOR as u32).to_le_bytes());
        config[34..36].copy_from_slice(&(self.queues as u16).to_le_bytes());
        let end = (offset as usize).saturating_add(size as usize);
        config.get(offset as usize..end).unwrap_or(&[]).to_vec()
    }

    fn update_memory(&self, _: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        // It is the map that this has been given at the start, with new contents.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.queues).map(|queue| 1 << queue).collect()
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        device_event: u16,
        _: EventSet,
        vrings: &[VringRwLock],
        _: usize,
    ) -> io::Result<()> {
        let vring = &vrings[usize::from(device_event)];
        let mut buffers = Buffers::default();
        if !self.event_idx.load(Ordering::Relaxed) {
            self.serve(vring, &mut buffers)?;
            return Ok(());
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            let mut idle_since = None;
            loop {
                if self.serve(vring, &mut buffers)? {
                    idle_since = None;
                    continue;
                }
                let now = Instant::now();
                if now - *idle_since.get_or_insert(now) >= self.poll {
                    break;
                }
                std::hint::spin_loop();
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn disk(args: &Args) -> Result<(Disk, u64), String> {
    if let Some(size) = args.blk_file.strip_prefix("null:") {
        let (digits, shift) = match size.chars().last() {
            Some('K') => (&size[..size.len() - 1], 10),
            Some('M') => (&size[..size.len() - 1], 20),
            Some('G') => (&size[..size.len() - 1], 30),
            Some('T') => (&size[..size.len() - 1], 40),
            _ => (size, 0),
        };
        let number: Result<u64, _> = digits.parse();
        let bytes = number.ok().and_then(|n| n.checked_mul(1 << shift));
        let bytes = bytes.ok_or_else(|| format!("{size} is no size; write 16G, say"))?;
        return Ok((Disk::Null, bytes));
    }
    let flags = if args.direct { libc::O_DIRECT } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(&args.blk_file);
    let file = file.map_err(|error| format!("opening {}: {error}", args.blk_file))?;
    let metadata = file.metadata();
    let bytes = metadata.map_err(|error| format!("{}: {error}", args.blk_file))?;
    Ok((Disk::File(file), bytes.len() / SECTOR * SECTOR))
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("refstack: {error}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), String> {
    if !(1..=64).contains(&args.num_queues) {
        return Err("--num-queues is from 1 to 64".into());
    }
    let (disk, capacity) = disk(args)?;
    let memory = GuestMemoryAtomic::new(Memory::new());
    let backend = Backend {
        disk,
        capacity,
        queues: args.num_queues,
        queue_size: args.queue_size,
        poll: Duration::from_micros(args.poll_us),
        memory: memory.clone(),
        event_idx: AtomicBool::new(false),
    };
    let mut daemon = VhostUserDaemon::new("refstack".into(), Arc::new(backend), memory)
        .map_err(|error| error.to_string())?;
    // What a killed one left there.
    let _ = std::fs::remove_file(&args.socket_path);
    let mut listener = Listener::new(&args.socket_path, true).map_err(|error| error.to_string())?;
    daemon
        .start(&mut listener)
        .map_err(|error| error.to_string())?;
    match daemon.wait() {
        // The end that every client makes.
        Err(vhost_user_backend::Error::HandleRequest(vhost_user::Error::Disconnected)) => Ok(()),
        ended => ended.map_err(|error| error.to_string()),
    }
}
