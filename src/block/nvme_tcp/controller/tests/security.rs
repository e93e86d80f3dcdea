//! Paths that are authenticated, and those that go through TLS.

use std::io::{Seek, Write};

use nvme_target::{
    AuthFault, AuthOptions, Group, Hash, NamespaceSpec, PortSpec, SubsystemSpec, Target, TlsFault,
    TlsOptions,
};

use super::relay::{Side, relay};
use super::*;
use crate::block::crypt::KeySource;
use crate::block::nvme_tcp::NvmeStorage;
use crate::block::nvme_tcp::link::{PathState, Wire};
use crate::block::{ErrorKind, Storage};
use crate::reactor::{Epochs, Io, IoConfig};

/// A secret's text: `len` bytes that count from `first`, and their CRC-32.
fn text(form: &str, first: u8, len: u8) -> String {
    let mut bytes: Vec<u8> = (first..first + len).collect();
    let mut crc = flate2::Crc::new();
    crc.update(&bytes);
    bytes.extend(crc.sum().to_le_bytes());
    format!("{form}:{}:", openssl::base64::encode_block(&bytes))
}

fn host_secret() -> String {
    text("DHHC-1:00", 1, 32)
}

fn controller_secret() -> String {
    text("DHHC-1:02", 64, 48)
}

fn tls_key() -> String {
    text("NVMeTLSkey-1:01", 128, 32)
}

/// It comes from an open file, which has it once.
fn given(text: &str) -> Option<KeySource> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.rewind().unwrap();
    Some(KeySource::Fd(Arc::new(file)))
}

/// Both sides have both secrets.
fn both_ways() -> AuthOptions {
    AuthOptions {
        controller_secret: Some(controller_secret()),
        ..AuthOptions::new(host_secret())
    }
}

fn with_secrets(options: &mut NvmeOptions) {
    options.dhchap_secret = given(&host_secret());
    options.dhchap_ctrl_secret = given(&controller_secret());
}

fn subsystem(auth: Option<AuthOptions>) -> SubsystemSpec {
    SubsystemSpec::new(nvme_target::DEFAULT_NQN)
        .namespace(NamespaceSpec::new(1, 64 << 20))
        .with(|controller| controller.auth = auth)
}

fn authenticating(auth: AuthOptions) -> Target {
    let subsystem = subsystem(Some(auth));
    Target::builder().subsystem(subsystem).start().unwrap()
}

fn secured(tls: TlsOptions, auth: Option<AuthOptions>) -> Target {
    let port = PortSpec::loopback().with(|transport| transport.tls = Some(tls));
    let target = Target::builder().subsystem(subsystem(auth)).port(port);
    target.start().unwrap()
}

/// How many queues have proved that their host knows its secret.
fn authenticated(target: &Target) -> usize {
    let notes = target.notes();
    let proofs = notes.iter().filter(|note| note.ends_with(" Success1"));
    proofs.count()
}

/// Why a target is not connected with these options; how the target sees it is checked as well.
fn refused_with(target: &Target, change: impl FnOnce(&mut NvmeOptions)) -> (ErrorKind, String) {
    let begin = Instant::now();
    let error = refused(spec_of(&[target.address()], change));
    assert!(begin.elapsed() < PATIENCE);
    assert_eq!(target.violations(), Vec::<String>::new());
    let text = error.to_string();
    for secret in [host_secret(), controller_secret(), tls_key()] {
        let secret = secret.rsplit(':').nth(1).unwrap().to_owned();
        assert!(!text.contains(&secret), "{text}");
    }
    (error.kind(), text)
}

