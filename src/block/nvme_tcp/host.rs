//! Who this host is to a subsystem: its NQN and its identifier.
//!
//! What the user gave comes first, then what the machine has for all its programs (`/etc/nvme`), then a UUID that
//! is made once and kept. One host has one NQN and one identifier (Base section 4.5.1): an identifier of the
//! machine goes with the machine's NQN only, and an NQN that is made of a UUID has that UUID as its identifier.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::spec::NvmeOptions;
use crate::block::error::{Error, ErrorKind, Result};

/// Longest NQN, bytes (Base section 4.5).
pub const MAX_NQN: usize = 223;
/// What NQNs made of a UUID begin with (Base section 4.5).
const UUID_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:";
/// Our file in a state directory: a UUID, of which both names are made.
const STATE_FILE: &str = "hostid";

/// Who this host is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// The host's NQN.
    pub nqn: String,
    /// The host's identifier.
    pub id: [u8; 16],
}

/// Checks an NQN's form: `nqn.YYYY-MM.DOMAIN`, mostly with `:NAME` behind it, of at most 223 bytes (Base section
/// 4.5).
///
/// # Errors
/// What is wrong with it.
pub fn check_nqn(nqn: &str) -> std::result::Result<(), String> {
    let wrong = |why: String| Err(format!("{nqn:?} is no NQN: {why}"));
    if nqn.len() > MAX_NQN {
        return wrong(format!("it has {} bytes, of {MAX_NQN} at most", nqn.len()));
    }
    if nqn.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return wrong("there is a blank or a control character in it".to_owned());
    }
    let Some(rest) = nqn.strip_prefix("nqn.") else {
        return wrong("it does not begin with \"nqn.\"".to_owned());
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit());
    let date = rest.get(..8).and_then(|date| date.strip_suffix('.'));
    let date = date.and_then(|date| date.split_once('-'));
    if !date.is_some_and(|(year, month)| year.len() == 4 && digits(year) && digits(month)) {
        return wrong("a date \"YYYY-MM.\" must follow \"nqn.\"".to_owned());
    }
    let name = &rest[8..];
    let (domain, _) = name.split_once(':').unwrap_or((name, ""));
    if domain.is_empty() {
        return wrong("a domain must follow the date".to_owned());
    }
    if let Some(uuid) = nqn.strip_prefix(UUID_NQN)
        && parse_uuid(uuid).is_none()
    {
        return wrong(format!("a UUID must follow {UUID_NQN:?}"));
    }
    Ok(())
}

/// A UUID's bytes as they are written.
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    let mut at = 0;
    let text = text.as_bytes();
    if text.len() != 36 {
        return None;
    }
    for (index, byte) in text.iter().enumerate() {
        let dash = matches!(index, 8 | 13 | 18 | 23);
        match (dash, char::from(*byte).to_digit(16)) {
            (true, _) if *byte == b'-' => {}
            (false, Some(digit)) => {
                bytes[at / 2] = bytes[at / 2] << 4 | digit as u8;
                at += 1;
            }
            _ => return None,
        }
    }
    Some(bytes)
}

