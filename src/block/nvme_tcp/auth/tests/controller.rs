//! The controller's side of DH-HMAC-CHAP, for tests. It shares no code with the host's side: RustCrypto's
//! hashes, `num-bigint`, and offsets as the specification's figures have them.

use hmac::{Hmac, KeyInit, Mac};
use num_bigint::BigUint;
use sha2::{Digest, Sha256, Sha384, Sha512};

pub(super) const HOST: &str = "nqn.2014-08.org.example:host";
pub(super) const SUBSYSTEM: &str = "nqn.2014-08.org.example:subsystem";

pub(super) fn mac(hash: u8, key: &[u8], data: &[u8]) -> Vec<u8> {
    match hash {
        1 => {
            let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
            mac.update(data);
            mac.finalize().into_bytes().to_vec()
        }
        2 => {
            let mut mac = Hmac::<Sha384>::new_from_slice(key).unwrap();
            mac.update(data);
            mac.finalize().into_bytes().to_vec()
        }
        _ => {
            let mut mac = Hmac::<Sha512>::new_from_slice(key).unwrap();
            mac.update(data);
            mac.finalize().into_bytes().to_vec()
        }
    }
}

fn digest(hash: u8, data: &[u8]) -> Vec<u8> {
    match hash {
        1 => Sha256::digest(data).to_vec(),
        2 => Sha384::digest(data).to_vec(),
        _ => Sha512::digest(data).to_vec(),
    }
}

/// The prime of a group by RFC 7919's formula, with e computed here.
pub(super) fn prime(group: u8) -> BigUint {
    let (bits, x): (u32, u32) = match group {
        1 => (2048, 560_316),
        2 => (3072, 2_625_351),
        3 => (4096, 5_736_041),
        4 => (6144, 15_705_020),
        _ => (8192, 10_965_728),
    };
    let one = BigUint::from(1u8);
    // floor(2^(bits - 130) e), with 64 more bits on the way.
    let mut term = &one << (bits - 130 + 64);
    let (mut e, mut k) = (BigUint::ZERO, 1u32);
    while term != BigUint::ZERO {
        e += &term;
        term /= k;
        k += 1;
    }
    let e: BigUint = e >> 64u32;
    (&one << bits) - (&one << (bits - 64)) + ((e + x) << 64u32) - one
}

/// A secret as the target's configuration has it.
#[derive(Clone)]
pub(super) struct TargetSecret {
    pub(super) transformation: u8,
    pub(super) key: Vec<u8>,
}

impl TargetSecret {
    pub(super) fn new(transformation: u8, len: u8, salt: u8) -> Self {
        Self {
            transformation,
            key: (0..len).map(|n| n.wrapping_mul(11) ^ salt).collect(),
        }
    }

    /// The text that a host has.
    pub(super) fn text(&self) -> String {
        let mut sum = flate2::Crc::new();
        sum.update(&self.key);
        let bytes = [&self.key[..], &sum.sum().to_le_bytes()].concat();
        let base64 = openssl::base64::encode_block(&bytes);
        format!("DHHC-1:{:02}:{base64}:", self.transformation)
    }

    fn transformed(&self, nqn: &str) -> Vec<u8> {
        match self.transformation {
            0 => self.key.clone(),
            hash => mac(
                hash,
                &self.key,
                format!("{nqn}NVMe-over-Fabrics").as_bytes(),
            ),
        }
    }
}

pub(super) struct Controller {
    pub(super) hash: u8,
    pub(super) group: u8,
    pub(super) host: TargetSecret,
    pub(super) controller: Option<TargetSecret>,
    transaction_id: u16,
    sc_c: u8,
    s1: u32,
    c1: Vec<u8>,
    y: BigUint,
    prime: BigUint,
    /// KS.
    session_key: Option<Vec<u8>>,
    /// The PSK for a secure channel.
    pub(super) generated: Option<Vec<u8>>,
    /// Whether the host gave the right response.
    pub(super) is_host_authentic: bool,
    pub(super) s2: Option<u32>,
}

impl Controller {
    pub(super) fn new(
        hash: u8,
        group: u8,
        host: TargetSecret,
        controller: Option<TargetSecret>,
    ) -> Self {
        let len = [32, 48, 64][usize::from(hash) - 1];
        Self {
            hash,
            group,
            host,
            controller,
            transaction_id: 0,
            sc_c: 0,
            s1: 0xfedc_ba98,
            c1: (0..len).map(|n: u8| n.wrapping_mul(37) ^ 0x5a).collect(),
            y: BigUint::from_bytes_be(&[0x9d; 32]),
            prime: if group == 0 {
                BigUint::ZERO
            } else {
                prime(group)
            },
            session_key: None,
            generated: None,
            is_host_authentic: false,
            s2: None,
        }
    }

    fn padded(&self, value: &BigUint) -> Vec<u8> {
        let bytes = value.to_bytes_be();
        let len = self.prime.to_bytes_be().len();
        [vec![0; len - bytes.len()], bytes].concat()
    }

