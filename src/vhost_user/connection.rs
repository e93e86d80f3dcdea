//! One connection: messages in, the session's answers out, until the VMM goes.

mod postcopy;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, warn};
use vhost::vhost_user::message::{FrontendReq, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE};
use vhost::vhost_user::{self, BackendReqHandler, VhostUserBackendReqHandlerMut};

use super::device::{Device, Paused};
use super::handover::{ConnectionState, Incoming, Outgoing, SessionState};
use super::peek::{self, Header, Peeked};
use super::session::{GET_VRING_BASE_SKIP_DRAIN, Session};

/// So many messages are handled at once before others (signals, a second client) get their turn.
const BATCH: usize = 64;

/// Where a connection stands after [`Connection::process`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All that came is handled.
    Idle,
    /// There may be more to handle at once.
    More,
    /// The VMM has closed the connection.
    Closed,
}

/// Why a connection ends before the VMM closes it.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket failed.
    #[error("{operation} on the vhost-user socket: {source}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The end of the stream in the middle of a message, or descriptors in the middle of a header.
    #[error("the VMM sent a truncated message")]
    Truncated,
    /// A payload longer than any message of the protocol has.
    #[error("the VMM sent {request} with {size} bytes of payload; {MAX_MSG_SIZE} are the most")]
    Oversized {
        /// The request.
        request: String,
        /// Its payload in bytes.
        size: u32,
    },
    /// A wrong protocol version, a reply instead of a request, or unknown flags.
    #[error("the VMM sent {request} with flags {flags:#x}, which is no request of version 1")]
    Flags {
        /// The request.
        request: String,
        /// Its flags.
        flags: u32,
    },
    /// More descriptors than a message can have, or than this process can open.
    #[error(
        "the VMM sent a message with more file descriptors than can be received \
         (at most {MAX_ATTACHED_FD_ENTRIES}; the open files limit counts too)"
    )]
    TooManyFds,
    /// A request was refused and the VMM cannot be told, because it asked for no reply.
    #[error("{request} was refused: {why}")]
    Refused {
        /// The request.
        request: String,
        /// The reason in words.
        why: String,
    },
    /// Memory that the VMM shares with us has lost its pages.
    #[error(
        "{what} has lost its pages: the VMM truncated the file behind it, or no huge pages are left. Nothing \
         that touched it was completed; what the guest was told is done is on the disk. Restart the VM, with \
         enough (huge) pages reserved for it"
    )]
    MemoryLost {
        /// Which memory.
        what: String,
    },
    /// A message that breaks the protocol.
    #[error("{request} breaks the protocol: {source}")]
    Protocol {
        /// The request.
        request: String,
        /// What the message parser said.
        source: vhost_user::Error,
    },
}

fn socket_error(operation: &'static str) -> impl FnOnce(io::Error) -> ConnectionError {
    move |source| ConnectionError::Socket { operation, source }
}

/// A connection with a VMM. Dropping it resets the device: the rings are stopped, the guest's memory is
/// let go and the image released.
pub struct Connection {
    sock: UnixStream,
    handler: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
    messages: u64,
}

impl Connection {
    /// Serves `device` to the VMM at the other end of `sock`; `name` is the disk's, for the log.
    ///
    /// # Errors
    /// The socket cannot be made blocking or duplicated.
    pub fn new(sock: UnixStream, name: &str, device: Arc<dyn Device>) -> io::Result<Self> {
        // The vhost crate retries on EAGAIN without waiting; a message is only read when it is there.
        sock.set_nonblocking(false)?;
        let session = Arc::new(Mutex::new(Session::new(name.to_owned(), device)));
        let handler = BackendReqHandler::from_stream(sock.try_clone()?, Arc::clone(&session));
        Ok(Connection {
            sock,
            handler,
            session,
            messages: 0,
        })
    }

    /// The number of messages handled so far. A client that sent none was only looking.
    pub fn messages(&self) -> u64 {
        self.messages
    }

    /// Whether the VMM has closed its end; messages it sent before may still be unhandled.
    pub fn hung_up(&self) -> bool {
        peek::hung_up(&self.sock)
    }

