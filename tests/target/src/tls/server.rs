//! The handshake, by OpenSSL.
//!
//! OpenSSL's older callback for pre-shared keys knows SHA-256 only; the one that finds a session by an identity
//! is not in the `openssl` crate, so it is declared here.

use std::ffi::{c_int, c_uchar, c_uint};
use std::io;
use std::net::TcpStream;
use std::sync::OnceLock;

use foreign_types::ForeignTypeRef;
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{
    ClientHelloResponse, Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions,
    SslRef, SslStream, SslVersion,
};
use openssl_sys as ffi;

use super::key::{Configured, Identity};
use super::{TlsFault, TlsOptions};
use crate::auth::Hash;

type FindSession =
    unsafe extern "C" fn(*mut ffi::SSL, *const c_uchar, usize, *mut *mut ffi::SSL_SESSION) -> c_int;

unsafe extern "C" {
    fn SSL_CTX_set_psk_find_session_callback(ctx: *mut ffi::SSL_CTX, find: Option<FindSession>);
    fn SSL_CIPHER_find(ssl: *mut ffi::SSL, id: *const c_uchar) -> *const ffi::SSL_CIPHER;
    fn SSL_SESSION_new() -> *mut ffi::SSL_SESSION;
    fn SSL_SESSION_set1_master_key(
        s: *mut ffi::SSL_SESSION,
        key: *const c_uchar,
        len: usize,
    ) -> c_int;
    fn SSL_SESSION_set_cipher(s: *mut ffi::SSL_SESSION, cipher: *const ffi::SSL_CIPHER) -> c_int;
    fn SSL_SESSION_set_protocol_version(s: *mut ffi::SSL_SESSION, version: c_int) -> c_int;
}

/// The cipher suites of NVMe/TCP (transport specification, section 3.6.1.2), by the hash of their keys.
const SUITES: [&str; 2] = ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384"];

/// What the callback looks keys up in.
struct Keys {
    configured: Configured,
    fault: Option<TlsFault>,
}

/// Who is at the other end, by the identity that was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub host_nqn: String,
    pub subsystem_nqn: String,
}

fn keys_index() -> io::Result<Index<SslContext, Keys>> {
    static INDEX: OnceLock<Index<SslContext, Keys>> = OnceLock::new();
    match INDEX.get() {
        Some(index) => Ok(*index),
        None => {
            let index = SslContext::new_ex_index()?;
            Ok(*INDEX.get_or_init(|| index))
        }
    }
}

fn peer_index() -> io::Result<Index<Ssl, Peer>> {
    static INDEX: OnceLock<Index<Ssl, Peer>> = OnceLock::new();
    match INDEX.get() {
        Some(index) => Ok(*index),
        None => {
            let index = Ssl::new_ex_index()?;
            Ok(*INDEX.get_or_init(|| index))
        }
    }
}

/// What secures the connections of a port.
pub(crate) struct Server(SslContext);

impl Server {
    pub fn new(options: &TlsOptions) -> io::Result<Self> {
        let configured = Configured::parse(options).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the TLS key is not of the form NVMeTLSkey-1:…:",
            )
        })?;
        peer_index()?;
        let mut context = SslContextBuilder::new(SslMethod::tls_server())?;
        context.set_min_proto_version(Some(SslVersion::TLS1_3))?;
        context.set_ciphersuites(&SUITES.join(":"))?;
        // Sessions are not resumed: a ticket would be a key that nobody configured.
        context.set_options(SslOptions::NO_TICKET);
        context.set_num_tickets(0)?;
        context.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
        context.set_client_hello_callback(|ssl, _alert| {
            choose_suite(ssl)?;
            Ok(ClientHelloResponse::SUCCESS)
        });
        context.set_ex_data(
            keys_index()?,
            Keys {
                configured,
                fault: options.fault,
            },
        );
        // SAFETY: the context is alive, and the callback is a function for good.
        unsafe { SSL_CTX_set_psk_find_session_callback(context.as_ptr(), Some(find_session)) };
        Ok(Self(context.build()))
    }

    /// The stream over a socket, the handshake still to come.
    pub fn stream(&self, socket: TcpStream) -> io::Result<SslStream<TcpStream>> {
        Ok(SslStream::new(Ssl::new(&self.0)?, socket)?)
    }
}

/// Who the handshake has shown to be at the other end.
pub(crate) fn peer(ssl: &SslRef) -> Option<Peer> {
    ssl.ex_data(peer_index().ok()?).cloned()
}

