//! An error, in place of the daemon's.

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Clone, Debug)]
pub(crate) struct Error;
