//! What becomes of an access to guest memory that has no memory behind it.
//!
//! A VMM that truncates its memory file (or a hugetlbfs that is out of pages) turns the next access to it
//! into SIGBUS. The default would end the process without a word. There is no going on: the access may
//! come from any thread, in the middle of a request. So the end is the same, with a word.

use std::io;
use std::mem::zeroed;

/// Says what happened, and where, when a SIGBUS comes; then ends the process as failed.
///
/// # Errors
/// The system does not let the handler be installed.
pub fn install() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { zeroed() };
    action.sa_sigaction = on_sigbus as *const () as libc::sighandler_t;
    // A second SIGBUS, in the handler itself, takes the default way.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and is async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

const BEFORE: &[u8] = b"virtioblkd: fatal: SIGBUS at address 0x";
const AFTER: &[u8] = b": a page of guest memory is gone. The VMM has truncated the file of its \
memory backend, or there are no huge pages left. Completed requests are safe; restart the VMM and \
virtioblkd.\n";

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
    let address = unsafe { (*info).si_addr() } as usize;
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
    use super::super::testing::{is_alone, memfd, run_alone};
    use crate::virtio::memory::{GuestMemory, Region};

    #[test]
    fn truncated_guest_memory_ends_the_process_with_a_word() {
        if !is_alone() {
            let child = run_alone(
                "vhost_user::sigbus::tests::truncated_guest_memory_ends_the_process_with_a_word",
            );
            let said = String::from_utf8_lossy(&child.stderr);
            assert_eq!(child.status.code(), Some(1), "{said}");
            assert!(said.contains("SIGBUS at address 0x"), "{said}");
            assert!(said.contains("a page of guest memory is gone"), "{said}");
            assert!(said.ends_with("virtioblkd.\n"), "{said}");
            return;
        }
        super::install().unwrap();
        let file = memfd(0x2000);
        let region = Region::map(file.try_clone().unwrap(), 0, 0, 0, 0x2000).unwrap();
        let memory = GuestMemory::new(vec![region]).unwrap();
        file.set_len(0x1000).unwrap();
        let gone = memory.host_ptr(0x1000, 1).unwrap();
        // SAFETY: the address is mapped; what happens is what the test is about.
        let byte = unsafe { gone.read_volatile() };
        panic!("read {byte} from nowhere");
    }
}
