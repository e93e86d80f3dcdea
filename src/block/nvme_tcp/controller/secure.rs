//! What protects a path: the secrets, and authentication of its queues.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::time::Instant;

use super::channel::{Channel, succeeded};
use super::dial;
use super::setup::Target;
use super::trouble::{Failure, Result, Trouble, kind_of, later, never};
use super::wait::{Waiter, Want};
use crate::block::error::{Error, ErrorKind};
use crate::block::nvme_tcp::auth::{AuthConfig, Authentication, Reason, Step};
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::secret::{DhChapSecret, TlsSecret};
use crate::block::nvme_tcp::spec::NvmeOptions;
use crate::block::nvme_tcp::tls::{Derivation, Direction, TlsError, TlsPsk, TlsSession};
use crate::block::nvme_tcp::wire::Sqe;

/// Messages of one authentication, at most: twice as many as the longest one has.
const MAX_STEPS: usize = 16;

/// The next transaction's identifier. Those that run at the same time are far fewer than it has values.
static TRANSACTION: AtomicU16 = AtomicU16::new(1);

/// The secrets of a namespace's paths. They are read once: a pipe gives its contents only once.
#[derive(Debug)]
pub(crate) struct Security {
    authentication: Option<AuthConfig>,
    tls: Option<Keys>,
    /// It was told that the host's secret is not asked for.
    told_unused: AtomicBool,
}

/// A pre-shared key, under each identity that a target may know it by.
#[derive(Debug)]
struct Keys {
    keys: Vec<TlsPsk>,
    /// The one that was taken last.
    taken: AtomicUsize,
}

impl Keys {
    fn new(secret: &TlsSecret, host_nqn: &str, subsystem: &str) -> crate::block::Result<Self> {
        let mut keys = Vec::with_capacity(Derivation::ALL.len());
        let mut refused = None;
        for derivation in Derivation::ALL {
            match TlsPsk::derive(secret, derivation, host_nqn, subsystem) {
                Ok(key) => keys.push(key),
                // Long names have room in the identities of version 1 only.
                Err(error) => refused = Some(error),
            }
        }
        if let (true, Some(error)) = (keys.is_empty(), refused) {
            return Err(Error::image(
                ErrorKind::InvalidImage,
                subsystem,
                None,
                error,
            ));
        }
        let taken = AtomicUsize::new(0);
        Ok(Self { keys, taken })
    }
}

/// The handshake of TLS, which waits as everything else of a path does.
fn shake_hands(
    stream: &TcpStream,
    key: &TlsPsk,
    deadline: Instant,
    waiter: &mut dyn Waiter,
) -> Result<std::result::Result<TlsSession, TlsError>> {
    let mut trouble = None;
    let mut wait = |direction| {
        let want = match direction {
            Direction::Read => Want::Read(stream.as_fd()),
            Direction::Write => Want::Write(stream.as_fd()),
        };
        match waiter.wait(want, deadline) {
            Ok(false) if Instant::now() >= deadline => Err(TlsError::TimedOut),
            Ok(_) => Ok(()),
            Err(other) => {
                trouble = Some(other);
                Err(TlsError::Hangup)
            }
        }
    };
    let session = TlsSession::connect_with(stream, key, &mut wait);
    match trouble {
        Some(trouble) => Err(trouble),
        None => Ok(session),
    }
}

impl Security {
    /// Reads the secrets.
    pub(crate) fn load(
        options: &NvmeOptions,
        host_nqn: &str,
        subsystem: &str,
    ) -> crate::block::Result<Self> {
        let refuse = |kind, why| Err(Error::image(kind, "nvme options", None, why));
        let load = |source: &Option<_>| {
            let secret = source.as_ref().map(DhChapSecret::load).transpose();
            secret.map(|secret| secret.map(Arc::new))
        };
        let controller = load(&options.dhchap_ctrl_secret)?;
        let authentication = match load(&options.dhchap_secret)? {
            Some(host) => Some(AuthConfig::new(host, controller)),
            None if controller.is_some() => {
                return refuse(
                    ErrorKind::InvalidImage,
                    "a controller's secret needs the host's secret as well; give dhchap-secret",
                );
            }
            None => None,
        };
        let tls = match &options.tls_key {
            Some(source) => Some(Keys::new(&TlsSecret::load(source)?, host_nqn, subsystem)?),
            None => None,
        };
        Ok(Self {
            authentication,
            tls,
            told_unused: AtomicBool::new(false),
        })
    }

