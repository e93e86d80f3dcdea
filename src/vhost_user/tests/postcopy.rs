//! Postcopy: memory whose pages come later.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;
use std::thread::JoinHandle;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;
use crate::virtio::memory::GuestMemory;

const UFFDIO_COPY: u64 = 0xc028_aa03;

/// A connection on which postcopy was negotiated; none, with a word, where this process may not have it.
pub(super) fn bench() -> Option<Bench> {
    let mut bench = Bench::negotiated();
    if bench.get(Req::GET_PROTOCOL_FEATURES) & PAGEFAULT == 0 {
        println!("this process may not have a userfaultfd: nothing tested");
        return None;
    }
    let protocol = words(&[PROTOCOL | PAGEFAULT]);
    bench.set(Req::SET_PROTOCOL_FEATURES, &protocol, &[]);
    Some(bench)
}

impl Bench {
    /// `POSTCOPY_ADVISE`: the userfaultfd.
    fn advise(&mut self) -> Option<File> {
        self.client.send(Req::POSTCOPY_ADVISE, 0, &[], &[]);
        assert_eq!(self.run().unwrap(), Progress::Idle);
        let mut header = [0; 12];
        let (len, file) = self.client.sock.recv_with_fd(&mut header).unwrap();
        assert_eq!(len, 12);
        assert_eq!(header[..4], (Req::POSTCOPY_ADVISE as u32).to_ne_bytes());
        assert_eq!(header[8..], [0; 4], "no payload");
        file
    }

    /// `POSTCOPY_ADVISE` and `POSTCOPY_LISTEN`.
    pub(super) fn listen(&mut self) -> File {
        let userfault = self.advise().unwrap();
        self.set(Req::POSTCOPY_LISTEN, &[], &[]);
        userfault
    }

    /// A memory message without `need_reply`, as QEMU sends it; the regions of the answer.
    fn share(&mut self, request: Req, payload: &[u8], fds: &[i32]) -> Vec<[u64; 4]> {
        self.client.send(request, 0, payload, fds);
        assert_eq!(self.run().unwrap(), Progress::Idle);
        let (code, answer) = self.client.reply();
        assert_eq!((code, answer.len()), (request as u32, payload.len()));
        assert_eq!(answer[..8], payload[..8]);
        let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
        let region = |r: &[u8]| [0, 8, 16, 24].map(|at| word(&r[at..at + 8]));
        answer[8..].chunks(32).map(region).collect()
    }

    pub(super) fn end(&mut self) {
        assert!(self.try_set(Req::POSTCOPY_END, &[], &[]));
    }
}

