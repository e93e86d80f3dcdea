//! From settings to a configuration: remote namespaces, and how they are connected.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::args::{DiscoverArgs, DiskArgs};
use super::check::invalid;
use super::disk::Disk;
use super::{CacheMode, Error, Format, Host, IoPolicy, Key, KeySource, NvmeConfig, Place, Source};
use crate::block::nvme_tcp::spec::{Address, NvmeOptions};
use crate::block::nvme_tcp::uri::{self, Allowed, MAX_NQN, Uri, UriError};

/// Commands outstanding on a queue, at most; a target that grants so many is rare.
const MAX_QUEUE_DEPTH: u16 = 1024;
/// The longest of the times that are bounded, in seconds.
const MAX_SECONDS: u64 = 86400;

/// How long something is tried: a number of seconds, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// For ever.
    Off,
    /// So many seconds.
    Seconds(u64),
}

impl FromStr for Patience {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "off" => Ok(Self::Off),
            _ if text.bytes().all(|b| b.is_ascii_digit()) => text
                .parse()
                .map(Self::Seconds)
                .map_err(|_| "write a number of seconds, or off"),
            _ => Err("write a number of seconds, or off"),
        }
    }
}

impl<'de> Deserialize<'de> for Patience {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Seconds;
        impl Visitor<'_> for Seconds {
            type Value = Patience;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of seconds, or \"off\"")
            }
            fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Patience, E> {
                let wrong = |_| E::invalid_value(de::Unexpected::Signed(seconds), &self);
                u64::try_from(seconds).map(Patience::Seconds).map_err(wrong)
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Patience, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Seconds)
    }
}

impl Default for NvmeConfig {
    fn default() -> Self {
        let options = NvmeOptions::default();
        Self {
            host_nqn: None,
            host_id: None,
            header_digest: options.header_digest,
            data_digest: options.data_digest,
            queue_depth: options.queue_depth,
            keep_alive: options.keep_alive,
            connect_timeout: options.connect_timeout,
            io_timeout: options.io_timeout,
            reconnect_delay: options.reconnect_delay,
            ctrl_loss_tmo: options.ctrl_loss,
            fast_io_fail_tmo: options.fast_io_fail,
            io_policy: IoPolicy::QueueDepth,
            dhchap_secret: None,
            dhchap_ctrl_secret: None,
            tls_key: None,
            reservations: false,
        }
    }
}

impl NvmeConfig {
    /// Where its secrets are, with the names of the settings.
    pub(super) fn secrets(&self) -> impl Iterator<Item = (&'static str, &KeySource)> {
        [
            ("nvme-dhchap-secret", &self.dhchap_secret),
            ("nvme-dhchap-ctrl-secret", &self.dhchap_ctrl_secret),
            ("nvme-tls-key", &self.tls_key),
        ]
        .into_iter()
        .filter_map(|(name, source)| Some((name, source.as_ref()?)))
    }
}

fn refused(key: Key, text: &str, error: UriError) -> Error {
    invalid(key, text, &error.why, error.instead)
}

