//! The back-end's own channel: what the VMM is told unasked, and VMMs that do not listen.

use std::os::fd::OwnedFd;

use super::*;

pub(super) const MIB: u64 = 1 << 20;
const CONFIG_CHANGE: u32 = 2;

/// The VMM's end of the channel.
pub(super) struct Channel(Client);

impl Channel {
    /// Opens it.
    pub(super) fn open(bench: &mut Bench) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        bench.set(Req::SET_BACKEND_REQ_FD, &[], &[theirs.as_raw_fd()]);
        Channel(Client { sock: ours })
    }

    /// The next message's flags, if one is there.
    pub(super) fn next(&mut self) -> Option<u32> {
        if self.0.is_silent() {
            return None;
        }
        let mut header = [0u8; 12];
        self.0.sock.read_exact(&mut header).unwrap();
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8)), (CONFIG_CHANGE, 0));
        Some(word(4))
    }

    pub(super) fn answer(&mut self, value: u64) {
        self.send(&Self::answer_of(value));
    }

    /// The bytes of an answer.
    pub(super) fn answer_of(value: u64) -> Vec<u8> {
        let mut bytes = [CONFIG_CHANGE, 5, 8].map(u32::to_ne_bytes).concat();
        bytes.extend(value.to_ne_bytes());
        bytes
    }

    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.0.sock.write_all(bytes).unwrap();
    }

    /// Whether the other side has closed its end, with whatever it sent still to be read.
    pub(super) fn is_hung_up(&self) -> bool {
        crate::vhost_user::peek::hung_up(&self.0.sock)
    }

    /// Whether the other side has closed its end; what it sent is read.
    fn is_closed(&mut self) -> bool {
        self.0.sock.set_nonblocking(true).unwrap();
        let mut rest = Vec::new();
        match self.0.sock.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

pub(super) fn read_config(bench: &mut Bench, offset: u32, size: u32) {
    let mut payload = [offset, size, 0].map(u32::to_ne_bytes).concat();
    payload.resize(12 + size as usize, 0);
    bench.client.send(Req::GET_CONFIG, 0, &payload, &[]);
    bench.run().unwrap();
    bench.client.reply();
}

fn without(features: u64) -> Bench {
    let mut bench = Bench::negotiated();
    let features = words(&[PROTOCOL & !features]);
    bench.set(Req::SET_PROTOCOL_FEATURES, &features, &[]);
    bench
}

#[test]
fn change_of_the_capacity_is_told_once_and_asks_for_an_answer_with_reply_ack() {
    let mut bench = Bench::negotiated();
    bench.device.resize(MIB);
    read_config(&mut bench, 0, 60);
    let mut channel = Channel::open(&mut bench);
    bench.connection.tell_change();
    assert_eq!(channel.next(), None, "it has read the capacity");
    for size in [2 * MIB, MIB] {
        bench.device.resize(size);
        bench.connection.tell_change();
        bench.connection.tell_change();
        assert_eq!(channel.next(), Some(1 | NEED_REPLY));
        assert_eq!(channel.next(), None, "once");
        // As QEMU does it: the configuration first, then the answer.
        read_config(&mut bench, 0, 60);
        channel.answer(0);
    }
}

#[test]
fn change_is_told_without_asking_for_an_answer_where_reply_ack_is_missing() {
    let mut bench = Bench::new();
    bench.get(Req::GET_FEATURES);
    let features = PROTOCOL & !(1 << 3);
    let send = |bench: &mut Bench, request, payload: &[u8], fds: &[i32]| {
        bench.client.send(request, 0, payload, fds);
        bench.run().unwrap();
    };
    send(
        &mut bench,
        Req::SET_PROTOCOL_FEATURES,
        &words(&[features]),
        &[],
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fds = [theirs.as_raw_fd()];
    send(&mut bench, Req::SET_BACKEND_REQ_FD, &[], &fds);
    let mut channel = Channel(Client { sock: ours });
    for size in 1..100 {
        bench.device.resize(size * MIB);
        bench.connection.tell_change();
        assert_eq!(channel.next(), Some(1));
    }
}

#[test]
fn without_channel_or_config_nobody_is_told() {
    let mut bench = Bench::negotiated();
    bench.device.resize(MIB);
    bench.connection.tell_change();
    let mut bench = without(1 << 9);
    let mut channel = Channel::open(&mut bench);
    bench.device.resize(2 * MIB);
    bench.connection.tell_change();
    assert_eq!(channel.next(), None);
}

#[test]
fn what_the_vmm_has_not_read_is_told_when_the_first_ring_starts() {
    let mut bench = Bench::negotiated();
    bench.share_memory();
    bench.device.resize(MIB);
    let mut channel = Channel::open(&mut bench);
    // A VMM that reconnects and has not looked: the image may have been resized while nobody served it.
    bench.start_ring(0, 0);
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    channel.answer(0);
    bench.start_ring(1, 0);
    assert_eq!(channel.next(), None, "the first ring only");
    bench.stop_ring(0);
    bench.stop_ring(1);
    // It was told while its device was stopped, and may have taken no notice.
    bench.device.resize(2 * MIB);
    bench.connection.tell_change();
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    channel.answer(0);
    bench.start_ring(0, 0);
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
    channel.answer(0);
    read_config(&mut bench, 8, 52);
    bench.stop_ring(0);
    bench.start_ring(0, 0);
    assert_eq!(
        channel.next(),
        Some(1 | NEED_REPLY),
        "the capacity was not read"
    );
    read_config(&mut bench, 0, 8);
    bench.stop_ring(0);
    bench.start_ring(0, 0);
    assert_eq!(channel.next(), None, "now it was");
}

#[test]
fn vmm_that_answers_nothing_is_given_up_and_its_disk_is_served_on() {
    let mut bench = Bench::negotiated();
    let mut channel = Channel::open(&mut bench);
    let mut told = 0;
    for size in 1..100 {
        bench.device.resize(size * MIB);
        bench.connection.tell_change();
        if channel.is_hung_up() {
            break;
        }
        assert_eq!(channel.next(), Some(1 | NEED_REPLY));
        told += 1;
    }
    assert_eq!(told, 16);
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
    // A new channel begins anew.
    let mut channel = Channel::open(&mut bench);
    bench.device.resize(1000 * MIB);
    bench.connection.tell_change();
    assert_eq!(channel.next(), Some(1 | NEED_REPLY));
}

#[test]
fn vmm_that_does_not_read_is_given_up_without_waiting() {
    // Without answers nothing bounds what is sent but the socket itself.
    let mut bench = Bench::new();
    bench.get(Req::GET_FEATURES);
    let features = words(&[PROTOCOL & !(1 << 3)]);
    bench
        .client
        .send(Req::SET_PROTOCOL_FEATURES, 0, &features, &[]);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let fds = [theirs.as_raw_fd()];
    bench.client.send(Req::SET_BACKEND_REQ_FD, 0, &[], &fds);
    bench.run().unwrap();
    drop(theirs);
    let mut channel = Channel(Client { sock: ours });
    for size in 1..100_000 {
        bench.device.resize(size * 512);
        bench.connection.tell_change();
        if channel.is_hung_up() {
            break;
        }
    }
    assert!(channel.is_closed());
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
}

#[test]
fn vmm_that_closes_the_channel_or_talks_nonsense_loses_it_and_nothing_else() {
    let nonsense: [&[u32]; 6] = [
        &[3, 5, 8, 0, 0],
        &[2, 1, 8, 0, 0],
        &[2, 4, 8, 0, 0],
        &[2, 5, 0, 0, 0],
        &[2, 5, 12, 0, 0],
        &[u32::MAX; 5],
    ];
    for words in nonsense {
        let mut bench = Bench::negotiated();
        let mut channel = Channel::open(&mut bench);
        bench.device.resize(MIB);
        bench.connection.tell_change();
        assert_eq!(channel.next(), Some(1 | NEED_REPLY));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // In two parts, since answers may come in parts.
        for part in bytes.chunks(11) {
            assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
            assert!(!channel.is_closed());
            channel.0.sock.write_all(part).unwrap();
        }
        assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
        assert!(channel.is_closed(), "{words:x?}");
    }
    let mut bench = Bench::negotiated();
    drop(Channel::open(&mut bench));
    for size in 1..4 {
        bench.device.resize(size * MIB);
        bench.connection.tell_change();
    }
    assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
}

#[test]
fn refused_change_is_no_reason_to_give_the_channel_up() {
    let mut bench = Bench::negotiated();
    let mut channel = Channel::open(&mut bench);
    for size in 1..40 {
        bench.device.resize(size * MIB);
        bench.connection.tell_change();
        assert_eq!(channel.next(), Some(1 | NEED_REPLY));
        channel.answer(7);
    }
}

#[test]
fn channel_that_is_no_connected_socket_is_refused() {
    let (datagram, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let listening = tempfile::tempdir().unwrap();
    let listening = std::os::unix::net::UnixListener::bind(listening.path().join("s")).unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let (alone, _) = UnixStream::pair().unwrap();
    let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let folder: OwnedFd = std::fs::File::open("/").unwrap().into();
    for fd in [
        datagram.as_raw_fd(),
        listening.as_raw_fd(),
        udp.as_raw_fd(),
        alone.as_raw_fd(),
        null.as_raw_fd(),
        folder.as_raw_fd(),
        memfd(4096).as_raw_fd(),
    ] {
        let mut bench = Bench::negotiated();
        assert!(!bench.try_set(Req::SET_BACKEND_REQ_FD, &[], &[fd]), "{fd}");
        bench.device.resize(MIB);
        bench.connection.tell_change();
        assert_eq!(bench.get(Req::GET_QUEUE_NUM), 4);
    }
}

#[test]
fn channel_without_its_feature_without_a_descriptor_or_with_two_is_refused() {
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let fd = theirs.as_raw_fd();
    let mut bench = without(1 << 5);
    assert!(!bench.try_set(Req::SET_BACKEND_REQ_FD, &[], &[fd]));
    let wrong: [(&[u8], &[i32]); 4] = [
        (&[], &[]),
        (&[], &[fd, fd]),
        (&[0; 8], &[fd]),
        (&[0; 8], &[]),
    ];
    for (payload, fds) in wrong {
        let mut bench = Bench::negotiated();
        bench
            .client
            .send(Req::SET_BACKEND_REQ_FD, NEED_REPLY, payload, fds);
        assert!(
            matches!(bench.run(), Err(ConnectionError::Protocol { .. })),
            "{} bytes, {} descriptors",
            payload.len(),
            fds.len()
        );
    }
}

#[test]
fn later_channel_replaces_the_first_and_the_end_of_the_connection_closes_it() {
    let mut bench = Bench::negotiated();
    let mut first = Channel::open(&mut bench);
    let mut second = Channel::open(&mut bench);
    assert!(first.is_closed());
    bench.set(Req::RESET_DEVICE, &[], &[]);
    bench.device.resize(MIB);
    bench.connection.tell_change();
    assert_eq!(second.next(), Some(1 | NEED_REPLY), "kept over a reset");
    drop(bench);
    assert!(second.is_closed());
}
