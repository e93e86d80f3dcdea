//! The first connection: what is found, and what is said where it does not work.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use nvme_target::{Identity, Listening, NamespaceSpec, PortSpec, SubsystemSpec, Target};

use super::super::common::Common;
use super::super::setup;
use super::super::trouble::{Trouble, later};
use super::*;
use crate::block::ErrorKind;
use crate::block::nvme_tcp::link::{Access, NamespaceState, PathState, SharedPath};

fn with_subsystem(change: impl FnOnce(SubsystemSpec) -> SubsystemSpec) -> Target {
    let subsystem = change(SubsystemSpec::new(nvme_target::DEFAULT_NQN));
    Target::builder().subsystem(subsystem).start().unwrap()
}

#[test]
fn a_namespace_is_found_and_a_member_gets_a_queue() {
    let target = one_port();
    let namespace = open(spec(&target)).unwrap();
    assert_eq!(namespace.bytes(), 64 << 20);
    assert_eq!(namespace.geometry().block, 512);
    assert_eq!(namespace.state(), NamespaceState::Present);
    let mut worker = Worker::new(&namespace);
    let queue = worker.connected(0);
    assert_eq!((queue.path, queue.qid, queue.nsid), (0, 1, 1));
    assert_eq!(queue.params.depth, 128);
    assert_eq!(queue.params.max_h2c_data, 128 << 10);
    assert_eq!(queue.params.in_capsule, 8192);
    assert_eq!(queue.limits.max_transfer, 1 << 20);
    worker.until(|| namespace.paths()[0].state() == PathState::Live);
    assert_eq!(namespace.paths()[0].access(), Access::Optimized);
    assert_eq!(target.connections(), 2);
    close(&namespace, &target);
    assert_eq!(namespace.paths()[0].state(), PathState::Lost);
    // The target counts an association that is over a little later than its host does.
    let deadline = Instant::now() + PATIENCE;
    while target.counters().associations_open > 0 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
}

#[test]
fn a_namespace_is_found_by_each_of_its_names() {
    let eui64 = Identity {
        nguid: [0; 16],
        eui64: [1, 2, 3, 4, 5, 6, 7, 8],
        uuid: [0; 16],
    };
    let target = with_subsystem(|subsystem| {
        subsystem
            .namespace(NamespaceSpec::new(1, 1 << 20))
            .namespace(NamespaceSpec::new(7, 2 << 20).lba_size(4096))
            .namespace(NamespaceSpec::new(9, 3 << 20).identity(eui64.clone()))
    });
    let mut uuid = *b"\xc0\x1d\xc0\xff\xee\x00\x40\x00\x80\x00\x11\x22\0\0\0\x07";
    let nguid = *b"\x5a\x0b\x1c\x2d\x3e\x4f\x50\x61\x72\x83\x94\xa5\0\0\0\x07";
    for (name, mib) in [
        (NamespaceName::Nsid(7), 2),
        (NamespaceName::Uuid(uuid), 2),
        (NamespaceName::Nguid(nguid), 2),
        (NamespaceName::Eui64(eui64.eui64), 3),
    ] {
        let namespace = open(NvmeSpec {
            namespace: name,
            ..spec(&target)
        });
        let namespace = namespace.unwrap();
        assert_eq!(namespace.bytes(), mib << 20, "{name:?}");
        close(&namespace, &target);
    }
    uuid[15] = 8;
    let error = refused(NvmeSpec {
        namespace: NamespaceName::Uuid(uuid),
        ..spec(&target)
    });
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    assert!(
        text.contains("is not there; those that are: 1 (UUID c01dc0ff-"),
        "{text}"
    );
    assert!(text.contains("9 (EUI64 0102030405060708)"), "{text}");
}

#[test]
fn a_namespace_that_is_not_there_is_told_with_those_that_are() {
    let target = one_port();
    let error = refused(NvmeSpec {
        namespace: NamespaceName::Nsid(5),
        ..spec(&target)
    });
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    assert!(
        text.contains("namespace 5 is not there; those that are: 1 (UUID"),
        "{text}"
    );
}

#[test]
fn each_address_says_why_it_does_not_work() {
    let target = two_ports();
    target.port(0).set_listening(Listening::Refuse).unwrap();
    target.port(1).set_listening(Listening::Close).unwrap();
    let error = refused(spec(&target)).to_string();
    let address = |port: usize| target.port(port).address().to_string();
    assert!(
        error.contains(&format!("{}: connection refused", address(0))),
        "{error}"
    );
    assert!(error.contains(&format!("{}: ", address(1))), "{error}");
    assert!(
        error.contains("closed the connection") || error.contains("reset"),
        "{error}"
    );
}

