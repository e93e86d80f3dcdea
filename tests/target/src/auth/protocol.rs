//! The messages of an authentication, and the commands that carry them (base specification, sections 6.1 and 6.2).

use std::io;

use super::dh::{Exchange, random};
use super::secret::Secret;
use super::{AuthFault, AuthOptions, Group, Hash};
use crate::admin::Reply;
use crate::connection::Connection;
use crate::status::Status;
use crate::wire::{Sqe, put, u16_at, u32_at};

/// AUTH_TYPE: common messages, and those of DH-HMAC-CHAP.
const COMMON: u8 = 0x00;
const DH_HMAC_CHAP: u8 = 0x01;
/// AUTH_ID of the messages.
const NEGOTIATE: u8 = 0x00;
const CHALLENGE: u8 = 0x01;
const REPLY: u8 = 0x02;
const SUCCESS1: u8 = 0x03;
const SUCCESS2: u8 = 0x04;
const FAILURE2: u8 = 0xf0;
const FAILURE1: u8 = 0xf1;
/// Reason code of a failure, and its explanations.
const FAILED: u8 = 0x01;
const NOT_USABLE: u8 = 0x02;
const CONCATENATION: u8 = 0x03;
const HASH_UNUSABLE: u8 = 0x04;
const GROUP_UNUSABLE: u8 = 0x05;
const INCORRECT_PAYLOAD: u8 = 0x06;
const INCORRECT_MESSAGE: u8 = 0x07;
/// Bytes of a message in front of what has a variable length.
const FIXED: usize = 16;
/// SPSP0, SPSP1 and SECP of the commands: the protocol of these messages.
const PROTOCOL: [u8; 3] = [0x01, 0x01, 0xe9];

/// Where an authentication is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    #[default]
    Negotiate,
    /// The challenge is to be told.
    Challenge,
    Reply,
    /// Success is to be told.
    Success1,
    /// The host is to agree that the controller is who it says.
    Success2,
    /// The failure is to be told.
    Failure1(u8),
    Done,
    Failed,
}

/// The authentication of a connection.
#[derive(Default)]
pub(crate) struct Auth {
    /// It is asked for, and commands wait for it.
    pub required: bool,
    step: Step,
    transaction: u16,
    sc_c: u8,
    agreed: Option<Agreed>,
    /// The response to the host's challenge.
    response: Option<Vec<u8>>,
}

/// What was negotiated, and the challenge.
struct Agreed {
    hash: Hash,
    group: Group,
    exchange: Option<Exchange>,
    challenge: Vec<u8>,
    sequence: u32,
}

/// Who authenticates with whom.
struct Parties<'a> {
    options: &'a AuthOptions,
    host_nqn: &'a str,
    subsystem_nqn: &'a str,
}

impl Auth {
    pub fn is_pending(&self) -> bool {
        self.required && self.step != Step::Done && self.step != Step::Success2
    }

    /// A message of the host. What is wrong with it is told by the next message of the controller.
    fn receive(&mut self, message: &[u8], parties: &Parties<'_>) -> io::Result<()> {
        if message.len() < 8 {
            self.step = Step::Failure1(INCORRECT_PAYLOAD);
            return Ok(());
        }
        let kind = (message[0], message[1]);
        // A negotiation begins anew at any time.
        if kind == (COMMON, NEGOTIATE) {
            self.transaction = u16_at(message, 4);
            self.step = match self.negotiate(message, parties)? {
                Ok(()) => Step::Challenge,
                Err(explanation) => Step::Failure1(explanation),
            };
            return Ok(());
        }
        let expected = match self.step {
            Step::Reply => (DH_HMAC_CHAP, REPLY),
            Step::Success2 => (DH_HMAC_CHAP, SUCCESS2),
            _ => (0xff, 0xff),
        };
        if kind.1 == FAILURE2 {
            self.step = Step::Failed;
        } else if kind != expected {
            self.step = Step::Failure1(INCORRECT_MESSAGE);
        } else if u16_at(message, 4) != self.transaction || message.len() < FIXED {
            self.step = Step::Failure1(INCORRECT_PAYLOAD);
        } else if kind.1 == SUCCESS2 {
            self.step = Step::Done;
        } else {
            self.step = match self.verify(message, parties) {
                Ok(()) => Step::Success1,
                Err(explanation) => Step::Failure1(explanation),
            };
        }
        Ok(())
    }

