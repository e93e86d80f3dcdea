//! What the integration tests share: a daemon on an image in a directory of its own.
#![allow(dead_code, missing_docs, reason = "each test binary uses a part of it")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vhost_user_frontend::blk::status;
use vhost_user_frontend::{
    Buf, Client, Daemon, Desc, Device, DeviceOptions, Disk, Error, Memory, Op, Outcome, Program,
    TempDir, Virtqueue, qemu,
};

/// Deadline of what should take milliseconds; generous, since tests share two processors.
pub const SOON: Duration = Duration::from_secs(60);

/// How long a chain that may be too broken to complete is waited for. `VIRTIOBLKD_TEST_SILENCE` (seconds)
/// shortens it for a backend that is known to say nothing.
pub fn silence() -> Duration {
    let seconds = std::env::var("VIRTIOBLKD_TEST_SILENCE").ok();
    seconds
        .and_then(|s| s.parse().ok())
        .map_or(SOON, Duration::from_secs)
}

/// The daemon under test. `VIRTIOBLKD_TEST_BACKEND=qemu-storage-daemon` puts QEMU's in its place, to check the
/// tests themselves (it fails some: they are its known bugs).
pub fn program() -> Program {
    match std::env::var("VIRTIOBLKD_TEST_BACKEND").as_deref() {
        Ok("qemu-storage-daemon") => Program::QemuStorageDaemon,
        _ => Program::Virtioblkd(PathBuf::from(env!("CARGO_BIN_EXE_virtioblkd"))),
    }
}

/// A daemon, its disk, and the directory they live in.
pub struct Rig {
    pub daemon: Daemon,
    pub disk: Disk,
    pub dir: TempDir,
}

impl Rig {
    /// A daemon on `disk`, whose files are in `dir`.
    pub fn start(dir: TempDir, disk: Disk) -> Self {
        let daemon = Daemon::start(&program(), &disk, dir.path());
        Self { daemon, disk, dir }
    }

    /// A daemon on a new image `disk` of `size` bytes; `change` may alter how it is served.
    pub fn with(format: &str, size: u64, change: impl FnOnce(Disk) -> Disk) -> Self {
        let dir = TempDir::new();
        let image = dir.join("disk");
        match format {
            "raw" => File::create(&image).and_then(|f| f.set_len(size)).unwrap(),
            _ => qemu::create(&image, format, size, ""),
        }
        let disk = change(Disk::new(&image, format));
        Self::start(dir, disk)
    }

    /// A daemon on a new raw image.
    pub fn raw(size: u64) -> Self {
        Self::with("raw", size, |d| d)
    }

    pub fn image(&self) -> PathBuf {
        self.dir.join("disk")
    }

    pub fn device(&self) -> Device {
        self.device_with(DeviceOptions::default())
    }

    pub fn device_with(&self, options: DeviceOptions) -> Device {
        Device::start(self.daemon.socket(), options).unwrap()
    }

    /// The same disk under a new process.
    pub fn restart(&mut self) {
        self.daemon.kill();
        self.daemon = Daemon::start(&program(), &self.disk, self.dir.path());
    }

    /// Asserts that the daemon lives and that a new VM can use the disk.
    pub fn assert_serves_a_new_client(&mut self) {
        self.daemon.assert_alive();
        let mut device = self.device();
        let last = device.capacity() / 512 - 1;
        device.write(last, &[0x5a; 512]).unwrap();
        assert_eq!(device.read(last, 512).unwrap(), [0x5a; 512]);
        device.shut_down().unwrap();
        self.daemon.assert_alive();
    }
}

/// Bytes of a file.
pub fn file_bytes(path: &Path, offset: usize, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    let file = File::open(path).unwrap();
    file.read_exact_at(&mut bytes, offset as u64).unwrap();
    bytes
}

/// Bytes that a file takes on its file system.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).unwrap().blocks() * 512
}