#[test]
fn why_all_paths_failed_is_told_as_it_was_when_they_had() {
    let spec = spec_of(&["127.0.0.1:1".parse().unwrap()], |_| {});
    let target = setup::Target::new(spec.subsystem.clone(), spec.options.clone()).unwrap();
    let path = Arc::new(SharedPath::new().unwrap());
    let common = Common::new(spec, target, Box::new([path]));
    // A path tries again whether or not somebody has heard yet why it failed.
    for why in ["no such subsystem", "connection refused"] {
        let Trouble::Failed(failure) = later(why) else {
            unreachable!()
        };
        common.failed(0, &failure);
    }
    let error = common.wait(Instant::now()).unwrap_err().to_string();
    assert!(error.contains("no such subsystem"), "{error}");
}

#[test]
fn a_target_that_says_nothing_costs_the_connect_timeout_and_no_more() {
    let target = one_port();
    target.port(0).set_listening(Listening::Hang).unwrap();
    let begin = Instant::now();
    let error = refused(spec_of(&[target.address()], |options| {
        options.connect_timeout = Duration::from_millis(300);
    }));
    assert!(begin.elapsed() < PATIENCE);
    let text = error.to_string();
    assert!(
        text.contains("waiting for ICResp: no answer in time"),
        "{text}"
    );
}

#[test]
fn a_subsystem_that_is_not_there_is_told() {
    let target = one_port();
    let error = refused(NvmeSpec {
        subsystem: "nqn.2016-06.io.example:other".to_owned(),
        ..spec(&target)
    });
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    assert!(
        text.contains("does not have the subsystem nqn.2016-06.io.example:other"),
        "{text}"
    );
}

#[test]
fn a_host_that_is_not_allowed_is_told_its_name() {
    let target = with_subsystem(|subsystem| {
        subsystem
            .namespace(NamespaceSpec::new(1, 1 << 20))
            .with(|controller| controller.allowed_hosts = Some(vec![]))
    });
    let error = refused(spec(&target));
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    let text = error.to_string();
    assert!(
        text.contains("does not allow this host") && text.contains(HOST),
        "{text}"
    );
}

#[test]
fn a_controller_that_is_never_ready_is_given_the_time_that_it_tells() {
    let target = with_subsystem(|subsystem| {
        subsystem
            .namespace(NamespaceSpec::new(1, 1 << 20))
            .with(|controller| {
                controller.time_to_ready = None;
                controller.timeout_500ms = 1;
            })
    });
    let text = refused(spec(&target)).to_string();
    assert!(
        text.contains("was not ready within the 500 ms that it tells"),
        "{text}"
    );
    target
        .subsystem(0)
        .configure(|controller| controller.timeout_500ms = 255);
    let spec = spec_of(&[target.address()], |options| {
        options.connect_timeout = Duration::from_secs(3);
    });
    let text = refused(spec).to_string();
    assert!(text.contains("give a longer connect-timeout"), "{text}");
}

#[test]
fn a_controller_that_takes_its_time_is_waited_for() {
    let target = with_subsystem(|subsystem| {
        subsystem
            .namespace(NamespaceSpec::new(1, 1 << 20))
            .with(|controller| controller.time_to_ready = Some(Duration::from_millis(300)))
    });
    let namespace = open(spec(&target)).unwrap();
    close(&namespace, &target);
}

#[test]
fn metadata_and_large_blocks_are_refused_by_name() {
    let target = with_subsystem(|subsystem| {
        subsystem
            .namespace(NamespaceSpec::new(1, 1 << 20).with(|options| options.metadata_bytes = 8))
    });
    let error = refused(spec(&target));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    assert!(
        text.contains("formatted with 8 bytes of metadata"),
        "{text}"
    );
}

#[test]
fn digests_are_agreed_on_or_the_path_is_refused() {
    let target = one_port();
    let digests = |options: &mut NvmeOptions| {
        options.header_digest = true;
        options.data_digest = true;
    };
    let namespace = open(spec_of(&[target.address()], digests)).unwrap();
    let queue = Worker::new(&namespace).connected(0);
    assert!(queue.params.header_digest && queue.params.data_digest);
    close(&namespace, &target);
    target
        .port(0)
        .configure(|transport| transport.data_digest = false);
    let error = refused(spec_of(&[target.address()], digests));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    assert!(text.contains("does not agree to data digests"), "{text}");
    target
        .port(0)
        .configure(|transport| transport.require_header_digest = true);
    let text = refused(spec(&target)).to_string();
    assert!(
        text.contains("the controller ended the connection"),
        "{text}"
    );
}

