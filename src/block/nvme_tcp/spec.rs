//! What the user asked for: a namespace, the ways to it, and how to treat them.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::block::crypt::KeySource;
use crate::block::error::Result;

/// Port of NVMe/TCP I/O controllers (TCP section 3.1.1) where none is given.
pub const IO_PORT: u16 = 4420;
/// Port of NVMe/TCP discovery controllers where none is given.
pub const DISCOVERY_PORT: u16 = 8009;

/// One address of a subsystem.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// A name, an IPv4 address, or an IPv6 address without brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// How a namespace is named within its subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NamespaceName {
    /// By its number, which the subsystem may give to another one later.
    Nsid(u32),
    /// By its UUID, as it is written: big endian.
    Uuid([u8; 16]),
    /// By its NGUID.
    Nguid([u8; 16]),
    /// By its EUI64.
    Eui64([u8; 8]),
}

/// Which of several usable paths a request takes; optimized ones come before the others in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPolicy {
    /// The one with the fewest commands outstanding, of the asking worker.
    #[default]
    QueueDepth,
    /// One after the other.
    RoundRobin,
}

impl FromStr for IoPolicy {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        match name {
            "queue-depth" => Ok(Self::QueueDepth),
            "round-robin" => Ok(Self::RoundRobin),
            _ => Err(format!(
                "policy {name:?} is not known; queue-depth and round-robin are"
            )),
        }
    }
}

/// How remote namespaces of a disk are connected and treated.
///
/// Where a disk is opened ([`Disk::open`](crate::block::Disk::open)) the secrets are read before anything is
/// connected ([`NvmeOptions::read_secrets`]): in a namespace's [`NvmeSpec`] each is [`KeySource::Read`], which can be
/// read as often as an association is made, whatever has become of the file or descriptor that it came from.
#[derive(Clone, Debug)]
pub struct NvmeOptions {
    /// The host's NQN; none: the machine's, or one that is made and kept.
    pub host_nqn: Option<String>,
    /// The host's identifier, as a UUID is written: big endian; none: the machine's, or one that is made and kept.
    pub host_id: Option<[u8; 16]>,
    /// Ask for header digests.
    pub header_digest: bool,
    /// Ask for data digests.
    pub data_digest: bool,
    /// Commands outstanding on one queue, at most; the controller may grant fewer.
    pub queue_depth: u16,
    /// The keep-alive timeout (KATO); zero: none.
    pub keep_alive: Duration,
    /// How long connecting may take, all steps of one queue together.
    pub connect_timeout: Duration,
    /// How long a command may take before it is aborted, and again before the controller is reset.
    pub io_timeout: Duration,
    /// Longest time between two attempts to connect again; the first ones come sooner.
    pub reconnect_delay: Duration,
    /// How long a lost controller is tried before it is given up; none: for ever.
    pub ctrl_loss: Option<Duration>,
    /// How long requests are held while no path is usable; none: as long as there is hope.
    pub fast_io_fail: Option<Duration>,
    /// Which of several paths.
    pub policy: IoPolicy,
    /// Secret of the host for in-band authentication (`DHHC-1:`).
    pub dhchap_secret: Option<KeySource>,
    /// Secret of the controller, which then has to prove that it knows it.
    pub dhchap_ctrl_secret: Option<KeySource>,
    /// Pre-shared key for TLS 1.3 (`NVMeTLSkey-1:`).
    pub tls_key: Option<KeySource>,
    /// Hold a reservation of the namespace while it is in use.
    pub reservations: bool,
}

impl Default for NvmeOptions {
    fn default() -> Self {
        Self {
            host_nqn: None,
            host_id: None,
            header_digest: false,
            data_digest: false,
            queue_depth: 128,
            keep_alive: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(5),
            io_timeout: Duration::from_secs(30),
            reconnect_delay: Duration::from_secs(2),
            ctrl_loss: Some(Duration::from_secs(600)),
            fast_io_fail: None,
            policy: IoPolicy::default(),
            dhchap_secret: None,
            dhchap_ctrl_secret: None,
            tls_key: None,
            reservations: false,
        }
    }
}

impl NvmeOptions {
    /// The same with all secrets read.
    ///
    /// # Errors
    /// Those of reading one: it names where it was to be.
    pub(in crate::block) fn read_secrets(&self) -> Result<Self> {
        let read = |source: &Option<KeySource>| source.as_ref().map(KeySource::read).transpose();
        Ok(Self {
            dhchap_secret: read(&self.dhchap_secret)?,
            dhchap_ctrl_secret: read(&self.dhchap_ctrl_secret)?,
            tls_key: read(&self.tls_key)?,
            ..self.clone()
        })
    }

    /// A pipe with the secret for each that was read from a descriptor, and that descriptor's number: for a
    /// process that takes this one's place.
    ///
    /// # Errors
    /// No more pipes are to be had.
    pub(in crate::block) fn descriptors(&self) -> io::Result<Vec<(RawFd, File)>> {
        let secrets = [&self.dhchap_secret, &self.dhchap_ctrl_secret, &self.tls_key];
        let read = secrets.into_iter().filter_map(|source| match source {
            Some(KeySource::Read(key)) => key.descriptor(),
            _ => None,
        });
        read.collect()
    }
}

/// A remote namespace.
#[derive(Clone, Debug)]
pub struct NvmeSpec {
    /// The subsystem's addresses, at least one; a path each.
    pub addresses: Vec<Address>,
    /// The subsystem's NQN.
    pub subsystem: String,
    /// Which of its namespaces.
    pub namespace: NamespaceName,
    /// No command that changes anything is sent.
    pub read_only: bool,
    /// How.
    pub options: Arc<NvmeOptions>,
}
