//! Why something on a path did not work, and what is to be done about it.

use std::fmt::Display;

use crate::block::error::ErrorKind;

/// What ends an attempt, or an association.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The path is to end: nobody wants it any more.
    Closed,
    /// It failed.
    Failed(Failure),
}

/// A failure on a path, told without its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// What kind.
    pub(crate) kind: ErrorKind,
    /// What happened, and what to do.
    pub(crate) text: String,
    /// What it says of another attempt.
    pub(crate) again: Again,
}

/// Whether it makes sense to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Again {
    /// It may work the next time.
    Later,
    /// The other side has said, or shown, that it will not work.
    Never,
    /// The namespace is not there. It may come back where a target is just starting.
    Gone,
    /// There is another one in its place.
    Replaced,
}

pub(crate) type Result<T> = std::result::Result<T, Trouble>;

/// A failure that may be over at the next attempt.
pub(crate) fn later(text: impl Display) -> Trouble {
    kind_of(ErrorKind::Io, text)
}

/// As [`later`], of another kind.
pub(crate) fn kind_of(kind: ErrorKind, text: impl Display) -> Trouble {
    Trouble::Failed(Failure {
        kind,
        text: text.to_string(),
        again: Again::Later,
    })
}

/// A failure that will happen each time.
pub(crate) fn never(kind: ErrorKind, text: impl Display) -> Trouble {
    Trouble::Failed(Failure {
        kind,
        text: text.to_string(),
        again: Again::Never,
    })
}

/// The namespace is not there.
pub(crate) fn gone(text: impl Display) -> Trouble {
    Trouble::Failed(Failure {
        kind: ErrorKind::NotFound,
        text: text.to_string(),
        again: Again::Gone,
    })
}

/// There is another namespace in its place.
pub(crate) fn replaced(text: impl Display) -> Trouble {
    Trouble::Failed(Failure {
        kind: ErrorKind::InvalidImage,
        text: text.to_string(),
        again: Again::Replaced,
    })
}

impl Trouble {
    /// The same, with what may be the matter behind.
    pub(crate) fn with(self, hint: impl Display) -> Self {
        match self {
            Self::Closed => Self::Closed,
            Self::Failed(failure) => Self::Failed(Failure {
                text: format!("{}; {hint}", failure.text),
                ..failure
            }),
        }
    }

    /// The same, with what was being done in front.
    pub(crate) fn during(self, what: impl Display) -> Self {
        match self {
            Self::Closed => Self::Closed,
            Self::Failed(failure) => Self::Failed(Failure {
                text: format!("{what}: {}", failure.text),
                ..failure
            }),
        }
    }
}
