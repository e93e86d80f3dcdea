//! The configuration file: TOML with the command line's names.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::{DeTable, DeValue};

use super::args::{DiskArgs, ProcessArgs, WorkerArgs};
use super::{Error, LogLevel, Settings, parse};
use crate::block::nvme_tcp::uri::holds_secret;

/// The keys outside any table.
const TOP: &[&str] = &["disk", "log-level", "once", "pid-file", "workers"];
/// The keys of `[workers]`.
const WORKERS: &[&str] = &["count", "cpus", "poll", "poll-max-us"];
/// The keys of a `[[disk]]`.
const DISK: &[&str] = &[
    "allow-path",
    "allow-remote",
    "backing-cache",
    "blk-file",
    "block-size",
    "cache",
    "copy-on-read",
    "data-file",
    "fd",
    "fd-name",
    "format",
    "image-key",
    "key-fd",
    "key-file",
    "key-keyring",
    "l2-cache-size",
    "name",
    "num-queues",
    "nvme-connect-timeout",
    "nvme-ctrl-loss-tmo",
    "nvme-data-digest",
    "nvme-dhchap-ctrl-secret",
    "nvme-dhchap-secret",
    "nvme-fast-io-fail-tmo",
    "nvme-header-digest",
    "nvme-host-id",
    "nvme-host-nqn",
    "nvme-io-policy",
    "nvme-io-timeout",
    "nvme-keep-alive",
    "nvme-queue-depth",
    "nvme-reconnect-delay",
    "nvme-reservations",
    "nvme-tls-key",
    "on-dirty",
    "queue-size",
    "read-only",
    "serial",
    "socket-group",
    "socket-mode",
    "socket-path",
];

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    once: bool,
    pid_file: Option<PathBuf>,
    log_level: Option<LogLevel>,
    #[serde(default)]
    workers: WorkerArgs,
    #[serde(default)]
    disk: Vec<DiskArgs>,
}

/// Reads the settings of a configuration file. They are not checked yet.
///
/// # Errors
///
/// [`Error::Read`], [`Error::Secret`], [`Error::Syntax`] (also a value of the wrong type) or [`Error::UnknownKey`].
pub fn read(path: &Path) -> Result<Settings, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    from_text(path, &text)
}

/// [`read`] for the text of a file.
pub(crate) fn from_text(path: &Path, text: &str) -> Result<Settings, Error> {
    // An error of the parser would quote the line.
    if let Some(at) = text.lines().position(holds_secret) {
        return Err(Error::Secret {
            place: format!("{}: line {}", path.display(), at + 1),
            readers: "a configuration file has more readers than a secret should have",
        });
    }
    let syntax = |source| Error::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    };
    refuse_unknown_keys(path, text, DeTable::parse(text).map_err(syntax)?.get_ref())?;
    let file: File = toml::from_str(text).map_err(syntax)?;
    let process = ProcessArgs {
        once: file.once,
        pid_file: file.pid_file,
        log_level: file.log_level,
    };
    Ok(Settings::from_file(
        path.to_owned(),
        file.disk,
        file.workers,
        process,
    ))
}