/// The text of a UUID.
pub fn uuid_text(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

impl Host {
    /// This host, as the options, the machine or a kept state say.
    ///
    /// # Errors
    /// A name that is none, in the options or in `/etc/nvme`; no place to keep what was made.
    pub fn find(options: &NvmeOptions) -> Result<Self> {
        Self::find_in(options, &Places::of_machine())
    }

    fn find_in(options: &NvmeOptions, places: &Places) -> Result<Self> {
        let machine = places.machine_nqn()?;
        let given = options.host_nqn.as_ref();
        if let Some(nqn) = given {
            check_nqn(nqn).map_err(|why| {
                Error::image(ErrorKind::InvalidImage, "host-nqn", None, why)
                    .hint("give the NQN of this host, or none")
            })?;
        }
        let nqn = match given.or(machine.as_ref()) {
            Some(nqn) => nqn.clone(),
            None => format!("{UUID_NQN}{}", uuid_text(&places.kept()?)),
        };
        let of_machine = machine.as_ref() == Some(&nqn);
        let of_nqn = || nqn.strip_prefix(UUID_NQN).and_then(parse_uuid);
        let id = match options.host_id {
            Some(id) => id,
            None => match of_machine
                .then(|| places.machine_id())
                .transpose()?
                .flatten()
            {
                Some(id) => id,
                None => match of_nqn() {
                    Some(id) => id,
                    None => places.kept()?,
                },
            },
        };
        if id == [0; 16] {
            return Err(Error::image(
                ErrorKind::InvalidImage,
                "host-id",
                None,
                "a host identifier of zeros is none (Base section 5.17.2.21); give another one",
            ));
        }
        Ok(Self { nqn, id })
    }
}

/// Where names are looked for and kept.
struct Places {
    machine: PathBuf,
    states: Vec<PathBuf>,
}

impl Places {
    fn of_machine() -> Self {
        let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
        let own = env::var_os("XDG_STATE_HOME").map(PathBuf::from);
        let own = own.filter(|path| path.is_absolute()).or_else(home);
        let mut states = vec![PathBuf::from("/var/lib/virtioblkd")];
        states.extend(own.map(|path| path.join("virtioblkd")));
        Self {
            machine: PathBuf::from("/etc/nvme"),
            states,
        }
    }

    fn machine_nqn(&self) -> Result<Option<String>> {
        let path = self.machine.join("hostnqn");
        let Some(nqn) = line_of(&path)? else {
            return Ok(None);
        };
        check_nqn(&nqn).map_err(|why| broken(&path, why))?;
        Ok(Some(nqn))
    }

    fn machine_id(&self) -> Result<Option<[u8; 16]>> {
        uuid_of(&self.machine.join("hostid"))
    }

    /// The UUID that is kept, made if there is none.
    fn kept(&self) -> Result<[u8; 16]> {
        for state in &self.states {
            if let Some(id) = uuid_of(&state.join(STATE_FILE))? {
                return Ok(id);
            }
        }
        let mut first = None;
        for state in &self.states {
            match make(state) {
                Ok(id) => return Ok(id),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first
            .unwrap_or_else(|| broken(&self.machine, "there is no place for a host identifier"))
            .hint("the host's names cannot be kept; give host-nqn and host-id, or make /etc/nvme/hostnqn"))
    }
}

fn broken(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::image(ErrorKind::InvalidImage, path, None, why).hint("mend the file, or remove it")
}

/// The first line of a small file; none if there is no file, or none that may be read.
fn line_of(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().next().map(|line| line.trim().to_owned())),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(None)
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            log::debug!("{}: {error}; going on without", path.display());
            Ok(None)
        }
        Err(error) => Err(Error::io(path, "read", None, error)),
    }
}

fn uuid_of(path: &Path) -> Result<Option<[u8; 16]>> {
    let Some(line) = line_of(path)? else {
        return Ok(None);
    };
    match parse_uuid(&line) {
        Some(id) => Ok(Some(id)),
        None => Err(broken(path, "there is no UUID in the first line")),
    }
}

/// Makes a UUID and keeps it in `state`; of several that do so at once, all get the one that came first.
fn make(state: &Path) -> Result<[u8; 16]> {
    let path = state.join(STATE_FILE);
    let failed = |operation| {
        let path = path.clone();
        move |error| Error::io(&path, operation, None, error)
    };
    fs::create_dir_all(state).map_err(failed("create the directory"))?;
    let id = random_uuid().map_err(failed("getrandom"))?;
    // A name of its own and a link: the file appears whole, or not at all, and only once.
    let temporary = state.join(format!(".{STATE_FILE}.{}", uuid_text(&id)));
    let written = (|| {
        let mut options = OpenOptions::new();
        let mut file: File = options
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&temporary)?;
        file.write_all(format!("{}\n", uuid_text(&id)).as_bytes())?;
        file.sync_all()?;
        match fs::hard_link(&temporary, &path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            linked => linked.map(|()| true),
        }
    })();
    let _ = fs::remove_file(&temporary);
    if written.map_err(failed("create"))? {
        log::info!(
            "{}: made a host identifier, which is kept there",
            path.display()
        );
        return Ok(id);
    }
    uuid_of(&path)?.ok_or_else(|| broken(&path, "it came and went"))
}