#[test]
fn hosts_and_controllers_authenticate_with_each_hash_and_group() {
    let hashes = [Hash::Sha256, Hash::Sha384, Hash::Sha512];
    let some = [Group::Null, Group::Ffdhe2048];
    let mut cases: Vec<_> = hashes
        .iter()
        .flat_map(|hash| some.map(|group| (*hash, group)))
        .collect();
    cases.push((Hash::Sha256, Group::Ffdhe3072));
    for (hash, group) in cases {
        for controller in [false, true] {
            let target = authenticating(AuthOptions {
                hashes: vec![hash],
                groups: vec![group],
                ..both_ways()
            });
            let spec = spec_of(&[target.address()], |options| {
                with_secrets(options);
                // The target's arithmetic is not the fastest.
                options.connect_timeout = PATIENCE;
                if !controller {
                    options.dhchap_ctrl_secret = None;
                }
            });
            let namespace = open(spec).unwrap();
            Worker::new(&namespace).connected(0);
            // The admin queue, and the member's.
            assert_eq!(authenticated(&target), 2, "{hash:?} {group:?}");
            close(&namespace, &target);
        }
    }
}

#[test]
fn queues_authenticate_again_after_a_loss_and_when_one_is_made_anew() {
    let target = authenticating(both_ways());
    let namespace = open(spec_of(&[target.address()], with_secrets)).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    target.drop_connections();
    worker.lost(0);
    let queue = worker.connected(0);
    assert_eq!(authenticated(&target), 4);
    namespace.paths()[0].send(crate::block::nvme_tcp::link::PathCommand::QueueFailed {
        member: worker.member.number(),
        generation: queue.generation,
        why: "the test says so".to_owned(),
    });
    worker.connected(0);
    assert_eq!(authenticated(&target), 5);
    close(&namespace, &target);
}

#[test]
fn a_target_that_authenticates_the_admin_queue_only_is_taken_as_it_is() {
    let target = authenticating(AuthOptions {
        io_queues: false,
        ..AuthOptions::new(host_secret())
    });
    let spec = spec_of(&[target.address()], |options| {
        options.dhchap_secret = given(&host_secret());
    });
    let namespace = open(spec).unwrap();
    Worker::new(&namespace).connected(0);
    assert_eq!(authenticated(&target), 1);
    close(&namespace, &target);
}

