//! Dataset Management and Write Zeroes (NVM command set specification, sections 3.2.3 and 3.2.8).

use crate::connection::Connection;
use crate::io_queue::Next;
use crate::journal::Execution;
use crate::reservation::Access;
use crate::status::Status;
use crate::wire::{Sqe, u32_at, u64_at};

/// Bytes of a range of Dataset Management.
const RANGE: usize = 16;

impl Connection {
    pub fn write_zeroes(&mut self, sqe: &Sqe) -> Result<Next, Status> {
        let extent = self.writable(sqe, false)?;
        let limit = self.queue.as_ref().map_or(0, |q| q.controller.options.wzsl);
        if limit != 0 && extent.len > 4096 << limit {
            return Err(Status::INVALID_FIELD.dnr());
        }
        let execution = self.execution(sqe);
        let mut place = Err(Status::INTERNAL_ERROR);
        extent.namespace.store.zero(extent.offset, extent.len, || {
            place = self.take_effect(|journal| execution.map(|e| journal.executed(e)));
            place.is_ok()
        });
        self.journaled(sqe.cid(), place?);
        Ok(Next::Complete)
    }

    /// Dataset Management: with AD the ranges are deallocated, and read as zeros.
    pub fn deallocate(&mut self, sqe: &Sqe, data: &[u8]) -> Result<(), Status> {
        let reach = self.reach(sqe.nsid())?;
        self.allowed(&reach, Access::Write)?;
        let namespace = reach.namespace;
        if namespace.write_protected() {
            return Err(Status::WRITE_PROTECTED.dnr());
        }
        let ranges = usize::from(sqe.u8(40)) + 1;
        let deallocate = sqe.cdw(11) & 1 << 2 != 0;
        let ranges = || {
            data.chunks_exact(RANGE)
                .take(ranges)
                .map(|r| (u64_at(r, 8), u64::from(u32_at(r, 4))))
        };
        for (slba, blocks) in ranges() {
            if slba
                .checked_add(blocks)
                .is_none_or(|end| end > namespace.blocks())
            {
                return Err(Status::LBA_OUT_OF_RANGE.dnr());
            }
        }
        for (slba, blocks) in ranges().filter(|&(_, blocks)| deallocate && blocks > 0) {
            let execution = self.execution(sqe).map(|e| Execution { slba, blocks, ..e });
            let shift = namespace.lba_shift();
            let mut place = Err(Status::INTERNAL_ERROR);
            namespace
                .store
                .zero(slba << shift, (blocks << shift) as usize, || {
                    place = self.take_effect(|journal| execution.map(|e| journal.executed(e)));
                    place.is_ok()
                });
            self.journaled(sqe.cid(), place?);
        }
        Ok(())
    }
}
