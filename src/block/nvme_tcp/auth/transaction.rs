//! One authentication transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use openssl::error::ErrorStack;
use zeroize::Zeroizing;

use super::group::ExchangeError;
use super::message::{self, Challenge, Reply, Success1};
use super::{AuthConfig, AuthError, DhGroup, Hash, Reason};
use crate::block::nvme_tcp::secret::DhChapSecret;

/// What is due in a transaction.
#[derive(Debug)]
pub enum Step {
    /// Send this message with Authentication Send, then ask again.
    Send(Vec<u8>),
    /// Ask for that many bytes with Authentication Receive, give what comes to
    /// [`Authentication::received`], then ask again.
    Receive(usize),
    /// The queue is authenticated.
    Done(Outcome),
    /// It is not. The connection is to be closed.
    Failed(AuthError),
}

/// What a transaction agreed on.
pub struct Outcome {
    /// The hash function.
    pub hash: Hash,
    /// The Diffie-Hellman group.
    pub group: DhGroup,
    /// True if the controller authenticated itself as well.
    pub controller_authenticated: bool,
    /// The generated PSK for TLS, if a secure channel was asked for (section 8.3.5.5.9).
    pub generated_psk: Option<Zeroizing<Vec<u8>>>,
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outcome")
            .field("hash", &self.hash)
            .field("group", &self.group)
            .field("controller_authenticated", &self.controller_authenticated)
            .field(
                "generated_psk",
                &self.generated_psk.as_ref().map(|_| "[secret]"),
            )
            .finish()
    }
}

/// The host's side of one transaction, for one queue.
pub struct Authentication {
    host: Arc<DhChapSecret>,
    controller: Option<Arc<DhChapSecret>>,
    hashes: Vec<Hash>,
    groups: Vec<DhGroup>,
    host_nqn: String,
    subsystem_nqn: String,
    transaction_id: u16,
    secure_channel: bool,
    state: State,
}

enum State {
    Negotiate,
    AwaitChallenge,
    Reply(Vec<u8>, Agreed),
    AwaitSuccess1(Agreed),
    Success2(Agreed),
    Done(Agreed),
    /// What the host found wrong, and has to tell the controller.
    Failure2(AuthError),
    Failed(AuthError),
}

/// What the Challenge settled.
struct Agreed {
    hash: Hash,
    group: DhGroup,
    /// R2, if the controller has to give it.
    expected: Option<Zeroizing<Vec<u8>>>,
    generated_psk: Option<Zeroizing<Vec<u8>>>,
}

/// S2 of all transactions: random at first, then counted; never 0, which says that C2 is for a secure
/// channel only (section 8.3.5.5.4).
fn next_sequence_number() -> Result<u32, ErrorStack> {
    static LAST: AtomicU32 = AtomicU32::new(0);
    if LAST.load(Ordering::Relaxed) == 0 {
        let mut random = [0; 4];
        openssl::rand::rand_bytes(&mut random)?;
        let first = u32::from_le_bytes(random).max(1);
        let _ = LAST.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed);
    }
    loop {
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        if number != 0 {
            return Ok(number);
        }
    }
}

impl Authentication {
    /// A transaction of `transaction_id`, which no other of this host's has at the time. With
    /// `secure_channel` a PSK for TLS is generated (only on an admin queue, section 8.3.5.5.9); this needs
    /// SHA-256 or SHA-384, and a group.
    pub fn new(
        config: &AuthConfig,
        host_nqn: &str,
        subsystem_nqn: &str,
        transaction_id: u16,
        secure_channel: bool,
    ) -> Self {
        let hashes = config.hashes.iter().copied();
        let groups = config.groups.iter().copied();
        Self {
            host: config.host.clone(),
            controller: config.controller.clone(),
            hashes: hashes
                .filter(|hash| !secure_channel || *hash != Hash::Sha512)
                .take(30)
                .collect(),
            groups: groups
                .filter(|group| !secure_channel || *group != DhGroup::Null)
                .take(30)
                .collect(),
            host_nqn: host_nqn.to_owned(),
            subsystem_nqn: subsystem_nqn.to_owned(),
            transaction_id,
            secure_channel,
            state: State::Negotiate,
        }
    }

