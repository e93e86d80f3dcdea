//! Why a configuration is refused, in words for the one who wrote it.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Where a setting was written, so that an error names it as its writer knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// An option of the command line.
    CommandLine,
    /// A key outside any table of this file.
    File(PathBuf),
    /// A key of the `[workers]` table of this file.
    Workers(PathBuf),
    /// A key of a `[[disk]]` table of this file.
    Disk {
        /// The file.
        file: PathBuf,
        /// The name of the disk, given or made.
        disk: String,
    },
}

impl Place {
    /// The setting of this name, here.
    pub fn key(&self, name: &'static str) -> Key {
        Key {
            name,
            place: Box::new(self.clone()),
        }
    }
}

/// One setting: an option of the command line or a key of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The name without dashes in front: that of the option and of the key.
    pub name: &'static str,
    /// Where it was written, or would be.
    pub place: Box<Place>,
}

impl Key {
    /// How the user would write this setting with a value: `--format qcow2`, `format = "qcow2"`.
    pub fn with(&self, value: &str) -> String {
        match &*self.place {
            Place::CommandLine => format!("{self} {value}"),
            _ if value.parse::<i64>().is_ok() => format!("{} = {value}", self.in_file()),
            _ => format!("{} = {value:?}", self.in_file()),
        }
    }

    /// The name of the key in the file. Only `workers` is called otherwise in its own table.
    fn in_file(&self) -> &'static str {
        if self.name == "workers" {
            "count"
        } else {
            self.name
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.place {
            Place::CommandLine => write!(f, "--{}", self.name),
            Place::File(file) => write!(f, "{}: `{}`", file.display(), self.in_file()),
            Place::Workers(file) => {
                write!(f, "{}: `{}` in [workers]", file.display(), self.in_file())
            }
            Place::Disk { file, disk } => {
                write!(
                    f,
                    "{}: `{}` of disk {disk:?}",
                    file.display(),
                    self.in_file()
                )
            }
        }
    }
}

/// Why the settings cannot be used. Each says which setting it is and what to write instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line could not be read, or asks for `--help` or `--version`.
    #[error(transparent)]
    Usage(#[from] clap::Error),

    /// An option that the configuration file should hold stands beside `--config`.
    #[error(
        "--{option} cannot stand beside --config {}: write it into that file, or leave --config out",
        path.display()
    )]
    BesideConfig {
        /// The option, without dashes in front.
        option: String,
        /// The configuration file.
        path: PathBuf,
    },

    /// The configuration file cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The configuration file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },

    /// The configuration file is not TOML, or a value is of the wrong type.
    #[error("{}: {source}", path.display())]
    Syntax {
        /// The configuration file.
        path: PathBuf,
        /// What is wrong, and in which line.
        source: Box<toml::de::Error>,
    },

    /// The configuration file has a key that means nothing.
    #[error("{}: line {line}: unknown key `{key}` in {table}{}", path.display(), did_you_mean(nearest))]
    UnknownKey {
        /// The configuration file.
        path: PathBuf,
        /// Its line, counted from 1.
        line: usize,
        /// The key.
        key: String,
        /// The table it is in, in words.
        table: &'static str,
        /// The known key that is most like it.
        nearest: Option<&'static str>,
    },

    /// A setting that is needed is not there.
    #[error("{key} is missing: {instead}")]
    Missing {
        /// The setting.
        key: Key,
        /// What to write.
        instead: String,
    },

    /// A value that cannot be.
    #[error("{key}: {value:?} {why}: {instead}")]
    Invalid {
        /// The setting.
        key: Key,
        /// The value, as written.
        value: String,
        /// What is wrong with it.
        why: String,
        /// What to write.
        instead: String,
    },

    /// Two settings that cannot stand together.
    #[error("{key} and `{other}` cannot stand together: {instead}")]
    Conflict {
        /// One of them.
        key: Key,
        /// The other, with its value if that matters.
        other: String,
        /// What to write.
        instead: String,
    },

    /// Two disks share what each must have of its own.
    #[error("{key}: {value:?} is also that of disk {other:?}: {instead}")]
    Shared {
        /// The setting of the second disk.
        key: Key,
        /// The value.
        value: String,
        /// The name of the first disk.
        other: String,
        /// What to write.
        instead: String,
    },

    /// A secret stands where only its place may be said. It is not repeated.
    #[error(
        "{place}: a secret stands here itself, and {readers}: put it into a file that only its owner can read, and \
         write file:PATH"
    )]
    Secret {
        /// The option, or the file and its line.
        place: String,
        /// Who can see it there.
        readers: &'static str,
    },

    /// A file or directory that is named cannot be looked at.
    #[error("{key}: {}: {source}: {instead}", path.display())]
    Path {
        /// The setting.
        key: Key,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        instead: String,
    },
}

impl Error {
    /// Tells the user and ends the process: status 0 after `--help` and `--version`, else 2.
    pub fn exit(&self) -> ! {
        match self {
            // Writes help to stdout and the rest to stderr, in colour where there is any.
            Self::Usage(usage) => usage.exit(),
            other => {
                eprintln!("virtioblkd: {other}");
                std::process::exit(2)
            }
        }
    }
}

fn did_you_mean(nearest: &Option<&'static str>) -> String {
    match nearest {
        Some(known) => format!(": did you mean `{known}`?"),
        None => ": see docs/configuration.md for the keys there are".to_owned(),
    }
}
