//! A session after its handshake: records in, records out.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::io::{self, Read, Write};

use foreign_types::ForeignTypeRef;
use libc::iovec;
use openssl::error::ErrorStack;
use openssl::ssl::{ErrorCode, SslStream};

use super::{TlsError, ffi};

/// Bytes of plaintext in a record at most (RFC 8446, section 5.1).
pub(super) const RECORD: usize = 16 << 10;

/// Records that are encrypted with one key. AES-GCM allows 2^24.5 (RFC 8446, section 5.5); then a KeyUpdate
/// is sent. A target that can not take one ends the connection, and the next has new keys as well.
const RECORDS_OF_A_KEY: u64 = 1 << 23;

/// Bytes on their way between OpenSSL and the connection.
#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// How many at the start are gone.
    gone: usize,
}

impl Queue {
    fn get(&self) -> &[u8] {
        &self.bytes[self.gone..]
    }

    fn put(&mut self, bytes: &[u8]) {
        // What is gone makes room before more memory is taken.
        if self.gone > 0 && self.bytes.len() + bytes.len() > self.bytes.capacity() {
            self.bytes.drain(..self.gone);
            self.gone = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn take(&mut self, count: usize) {
        self.gone = self.bytes.len().min(self.gone + count);
        if self.gone == self.bytes.len() {
            self.bytes.clear();
            self.gone = 0;
        }
    }
}

/// What OpenSSL takes for the connection: two queues in memory.
#[derive(Default)]
pub(super) struct Wire {
    incoming: Queue,
    outgoing: Queue,
}

impl Read for Wire {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let from = self.incoming.get();
        if from.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let count = from.len().min(to.len());
        to[..count].copy_from_slice(&from[..count]);
        self.incoming.take(count);
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.outgoing.put(from);
        Ok(from.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A TLS session of a client, without a connection. Its buffers grow to what is given to it between two
/// times that they are emptied, and keep that size: no allocation comes after that.
pub struct TlsSession {
    stream: SslStream<Wire>,
    /// Small pieces on their way into one record.
    stage: Box<[u8; RECORD]>,
    staged: usize,
    /// Records since the last KeyUpdate of ours.
    records: u64,
    records_of_a_key: u64,
    is_dead: bool,
    /// How it ended, if nobody was told yet.
    end: Option<TlsError>,
}

impl fmt::Debug for TlsSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsSession")
            .field("incoming", &self.stream.get_ref().incoming.get().len())
            .field("outgoing", &self.output().len())
            .field("is_dead", &self.is_dead)
            .finish_non_exhaustive()
    }
}

impl TlsSession {
    pub(super) fn new(stream: SslStream<Wire>) -> Self {
        Self {
            stream,
            stage: Box::new([0; RECORD]),
            staged: 0,
            records: 0,
            records_of_a_key: RECORDS_OF_A_KEY,
            is_dead: false,
            end: None,
        }
    }

    /// Another number of records that are encrypted with one key.
    #[cfg(test)]
    pub(super) fn set_records_of_a_key(&mut self, count: u64) {
        self.records_of_a_key = count;
    }

    /// Ciphertext from the connection. It is copied.
    pub fn feed(&mut self, ciphertext: &[u8]) {
        self.stream.get_mut().feed(ciphertext);
    }

    /// Decrypts into `to` as much as there is and fits; how many bytes. 0: more ciphertext is needed.
    /// Afterwards [`TlsSession::output`] may have the answer to a KeyUpdate.
    ///
    /// # Errors
    /// [`TlsError::Closed`], [`TlsError::Alert`] and [`TlsError::Record`], each once everything before it was
    /// read; the session is over then.
    pub fn read(&mut self, to: &mut [u8]) -> Result<usize, TlsError> {
        // SAFETY: the slice is memory to write to.
        unsafe { self.read_raw(to.as_mut_ptr(), to.len()) }
    }

    /// [`TlsSession::read`] into memory that others may write to at the same time.
    ///
    /// # Errors
    /// As [`TlsSession::read`].
    ///
    /// # Safety
    /// `len` bytes at `to` are writable memory of this process.
    pub unsafe fn read_raw(&mut self, to: *mut u8, len: usize) -> Result<usize, TlsError> {
        if self.is_dead {
            return Err(self.end.take().unwrap_or(TlsError::Dead));
        }
        let mut done = 0;
        while done < len {
            let want = (len - done).min(c_int::MAX as usize) as c_int;
            // The thread's queue of errors is part of the result (SSL_get_error(3)).
            clear_errors();
            let ssl = self.stream.ssl().as_ptr();
            // SAFETY: the SSL is alive and used by nobody else. As the caller promises, `want` bytes can be
            // written behind the first `done`.
            let got = unsafe { openssl_sys::SSL_read(ssl, to.add(done).cast::<c_void>(), want) };
            if got > 0 {
                done += got as usize;
                continue;
            }
            let Some(error) = self.failure(got) else {
                break;
            };
            self.is_dead = true;
            if done == 0 {
                return Err(error);
            }
            // What came before the end is read first.
            self.end = Some(error);
            break;
        }
        Ok(done)
    }

    /// [`TlsSession::read`] into several pieces of memory, one after the other.
    ///
    /// # Errors
    /// As [`TlsSession::read`].
    ///
    /// # Safety
    /// Each piece is writable memory of this process.
    pub unsafe fn read_pieces(&mut self, to: &[iovec]) -> Result<usize, TlsError> {
        let mut done = 0;
        for piece in to {
            // SAFETY: as the caller promises.
            match unsafe { self.read_raw(piece.iov_base.cast(), piece.iov_len) } {
                Ok(count) => {
                    done += count;
                    if count < piece.iov_len {
                        break;
                    }
                }
                Err(error) if done == 0 => return Err(error),
                Err(error) => {
                    self.end = Some(error);
                    break;
                }
            }
        }
        Ok(done)
    }

    /// Encrypts `from` into [`TlsSession::output`].
    ///
    /// # Errors
    /// The session is over.
    pub fn write(&mut self, from: &[u8]) -> Result<(), TlsError> {
        let piece = iovec {
            iov_base: from.as_ptr().cast_mut().cast(),
            iov_len: from.len(),
        };
        // SAFETY: the slice is readable memory.
        unsafe { self.write_pieces(&[piece]) }
    }

    /// [`TlsSession::write`] of several pieces, as if they were one. Others may write to the memory at the
    /// same time; which of its states is sent is then open. The output grows by 22 bytes for each 16 KiB
    /// more than what is given.
    ///
    /// # Errors
    /// The session is over.
    ///
    /// # Safety
    /// Each piece is readable memory of this process.
    pub unsafe fn write_pieces(&mut self, from: &[iovec]) -> Result<(), TlsError> {
        for piece in from {
            let (mut at, mut left) = (piece.iov_base.cast::<u8>().cast_const(), piece.iov_len);
            while left > 0 {
                let count = if self.staged == 0 && left >= RECORD {
                    // SAFETY: a whole record's bytes are left of the piece, which is readable.
                    unsafe { self.write_record(at, RECORD)? };
                    RECORD
                } else {
                    let count = left.min(RECORD - self.staged);
                    let to = self.stage[self.staged..].as_mut_ptr();
                    // SAFETY: `count` bytes are left of the piece, and of the stage, which is ours.
                    unsafe { at.copy_to_nonoverlapping(to, count) };
                    self.staged += count;
                    if self.staged == RECORD {
                        self.write_stage()?;
                    }
                    count
                };
                // SAFETY: `count` is not beyond the end of the piece.
                at = unsafe { at.add(count) };
                left -= count;
            }
        }
        self.write_stage()
    }

    fn write_stage(&mut self) -> Result<(), TlsError> {
        let len = std::mem::take(&mut self.staged);
        match len {
            0 => Ok(()),
            // SAFETY: the stage has that many bytes.
            _ => unsafe { self.write_record(self.stage.as_ptr(), len) },
        }
    }

    /// # Safety
    /// `len` bytes at `from` are readable, and `len` is 1 to [`RECORD`].
    unsafe fn write_record(&mut self, from: *const u8, len: usize) -> Result<(), TlsError> {
        if self.is_dead {
            self.staged = 0;
            return Err(TlsError::Dead);
        }
        if self.records >= self.records_of_a_key {
            ffi::update_key(self.stream.ssl())?;
            self.records = 0;
        }
        self.records += 1;
        clear_errors();
        let ssl = self.stream.ssl().as_ptr();
        // SAFETY: the SSL is alive and used by nobody else; as the caller promises.
        let wrote = unsafe { openssl_sys::SSL_write(ssl, from.cast::<c_void>(), len as c_int) };
        // The queue takes everything, so that a record is written whole or the session is over.
        if wrote as i64 == len as i64 {
            return Ok(());
        }
        let error = self.failure(wrote);
        self.is_dead = true;
        Err(error.unwrap_or_else(|| TlsError::Record("a record was written in part".to_owned())))
    }

    /// Why a call of OpenSSL returned that; none: it wants more ciphertext.
    fn failure(&self, returned: c_int) -> Option<TlsError> {
        // SAFETY: the SSL is alive, and its last call on this thread returned `returned`.
        let code = unsafe { openssl_sys::SSL_get_error(self.stream.ssl().as_ptr(), returned) };
        let code = ErrorCode::from_raw(code);
        if code == ErrorCode::WANT_READ || code == ErrorCode::WANT_WRITE {
            return None;
        }
        if code == ErrorCode::ZERO_RETURN {
            return Some(TlsError::Closed);
        }
        Some(of_stack(&ErrorStack::get()))
    }

    /// Ciphertext to be sent: what was written, and also KeyUpdates and alerts.
    pub fn output(&self) -> &[u8] {
        self.stream.get_ref().outgoing()
    }

    /// The first `count` bytes of [`TlsSession::output`] were sent.
    pub fn sent(&mut self, count: usize) {
        self.stream.get_mut().sent(count);
    }

    /// Puts the alert that ends the session properly (close_notify) into the output.
    pub fn close(&mut self) {
        if !self.is_dead {
            // A failure means that the session had ended before.
            let _ = self.stream.shutdown();
            self.is_dead = true;
        }
    }
}

impl Wire {
    pub(super) fn feed(&mut self, ciphertext: &[u8]) {
        self.incoming.put(ciphertext);
    }

    pub(super) fn outgoing(&self) -> &[u8] {
        self.outgoing.get()
    }

    pub(super) fn sent(&mut self, count: usize) {
        self.outgoing.take(count);
    }
}

fn clear_errors() {
    // SAFETY: the queue is the thread's own.
    unsafe { openssl_sys::ERR_clear_error() };
}

/// The failure that OpenSSL's queue tells of.
pub(super) fn of_stack(stack: &ErrorStack) -> TlsError {
    let Some(error) = stack.errors().first() else {
        return TlsError::Record("OpenSSL gave no reason".to_owned());
    };
    let reason = error.reason().unwrap_or("unknown reason").to_owned();
    match alert(error) {
        Some(alert) => TlsError::Alert(alert),
        None => TlsError::Record(reason),
    }
}

/// The name of the alert from the peer that an error is about. OpenSSL's reasons are 1000 and the alert's
/// number (SSL_AD_REASON_OFFSET).
pub(super) fn alert(error: &openssl::error::Error) -> Option<String> {
    let number = error.reason_code().checked_sub(1000)?;
    let name = match number {
        0..=255 => error.reason().unwrap_or("unknown alert"),
        _ => return None,
    };
    Some(format!("{name}, {number}"))
}

#[cfg(test)]
mod tests {
    use super::Queue;

    #[test]
    fn a_queue_gives_what_was_put_into_it() {
        let mut queue = Queue::default();
        let (mut put, mut taken) = (0usize, 0usize);
        for n in 0..5000usize {
            let more: Vec<u8> = (put..put + n * 7919 % 61).map(|byte| byte as u8).collect();
            queue.put(&more);
            put += more.len();
            let count = (n * 104_729 % 63).min(queue.get().len());
            let got = queue.get()[..count].iter().copied();
            assert!(got.eq((taken..taken + count).map(|byte| byte as u8)));
            queue.take(count);
            taken += count;
            assert_eq!(queue.get().len(), put - taken);
        }
        // What is gone makes room: the memory is that of what waits at a time.
        assert!(put > 100_000 && queue.bytes.capacity() < 10_000);
    }
}
