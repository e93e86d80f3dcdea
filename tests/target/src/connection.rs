//! One connection: its thread, the framing of PDUs and what they are handed to.

use std::collections::HashMap;
use std::io;
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::admin::Admin;
use crate::auth::Auth;
use crate::build::{self, Format};
use crate::controller::Controller;
use crate::io_queue::{IoQueue, Transfer};
use crate::late::Late;
use crate::link::{Link, Mail};
use crate::options::TransportOptions;
use crate::output::Output;
use crate::stream::Stream;
use crate::sync::Locked;
use crate::target::{Port, Shared};
use crate::tls::{Peer, Server, TlsFault};
use crate::wire::{FatalErrorStatus, Sqe, pdu, u16_at, u32_at};

/// Bytes that wait for a host that does not read before its commands wait as well.
const OUTPUT_LIMIT: usize = 8 << 20;
/// In-capsule data of the admin queue (transport specification, section 3.3.1.1 footnote: 8,192 bytes).
const ADMIN_IN_CAPSULE: usize = 8192;

/// Why a connection ends.
pub(crate) enum End {
    /// With C2HTermReq: the status and its information.
    Terminate(FatalErrorStatus, u32),
    /// The same, but by a fault's will: nobody is to blame.
    Fault(FatalErrorStatus),
    /// Without a word.
    Close,
    /// By RST: what waits is not sent.
    Reset,
}

pub(crate) type Flow = Result<(), End>;

#[derive(PartialEq, Eq)]
enum Phase {
    /// ICReq is to come.
    Initialize,
    /// Commands are taken.
    Open,
    /// Nothing is taken any more; what waits is sent, and then the stream ends.
    Closing(Instant),
    /// The stream is to be reset.
    Reset,
}

/// The queue that Connect has made of a connection.
pub(crate) struct Queue {
    pub controller: Arc<Controller>,
    pub id: u16,
    /// Entries.
    pub size: u32,
    /// The head pointer that completions tell; none: the host has switched flow control off.
    pub head: Option<u16>,
    /// Commands that are not completed, a bit each: to notice what a host must not do.
    pub outstanding: Box<[u64; 1024]>,
    pub outstanding_count: u32,
}

pub(crate) struct Connection {
    pub shared: Arc<Shared>,
    pub port: Arc<Port>,
    pub link: Arc<Link>,
    stream: Stream,
    input: Vec<u8>,
    /// What of `input` is filled and not yet consumed.
    filled: std::ops::Range<usize>,
    pub out: Output,
    pub transport: TransportOptions,
    pub format: Format,
    pub max_r2t: u32,
    phase: Phase,
    pub queue: Option<Queue>,
    pub admin: Admin,
    pub io: IoQueue,
    pub transfers: HashMap<u16, Transfer>,
    pub late: Late,
    pub auth: Auth,
}

impl Connection {
    /// A connection over a socket that does not block.
    pub fn new(
        shared: Arc<Shared>,
        port: Arc<Port>,
        link: Arc<Link>,
        socket: TcpStream,
    ) -> io::Result<Self> {
        let transport = port.transport();
        let stream = match &transport.tls {
            None => Stream::Plain(socket),
            Some(options) => Stream::Tls(Server::new(options)?.stream(socket)?),
        };
        Ok(Self {
            shared,
            port,
            link,
            stream,
            // The largest PDU fits as a whole.
            input: vec![0; (512 << 10).max(transport.max_h2c_data as usize + (64 << 10))],
            filled: 0..0,
            out: Output::default(),
            transport,
            format: Format::default(),
            max_r2t: 1,
            phase: Phase::Initialize,
            queue: None,
            admin: Admin::default(),
            io: IoQueue::default(),
            transfers: HashMap::new(),
            late: Late::default(),
            auth: Auth::default(),
        })
    }

    /// Serves the connection until it ends.
    pub fn run(&mut self) {
        let result = self.handshake().and_then(|()| self.serve());
        if let Err(e) = result {
            self.shared
                .note(format_args!("connection {}: {e}", self.link.id));
        }
        self.leave();
    }

