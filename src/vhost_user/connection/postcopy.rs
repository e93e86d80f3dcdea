//! The messages of a postcopy migration.
//!
//! The `vhost` crate carries them (feature `postcopy`) but for three things that QEMU does: it acknowledges a
//! memory table that has not changed by a message 0, announces a migration again after one that failed, and waits
//! for a reply to `POSTCOPY_LISTEN` whether or not `REPLY_ACK` was negotiated. So they are read here.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use vhost::vhost_user;
use vhost::vhost_user::message::{FrontendReq, VhostUserMemoryRegion};

use super::{Connection, ConnectionError, socket_error};
use crate::vhost_user::peek::{self, Header};

/// Bytes of a memory region in a message; the first is preceded by eight bytes.
const REGION: usize = 32;
const FIRST_REGION: usize = 8;
/// Where the user address is in a region.
const USER_ADDRESS: usize = 16;
/// Bytes of the front-end's acknowledgement of a memory table: a 64-bit number.
const READY: u32 = 8;

fn regions(payload: &[u8]) -> Vec<VhostUserMemoryRegion> {
    let word = |bytes: &[u8], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    // Guest address, size, user address, offset into the file (vhost-user.rst, "Memory region description").
    let region = |r: &[u8]| {
        VhostUserMemoryRegion::new(word(r, 0), word(r, 8), word(r, USER_ADDRESS), word(r, 24))
    };
    let regions = payload.get(FIRST_REGION..).unwrap_or_default();
    regions.chunks_exact(REGION).map(region).collect()
}

impl Connection {
    /// Whether a message means something else than usual, because of a postcopy migration.
    pub(super) fn is_postcopy(&self, header: &Header) -> bool {
        let session = self.session();
        if !session.pagefault_acked() {
            return false;
        }
        let acknowledges = header.size == READY && session.is_listening();
        match FrontendReq::try_from(header.request) {
            Ok(
                FrontendReq::POSTCOPY_ADVISE
                | FrontendReq::POSTCOPY_LISTEN
                | FrontendReq::POSTCOPY_END,
            ) => true,
            Ok(FrontendReq::SET_MEM_TABLE | FrontendReq::ADD_MEM_REG) => session.is_listening(),
            Ok(FrontendReq::REM_MEM_REG) => acknowledges || session.has_pending_memory(),
            _ => acknowledges && header.request == 0,
        }
    }

    pub(super) fn postcopy(&mut self, header: &Header) -> Result<(), ConnectionError> {
        let request = FrontendReq::try_from(header.request);
        let is_step = matches!(
            request,
            Ok(FrontendReq::POSTCOPY_ADVISE
                | FrontendReq::POSTCOPY_LISTEN
                | FrontendReq::POSTCOPY_END)
        );
        if is_step && header.size != 0 {
            return Err(malformed(header));
        }
        match request {
            Ok(FrontendReq::POSTCOPY_ADVISE) => {
                self.take(header)?;
                let advised = self.session().postcopy_advise();
                match advised {
                    Ok(fd) => self.answer(header, &[], &[fd.as_raw_fd()]),
                    // Without a descriptor: the front-end gives the migration up, and nothing else.
                    Err(why) => {
                        self.warn_refused(header, &why);
                        self.answer(header, &[], &[])
                    }
                }
            }
            Ok(FrontendReq::POSTCOPY_LISTEN) => {
                self.take(header)?;
                let sock = self.sock.try_clone().map_err(socket_error("dup"))?;
                let result = self.session().postcopy_listen(sock);
                self.postcopy_result(header, result, header.need_reply())
            }
            Ok(FrontendReq::POSTCOPY_END) => {
                self.take(header)?;
                let result = self.session().postcopy_end();
                self.postcopy_result(header, result, true)
            }
            _ if header.size == READY => {
                let error = self.take_u64(header)?;
                let result = self.session().postcopy_ready(error);
                self.acknowledge(header, result)
            }
            Ok(FrontendReq::REM_MEM_REG) => {
                let regions = regions(&self.take(header)?);
                let result = match regions.as_slice() {
                    [region] => self.session().postcopy_remove(region),
                    _ => Err("it has no region".to_owned()),
                };
                self.acknowledge(header, result)
            }
            Ok(request) => self.postcopy_memory(header, request == FrontendReq::SET_MEM_TABLE),
            Err(_) => Err(malformed(header)),
        }
    }

    /// A result that the front-end waits for if it `waits`.
    fn postcopy_result(
        &mut self,
        header: &Header,
        result: Result<(), String>,
        waits: bool,
    ) -> Result<(), ConnectionError> {
        if !waits {
            return self.acknowledge(header, result);
        }
        self.reply(header, u64::from(result.is_err()))?;
        if let Err(why) = result {
            self.warn_refused(header, &why);
        }
        Ok(())
    }

    /// `SET_MEM_TABLE` and `ADD_MEM_REG`: answered by the same regions, with their addresses here in place of those
    /// of the VMM.
    fn postcopy_memory(&mut self, header: &Header, table: bool) -> Result<(), ConnectionError> {
        let (mut payload, fds) =
            peek::take_with_fds(&self.sock, header).map_err(socket_error("recvmsg"))?;
        let files: Vec<File> = fds.into_iter().map(File::from).collect();
        let regions = regions(&payload);
        let said = if table {
            payload
                .first_chunk()
                .map(|count| u32::from_ne_bytes(*count) as usize)
        } else {
            Some(1)
        };
        let whole = payload.len() == FIRST_REGION + REGION * regions.len();
        if !whole || said != Some(regions.len()) || files.len() != regions.len() {
            return Err(malformed(header));
        }
        let mapped = self.session().postcopy_memory(table, &regions, files);
        let bases = mapped.map_err(|why| ConnectionError::Refused {
            request: header.name(),
            why,
        })?;
        for (region, base) in payload[FIRST_REGION..].chunks_exact_mut(REGION).zip(bases) {
            region[USER_ADDRESS..USER_ADDRESS + 8].copy_from_slice(&base.to_ne_bytes());
        }
        self.answer(header, &payload, &[])
    }

    fn answer(
        &self,
        header: &Header,
        payload: &[u8],
        fds: &[RawFd],
    ) -> Result<(), ConnectionError> {
        peek::answer(&self.sock, header, payload, fds).map_err(socket_error("write"))
    }
}

fn malformed(header: &Header) -> ConnectionError {
    ConnectionError::Protocol {
        request: header.name(),
        source: vhost_user::Error::InvalidMessage,
    }
}
