//! Names of remote namespaces: `nvme+tcp://HOST:PORT,…/SUBSYSTEM-NQN?nsid=N`.
//!
//! A name says where a namespace is and which one it is. How it is connected is an option's business, and what it
//! is protected with is in a file: both are refused in a name, which ends up in image headers, logs and lists of
//! processes. An image may name one, so a name is untrusted input.

use std::fmt::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use super::spec::{Address, IO_PORT, NamespaceName, NvmeOptions, NvmeSpec};

/// What all these names begin with.
pub const SCHEME: &str = "nvme+tcp://";
/// Bytes of an NVMe Qualified Name, at most (Base section 4.5).
pub const MAX_NQN: usize = 223;
/// Addresses of one subsystem, at most.
pub const MAX_ADDRESSES: usize = 16;
/// Bytes of a name, at most: the addresses, and an NQN of which every byte is written as three.
const MAX_LEN: usize = 8192;
/// Bytes of a host's name, at most (RFC 1035, section 2.3.4).
const MAX_HOST: usize = 253;
/// NQN of every discovery subsystem (Base section 4.5), which has no namespaces.
const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// What secrets begin with: those of in-band authentication (Base section 8.13.5.8), and the pre-shared keys of TLS
/// (TCP section 3.6.1.5).
const SECRETS: [&str; 2] = ["DHHC-1:", "NVMeTLSkey-1:"];

/// True if there is a secret in the text, which is not to be repeated then.
pub fn holds_secret(text: &str) -> bool {
    SECRETS.iter().any(|secret| text.contains(secret))
}

/// True if the text is meant as the name of a remote namespace.
pub fn is_remote(text: &str) -> bool {
    text.starts_with(SCHEME)
}

/// Why a text is no name of a namespace. It never holds the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}: {instead}")]
pub struct UriError {
    /// What is wrong with it, as the end of a sentence.
    pub why: String,
    /// What to write.
    pub instead: String,
}

fn wrong<T>(why: impl Into<String>, instead: impl Into<String>) -> Result<T, UriError> {
    Err(UriError {
        why: why.into(),
        instead: instead.into(),
    })
}

/// The name of a remote namespace. Displays as it is written, with nothing left out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Uri {
    /// The subsystem's addresses: 1 to [`MAX_ADDRESSES`], all unlike.
    pub addresses: Vec<Address>,
    /// The subsystem's NQN: 1 to [`MAX_NQN`] bytes.
    pub subsystem: String,
    /// Which of its namespaces.
    pub namespace: NamespaceName,
}

impl Uri {
    /// The namespace with this name, to be connected so.
    pub fn spec(&self, read_only: bool, options: Arc<NvmeOptions>) -> NvmeSpec {
        NvmeSpec {
            addresses: self.addresses.clone(),
            subsystem: self.subsystem.clone(),
            namespace: self.namespace,
            read_only,
            options,
        }
    }

    /// What has to be allowed for an image to name it.
    pub fn needs(&self) -> Allowed {
        Allowed {
            addresses: self.addresses.clone(),
            subsystem: Some(self.subsystem.clone()),
        }
    }

    /// True if every address of it is allowed by one of `allowed`.
    pub fn is_allowed(&self, allowed: &[Allowed]) -> bool {
        self.addresses.iter().all(|address| {
            allowed.iter().any(|one| {
                let subsystem = one.subsystem.as_ref();
                one.addresses.contains(address)
                    && subsystem.is_none_or(|nqn| *nqn == self.subsystem)
            })
        })
    }
}

impl NvmeSpec {
    /// Its name.
    pub fn uri(&self) -> Uri {
        Uri {
            addresses: self.addresses.clone(),
            subsystem: self.subsystem.clone(),
            namespace: self.namespace,
        }
    }
}

/// What an image may name: a subsystem, or all subsystems, at some addresses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Allowed {
    /// The addresses: 1 to [`MAX_ADDRESSES`], all unlike.
    pub addresses: Vec<Address>,
    /// The subsystem's NQN; none: any.
    pub subsystem: Option<String>,
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let (place, query) = match split(text)? {
            (place, Some(query)) => (place, query),
            (_, None) => {
                return wrong(
                    "does not say which namespace of the subsystem it is",
                    "write ?nsid=N behind the NQN, or ?uuid=, ?nguid= or ?eui64=",
                );
            }
        };
        let Some(subsystem) = place.subsystem else {
            return wrong(
                "names no subsystem",
                "write nvme+tcp://HOST:PORT/SUBSYSTEM-NQN?nsid=N",
            );
        };
        if subsystem == DISCOVERY_NQN {
            return wrong(
                "names the discovery subsystem, which has no namespaces",
                "write one of the NQNs that `virtioblkd nvme discover HOST` tells",
            );
        }
        Ok(Self {
            addresses: place.addresses,
            subsystem,
            namespace: namespace(query)?,
        })
    }
}

impl FromStr for Allowed {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        match split(text)? {
            (place, None) => Ok(place),
            (_, Some(_)) => wrong(
                "names a namespace, and what is allowed is a subsystem",
                "leave out the question mark and what follows it",
            ),
        }
    }
}

