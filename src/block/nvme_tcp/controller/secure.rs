//! What protects a path: the secrets, and authentication of its queues.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use super::channel::{Channel, succeeded};
use super::setup::Target;
use super::trouble::{Result, later, never};
use super::wait::Waiter;
use crate::block::error::{Error, ErrorKind};
use crate::block::nvme_tcp::auth::{AuthConfig, Authentication, Step};
use crate::block::nvme_tcp::link::Wire;
use crate::block::nvme_tcp::secret::DhChapSecret;
use crate::block::nvme_tcp::spec::NvmeOptions;
use crate::block::nvme_tcp::wire::Sqe;

/// Messages of one authentication, at most: twice as many as the longest one has.
const MAX_STEPS: usize = 16;

/// The next transaction's identifier. Those that run at the same time are far fewer than it has values.
static TRANSACTION: AtomicU16 = AtomicU16::new(1);

/// The secrets of a namespace's paths. They are read once: a pipe gives its contents only once.
#[derive(Debug)]
pub(crate) struct Security {
    authentication: Option<AuthConfig>,
}

impl Security {
    /// Reads the secrets.
    pub(crate) fn load(options: &NvmeOptions) -> crate::block::Result<Self> {
        let refuse = |kind, why| Err(Error::image(kind, "nvme options", None, why));
        // Without it the connection would be plain, which is not what was asked for.
        if options.tls_key.is_some() {
            return refuse(
                ErrorKind::Unsupported,
                "TLS of remote disks is not served by this version; leave the TLS key out, and use a network that \
                 you trust",
            );
        }
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
        Ok(Self { authentication })
    }

    /// The transport on a connection that was just made.
    pub(crate) fn wrap(&self, stream: TcpStream) -> Wire {
        Wire::Plain(stream)
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
        for _ in 0..MAX_STEPS {
            match transaction.next() {
                Step::Send(message) => {
                    let sqe = Sqe::authentication_send(message.len() as u32);
                    let end = channel.run_with(sqe, &message, deadline, waiter);
                    succeeded(
                        end.map_err(|trouble| trouble.during("authentication"))?,
                        "Authentication Send",
                    )?;
                }
                Step::Receive(most) => {
                    let most = most as u32;
                    let sqe = Sqe::authentication_receive(most);
                    let received = channel.run_for(sqe, most, deadline, waiter);
                    let (end, message) =
                        received.map_err(|trouble| trouble.during("authentication"))?;
                    succeeded(end, "Authentication Receive")?;
                    // What is wrong with it is told by the next step, behind what the controller is to be told.
                    if let Err(error) = transaction.received(&message) {
                        log::debug!("authentication: {error}");
                    }
                }
                Step::Done(_) => return Ok(()),
                Step::Failed(error) => return Err(never(ErrorKind::NotAllowed, error)),
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