    /// AUTH_Negotiate (figure 430): one protocol descriptor with the hashes and the groups of the host.
    fn negotiate(&mut self, m: &[u8], parties: &Parties<'_>) -> io::Result<Result<(), u8>> {
        (self.agreed, self.response) = (None, None);
        self.sc_c = m[6];
        if self.sc_c != 0 {
            return Ok(Err(CONCATENATION));
        }
        let Some(descriptor) = m.get(8..72).filter(|_| m[7] >= 1) else {
            return Ok(Err(INCORRECT_PAYLOAD));
        };
        if descriptor[0] != DH_HMAC_CHAP {
            return Ok(Err(NOT_USABLE));
        }
        // Hash identifiers begin at 4, group identifiers at 34; at most 30 of each.
        let (hashes, groups) = (usize::from(descriptor[2]), usize::from(descriptor[3]));
        if hashes == 0 || hashes > 30 || groups == 0 || groups > 30 {
            return Ok(Err(INCORRECT_PAYLOAD));
        }
        let (hashes, groups) = (&descriptor[4..4 + hashes], &descriptor[34..34 + groups]);
        let options = parties.options;
        let Some(&hash) = options
            .hashes
            .iter()
            .find(|&&h| hashes.contains(&(h as u8)))
        else {
            return Ok(Err(HASH_UNUSABLE));
        };
        let Some(&group) = options
            .groups
            .iter()
            .find(|&&g| groups.contains(&(g as u8)))
        else {
            return Ok(Err(GROUP_UNUSABLE));
        };
        let number = random(4)?;
        self.agreed = Some(Agreed {
            hash,
            group,
            exchange: Exchange::new(group)?,
            challenge: random(hash.len())?,
            // Never 0 (section 8.13.5.3).
            sequence: u32_at(&number, 0) | 1,
        });
        Ok(Ok(()))
    }

    /// DH-HMAC-CHAP_Challenge (figure 437).
    fn challenge(&self, fault: Option<AuthFault>) -> Vec<u8> {
        let Some(a) = &self.agreed else {
            return Vec::new();
        };
        let mut m = vec![0; FIXED];
        let exponential = match (&a.exchange, fault) {
            (Some(_), Some(AuthFault::Exponential(value))) => {
                let mut small = vec![0; a.group.len()];
                small[a.group.len() - 1] = value;
                small
            }
            (Some(exchange), _) => exchange.exponential.clone(),
            (None, _) => Vec::new(),
        };
        m[0] = DH_HMAC_CHAP;
        m[1] = CHALLENGE;
        put(&mut m, 4, &self.transaction.to_le_bytes());
        m[6] = a.hash.len() as u8;
        m[8] = a.hash as u8;
        m[9] = a.group as u8;
        let mut told = exponential.len() as u16;
        match fault {
            Some(AuthFault::ChallengeHashLength(value)) => m[6] = value,
            Some(AuthFault::ChallengeHash(value)) => m[8] = value,
            Some(AuthFault::ChallengeGroup(value)) => m[9] = value,
            Some(AuthFault::ChallengeTooShort(by)) => told = told.wrapping_add(by),
            _ => {}
        }
        put(&mut m, 10, &told.to_le_bytes());
        put(&mut m, 12, &a.sequence.to_le_bytes());
        m.extend_from_slice(&a.challenge);
        m.extend_from_slice(&exponential);
        m
    }

    /// DH-HMAC-CHAP_Reply (figure 438): the host's response, and its challenge.
    fn verify(&mut self, m: &[u8], parties: &Parties<'_>) -> Result<(), u8> {
        let Some(a) = &self.agreed else {
            return Err(INCORRECT_MESSAGE);
        };
        let len = a.hash.len();
        let (hl, cvalid, dhvlen) = (usize::from(m[6]), m[8], usize::from(u16_at(m, 10)));
        let sequence = u32_at(m, 12);
        if hl != len || dhvlen != a.group.len() || cvalid > 1 {
            return Err(INCORRECT_PAYLOAD);
        }
        let Some(values) = m.get(FIXED..FIXED + 2 * len + dhvlen) else {
            return Err(INCORRECT_PAYLOAD);
        };
        let (response, rest) = values.split_at(len);
        let (challenge, exponential) = rest.split_at(len);
        let shared = match &a.exchange {
            Some(exchange) => Some(exchange.shared(exponential).ok_or(INCORRECT_PAYLOAD)?),
            None => None,
        };
        // The augmented challenge is keyed by the hash of what both have computed.
        let augmented = |challenge: &[u8]| match &shared {
            Some(shared) => a.hash.hmac(&a.hash.digest(shared), &[challenge]),
            None => challenge.to_vec(),
        };
        let secret = Secret::parse(&parties.options.host_secret).ok_or(FAILED)?;
        let (host, subsystem) = (parties.host_nqn, parties.subsystem_nqn);
        let expected = a.hash.hmac(
            &secret.key_for(host),
            &[
                &augmented(&a.challenge),
                &a.sequence.to_le_bytes(),
                &self.transaction.to_le_bytes(),
                &[self.sc_c],
                b"HostHost",
                host.as_bytes(),
                &[0],
                subsystem.as_bytes(),
            ],
        );
        if expected != response {
            return Err(FAILED);
        }
        if cvalid == 1 {
            let text = parties.options.controller_secret.as_ref().ok_or(FAILED)?;
            let secret = Secret::parse(text).ok_or(FAILED)?;
            let mut response = a.hash.hmac(
                &secret.key_for(subsystem),
                &[
                    &augmented(challenge),
                    &sequence.to_le_bytes(),
                    &self.transaction.to_le_bytes(),
                    &[self.sc_c],
                    b"Controller",
                    subsystem.as_bytes(),
                    &[0],
                    host.as_bytes(),
                ],
            );
            let wrong = [AuthFault::WrongResponse, AuthFault::WrongResponseAndClose];
            if parties
                .options
                .fault
                .is_some_and(|fault| wrong.contains(&fault))
            {
                response[0] ^= 1;
            }
            self.response = Some(response);
        }
        Ok(())
    }

