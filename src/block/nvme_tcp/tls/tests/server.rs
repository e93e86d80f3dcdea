//! Servers for tests: OpenSSL's side in this process.

use std::ffi::{c_int, c_uchar};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::thread::JoinHandle;

use foreign_types::ForeignTypeRef;
use openssl::asn1::Asn1Time;
use openssl::ec::{EcGroup, EcKey};
use openssl::ex_data::Index;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::ssl::{Ssl, SslContextBuilder, SslMethod, SslRef, SslStream, SslVersion};
use openssl::x509::X509;
use openssl_sys::{SSL, SSL_SESSION};

use super::super::{TlsPsk, ffi::PskSession};

type FindSession = unsafe extern "C" fn(
    ssl: *mut SSL,
    identity: *const c_uchar,
    identity_len: usize,
    session: *mut *mut SSL_SESSION,
) -> c_int;

unsafe extern "C" {
    fn SSL_set_psk_find_session_callback(ssl: *mut SSL, callback: Option<FindSession>);
    fn SSL_key_update(ssl: *mut SSL, kind: c_int) -> c_int;
}

static KNOWN: LazyLock<Index<Ssl, (Vec<u8>, PskSession)>> =
    LazyLock::new(|| Ssl::new_ex_index().unwrap());

unsafe extern "C" fn find_session(
    ssl: *mut SSL,
    identity: *const c_uchar,
    identity_len: usize,
    session: *mut *mut SSL_SESSION,
) -> c_int {
    // SAFETY: OpenSSL gives an SSL that is alive, the identity with its length, and a place to write to.
    unsafe {
        let ssl = SslRef::from_ptr(ssl);
        let identity = std::slice::from_raw_parts(identity, identity_len);
        let (known, psk) = ssl.ex_data(*KNOWN).unwrap();
        session.write(match known == identity {
            true => psk.reference(),
            false => std::ptr::null_mut(),
        });
    }
    1
}

/// Whose session a server continues.
pub(in crate::block::nvme_tcp) enum Server {
    /// That of this PSK.
    Psk(TlsPsk),
    /// Nobody's: it has a certificate.
    Certificate,
}

impl Server {
    fn ssl(&self) -> Ssl {
        let mut context = SslContextBuilder::new(SslMethod::tls_server()).unwrap();
        context
            .set_min_proto_version(Some(SslVersion::TLS1_3))
            .unwrap();
        if let Self::Certificate = self {
            let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
            let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
            let mut x509 = X509::builder().unwrap();
            x509.set_pubkey(&key).unwrap();
            x509.set_not_before(&Asn1Time::days_from_now(0).unwrap())
                .unwrap();
            x509.set_not_after(&Asn1Time::days_from_now(2).unwrap())
                .unwrap();
            x509.sign(&key, MessageDigest::sha256()).unwrap();
            context.set_certificate(&x509.build()).unwrap();
            context.set_private_key(&key).unwrap();
        }
        let mut ssl = Ssl::new(&context.build()).unwrap();
        if let Self::Psk(psk) = self {
            let session = PskSession::new(&ssl, psk).unwrap();
            ssl.set_ex_data(*KNOWN, (psk.identity().as_bytes().to_vec(), session));
            // SAFETY: the SSL is alive; the callback does what is asked of such.
            unsafe { SSL_set_psk_find_session_callback(ssl.as_ptr(), Some(find_session)) };
        }
        ssl
    }

    /// Takes one connection, does the handshake, and gives the session to `serve`.
    pub(in crate::block::nvme_tcp) fn start<T: Send + 'static>(
        self,
        serve: impl FnOnce(SslStream<TcpStream>) -> T + Send + 'static,
    ) -> (SocketAddr, JoinHandle<Option<T>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            stream.set_nodelay(true).unwrap();
            self.ssl().accept(stream).ok().map(serve)
        });
        (address, thread)
    }
}

/// Has the next record of a server preceded by a KeyUpdate that asks for one of the client.
pub(in crate::block::nvme_tcp) fn request_key_update(stream: &SslStream<TcpStream>) {
    // SAFETY: the SSL is alive.
    assert_eq!(unsafe { SSL_key_update(stream.ssl().as_ptr(), 1) }, 1);
}
