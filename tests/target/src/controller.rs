//! A controller: what an association is with.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::link::{Link, Mail};
use crate::options::ControllerOptions;
use crate::subsystem::Subsystem;
use crate::sync::Locked;

/// The properties that a host sets and reads (base specification, section 3.1.3).
#[derive(Default)]
pub(crate) struct Registers {
    pub cc: u32,
    enabled_at: Option<Instant>,
    shutdown_at: Option<Instant>,
    pub fatal: bool,
}

/// Features that a host can set.
pub(crate) struct Features {
    pub async_events: u32,
    pub host_behavior: [u8; 512],
    pub write_cache: u32,
    pub plain: BTreeMap<u8, u32>,
}

/// Asynchronous events: what waits for a request, and what is masked until its log page was read.
#[derive(Default)]
pub(crate) struct Events {
    pub waiting: Vec<u32>,
    pub masked: Vec<u32>,
    /// Namespaces for the Changed Namespace List.
    pub changed_namespaces: Vec<u32>,
}

pub(crate) struct Controller {
    pub id: u16,
    pub subsystem: Arc<Subsystem>,
    pub port: u16,
    pub host_nqn: String,
    pub host_id: [u8; 16],
    pub options: ControllerOptions,
    pub kato_ms: AtomicU32,
    pub registers: Mutex<Registers>,
    pub features: Mutex<Features>,
    pub events: Mutex<Events>,
    pub links: Mutex<BTreeMap<u16, Arc<Link>>>,
    /// I/O queues that were granted; the limit of the options until the host asked.
    pub granted: AtomicU16,
    born: Instant,
    heard_ms: AtomicU64,
}

/// CSTS bits.
const CSTS_RDY: u32 = 1 << 0;
const CSTS_CFS: u32 = 1 << 1;
const CSTS_SHST_OCCURRING: u32 = 1 << 2;
const CSTS_SHST_COMPLETE: u32 = 2 << 2;

impl Controller {
    pub fn new(
        subsystem: Arc<Subsystem>,
        port: u16,
        host_nqn: String,
        host_id: [u8; 16],
        kato_ms: u32,
    ) -> Self {
        let options = subsystem.options();
        Self {
            id: subsystem.next_cntlid(),
            port,
            host_nqn,
            host_id,
            kato_ms: AtomicU32::new(kato_ms),
            registers: Mutex::default(),
            features: Mutex::new(Features {
                async_events: 0,
                host_behavior: [0; 512],
                write_cache: u32::from(options.volatile_write_cache),
                plain: BTreeMap::new(),
            }),
            events: Mutex::default(),
            links: Mutex::default(),
            granted: AtomicU16::new(options.max_io_queues),
            born: Instant::now(),
            heard_ms: AtomicU64::new(0),
            options,
            subsystem,
        }
    }

    /// CAP (base specification, section 3.1.3.1).
    pub fn cap(&self) -> u64 {
        let o = &self.options;
        u64::from(o.mqes)
            | u64::from(o.contiguous_queues) << 16
            | u64::from(o.timeout_500ms) << 24
            // CSS: the NVM command set.
            | 1 << 37
    }

    pub fn set_cc(&self, cc: u32) {
        let mut r = self.registers.locked();
        let (was, now) = (r.cc & 1, cc & 1);
        if was == 0 && now == 1 {
            r.enabled_at = Some(Instant::now());
            r.shutdown_at = None;
        }
        if now == 0 {
            r.enabled_at = None;
        }
        // SHN: a shutdown notification, normal or abrupt.
        if r.cc >> 14 & 3 == 0 && cc >> 14 & 3 != 0 {
            r.shutdown_at = Some(Instant::now());
        }
        r.cc = cc;
    }

    pub fn csts(&self) -> u32 {
        let options = self.subsystem.options();
        let r = self.registers.locked();
        let passed =
            |since: Instant, after: Option<Duration>| after.is_some_and(|t| since.elapsed() >= t);
        let mut csts = 0;
        if r.enabled_at
            .is_some_and(|at| passed(at, options.time_to_ready))
        {
            csts |= CSTS_RDY;
        }
        if let Some(at) = r.shutdown_at {
            let done = passed(at, options.time_to_shutdown);
            csts |= if done {
                CSTS_SHST_COMPLETE
            } else {
                CSTS_SHST_OCCURRING
            };
        }
        if r.fatal {
            csts |= CSTS_CFS;
        }
        csts
    }

    pub fn is_ready(&self) -> bool {
        self.csts() & (CSTS_RDY | CSTS_CFS) == CSTS_RDY
    }

    /// Restarts the keep-alive timer.
    pub fn heard(&self) {
        self.heard_ms
            .store(self.born.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// When the association ends unless the host is heard of; none if it has no timer.
    pub fn keep_alive_deadline(&self) -> Option<Instant> {
        let kato = u64::from(self.kato_ms.load(Ordering::Relaxed));
        if kato == 0 || !self.options.enforce_keep_alive {
            return None;
        }
        // The time is rounded up to the granularity (base specification, section 3.9).
        let grain = u64::from(self.options.kas.max(1)) * 100;
        let heard = self.heard_ms.load(Ordering::Relaxed);
        Some(self.born + Duration::from_millis(heard + kato.next_multiple_of(grain)))
    }

    /// Ends the association: all its connections are shut down.
    pub fn shut_down(&self) {
        for link in self.links.locked().values() {
            link.shut_down();
        }
    }

    /// Tells the host of an event if it asked for such (`mask`: its bit in Asynchronous Event Configuration).
    pub fn raise(&self, mask: u32, event: u32) {
        if self.features.locked().async_events & mask == 0 {
            return;
        }
        let mut events = self.events.locked();
        if !events.waiting.contains(&event) {
            events.waiting.push(event);
        }
        drop(events);
        if let Some(admin) = self.links.locked().get(&0) {
            admin.send(Mail::Events);
        }
    }

    /// A log page was read without Retain Asynchronous Event: its events are told again from now on.
    pub fn log_page_read(&self, page: u8) {
        self.events
            .locked()
            .masked
            .retain(|event| (event >> 16) as u8 != page);
        if let Some(admin) = self.links.locked().get(&0) {
            admin.send(Mail::Events);
        }
    }

    /// The next event that a request may be completed with.
    pub fn take_event(&self) -> Option<u32> {
        let mut events = self.events.locked();
        let next = events
            .waiting
            .iter()
            .position(|e| !events.masked.contains(e))?;
        let event = events.waiting.remove(next);
        events.masked.push(event);
        Some(event)
    }
}