impl Disk<'_> {
    /// Reads the name of a namespace.
    pub(super) fn check_uri(&self, key: Key, text: &str) -> Result<Source, Error> {
        text.parse()
            .map(Source::Nvme)
            .map_err(|error| refused(key, text, error))
    }

    /// Checks what can not be said of a disk whose bytes are in a namespace.
    pub(super) fn check_namespace(&self, uri: &Uri, format: Format) -> Result<(), Error> {
        let conflict = |key: Key, other: String, instead: &str| Error::Conflict {
            key,
            other,
            instead: instead.to_owned(),
        };
        if format == Format::Qcow2 {
            return Err(conflict(
                self.place.key("blk-file"),
                self.place.key("format").with("qcow2"),
                "a qcow2 image cannot grow inside of a namespace; serve that as raw, or make a local overlay over it \
                 with `qemu-img create -u -f qcow2 -F raw -b URI FILE SIZE`",
            ));
        }
        if self.args.cache == Some(CacheMode::Writeback) {
            return Err(conflict(
                self.place.key("cache"),
                uri.to_string(),
                "a namespace is never in the host's page cache; write none or writethrough",
            ));
        }
        Ok(())
    }

    /// Checks which namespaces an image may name.
    pub(super) fn check_allow_remote(&self) -> Result<Vec<Allowed>, Error> {
        let key = || self.place.key("allow-remote");
        let read = |text: &String| text.parse().map_err(|error| refused(key(), text, error));
        self.args.allow_remote.iter().map(read).collect()
    }

    /// Checks `copy-on-read`, of an image that has layers.
    pub(super) fn check_copy_on_read(&self) -> Result<bool, Error> {
        if self.args.copy_on_read && self.args.read_only {
            return Err(Error::Conflict {
                key: self.place.key("copy-on-read"),
                other: "read-only".to_owned(),
                instead: "what is read is written to the image; leave out one of them".to_owned(),
            });
        }
        Ok(self.args.copy_on_read)
    }

    /// Checks how namespaces are connected, of a disk that may have one.
    pub(super) fn check_nvme(
        &self,
        source: &Source,
        allow_remote: &[Allowed],
    ) -> Result<Option<NvmeConfig>, Error> {
        let is_remote = matches!(source, Source::Nvme(_));
        if !is_remote && allow_remote.is_empty() {
            return match self.args.given_of_nvme() {
                None => Ok(None),
                Some(name) => Err(Error::Conflict {
                    key: self.place.key(name),
                    other: source.to_string(),
                    instead: "nothing of the disk is remote; leave it out, or say with allow-remote what a qcow2 \
                              image may name as its backing file"
                        .to_owned(),
                }),
            };
        }
        if self.args.nvme_reservations && (!is_remote || self.args.read_only) {
            let (other, why) = match is_remote {
                true => ("read-only".to_owned(), "a disk that is only read is shared"),
                false => (source.to_string(), "a backing file is shared by many disks"),
            };
            return Err(Error::Conflict {
                key: self.place.key("nvme-reservations"),
                other,
                instead: format!("{why}, and a reservation keeps others out; leave it out"),
            });
        }
        self.check_nvme_options().map(Some)
    }

    fn check_nvme_options(&self) -> Result<NvmeConfig, Error> {
        let args = self.args;
        let default = NvmeConfig::default();
        let seconds = |name, given: Option<u64>, default: Duration, least: u64| match given {
            None => Ok(default),
            Some(n) if (least..=MAX_SECONDS).contains(&n) => Ok(Duration::from_secs(n)),
            Some(n) => {
                let instead = match least {
                    0 => format!("write 1 to {MAX_SECONDS} seconds, or 0 for none"),
                    _ => format!("write {least} to {MAX_SECONDS} seconds"),
                };
                Err(invalid(self.place.key(name), n, "is out of range", instead))
            }
        };
        let patience = |given: Option<Patience>, default: Option<Duration>| match given {
            None => default,
            Some(Patience::Off) => None,
            Some(Patience::Seconds(n)) => Some(Duration::from_secs(n)),
        };
        let config = NvmeConfig {
            host_nqn: self.check_host_nqn()?,
            host_id: self.check_host_id()?,
            header_digest: args.nvme_header_digest,
            data_digest: args.nvme_data_digest,
            queue_depth: match args.nvme_queue_depth {
                None => default.queue_depth,
                Some(n) => match u16::try_from(n) {
                    Ok(n) if (1..=MAX_QUEUE_DEPTH).contains(&n) => n,
                    _ => {
                        let key = self.place.key("nvme-queue-depth");
                        let instead = format!("write 1 to {MAX_QUEUE_DEPTH}");
                        return Err(invalid(key, n, "is out of range", instead));
                    }
                },
            },
            keep_alive: seconds(
                "nvme-keep-alive",
                args.nvme_keep_alive,
                default.keep_alive,
                0,
            )?,
            connect_timeout: seconds(
                "nvme-connect-timeout",
                args.nvme_connect_timeout,
                default.connect_timeout,
                1,
            )?,
            io_timeout: seconds(
                "nvme-io-timeout",
                args.nvme_io_timeout,
                default.io_timeout,
                1,
            )?,
            reconnect_delay: seconds(
                "nvme-reconnect-delay",
                args.nvme_reconnect_delay,
                default.reconnect_delay,
                1,
            )?,
            ctrl_loss_tmo: patience(args.nvme_ctrl_loss_tmo, default.ctrl_loss_tmo),
            fast_io_fail_tmo: patience(args.nvme_fast_io_fail_tmo, default.fast_io_fail_tmo),
            io_policy: args.nvme_io_policy.unwrap_or(default.io_policy),
            dhchap_secret: self.secret("nvme-dhchap-secret", &args.nvme_dhchap_secret)?,
            dhchap_ctrl_secret: self
                .secret("nvme-dhchap-ctrl-secret", &args.nvme_dhchap_ctrl_secret)?,
            tls_key: self.secret("nvme-tls-key", &args.nvme_tls_key)?,
            reservations: args.nvme_reservations,
        };
        if let (Some(fail), Some(loss)) = (config.fast_io_fail_tmo, config.ctrl_loss_tmo) {
            if fail > loss {
                return Err(Error::Conflict {
                    key: self.place.key("nvme-fast-io-fail-tmo"),
                    other: self.place.key("nvme-ctrl-loss-tmo").with(&loss.as_secs().to_string()),
                    instead: "a controller that was given up fails requests anyway; make the first one smaller, or off"
                        .to_owned(),
                });
            }
        }
        if config.dhchap_ctrl_secret.is_some() && config.dhchap_secret.is_none() {
            return Err(Error::Missing {
                key: self.place.key("nvme-dhchap-secret"),
                instead: "a controller proves itself only to a host that does; say where the host's secret is, or \
                          leave nvme-dhchap-ctrl-secret out"
                    .to_owned(),
            });
        }
        Ok(config)
    }

    fn check_host_nqn(&self) -> Result<Option<String>, Error> {
        let Some(nqn) = &self.args.nvme_host_nqn else {
            return Ok(None);
        };
        let plain = !nqn.chars().any(|c| c.is_control() || c.is_whitespace());
        if plain
            && nqn.len() <= MAX_NQN
            && nqn
                .strip_prefix("nqn.")
                .is_some_and(|rest| !rest.is_empty())
        {
            return Ok(Some(nqn.clone()));
        }
        Err(invalid(
            self.place.key("nvme-host-nqn"),
            nqn,
            "is no NVMe Qualified Name",
            format!("write nqn.YYYY-MM.DOMAIN:NAME, of at most {MAX_NQN} bytes and without blanks"),
        ))
    }

    fn check_host_id(&self) -> Result<Option<[u8; 16]>, Error> {
        let Some(text) = &self.args.nvme_host_id else {
            return Ok(None);
        };
        match uri::hex::<16>(text) {
            Some(id) if id != [0; 16] => Ok(Some(id)),
            _ => Err(invalid(
                self.place.key("nvme-host-id"),
                text,
                "is no host identifier",
                "write a UUID that is not all zeros, such as `uuidgen` makes",
            )),
        }
    }

    /// Where a secret is, in the words of an option.
    fn secret(
        &self,
        name: &'static str,
        text: &Option<String>,
    ) -> Result<Option<KeySource>, Error> {
        let Some(text) = text else {
            return Ok(None);
        };
        let source = match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => self.key_file(name, Path::new(path))?,
            Some(("fd", fd)) => self.key_fd(name, fd.parse().unwrap_or(-1), text)?,
            Some(("keyring", key)) => self.keyring(name, key)?,
            // What stands there may be one.
            _ => {
                return Err(invalid(
                    self.place.key(name),
                    "…",
                    "does not say where the secret is",
                    "write file:PATH, fd:N or keyring:NAME",
                ));
            }
        };
        Ok(Some(source))
    }
}