    /// What is due now. A message is given out once.
    #[expect(
        clippy::should_implement_trait,
        reason = "it is no iterator: the last step stays"
    )]
    pub fn next(&mut self) -> Step {
        match std::mem::replace(&mut self.state, State::AwaitChallenge) {
            State::Negotiate => Step::Send(message::negotiate(
                self.transaction_id,
                message::sc_c(self.secure_channel),
                &self.hashes,
                &self.groups,
            )),
            State::AwaitChallenge => Step::Receive(message::LONGEST),
            State::Reply(reply, agreed) => {
                self.state = State::AwaitSuccess1(agreed);
                Step::Send(reply)
            }
            State::AwaitSuccess1(agreed) => {
                self.state = State::AwaitSuccess1(agreed);
                Step::Receive(message::LONGEST)
            }
            State::Success2(agreed) => {
                self.state = State::Done(agreed);
                Step::Send(message::success2(self.transaction_id))
            }
            State::Done(mut agreed) => {
                let outcome = Outcome {
                    hash: agreed.hash,
                    group: agreed.group,
                    controller_authenticated: agreed.expected.is_some(),
                    generated_psk: agreed.generated_psk.take(),
                };
                self.state = State::Done(agreed);
                Step::Done(outcome)
            }
            State::Failure2(error) => {
                let message = message::failure2(self.transaction_id, error.reason());
                self.state = State::Failed(error);
                Step::Send(message)
            }
            State::Failed(error) => {
                self.state = State::Failed(error.clone());
                Step::Failed(error)
            }
        }
    }

    /// What an Authentication Receive brought.
    ///
    /// # Errors
    /// The authentication failed: the controller refused it, or what it sent is wrong. In the latter case
    /// the next step is to tell it so; the last one is [`Step::Failed`] in both.
    pub fn received(&mut self, message: &[u8]) -> Result<(), AuthError> {
        let next = match std::mem::replace(&mut self.state, State::AwaitChallenge) {
            State::AwaitChallenge => self.challenge(message),
            State::AwaitSuccess1(agreed) => self.success1(message, agreed),
            State::Failed(error) | State::Failure2(error) => Err(error),
            _ => Err(AuthError::new(
                Reason::IncorrectMessage,
                "a message came while none was asked for",
            )),
        };
        match next {
            Ok(state) => {
                self.state = state;
                Ok(())
            }
            Err(error) => {
                self.state = match error.by_controller() {
                    true => State::Failed(error.clone()),
                    false => State::Failure2(error.clone()),
                };
                Err(error)
            }
        }
    }

    fn challenge(&self, message: &[u8]) -> Result<State, AuthError> {
        let challenge = Challenge::parse(message, self.transaction_id)?;
        if !self.hashes.contains(&challenge.hash) {
            return Err(AuthError::new(
                Reason::HashUnusable,
                format!(
                    "the controller asks for {}, which this host did not offer",
                    challenge.hash.name()
                ),
            ));
        }
        if !self.groups.contains(&challenge.group) {
            return Err(AuthError::new(
                Reason::DhGroupUnusable,
                format!(
                    "the controller asks for the group {}, which this host did not offer",
                    challenge.group.name()
                ),
            ));
        }
        let exchanged = match challenge.group {
            DhGroup::Null => None,
            group => match group.exchange(challenge.dh_value) {
                Ok(exchanged) => Some(exchanged),
                Err(ExchangeError::Value) => {
                    return Err(AuthError::new(
                        Reason::IncorrectPayload,
                        "the controller's Diffie-Hellman value is not between 1 and p - 1",
                    ));
                }
                Err(ExchangeError::OpenSsl(error)) => return Err(AuthError::openssl(&error)),
            },
        };
        let (value, shared) = match &exchanged {
            Some(exchanged) => (&exchanged.value[..], Some(&exchanged.shared[..])),
            None => (&[][..], None),
        };
        self.reply(&challenge, value, shared)
            .map_err(|error| AuthError::openssl(&error))
    }

    /// The Reply to a Challenge, with R1, and C2 for the controller (section 8.3.5.5.4).
    fn reply(
        &self,
        challenge: &Challenge<'_>,
        dh_value: &[u8],
        shared: Option<&[u8]>,
    ) -> Result<State, ErrorStack> {
        let hash = challenge.hash;
        // The session key KS is H(g^xy mod p) (section 8.3.5.5.9).
        let session_key = shared.map(|shared| hash.digest(shared)).transpose()?;
        let session_key = session_key.as_ref().map(|key| &key[..]);
        let mut c2 = vec![0; hash.digest_len()];
        openssl::rand::rand_bytes(&mut c2)?;
        let s2 = match self.controller.is_none() && self.secure_channel {
            true => 0,
            false => next_sequence_number()?,
        };
        let response = Response {
            hash,
            session_key,
            transaction_id: self.transaction_id,
            sc_c: message::sc_c(self.secure_channel),
        };
        let (host_nqn, subsystem_nqn) = (&self.host_nqn, &self.subsystem_nqn);
        let r1 = response.compute(
            &self.host.transformed(host_nqn)?,
            (challenge.challenge, challenge.sequence_number),
            ["HostHost", host_nqn, subsystem_nqn],
        )?;
        let expected = match &self.controller {
            None => None,
            Some(secret) => Some(response.compute(
                &secret.transformed(subsystem_nqn)?,
                (&c2, s2),
                ["Controller", subsystem_nqn, host_nqn],
            )?),
        };
        let generated_psk = match session_key.filter(|_| self.secure_channel) {
            Some(key) => Some(hash.hmac(key, &[challenge.challenge, &c2])?),
            None => None,
        };
        let reply = Reply {
            transaction_id: self.transaction_id,
            response: &r1,
            challenge: (self.controller.is_some() || self.secure_channel).then_some(&c2),
            sequence_number: s2,
            dh_value,
        };
        Ok(State::Reply(
            reply.encode(),
            Agreed {
                hash,
                group: challenge.group,
                expected,
                generated_psk,
            },
        ))
    }

    fn success1(&self, message: &[u8], agreed: Agreed) -> Result<State, AuthError> {
        let success = Success1::parse(message, self.transaction_id, agreed.hash)?;
        match (&agreed.expected, success.response) {
            (None, _) => Ok(State::Done(agreed)),
            (Some(expected), Some(response)) if openssl::memcmp::eq(expected, response) => {
                Ok(State::Success2(agreed))
            }
            (Some(_), Some(_)) => Err(AuthError::new(
                Reason::Failed,
                "the controller does not know the subsystem's secret: its response is wrong; check that \
                 the controller's secret here is the one that the target has",
            )),
            (Some(_), None) => Err(AuthError::new(
                Reason::Failed,
                "the controller did not authenticate itself, though a controller secret is given; set one \
                 for this host at the target, or leave it out here",
            )),
        }
    }
}

