//! A configuration as a configuration file, complete with every default.

use std::fmt;

use clap::ValueEnum;

use super::{Config, DiskConfig, KeySource, Listen, NvmeConfig, Source, parse};
use crate::block::nvme_tcp::uri::show_uuid;

/// A string as TOML's basic string, whose escapes are those of JSON but for DEL.
fn quoted(text: impl fmt::Display) -> String {
    serde_json::Value::String(text.to_string())
        .to_string()
        .replace('\u{7f}', "\\u007f")
}

/// The word that the user writes for this.
fn word<T: ValueEnum>(value: T) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |v| quoted(v.get_name()))
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path } => write!(f, "{}", path.display()),
            Self::Nvme(uri) => write!(f, "{uri}"),
            Self::Null { size } => write!(f, "null:{size}"),
        }
    }
}

/// As it stands behind an image's name.
impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Fd(fd) => write!(f, "fd:{fd}"),
            Self::Keyring(name) => write!(f, "keyring:{name}"),
        }
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for warning in &self.warnings {
            writeln!(f, "# Warning: {warning}")?;
        }
        writeln!(f, "once = {}", self.once)?;
        if let Some(path) = &self.pid_file {
            writeln!(f, "pid-file = {}", quoted(path.display()))?;
        }
        if let Some(level) = self.log_level {
            writeln!(f, "log-level = {}", word(level))?;
        }

        writeln!(f, "\n[workers]")?;
        writeln!(f, "count = {}", self.workers.count)?;
        if !self.workers.cpus.is_empty() {
            writeln!(
                f,
                "cpus = {}",
                quoted(parse::show_cpu_list(&self.workers.cpus))
            )?;
        }
        writeln!(f, "poll = {}", word(self.workers.poll))?;
        if self.workers.poll == super::PollMode::Adaptive {
            writeln!(f, "poll-max-us = {}", self.workers.poll_max.as_micros())?;
        }
        self.disks.iter().try_for_each(|disk| write!(f, "\n{disk}"))
    }
}

impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "[[disk]]")?;
        writeln!(f, "name = {}", quoted(&self.name))?;
        match &self.listen {
            Listen::Path { path, mode, group } => {
                writeln!(f, "socket-path = {}", quoted(path.display()))?;
                writeln!(f, "socket-mode = \"{mode:04o}\"")?;
                if let Some(group) = group {
                    writeln!(f, "socket-group = \"{group}\"")?;
                }
            }
            Listen::Fd(fd) => writeln!(f, "fd = {fd}")?,
            Listen::Systemd { name, .. } => writeln!(f, "fd-name = {}", quoted(name))?,
        }
        writeln!(f, "blk-file = {}", quoted(&self.source))?;
        writeln!(f, "format = {}", word(self.format))?;
        writeln!(f, "read-only = {}", self.read_only)?;
        writeln!(f, "cache = {}", word(self.cache))?;
        if self.format == super::Format::Qcow2 {
            writeln!(f, "backing-cache = {}", word(self.backing_cache))?;
            writeln!(f, "on-dirty = {}", word(self.on_dirty))?;
            let paths: Vec<_> = self
                .allow_paths
                .iter()
                .map(|p| quoted(p.display()))
                .collect();
            writeln!(f, "allow-path = [{}]", paths.join(", "))?;
            writeln!(f, "l2-cache-size = \"{}\"", self.l2_cache_size)?;
            if let Some(path) = &self.data_file {
                writeln!(f, "data-file = {}", quoted(path.display()))?;
            }
            if !self.allow_remote.is_empty() {
                let all: Vec<_> = self.allow_remote.iter().map(quoted).collect();
                writeln!(f, "allow-remote = [{}]", all.join(", "))?;
            }
            writeln!(f, "copy-on-read = {}", self.copy_on_read)?;
        }
        if let Some(nvme) = &self.nvme {
            write!(f, "{nvme}")?;
        }
        let mut of_images = Vec::new();
        for key in &self.keys {
            match (&key.image, &key.source) {
                (None, KeySource::File(path)) => {
                    writeln!(f, "key-file = {}", quoted(path.display()))?
                }
                (None, KeySource::Fd(fd)) => writeln!(f, "key-fd = {fd}")?,
                (None, KeySource::Keyring(name)) => writeln!(f, "key-keyring = {}", quoted(name))?,
                (Some(image), source) => {
                    of_images.push(quoted(format_args!("{}={source}", image.display())));
                }
            }
        }
        if !of_images.is_empty() {
            writeln!(f, "image-key = [{}]", of_images.join(", "))?;
        }
        writeln!(f, "num-queues = {}", self.num_queues)?;
        writeln!(f, "queue-size = {}", self.queue_size)?;
        match &self.serial {
            Some(serial) => writeln!(f, "serial = {}", quoted(serial))?,
            None => writeln!(f, "# serial: made from the identity of the remote disk")?,
        }
        match self.block_size {
            Some(bytes) => writeln!(f, "block-size = {bytes}"),
            None => writeln!(f, "# block-size: that of the remote disk"),
        }
    }
}

/// The keys of a disk that say how its namespaces are connected.
impl fmt::Display for NvmeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(nqn) = &self.host_nqn {
            writeln!(f, "nvme-host-nqn = {}", quoted(nqn))?;
        }
        if let Some(id) = &self.host_id {
            writeln!(f, "nvme-host-id = {}", quoted(show_uuid(id)))?;
        }
        writeln!(f, "nvme-header-digest = {}", self.header_digest)?;
        writeln!(f, "nvme-data-digest = {}", self.data_digest)?;
        writeln!(f, "nvme-queue-depth = {}", self.queue_depth)?;
        for (name, time) in [
            ("keep-alive", self.keep_alive),
            ("connect-timeout", self.connect_timeout),
            ("io-timeout", self.io_timeout),
            ("reconnect-delay", self.reconnect_delay),
        ] {
            writeln!(f, "nvme-{name} = {}", time.as_secs())?;
        }
        for (name, time) in [
            ("ctrl-loss-tmo", self.ctrl_loss_tmo),
            ("fast-io-fail-tmo", self.fast_io_fail_tmo),
        ] {
            match time {
                Some(time) => writeln!(f, "nvme-{name} = {}", time.as_secs())?,
                None => writeln!(f, "nvme-{name} = \"off\"")?,
            }
        }
        writeln!(f, "nvme-io-policy = {}", word(self.io_policy))?;
        for (name, source) in self.secrets() {
            writeln!(f, "{name} = {}", quoted(source))?;
        }
        writeln!(f, "nvme-reservations = {}", self.reservations)
    }
}