/// A UUID of version 4 (RFC 9562, section 5.4).
fn random_uuid() -> io::Result<[u8; 16]> {
    let mut id = [0u8; 16];
    // SAFETY: `id` has the length given. So few bytes come whole, or not at all.
    let got = unsafe { libc::getrandom(id.as_mut_ptr().cast(), id.len(), 0) };
    if got != 16 {
        return Err(io::Error::last_os_error());
    }
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    const ID: &str = "01234567-89ab-cdef-0011-223344556677";

    fn places(dir: &Path) -> Places {
        Places {
            machine: dir.join("etc"),
            states: vec![dir.join("var"), dir.join("home/virtioblkd")],
        }
    }

    fn put(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn forms_of_nqns_are_checked() {
        let long = format!("nqn.2016-06.io.spdk:{}", "x".repeat(203));
        for right in [
            "nqn.2016-06.io.spdk:cnode1",
            "nqn.2014-08.org.nvmexpress.discovery",
            "nqn.2014-08.org.nvmexpress:uuid:01234567-89ab-cdef-0011-223344556677",
            &long,
        ] {
            assert_eq!(check_nqn(right), Ok(()), "{right}");
        }
        let longer = format!("{long}x");
        for (wrong, why) in [
            (longer.as_str(), "224 bytes"),
            ("iqn.2016-06.io.spdk:cnode1", "begin with"),
            ("nqn.16-06.io.spdk:cnode1", "date"),
            ("nqn.2016-06", "date"),
            ("nqn.2016-0é.io", "date"),
            ("nqn.2016-06.:cnode1", "domain"),
            ("nqn.2016-06.io.spdk:c node", "blank"),
            ("nqn.2014-08.org.nvmexpress:uuid:0123", "UUID"),
        ] {
            let error = check_nqn(wrong).unwrap_err();
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn what_the_user_gave_comes_first() {
        let dir = tempfile::tempdir().unwrap();
        put(
            dir.path().join("etc/hostnqn"),
            "nqn.2016-06.io.example:machine\n",
        );
        put(dir.path().join("etc/hostid"), ID);
        let options = NvmeOptions {
            host_nqn: Some("nqn.2016-06.io.example:given".to_owned()),
            host_id: Some([7; 16]),
            ..NvmeOptions::default()
        };
        let host = Host::find_in(&options, &places(dir.path())).unwrap();
        assert_eq!(host.nqn, "nqn.2016-06.io.example:given");
        assert_eq!(host.id, [7; 16]);
    }

    #[test]
    fn the_machines_names_go_together() {
        let dir = tempfile::tempdir().unwrap();
        put(
            dir.path().join("etc/hostnqn"),
            "nqn.2016-06.io.example:machine\n",
        );
        put(dir.path().join("etc/hostid"), &format!("{ID}\n"));
        let host = Host::find_in(&NvmeOptions::default(), &places(dir.path())).unwrap();
        assert_eq!(host.nqn, "nqn.2016-06.io.example:machine");
        assert_eq!(Some(host.id), parse_uuid(ID));
        // Another NQN is another host, which must not have the machine's identifier.
        let options = NvmeOptions {
            host_nqn: Some("nqn.2016-06.io.example:other".to_owned()),
            ..NvmeOptions::default()
        };
        let other = Host::find_in(&options, &places(dir.path())).unwrap();
        assert_ne!(other.id, host.id);
    }

    #[test]
    fn a_uuid_in_the_nqn_is_the_identifier() {
        let dir = tempfile::tempdir().unwrap();
        let options = NvmeOptions {
            host_nqn: Some(format!("{UUID_NQN}{ID}")),
            ..NvmeOptions::default()
        };
        let host = Host::find_in(&options, &places(dir.path())).unwrap();
        assert_eq!(Some(host.id), parse_uuid(ID));
        assert!(!dir.path().join("var").exists(), "nothing was to be kept");
    }

    #[test]
    fn names_that_were_made_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let find = || Host::find_in(&NvmeOptions::default(), &places(dir.path())).unwrap();
        let first = find();
        assert_eq!(first.nqn, format!("{UUID_NQN}{}", uuid_text(&first.id)));
        assert_eq!(check_nqn(&first.nqn), Ok(()));
        assert_eq!(find(), first);
        let left: Vec<_> = fs::read_dir(dir.path().join("var")).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn where_the_first_place_cannot_be_written_the_next_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        // A file where the directory should be: also root cannot make one there.
        put(dir.path().join("var"), "");
        let find = || Host::find_in(&NvmeOptions::default(), &places(dir.path())).unwrap();
        let first = find();
        assert!(dir.path().join("home/virtioblkd/hostid").exists());
        assert_eq!(find(), first);
    }

    #[test]
    fn two_that_make_names_at_once_get_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let barrier = Barrier::new(8);
        let hosts: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        Host::find_in(&NvmeOptions::default(), &places(dir.path())).unwrap()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .collect()
        });
        assert!(hosts.iter().all(|host| *host == hosts[0]), "{hosts:?}");
    }

    #[test]
    fn a_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path().join("etc/hostnqn"), "machine\n");
        let error = Host::find_in(&NvmeOptions::default(), &places(dir.path())).unwrap_err();
        assert!(error.to_string().contains("etc/hostnqn"), "{error}");
        put(
            dir.path().join("etc/hostnqn"),
            "nqn.2016-06.io.example:machine\n",
        );
        put(dir.path().join("etc/hostid"), "12");
        let error = Host::find_in(&NvmeOptions::default(), &places(dir.path())).unwrap_err();
        assert!(error.to_string().contains("etc/hostid"), "{error}");
    }
}
