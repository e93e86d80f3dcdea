//! The messages of DH-HMAC-CHAP (NVM Express Base Specification 2.1, section 8.3.5.5).

use super::{AuthError, DhGroup, Hash, Reason};

/// AUTH_TYPE of the messages that all protocols share.
const COMMON: u8 = 0x00;
/// AUTH_TYPE of DH-HMAC-CHAP's own.
const DH_HMAC_CHAP: u8 = 0x01;

const NEGOTIATE: u8 = 0x00;
const CHALLENGE: u8 = 0x01;
const REPLY: u8 = 0x02;
const SUCCESS1: u8 = 0x03;
const SUCCESS2: u8 = 0x04;
const FAILURE2: u8 = 0xf0;
const FAILURE1: u8 = 0xf1;

/// SC_C: the connection stays as it is.
const NOSC: u8 = 0x00;
/// SC_C: a PSK for TLS is to be generated.
const NEWTLSPSK: u8 = 0x02;

/// Bytes of the longest message to receive: a Challenge with SHA-512 and ffdhe8192.
pub(super) const LONGEST: usize = 16 + Hash::MAX_LEN + DhGroup::MAX_LEN;

/// The value of SC_C, which is in AUTH_Negotiate and in the responses.
pub(super) fn sc_c(secure_channel: bool) -> u8 {
    if secure_channel { NEWTLSPSK } else { NOSC }
}

fn start(kind: u8, id: u8, transaction_id: u16, len: usize) -> Vec<u8> {
    let mut message = Vec::with_capacity(len);
    message.extend([kind, id, 0, 0]);
    message.extend(transaction_id.to_le_bytes());
    message
}

/// AUTH_Negotiate: what this host can do, with one protocol descriptor (section 8.3.5.5.2).
pub(super) fn negotiate(
    transaction_id: u16,
    sc_c: u8,
    hashes: &[Hash],
    groups: &[DhGroup],
) -> Vec<u8> {
    let mut message = start(COMMON, NEGOTIATE, transaction_id, 72);
    message.extend([sc_c, 1]);
    message.extend([DH_HMAC_CHAP, 0, hashes.len() as u8, groups.len() as u8]);
    message.extend(hashes.iter().map(|hash| hash.id()));
    message.resize(12 + 30, 0);
    message.extend(groups.iter().map(|group| group.id()));
    message.resize(72, 0);
    message
}

/// DH-HMAC-CHAP_Reply (section 8.3.5.5.4).
pub(super) struct Reply<'a> {
    pub(super) transaction_id: u16,
    pub(super) response: &'a [u8],
    /// C2, if the host has one.
    pub(super) challenge: Option<&'a [u8]>,
    /// S2.
    pub(super) sequence_number: u32,
    pub(super) dh_value: &'a [u8],
}

impl Reply<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let hash_len = self.response.len();
        let len = 16 + 2 * hash_len + self.dh_value.len();
        let mut message = start(DH_HMAC_CHAP, REPLY, self.transaction_id, len);
        message.extend([hash_len as u8, 0, u8::from(self.challenge.is_some()), 0]);
        message.extend((self.dh_value.len() as u16).to_le_bytes());
        message.extend(self.sequence_number.to_le_bytes());
        message.extend(self.response);
        match self.challenge {
            Some(challenge) => message.extend(challenge),
            None => message.resize(16 + 2 * hash_len, 0),
        }
        message.extend(self.dh_value);
        message
    }
}

/// DH-HMAC-CHAP_Success2 (section 8.3.5.5.6).
pub(super) fn success2(transaction_id: u16) -> Vec<u8> {
    let mut message = start(DH_HMAC_CHAP, SUCCESS2, transaction_id, 16);
    message.resize(16, 0);
    message
}

/// AUTH_Failure2 (section 8.3.5.4).
pub(super) fn failure2(transaction_id: u16, reason: Reason) -> Vec<u8> {
    let mut message = start(COMMON, FAILURE2, transaction_id, 8);
    message.extend([0x01, reason.code()]);
    message
}

/// DH-HMAC-CHAP_Challenge (section 8.3.5.5.3).
pub(super) struct Challenge<'a> {
    pub(super) hash: Hash,
    pub(super) group: DhGroup,
    /// S1.
    pub(super) sequence_number: u32,
    /// C1.
    pub(super) challenge: &'a [u8],
    pub(super) dh_value: &'a [u8],
}

/// DH-HMAC-CHAP_Success1 (section 8.3.5.5.5).
pub(super) struct Success1<'a> {
    /// R2, if it is valid.
    pub(super) response: Option<&'a [u8]>,
}

