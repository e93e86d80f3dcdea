//! Extended L2 entries: clusters of 32 subclusters, each allocated, zero or unallocated by itself.
//!
//! `docs/interop/qcow2.rst`, section "Extended L2 Entries". An entry is a pair: the ordinary entry, which says
//! where the host cluster is, and a bitmap, which says what of it counts. So a write copies nothing but the
//! rest of the subclusters that it covers in part.
//!
//! How a pair changes, and why that is right:
//!
//! - A pair is changed under the lock of its slice ([`Changes`]), for no longer than a few instructions; what
//!   takes time is done before, under a [`Reservation`] of the subclusters that are going to change. Two
//!   writers to different subclusters of a cluster reserve different things and do not wait for each other.
//!   Who discards waits until nobody has reserved what it wants to change.
//! - A cluster gets its **host cluster** first, with the subclusters as they are. That changes nothing of what
//!   it shows, needs no order and takes no I/O where the arena has clusters. If the new cluster is zeros,
//!   durably, what shows zeros counts as allocated from then on, and is written in place: no writer waits,
//!   and no data has to be durable before the mapping.
//! - **Filling** a subcluster that is not allocated: data, with the rest of the subclusters at both ends of
//!   it, is written while the bitmap still says that it does not count; then the bitmap is published, ordered
//!   behind the data as in `write`. The reservation keeps the host cluster where it is, and what the
//!   subclusters show as it is.
//! - A **copy** of what a subcluster shows of the layer below is a filling like any other. Of zeros only the
//!   bitmap changes. It waits for nobody.
//! - Compressed clusters and those that snapshots share are **made anew** as a whole.
//!
//! A subcluster may be used again as soon as it was discarded, unlike a host cluster, which waits in limbo.
//! A writer in place that looked before the discard may therefore write late, into a subcluster that a
//! second writer fills. It writes the guest's sectors and nothing else, and it was under way together with
//! a discard of the same sectors, so each of these sectors may hold what either left there, also after the
//! second writer's zeros around its data. No other sector is touched. After a power loss the same holds
//! where the file still has the bitmap of before the discard: each sector is one that a request under
//! way or not yet flushed had put there.

mod changes;
mod copied;
mod discard;
mod entry;
mod map;
mod write;

pub(super) use changes::Reservations;
pub(super) use entry::is_well_formed;