/// What both responses of a transaction share.
pub(super) struct Response<'a> {
    pub(super) hash: Hash,
    pub(super) session_key: Option<&'a [u8]>,
    pub(super) transaction_id: u16,
    pub(super) sc_c: u8,
}

impl Response<'_> {
    /// HMAC(key, Ca || S || T_ID || SC_C || text || NQN || 00h || NQN), where Ca is the challenge, or, with a
    /// Diffie-Hellman group, the augmented challenge HMAC(KS, C) (section 8.3.5.5.4).
    pub(super) fn compute(
        &self,
        key: &[u8],
        (challenge, sequence_number): (&[u8], u32),
        [text, own_nqn, other_nqn]: [&str; 3],
    ) -> Result<Zeroizing<Vec<u8>>, ErrorStack> {
        let augmented = match self.session_key {
            Some(session_key) => Some(self.hash.hmac(session_key, &[challenge])?),
            None => None,
        };
        let challenge = augmented
            .as_ref()
            .map_or(challenge, |augmented| &augmented[..]);
        let parts = [
            challenge,
            &sequence_number.to_le_bytes(),
            &self.transaction_id.to_le_bytes(),
            &[self.sc_c],
            text.as_bytes(),
            own_nqn.as_bytes(),
            &[0],
            other_nqn.as_bytes(),
        ];
        self.hash.hmac(key, &parts)
    }
}