/// The header of a message from the controller, up to the transaction's id. A buffer may be longer than its
/// message: an Authentication Receive gives as many bytes as the host asks for.
fn expect(message: &[u8], id: u8, name: &str, transaction_id: u16) -> Result<(), AuthError> {
    let Some(head) = message.first_chunk::<6>() else {
        return Err(short(name, message.len(), 6));
    };
    let failure = [head[0], head[1]] == [COMMON, FAILURE1];
    if !failure && [head[0], head[1]] != [DH_HMAC_CHAP, id] {
        return Err(AuthError::new(
            Reason::IncorrectMessage,
            format!(
                "the controller sent message {:02x}h/{:02x}h where {name} was due",
                head[0], head[1]
            ),
        ));
    }
    let got = u16::from_le_bytes([head[4], head[5]]);
    if got != transaction_id {
        return Err(AuthError::new(
            Reason::IncorrectMessage,
            format!(
                "the controller's {name} is of transaction {got}, where {transaction_id} is under way"
            ),
        ));
    }
    if failure {
        return Err(AuthError::refused(message.get(7).copied()));
    }
    Ok(())
}

fn short(name: &str, got: usize, want: usize) -> AuthError {
    AuthError::new(
        Reason::IncorrectPayload,
        format!("the controller's {name} has {got} bytes, where {want} are needed"),
    )
}

impl<'a> Challenge<'a> {
    pub(super) fn parse(message: &'a [u8], transaction_id: u16) -> Result<Self, AuthError> {
        let name = "DH-HMAC-CHAP_Challenge";
        expect(message, CHALLENGE, name, transaction_id)?;
        let Some((head, rest)) = message.split_first_chunk::<16>() else {
            return Err(short(name, message.len(), 16));
        };
        let hash = Hash::by_id(head[8]).ok_or_else(|| {
            AuthError::new(
                Reason::HashUnusable,
                format!(
                    "the controller asks for hash function {:02x}h, which this host did not offer",
                    head[8]
                ),
            )
        })?;
        let group = DhGroup::by_id(head[9]).ok_or_else(|| {
            AuthError::new(
                Reason::DhGroupUnusable,
                format!(
                    "the controller asks for Diffie-Hellman group {:02x}h, which this host did not offer",
                    head[9]
                ),
            )
        })?;
        let hash_len = usize::from(head[6]);
        if hash_len != hash.digest_len() {
            return Err(AuthError::new(
                Reason::IncorrectPayload,
                format!(
                    "the controller's challenge is said to have {hash_len} bytes, where {} has {}",
                    hash.name(),
                    hash.digest_len()
                ),
            ));
        }
        let value_len = usize::from(u16::from_le_bytes([head[10], head[11]]));
        let fits = match group {
            DhGroup::Null => value_len == 0,
            group => (1..=group.value_len()).contains(&value_len),
        };
        if !fits {
            return Err(AuthError::new(
                Reason::IncorrectPayload,
                format!(
                    "the controller's Diffie-Hellman value is said to have {value_len} bytes, where {} has {}",
                    group.name(),
                    group.value_len()
                ),
            ));
        }
        let want = hash_len + value_len;
        let Some(body) = rest.get(..want) else {
            return Err(short(name, message.len(), 16 + want));
        };
        let (challenge, dh_value) = body.split_at(hash_len);
        Ok(Self {
            hash,
            group,
            sequence_number: u32::from_le_bytes([head[12], head[13], head[14], head[15]]),
            challenge,
            dh_value,
        })
    }
}

impl<'a> Success1<'a> {
    pub(super) fn parse(
        message: &'a [u8],
        transaction_id: u16,
        hash: Hash,
    ) -> Result<Self, AuthError> {
        let name = "DH-HMAC-CHAP_Success1";
        expect(message, SUCCESS1, name, transaction_id)?;
        let Some((head, rest)) = message.split_first_chunk::<16>() else {
            return Err(short(name, message.len(), 16));
        };
        let hash_len = usize::from(head[6]);
        if hash_len != hash.digest_len() {
            return Err(AuthError::new(
                Reason::IncorrectPayload,
                format!(
                    "the controller's response is said to have {hash_len} bytes, where {} has {}",
                    hash.name(),
                    hash.digest_len()
                ),
            ));
        }
        let response = match head[8] {
            0 => None,
            1 => match rest.get(..hash_len) {
                Some(response) => Some(response),
                None => return Err(short(name, message.len(), 16 + hash_len)),
            },
            other => {
                return Err(AuthError::new(
                    Reason::IncorrectPayload,
                    format!(
                        "the controller's RVALID is {other:02x}h, where 00h and 01h are defined"
                    ),
                ));
            }
        };
        Ok(Self { response })
    }
}
