//! The life of the daemon, with a recording device behind it and raw front-ends before it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::thread::JoinHandleExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use vhost::vhost_user::message::FrontendReq as Req;

use super::*;
use crate::vhost_user::Device;
use crate::vhost_user::testing::*;

fn endpoint(path: &Path, device: &Arc<FakeDevice>) -> DiskEndpoint {
    DiskEndpoint {
        name: "disk".to_owned(),
        listen: Listen::Path {
            path: path.to_owned(),
            mode: None,
            group: None,
        },
        device: device.clone(),
    }
}

fn run(endpoints: Vec<DiskEndpoint>, options: &Options) -> (Stopper, JoinHandle<()>) {
    let daemon = Daemon::new(endpoints, options).unwrap();
    let stopper = daemon.stopper();
    let thread = std::thread::spawn(move || {
        let signals = Signals::block().unwrap();
        daemon.run(&signals).unwrap();
    });
    (stopper, thread)
}

fn connect(path: &Path) -> Client {
    Client {
        sock: UnixStream::connect(path).unwrap(),
    }
}

fn get(client: &mut Client, request: Req) -> u64 {
    client.send(request, 0, &[], &[]);
    client.reply_u64(request)
}

/// Negotiates, shares memory and starts ring 0.
fn start_ring(client: &mut Client) {
    let features = get(client, Req::GET_FEATURES);
    let protocol = get(client, Req::GET_PROTOCOL_FEATURES);
    client.send(Req::SET_PROTOCOL_FEATURES, 0, &words(&[protocol]), &[]);
    client.send(Req::SET_FEATURES, 0, &words(&[features]), &[]);
    let file = memfd(MEMORY_SIZE);
    let mut table = state(1, 0);
    table.extend(words(&[0, MEMORY_SIZE, USER_BASE, 0]));
    client.send(Req::SET_MEM_TABLE, 0, &table, &[file.as_raw_fd()]);
    client.send(Req::SET_VRING_NUM, 0, &state(0, 128), &[]);
    client.send(Req::SET_VRING_BASE, 0, &state(0, 0), &[]);
    client.send(Req::SET_VRING_ADDR, 0, &addresses(0, 0), &[]);
    client.send(Req::SET_VRING_KICK, 0, &words(&[0x100]), &[]);
    client.send(Req::SET_VRING_ENABLE, NEED_REPLY, &state(0, 1), &[]);
    assert_eq!(client.reply_u64(Req::SET_VRING_ENABLE), 0);
}

