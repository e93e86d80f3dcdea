//! PDUs on their way to the host.

use std::io;

use crate::stream::Stream;

/// Bytes that wait for the socket: everything that answers a batch of commands leaves with one write.
#[derive(Default)]
pub(crate) struct Output {
    pub buf: Vec<u8>,
    sent: usize,
}

impl Output {
    pub fn pending(&self) -> usize {
        self.buf.len() - self.sent
    }

    /// Writes as much as the socket takes; the rest waits.
    pub fn flush(&mut self, stream: &mut Stream) -> io::Result<()> {
        while self.sent < self.buf.len() {
            match stream.write(&self.buf[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        self.buf.clear();
        self.sent = 0;
        Ok(())
    }
}
