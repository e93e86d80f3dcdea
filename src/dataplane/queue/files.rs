//! The files of a ring: how the driver notifies us, and how it is notified.

use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use log::warn;

use super::Queue;
use crate::dataplane::mailbox::RingFile;
use crate::dataplane::notifier::{Notifier, take_kicks};
use crate::dataplane::stats::RingStats;
use crate::reactor::{Io, IoFile};

impl Queue {
    pub(in crate::dataplane) fn set_file(self: &Rc<Self>, which: RingFile, file: Option<File>) {
        match which {
            RingFile::Kick => {
                if let Some(task) = self.kick.take() {
                    self.io.remove(task);
                }
                self.polled.set(file.is_none());
                if let Some(file) = file {
                    let kick = IoFile::without_slot(file);
                    let watch = watch_kicks(self.io.clone(), kick, self.stats.clone());
                    self.kick.replace(Some(self.io.spawn(watch)));
                }
            }
            RingFile::Call => {
                self.call.replace(file.map(Notifier::new));
                self.interrupt();
            }
            RingFile::Err => {
                self.err.replace(file.map(Notifier::new));
            }
        }
    }

    pub(super) fn interrupt(&self) {
        if let Some(call) = self.call.borrow().as_ref() {
            self.stats.interrupts.count();
            match call.signal() {
                // Full: it has been signalled and not taken, so the driver will look.
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                    self.complain(&format_args!("call file: {error}"));
                }
                _ => {}
            }
        }
    }

    /// Asks the driver to notify us. Returns true if requests are waiting already.
    pub(in crate::dataplane) fn before_sleep(&self) -> bool {
        if !self.fetches() || self.polled.get() {
            return false;
        }
        let waiting = self.ring.borrow_mut().enable_notification();
        self.mark_notification();
        waiting
    }

    /// Asks the driver not to notify us.
    pub(in crate::dataplane) fn after_sleep(&self, slept: bool) {
        self.stats.sleeps.add(u64::from(slept));
        if self.fetches() {
            self.ring.borrow_mut().disable_notification();
            self.mark_notification();
        }
    }
}

/// Takes the driver's notifications: each wakes the worker, which then looks at the ring.
async fn watch_kicks(io: Io, kick: IoFile, stats: Arc<RingStats>) {
    loop {
        match io.readable(&kick).await {
            Ok(events) if events & libc::POLLIN as u32 != 0 => match take_kicks(kick.get()) {
                Ok(0) => break,
                Ok(_) => stats.kicks.count(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    warn!("kick file: {error}; the ring is no longer notified");
                    break;
                }
            },
            // Hung up: a pipe whose other end is gone.
            Ok(_) => break,
            Err(error) => {
                warn!("kick file: {error}; the ring is no longer notified");
                break;
            }
        }
    }
}