    /// Handles what has come, without waiting for more. To be called again after an edge-triggered
    /// event (readable, writable or hang-up) on the socket, after one of [`crate::mappings::loss_event`], or at
    /// once after [`Progress::More`].
    ///
    /// # Errors
    /// The connection cannot go on; drop it.
    pub fn process(&mut self) -> Result<Progress, ConnectionError> {
        self.session().take_answers();
        for _ in 0..BATCH {
            self.check_memory()?;
            let (header, fds) = match peek::peek(&self.sock).map_err(socket_error("recvmsg"))? {
                Peeked::Incomplete => return Ok(Progress::Idle),
                Peeked::Closed => return Ok(Progress::Closed),
                Peeked::Truncated => return Err(ConnectionError::Truncated),
                Peeked::TooManyFds => return Err(ConnectionError::TooManyFds),
                Peeked::Message { header, fds } => (header, fds),
            };
            if header.is_oversized() {
                return Err(ConnectionError::Oversized {
                    request: header.name(),
                    size: header.size,
                });
            }
            if header.has_bad_flags() {
                return Err(ConnectionError::Flags {
                    request: header.name(),
                    flags: header.flags,
                });
            }
            if fds > MAX_ATTACHED_FD_ENTRIES {
                return Err(ConnectionError::TooManyFds);
            }
            // A VMM that sends without reading our replies waits, not we.
            if !peek::can_reply(&self.sock) {
                return Ok(Progress::Idle);
            }
            self.messages += 1;
            self.handle(&header)?;
        }
        Ok(Progress::More)
    }

    /// Tells the VMM that the disk has another capacity, if it can be told and has not been.
    pub fn tell_change(&mut self) {
        self.session().tell_change();
    }

    /// Lost memory ends the connection: no VM goes on without it.
    fn check_memory(&self) -> Result<(), ConnectionError> {
        let session = self.session();
        let Some(what) = session.lost_memory() else {
            return Ok(());
        };
        // Memory of a postcopy migration is given up when the VMM leaves, which is said in other words.
        if self.hung_up() {
            return Ok(());
        }
        session.signal_errors();
        Err(ConnectionError::MemoryLost { what })
    }

    /// Stops all rings, with everything answered that the guest has asked for.
    pub fn drain(&mut self) {
        self.session().drain();
    }

    /// What another process needs to go on with this connection. To be called between messages, that is, not from
    /// within [`process`](Connection::process).
    ///
    /// # Errors
    /// Too many files are open.
    pub fn export(&self, fds: &mut Outgoing) -> Result<ConnectionState, String> {
        // Without `..`: what is new here has to be told too.
        let Connection {
            sock,
            // Made again by negotiating again.
            handler: _,
            session: _,
            messages,
        } = self;
        Ok(ConnectionState {
            sock: fds.add(sock).map_err(|error| error.to_string())?,
            messages: *messages,
            session: self.session().export(fds)?,
        })
    }

    /// Goes on with a connection of another process. Its rings wait for [`start_paused`](Connection::start_paused).
    ///
    /// # Errors
    /// The state is not one that `device` can go on with.
    pub fn import(
        name: &str,
        device: Arc<dyn Device>,
        state: &ConnectionState,
        fds: &mut Incoming,
    ) -> Result<Self, String> {
        let words = |error: io::Error| error.to_string();
        let sock = fds.take(state.sock).map_err(|error| error.to_string())?;
        let sock = UnixStream::from(sock);
        let session = Arc::new(Mutex::new(Session::new(name.to_owned(), device)));
        // The crate keeps what was negotiated to itself: it is negotiated again, on a socket that then becomes
        // the VMM's.
        let (ours, theirs) = UnixStream::pair().map_err(words)?;
        let mut handler = BackendReqHandler::from_stream(ours, Arc::clone(&session));
        let SessionState {
            features,
            features_asked,
            protocol,
            ..
        } = &state.session;
        let said = [
            (FrontendReq::GET_FEATURES, None, *features_asked),
            (
                FrontendReq::SET_PROTOCOL_FEATURES,
                Some(*protocol),
                *protocol != 0,
            ),
            (FrontendReq::SET_FEATURES, Some(*features), *features != 0),
        ];
        for (request, value, was_said) in said {
            if was_said {
                peek::send(&theirs, request as u32, value).map_err(words)?;
                handler
                    .handle_request()
                    .map_err(|error| format!("{request:?} {:#x}: {error}", value.unwrap_or(0)))?;
            }
        }
        peek::replace(&handler, &sock).map_err(words)?;
        let connection = Connection {
            sock,
            handler,
            session,
            messages: state.messages,
        };
        connection.session().import(&state.session, fds)?;
        Ok(connection)
    }

    /// Stops the rings for another process, or for [`resume`](Connection::resume).
    pub fn pause(&mut self) -> Paused<String> {
        self.session().pause()
    }

