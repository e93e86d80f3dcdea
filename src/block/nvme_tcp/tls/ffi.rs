//! What OpenSSL has for external PSKs of TLS 1.3, and `openssl-sys` does not declare.
//!
//! `SSL_CTX_set_psk_client_callback`, which it does declare, knows keys for SHA-256 only; a session made by
//! hand can have either suite (SSL_CTX_set_psk_use_session_callback(3)).

use std::ffi::{c_int, c_uchar};
use std::ptr::{self, NonNull};
use std::sync::{LazyLock, Mutex, PoisonError};

use foreign_types::ForeignTypeRef;
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{Ssl, SslRef};
use openssl_sys::{EVP_MD, SSL, SSL_CIPHER, SSL_SESSION, SSL_SESSION_free, SSL_SESSION_up_ref};

use super::TlsPsk;

type UseSession = unsafe extern "C" fn(
    ssl: *mut SSL,
    md: *const EVP_MD,
    id: *mut *const c_uchar,
    idlen: *mut usize,
    session: *mut *mut SSL_SESSION,
) -> c_int;

unsafe extern "C" {
    fn SSL_SESSION_new() -> *mut SSL_SESSION;
    fn SSL_SESSION_set1_master_key(s: *mut SSL_SESSION, key: *const c_uchar, len: usize) -> c_int;
    fn SSL_SESSION_set_cipher(s: *mut SSL_SESSION, cipher: *const SSL_CIPHER) -> c_int;
    fn SSL_SESSION_set_protocol_version(s: *mut SSL_SESSION, version: c_int) -> c_int;
    fn SSL_CIPHER_find(ssl: *mut SSL, id: *const c_uchar) -> *const SSL_CIPHER;
    fn SSL_set_psk_use_session_callback(ssl: *mut SSL, callback: Option<UseSession>);
    fn SSL_key_update(ssl: *mut SSL, kind: c_int) -> c_int;
}

/// SSL_KEY_UPDATE_NOT_REQUESTED: our keys only.
const KEY_UPDATE_NOT_REQUESTED: c_int = 0;

/// A session that stands for a PSK. It is freed, and its key wiped, when it goes.
pub(super) struct PskSession(NonNull<SSL_SESSION>);

// SAFETY: a session is a reference-counted object without ties to a thread, and nothing here changes it
// once it is made.
unsafe impl Send for PskSession {}
// SAFETY: as above.
unsafe impl Sync for PskSession {}

impl Drop for PskSession {
    fn drop(&mut self) {
        // SAFETY: this value owns one reference, which goes with it.
        unsafe { SSL_SESSION_free(self.0.as_ptr()) };
    }
}

impl PskSession {
    /// The session of `psk`, with the suites that `ssl` knows.
    pub(super) fn new(ssl: &SslRef, psk: &TlsPsk) -> Result<Self, ErrorStack> {
        // SAFETY: the function takes no argument; it returns a new session or null.
        let session = NonNull::new(unsafe { SSL_SESSION_new() }).ok_or_else(ErrorStack::get)?;
        let session = Self(session);
        let (key, suite) = (psk.key(), psk.cipher_suite_id());
        // SAFETY: the session and the SSL are alive; the key has the length that is said, and is copied; the
        // suite's number has the two bytes that are read; the cipher that is found lives for ever.
        let done = unsafe {
            let session = session.0.as_ptr();
            let cipher = SSL_CIPHER_find(ssl.as_ptr(), suite.as_ptr());
            !cipher.is_null()
                && SSL_SESSION_set1_master_key(session, key.as_ptr(), key.len()) == 1
                && SSL_SESSION_set_cipher(session, cipher) == 1
                && SSL_SESSION_set_protocol_version(session, openssl_sys::TLS1_3_VERSION) == 1
        };
        match done {
            true => Ok(session),
            false => Err(ErrorStack::get()),
        }
    }
}

/// What a client offers.
struct Offer {
    identity: Box<[u8]>,
    session: PskSession,
}

/// Where an SSL keeps its offer.
static OFFER: LazyLock<Option<Index<Ssl, Mutex<Option<Offer>>>>> =
    LazyLock::new(|| Ssl::new_ex_index().ok());

/// Makes `ssl` offer `psk` in its handshake.
pub(super) fn offer(ssl: &mut SslRef, psk: &TlsPsk) -> Result<(), ErrorStack> {
    let index = (*OFFER).ok_or_else(ErrorStack::get)?;
    let offer = Offer {
        identity: psk.identity().as_bytes().into(),
        session: PskSession::new(ssl, psk)?,
    };
    ssl.set_ex_data(index, Mutex::new(Some(offer)));
    // SAFETY: the SSL is alive, and the callback does what is asked of such.
    unsafe { SSL_set_psk_use_session_callback(ssl.as_ptr(), Some(use_session)) };
    Ok(())
}

/// Drops the key that was offered; the handshake is over.
pub(super) fn forget(ssl: &SslRef) {
    if let Some(offer) = (*OFFER).and_then(|index| ssl.ex_data(index)) {
        *offer.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Gives the identity and the session to the handshake. A session for another hash than `md`, which a server
/// can ask for by a HelloRetryRequest, is refused by OpenSSL itself.
unsafe extern "C" fn use_session(
    ssl: *mut SSL,
    _md: *const EVP_MD,
    id: *mut *const c_uchar,
    idlen: *mut usize,
    session: *mut *mut SSL_SESSION,
) -> c_int {
    // SAFETY: OpenSSL calls this with an SSL that is alive, and does not use it elsewhere meanwhile.
    let ssl = unsafe { SslRef::from_ptr(ssl) };
    let offer = (*OFFER).and_then(|index| ssl.ex_data(index));
    let offer = offer.map(|offer| offer.lock().unwrap_or_else(PoisonError::into_inner));
    let Some(offer) = offer.as_ref().and_then(|offer| offer.as_ref()) else {
        // SAFETY: OpenSSL gives places to write to; no session is "go on without a PSK".
        unsafe { session.write(ptr::null_mut()) };
        return 1;
    };
    // SAFETY: OpenSSL gives three places to write to. The identity lives as long as the SSL's offer, which is
    // until the handshake is over. The reference that the handshake gets is its own.
    unsafe {
        if SSL_SESSION_up_ref(offer.session.0.as_ptr()) != 1 {
            return 0;
        }
        id.write(offer.identity.as_ptr());
        idlen.write(offer.identity.len());
        session.write(offer.session.0.as_ptr());
    }
    1
}

#[cfg(test)]
impl PskSession {
    /// The session itself, for a server of the tests, which gets a reference of its own.
    pub(super) fn reference(&self) -> *mut SSL_SESSION {
        // SAFETY: the session is alive.
        assert_eq!(unsafe { SSL_SESSION_up_ref(self.0.as_ptr()) }, 1);
        self.0.as_ptr()
    }
}

/// Has the next record that is sent preceded by a KeyUpdate (RFC 8446, section 4.6.3).
pub(super) fn update_key(ssl: &SslRef) -> Result<(), ErrorStack> {
    // SAFETY: the SSL is alive.
    match unsafe { SSL_key_update(ssl.as_ptr(), KEY_UPDATE_NOT_REQUESTED) } {
        1 => Ok(()),
        _ => Err(ErrorStack::get()),
    }
}
