//! From an address to a TCP connection, with a deadline for everything.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::trouble::{Result, later};
use super::wait::{Waiter, Want};
use crate::block::nvme_tcp::spec::Address;

/// How often the answer of a resolver is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// Idle seconds before the first probe of a connection, seconds between probes, and their number.
const PROBES: (i32, i32, i32) = (5, 2, 3);
/// Addresses of one name that are tried, at most.
const MAX_ADDRESSES: usize = 8;

/// Resolves an address, once at a time: the C library offers no deadline, so a thread of its own does it, which
/// is left behind if it takes too long.
#[derive(Debug, Default)]
pub(crate) struct Resolver {
    under_way: Option<Receiver<io::Result<Vec<SocketAddr>>>>,
}

impl Resolver {
    /// The socket addresses of `address`.
    pub(crate) fn resolve(
        &mut self,
        address: &Address,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Vec<SocketAddr>> {
        if let Ok(ip) = address.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, address.port)]);
        }
        let answer = match self.under_way.take() {
            Some(answer) => answer,
            None => ask(address)?,
        };
        loop {
            match answer.recv_timeout(Duration::ZERO) {
                Ok(Ok(found)) if found.is_empty() => {
                    return Err(later(format!("{:?} has no address", address.host)));
                }
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(error)) => {
                    return Err(later(format!(
                        "the name {:?} was not resolved: {error}; check it, or give an IP address",
                        address.host
                    )));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(later("the thread that resolves names has failed"));
                }
            }
            let now = Instant::now();
            if now >= deadline {
                self.under_way = Some(answer);
                return Err(later(format!(
                    "the name {:?} was not resolved in time; check the name servers, or give an IP address",
                    address.host
                )));
            }
            waiter.wait(Want::Time, deadline.min(now + LOOK))?;
        }
    }
}

fn ask(address: &Address) -> Result<Receiver<io::Result<Vec<SocketAddr>>>> {
    let (sender, answer) = mpsc::channel();
    let (host, port) = (address.host.clone(), address.port);
    let resolve = move || {
        let found = (host.as_str(), port).to_socket_addrs();
        // Nobody listens any more if the path has ended.
        let _ = sender.send(found.map(|found| found.take(MAX_ADDRESSES).collect()));
    };
    thread::Builder::new()
        .name("nvme-resolve".to_owned())
        .spawn(resolve)
        .map_err(|error| later(format!("no thread to resolve names: {error}")))?;
    Ok(answer)
}

/// Connects to one of `addresses`, in their order; the deadline's rest is shared among those that are left. The
/// connection does not block.
pub(crate) fn connect(
    addresses: &[SocketAddr],
    deadline: Instant,
    waiter: &mut dyn Waiter,
) -> Result<TcpStream> {
    let mut last = later("there is no address");
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (addresses.len() - index) as u32;
        match connect_one(address, Instant::now() + share, waiter)? {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                let what = match error.kind() {
                    io::ErrorKind::ConnectionRefused => {
                        "connection refused: nothing listens there; start the target, or check the port".to_owned()
                    }
                    io::ErrorKind::TimedOut => {
                        "connecting timed out: no answer; check the address, the network and the firewall".to_owned()
                    }
                    _ => format!("connect: {error}"),
                };
                let what = match addresses.len() {
                    1 => what,
                    _ => format!("{}: {what}", address.ip()),
                };
                last = later(what);
            }
        }
    }
    Err(last)
}

fn connect_one(
    address: &SocketAddr,
    deadline: Instant,
    waiter: &mut dyn Waiter,
) -> Result<io::Result<TcpStream>> {
    let stream = match start(address) {
        Ok(stream) => stream,
        Err(error) => return Ok(Err(error)),
    };
    while !waiter.wait(Want::Write(stream.as_fd()), deadline)? {
        if Instant::now() >= deadline {
            return Ok(Err(io::ErrorKind::TimedOut.into()));
        }
    }
    Ok(match stream.take_error() {
        Ok(None) => finish(&stream).map(|()| stream),
        Ok(Some(error)) | Err(error) => Err(error),
    })
}

