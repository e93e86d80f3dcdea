//! Clusters that were handed out and are not referenced yet.

use std::marker::PhantomData;

use super::alloc::{Allocator, lock};
use super::arena::{Arena, Stock};
use super::runs::Run;
use super::units::HostCluster;

/// Clusters with durable refcount 1 that no metadata points at yet. Not to be sent to another thread.
#[derive(Debug)]
#[must_use = "dropping it gives the clusters back"]
pub struct Fresh<'a> {
    /// Who takes them back; none for clusters of another file, which nobody counts.
    owner: Option<(&'a Allocator, &'a Arena)>,
    stock: Stock,
    thread: PhantomData<*const ()>,
}

impl<'a> Fresh<'a> {
    /// Clusters of an arena of `allocator`.
    pub(super) fn new(allocator: &'a Allocator, arena: &'a Arena, stock: Stock) -> Self {
        Self {
            owner: Some((allocator, arena)),
            stock,
            thread: PhantomData,
        }
    }

    /// Clusters of another file than the image's own.
    pub(super) fn elsewhere(first: HostCluster, count: u64) -> Self {
        Self {
            owner: None,
            stock: Stock {
                run: Run::new(first.0, count),
                zeroed: false,
            },
            thread: PhantomData,
        }
    }

    /// The first cluster.
    pub fn first(&self) -> HostCluster {
        HostCluster(self.stock.run.first)
    }

    /// How many there are; 0 only after [`Fresh::split_at`].
    pub fn count(&self) -> u64 {
        self.stock.run.count
    }

    /// The clusters read as zeros, also after a loss of power, until they are written to.
    pub fn zeroed(&self) -> bool {
        self.stock.zeroed
    }

    /// Takes the clusters over for good: metadata points at them now.
    pub fn keep(mut self) -> (HostCluster, u64) {
        let run = self.take();
        (HostCluster(run.first), run.count)
    }

    /// The first `count` clusters, and the rest.
    pub fn split_at(mut self, count: u64) -> (Self, Self) {
        let (stock, run) = (self.stock, self.take());
        let count = count.min(run.count);
        let part = |run| Fresh {
            owner: self.owner,
            stock: Stock { run, ..stock },
            thread: PhantomData,
        };
        let rest = Run::new(run.first + count, run.count - count);
        (part(Run::new(run.first, count)), part(rest))
    }

    /// Gives the clusters back to the arena: nothing was written to them. (Dropped ones count as
    /// written to, and are zeroed again before they are used.)
    pub fn give_back_untouched(mut self) {
        let stock = self.stock;
        let run = self.take();
        if let Some((_, arena)) = self.owner.filter(|_| run.count > 0) {
            arena.put_back(Stock { run, ..stock });
        }
    }

    fn take(&mut self) -> Run {
        let run = self.stock.run;
        self.stock.run.count = 0;
        run
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        let run = self.take();
        if let Some((owner, _)) = self.owner.filter(|_| run.count > 0) {
            lock(&owner.orphans).push(run);
        }
    }
}