#[test]
fn secrets_that_do_not_fit_are_told_apart() {
    let other = text("DHHC-1:00", 2, 32);
    let target = authenticating(both_ways());
    type Change<'a> = Box<dyn FnOnce(&mut NvmeOptions) + 'a>;
    let cases: [(Change<'_>, &str); 5] = [
        (
            Box::new(|options| options.dhchap_secret = given(&other)),
            "check that the host's secret is the one that the target has",
        ),
        (
            Box::new(|options| options.dhchap_ctrl_secret = given(&other)),
            "the controller does not know the subsystem's secret",
        ),
        (
            Box::new(|options| {
                options.dhchap_secret = None;
                options.dhchap_ctrl_secret = None;
            }),
            "requires authentication; give the host's secret (dhchap-secret)",
        ),
        (
            Box::new(|options| options.dhchap_secret = None),
            "a controller's secret needs the host's secret as well",
        ),
        (
            Box::new(|options| options.dhchap_secret = given("DHHC-1:00:AAAA:")),
            "this is no DH-HMAC-CHAP secret",
        ),
    ];
    for (change, why) in cases {
        let (_, text) = refused_with(&target, |options| {
            with_secrets(options);
            change(options);
        });
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn a_controller_that_is_to_prove_itself_and_does_not_is_refused() {
    // It has no secret of its own.
    let target = authenticating(AuthOptions::new(host_secret()));
    let (kind, text) = refused_with(&target, with_secrets);
    assert_eq!(kind, ErrorKind::NotAllowed);
    let why = "that the target has a controller's secret for it";
    assert!(text.contains(why), "{text}");
    // It asks for nothing.
    let target = one_port();
    let (kind, text) = refused_with(&target, with_secrets);
    assert_eq!(kind, ErrorKind::NotAllowed);
    let why = "authenticates neither the host nor itself";
    assert!(text.contains(why), "{text}");
    // A host that has a secret need not be asked for it.
    let spec = spec_of(&[target.address()], |options| {
        options.dhchap_secret = given(&host_secret());
    });
    let namespace = open(spec).unwrap();
    Worker::new(&namespace).connected(0);
    close(&namespace, &target);
}

#[test]
fn what_goes_wrong_with_an_authentication_is_told_in_time() {
    let cases = [
        (
            AuthFault::HangAtChallenge,
            "authentication: no answer in time",
        ),
        (
            AuthFault::HangAtSuccess,
            "authentication: no answer in time",
        ),
        (
            AuthFault::FailInsteadOfChallenge(1, 4),
            "refused the authentication: hash function not usable",
        ),
        (
            AuthFault::FailInsteadOfSuccess(1, 1),
            "refused the authentication: authentication failed",
        ),
        (
            AuthFault::WrongResponse,
            "does not know the subsystem's secret",
        ),
        (
            AuthFault::WrongResponseAndClose,
            "does not know the subsystem's secret",
        ),
        (AuthFault::NoResponse, "did not authenticate itself"),
        (AuthFault::ChallengeHashLength(31), "31"),
        (AuthFault::ChallengeHashLength(64), "64"),
        (AuthFault::ChallengeHash(9), "hash"),
        (AuthFault::ChallengeGroup(9), "group"),
        (AuthFault::ChallengeTooShort(1), "bytes"),
        (AuthFault::ChallengeTooShort(u16::MAX), "bytes"),
        (AuthFault::Exponential(0), "Diffie-Hellman value"),
        (AuthFault::Exponential(1), "Diffie-Hellman value"),
        (AuthFault::WrongTransaction, "transaction"),
        (AuthFault::WrongMessage(0x33), "message"),
    ];
    let mut wrong = Vec::new();
    for (fault, why) in cases {
        let target = authenticating(AuthOptions {
            fault: Some(fault),
            groups: match fault {
                AuthFault::Exponential(_) => vec![Group::Ffdhe2048],
                _ => vec![Group::Null],
            },
            ..both_ways()
        });
        let (_, text) = refused_with(&target, |options| {
            with_secrets(options);
            options.connect_timeout = match fault {
                AuthFault::HangAtChallenge | AuthFault::HangAtSuccess => Duration::from_millis(500),
                _ => PATIENCE,
            };
        });
        let text = text.split("cannot be reached: ").nth(1).unwrap();
        if !text.contains(why) {
            wrong.push((fault, text.to_owned()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a_secure_channel_that_is_required_is_refused_by_name() {
    let target = authenticating(both_ways());
    let mut first = true;
    let address = relay(target.address(), move |side, pdu| {
        // AUTHREQ of the Connect response: ASCR beside ATR (Base section 6.3).
        if side == Side::Controller && pdu[0] == 5 && first {
            pdu[10] |= 1 << 2;
            first = false;
        }
    });
    let error = refused(spec_of(&[address], with_secrets));
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    let text = error.to_string();
    assert!(text.contains("requires a secure channel (ASCR)"), "{text}");
    assert_eq!(authenticated(&target), 0);
}

/// A namespace in a worker's hands.
struct Disk {
    io: Io,
    storage: Option<Storage>,
    namespace: Arc<Namespace>,
}

impl Disk {
    fn open(spec: NvmeSpec) -> Self {
        let namespace = open(spec).unwrap();
        let config = IoConfig {
            worker: 0,
            entries: 64,
            epochs: Epochs::new(),
        };
        let storage = NvmeStorage::new(namespace.clone());
        Self {
            io: Io::new(&config).unwrap(),
            storage: Some(Storage::Nvme(Box::new(storage))),
            namespace,
        }
    }

    fn storage(&self) -> &Storage {
        self.storage.as_ref().unwrap()
    }

    /// Writes of this length, many at once, that are read again in the same way, and are at the target.
    fn check(&self, target: &Target, len: usize, first: u8) {
        let many = (8 << 20) / len.max(128 << 10);
        let mut from: Vec<_> = (0..many).map(|_| self.io.buf(len)).collect();
        let mut to: Vec<_> = (0..many).map(|_| self.io.buf(len)).collect();
        for (n, buf) in from.iter_mut().enumerate() {
            for (at, byte) in buf.iter_mut().enumerate() {
                *byte = first.wrapping_add((at * 7 + n + at / 509) as u8);
            }
        }
        let place = |n: usize| (n * len) as u64;
        self.io.block_on(async {
            let mut writes = Vec::new();
            for (n, buf) in from.iter_mut().enumerate() {
                writes.push(self.storage().begin_write(&self.io, place(n), buf.sg()));
            }
            for write in writes {
                write.finish(&self.io).await.unwrap();
            }
            let mut reads = Vec::new();
            for (n, buf) in to.iter_mut().enumerate() {
                reads.push(self.storage().begin_read(&self.io, place(n), buf.sg()));
            }
            for read in reads {
                read.finish(&self.io).await.unwrap();
            }
        });
        let namespace = target.subsystem(0).namespace(1).unwrap();
        for (n, (from, to)) in from.iter().zip(&to).enumerate() {
            assert!(**from == **to, "{len} bytes, number {n}");
            assert!(namespace.read(place(n), len) == **from, "{len} bytes, {n}");
        }
    }

    fn close(mut self, target: &Target) {
        self.io.close();
        self.storage = None;
        close(&self.namespace, target);
    }
}

#[test]
fn bytes_get_where_they_belong_through_tls_with_digests_and_without() {
    for (header, data) in [(false, false), (true, false), (false, true), (true, true)] {
        let target = secured(TlsOptions::new(tls_key()), None);
        let disk = Disk::open(spec_of(&[target.address()], |options| {
            options.tls_key = given(&tls_key());
            options.header_digest = header;
            options.data_digest = data;
        }));
        for shift in 12..=20 {
            disk.check(&target, 1 << shift, shift);
        }
        // New connections, new sessions.
        let before = target.counters().associations;
        target.drop_connections();
        disk.check(&target, 64 << 10, 99);
        assert_eq!(target.counters().associations, before + 1);
        disk.close(&target);
    }
}

#[test]
fn a_queue_through_tls_is_one() {
    let target = secured(TlsOptions::new(tls_key()), None);
    let spec = spec_of(&[target.address()], |options| {
        options.tls_key = given(&tls_key());
    });
    let namespace = open(spec).unwrap();
    let queue = Worker::new(&namespace).connected(0);
    assert!(matches!(queue.wire, Wire::Tls(..)));
    close(&namespace, &target);
}

#[test]
fn queues_authenticate_within_tls() {
    let target = secured(TlsOptions::new(tls_key()), Some(both_ways()));
    let disk = Disk::open(spec_of(&[target.address()], |options| {
        with_secrets(options);
        options.tls_key = given(&tls_key());
        options.data_digest = true;
    }));
    disk.check(&target, 64 << 10, 1);
    let before = authenticated(&target);
    assert!(before >= 2);
    target.drop_connections();
    disk.check(&target, 4 << 10, 2);
    assert!(authenticated(&target) >= before + 2);
    disk.close(&target);
}

#[test]
fn each_derivation_is_tried_until_the_target_knows_one() {
    let long = text("NVMeTLSkey-1:02", 128, 48);
    let retained = text("NVMeTLSkey-1:00", 128, 32);
    for key in [tls_key(), long, retained] {
        for (known, compat) in [
            ("NVMe1", false),
            ("NVMe0", false),
            ("NVMe1", true),
            ("NVMe0", true),
        ] {
            let target = secured(
                TlsOptions {
                    known: known.to_owned(),
                    compat,
                    ..TlsOptions::new(&key)
                },
                None,
            );
            let spec = spec_of(&[target.address()], |options| {
                options.tls_key = given(&key);
            });
            let namespace = open(spec).unwrap();
            let tried = target.port(0).accepted();
            Worker::new(&namespace).connected(0);
            // The one that was taken is tried first from then on.
            assert_eq!(target.port(0).accepted(), tried + 1, "{known} {compat}");
            close(&namespace, &target);
        }
    }
}

#[test]
fn keys_and_identities_that_the_target_does_not_have_are_refused() {
    let why = "TLS: the target refused the pre-shared key";
    let with_key = |options: &mut NvmeOptions| options.tls_key = given(&tls_key());
    for wrong in [
        TlsOptions::new(text("NVMeTLSkey-1:01", 7, 32)),
        TlsOptions {
            known: "NVMe1R01 nqn.2014-08.org.example:somebody-else ".to_owned(),
            ..TlsOptions::new(tls_key())
        },
        TlsOptions {
            fault: Some(TlsFault::WrongKey),
            ..TlsOptions::new(tls_key())
        },
    ] {
        let target = secured(wrong, None);
        let (kind, text) = refused_with(&target, with_key);
        assert_eq!(kind, ErrorKind::NotAllowed);
        assert!(text.contains(why), "{text}");
    }
}

#[test]
fn tls_with_a_target_that_has_none_and_none_with_one_that_has_it() {
    let target = one_port();
    let with_key = spec_of(&[target.address()], |options| {
        options.tls_key = given(&tls_key());
    });
    let text = refused(with_key).to_string();
    let why = "TLS: the target speaks no TLS 1.3 on this port";
    assert!(text.contains(why), "{text}");
    // Nothing was said to it that was to go through TLS.
    assert_eq!(target.counters().connects, 0);
    let target = secured(TlsOptions::new(tls_key()), None);
    let text = refused(spec(&target)).to_string();
    assert!(
        text.contains("TLS") && text.contains("give its key (tls-key)"),
        "{text}"
    );
}

#[test]
fn a_handshake_that_is_not_answered_costs_the_connect_timeout() {
    let hangs = TlsOptions {
        fault: Some(TlsFault::Hang),
        ..TlsOptions::new(tls_key())
    };
    let target = secured(hangs, None);
    let (_, text) = refused_with(&target, |options| {
        options.tls_key = given(&tls_key());
        options.connect_timeout = Duration::from_millis(300);
    });
    assert!(
        text.contains("TLS: the target did not answer in time"),
        "{text}"
    );
}

#[test]
fn nothing_waits_for_a_handshake_that_is_not_answered() {
    let target = secured(TlsOptions::new(tls_key()), None);
    let spec = spec_of(&[target.address()], |options| {
        options.tls_key = given(&tls_key());
        options.connect_timeout = Duration::from_secs(3600);
        options.keep_alive = Duration::from_millis(500);
    });
    let namespace = open(spec).unwrap();
    target.port(0).configure(|transport| {
        transport.tls = Some(TlsOptions {
            fault: Some(TlsFault::Hang),
            ..TlsOptions::new(tls_key())
        });
    });
    let before = target.counters().keep_alives();
    let accepted = target.port(0).accepted();
    let _worker = Worker::new(&namespace);
    let deadline = Instant::now() + PATIENCE;
    // The member's queue does not come up, and the admin queue is kept alive all the same.
    while target.port(0).accepted() == accepted || target.counters().keep_alives() < before + 5 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    assert_eq!(target.counters().associations, 1);
    close(&namespace, &target);
}

#[test]
fn a_path_whose_target_takes_the_key_no_more_is_tried_until_it_does() {
    let target = secured(TlsOptions::new(tls_key()), None);
    let spec = spec_of(&[target.address()], |options| {
        options.tls_key = given(&tls_key());
        options.reconnect_delay = Duration::from_millis(20);
    });
    let namespace = open(spec).unwrap();
    let mut worker = Worker::new(&namespace);
    worker.connected(0);
    let key = |key: String| {
        let tls = Some(TlsOptions::new(key));
        target.port(0).configure(|transport| transport.tls = tls);
    };
    key(text("NVMeTLSkey-1:01", 7, 32));
    target.drop_connections();
    worker.lost(0);
    let before = target.port(0).accepted();
    let deadline = Instant::now() + PATIENCE;
    while target.port(0).accepted() < before + 10 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    assert_eq!(namespace.paths()[0].state(), PathState::Connecting);
    key(tls_key());
    worker.connected(0);
    close(&namespace, &target);
}