#[test]
fn the_alignment_that_the_controller_wants_is_kept() {
    let port = PortSpec::loopback().with(|transport| transport.cpda = 31);
    let target = Target::builder().port(port).start().unwrap();
    let namespace = open(spec_of(&[target.address()], |options| {
        options.header_digest = true;
        options.data_digest = true;
    }));
    let namespace = namespace.unwrap();
    let queue = Worker::new(&namespace).connected(0);
    assert_eq!(queue.params.host_pdu_alignment, 128);
    close(&namespace, &target);
}

#[test]
fn the_second_path_serves_while_the_first_is_down() {
    let target = two_ports();
    target.port(0).set_listening(Listening::Refuse).unwrap();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(1);
    assert_eq!(namespace.paths()[0].state(), PathState::Connecting);
    // It is tried again in the background.
    target.port(0).set_listening(Listening::Serve).unwrap();
    worker.connected(0);
    worker.until(|| namespace.paths()[0].state() == PathState::Live);
    close(&namespace, &target);
}

#[test]
fn a_second_path_to_another_namespace_is_given_up() {
    let target = two_ports();
    let other = Identity {
        nguid: [1; 16],
        eui64: [0; 8],
        uuid: [2; 16],
    };
    target.port(1).set_listening(Listening::Refuse).unwrap();
    target
        .subsystem(0)
        .set_identity_at(target.port(1), 1, other)
        .unwrap();
    let namespace = open(spec(&target)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target.port(1).set_listening(Listening::Serve).unwrap();
    let why = worker.refused();
    assert!(why.contains("another namespace"), "{why}");
    assert!(why.contains("UUID 02020202-"), "{why}");
    assert_eq!(namespace.paths()[1].state(), PathState::Lost);
    assert_eq!(namespace.paths()[0].state(), PathState::Live);
    assert_eq!(namespace.state(), NamespaceState::Present);
    close(&namespace, &target);
}

/// A peer that answers the first bytes that come with others; what came after that.
fn peer(
    answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static,
) -> (SocketAddr, thread::JoinHandle<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _): (TcpStream, _) = listener.accept().unwrap();
        let mut request = [0; 128];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(&answer(&request)).unwrap();
        let mut rest = Vec::new();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The host resets the connection when it closes it.
        if let Err(error) = stream.read_to_end(&mut rest) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        }
        let _ = stream.shutdown(Shutdown::Both);
        rest
    });
    (address, thread)
}

fn ic_resp(
    change: impl Fn(&mut [u8]) + Send + 'static,
) -> impl Fn(&[u8]) -> Vec<u8> + Send + 'static {
    move |request| {
        let mut response = request.to_vec();
        response[0] = 1;
        response[10] = 0;
        response[11] = 0;
        response[12..16].copy_from_slice(&4096u32.to_le_bytes());
        change(&mut response);
        response
    }
}

#[test]
fn an_icresp_of_wrong_values_ends_in_a_termination_request() {
    type Change = Box<dyn Fn(&mut [u8]) + Send>;
    let cases: [(&str, Change, u32); 5] = [
        ("PFV", Box::new(|b| b[8] = 1), 8),
        ("CPDA", Box::new(|b| b[10] = 32), 10),
        ("DGST", Box::new(|b| b[11] = 1), 11),
        (
            "MAXH2CDATA",
            Box::new(|b| b[12..16].copy_from_slice(&4092u32.to_le_bytes())),
            12,
        ),
        ("MAXH2CDATA", Box::new(|b| b[12] = 2), 12),
    ];
    for (field, change, offset) in cases {
        let (address, thread) = peer(ic_resp(change));
        let text = refused(spec_of(&[address], |_| {})).to_string();
        assert!(
            text.contains("broke the protocol") && text.contains(field),
            "{field}: {text}"
        );
        let told = thread.join().unwrap();
        // H2CTermReq, Invalid PDU Header Field, and which.
        assert_eq!((told[0], told[8]), (2, 1), "{field}");
        assert_eq!(told[10..14], offset.to_le_bytes(), "{field}");
    }
}

#[test]
fn a_port_that_speaks_something_else_is_told() {
    let (address, thread) = peer(|_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec());
    let text = refused(spec_of(&[address], |_| {})).to_string();
    assert!(
        text.contains("is this the port of an NVMe/TCP controller"),
        "{text}"
    );
    thread.join().unwrap();
    let (address, thread) = peer(|_| b"\x15\x03\x03\x00\x02\x02\x28\x00\x00\x00".to_vec());
    let text = refused(spec_of(&[address], |_| {})).to_string();
    assert!(text.contains("answers with TLS"), "{text}");
    thread.join().unwrap();
}
