//! Ports: the addresses that a target is reached at, and their accepting threads.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::connection::Connection;
use crate::link::Link;
use crate::options::{PortSpec, TransportOptions};
use crate::sync::Locked;
use crate::target::Shared;

/// What a port does with a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listening {
    /// It is served.
    Serve,
    /// Nobody listens: the host gets ECONNREFUSED. The address stays reserved.
    Refuse,
    /// It is accepted, and nothing is ever read or sent: no ICResp comes.
    Hang,
    /// It is accepted and closed at once.
    Close,
}

/// An address that the target's subsystems are reached at.
pub struct Port {
    id: u16,
    address: SocketAddr,
    /// Bound and never listening: keeps the address while nobody listens.
    _reservation: OwnedFd,
    transport: Mutex<TransportOptions>,
    door: Mutex<Door>,
    bell: Link,
    accepted: AtomicU64,
}

struct Door {
    state: Listening,
    listener: Option<Arc<TcpListener>>,
    /// Connections that are left hanging.
    hanging: Vec<TcpStream>,
}

impl Port {
    pub(crate) fn open(id: u16, spec: &PortSpec) -> io::Result<Self> {
        let wanted: SocketAddr = spec.listen.parse().map_err(|_| {
            let text = format!("{}: not an address and a port", spec.listen);
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })?;
        let (reservation, address) = bind(wanted)?;
        let listener = Arc::new(listen(address)?);
        // Only its bell is used; the socket stands for none.
        let bell = Link::new(0, id, TcpStream::from(reservation.try_clone()?))?;
        Ok(Self {
            id,
            address,
            _reservation: reservation,
            transport: Mutex::new(spec.transport.clone()),
            door: Mutex::new(Door {
                state: Listening::Serve,
                listener: Some(listener),
                hanging: Vec::new(),
            }),
            bell,
            accepted: AtomicU64::new(0),
        })
    }

    /// Its number: 1 for the first of the builder.
    pub fn id(&self) -> u16 {
        self.id
    }
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
    /// TCP connections that it accepted, whatever it did with them.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
    /// How it speaks the transport.
    pub fn transport(&self) -> TransportOptions {
        self.transport.locked().clone()
    }
    /// Changes how it speaks the transport with connections made afterwards.
    pub fn configure(&self, change: impl FnOnce(&mut TransportOptions)) {
        change(&mut self.transport.locked());
    }

    /// Says what becomes of new connections from now on. Those that were left hanging are closed.
    ///
    /// # Errors
    /// The address could not be listened on again.
    pub fn set_listening(&self, state: Listening) -> io::Result<()> {
        let mut door = self.door.locked();
        door.hanging.clear();
        door.state = state;
        if state == Listening::Refuse {
            if let Some(listener) = door.listener.take() {
                // At once, whoever still waits on it.
                // SAFETY: a valid descriptor.
                unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
            }
        } else if door.listener.is_none() {
            door.listener = Some(Arc::new(listen(self.address)?));
        }
        drop(door);
        self.bell.ring();
        Ok(())
    }

    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// Accepts connections until the target stops.
    pub(crate) fn run(self: &Arc<Self>, shared: &Arc<Shared>) {
        while !shared.stopping() {
            self.bell.collect();
            let listener = self.door.locked().listener.clone();
            wait(
                listener.as_ref().map_or(-1, |l| l.as_raw_fd()),
                self.bell.bell_fd(),
            );
            let Some(listener) = listener else { continue };
            match listener.accept() {
                Ok((socket, _)) => {
                    self.accepted.fetch_add(1, Ordering::Relaxed);
                    if let Err(e) = self.admit(shared, socket) {
                        shared.note(format_args!("port {}: {e}", self.id));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // Out of descriptors, or a connection that went away: neither ends the port.
                Err(e) => {
                    shared.note(format_args!("port {}: accept: {e}", self.id));
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, shared: &Arc<Shared>, socket: TcpStream) -> io::Result<()> {
        let mut door = self.door.locked();
        match door.state {
            Listening::Serve => {}
            Listening::Hang => {
                door.hanging.push(socket);
                return Ok(());
            }
            Listening::Close | Listening::Refuse => return Ok(()),
        }
        drop(door);
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        if let Some(bytes) = self.transport().socket_buffer {
            set_buffers(&socket, bytes);
        }
        let link = Arc::new(Link::new(
            shared.next_connection(),
            self.id,
            socket.try_clone()?,
        )?);
        shared.counters.connection();
        let connection = Connection::new(shared.clone(), self.clone(), link.clone(), socket)?;
        shared.start(link, connection)
    }
}

fn wait(listener: RawFd, bell: RawFd) {
    // A negative descriptor is passed over.
    let mut fds = [listener, bell].map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    // SAFETY: two initialized entries. An interruption looks like a bell.
    unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
}

fn set_buffers(socket: &TcpStream, bytes: u32) {
    for option in [libc::SO_SNDBUF, libc::SO_RCVBUF] {
        let value = bytes as libc::c_int;
        // SAFETY: a valid descriptor and an int; a kernel that refuses keeps its own size.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
    }
}

/// A socket bound to `address`, and the address with the port that the kernel chose.
fn bind(address: SocketAddr) -> io::Result<(OwnedFd, SocketAddr)> {
    let v4 = match address {
        SocketAddr::V4(v4) => v4,
        SocketAddr::V6(_) => {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "only IPv4 addresses are listened on",
            ));
        }
    };
    let check = |result: libc::c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    // SAFETY: creates a descriptor that is owned at once.
    let fd = unsafe {
        let fd = check(libc::socket(
            libc::AF_INET,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
        ))?;
        OwnedFd::from_raw_fd(fd)
    };
    let one: libc::c_int = 1;
    let addr = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: v4.port().to_be(),
        sin_addr: libc::in_addr {
            s_addr: u32::from(*v4.ip()).to_be(),
        },
        sin_zero: [0; 8],
    };
    let int_len = size_of::<libc::c_int>() as libc::socklen_t;
    let addr_len = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: a valid descriptor, and structures of the sizes that are told.
    unsafe {
        let reuse = (&raw const one).cast();
        check(libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_REUSEADDR,
            reuse,
            int_len,
        ))?;
        check(libc::bind(
            fd.as_raw_fd(),
            (&raw const addr).cast(),
            addr_len,
        ))?;
    }
    // getsockname is all that is asked of the listener type here.
    let named = TcpListener::from(fd);
    let address = named.local_addr()?;
    Ok((named.into(), address))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let (fd, _) = bind(address)?;
    // SAFETY: a valid, bound descriptor.
    if unsafe { libc::listen(fd.as_raw_fd(), 128) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let listener = TcpListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}
