//! Reservations: what a lock is for a file (Base 8.19).
//!
//! A disk that is activated for writing registers its host with the namespace and takes a **Write Exclusive**
//! reservation (Base 8.19, figure "Reservation types"); it unregisters when it is deactivated, which releases the
//! reservation in the same step (Base 7.3).
//!
//! - *One writer.* Of this type only the holder may write. "Registrants only" would let in whoever has registered,
//!   which a migration's target does before it is its turn. Reading is open to all: the target of a migration reads
//!   headers before it takes over, and a backup reads as it likes.
//! - *Several paths.* Who holds a reservation is a host, by its host identifier, whichever controllers it comes by. So
//!   nothing has to be done for another path, nor when one connects again.
//! - *Migration.* The source gives the reservation up before the last `GET_VRING_BASE` is answered. A target that
//!   comes early gets [`ErrorKind::Locked`], which is waited for like the lock of a file.
//! - *A crash.* The key comes from the host identifier. So whoever starts again on the same host registers with the key
//!   that is registered, and acquires what is held, both of which succeed and change nothing. Another host waits in
//!   vain, and is told what an operator can do. Nothing is ever preempted by itself: nobody can know here that the other
//!   host has stopped writing.
//! - *A reservation that is taken away* fails the next write with Reservation Conflict. It is not taken back: who has it
//!   now has his reasons.
//! - *Power loss of the target.* Registrations are to persist (CPTPL) where the target can do that. Else a target that
//!   loses its power forgets the fence until the next activation.
//!
//! Two processes on one host are one host to the target: this is no fence between them, unless they are given different
//! host identifiers.

use std::fmt;
use std::sync::Arc;

use super::NvmeStorage;
use super::wire::command::{AcquireAction, RegisterAction, ReservationType, Sqe, reservation_keys};
use crate::block::Storage;
use crate::block::error::{Error, ErrorKind, Result};
use crate::reactor::Io;

/// CPTPL 11b: registrations and reservations persist over a loss of power (Base 7.3).
const PERSIST: u32 = 3 << 30;
/// Registrants that are looked at.
const MAX_REGISTRANTS: usize = 63;
/// Bytes of a Reservation Report: the extended header, and as many extended registrants (Base 7.5).
const REPORT: usize = 64 * (1 + MAX_REGISTRANTS);
const TYPE: ReservationType = ReservationType::WriteExclusive;

/// A command of reservations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Registers this host. `persist`: over a loss of power, too.
    Register { persist: bool },
    /// Takes the registration away, and with it what it holds.
    Unregister,
    /// Takes the reservation.
    Acquire,
    /// Reads who is registered.
    Report,
}

impl Action {
    /// The command, for `bytes` of data.
    pub(super) fn entry(self, nsid: u32, bytes: u64) -> Sqe {
        let register = |action| Sqe::reservation_register(nsid, action, false);
        match self {
            Self::Register { persist: false } => register(RegisterAction::Register),
            Self::Register { persist: true } => {
                let action = RegisterAction::Register;
                register(action).cdw(10, action as u32 | PERSIST)
            }
            Self::Unregister => register(RegisterAction::Unregister),
            Self::Acquire => Sqe::reservation_acquire(nsid, AcquireAction::Acquire, TYPE),
            Self::Report => Sqe::reservation_report(nsid, bytes as u32),
        }
    }

    /// True if the data come from the controller.
    pub(super) fn reads(self) -> bool {
        self == Self::Report
    }

    /// For messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Register { .. } => "reservation register",
            Self::Unregister => "reservation unregister",
            Self::Acquire => "reservation acquire",
            Self::Report => "reservation report",
        }
    }
}

/// A reservation that this host holds. Dropping it changes nothing: [`Reservation::release`] does.
#[derive(Debug)]
pub(in crate::block) struct Reservation {
    storage: Arc<Storage>,
    key: u64,
}

/// A host that is registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Registrant {
    holds: bool,
    key: u64,
    host: [u8; 16],
}

impl fmt::Display for Registrant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the host ")?;
        for (index, byte) in self.host.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        write!(f, " (key {:#x})", self.key)
    }
}

/// The key of a host: not 0, which means none.
fn key_of(host: &[u8; 16]) -> u64 {
    let id = u128::from_be_bytes(*host);
    match (id >> 64) as u64 ^ id as u64 {
        0 => 1,
        key => key,
    }
}