/// Finds the key of an identity: 1, with no session if there is no such key.
unsafe extern "C" fn find_session(
    ssl: *mut ffi::SSL,
    identity: *const c_uchar,
    len: usize,
    session: *mut *mut ffi::SSL_SESSION,
) -> c_int {
    // SAFETY: OpenSSL hands over the connection that it works on, an identity of `len` bytes and a place for the
    // session, all alive for the length of the call and used by nobody else.
    unsafe {
        *session = std::ptr::null_mut();
        let identity = std::slice::from_raw_parts(identity, len);
        if let Some((hash, key)) = lookup(SslRef::from_ptr_mut(ssl), identity) {
            *session = make_session(ssl, hash, &key);
        }
    }
    1
}

/// Allows the cipher suite of the first identity that there is a key for, and no other: OpenSSL chooses the suite
/// before it looks at the identities, and takes no key of another hash then.
fn choose_suite(ssl: &mut SslRef) -> Result<(), ErrorStack> {
    /// The extension `pre_shared_key` (RFC 8446, section 4.2.11).
    const PRE_SHARED_KEY: c_uint = 41;
    let (mut start, mut len) = (std::ptr::null(), 0);
    // SAFETY: a live connection whose first message is being looked at; what is told stays as long as that message.
    let extension = unsafe {
        if ffi::SSL_client_hello_get0_ext(ssl.as_ptr(), PRE_SHARED_KEY, &mut start, &mut len) != 1 {
            return Ok(());
        }
        std::slice::from_raw_parts(start, len).to_vec()
    };
    for identity in identities(&extension) {
        if let Some((hash, _)) = lookup(ssl, identity) {
            return ssl.set_ciphersuites(if hash == Hash::Sha256 {
                SUITES[0]
            } else {
                SUITES[1]
            });
        }
    }
    Ok(())
}

/// The identities of the extension: each with its length in front and the age of a ticket behind.
fn identities(extension: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let Some((all, rest)) = extension.split_first_chunk::<2>() else {
        return found;
    };
    let mut rest = rest
        .get(..usize::from(u16::from_be_bytes(*all)))
        .unwrap_or_default();
    while let Some((len, behind)) = rest.split_first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes(*len));
        let (Some(identity), Some(next)) = (behind.get(..len), behind.get(len + 4..)) else {
            break;
        };
        found.push(identity);
        rest = next;
    }
    found
}

fn lookup(ssl: &mut SslRef, identity: &[u8]) -> Option<(Hash, Vec<u8>)> {
    let identity = Identity::parse(std::str::from_utf8(identity).ok()?)?;
    let keys = ssl.ssl_context().ex_data(keys_index().ok()?)?;
    let mut key = keys.configured.key_for(&identity)?;
    if keys.fault == Some(TlsFault::WrongKey) {
        key[0] ^= 1;
    }
    let (host_nqn, subsystem_nqn) = (
        identity.host_nqn.to_owned(),
        identity.subsystem_nqn.to_owned(),
    );
    ssl.set_ex_data(
        peer_index().ok()?,
        Peer {
            host_nqn,
            subsystem_nqn,
        },
    );
    Some((identity.hash, key))
}

/// A session that stands for an external PSK: TLS 1.3, the suite of its hash, the key.
///
/// # Safety
/// `ssl` is a live connection.
unsafe fn make_session(ssl: *mut ffi::SSL, hash: Hash, key: &[u8]) -> *mut ffi::SSL_SESSION {
    // TLS_AES_128_GCM_SHA256 or TLS_AES_256_GCM_SHA384.
    let suite: [u8; 2] = if hash == Hash::Sha256 {
        [0x13, 0x01]
    } else {
        [0x13, 0x02]
    };
    // SAFETY: a live connection, buffers of the lengths that are told, and a session of our own that is freed here
    // or handed over.
    unsafe {
        let cipher = SSL_CIPHER_find(ssl, suite.as_ptr());
        let session = SSL_SESSION_new();
        if session.is_null() {
            return session;
        }
        let made = !cipher.is_null()
            && SSL_SESSION_set1_master_key(session, key.as_ptr(), key.len()) == 1
            && SSL_SESSION_set_cipher(session, cipher) == 1
            && SSL_SESSION_set_protocol_version(session, 0x0304) == 1;
        if made {
            return session;
        }
        ffi::SSL_SESSION_free(session);
    }
    std::ptr::null_mut()
}
