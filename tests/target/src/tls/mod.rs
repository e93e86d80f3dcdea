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
    /// Keys are derived as libnvme did before version 1.15: the parts of HKDF-Expand-Label's argument have no
    /// lengths.
    pub compat: bool,
    /// What goes wrong.
    pub fault: Option<TlsFault>,
}

impl TlsOptions {
    /// TLS with a configured PSK, for any host and subsystem.
    pub fn new(key: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            compat: false,
            fault: None,
        }
    }
}

// A key is never printed, not even a test's.
impl std::fmt::Debug for TlsOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsOptions")
            .field("compat", &self.compat)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