/// A misspelt key must not be a setting that silently does nothing.
fn refuse_unknown_keys(path: &Path, text: &str, top: &DeTable) -> Result<(), Error> {
    let check = |table: &DeTable, name: &'static str, known: &[&'static str]| {
        let unknown = table
            .keys()
            .filter(|key| !known.contains(&key.get_ref().as_ref()))
            .min_by_key(|key| key.span().start);
        match unknown {
            None => Ok(()),
            Some(key) => Err(Error::UnknownKey {
                path: path.to_owned(),
                line: text
                    .bytes()
                    .take(key.span().start)
                    .filter(|b| *b == b'\n')
                    .count()
                    + 1,
                key: key.get_ref().to_string(),
                table: name,
                nearest: parse::nearest(key.get_ref(), known),
            }),
        }
    };
    check(top, "the file, outside any table", TOP)?;
    // What is of the wrong type is left to serde, which says so.
    if let Some(DeValue::Table(workers)) = top.get("workers").map(|v| v.get_ref()) {
        check(workers, "[workers]", WORKERS)?;
    }
    if let Some(DeValue::Array(disks)) = top.get("disk").map(|v| v.get_ref()) {
        for disk in disks.iter() {
            if let DeValue::Table(disk) = disk.get_ref() {
                check(disk, "[[disk]]", DISK)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields that serde knows, as it lists them when it meets one it does not know.
    fn fields_of<'de, T: Deserialize<'de>>() -> Vec<&'static str> {
        use serde::de::value::Error;
        struct Ask<'a>(&'a mut Vec<&'static str>);
        impl<'de> serde::Deserializer<'de> for Ask<'_> {
            type Error = Error;
            fn deserialize_any<V: serde::de::Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
                Err(serde::de::Error::custom("not a struct"))
            }
            fn deserialize_struct<V: serde::de::Visitor<'de>>(
                self,
                _: &'static str,
                fields: &'static [&'static str],
                _: V,
            ) -> Result<V::Value, Error> {
                self.0.extend(fields);
                Err(serde::de::Error::custom("asked"))
            }
            serde::forward_to_deserialize_any! {
                bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option
                unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier
                ignored_any
            }
        }
        let mut fields = Vec::new();
        let _ = T::deserialize(Ask(&mut fields));
        fields.sort_unstable();
        fields
    }

    #[test]
    fn the_known_keys_are_those_that_are_read() {
        assert_eq!(fields_of::<File>(), TOP);
        assert_eq!(fields_of::<WorkerArgs>(), WORKERS);
        assert_eq!(fields_of::<DiskArgs>(), DISK);
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_line_and_the_nearest_known() {
        for (text, message) in [
            (
                "once = true\nonec = true\n",
                "vm.toml: line 2: unknown key `onec` in the file, outside any table: did you mean `once`?",
            ),
            (
                "[workers]\n\nnumber = 1\n",
                "vm.toml: line 3: unknown key `number` in [workers]: see docs/configuration.md for the keys there are",
            ),
            (
                "[[disk]]\nfd = 3\n[[disk]]\nqueue_size = 3\n",
                "vm.toml: line 4: unknown key `queue_size` in [[disk]]: did you mean `queue-size`?",
            ),
            (
                "disk = [{ fdd = 3 }]",
                "vm.toml: line 1: unknown key `fdd` in [[disk]]: did you mean `fd`?",
            ),
            (
                "[disks]\n",
                "vm.toml: line 1: unknown key `disks` in the file, outside any table: did you mean `disk`?",
            ),
        ] {
            let error = from_text(Path::new("vm.toml"), text).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn a_value_of_the_wrong_type_is_refused_with_its_line() {
        for text in [
            "once = 1",
            "[workers]\ncount = \"2\"",
            "[workers]\ncount = -2",
            "[workers]\ncpus = 2",
            "[workers]\npoll = \"sometimes\"",
            "[disk]\nblk-file = \"x\"",
            "[[disk]]\nsocket-mode = 600",
            "[[disk]]\nformat = \"vmdk\"",
            "[[disk]]\nallow-path = \"x\"",
            "log-level = \"loud\"",
            "workers = 3",
            "once = ",
        ] {
            let error = from_text(Path::new("vm.toml"), text).unwrap_err();
            assert!(matches!(error, Error::Syntax { .. }), "{text}: {error}");
            assert!(
                error
                    .to_string()
                    .starts_with("vm.toml: TOML parse error at line "),
                "{error}"
            );
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_is_named() {
        let error = read(Path::new("/nonexistent/vm.toml")).unwrap_err();
        assert!(
            error.to_string().contains("/nonexistent/vm.toml"),
            "{error}"
        );
    }
}