/// Whether the other end has closed the connection; waits for it.
fn is_closed(client: &mut Client) -> bool {
    match client.sock.read(&mut [0]) {
        Ok(len) => len == 0,
        // It was closed with something of ours unread.
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    pid_file: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    Place {
        socket: dir.path().join("disk.sock"),
        pid_file: dir.path().join("pid"),
        _dir: dir,
    }
}

#[test]
fn vmm_dies_and_the_next_one_is_served() {
    if !alone("daemon::tests::vmm_dies_and_the_next_one_is_served") {
        return;
    }
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    for _ in 0..5 {
        let mut client = connect(&place.socket);
        start_ring(&mut client);
        // No goodbye: as after SIGKILL.
        drop(client);
    }
    // The last one is served only when the one before is released.
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    let calls = device.calls();
    let resets = calls.iter().filter(|call| **call == Asked::Reset).count();
    assert_eq!(resets, 5);
    assert_eq!(calls.last(), Some(&Asked::Enabled(0, true)));
    stopper.stop();
    thread.join().unwrap();
    assert!(!place.socket.exists());
}

#[test]
fn second_client_is_refused_at_once() {
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut first = connect(&place.socket);
    start_ring(&mut first);
    for _ in 0..3 {
        let mut second = connect(&place.socket);
        assert!(is_closed(&mut second));
    }
    // The first does not notice.
    assert_eq!(get(&mut first, Req::GET_QUEUE_NUM), 4);
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn reconnect_is_never_taken_for_a_second_client() {
    if !alone("daemon::tests::reconnect_is_never_taken_for_a_second_client") {
        return;
    }
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut old = connect(&place.socket);
    start_ring(&mut old);
    for _ in 0..200 {
        // The end of the old connection and the new one arrive together, with messages still unread.
        {
            let _slow = device.gate.lock().unwrap();
            old.send(Req::SET_VRING_ENABLE, 0, &state(0, 1), &[]);
            old.send(Req::RESET_DEVICE, 0, &[], &[]);
            for _ in 0..200 {
                old.send(Req::SET_VRING_ENABLE, 0, &state(0, 0), &[]);
            }
            drop(old);
            old = connect(&place.socket);
        }
        assert_ne!(get(&mut old, Req::GET_FEATURES), 0);
    }
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn broken_connection_ends_and_the_next_one_is_served() {
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut broken = connect(&place.socket);
    broken.send_bytes(&[0xff; 64]);
    assert!(is_closed(&mut broken));
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn vmm_that_reads_no_replies_is_answered_when_it_does() {
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut client = connect(&place.socket);
    let request = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
    client.sock.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while client.sock.write(&request).is_ok_and(|len| len == 12) {
        sent += 1;
    }
    client.sock.set_nonblocking(false).unwrap();
    assert!(sent > 100);
    for _ in 0..sent {
        assert_ne!(client.reply_u64(Req::GET_FEATURES), 0);
    }
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn stop_does_not_wait_for_half_a_message() {
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    client.send_bytes(&[1, 0, 0, 0, 1]);
    stopper.stop();
    assert!(is_closed(&mut client));
    thread.join().unwrap();
}

#[test]
fn stop_drains_with_the_guest_answered() {
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    device.calls();
    stopper.stop();
    assert!(is_closed(&mut client));
    thread.join().unwrap();
    assert_eq!(device.calls(), [Asked::Stop(0), Asked::Reset]);
}

#[test]
fn sigterm_drains_and_removes_the_files() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let place = place();
        let device = FakeDevice::new();
        let options = Options {
            pid_file: Some(place.pid_file.clone()),
            ..Options::default()
        };
        let (_, thread) = run(vec![endpoint(&place.socket, &device)], &options);
        let pid = fs::read_to_string(&place.pid_file).unwrap();
        assert_eq!(pid, format!("{}\n", std::process::id()));
        let mut client = connect(&place.socket);
        // The thread has blocked its signals by the time it answers.
        start_ring(&mut client);
        device.calls();
        // SIGHUP ends nothing.
        // SAFETY: the thread has not been joined.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGHUP) };
        assert_eq!(get(&mut client, Req::GET_QUEUE_NUM), 4);
        // SAFETY: as above.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), signal) };
        assert!(is_closed(&mut client));
        thread.join().unwrap();
        assert_eq!(device.calls(), [Asked::Stop(0), Asked::Reset]);
        assert!(!place.socket.exists());
        assert!(!place.pid_file.exists());
    }
}

#[test]
fn second_signal_ends_at_once() {
    if !is_alone() {
        let child = run_alone("daemon::tests::second_signal_ends_at_once");
        assert_eq!(child.status.code(), Some(1));
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(said.contains("the drain hangs"), "{said}");
        return;
    }
    let place = place();
    let device = FakeDevice::new();
    let (_, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    let _hangs = device.gate.lock().unwrap();
    // SAFETY: the thread has not been joined.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGTERM) };
    println!("the drain hangs");
    loop {
        // A signal that is still pending swallows the next: the second may have to be sent again.
        // SAFETY: as above.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGTERM) };
        std::thread::yield_now();
    }
}

#[test]
fn one_disk_that_drains_does_not_hold_up_another() {
    if !alone("daemon::tests::one_disk_that_drains_does_not_hold_up_another") {
        return;
    }
    let (one, two) = (place(), place());
    let (slow, quick) = (FakeDevice::new(), FakeDevice::new());
    let endpoints = vec![endpoint(&one.socket, &slow), endpoint(&two.socket, &quick)];
    let (stopper, thread) = run(endpoints, &Options::default());
    let mut client = connect(&one.socket);
    start_ring(&mut client);
    let hangs = slow.gate.lock().unwrap();
    drop(client);
    for _ in 0..3 {
        let mut client = connect(&two.socket);
        start_ring(&mut client);
    }
    drop(hangs);
    // And the slow one is served again.
    start_ring(&mut connect(&one.socket));
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn once_ends_after_the_first_vmm_that_spoke() {
    if !alone("daemon::tests::once_ends_after_the_first_vmm_that_spoke") {
        return;
    }
    let place = place();
    let device = FakeDevice::new();
    let options = Options {
        once: true,
        ..Options::default()
    };
    let (_, thread) = run(vec![endpoint(&place.socket, &device)], &options);
    // Somebody who looks whether the socket is alive.
    drop(connect(&place.socket));
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    drop(client);
    thread.join().unwrap();
    assert!(!place.socket.exists());
}

#[test]
fn given_connection_is_served_to_its_end() {
    let device = FakeDevice::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let endpoint = DiskEndpoint {
        name: "disk".to_owned(),
        listen: Listen::Fd(ours.into()),
        device: device.clone(),
    };
    let (_, thread) = run(vec![endpoint], &Options::default());
    let mut client = Client { sock: theirs };
    start_ring(&mut client);
    drop(client);
    thread.join().unwrap();
    assert_eq!(device.calls().last(), Some(&Asked::Reset));
}

#[test]
fn given_listener_is_served_again_and_again() {
    if !alone("daemon::tests::given_listener_is_served_again_and_again") {
        return;
    }
    let place = place();
    let device = FakeDevice::new();
    let given = UnixListener::bind(&place.socket).unwrap();
    let endpoint = DiskEndpoint {
        name: "disk".to_owned(),
        listen: Listen::Fd(given.into()),
        device,
    };
    let (stopper, thread) = run(vec![endpoint], &Options::default());
    for _ in 0..3 {
        start_ring(&mut connect(&place.socket));
    }
    stopper.stop();
    thread.join().unwrap();
    assert!(place.socket.exists(), "not ours to remove");
}

#[test]
fn pid_file_is_held_by_one() {
    let place = place();
    // What a dead process left, whatever it says.
    fs::write(&place.pid_file, "4194305\nand more").unwrap();
    let first = PidFile::take(&place.pid_file).unwrap();
    let own = format!("{}\n", std::process::id());
    assert_eq!(fs::read_to_string(&place.pid_file).unwrap(), own);
    let error = PidFile::take(&place.pid_file).unwrap_err();
    assert!(error.to_string().contains(own.trim()), "{error}");
    drop(first);
    assert!(!place.pid_file.exists());
    drop(PidFile::take(&place.pid_file).unwrap());
    assert_eq!(fs::read_dir(place._dir.path()).unwrap().count(), 0);
}

#[test]
fn failed_start_leaves_nothing_behind() {
    let place = place();
    let device = FakeDevice::new();
    let missing = place._dir.path().join("missing/disk.sock");
    let options = Options {
        pid_file: Some(place.pid_file.clone()),
        ..Options::default()
    };
    let endpoints = vec![
        endpoint(&place.socket, &device),
        endpoint(&missing, &device),
    ];
    let error = Daemon::new(endpoints, &options).err().unwrap();
    assert!(error.to_string().contains("missing/disk.sock"), "{error}");
    assert_eq!(fs::read_dir(place._dir.path()).unwrap().count(), 0);
}

#[test]
fn libblkio_connects_starts_and_leaves_several_times() {
    if !alone("daemon::tests::libblkio_connects_starts_and_leaves_several_times") {
        return;
    }
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    for _ in 0..3 {
        let mut blkio = blkio::Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio
            .set_str("path", place.socket.to_str().unwrap())
            .unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", 2).unwrap();
        blkio.start().unwrap();
        let region = blkio.alloc_mem_region(12345).unwrap();
        blkio.map_mem_region(&region).unwrap();
        // Two rings run, and the region has been added under them.
        let calls = device.calls();
        let started = |index| calls.contains(&Asked::Start(index, 0));
        assert!(started(0) && started(1), "{calls:?}");
        assert_eq!(calls.last(), Some(&Asked::Memory(2)));
        for start in device.starts() {
            assert!(start.kick.is_some());
        }
        blkio.unmap_mem_region(&region);
        drop(blkio);
    }
    stopper.stop();
    thread.join().unwrap();
}

/// Opens the back-end's channel of a client that has negotiated it.
fn open_channel(client: &Client) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fd = theirs.as_raw_fd();
    client.send(Req::SET_BACKEND_REQ_FD, 0, &[], &[fd]);
    ours
}

/// Waits for a message on the channel, and answers it.
fn told_of_change(channel: &mut UnixStream) {
    let mut header = [0; 12];
    channel.read_exact(&mut header).unwrap();
    assert_eq!(header[..4], 2u32.to_ne_bytes(), "CONFIG_CHANGE_MSG");
    let mut answer = [2u32, 5, 8].map(u32::to_ne_bytes).concat();
    answer.extend([0; 8]);
    channel.write_all(&answer).unwrap();
}

#[test]
fn sighup_has_every_disk_look_at_its_size_and_tells_the_vmm() {
    if !alone("daemon::tests::sighup_has_every_disk_look_at_its_size_and_tells_the_vmm") {
        return;
    }
    let (one, two) = (place(), place());
    let (served, idle) = (FakeDevice::new(), FakeDevice::new());
    let endpoints = vec![endpoint(&one.socket, &served), endpoint(&two.socket, &idle)];
    let (stopper, thread) = run(endpoints, &Options::default());
    let mut client = connect(&one.socket);
    start_ring(&mut client);
    let mut channel = open_channel(&client);
    get(&mut client, Req::GET_QUEUE_NUM);
    for size in [1 << 30, 1 << 20] {
        for device in [&served, &idle] {
            *device.size_outside.lock().unwrap() = Some(size);
        }
        // SAFETY: the thread exists as long as its handle; the signal is blocked there, and read.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGHUP) };
        told_of_change(&mut channel);
        while idle.capacity() != size {
            std::thread::yield_now();
        }
        assert_eq!(served.capacity(), size);
    }
    // One whose image cannot be looked at keeps its size, and goes on.
    *served.size_outside.lock().unwrap() = None;
    *idle.size_outside.lock().unwrap() = Some(1 << 40);
    // SAFETY: as above.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGHUP) };
    while idle.capacity() != 1 << 40 {
        std::thread::yield_now();
    }
    assert_eq!(get(&mut client, Req::GET_QUEUE_NUM), 4);
    assert_eq!(served.capacity(), 1 << 20);
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn resize_by_another_thread_is_told_to_the_vmm() {
    let place = place();
    let device = FakeDevice::new();
    let (stopper, thread) = run(vec![endpoint(&place.socket, &device)], &Options::default());
    let mut client = connect(&place.socket);
    start_ring(&mut client);
    let mut channel = open_channel(&client);
    get(&mut client, Req::GET_QUEUE_NUM);
    for size in 1..20 {
        device.resize(size << 20);
        told_of_change(&mut channel);
    }
    stopper.stop();
    thread.join().unwrap();
}

#[test]
fn a_change_that_the_image_tells_of_itself_reaches_the_vmm_without_a_signal() {
    let (one, two) = (place(), place());
    let (remote, other) = (FakeDevice::new(), FakeDevice::new());
    let endpoints = vec![
        endpoint(&one.socket, &remote),
        endpoint(&two.socket, &other),
    ];
    let (stopper, thread) = run(endpoints, &Options::default());
    let mut client = connect(&one.socket);
    start_ring(&mut client);
    let mut channel = open_channel(&client);
    get(&mut client, Req::GET_QUEUE_NUM);
    *other.size_outside.lock().unwrap() = Some(1 << 40);
    for size in [1 << 30, 1 << 20] {
        remote.resize_outside(size);
        told_of_change(&mut channel);
        assert_eq!(remote.capacity(), size);
    }
    assert_eq!(other.capacity(), 0, "nobody told it to look");
    stopper.stop();
    thread.join().unwrap();
}
