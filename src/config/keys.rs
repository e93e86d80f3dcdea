//! From settings to a configuration: the keys of encrypted images.

use std::os::fd::RawFd;
use std::path::Path;

use super::check::{absolute, invalid};
use super::disk::Disk;
use super::{Error, Format, Key, KeyConfig, KeySource};
use crate::block::nvme_tcp::uri;

/// What stands between an image and its key.
const KINDS: [&str; 3] = ["=file:", "=fd:", "=keyring:"];

impl Disk<'_> {
    /// Checks where the keys are; none is read.
    pub(super) fn check_keys(&self, format: Format) -> Result<Vec<KeyConfig>, Error> {
        let args = self.args;
        let mut keys = Vec::new();
        let mut names = Vec::new();
        if let Some(path) = &args.key_file {
            names.push("key-file");
            keys.push(self.key_file("key-file", path)?);
        }
        if let Some(fd) = args.key_fd {
            names.push("key-fd");
            keys.push(self.key_fd("key-fd", fd, fd)?);
        }
        if let Some(name) = &args.key_keyring {
            names.push("key-keyring");
            keys.push(self.keyring("key-keyring", name)?);
        }
        if let [first, second, ..] = names[..] {
            return Err(Error::Conflict {
                key: self.place.key(first),
                other: second.to_owned(),
                instead: "one key is for all encrypted images; leave out one of them, or name an image's \
                          own with image-key"
                    .to_owned(),
            });
        }
        let mut keys: Vec<KeyConfig> = keys
            .into_iter()
            .map(|source| KeyConfig {
                image: None,
                source,
            })
            .collect();
        for text in &args.image_key {
            keys.push(self.image_key(text)?);
        }
        if keys.is_empty() && format == Format::Luks {
            return Err(Error::Missing {
                key: self.place.key("key-file"),
                instead: "say where the image's key is, with key-file, key-fd or key-keyring"
                    .to_owned(),
            });
        }
        let name = names.first().copied().unwrap_or("image-key");
        if !keys.is_empty() && format == Format::Raw {
            return Err(Error::Conflict {
                key: self.place.key(name),
                other: self.place.key("format").with("raw"),
                instead: format!(
                    "a raw image has no key; leave it out, or write {} or {}",
                    self.place.key("format").with("luks"),
                    self.place.key("format").with("qcow2")
                ),
            });
        }
        Ok(keys)
    }

    fn image_key(&self, text: &str) -> Result<KeyConfig, Error> {
        let name = "image-key";
        let found = KINDS
            .iter()
            .filter_map(|kind| Some((text.find(kind)?, *kind)))
            .min();
        let Some((at, kind)) = found.filter(|(at, _)| *at > 0) else {
            return Err(invalid(
                self.place.key(name),
                text,
                "names no image and where its key is",
                "write IMAGE=file:PATH, IMAGE=fd:N or IMAGE=keyring:NAME",
            ));
        };
        let value = &text[at + kind.len()..];
        if uri::is_remote(text) {
            return Err(invalid(
                self.place.key(name),
                &text[..at],
                "is a remote namespace",
                "write key-file, key-fd or key-keyring, whose key is for all images without one of their own",
            ));
        }
        let image = absolute(&self.place.key(name), Path::new(&text[..at]))?;
        let source = match kind {
            "=file:" => self.key_file(name, Path::new(value))?,
            "=fd:" => self.key_fd(name, value.parse().unwrap_or(-1), text)?,
            _ => self.keyring(name, value)?,
        };
        Ok(KeyConfig {
            image: Some(image),
            source,
        })
    }

    pub(super) fn key_file(&self, name: &'static str, path: &Path) -> Result<KeySource, Error> {
        let key = self.place.key(name);
        let path = absolute(&key, path)?;
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_dir() => {
                let why = "is a directory";
                Err(invalid(
                    key,
                    path.display(),
                    why,
                    "write the path of a file",
                ))
            }
            Ok(_) => Ok(KeySource::File(path)),
            Err(source) => Err(Error::Path {
                key,
                path,
                source,
                instead: "write the path of the file that holds the key".to_owned(),
            }),
        }
    }

    pub(super) fn key_fd(
        &self,
        name: &'static str,
        fd: RawFd,
        written: impl ToString,
    ) -> Result<KeySource, Error> {
        let key = self.place.key(name);
        let instead = "write the number of a file or pipe that is open at the start, 3 or more";
        let refuse = |key: Key, why| Err(invalid(key, written.to_string(), why, instead));
        if fd < 3 {
            return refuse(key, "is no descriptor for a key");
        }
        match std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_ok() {
            true => Ok(KeySource::Fd(fd)),
            false => refuse(key, "is not an open descriptor"),
        }
    }

    pub(super) fn keyring(&self, name: &'static str, value: &str) -> Result<KeySource, Error> {
        if value.is_empty() || value.contains('\0') {
            let key = self.place.key(name);
            let instead = "write the description of a key of type user, or its serial number";
            return Err(invalid(key, value, "is no name of a key", instead));
        }
        Ok(KeySource::Keyring(value.to_owned()))
    }
}

impl KeySource {
    /// The descriptor that is read.
    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Fd(fd) => Some(*fd),
            _ => None,
        }
    }
}