/// Addresses and NQN, and what is behind the question mark.
fn split(text: &str) -> Result<(Allowed, Option<&str>), UriError> {
    const EXAMPLE: &str = "write nvme+tcp://HOST:PORT/SUBSYSTEM-NQN?nsid=N";
    if holds_secret(text) {
        return wrong(
            "holds a secret",
            "put it in a file, and name that with nvme-dhchap-secret or nvme-tls-key; whoever could read it \
             should not be able to use it any more",
        );
    }
    let Some(rest) = text.strip_prefix(SCHEME) else {
        return wrong("is no name of a remote namespace", EXAMPLE);
    };
    if text.len() > MAX_LEN {
        return wrong(format!("is longer than {MAX_LEN} bytes"), EXAMPLE);
    }
    if rest.contains('#') {
        return wrong(
            "has a #, which ends a URI",
            "write %23 where it belongs to the NQN",
        );
    }
    let (place, query) = match rest.split_once('?') {
        Some((place, query)) => (place, Some(query)),
        None => (rest, None),
    };
    let (hosts, nqn) = match place.split_once('/') {
        Some((hosts, nqn)) => (hosts, Some(nqn)),
        None => (place, None),
    };
    if nqn.is_some_and(str::is_empty) {
        // A shell's variable that is not set would allow all of them.
        return wrong(
            "names no subsystem behind its slash",
            "write its NQN there; what is allowed is all subsystems of an address where there is no slash either",
        );
    }
    let place = Allowed {
        addresses: addresses(hosts)?,
        subsystem: nqn.map(subsystem).transpose()?,
    };
    Ok((place, query))
}

fn addresses(hosts: &str) -> Result<Vec<Address>, UriError> {
    if hosts.contains('@') {
        return wrong(
            "has a user name or a secret in front of its host",
            "leave out the @ and what is before it; secrets are named by nvme-dhchap-secret and nvme-tls-key",
        );
    }
    let mut addresses = Vec::new();
    for text in hosts.split(',') {
        if addresses.len() == MAX_ADDRESSES {
            return wrong(
                format!("names more than {MAX_ADDRESSES} addresses"),
                "leave some of them out",
            );
        }
        let address = address(text, IO_PORT)?;
        if addresses.contains(&address) {
            return wrong(
                format!("names the address {address} twice"),
                "write each address once; each is a path of its own",
            );
        }
        addresses.push(address);
    }
    Ok(addresses)
}

/// Reads `HOST` or `HOST:PORT`.
///
/// # Errors
/// It is neither.
pub fn address(text: &str, default_port: u16) -> Result<Address, UriError> {
    let bracketed = text.strip_prefix('[');
    let (host, port) = match bracketed {
        Some(rest) => match rest.split_once(']') {
            Some((host, "")) => (host, None),
            Some((host, port)) if port.starts_with(':') => (host, Some(&port[1..])),
            _ => {
                return wrong(
                    "has an IPv6 address with an unpaired bracket",
                    "write [ADDRESS]:PORT",
                );
            }
        },
        None => match text.split_once(':') {
            Some((_, port)) if port.contains(':') => {
                return wrong(
                    "has an IPv6 address without brackets",
                    "write [ADDRESS]:PORT",
                );
            }
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let port = match port {
        None => default_port,
        Some(digits) => match digits.parse::<u16>() {
            Ok(port) if port != 0 && !digits.starts_with('+') => port,
            _ => {
                return wrong(
                    "has a port that is none",
                    format!("write 1 to 65535, or leave it out for {default_port}"),
                );
            }
        },
    };
    let host = match bracketed {
        // One spelling for one address, so that two of them can be compared.
        Some(_) => match host.parse::<Ipv6Addr>() {
            Ok(address) => address.to_string(),
            Err(_) => {
                return wrong(
                    "has something in brackets that is no IPv6 address",
                    "write [ADDRESS]:PORT, or the host's name without brackets",
                );
            }
        },
        None => host_name(host)?,
    };
    Ok(Address { host, port })
}

fn host_name(host: &str) -> Result<String, UriError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    if host.is_empty() {
        return wrong(
            "has an address without a host",
            "write HOST or HOST:PORT, with commas between several",
        );
    }
    let digits_only = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let is_name = host.len() <= MAX_HOST && host.bytes().all(plain) && !host.starts_with('-');
    if !is_name || (digits_only && host.parse::<Ipv4Addr>().is_err()) {
        return wrong(
            "has a host that is none",
            "write a name, an IPv4 address, or an IPv6 address in brackets",
        );
    }
    Ok(host.to_ascii_lowercase())
}

fn subsystem(text: &str) -> Result<String, UriError> {
    if text.contains('/') {
        return wrong(
            "has a / in or behind the NQN",
            "leave it out; write %2F where it belongs to the NQN",
        );
    }
    let nqn = decoded(text)?;
    if nqn.len() > MAX_NQN {
        return wrong(
            format!("has an NQN of more than {MAX_NQN} bytes"),
            "write the NQN that the target has",
        );
    }
    if nqn.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return wrong(
            "has an NQN with a blank or a control character",
            "write the NQN that the target has",
        );
    }
    Ok(nqn)
}