/// Pages of a file that the kernel has not written back yet, or nothing where it cannot tell.
pub fn dirty_pages(path: &Path) -> Option<u64> {
    use std::os::fd::AsRawFd;
    const SYS_CACHESTAT: libc::c_long = 451;
    let file = File::open(path).unwrap();
    // offset and length (0: to the end), then: cached, dirty, writeback, evicted, recently evicted
    let range = [0u64; 2];
    let mut counts = [0u64; 5];
    // SAFETY: both arrays have the size that cachestat(2) asks for and live through the call.
    let ret = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            range.as_ptr(),
            counts.as_mut_ptr(),
            0,
        )
    };
    (ret == 0).then_some(counts[1] + counts[2])
}

/// A request by hand: its buffers in guest memory, its status byte.
pub struct Raw {
    pub header: u64,
    pub data: u64,
    pub status: u64,
}

impl Raw {
    /// Takes buffers for a request with `data_len` bytes of data from guest memory.
    pub fn new(memory: &Memory, request_type: u32, sector: u64, data_len: u64) -> Self {
        let raw = Self {
            header: memory.alloc(16, 16),
            data: memory.alloc(data_len.max(1), 4096),
            status: memory.alloc(16, 16),
        };
        memory.write(
            raw.header,
            &vhost_user_frontend::blk::header(request_type, sector),
        );
        memory.fill(raw.status, 1, status::UNTOUCHED);
        raw
    }

    pub fn header_buf(&self) -> Buf {
        Buf::readable(self.header, 16)
    }

    pub fn status_buf(&self) -> Buf {
        Buf::writable(self.status, 1)
    }

    pub fn status(&self, memory: &Memory) -> u8 {
        memory.read_vec(self.status, 1)[0]
    }
}

/// Puts raw descriptors at the start of the table, offers the first as a chain, and waits for what becomes of
/// it.
pub fn offer(ring: &mut Virtqueue, table: &[Desc]) -> Outcome {
    for (i, desc) in table.iter().enumerate() {
        ring.split().set_desc(i as u16, *desc);
    }
    offer_head(ring, 0)
}

/// Offers a head as it is, and waits for what becomes of it.
pub fn offer_head(ring: &mut Virtqueue, head: u16) -> Outcome {
    let ring = ring.split();
    ring.push_raw(head);
    ring.publish();
    ring.wait_outcome(silence()).unwrap()
}

/// Runs a chain of buffers and returns the used length.
pub fn run_chain(device: &mut Device, bufs: &[Buf]) -> u32 {
    let ring = &mut device.queue(0).ring;
    ring.add(bufs, 0).expect("room in the ring");
    ring.publish();
    ring.wait_used(SOON).unwrap().len
}

/// The status of one request.
pub fn status_of(device: &mut Device, op: Op<'_>) -> u8 {
    device.run(op).unwrap().0.status
}

/// Waits until `probe` holds.
pub fn until(what: &str, mut probe: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !probe() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Sends one bad thing on a fresh, negotiated connection; it must be refused, and the daemon serve on.
pub fn refused(
    rig: &mut Rig,
    what: &str,
    send: impl FnOnce(&Client) -> vhost_user_frontend::Result<()>,
) {
    let device = Device::negotiate(rig.daemon.socket(), DeviceOptions::default()).unwrap();
    let answer = send(device.client().unwrap());
    assert!(
        answer.as_ref().is_err_and(Error::is_refusal),
        "{what}: {answer:?}"
    );
    drop(device);
    rig.assert_serves_a_new_client();
}

/// Submits reads until the ring or the slots are full; returns how many.
pub fn fill_with_reads(device: &mut Device, len: u32) -> u64 {
    let queue = device.queue(0);
    let mut n = 0;
    while queue.submit(Op::Read { sector: 8 * n, len }, n).is_ok() {
        n += 1;
    }
    queue.ring.publish();
    n
}

/// Runs a chain of buffers through an indirect table and returns the used length.
pub fn run_indirect(device: &mut Device, bufs: &[Buf]) -> u32 {
    let table = device.memory.alloc(16 * bufs.len() as u64, 16);
    let (memory, queue) = device.split(0);
    let ring = &mut queue.ring;
    ring.add_indirect(memory, table, bufs, 0)
        .expect("room in the ring");
    ring.publish();
    ring.wait_used(SOON).unwrap().len
}
