//! In-band authentication, the controller's side of DH-HMAC-CHAP (base specification, section 8.13.5).

mod dh;
mod hash;
mod protocol;
pub(crate) mod secret;

pub(crate) use protocol::Auth;

/// A hash function that a host and a controller can agree on, by its identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Hash {
    /// SHA-256.
    Sha256 = 1,
    /// SHA-384.
    Sha384 = 2,
    /// SHA-512.
    Sha512 = 3,
}

/// A Diffie-Hellman group, by its identifier (RFC 7919).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Group {
    /// None: the challenge is answered as it is.
    Null = 0,
    /// ffdhe2048.
    Ffdhe2048 = 1,
    /// ffdhe3072.
    Ffdhe3072 = 2,
    /// ffdhe4096.
    Ffdhe4096 = 3,
    /// ffdhe6144.
    Ffdhe6144 = 4,
    /// ffdhe8192.
    Ffdhe8192 = 5,
}

/// What goes wrong with an authentication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthFault {
    /// The host is told AUTH_Failure1 with these reason codes instead of the challenge.
    FailInsteadOfChallenge(u8, u8),
    /// The host is told AUTH_Failure1 with these reason codes instead of success.
    FailInsteadOfSuccess(u8, u8),
    /// The challenge is never told: Authentication Receive is not answered.
    HangAtChallenge,
    /// The success is never told.
    HangAtSuccess,
    /// The controller's own response is wrong.
    WrongResponse,
    /// The same, and where the host says so the connection is closed without an answer, as Linux's target does it.
    WrongResponseAndClose,
    /// The controller does not respond to the host's challenge (RVALID is 0).
    NoResponse,
    /// HL of the challenge.
    ChallengeHashLength(u8),
    /// HashID of the challenge.
    ChallengeHash(u8),
    /// DHgID of the challenge.
    ChallengeGroup(u8),
    /// DHVLEN of the challenge is more than what follows by this.
    ChallengeTooShort(u16),
    /// The controller's exponential is this number.
    Exponential(u8),
    /// Messages have another transaction identifier.
    WrongTransaction,
    /// Messages have this AUTH_ID.
    WrongMessage(u8),
}

/// How a controller authenticates its hosts, and itself.
#[derive(Clone)]
pub struct AuthOptions {
    /// The host's secret, as `DHHC-1:…:`.
    pub host_secret: String,
    /// The controller's secret; without it a host that challenges it is not answered.
    pub controller_secret: Option<String>,
    /// Hash functions, best first.
    pub hashes: Vec<Hash>,
    /// Groups, best first.
    pub groups: Vec<Group>,
    /// I/O queues are authenticated as well as the admin queue.
    pub io_queues: bool,
    /// What goes wrong.
    pub fault: Option<AuthFault>,
}

impl AuthOptions {
    /// Authentication of the host with a secret, by SHA-256 and without a group, on all queues.
    pub fn new(host_secret: impl Into<String>) -> Self {
        Self {
            host_secret: host_secret.into(),
            controller_secret: None,
            hashes: vec![Hash::Sha256],
            groups: vec![Group::Null],
            io_queues: true,
            fault: None,
        }
    }
}

// A secret is never printed, not even a test's.
impl std::fmt::Debug for AuthOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuthOptions")
            .field("controller_secret", &self.controller_secret.is_some())
            .field("hashes", &self.hashes)
            .field("groups", &self.groups)
            .field("io_queues", &self.io_queues)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