    /// Starts the rings where they were paused, without fetching requests yet.
    ///
    /// # Errors
    /// The image cannot be taken, or a ring cannot be what it is said to be.
    pub fn start_paused(&mut self, bases: &[(u16, u32)]) -> Result<(), String> {
        self.session().start_paused(bases)
    }

    /// Lets the rings fetch requests.
    ///
    /// # Errors
    /// A worker has ended.
    pub fn go_on(&mut self) -> Result<(), String> {
        self.session().go_on()
    }

    /// Goes on in the process that has paused the rings. What goes wrong is logged.
    pub fn resume(&mut self, bases: &[(u16, u32)]) {
        if !self.session().resume(bases) {
            // Seen as the end of the connection; what fails is closed already.
            let _ = self.sock.shutdown(std::net::Shutdown::Both);
        }
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        // A session is used from one thread; after a panic in it only its end is left to do.
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&mut self, header: &Header) -> Result<(), ConnectionError> {
        debug!(
            "{}: {} ({} bytes)",
            self.session().name(),
            header.name(),
            header.size
        );
        if self.is_postcopy(header) {
            return self.postcopy(header);
        }
        match FrontendReq::try_from(header.request) {
            Ok(FrontendReq::SET_STATUS) => self.set_status(header),
            Ok(FrontendReq::GET_STATUS) => self.get_status(header),
            // The crate goes by the last SET_FEATURES, be it refused or without bit 30, which some
            // front-ends do not accept although they negotiate protocol features.
            Ok(FrontendReq::SET_VRING_ENABLE) => self.set_vring_enable(header),
            Ok(FrontendReq::SET_LOG_FD) => self.set_log_fd(header),
            // The crate's end of the channel cannot say what we have to say.
            Ok(FrontendReq::SET_BACKEND_REQ_FD) => self.set_channel(header),
            Ok(request) if is_carried(request) => self.hand_over(header),
            Err(()) if header.request == GET_VRING_BASE_SKIP_DRAIN => self.stop_undrained(header),
            // Known to the protocol and not offered, or unknown.
            _ => {
                self.take(header)?;
                self.acknowledge(header, Err("it is not supported".to_owned()))
            }
        }
    }

    /// Lets the `vhost` crate read the message and call the session.
    fn hand_over(&mut self, header: &Header) -> Result<(), ConnectionError> {
        match self.handler.handle_request() {
            Ok(()) => Ok(()),
            Err(vhost_user::Error::ReqHandlerError(error)) => {
                // The crate has answered, if an answer was wanted and the request has no reply of its
                // own (which it then owes, so that the VMM would wait for ever).
                if header.need_reply()
                    && self.session().replies_acked()
                    && !has_reply(header.request)
                {
                    self.warn_refused(header, &error.to_string());
                    Ok(())
                } else {
                    Err(ConnectionError::Refused {
                        request: header.name(),
                        why: error.to_string(),
                    })
                }
            }
            Err(source) => Err(ConnectionError::Protocol {
                request: header.name(),
                source,
            }),
        }
    }

    fn take(&self, header: &Header) -> Result<Vec<u8>, ConnectionError> {
        peek::take(&self.sock, header).map_err(socket_error("read"))
    }

    fn take_u64(&self, header: &Header) -> Result<u64, ConnectionError> {
        let payload = self.take(header)?;
        <[u8; 8]>::try_from(payload.as_slice())
            .map(u64::from_ne_bytes)
            .map_err(|_| ConnectionError::Protocol {
                request: header.name(),
                source: vhost_user::Error::InvalidMessage,
            })
    }

    fn reply(&self, header: &Header, value: u64) -> Result<(), ConnectionError> {
        peek::reply(&self.sock, header, value).map_err(socket_error("write"))
    }

    /// Answers a request without a reply of its own, as `REPLY_ACK` demands. A refusal that cannot be
    /// told ends the connection.
    fn acknowledge(
        &mut self,
        header: &Header,
        result: Result<(), String>,
    ) -> Result<(), ConnectionError> {
        if header.need_reply() && self.session().replies_acked() {
            self.reply(header, u64::from(result.is_err()))?;
            if let Err(why) = result {
                self.warn_refused(header, &why);
            }
            return Ok(());
        }
        result.map_err(|why| ConnectionError::Refused {
            request: header.name(),
            why,
        })
    }

    fn warn_refused(&self, header: &Header, why: &str) {
        warn!(
            "{}: {} was refused: {why}",
            self.session().name(),
            header.name()
        );
    }