    /// DH-HMAC-CHAP_Success1 (figure 440).
    fn success(&self, fault: Option<AuthFault>) -> Vec<u8> {
        let mut m = vec![0; FIXED];
        m[0] = DH_HMAC_CHAP;
        m[1] = SUCCESS1;
        put(&mut m, 4, &self.transaction.to_le_bytes());
        m[6] = self.agreed.as_ref().map_or(0, |a| a.hash.len() as u8);
        if let Some(response) = self
            .response
            .as_ref()
            .filter(|_| fault != Some(AuthFault::NoResponse))
        {
            m[8] = 1;
            m.extend_from_slice(response);
        }
        m
    }

    /// AUTH_Failure1 (figure 434).
    fn failure(&self, reason: u8, explanation: u8) -> Vec<u8> {
        let mut m = vec![COMMON, FAILURE1, 0, 0, 0, 0, reason, explanation];
        put(&mut m, 4, &self.transaction.to_le_bytes());
        m
    }

    /// The next message of the controller; none: it is never told.
    fn send(&mut self, fault: Option<AuthFault>) -> Option<Vec<u8>> {
        let mut m = match (self.step, fault) {
            (Step::Challenge, Some(AuthFault::HangAtChallenge)) => return None,
            (Step::Success1, Some(AuthFault::HangAtSuccess)) => return None,
            (Step::Challenge, Some(AuthFault::FailInsteadOfChallenge(reason, explanation)))
            | (Step::Success1, Some(AuthFault::FailInsteadOfSuccess(reason, explanation))) => {
                self.step = Step::Failed;
                self.failure(reason, explanation)
            }
            (Step::Challenge, _) => {
                self.step = Step::Reply;
                self.challenge(fault)
            }
            (Step::Success1, _) => {
                self.step = if self.response.is_some() {
                    Step::Success2
                } else {
                    Step::Done
                };
                self.success(fault)
            }
            (Step::Failure1(explanation), _) => {
                self.step = Step::Failed;
                self.failure(FAILED, explanation)
            }
            _ => {
                self.step = Step::Failed;
                self.failure(FAILED, INCORRECT_MESSAGE)
            }
        };
        match fault {
            Some(AuthFault::WrongTransaction) => put(&mut m, 4, &(!self.transaction).to_le_bytes()),
            Some(AuthFault::WrongMessage(id)) => m[1] = id,
            _ => {}
        }
        Some(m)
    }
}

impl Connection {
    /// Authentication Send: a message of the host.
    pub fn auth_send(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        let options = self.auth_options(sqe, data.len())?;
        let Some(queue) = &self.queue else {
            return Err(Status::INTERNAL_ERROR);
        };
        let parties = Parties {
            options: &options,
            host_nqn: &queue.controller.host_nqn,
            subsystem_nqn: queue.controller.subsystem.nqn(),
        };
        self.auth
            .receive(data, &parties)
            .map_err(|_| Status::INTERNAL_ERROR)?;
        self.shared.note(format_args!(
            "connection {}: authentication {:?}",
            self.link.id, self.auth.step
        ));
        Ok(())
    }

    /// True if the host has found something wrong, and is not to be answered.
    pub fn auth_closes(&self, sqe: &Sqe) -> bool {
        let options = self.auth_options(sqe, sqe.sgl().1 as usize);
        let fault = options.ok().and_then(|options| options.fault);
        self.auth.step == Step::Failed && fault == Some(AuthFault::WrongResponseAndClose)
    }

    /// Authentication Receive: a message for the host.
    pub fn auth_receive(&mut self, sqe: &Sqe) -> Result<Reply, Status> {
        let options = self.auth_options(sqe, sqe.sgl().1 as usize)?;
        let Some(message) = self.auth.send(options.fault) else {
            self.hold(sqe.cid(), true);
            return Ok(Reply::Later);
        };
        if message.len() > sqe.sgl().1 as usize {
            return Err(Status::INVALID_FIELD.dnr());
        }
        Ok(Reply::Data(message))
    }

    /// Checks the fields that both commands have (figures 374 and 379); `len`: what the SGL says.
    fn auth_options(&self, sqe: &Sqe, len: usize) -> Result<AuthOptions, Status> {
        let Some(queue) = &self.queue else {
            return Err(Status::INTERNAL_ERROR);
        };
        let options = queue
            .controller
            .options
            .auth
            .clone()
            .ok_or(Status::INVALID_OPCODE.dnr())?;
        let told = [sqe.u8(41), sqe.u8(42), sqe.u8(43)];
        if told != PROTOCOL || sqe.cdw(11) as usize != len || len == 0 {
            return Err(Status::INVALID_FIELD.dnr());
        }
        // Faults can be changed while the controller lives.
        let fault = queue
            .controller
            .subsystem
            .options()
            .auth
            .and_then(|o| o.fault);
        Ok(AuthOptions { fault, ..options })
    }
}