impl DiskArgs {
    /// A setting that says how a namespace is connected.
    fn given_of_nvme(&self) -> Option<&'static str> {
        let all = [
            ("nvme-host-nqn", self.nvme_host_nqn.is_some()),
            ("nvme-host-id", self.nvme_host_id.is_some()),
            ("nvme-header-digest", self.nvme_header_digest),
            ("nvme-data-digest", self.nvme_data_digest),
            ("nvme-queue-depth", self.nvme_queue_depth.is_some()),
            ("nvme-keep-alive", self.nvme_keep_alive.is_some()),
            ("nvme-connect-timeout", self.nvme_connect_timeout.is_some()),
            ("nvme-io-timeout", self.nvme_io_timeout.is_some()),
            ("nvme-reconnect-delay", self.nvme_reconnect_delay.is_some()),
            ("nvme-ctrl-loss-tmo", self.nvme_ctrl_loss_tmo.is_some()),
            (
                "nvme-fast-io-fail-tmo",
                self.nvme_fast_io_fail_tmo.is_some(),
            ),
            ("nvme-io-policy", self.nvme_io_policy.is_some()),
            ("nvme-dhchap-secret", self.nvme_dhchap_secret.is_some()),
            (
                "nvme-dhchap-ctrl-secret",
                self.nvme_dhchap_ctrl_secret.is_some(),
            ),
            ("nvme-tls-key", self.nvme_tls_key.is_some()),
            ("nvme-reservations", self.nvme_reservations),
        ];
        all.into_iter()
            .find_map(|(name, given)| given.then_some(name))
    }
}

/// A discovery controller to be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Discovery {
    /// Where it is.
    pub address: Address,
    /// How it is connected.
    pub nvme: NvmeConfig,
    /// The answer is for programs.
    pub json: bool,
}

impl Discovery {
    /// Checks what `virtioblkd nvme discover` was told.
    ///
    /// # Errors
    /// An [`Error`] for the first setting that cannot be.
    pub fn check(args: &DiscoverArgs) -> Result<Self, Error> {
        let place = Place::CommandLine;
        let options = DiskArgs {
            nvme_host_nqn: args.nvme_host_nqn.clone(),
            nvme_host_id: args.nvme_host_id.clone(),
            nvme_header_digest: args.nvme_header_digest,
            nvme_data_digest: args.nvme_data_digest,
            nvme_connect_timeout: args.nvme_connect_timeout,
            nvme_dhchap_secret: args.nvme_dhchap_secret.clone(),
            nvme_dhchap_ctrl_secret: args.nvme_dhchap_ctrl_secret.clone(),
            nvme_tls_key: args.nvme_tls_key.clone(),
            ..DiskArgs::default()
        };
        let host = Host {
            cpus: Vec::new(),
            sockets: Vec::new(),
        };
        let disk = Disk {
            args: &options,
            place: &place,
            name: "discover".to_owned(),
            alone: true,
            host: &host,
        };
        Ok(Self {
            address: args.address.clone(),
            nvme: disk.check_nvme_options()?,
            json: args.json,
        })
    }
}
