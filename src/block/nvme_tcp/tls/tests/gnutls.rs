//! Sessions with GnuTLS, which is what tlshd(8) has for Linux' targets: the library, if it is here.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{LazyLock, Mutex};

use super::super::{TlsError, TlsPsk, TlsSession, TlsStream};
use super::{pattern, psks, soon};

type Pointer = *mut c_void;

#[repr(C)]
struct Datum {
    data: *mut u8,
    size: c_uint,
}

/// GNUTLS_SERVER, GNUTLS_CRD_PSK, GNUTLS_KU_PEER, GNUTLS_MAC_SHA384.
const SERVER: c_uint = 1;
const CRD_PSK: c_int = 4;
const KU_PEER: c_uint = 1;
const MAC_SHA384: c_int = 7;

struct Library(Pointer);

// SAFETY: the handle of a loaded library is no thread's own.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

static LIBRARY: LazyLock<Option<Library>> = LazyLock::new(|| {
    // SAFETY: the name ends in NUL; loading this library has no effect on others.
    let library = unsafe { libc::dlopen(c"libgnutls.so.30".as_ptr(), libc::RTLD_NOW) };
    (!library.is_null()).then_some(Library(library))
});

impl Library {
    fn symbol(&self, name: &CStr) -> Pointer {
        let symbol = self.find(name);
        assert!(!symbol.is_null(), "{name:?}");
        symbol
    }

    fn find(&self, name: &CStr) -> Pointer {
        // SAFETY: the library is loaded, the name ends in NUL.
        unsafe { libc::dlsym(self.0, name.as_ptr()) }
    }
}

/// Calls a function of the library with arguments of the types that its manual gives.
macro_rules! call {
    ($library:expr, $name:literal ( $($arg:expr => $type:ty),* ) -> $returned:ty) => {{
        let symbol = $library.symbol($name);
        // SAFETY: the function has this signature (its manual), and the arguments are alive.
        unsafe {
            std::mem::transmute::<Pointer, unsafe extern "C" fn($($type),*) -> $returned>(symbol)($($arg),*)
        }
    }};
}

/// What the callback below knows: the identity and the key.
static KNOWN: Mutex<Vec<(Vec<u8>, Vec<u8>)>> = Mutex::new(Vec::new());

/// gnutls_psk_server_credentials_function2.
unsafe extern "C" fn credentials(
    _session: Pointer,
    identity: *const Datum,
    key: *mut Datum,
) -> c_int {
    // SAFETY: GnuTLS gives an identity with its length, and a place for the key, whose memory it frees
    // with free(3).
    unsafe {
        let name = std::slice::from_raw_parts((*identity).data, (*identity).size as usize);
        let known = KNOWN.lock().unwrap();
        let Some((_, found)) = known.iter().find(|(known, _)| known == name) else {
            return -1;
        };
        (*key).data = libc::malloc(found.len()).cast();
        (*key).size = found.len() as c_uint;
        found
            .as_ptr()
            .copy_to_nonoverlapping((*key).data, found.len());
    }
    0
}