/// Who is registered, of the data of a Reservation Report in its extended form (Base 7.5); and how many there are.
fn registrants(data: &[u8]) -> (usize, Vec<Registrant>) {
    let count = usize::from(u16::from_le_bytes([data[5], data[6]]));
    let entries = data[64..].chunks_exact(64).take(count);
    let one = |entry: &[u8]| {
        let word = |at: usize| entry[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
        let host = entry[16..32].try_into().unwrap_or_default();
        Registrant {
            // RCSTS bit 0.
            holds: entry[2] & 1 == 1,
            key: word(8),
            host,
        }
    };
    (count, entries.map(one).collect())
}

impl Reservation {
    /// Takes the reservation of a namespace that is going to be written to; none of another storage, or where none is
    /// wanted.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] while another host holds one; it says which. [`ErrorKind::Unsupported`] of a target
    /// without reservations. Those of the paths.
    pub(in crate::block) async fn take(io: &Io, storage: &Arc<Storage>) -> Result<Option<Self>> {
        let Storage::Nvme(nvme) = &**storage else {
            return Ok(None);
        };
        let spec = nvme.namespace().spec();
        if !spec.options.reservations || spec.read_only {
            return Ok(None);
        }
        let Some(host) = spec.options.host_id else {
            let what =
                "reservations are wanted, and the host's identifier is not known; give host-id";
            return Err(refuse(nvme, ErrorKind::InvalidImage, what));
        };
        let key = key_of(&host);
        let mut registered = nvme
            .reserve(io, Action::Register { persist: true }, 0, key)
            .await;
        if registered
            .as_ref()
            .is_err_and(|error| error.kind() == ErrorKind::Unsupported)
        {
            // Not every target keeps them over a loss of power.
            registered = nvme
                .reserve(io, Action::Register { persist: false }, 0, key)
                .await;
        }
        match registered {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let hint = "the target has no reservations for this namespace: turn them on there, or leave the \
                            option `reservations` away";
                return Err(error.hint(hint));
            }
            Err(error) if error.kind() == ErrorKind::Locked => {
                let what = format!(
                    "this host is registered with another key than {key:#x}: somebody else uses the namespace from \
                     here; end that, or remove the key with: nvme resv-register DEVICE --crkey=KEY --rrega=1"
                );
                return Err(refuse(nvme, ErrorKind::Locked, &what));
            }
            other => other?,
        }
        match nvme.reserve(io, Action::Acquire, key, 0).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Locked => {
                return Err(Self::held(io, nvme, &host, key).await);
            }
            Err(error) => {
                let _given_up = nvme.reserve(io, Action::Unregister, key, 0).await;
                return Err(error);
            }
        }
        let storage = storage.clone();
        Ok(Some(Self { storage, key }))
    }

    /// Says who holds the reservation, and leaves nothing behind.
    async fn held(io: &Io, nvme: &NvmeStorage, host: &[u8; 16], key: u64) -> Error {
        let (count, all) = match nvme.registrants(io).await {
            Ok(found) => found,
            Err(error) => return error,
        };
        let holder = all.iter().find(|registrant| registrant.holds);
        if holder.is_some_and(|holder| holder.host == *host) {
            let what = "this host holds a reservation of another type than Write Exclusive, which this program has \
                        not made; release it first (nvme resv-release)";
            return refuse(nvme, ErrorKind::Locked, what);
        }
        let _gone = nvme.reserve(io, Action::Unregister, key, 0).await;
        let by = match holder {
            Some(holder) => holder.to_string(),
            None => format!("one of {count} registered hosts"),
        };
        let what = format!("{by} holds a reservation of the namespace");
        refuse(nvme, ErrorKind::Locked, &what).hint(
            "it ends when the disk is stopped there. If that host is gone for good, and surely writes no more, an \
             operator can clear it, from any host that sees the namespace as DEVICE: nvme resv-register DEVICE \
             --nrkey=0x1 --rrega=0 && nvme resv-release DEVICE --crkey=0x1 --rrela=1",
        )
    }

    /// Gives the reservation up, with the registration.
    ///
    /// # Errors
    /// Those of the paths: other hosts can not write then.
    pub(in crate::block) async fn release(&self, io: &Io) -> Result<()> {
        let Storage::Nvme(nvme) = &*self.storage else {
            return Ok(());
        };
        match nvme.reserve(io, Action::Unregister, self.key, 0).await {
            Err(error) if error.kind() == ErrorKind::Locked => {
                log::warn!(
                    "{}: the reservation was taken away while the disk was in use",
                    nvme.namespace().name().display()
                );
                Ok(())
            }
            other => other,
        }
    }
}

fn refuse(nvme: &NvmeStorage, kind: ErrorKind, what: &str) -> Error {
    Error::image(kind, nvme.namespace().name(), None, what)
}

impl NvmeStorage {
    async fn reserve(&self, io: &Io, action: Action, current: u64, other: u64) -> Result<()> {
        let keys = reservation_keys(current, other);
        let mut buf = io.buf(keys.len());
        buf.copy_from_slice(&keys);
        self.reservation(io, action, buf.sg()).await
    }

    async fn registrants(&self, io: &Io) -> Result<(usize, Vec<Registrant>)> {
        let mut buf = io.buf(REPORT);
        // A controller may have less to say.
        buf.fill(0);
        self.reservation(io, Action::Report, buf.sg()).await?;
        Ok(registrants(&buf))
    }
}
