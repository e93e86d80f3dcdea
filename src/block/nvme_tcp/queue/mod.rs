//! The I/O queues of one thread: a connection for each path, and the requests that are spread over them.
//!
//! - [`table`] knows the requests and their commands.
//! - [`dispatch`] cuts requests into commands, chooses queues for them, and gives requests back that have ended.
//! - [`recovery`] decides what becomes of a command that failed, lost its connection or takes too long.
//! - [`connection`] is one queue: the protocol's state machine, its socket, and the two tasks between them.
//! - [`transport`] is what is between machine and socket: nothing, or TLS.
//!
//! All of it belongs to one reactor's thread: there is no lock, and in the steady state nothing is allocated. What a
//! turn of the reactor begins goes out in one send.

pub(super) mod connection;
pub(super) mod dispatch;
mod recovery;
pub(super) mod table;
mod transport;

#[cfg(test)]
mod tests;

pub(super) use connection::Queue;
pub(super) use dispatch::Running;
pub(super) use table::Kind;