/// One connection: a handshake; then what comes goes back, with the keys updated in between. The result is
/// that of the handshake.
fn serve(library: &Library, stream: &TcpStream, is_sha384: bool) -> c_int {
    let (mut session, mut psk): (Pointer, Pointer) = (std::ptr::null_mut(), std::ptr::null_mut());
    assert_eq!(
        call!(library, c"gnutls_init"(&mut session => &mut Pointer, SERVER => c_uint) -> c_int),
        0
    );
    let allocated = match is_sha384 {
        false => {
            call!(library, c"gnutls_psk_allocate_server_credentials"(&mut psk => &mut Pointer) -> c_int)
        }
        true => call!(
            library,
            c"gnutls_psk_allocate_server_credentials2"(&mut psk => &mut Pointer, MAC_SHA384 => c_int) -> c_int
        ),
    };
    assert_eq!(allocated, 0);
    type Callback = unsafe extern "C" fn(Pointer, *const Datum, *mut Datum) -> c_int;
    call!(library, c"gnutls_psk_set_server_credentials_function2"(psk => Pointer, credentials => Callback) -> ());
    assert_eq!(
        call!(library, c"gnutls_credentials_set"(session => Pointer, CRD_PSK => c_int, psk => Pointer) -> c_int),
        0
    );
    // As tlshd has it: TLS 1.3 with keys and a Diffie-Hellman exchange.
    let priority = c"SECURE128:-VERS-ALL:+VERS-TLS1.3:+DHE-PSK:+ECDHE-PSK:-PSK";
    assert_eq!(
        call!(library, c"gnutls_priority_set_direct"(
            session => Pointer, priority.as_ptr() => *const c_char, std::ptr::null_mut() => Pointer
        ) -> c_int),
        0
    );
    let fd = stream.as_raw_fd();
    call!(library, c"gnutls_transport_set_int2"(session => Pointer, fd => c_int, fd => c_int) -> ());
    let result = call!(library, c"gnutls_handshake"(session => Pointer) -> c_int);
    let mut buffer = vec![0u8; 16 << 10];
    let mut rounds = 0;
    let mut is_open = result == 0;
    while is_open {
        let got = call!(library, c"gnutls_record_recv"(
            session => Pointer, buffer.as_mut_ptr() => *mut u8, buffer.len() => usize
        ) -> isize);
        // GNUTLS_E_AGAIN: it was a KeyUpdate.
        if got == -28 {
            continue;
        }
        // The end of the connection is one without close_notify (GNUTLS_E_PREMATURE_TERMINATION), or a reset.
        if got <= 0 {
            assert!([0, -110, -54].contains(&got), "gnutls_record_recv: {got}");
            is_open = false;
            continue;
        }
        rounds += 1;
        // GnuTLS takes 8 KeyUpdates a second at most.
        if rounds % 8 == 0 {
            let update = call!(library, c"gnutls_session_key_update"(session => Pointer, KU_PEER => c_uint) -> c_int);
            assert_eq!(update, 0);
        }
        let mut sent = 0;
        while sent < got as usize {
            let left = &buffer[sent..got as usize];
            let count = call!(library, c"gnutls_record_send"(
                session => Pointer, left.as_ptr() => *const u8, left.len() => usize
            ) -> isize);
            assert!(count > 0);
            sent += count as usize;
        }
    }
    if result != 0 {
        call!(library, c"gnutls_alert_send_appropriate"(session => Pointer, result => c_int) -> c_int);
    }
    call!(library, c"gnutls_deinit"(session => Pointer) -> ());
    call!(library, c"gnutls_psk_free_server_credentials"(psk => Pointer) -> ());
    result
}

/// The server, its answer to one client, and what that client says.
fn with_server<T>(known: &TlsPsk, client: impl FnOnce(TcpStream) -> T) -> Option<(T, c_int)> {
    let Some(library) = &*LIBRARY else {
        eprintln!("SKIPPED: there is no libgnutls.so.30");
        return None;
    };
    // Older ones have SHA-256 for every external key.
    let is_sha384 = known.key().len() == 48;
    if is_sha384
        && library
            .find(c"gnutls_psk_allocate_server_credentials2")
            .is_null()
    {
        eprintln!("SKIPPED: this libgnutls.so.30 has no external keys for SHA-384");
        return None;
    }
    let entry = (known.identity().as_bytes().to_vec(), known.key().to_vec());
    KNOWN.lock().unwrap().push(entry);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        serve(library, &stream, is_sha384)
    });
    let said = client(TcpStream::connect(address).unwrap());
    Some((said, thread.join().unwrap()))
}

#[test]
fn a_session_talks_to_gnutls() {
    for psk in psks() {
        with_server(&psk, |stream| {
            let mut stream = TlsStream::connect(stream, &psk, soon()).unwrap();
            stream.set_deadline(Some(soon()));
            let data = pattern(10_000);
            for round in 0..40 {
                let len = round * 251 + 1;
                stream.write_all(&data[..len]).unwrap();
                let mut back = vec![0; len];
                stream.read_exact(&mut back).unwrap();
                assert!(back == data[..len], "round {round}");
            }
        })
        .inspect(|(_, result)| assert_eq!(*result, 0));
    }
}

#[test]
fn gnutls_refuses_another_key_and_another_identity() {
    let secret = |text: &str| super::psk(text, super::Derivation::Version0);
    let ours = "NVMeTLSkey-1:01:LFKHx3GLh/WxQ3Qix/hiXhgJO/Ixkvwbye6I1Ys3uH5JBiAx:";
    let unknown = super::psk(ours, super::Derivation::Version1);
    for ours in [secret(ours), unknown] {
        let answer = with_server(&secret(super::KEYS[0]), |stream| {
            TlsSession::connect(&stream, &ours, soon())
                .map(drop)
                .unwrap_err()
        });
        if let Some((error, result)) = answer {
            assert!(error.is_refusal(), "{error:?}");
            assert!(!matches!(error, TlsError::TimedOut));
            assert_ne!(result, 0);
        }
    }
}
