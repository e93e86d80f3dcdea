//! TLS 1.3 with pre-shared keys, the server's side (transport specification, section 3.6).

mod key;
mod server;

pub(crate) use server::{Peer, Server, peer};

/// What goes wrong with TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsFault {
    /// The host's first message is not answered.
    Hang,
    /// The controller has another key than it should.
    WrongKey,
}

/// How the connections of a port are secured.
#[derive(Clone)]
pub struct TlsOptions {
    /// The configured PSK, as `NVMeTLSkey-1:…:`.
    pub key: String,
    /// Keys are derived as libnvme did before version 1.15: in HKDF-Expand-Label's argument the length of the key is
    /// little-endian, and the other parts have none.
    pub compat: bool,
    /// How the identities begin that there is a key for: `NVMe1` for those of version 1 alone, say.
    pub known: String,
    /// What goes wrong.
    pub fault: Option<TlsFault>,
}

impl TlsOptions {
    /// TLS with a configured PSK, for any host and subsystem.
    pub fn new(key: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            compat: false,
            known: String::new(),
            fault: None,
        }
    }
}

// A key is never printed, not even a test's.
impl std::fmt::Debug for TlsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsOptions")
            .field("compat", &self.compat)
            .field("known", &self.known)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
