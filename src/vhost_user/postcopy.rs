//! Postcopy migration, on the side that receives the VM: its pages come while it runs already.
//!
//! A userfaultfd of this process catches accesses to pages that have not come yet; the VMM holds a copy of it
//! and brings the pages (vhost-user.rst, "Migration" and `VHOST_USER_POSTCOPY_ADVISE`). Who accesses such a
//! page waits in the kernel: a worker, for itself or in the middle of a system call, and with it all rings of
//! that worker. The control thread touches no guest memory, but it does wait for workers. So the end of the
//! connection is watched for by a thread of its own, which gives the memory up and so lets everybody go on.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;

use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::memory::{GuestMemory, Mapping};

// linux/userfaultfd.h
const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_MISSING_HUGETLBFS: u64 = 1 << 4;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Its number as a bit of `UffdRegister::ioctls`.
const UFFDIO_COPY_BIT: u64 = 1 << 3;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdRegister {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

/// A userfaultfd for files in memory, ordinary or of huge pages.
#[derive(Debug)]
struct Userfault(OwnedFd);

impl Userfault {
    /// Faults in the kernel are to be caught too (io_uring accesses guest memory there), which not everybody may.
    fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: a plain system call with integers.
        let mut fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as libc::c_int;
        if fd < 0 {
            // Who may open this file may do the same as who has the capability.
            let device = std::fs::File::open("/dev/userfaultfd");
            let refused = io::Error::last_os_error();
            let device = device.map_err(|_| refused)?;
            // SAFETY: the descriptor is open, and the argument is an integer.
            fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) };
        }
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let userfault = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = UffdApi {
            api: UFFD_API,
            features: UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS,
            ioctls: 0,
        };
        userfault.ioctl(UFFDIO_API, &mut api)?;
        Ok(userfault)
    }

    /// `T` is the structure that belongs to `request`.
    fn ioctl<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: the argument has the size that the request's number says, and lives through the call.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, argument as *mut T) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn register(&self, mapping: &Mapping) -> io::Result<()> {
        let mut register = UffdRegister {
            range: range(mapping),
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        self.ioctl(UFFDIO_REGISTER, &mut register)?;
        if register.ioctls & UFFDIO_COPY_BIT == 0 {
            let why = "this kind of memory cannot be filled page by page (UFFDIO_COPY)";
            return Err(io::Error::other(why));
        }
        Ok(())
    }

    /// Pages that are missing are made of zeros from now on, and whoever waits for one goes on.
    fn unregister(&self, mapping: &Mapping) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut range(mapping))
    }

    /// Whoever waits for a page tries again.
    fn wake(&self, mapping: &Mapping) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut range(mapping))
    }
}

fn range(mapping: &Mapping) -> UffdRange {
    let (start, len) = mapping.range();
    UffdRange { start, len }
}

/// Whether this process may catch page faults, as `VHOST_USER_PROTOCOL_F_PAGEFAULT` promises.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| Userfault::open().is_ok())
}

/// The mappings whose missing pages the VMM brings.
#[derive(Debug)]
struct Faulting {
    userfault: Userfault,
    mappings: Mutex<Vec<Weak<Mapping>>>,
}

impl Faulting {
    fn each(&self, what: impl Fn(&Mapping)) {
        let mappings = self.mappings.lock();
        let mappings = mappings.unwrap_or_else(PoisonError::into_inner);
        mappings
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|m| what(&m));
    }

    /// Nobody will bring what is missing. Zeros in its place would be taken for the guest's by whoever else has
    /// the file mapped; so this process parts with the memory, and nothing that it does there is seen any more.
    fn give_up(&self) {
        self.each(|mapping| {
            let covered = mapping.give_up();
            let woken = match covered {
                true => self.userfault.wake(mapping),
                false => self.userfault.unregister(mapping),
            };
            if let Err(error) = woken {
                warn!("postcopy: a worker may wait for a page that never comes: {error}");
            }
        });
    }
}

/// A postcopy migration that was announced, from `POSTCOPY_ADVISE` to `POSTCOPY_END`.
///
/// Dropped before its end it gives up the memory that was registered.
#[derive(Debug)]
pub(super) struct Postcopy {
    faulting: Arc<Faulting>,
    /// There since `POSTCOPY_LISTEN`.
    watcher: Option<Watcher>,
    /// The memory table that waits for the VMM to say that it is ready for faults.
    pub(super) pending: Option<Arc<GuestMemory>>,
}

#[derive(Debug)]
struct Watcher {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Postcopy {
    /// What `POSTCOPY_ADVISE` asks for.
    ///
    /// # Errors
    /// This process may not have a userfaultfd.
    pub(super) fn new() -> io::Result<Self> {
        let faulting = Faulting {
            userfault: Userfault::open()?,
            mappings: Mutex::default(),
        };
        Ok(Self {
            faulting: Arc::new(faulting),
            watcher: None,
            pending: None,
        })
    }

    /// A copy of the userfaultfd, for the VMM.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.faulting.userfault.0.try_clone()
    }

    /// Whether `POSTCOPY_LISTEN` has come.
    pub(super) fn is_listening(&self) -> bool {
        self.watcher.is_some()
    }

    /// From now on memory that is mapped has pages missing. `sock` is the VMM's: when it hangs up, the memory is
    /// given up, whatever the control thread does at that time.
    pub(super) fn listen(&mut self, sock: UnixStream) -> io::Result<()> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let faulting = Arc::clone(&self.faulting);
        let thread = std::thread::Builder::new()
            .name("postcopy".to_owned())
            .spawn(move || {
                if hangs_up(&sock, &stopped) {
                    faulting.give_up();
                }
            })?;
        self.watcher = Some(Watcher {
            stop,
            thread: Some(thread),
        });
        Ok(())
    }

    /// Catches faults in a mapping that nobody has accessed yet.
    pub(super) fn register(&self, mapping: &Arc<Mapping>) -> io::Result<()> {
        self.faulting.userfault.register(mapping)?;
        let mappings = self.faulting.mappings.lock();
        let mut mappings = mappings.unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|mapping| mapping.strong_count() > 0);
        mappings.push(Arc::downgrade(mapping));
        Ok(())
    }

    /// Every page has come: `POSTCOPY_END`.
    pub(super) fn end(mut self) {
        self.watcher = None;
        self.faulting.each(|mapping| {
            if let Err(error) = self.faulting.userfault.unregister(mapping) {
                warn!("postcopy: unregistering memory: {error}");
            }
        });
        let mappings = self.faulting.mappings.lock();
        mappings.unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Postcopy {
    fn drop(&mut self) {
        self.watcher = None;
        self.faulting.give_up();
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // It does nothing that could panic.
            let _ = thread.join();
        }
    }
}

/// Waits for the end of the connection (true) or for `stop` (false).
fn hangs_up(sock: &UnixStream, stop: &EventFd) -> bool {
    let entry = |fd, events| libc::pollfd {
        fd,
        events,
        revents: 0,
    };
    let mut entries = [
        entry(stop.as_raw_fd(), libc::POLLIN),
        entry(sock.as_raw_fd(), libc::POLLRDHUP),
    ];
    loop {
        // SAFETY: two valid entries, which live through the call.
        let ready = unsafe { libc::poll(entries.as_mut_ptr(), 2, -1) };
        if ready > 0 {
            return entries[0].revents == 0;
        }
    }
}
