//! The end of a postcopy migration that has the pages: it keeps a copy of guest memory, takes the pages away,
//! and brings each when somebody touches it, this process or the backend.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::error::{Error, Result};
use crate::memory::{Memory, Region};
use crate::sys::EventFd;

const PAGE: u64 = 4096;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;

/// One region's pages.
struct Pages {
    /// Keeps it mapped here.
    region: Arc<Region>,
    /// Address of its first byte here.
    here: u64,
    /// And in the backend.
    there: AtomicU64,
    copy: Vec<u8>,
}

struct Shared {
    ours: std::fs::File,
    theirs: Mutex<Option<std::fs::File>>,
    regions: Vec<Pages>,
    /// Faults of the backend that were served.
    served: AtomicU64,
    /// And those that were not.
    unserved: AtomicU64,
    /// The source is dead: nothing comes any more.
    dead: AtomicBool,
}

/// Brings pages.
#[derive(Debug)]
pub struct PageServer {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

fn ioctl<const N: usize>(
    file: &impl AsRawFd,
    request: u64,
    words: &mut [u64; N],
) -> io::Result<()> {
    // SAFETY: the callers pass as many words as the request's structure has.
    match unsafe { libc::ioctl(file.as_raw_fd(), request as _, words.as_mut_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn userfault() -> io::Result<std::fs::File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: integers only; a descriptor that comes back is ours alone.
    let file = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        std::fs::File::from_raw_fd(fd as libc::c_int)
    };
    // UFFD_API, with faults of shared memory.
    ioctl(&file, UFFDIO_API, &mut [0xaa, 1 << 5, 0])?;
    Ok(file)
}

impl Shared {
    /// Puts a page in its file, if it is not there yet, and lets whoever waits for it go on.
    fn bring(&self, pages: &Pages, at: u64) -> io::Result<()> {
        let from = pages.copy.as_ptr() as u64 + at;
        let copied = ioctl(
            &self.ours,
            UFFDIO_COPY,
            &mut [pages.here + at, from, PAGE, 0, 0],
        );
        match copied {
            // It has come already.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                ioctl(&self.ours, UFFDIO_WAKE, &mut [pages.here + at, PAGE])?;
            }
            other => other?,
        }
        let theirs = self.theirs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(theirs) = &*theirs {
            let there = pages.there.load(Ordering::Relaxed) + at;
            ioctl(theirs, UFFDIO_WAKE, &mut [there, PAGE])?;
        }
        Ok(())
    }

    /// Serves the faults that `file` tells of until `stop` is signalled; `base` is where a region is for them.
    fn serve(&self, mut file: std::fs::File, stop: &EventFd, base: fn(&Pages) -> u64, count: bool) {
        let entry = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut entries = [entry(stop.raw()), entry(file.as_raw_fd())];
        loop {
            // SAFETY: two valid entries.
            unsafe { libc::poll(entries.as_mut_ptr(), 2, -1) };
            if entries[0].revents != 0 {
                return;
            }
            let mut message = [0u8; 32];
            if !matches!(file.read(&mut message), Ok(32)) {
                continue;
            }
            let mut word = [0; 8];
            word.copy_from_slice(&message[16..24]);
            let address = u64::from_ne_bytes(word);
            if self.dead.load(Ordering::SeqCst) {
                self.unserved.fetch_add(u64::from(count), Ordering::SeqCst);
                continue;
            }
            let page = address & !(PAGE - 1);
            let region = self.regions.iter().find(|p| {
                let at = page.wrapping_sub(base(p));
                at < p.copy.len() as u64
            });
            let region =
                region.unwrap_or_else(|| panic!("a fault at {address:#x}, where nothing is"));
            self.served.fetch_add(u64::from(count), Ordering::SeqCst);
            if let Err(error) = self.bring(region, page - base(region)) {
                // The backend is gone.
                eprintln!("a page for {address:#x}: {error}");
            }
        }
    }
}

impl PageServer {
    /// Copies all of `memory`, takes its pages away, and brings them when this process touches them. Regions begin
    /// and end at pages.
    pub(crate) fn new(memory: &Memory) -> Result<Self> {
        let ours = userfault()?;
        let mut regions = Vec::new();
        for region in memory.regions() {
            let spec = region.spec();
            if (spec.size | spec.mmap_offset) % PAGE != 0 {
                return Err(Error::Protocol(
                    "a region that is no whole pages".to_owned(),
                ));
            }
            let copy = memory.read_vec(spec.guest_addr, spec.size as usize);
            let here = region.host(spec.guest_addr, spec.size) as u64;
            region.take_away()?;
            // UFFDIO_REGISTER_MODE_MISSING
            ioctl(&ours, UFFDIO_REGISTER, &mut [here, spec.size, 1, 0])?;
            regions.push(Pages {
                region: region.clone(),
                here,
                there: AtomicU64::new(0),
                copy,
            });
        }
        let shared = Arc::new(Shared {
            ours,
            theirs: Mutex::new(None),
            regions,
            served: AtomicU64::new(0),
            unserved: AtomicU64::new(0),
            dead: AtomicBool::new(false),
        });
        let stop = Arc::new(EventFd::new()?);
        let mut server = Self {
            shared,
            stop,
            threads: Vec::new(),
        };
        let file = server.shared.ours.try_clone()?;
        server.spawn(file, |pages| pages.here, false);
        Ok(server)
    }

    fn spawn(&mut self, file: std::fs::File, base: fn(&Pages) -> u64, count: bool) {
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        let run = move || shared.serve(file, &stop, base, count);
        self.threads.push(std::thread::spawn(run));
    }

    /// Serves the backend's faults too: its userfaultfd, and where it has mapped each region.
    pub(crate) fn serve(&mut self, userfault: OwnedFd, bases: &[u64]) -> Result<()> {
        for (pages, base) in self.shared.regions.iter().zip(bases) {
            pages.there.store(*base, Ordering::Relaxed);
        }
        let file = std::fs::File::from(userfault);
        let theirs = self.shared.theirs.lock();
        *theirs.unwrap_or_else(PoisonError::into_inner) = Some(file.try_clone()?);
        self.spawn(file, |pages| pages.there.load(Ordering::Relaxed), true);
        Ok(())
    }

    /// Faults of the backend that were served so far.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::SeqCst)
    }

    /// Faults of the backend since the source died.
    pub fn unserved(&self) -> u64 {
        self.shared.unserved.load(Ordering::SeqCst)
    }

    /// The source dies: no page comes any more.
    pub fn die(&self) {
        self.shared.dead.store(true, Ordering::SeqCst);
    }

    /// Brings every page.
    pub(crate) fn bring_all(&mut self) -> Result<()> {
        for pages in &self.shared.regions {
            for at in (0..pages.copy.len() as u64).step_by(PAGE as usize) {
                self.shared.bring(pages, at)?;
            }
        }
        Ok(())
    }

    /// Lets the memory be as it is.
    pub(crate) fn stop(self) {}
}

impl Drop for PageServer {
    fn drop(&mut self) {
        let _ = self.stop.signal();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() && !std::thread::panicking() {
                panic!("the page server failed");
            }
        }
        for pages in &self.shared.regions {
            let mut range = [pages.here, pages.region.spec().size];
            let _ = ioctl(&self.shared.ours, UFFDIO_UNREGISTER, &mut range);
        }
    }
}
