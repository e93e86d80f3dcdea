//! What is below an image: where copy-on-write gets the rest of a cluster from.

use std::future::Future;

use crate::block::error::Result;
use crate::block::layer::Layer;
use crate::block::stack::read_chain;
use crate::reactor::{Io, Sg};

/// Something to read from.
pub trait Below {
    /// Fills `to` from `offset` on. Beyond its end are zeros.
    fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> impl Future<Output = Result<()>>;
}

/// Nothing: zeros.
impl Below for () {
    async fn read(&self, _: &Io, _: u64, to: Sg<'_>) -> Result<()> {
        to.zero();
        Ok(())
    }
}

/// A chain of layers, the next one first.
impl Below for [Layer] {
    async fn read(&self, io: &Io, offset: u64, to: Sg<'_>) -> Result<()> {
        read_chain(self, io, offset, to).await
    }
}
