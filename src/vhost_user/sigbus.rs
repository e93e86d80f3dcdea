//! What becomes of an access to memory that has lost its pages.
//!
//! A VMM that truncates its memory file (or a hugetlbfs that is out of pages) turns the next access to it
//! into SIGBUS, in any thread and in the middle of anything. For the mappings in [`crate::mappings`] the
//! handler puts zeros in place of what is gone and lets the access go on; the session of that VM then ends.
//! Any other SIGBUS ends the process, with a word.

use std::io;
use std::mem::zeroed;

use crate::mappings;

/// Installs the handler, for the whole process.
///
/// # Errors
/// The system does not let it be installed, or has no eventfd for [`mappings::loss_event`].
pub fn install() -> io::Result<()> {
    // The handler tells by it.
    mappings::loss_event()?;
    // SAFETY: an all-zero sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
    // A second SIGBUS, in the handler itself, takes the default way: the signal is blocked there.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and is async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `si_code` of an access beyond the end of a file, or without a page to be had (asm-generic/siginfo.h).
const BUS_ADRERR: libc::c_int = 2;
/// `si_code` of an access to memory that the hardware has given up.
const BUS_MCEERR_AR: libc::c_int = 4;

const BEFORE: &[u8] = b"virtioblkd: fatal: SIGBUS at address 0x";
const AFTER: &[u8] =
    b": a page that is no guest memory is gone. A file that this process has mapped was \
truncated, or its disk failed. Completed requests are safe; restart the VMM and virtioblkd.\n";

/// The message for an address, built without allocating; returns its length.
fn message(address: usize, buffer: &mut [u8; 512]) -> usize {
    let mut len = 0;
    let mut put = |byte: u8| {
        if let Some(place) = buffer.get_mut(len) {
            *place = byte;
            len += 1;
        }
    };
    BEFORE.iter().for_each(|byte| put(*byte));
    for nibble in (0..usize::BITS / 4).rev() {
        put(b"0123456789abcdef"[address >> (4 * nibble) & 0xf]);
    }
    AFTER.iter().for_each(|byte| put(*byte));
    len
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo, whose si_addr is set for SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if matches!(code, BUS_ADRERR | BUS_MCEERR_AR) {
        // SAFETY: the thread's own errno, which the interrupted code may be about to read.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let before = unsafe { *errno };
        if mappings::cover(address) {
            // SAFETY: as above.
            unsafe { *errno = before };
            return;
        }
    }
    let mut buffer = [0u8; 512];
    let len = message(address, &mut buffer);
    // SAFETY: write(2) and _exit(2) are async-signal-safe; the buffer holds `len` bytes.
    unsafe {
        libc::write(libc::STDERR_FILENO, buffer.as_ptr().cast(), len);
        libc::_exit(libc::EXIT_FAILURE);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::super::testing::{alone, is_alone, memfd, run_alone};
    use crate::mappings;
    use crate::shared_memory::SharedMemory;
    use crate::virtio::memory::{GuestMemory, Region};

    fn told() -> bool {
        let mut poll = libc::pollfd {
            fd: mappings::loss_event().unwrap().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd, no wait.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    #[test]
    fn truncated_guest_memory_reads_as_zeros_and_is_told_as_lost() {
        let name =
            "vhost_user::sigbus::tests::truncated_guest_memory_reads_as_zeros_and_is_told_as_lost";
        if !alone(name) {
            return;
        }
        super::install().unwrap();
        let (file, other) = (memfd(0x4000), memfd(0x1000));
        let region = Region::map(file.try_clone().unwrap(), 0, 0, 0, 0x3800).unwrap();
        let spared = Region::map(other, 0, 0x10000, 0x10000, 0x1000).unwrap();
        let memory = GuestMemory::new(vec![region]).unwrap();
        let spared = GuestMemory::new(vec![spared]).unwrap();
        let at = |guest| memory.host_ptr(guest, 1).unwrap();
        // SAFETY: the addresses are mapped; what happens is what the test is about.
        unsafe {
            at(0x2fff).write_volatile(7);
            at(0x3001).write_volatile(7);
            at(0xfff).write_volatile(7);
            file.set_len(0x1000).unwrap();
            assert!(!mappings::any_lost() && memory.lost().is_none() && !told());
            *libc::__errno_location() = 77;
            assert_eq!(at(0x2fff).read_volatile(), 0);
            assert_eq!(*libc::__errno_location(), 77);
            assert!(mappings::any_lost() && memory.lost().is_some() && told());
            assert!(spared.lost().is_none());
            // Behind it as well, before it at its own access, and what is left of the file is there.
            assert_eq!(at(0x3001).read_volatile(), 0);
            at(0x1000).write_volatile(5);
            assert_eq!(at(0x1000).read_volatile(), 5);
            assert_eq!(at(0x37ff).read_volatile(), 0);
            assert_eq!(at(0xfff).read_volatile(), 7);
        }
        // The whole mapping goes, and nothing of it stays.
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = format!("{:x}-", at(0) as usize);
        assert!(maps().contains(&start));
        drop(memory);
        assert!(!maps().contains(&start));
    }

    #[test]
    fn shared_memory_that_is_truncated_reads_as_zeros_too() {
        let name = "vhost_user::sigbus::tests::shared_memory_that_is_truncated_reads_as_zeros_too";
        if !alone(name) {
            return;
        }
        super::install().unwrap();
        let file = memfd(0x3000);
        let log = SharedMemory::map(file.try_clone().unwrap(), 0x1010, 0x1000).unwrap();
        let part = log.part(0, 0x1000).unwrap();
        part.atomic::<AtomicU64>(0)
            .unwrap()
            .store(3, Ordering::Relaxed);
        file.set_len(0).unwrap();
        assert!(!part.is_lost());
        let word = part.atomic::<AtomicU64>(0).unwrap();
        assert_eq!(word.fetch_or(4, Ordering::Relaxed), 0);
        assert_eq!(word.load(Ordering::Relaxed), 4);
        assert!(part.is_lost() && told());
    }

    #[test]
    fn any_other_sigbus_ends_the_process_with_a_word() {
        if !is_alone() {
            let child = run_alone(
                "vhost_user::sigbus::tests::any_other_sigbus_ends_the_process_with_a_word",
            );
            let said = String::from_utf8_lossy(&child.stderr);
            assert_eq!(child.status.code(), Some(1), "{said}");
            assert!(said.contains("SIGBUS at address 0x"), "{said}");
            assert!(said.ends_with("virtioblkd.\n"), "{said}");
            return;
        }
        super::install().unwrap();
        let file = memfd(0x2000);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let unwatched = unsafe {
            let flags = libc::MAP_SHARED;
            libc::mmap(
                std::ptr::null_mut(),
                0x2000,
                libc::PROT_READ,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        file.set_len(0x1000).unwrap();
        // SAFETY: the address is mapped; what happens is what the test is about.
        let byte = unsafe { unwatched.cast::<u8>().add(0x1000).read_volatile() };
        panic!("read {byte} from nowhere");
    }
}
