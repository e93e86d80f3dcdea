//! Keys of the kernel's keyring `.nvme`, where `nvme check-tls-key --insert` puts them: of type "psk", with the
//! identity as the description and the key for TLS, derived already, as the payload.

use std::ffi::{CStr, CString, c_long};
use std::io;

use zeroize::Zeroizing;

use super::TlsPsk;

/// Bytes of a description at most: an identity of version 1 and what stands before it.
const MAX_DESCRIPTION: usize = 1024;

impl TlsPsk {
    /// The key of a host and a subsystem in the kernel's keyring `.nvme`, in the order of preference that
    /// Linux' own host has (`nvme_tls_psk_default`): version 1 before 0, SHA-384 before SHA-256. The kernel
    /// has that keyring once its NVMe modules are loaded; who may search it is the kernel's to say.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if there is no such keyring, or no key in it; those of the kernel.
    pub fn from_keyring(host_nqn: &str, subsystem_nqn: &str) -> io::Result<Self> {
        let keys = std::fs::read_to_string("/proc/keys")?;
        let keyring = find_keyring(&keys, ".nvme").ok_or_else(|| {
            let message = "the kernel has no keyring .nvme that this process may see; load nvme-tcp, or \
                           give the key in a file";
            io::Error::new(io::ErrorKind::NotFound, message)
        })?;
        // What is in a keyring of one's own, one possesses, and so may read.
        keyctl([
            libc::KEYCTL_LINK as c_long,
            keyring,
            libc::KEY_SPEC_PROCESS_KEYRING.into(),
            0,
            0,
        ])?;
        find_key(keyring, c"psk", host_nqn, subsystem_nqn)
    }
}

/// The serial number of a keyring by its name, out of /proc/keys (proc_keys(5)): `0d732a6a I------ 1 perm
/// 1f0f0000 0 0 keyring .nvme: 1`.
fn find_keyring(keys: &str, name: &str) -> Option<c_long> {
    keys.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let serial = fields.next()?;
        let kind = fields.nth(6)?;
        let description = fields.next()?.trim_end_matches(':');
        if (kind, description) != ("keyring", name) {
            return None;
        }
        c_long::from_str_radix(serial, 16).ok()
    })
}

fn find_key(
    keyring: c_long,
    kind: &CStr,
    host_nqn: &str,
    subsystem_nqn: &str,
) -> io::Result<TlsPsk> {
    for start in ["NVMe1R02", "NVMe1R01", "NVMe0R02", "NVMe0R01"] {
        // The digest at the end of version 1 is the key's: keys of type "psk" are found without it.
        let wanted = format!("{start} {host_nqn} {subsystem_nqn}");
        let name = CString::new(wanted.as_str())?;
        let search = [
            libc::KEYCTL_SEARCH as c_long,
            keyring,
            kind.as_ptr() as c_long,
            name.as_ptr() as c_long,
            0,
        ];
        let serial = match keyctl(search) {
            Ok(serial) => serial,
            Err(error) if error.raw_os_error() == Some(libc::ENOKEY) => continue,
            Err(error) => return Err(error),
        };
        let identity = identity(serial)?;
        if identity != wanted && !identity.starts_with(&format!("{wanted} ")) {
            continue;
        }
        let mut key = Zeroizing::new(vec![0; TlsPsk::MAX_KEY + 1]);
        let len = read(libc::KEYCTL_READ, serial, &mut key)?;
        key.truncate(len);
        return TlsPsk::derived(identity, key).ok_or_else(|| {
            let message = format!(
                "the kernel's key {wanted:?} has {len} bytes, where its suite has another number"
            );
            io::Error::new(io::ErrorKind::InvalidData, message)
        });
    }
    let message = "the kernel's keyring .nvme has no key for this host's and this subsystem's NQN; `nvme \
                   check-tls-key --insert` puts one there";
    Err(io::Error::new(io::ErrorKind::NotFound, message))
}

/// The description of a key, which stands behind four semicolons (keyctl_describe(3)).
fn identity(serial: c_long) -> io::Result<String> {
    let mut text = vec![0; MAX_DESCRIPTION];
    let len = read(libc::KEYCTL_DESCRIBE, serial, &mut text)?;
    text.truncate(len);
    let text = String::from_utf8_lossy(&text);
    let description = text.trim_end_matches('\0').splitn(5, ';').nth(4);
    Ok(description.unwrap_or_default().to_owned())
}

/// How many bytes came; as many as `to` has: there may be more.
fn read(operation: u32, serial: c_long, to: &mut [u8]) -> io::Result<usize> {
    let (at, len) = (to.as_mut_ptr() as c_long, to.len() as c_long);
    let got = keyctl([operation as c_long, serial, at, len, 0])?;
    Ok(to.len().min(got as usize))
}

/// keyctl(2), with arguments that are numbers or the addresses of memory that lives.
fn keyctl(arguments: [c_long; 5]) -> io::Result<c_long> {
    let [operation, a, b, c, d] = arguments;
    // SAFETY: all callers are above. Addresses are of strings that end in NUL, and of buffers with the length
    // that is given; all outlive the call.
    match unsafe { libc::syscall(libc::SYS_keyctl, operation, a, b, c, d) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keyring_is_found_by_its_name() {
        let keys = "\
            009a2028 I--Q---     1 perm 3f010000  1000  1000 user      krb_ccache:primary: 12\n\
            0b2b3c4d I------     2 perm 1f0f0000     0     0 keyring   .nvme.old: empty\n\
            0d732a6a I------     1 perm 1f0f0000     0     0 keyring   .nvme: 1\n";
        assert_eq!(find_keyring(keys, ".nvme"), Some(0x0d73_2a6a));
        assert_eq!(find_keyring(keys, ".tls"), None);
        assert_eq!(find_keyring("0d732a6a I--", ".nvme"), None);
    }

    /// A key of type "user" is found by its whole description only, so that version 0 is what can be tried.
    #[test]
    fn a_derived_key_is_read_with_its_identity() {
        let add = |kind: &CStr, name: &CStr, payload: &[u8], keyring: c_long| {
            // SAFETY: strings end in NUL, the payload has that length.
            unsafe {
                libc::syscall(
                    libc::SYS_add_key,
                    kind.as_ptr(),
                    name.as_ptr(),
                    payload.as_ptr(),
                    payload.len(),
                    keyring,
                )
            }
        };
        let own = add(
            c"keyring",
            c"virtioblkd-test",
            &[],
            libc::KEY_SPEC_PROCESS_KEYRING.into(),
        );
        if own < 0 {
            eprintln!("SKIPPED: no keyring here: {}", io::Error::last_os_error());
            return;
        }
        let missing = find_key(own, c"user", "host", "subsystem").unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        let name = c"NVMe0R02 host subsystem";
        assert!(add(c"user", name, &[5; 48], own) > 0);
        let psk = find_key(own, c"user", "host", "subsystem").unwrap();
        assert_eq!(psk.identity(), "NVMe0R02 host subsystem");
        assert_eq!(psk.key(), [5; 48]);
        assert_eq!(psk.cipher_suite(), "TLS_AES_256_GCM_SHA384");
        // A key that is not as long as its identity says.
        for payload in [&[5; 32][..], &[5; 200]] {
            assert!(add(c"user", name, payload, own) > 0);
            let error = find_key(own, c"user", "host", "subsystem").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