/// Undoes percent-encoding (RFC 3986, section 2.1).
fn decoded(text: &str) -> Result<String, UriError> {
    const EXPECTED: &str = "write %25 for a percent sign, and %XX for a byte in hexadecimal";
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, behind @ ..] = rest {
        rest = behind;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |at: usize| behind.get(at).and_then(|b| char::from(*b).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return wrong("has a % without two hexadecimal digits", EXPECTED);
        };
        bytes.push((high << 4 | low) as u8);
        rest = &behind[2..];
    }
    String::from_utf8(bytes).or_else(|_| wrong("has an NQN that is no UTF-8", EXPECTED))
}

fn namespace(query: &str) -> Result<NamespaceName, UriError> {
    const KNOWN: &str = "write one of nsid=, uuid=, nguid= and eui64=";
    if query.contains('&') {
        return wrong("says two things behind the question mark", KNOWN);
    }
    let (key, value) = query.split_once('=').unwrap_or((query, ""));
    match key {
        "nsid" => match value.parse::<u32>() {
            // 0 is none, and FFFFFFFFh all of them (Base section 3.2.1.2).
            Ok(nsid) if (1..u32::MAX).contains(&nsid) && !value.starts_with('+') => {
                Ok(NamespaceName::Nsid(nsid))
            }
            _ => wrong(
                "has an nsid that is none",
                "write 1 to 4294967294, in decimal digits",
            ),
        },
        "uuid" => identifier(key, value).map(NamespaceName::Uuid),
        "nguid" => identifier(key, value).map(NamespaceName::Nguid),
        "eui64" => identifier(key, value).map(NamespaceName::Eui64),
        _ if is_key(key) => {
            let option = if key.starts_with("nvme-") {
                key.to_owned()
            } else {
                format!("nvme-{key}")
            };
            wrong(
                format!("says {key}, which is nothing that belongs to a namespace's name"),
                format!(
                    "{KNOWN}; how it is connected is said by options such as {option}, if there is one"
                ),
            )
        }
        _ => wrong("says something unknown behind the question mark", KNOWN),
    }
}

/// A key that can be repeated in an error.
fn is_key(key: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b);
    !key.is_empty() && key.len() <= 32 && key.bytes().all(plain)
}

/// `N` bytes in hexadecimal digits, with hyphens anywhere.
fn identifier<const N: usize>(key: &str, text: &str) -> Result<[u8; N], UriError> {
    let expected = || {
        let value = "0".repeat(2 * N);
        UriError {
            why: format!("has a value of {key} that is none"),
            instead: format!(
                "write {} hexadecimal digits, not all of them 0: {key}={value}",
                2 * N
            ),
        }
    };
    let bytes = hex(text).ok_or_else(expected)?;
    // All zeros say that there is none (NVM section 4.1.5.1).
    if bytes == [0; N] {
        Err(expected())
    } else {
        Ok(bytes)
    }
}

/// `N` bytes in hexadecimal digits, with hyphens anywhere between them.
pub fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut digits = text.bytes().filter(|b| *b != b'-');
    for byte in &mut bytes {
        let mut digit = || char::from(digits.next()?).to_digit(16);
        *byte = (digit()? << 4 | digit()?) as u8;
    }
    digits.next().is_none().then_some(bytes)
}

/// Bytes as a UUID is written (RFC 9562, section 4).
pub fn show_uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show_place(f, &self.addresses, self.subsystem.as_deref())
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        show_place(f, &self.addresses, Some(&self.subsystem))?;
        let plain = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        };
        match &self.namespace {
            NamespaceName::Nsid(nsid) => write!(f, "?nsid={nsid}"),
            NamespaceName::Uuid(uuid) => write!(f, "?uuid={}", show_uuid(uuid)),
            NamespaceName::Nguid(nguid) => {
                f.write_str("?nguid=")?;
                plain(f, nguid)
            }
            NamespaceName::Eui64(eui64) => {
                f.write_str("?eui64=")?;
                plain(f, eui64)
            }
        }
    }
}

fn show_place(
    f: &mut fmt::Formatter<'_>,
    addresses: &[Address],
    subsystem: Option<&str>,
) -> fmt::Result {
    f.write_str(SCHEME)?;
    for (at, address) in addresses.iter().enumerate() {
        if at > 0 {
            f.write_char(',')?;
        }
        write!(f, "{address}")?;
    }
    let Some(nqn) = subsystem else {
        return Ok(());
    };
    f.write_char('/')?;
    for byte in nqn.bytes() {
        // What RFC 3986 lets stand in a path (section 3.3).
        match byte.is_ascii_alphanumeric() || b"-._~:@!$&'()*+,;=".contains(&byte) {
            true => f.write_char(char::from(byte))?,
            false => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "uri_tests.rs"]
mod tests;