/// Waits for a fault; its address.
fn fault(userfault: &mut File) -> u64 {
    let mut poll = libc::pollfd {
        fd: userfault.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    assert_eq!(unsafe { libc::poll(&mut poll, 1, 60_000) }, 1, "no fault");
    let mut message = [0; 32];
    assert_eq!(userfault.read(&mut message).unwrap(), 32);
    assert_eq!(message[0], 0x12, "UFFD_EVENT_PAGEFAULT");
    u64::from_ne_bytes(message[16..24].try_into().unwrap())
}

/// Brings a page full of `byte`.
fn bring(userfault: &File, address: u64, byte: u8) {
    let page = [byte; 4096];
    let mut copy = [address, page.as_ptr() as u64, 4096, 0, 0];
    // SAFETY: a `uffdio_copy` of five words, over a page that lives through the call.
    let done = unsafe { libc::ioctl(userfault.as_raw_fd(), UFFDIO_COPY as _, &mut copy) };
    assert_eq!((done, copy[4]), (0, 4096));
}

/// Reads a byte of guest memory in a thread of its own, as a worker does.
fn reader(memory: Arc<GuestMemory>, guest: u64) -> JoinHandle<u8> {
    std::thread::spawn(move || {
        let host = memory.host_ptr(guest, 1).unwrap();
        // SAFETY: the memory stays mapped through this thread's share in it.
        unsafe { host.read_volatile() }
    })
}

/// Blocks of memory that a file has: pages that came.
fn blocks(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn regions_that_are_added_are_answered_with_their_addresses_and_used_when_acknowledged() {
    let Some(mut bench) = bench() else { return };
    let mut userfault = bench.listen();
    let (low, high) = (memfd(MEMORY_SIZE), memfd(0x5000));
    let region = add_region(0, MEMORY_SIZE, USER_BASE, 0);
    let [[guest, size, base, offset]] =
        bench.share(Req::ADD_MEM_REG, &region, &[low.as_raw_fd()])[..]
    else {
        panic!("one region")
    };
    assert_eq!((guest, size, offset), (0, MEMORY_SIZE, 0));
    // Its length is no multiple of the page size, and it does not begin where its file does.
    let region = add_region(1 << 32, 0x2345, USER_BASE + (1 << 32), 0x1000);
    let answer = bench.share(Req::ADD_MEM_REG, &region, &[high.as_raw_fd()]);
    assert_eq!(answer[0][0], 1 << 32);

    // Not before the front-end is ready for faults.
    bench.start_ring(0, 0);
    assert!(
        bench.device.calls().is_empty(),
        "a ring started without memory"
    );
    bench.client.send(Req::ADD_MEM_REG, 0, &words(&[0]), &[]);
    bench.run().unwrap();
    assert!(bench.client.is_silent());
    assert_eq!(bench.device.calls(), [Asked::Start(0, 0)]);
    let memory = bench.device.starts().pop().unwrap().memory;
    assert_eq!(memory.regions().len(), 2);
    assert_eq!(memory.regions()[1].as_ptr() as u64, answer[0][2]);
    assert_eq!((blocks(&low), blocks(&high)), (0, 0), "we touched a page");

    let waiting = reader(memory.clone(), 0x3004);
    assert_eq!(fault(&mut userfault) & !0xfff, base + 0x3000);
    bring(&userfault, base + 0x3000, 0x5a);
    assert_eq!(waiting.join().unwrap(), 0x5a);
    let waiting = reader(memory.clone(), (1 << 32) + 0x2344);
    assert_eq!(fault(&mut userfault) & !0xfff, answer[0][2] + 0x2000);
    bring(&userfault, answer[0][2] + 0x2000, 0x5b);
    assert_eq!(waiting.join().unwrap(), 0x5b);

    bench.end();
    // What never came is zeros, as for everybody else; what is shared from now on is answered as usual.
    assert_eq!(reader(memory.clone(), 0x8000).join().unwrap(), 0);
    assert!(memory.lost().is_none());
    let region = add_region(1 << 33, 0x1000, USER_BASE + (1 << 33), 0);
    bench.set(Req::ADD_MEM_REG, &region, &[high.as_raw_fd()]);
}

#[test]
fn a_memory_table_is_answered_with_all_its_addresses() {
    let Some(mut bench) = bench() else { return };
    let mut userfault = bench.listen();
    let (low, high) = (memfd(MEMORY_SIZE), memfd(0x2000));
    let mut payload = state(2, 0);
    // Not in the order of their addresses.
    payload.extend(words(&[1 << 32, 0x2000, USER_BASE + (1 << 32), 0]));
    payload.extend(words(&[0, MEMORY_SIZE, USER_BASE, 0]));
    let fds = [high.as_raw_fd(), low.as_raw_fd()];
    let answer = bench.share(Req::SET_MEM_TABLE, &payload, &fds);
    assert_eq!(answer[0][..2], [1 << 32, 0x2000]);
    assert_eq!(answer[1][..2], [0, MEMORY_SIZE]);
    bench.client.send(Req::SET_MEM_TABLE, 0, &words(&[0]), &[]);
    bench.run().unwrap();
    bench.start_ring(0, 0);
    let memory = bench.device.starts().pop().unwrap().memory;
    let waiting = reader(memory, (1 << 32) + 1);
    assert_eq!(fault(&mut userfault) & !0xfff, answer[0][2]);
    bring(&userfault, answer[0][2], 7);
    assert_eq!(waiting.join().unwrap(), 7);
    bench.end();
}

#[test]
fn qemu_acknowledges_with_the_last_message_or_with_none() {
    let Some(mut bench) = bench() else { return };
    let _userfault = bench.listen();
    let file = memfd(MEMORY_SIZE);
    let region = add_region(0, MEMORY_SIZE, USER_BASE, 0);
    bench.share(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
    let second = add_region(1 << 32, 0x1000, USER_BASE + (1 << 32), 0);
    bench.share(Req::ADD_MEM_REG, &second, &[file.as_raw_fd()]);
    // Taken out again before it was ever in use.
    bench.set(Req::REM_MEM_REG, &second, &[]);
    bench.client.send(Req::REM_MEM_REG, 0, &words(&[0]), &[]);
    // No region came or went.
    bench.client.send_raw(0, 1, 8, &words(&[0]), &[]);
    bench.run().unwrap();
    assert!(bench.client.is_silent());
    bench.start_ring(0, 0);
    let memory = bench.device.starts().pop().unwrap().memory;
    assert_eq!(memory.regions().len(), 1);
    // Of the memory in use, without a table that waits.
    bench.stop_ring(0);
    bench.set(Req::REM_MEM_REG, &region, &[]);
    // A front-end that is not ready says so.
    bench.share(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
    bench.client.send(Req::ADD_MEM_REG, 0, &words(&[1]), &[]);
    assert!(bench.run().is_err());
}

#[test]
fn postcopy_out_of_order_is_refused_and_ends_nothing_else() {
    let Some(mut bench) = bench() else { return };
    assert!(!bench.try_set(Req::POSTCOPY_LISTEN, &[], &[]));
    assert!(!bench.try_set(Req::POSTCOPY_END, &[], &[]));
    // A migration that came to nothing, and another.
    assert!(bench.advise().is_some());
    assert!(!bench.try_set(Req::POSTCOPY_END, &[], &[]));
    // QEMU waits for this reply whatever was negotiated.
    let _userfault = bench.listen();
    assert!(!bench.try_set(Req::POSTCOPY_LISTEN, &[], &[]));
    assert!(bench.advise().is_none(), "one is under way");
    bench.end();
    assert!(!bench.try_set(Req::POSTCOPY_END, &[], &[]));
    bench.share_memory();
    bench.start_ring(0, 0);
    assert_eq!(bench.device.calls()[0], Asked::Start(0, 0));
    // Pages of this memory may have been touched.
    assert!(bench.advise().is_some());
    assert!(!bench.try_set(Req::POSTCOPY_LISTEN, &[], &[]));
}

#[test]
fn postcopy_that_was_not_negotiated_is_refused() {
    let mut bench = Bench::negotiated();
    for request in [
        Req::POSTCOPY_ADVISE,
        Req::POSTCOPY_LISTEN,
        Req::POSTCOPY_END,
    ] {
        assert!(!bench.try_set(request, &[], &[]), "{request:?}");
    }
}

#[test]
fn memory_messages_of_the_wrong_shape_end_the_connection() {
    let file = memfd(MEMORY_SIZE);
    let fd = file.as_raw_fd();
    let mut table = state(1, 0);
    table.extend(words(&[0, MEMORY_SIZE, USER_BASE, 0]));
    let mut wrong = table.clone();
    wrong[0] = 2;
    let single = add_region(0, MEMORY_SIZE, USER_BASE, 0);
    for (request, payload, fds) in [
        (Req::SET_MEM_TABLE, &table[..], vec![]),
        (Req::SET_MEM_TABLE, &table[..], vec![fd, fd]),
        (Req::SET_MEM_TABLE, &table[..39], vec![fd]),
        (Req::SET_MEM_TABLE, &wrong[..], vec![fd]),
        (Req::SET_MEM_TABLE, &table[..4], vec![]),
        (Req::ADD_MEM_REG, &single[..], vec![]),
        (Req::ADD_MEM_REG, &single[..], vec![fd, fd]),
        (Req::ADD_MEM_REG, &single[..0], vec![]),
    ] {
        let Some(mut bench) = bench() else { return };
        let _userfault = bench.listen();
        bench.client.send(request, 0, payload, &fds);
        assert!(bench.run().is_err(), "{request:?}, {} bytes", payload.len());
        assert!(bench.client.is_silent());
    }
}

/// A table of one region in use, with none of its pages there.
fn without_pages(bench: &mut Bench) -> (File, Arc<GuestMemory>) {
    let file = memfd(MEMORY_SIZE);
    let region = add_region(0, MEMORY_SIZE, USER_BASE, 0);
    bench.share(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
    bench.client.send(Req::ADD_MEM_REG, 0, &words(&[0]), &[]);
    bench.run().unwrap();
    bench.start_ring(0, 0);
    let memory = bench.device.starts().pop().unwrap().memory;
    (file, memory)
}

#[test]
fn whoever_waits_for_a_page_goes_on_when_the_vmm_dies_whatever_the_control_thread_does() {
    let Some(mut bench) = bench() else { return };
    let mut userfault = bench.listen();
    let (file, memory) = without_pages(&mut bench);
    let waiting = reader(memory.clone(), 0x3004);
    fault(&mut userfault);
    // The process of the VMM is gone, and with it its copy of the userfaultfd. Nobody calls the connection.
    let Bench {
        client, connection, ..
    } = bench;
    drop((client, userfault));
    assert_eq!(waiting.join().unwrap(), 0);
    assert!(memory.lost().is_some());
    assert_eq!(blocks(&file), 0, "a page was made up in the guest's memory");
    drop(connection);
}

#[test]
fn whoever_waits_for_a_page_goes_on_when_the_connection_ends_here() {
    let Some(mut bench) = bench() else { return };
    let mut userfault = bench.listen();
    let (file, memory) = without_pages(&mut bench);
    let waiting = reader(memory.clone(), 0x3004);
    fault(&mut userfault);
    let Bench {
        client, connection, ..
    } = bench;
    // The VMM lives, and brings no page.
    drop(connection);
    assert_eq!(waiting.join().unwrap(), 0);
    assert!(memory.lost().is_some());
    assert_eq!(blocks(&file), 0, "a page was made up in the guest's memory");
    drop(client);
}

#[test]
fn huge_pages_come_one_by_one_too() {
    let Some(mut bench) = bench() else { return };
    let mut userfault = bench.listen();
    // SAFETY: the name is a C string; a descriptor that comes back is ours alone.
    let file = unsafe {
        let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        let fd = libc::memfd_create(c"huge".as_ptr(), flags);
        if fd < 0 {
            println!("no hugetlbfs in this kernel");
            return;
        }
        File::from_raw_fd(fd)
    };
    let huge = 2 << 20;
    file.set_len(huge).unwrap();
    // The region begins and ends in the middle of the page.
    let region = add_region(0, MEMORY_SIZE, USER_BASE, 0x4000);
    let answer = bench.share(Req::ADD_MEM_REG, &region, &[file.as_raw_fd()]);
    bench.client.send(Req::ADD_MEM_REG, 0, &words(&[0]), &[]);
    bench.run().unwrap();
    bench.start_ring(0, 0);
    let memory = bench.device.starts().pop().unwrap().memory;
    let waiting = reader(memory, 0x3004);
    // The kernel tells the huge page, which begins before the region.
    let at = fault(&mut userfault);
    assert!(at + huge > answer[0][2] && at <= answer[0][2] + 0x3004);
    drop(bench);
    assert_eq!(waiting.join().unwrap(), 0);
}