/// A socket that is connecting.
fn start(address: &SocketAddr) -> io::Result<TcpStream> {
    let family = match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes integers only.
    let fd = unsafe { libc::socket(family, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and is nobody else's.
    let stream = TcpStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let begun = match address {
        SocketAddr::V4(v4) => {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(v4.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: `name` is a sockaddr_in of the length that is given.
            unsafe { libc::connect(fd, (&raw const name).cast(), len_of(&name)) }
        }
        SocketAddr::V6(v6) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr {
                    s6_addr: v6.ip().octets(),
                },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: `name` is a sockaddr_in6 of the length that is given.
            unsafe { libc::connect(fd, (&raw const name).cast(), len_of(&name)) }
        }
    };
    if begun != 0 {
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINPROGRESS) {
            return Err(error);
        }
    }
    Ok(stream)
}

fn len_of<T>(_: &T) -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

/// What a connection of NVMe wants of TCP: no waiting for larger segments, and probes that end a connection whose
/// peer is gone without a word. Requests have their own timeouts, so nothing here needs to be fast.
///
/// What was not sent when it is closed, also by the end of this process, is thrown away: it is done again on
/// another connection, and must not come after that. Otherwise the kernel goes on sending for minutes.
fn finish(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let reset = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    set(stream, libc::SOL_SOCKET, libc::SO_LINGER, &reset)?;
    let (idle, between, count) = PROBES;
    set(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1_i32)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, &idle)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, &between)?;
    set(stream, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, &count)
}

/// `value` is the C type that the option takes.
fn set<T: Copy>(stream: &TcpStream, level: i32, name: i32, value: &T) -> io::Result<()> {
    // SAFETY: `value` is readable, and as long as is given.
    let done = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            level,
            name,
            (&raw const *value).cast(),
            len_of(value),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::trouble::Trouble;
    use super::super::wait::Patience;
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn text(trouble: Trouble) -> String {
        match trouble {
            Trouble::Failed(failure) => failure.text,
            Trouble::Closed => "closed".to_owned(),
        }
    }

    #[test]
    fn a_listener_is_reached_by_name_and_by_number() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for host in ["127.0.0.1", "localhost"] {
            let address = Address {
                host: host.to_owned(),
                port: listener.local_addr().unwrap().port(),
            };
            let found = Resolver::default()
                .resolve(&address, soon(), &mut Patience)
                .unwrap();
            let stream = connect(&found, soon(), &mut Patience).unwrap();
            assert!(stream.nodelay().unwrap());
        }
    }

    #[test]
    fn what_was_not_sent_when_a_connection_is_closed_never_arrives() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut stream = connect(&[address], soon(), &mut Patience).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let mut sent = 0;
        // More than the peer's buffer takes, because it does not read.
        while let Ok(count) = stream.write(&[0; 64 << 10]) {
            sent += count;
        }
        drop(stream);
        let mut arrived = Vec::new();
        let end = peer.read_to_end(&mut arrived).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::ConnectionReset);
        assert!(arrived.len() < sent, "all {sent} bytes arrived");
    }

    #[test]
    fn a_port_that_nobody_listens_on_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = text(connect(&[address], soon(), &mut Patience).unwrap_err());
        assert!(error.contains("connection refused"), "{error}");
    }

    #[test]
    fn of_several_addresses_one_that_works_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let right = listener.local_addr().unwrap();
        let wrong = SocketAddr::new("127.0.0.2".parse().unwrap(), right.port());
        let stream = connect(&[wrong, right], soon(), &mut Patience).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), right);
    }

    #[test]
    fn an_address_that_does_not_answer_times_out() {
        // A listener whose queue is full answers no further connection.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // SAFETY: listen takes integers only.
        let listened = unsafe { libc::listen(listener.as_raw_fd(), 0) };
        assert_eq!(listened, 0);
        let address = listener.local_addr().unwrap();
        let mut kept = Vec::new();
        let error = loop {
            match connect(
                &[address],
                Instant::now() + Duration::from_millis(200),
                &mut Patience,
            ) {
                Ok(stream) => kept.push(stream),
                Err(error) => break text(error),
            }
        };
        assert!(error.contains("timed out"), "{error}");
    }

    #[test]
    fn a_name_that_is_none_is_told() {
        let address = Address {
            host: "no-such-host.invalid".to_owned(),
            port: 4420,
        };
        let error = Resolver::default().resolve(&address, soon(), &mut Patience);
        let error = text(error.unwrap_err());
        assert!(error.contains("no-such-host.invalid"), "{error}");
        assert!(error.contains("not resolved"), "{error}");
    }
}