    /// Connects to one of `addresses`; with TLS, where there is a key for it. A target that does not take the key
    /// under one identity is asked with the next, on a new connection.
    pub(crate) fn dial(
        &self,
        addresses: &[SocketAddr],
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Wire> {
        let Some(Keys { keys, taken }) = &self.tls else {
            return Ok(Wire::Plain(dial::connect(addresses, deadline, waiter)?));
        };
        let first = taken.load(Ordering::Relaxed);
        let mut refusal = later("there is no TLS key");
        for index in (0..keys.len()).map(|index| (first + index) % keys.len()) {
            let stream = dial::connect(addresses, deadline, waiter)?;
            match shake_hands(&stream, &keys[index], deadline, waiter)? {
                Ok(session) => {
                    taken.store(index, Ordering::Relaxed);
                    return Ok(Wire::Tls(stream, Box::new(session)));
                }
                Err(error) if error.is_refusal() => {
                    log::debug!("TLS as {:?}: {error}", keys[index].identity());
                    refusal = kind_of(ErrorKind::NotAllowed, error).during("TLS");
                }
                Err(error) => return Err(later(error).during("TLS")),
            }
        }
        Err(refusal)
    }

    /// In-band authentication of a queue that was just connected (Base section 8.13.5).
    pub(crate) fn authenticate(
        &self,
        target: &Target,
        channel: &mut Channel,
        secure_channel: bool,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<()> {
        if secure_channel {
            return Err(never(
                ErrorKind::Unsupported,
                "the controller requires a secure channel (ASCR), which is not supported; switch it off at the target",
            ));
        }
        let Some(config) = &self.authentication else {
            return Err(never(
                ErrorKind::NotAllowed,
                "the controller requires authentication; give the host's secret (dhchap-secret)",
            ));
        };
        let id = TRANSACTION.fetch_add(1, Ordering::Relaxed);
        let mut transaction =
            Authentication::new(config, &target.host.nqn, &target.subsystem, id, false);
        let mut is_wrong = false;
        for _ in 0..MAX_STEPS {
            match transaction.next() {
                Step::Send(message) => {
                    let sqe = Sqe::authentication_send(message.len() as u32);
                    let end = channel.run_with(sqe, &message, deadline, waiter);
                    // What is wrong is known, however the controller takes it: Linux's closes the connection.
                    if is_wrong && !matches!(end, Err(Trouble::Closed)) {
                        continue;
                    }
                    succeeded(end.map_err(without_a_word)?, "Authentication Send")?;
                }
                Step::Receive(most) => {
                    let most = most as u32;
                    let sqe = Sqe::authentication_receive(most);
                    let received = channel.run_for(sqe, most, deadline, waiter);
                    let (end, message) = received.map_err(without_a_word)?;
                    succeeded(end, "Authentication Receive")?;
                    // What is wrong with it is told by the next step, behind what the controller is to be told.
                    if let Err(error) = transaction.received(&message) {
                        log::debug!("authentication: {error}");
                        is_wrong = true;
                    }
                }
                Step::Done(_) => return Ok(()),
                Step::Failed(error) => {
                    // A controller that cannot authenticate itself says no more than one that refuses the host.
                    let advice = match error.by_controller()
                        && error.reason() == Reason::Failed
                        && config.controller.is_some()
                    {
                        true => {
                            ", and that the target has a controller's secret for it, as one is given here"
                        }
                        false => "",
                    };
                    return Err(never(ErrorKind::NotAllowed, format!("{error}{advice}")));
                }
            }
        }
        Err(later("the authentication does not come to an end"))
    }

    /// The controller requires no authentication: one that was to prove that it is the right one has to.
    pub(crate) fn none_required(&self) -> Result<()> {
        let proof = self
            .authentication
            .as_ref()
            .is_some_and(|config| config.controller.is_some());
        if self.authentication.is_some()
            && !proof
            && !self.told_unused.swap(true, Ordering::Relaxed)
        {
            log::warn!(
                "a target does not ask for authentication, and a secret for it is given: it lets in any host that \
                 tells an allowed NQN; switch authentication on there, or leave dhchap-secret out"
            );
        }
        if proof {
            return Err(never(
                ErrorKind::NotAllowed,
                "the controller authenticates neither the host nor itself, and a secret of it is given; switch \
                 authentication on at the target, or leave dhchap-ctrl-secret out",
            ));
        }
        Ok(())
    }
}

/// What ended an authentication without a message of the protocol. A target may close the connection before its
/// failure message is read.
fn without_a_word(trouble: Trouble) -> Trouble {
    match trouble {
        Trouble::Closed => Trouble::Closed,
        Trouble::Failed(failure) => Trouble::Failed(Failure {
            text: format!(
                "authentication: {}; if that happens again, check the host's secret (dhchap-secret) here and there",
                failure.text
            ),
            ..failure
        }),
    }
}
