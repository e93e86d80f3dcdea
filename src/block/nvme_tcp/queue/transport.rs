//! What is between a queue's machine and its socket: nothing, or a TLS session.

use std::cell::RefCell;

use libc::iovec;

use crate::block::nvme_tcp::machine::{Ended, MAX_IOVECS, Machine};
use crate::block::nvme_tcp::tls::{TlsError, TlsSession};
use crate::block::nvme_tcp::wire::ProtocolError;

/// Bytes of ciphertext that are received at once.
const INCOMING: usize = 256 << 10;

#[derive(Debug)]
pub(super) enum Transport {
    /// The PDUs are the connection's bytes: they go straight between the socket and where they belong.
    Plain,
    Tls(Box<RefCell<Tls>>),
}

/// A session, and what the kernel works on: the session's own buffers move when it writes an answer of its own.
#[derive(Debug)]
pub(super) struct Tls {
    session: Box<TlsSession>,
    /// Ciphertext to be sent, and how much of it was.
    outgoing: Vec<u8>,
    sent: usize,
    incoming: Box<[u8]>,
    /// The machine's lists.
    pieces: Vec<iovec>,
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("protocol error: {0}")]
    Protocol(#[from] ProtocolError),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Transport {
    pub(super) fn tls(session: Box<TlsSession>) -> Self {
        Self::Tls(Box::new(RefCell::new(Tls {
            session,
            outgoing: Vec::new(),
            sent: 0,
            incoming: vec![0; INCOMING].into(),
            pieces: Vec::with_capacity(MAX_IOVECS),
        })))
    }

    /// Lists what is to be sent now; returns its bytes. One call of [`Transport::sent`] follows if there is
    /// anything.
    ///
    /// # Errors
    /// The session is over.
    #[inline]
    pub(super) fn output(
        &self,
        machine: &RefCell<Machine>,
        pieces: &mut Vec<iovec>,
        ended: &mut Vec<Ended>,
    ) -> Result<usize, Failure> {
        let Self::Tls(tls) = self else {
            return Ok(machine.borrow_mut().send_list(pieces));
        };
        let tls = &mut *tls.borrow_mut();
        pieces.clear();
        if tls.sent == tls.outgoing.len() {
            tls.outgoing.clear();
            tls.sent = 0;
            let mut machine = machine.borrow_mut();
            let bytes = machine.send_list(&mut tls.pieces);
            if bytes > 0 {
                // SAFETY: the machine vouches for what it lists until `sent`.
                let written = unsafe { tls.session.write_pieces(&tls.pieces) };
                // It is encrypted: nobody looks at the memory any more.
                machine.sent(bytes, &mut |one| ended.push(one));
                written?;
            }
            tls.outgoing.extend_from_slice(tls.session.output());
            tls.session.sent(tls.outgoing.len());
        }
        let rest = &tls.outgoing[tls.sent..];
        if !rest.is_empty() {
            pieces.push(iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            });
        }
        Ok(rest.len())
    }

    /// The last list is not in use any more, and `bytes` of it were sent.
    #[inline]
    pub(super) fn sent(&self, machine: &RefCell<Machine>, bytes: usize, ended: &mut Vec<Ended>) {
        match self {
            Self::Plain => machine.borrow_mut().sent(bytes, &mut |one| ended.push(one)),
            Self::Tls(tls) => tls.borrow_mut().sent += bytes,
        }
    }

    /// Lists where what comes is to go.
    #[inline]
    pub(super) fn input(&self, machine: &RefCell<Machine>, pieces: &mut Vec<iovec>) {
        let Self::Tls(tls) = self else {
            machine.borrow_mut().recv_list(pieces);
            return;
        };
        let incoming = &mut tls.borrow_mut().incoming;
        pieces.clear();
        pieces.push(iovec {
            iov_base: incoming.as_mut_ptr().cast(),
            iov_len: incoming.len(),
        });
    }

    /// `bytes` have come into the last list.
    ///
    /// # Errors
    /// The connection is of no use any more; what ended before is told all the same.
    #[inline]
    pub(super) fn received(
        &self,
        machine: &RefCell<Machine>,
        bytes: usize,
        ended: &mut Vec<Ended>,
    ) -> Result<(), Failure> {
        let mut machine = machine.borrow_mut();
        let mut each = |one| ended.push(one);
        let Self::Tls(tls) = self else {
            return Ok(machine.received(bytes, &mut each)?);
        };
        let tls = &mut *tls.borrow_mut();
        tls.session.feed(&tls.incoming[..bytes]);
        loop {
            machine.recv_list(&mut tls.pieces);
            // SAFETY: the machine vouches for what it lists until `received`.
            match unsafe { tls.session.read_pieces(&tls.pieces) }? {
                0 => return Ok(()),
                count => machine.received(count, &mut each)?,
            }
        }
    }

    /// True if there is something to send.
    #[inline]
    pub(super) fn wants_to_send(&self, machine: &RefCell<Machine>) -> bool {
        machine.borrow().wants_to_send()
            || match self {
                Self::Plain => false,
                Self::Tls(tls) => !tls.borrow().session.output().is_empty(),
            }
    }

    /// The bytes that say this on the connection.
    #[cold]
    pub(super) fn last_word(&self, word: &[u8]) -> Vec<u8> {
        let Self::Tls(tls) = self else {
            return word.to_vec();
        };
        let session = &mut tls.borrow_mut().session;
        // A session that is over says nothing.
        let _ = session.write(word);
        session.output().to_vec()
    }
}