    fn set_status(&mut self, header: &Header) -> Result<(), ConnectionError> {
        let status = self.take_u64(header)?;
        let result = {
            let mut session = self.session();
            if session.status_acked() {
                session
                    .set_status(status)
                    .map_err(|error| error.to_string())
            } else {
                Err("STATUS was not negotiated".to_owned())
            }
        };
        self.acknowledge(header, result)
    }

    fn get_status(&mut self, header: &Header) -> Result<(), ConnectionError> {
        if !self.take(header)?.is_empty() {
            return Err(ConnectionError::Protocol {
                request: header.name(),
                source: vhost_user::Error::InvalidMessage,
            });
        }
        let (acked, status) = {
            let session = self.session();
            (session.status_acked(), session.status())
        };
        if !acked {
            return Err(ConnectionError::Refused {
                request: header.name(),
                why: "STATUS was not negotiated".to_owned(),
            });
        }
        self.reply(header, status)
    }

    fn stop_undrained(&mut self, header: &Header) -> Result<(), ConnectionError> {
        // A vring state, as in SET_VRING_ENABLE, whose number is not used; the answer is one too.
        let index = self.take_u64(header)? as u32;
        let base = self.session().stop_undrained(index);
        match base {
            Ok(base) => self.reply(header, u64::from(base) << 32 | u64::from(index)),
            // There is no answer that says no.
            Err(error) => Err(ConnectionError::Refused {
                request: header.name(),
                why: error.to_string(),
            }),
        }
    }

    /// A descriptor to be signalled when something was marked, which nobody waits for: it is closed.
    fn set_log_fd(&mut self, header: &Header) -> Result<(), ConnectionError> {
        let (payload, fds) =
            peek::take_with_fds(&self.sock, header).map_err(socket_error("recvmsg"))?;
        if !payload.is_empty() || fds.len() != 1 {
            return Err(ConnectionError::Protocol {
                request: header.name(),
                source: vhost_user::Error::IncorrectFds,
            });
        }
        self.acknowledge(header, Ok(()))
    }

    fn set_channel(&mut self, header: &Header) -> Result<(), ConnectionError> {
        let (payload, mut fds) =
            peek::take_with_fds(&self.sock, header).map_err(socket_error("recvmsg"))?;
        let fd = fds.pop();
        let result = match fd {
            _ if !self.session().channel_acked() => {
                Err("BACKEND_REQ was not negotiated".to_owned())
            }
            Some(fd) if fds.is_empty() && payload.is_empty() => self
                .session()
                .set_channel(fd)
                .map_err(|error| error.to_string()),
            _ => {
                return Err(ConnectionError::Protocol {
                    request: header.name(),
                    source: vhost_user::Error::IncorrectFds,
                });
            }
        };
        self.acknowledge(header, result)
    }

    fn set_vring_enable(&mut self, header: &Header) -> Result<(), ConnectionError> {
        // A vring state: index, then number, 32 bits each.
        let state = self.take_u64(header)?.to_ne_bytes();
        let index = u32::from_ne_bytes([state[0], state[1], state[2], state[3]]);
        let enable = u32::from_ne_bytes([state[4], state[5], state[6], state[7]]);
        let result = match enable {
            0 | 1 => self
                .session()
                .set_vring_enable(index, enable == 1)
                .map_err(|error| error.to_string()),
            _ => Err(format!("{enable} is neither 0 (disable) nor 1 (enable)")),
        };
        self.acknowledge(header, result)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.session().disconnect();
    }
}

impl AsRawFd for Connection {
    fn as_raw_fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }
}

/// Requests that the `vhost` crate parses; it ends the connection on all others.
fn is_carried(request: FrontendReq) -> bool {
    !matches!(
        request,
        FrontendReq::SET_LOG_FD
            | FrontendReq::SEND_RARP
            | FrontendReq::NET_SET_MTU
            | FrontendReq::IOTLB_MSG
            | FrontendReq::SET_VRING_ENDIAN
            | FrontendReq::CREATE_CRYPTO_SESSION
            | FrontendReq::CLOSE_CRYPTO_SESSION
            | FrontendReq::POSTCOPY_ADVISE
            | FrontendReq::POSTCOPY_LISTEN
            | FrontendReq::POSTCOPY_END
            | FrontendReq::VRING_KICK
            | FrontendReq::SET_STATUS
            | FrontendReq::GET_STATUS
            | FrontendReq::SET_VRING_ENABLE
            | FrontendReq::SET_BACKEND_REQ_FD
    )
}

/// Requests with a reply of their own, which `REPLY_ACK` does not change.
fn has_reply(request: u32) -> bool {
    matches!(
        FrontendReq::try_from(request),
        Ok(FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::GET_SHMEM_CONFIG)
    )
}