    /// Waits for TLS to be up, where there is any.
    fn handshake(&mut self) -> io::Result<()> {
        let hangs = self
            .transport
            .tls
            .as_ref()
            .is_some_and(|tls| tls.fault == Some(TlsFault::Hang));
        while !self.shared.stopping() {
            let interest = if hangs {
                0
            } else {
                self.stream.handshake()?.unwrap_or(0)
            };
            if !hangs && interest == 0 {
                return Ok(());
            }
            // Nothing that could come by mail concerns a connection without a queue.
            drop(self.link.collect());
            let mut fds = [
                (self.stream.fd(), interest),
                (self.link.bell_fd(), libc::POLLIN),
            ]
            .map(|(fd, events)| libc::pollfd {
                fd,
                events,
                revents: 0,
            });
            self.poll(&mut fds)?;
            if hangs && fds[0].revents & (libc::POLLHUP | libc::POLLERR) != 0 {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
        Ok(())
    }

    fn leave(&mut self) {
        if let Some(queue) = self.queue.take() {
            queue.controller.links.locked().remove(&queue.id);
            // Without its admin queue an association is over (base specification, section 3.3.1.1).
            if queue.id == 0 {
                queue.controller.shut_down();
                self.shared.association_ended();
            } else if queue.controller.options.io_loss_ends_association {
                queue.controller.shut_down();
            }
        }
        if self.phase == Phase::Reset {
            self.stream.reset();
        } else {
            self.stream.finish();
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            if self.shared.stopping() {
                return Ok(());
            }
            if let Some(mail) = self.link.collect() {
                for m in mail {
                    self.on_mail(m);
                }
            }
            if !self.on_timers() {
                return Ok(());
            }
            self.consume();
            if self.late.is_stalled() {
                self.wait_for_bell()?;
                continue;
            }
            if self.phase == Phase::Reset {
                return Ok(());
            }
            self.out.flush(&mut self.stream)?;
            if let Phase::Closing(until) = self.phase {
                if self.out.pending() == 0 {
                    self.stream.finish();
                }
                if Instant::now() >= until {
                    return Ok(());
                }
            }
            if !self.wait_and_read()? {
                return Ok(());
            }
        }
    }

    /// Waits for the bell or a timer only.
    fn wait_for_bell(&self) -> io::Result<()> {
        let mut fd = libc::pollfd {
            fd: self.link.bell_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        self.poll(std::slice::from_mut(&mut fd)).map(drop)
    }

    /// Polls until the next timer; false if it was interrupted.
    fn poll(&self, fds: &mut [libc::pollfd]) -> io::Result<bool> {
        let timeout = self.next_deadline().map_or(-1, |at| {
            // Rounded up, so that the timer has passed when the wait ends.
            at.saturating_duration_since(Instant::now())
                .as_micros()
                .div_ceil(1000)
                .min(60_000) as i32
        });
        // SAFETY: initialized entries, as many as told.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) } < 0 {
            let e = io::Error::last_os_error();
            return if e.kind() == io::ErrorKind::Interrupted {
                Ok(false)
            } else {
                Err(e)
            };
        }
        Ok(true)
    }

    /// Waits for the socket, the bell or a timer, and reads what there is; false at the end of the stream.
    fn wait_and_read(&mut self) -> io::Result<bool> {
        let mut interest = 0;
        if self.out.pending() < OUTPUT_LIMIT {
            interest |= libc::POLLIN;
        }
        if self.out.pending() > 0 {
            interest |= libc::POLLOUT;
        }
        let mut fds = [
            libc::pollfd {
                fd: self.stream.fd(),
                events: interest,
                revents: 0,
            },
            libc::pollfd {
                fd: self.link.bell_fd(),
                events: libc::POLLIN,
                revents: 0,
            },
        ];
        if self.stream.has_pending() && interest & libc::POLLIN != 0 {
            fds[0].revents = libc::POLLIN;
        } else if !self.poll(&mut fds)? {
            return Ok(true);
        }
        if fds[0].revents & (libc::POLLIN | libc::POLLERR | libc::POLLHUP) == 0 {
            return Ok(true);
        }
        if self.filled.start > 0 {
            self.input.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        if self.filled.end == self.input.len() {
            // Full of commands that wait for room in the output.
            return Ok(true);
        }
        match self.stream.read(&mut self.input[self.filled.end..]) {
            Ok(0) => Ok(false),
            Ok(n) => {
                self.filled.end += n;
                Ok(true)
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let closing = match self.phase {
            Phase::Closing(until) => Some(until),
            _ => None,
        };
        let keep_alive = self
            .admin_controller()
            .and_then(|c| c.keep_alive_deadline());
        [closing, keep_alive, self.late.next_deadline()]
            .into_iter()
            .flatten()
            .min()
    }

    fn admin_controller(&self) -> Option<&Arc<Controller>> {
        self.queue
            .as_ref()
            .filter(|q| q.id == 0)
            .map(|q| &q.controller)
    }

    /// Runs what is due; false if the connection is to end.
    fn on_timers(&mut self) -> bool {
        if let Some(controller) = self.admin_controller() {
            if controller
                .keep_alive_deadline()
                .is_some_and(|at| Instant::now() >= at)
            {
                self.shared.note(format_args!(
                    "controller {}: keep-alive timer expired",
                    controller.id
                ));
                self.shared.counters.keep_alive_expired();
                controller.registers.locked().fatal = true;
                return false;
            }
        }
        if self.late.is_due(Instant::now()) {
            self.release_late();
        }
        true
    }

    fn on_mail(&mut self, mail: Mail) {
        match mail {
            Mail::Complete { cid, status } => self.complete(cid, status, 0),
            Mail::Stall(time) => self.late.stall(time),
            Mail::Events => self.fire_events(),
            Mail::Terminate(fes) => self.end(End::Fault(fes), &[]),
        }
    }

    /// Hands all PDUs that are there as a whole to their handlers.
    fn consume(&mut self) {
        let input = std::mem::take(&mut self.input);
        while self.out.pending() < OUTPUT_LIMIT {
            if matches!(self.phase, Phase::Closing(_) | Phase::Reset) {
                self.filled = 0..0;
                break;
            }
            if self.late.is_stalled() {
                break;
            }
            let rest = &input[self.filled.clone()];
            let len = match self.frame(rest) {
                Ok(Some(len)) => len,
                Ok(None) => break,
                Err(end) => {
                    self.end(end, &rest[..rest.len().min(pdu::SHORT_HLEN)]);
                    continue;
                }
            };
            self.filled.start += len;
            if let Err(end) = self.on_pdu(&rest[..len]) {
                let hlen = usize::from(rest[2]).clamp(pdu::COMMON, len.min(128));
                self.end(end, &rest[..hlen]);
            }
            if self.late.is_overtaken() {
                self.release_late();
            }
        }
        self.input = input;
    }

    fn end(&mut self, end: End, header: &[u8]) {
        match end {
            End::Terminate(fes, fei) => {
                self.shared
                    .violation(format_args!("connection {}: {fes:?} ({fei})", self.link.id));
                build::c2h_term_req(&mut self.out.buf, fes, fei, header);
            }
            End::Fault(fes) => build::c2h_term_req(&mut self.out.buf, fes, 0, header),
            End::Close => {}
            End::Reset => {
                self.phase = Phase::Reset;
                return;
            }
        }
        // The host has time to read what was said before the stream is reset.
        self.phase = Phase::Closing(Instant::now() + Duration::from_millis(500));
    }

    /// Who TLS has shown to be at the other end; none without TLS.
    pub fn peer(&self) -> Option<Peer> {
        self.stream.peer()
    }

    fn in_capsule(&self) -> usize {
        match &self.queue {
            Some(q) if q.id != 0 => q.controller.options.in_capsule as usize,
            _ => ADMIN_IN_CAPSULE,
        }
    }

    /// The length of the first PDU if it is there as a whole. Its common header is checked here.
    fn frame(&self, b: &[u8]) -> Result<Option<usize>, End> {
        if b.len() < pdu::COMMON {
            return Ok(None);
        }
        let bad = |at: u32| End::Terminate(FatalErrorStatus::InvalidHeaderField, at);
        let (kind, hlen, plen) = (b[0], usize::from(b[2]), u32_at(b, 4) as usize);
        // Two digests and the padding that PDO can hold.
        const SLACK: usize = 256 + 2 * pdu::DIGEST;
        let (want_hlen, max_plen) = match kind {
            pdu::IC_REQ => (pdu::IC_LEN, pdu::IC_LEN),
            pdu::CAPSULE_CMD => (pdu::CMD_HLEN, pdu::CMD_HLEN + self.in_capsule() + SLACK),
            pdu::H2C_DATA => (
                pdu::SHORT_HLEN,
                self.transport.max_h2c_data as usize + SLACK,
            ),
            pdu::H2C_TERM_REQ => (pdu::SHORT_HLEN, pdu::SHORT_HLEN + 128),
            _ => return Err(bad(0)),
        };
        if hlen != want_hlen {
            return Err(bad(2));
        }
        if plen < hlen || plen > max_plen {
            return Err(bad(4));
        }
        if (kind == pdu::IC_REQ) != (self.phase == Phase::Initialize) {
            return Err(End::Terminate(FatalErrorStatus::SequenceError, 0));
        }
        Ok((b.len() >= plen).then_some(plen))
    }

    fn on_pdu(&mut self, b: &[u8]) -> Flow {
        let kind = b[0];
        match kind {
            pdu::IC_REQ => return self.on_ic_req(b),
            pdu::H2C_TERM_REQ => {
                let (fes, fei) = (u16_at(b, 8), u32_at(b, 10));
                self.shared.counters.host_terminated();
                self.shared.note(format_args!(
                    "connection {}: H2CTermReq {fes} ({fei})",
                    self.link.id
                ));
                return Err(End::Close);
            }
            _ => {}
        }
        let bad = |at: u32| End::Terminate(FatalErrorStatus::InvalidHeaderField, at);
        let (flags, hlen, pdo) = (b[1], usize::from(b[2]), usize::from(b[3]));
        if (flags & pdu::HDGSTF != 0) != self.format.hdgst {
            return Err(bad(1));
        }
        let mut header_end = hlen;
        if self.format.hdgst {
            header_end += pdu::DIGEST;
            if b.len() < header_end {
                return Err(bad(4));
            }
            let told = u32_at(b, hlen);
            if crc32c::crc32c(&b[..hlen]) != told {
                return Err(End::Terminate(FatalErrorStatus::HeaderDigest, told));
            }
        }
        let data = if b.len() == header_end {
            &[][..]
        } else {
            let align = (usize::from(self.transport.cpda) + 1) * 4;
            if pdo < header_end || pdo > b.len() || pdo % align != 0 {
                return Err(bad(3));
            }
            &b[pdo..]
        };
        let (data, digest) = match (self.format.ddgst, data.len()) {
            (_, 0) | (false, _) => (data, None),
            (true, n) if n <= pdu::DIGEST => return Err(bad(4)),
            (true, n) => (
                &data[..n - pdu::DIGEST],
                Some(u32_at(data, n - pdu::DIGEST)),
            ),
        };
        if !data.is_empty() && (flags & pdu::DDGSTF != 0) != self.format.ddgst {
            return Err(bad(1));
        }
        // A wrong data digest fails the command, not the connection (transport specification, section 3.3.1.2).
        let intact = digest.is_none_or(|d| crc32c::crc32c(data) == d);
        if !intact {
            self.shared.violation(format_args!(
                "connection {}: a data digest does not match",
                self.link.id
            ));
        }
        if kind == pdu::H2C_DATA {
            return self.on_h2c_data(b, data, intact);
        }
        let mut sqe = Sqe([0; 64]);
        sqe.0.copy_from_slice(&b[pdu::COMMON..pdu::CMD_HLEN]);
        self.on_command(sqe, data, intact)
    }

    fn on_ic_req(&mut self, b: &[u8]) -> Flow {
        let (pfv, hpda, digests, max_r2t) = (u16_at(b, 8), b[10], b[11], u32_at(b, 12));
        let unsupported = |at: u32| End::Terminate(FatalErrorStatus::UnsupportedParameter, at);
        if b[1] != 0 || b[3] != 0 || b[16..].iter().any(|&x| x != 0) {
            self.shared.violation(format_args!(
                "connection {}: ICReq has reserved bits set",
                self.link.id
            ));
        }
        if pfv != 0 {
            return Err(unsupported(8));
        }
        if hpda > 31 {
            return Err(End::Terminate(FatalErrorStatus::InvalidHeaderField, 10));
        }
        let t = &self.transport;
        if t.require_header_digest && digests & 1 == 0 || t.require_data_digest && digests & 2 == 0
        {
            return Err(unsupported(11));
        }
        self.format = Format {
            hdgst: digests & 1 != 0 && (t.header_digest || t.require_header_digest),
            ddgst: digests & 2 != 0 && (t.data_digest || t.require_data_digest),
            host_align: (usize::from(hpda) + 1) * 4,
        };
        // MAXR2T is zero-based.
        self.max_r2t = t.max_r2t.clamp(1, max_r2t.saturating_add(1));
        let granted = u8::from(self.format.hdgst) | u8::from(self.format.ddgst) << 1;
        let resp = build::ic_resp(0, t.cpda, granted, t.max_h2c_data);
        self.out.buf.extend_from_slice(&resp);
        self.phase = Phase::Open;
        Ok(())
    }
}