    /// Takes AUTH_Negotiate, gives DH-HMAC-CHAP_Challenge.
    pub(super) fn challenge(&mut self, negotiate: &[u8]) -> Vec<u8> {
        assert_eq!(negotiate.len(), 72);
        assert_eq!(&negotiate[..4], &[0, 0, 0, 0]);
        self.transaction_id = u16::from_le_bytes([negotiate[4], negotiate[5]]);
        self.sc_c = negotiate[6];
        assert_eq!((negotiate[7], negotiate[8], negotiate[9]), (1, 1, 0));
        let (hashes, groups) = (usize::from(negotiate[10]), usize::from(negotiate[11]));
        assert!(negotiate[12..][..hashes].contains(&self.hash));
        assert!(negotiate[42..][..groups].contains(&self.group));
        let value = match self.group {
            0 => Vec::new(),
            _ => self.padded(&BigUint::from(2u8).modpow(&self.y, &self.prime)),
        };
        let mut message = vec![1, 1, 0, 0];
        message.extend(self.transaction_id.to_le_bytes());
        message.extend([self.c1.len() as u8, 0, self.hash, self.group]);
        message.extend((value.len() as u16).to_le_bytes());
        message.extend(self.s1.to_le_bytes());
        message.extend(&self.c1);
        message.extend(value);
        message
    }

    fn response(
        &self,
        key: &[u8],
        challenge: &[u8],
        s: u32,
        text: &str,
        nqns: [&str; 2],
    ) -> Vec<u8> {
        let augmented = match &self.session_key {
            Some(ks) => mac(self.hash, ks, challenge),
            None => challenge.to_vec(),
        };
        let mut data = augmented;
        data.extend(s.to_le_bytes());
        data.extend(self.transaction_id.to_le_bytes());
        data.push(self.sc_c);
        data.extend(text.bytes());
        data.extend(nqns[0].bytes());
        data.push(0);
        data.extend(nqns[1].bytes());
        mac(self.hash, key, &data)
    }

    /// Takes DH-HMAC-CHAP_Reply, gives DH-HMAC-CHAP_Success1 or AUTH_Failure1.
    pub(super) fn success1(&mut self, reply: &[u8]) -> Vec<u8> {
        let len = self.c1.len();
        assert_eq!(&reply[..4], &[1, 2, 0, 0]);
        assert_eq!(reply[4..6], self.transaction_id.to_le_bytes());
        assert_eq!(usize::from(reply[6]), len);
        assert_eq!((reply[7], reply[9]), (0, 0));
        let value_len = usize::from(u16::from_le_bytes([reply[10], reply[11]]));
        let s2 = u32::from_le_bytes(reply[12..16].try_into().unwrap());
        assert_eq!(reply.len(), 16 + 2 * len + value_len);
        let (r1, rest) = reply[16..].split_at(len);
        let (c2, value) = rest.split_at(len);
        if self.group != 0 {
            assert_eq!(value_len, self.prime.to_bytes_be().len());
            let shared = BigUint::from_bytes_be(value).modpow(&self.y, &self.prime);
            self.session_key = Some(digest(self.hash, &self.padded(&shared)));
        } else {
            assert_eq!(value_len, 0);
        }
        let key = self.host.transformed(HOST);
        let want = self.response(&key, &self.c1, self.s1, "HostHost", [HOST, SUBSYSTEM]);
        self.is_host_authentic = want == r1;
        if self.sc_c != 0 {
            let both = [&self.c1[..], c2].concat();
            self.generated = Some(mac(self.hash, self.session_key.as_ref().unwrap(), &both));
        }
        if !self.is_host_authentic {
            return self.failure1(0x01);
        }
        let mut message = vec![1, 3, 0, 0];
        message.extend(self.transaction_id.to_le_bytes());
        message.extend([len as u8, 0]);
        if reply[8] == 1 {
            self.s2 = Some(s2);
        } else {
            assert_eq!(reply[8], 0);
            assert!(c2.iter().all(|byte| *byte == 0));
        }
        match (&self.controller, reply[8] == 1 && s2 != 0) {
            (Some(secret), true) => {
                message.extend([1, 0, 0, 0, 0, 0, 0, 0]);
                let key = secret.transformed(SUBSYSTEM);
                message.extend(self.response(&key, c2, s2, "Controller", [SUBSYSTEM, HOST]));
            }
            _ => message.extend([0; 8]),
        }
        message
    }

    pub(super) fn failure1(&self, code: u8) -> Vec<u8> {
        let id = self.transaction_id.to_le_bytes();
        vec![0, 0xf1, 0, 0, id[0], id[1], 1, code]
    }

    pub(super) fn success2(&self) -> Vec<u8> {
        let id = self.transaction_id.to_le_bytes();
        let mut message = vec![1, 4, 0, 0, id[0], id[1]];
        message.resize(16, 0);
        message
    }

    pub(super) fn failure2(&self, code: u8) -> Vec<u8> {
        let id = self.transaction_id.to_le_bytes();
        vec![0, 0xf0, 0, 0, id[0], id[1], 1, code]
    }
}
