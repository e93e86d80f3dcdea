//! From an address to a controller that is ready, and from there to I/O queues.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Channel, succeeded};
use super::facts::{NamespaceFacts, Reader};
use super::secure::Security;
use super::transport::{Transport, Wishes};
use super::trouble::{Result, Trouble, kind_of, later, never};
use super::wait::{Waiter, Want};
use crate::block::error::ErrorKind;
use crate::block::nvme_tcp::host::Host;
use crate::block::nvme_tcp::link::ControllerLimits;
use crate::block::nvme_tcp::spec::{NamespaceName, NvmeOptions};
use crate::block::nvme_tcp::wire::command::{ConnectData, ConnectResult, feature, property};
use crate::block::nvme_tcp::wire::identify::Controller;
use crate::block::nvme_tcp::wire::{Cqe, Sqe, Status};

/// Entries of the admin submission queue (Base section 6.3: at least 32).
const ADMIN_ENTRIES: u32 = 32;
/// I/O queues without which a disk is not served: a worker's, and that of operations beside the workers.
const MIN_GRANTED: u16 = 2;
/// How often a controller that is not ready yet is asked.
const READY_POLL: Duration = Duration::from_millis(20);
/// CAP.TO and CRTO are in this unit.
const TO_UNIT: Duration = Duration::from_millis(500);

/// CSTS.RDY, CFS and SHST (Base section 3.1.3.6).
pub(crate) const CSTS_RDY: u32 = 1;
pub(crate) const CSTS_CFS: u32 = 1 << 1;
pub(crate) const CSTS_SHST: u32 = 3 << 2;
pub(crate) const CSTS_SHST_COMPLETE: u32 = 2 << 2;
/// CC.EN, IOSQES 6 and IOCQES 4, SHN normal (Base section 3.1.3.5).
const CC_EN: u32 = 1;
const CC_ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;
const CC_CSS_ALL: u32 = 6 << 4;
pub(crate) const CC_SHN: u32 = 3 << 14;
pub(crate) const CC_SHN_NORMAL: u32 = 1 << 14;

/// Asynchronous events that are wanted: namespace attributes and ANA (Base section 5.27.1.8; the same bits as in
/// OAES), and the critical warnings of SMART in the lowest byte.
const EVENT_NAMESPACE: u32 = 1 << 8;
const EVENT_ANA: u32 = 1 << 11;

/// Whom a queue is connected to, and how.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) subsystem: String,
    pub(crate) host: Host,
    pub(crate) options: Arc<NvmeOptions>,
    pub(crate) security: Security,
}

/// CAP (Base section 3.1.3.1).
#[derive(Clone, Copy, Debug)]
struct Capabilities(u64);

impl Capabilities {
    /// Entries of an I/O queue, at most.
    fn queue_entries(self) -> u32 {
        (self.0 & 0xffff) as u32 + 1
    }

    fn timeout(self) -> Duration {
        TO_UNIT * (self.0 >> 24 & 0xff) as u32
    }

    fn nvm_command_set(self) -> bool {
        self.0 >> 37 & 1 != 0
    }

    fn command_sets(self) -> bool {
        self.0 >> 43 & 1 != 0
    }

    /// Smallest memory page, bytes.
    fn page(self) -> u64 {
        1 << (12 + (self.0 >> 48 & 0xf))
    }

    fn page_field(self) -> u32 {
        (self.0 >> 48 & 0xf) as u32
    }

    /// CRMS.CRWMS: CRTO tells how long it takes to be ready with media.
    fn ready_with_media(self) -> bool {
        self.0 >> 59 & 1 != 0
    }
}

/// A controller that is ready, with its admin queue.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) channel: Channel,
    pub(crate) peer: SocketAddr,
    pub(crate) cntlid: u16,
    pub(crate) cc: u32,
    pub(crate) controller: Controller,
    version: u32,
    cap: Capabilities,
}

/// What an association has, beyond its admin queue.
#[derive(Debug)]
pub(crate) struct Ground {
    pub(crate) facts: NamespaceFacts,
    pub(crate) limits: ControllerLimits,
    /// I/O queues that the controller grants.
    pub(crate) granted: u16,
    /// Entries of each I/O submission queue.
    pub(crate) entries: u32,
    /// In-capsule data of I/O commands, bytes.
    pub(crate) in_capsule: u32,
}

impl Target {
    /// A subsystem, as this host reaches it: its names and secrets are read.
    ///
    /// # Errors
    /// Names that are none, secrets that cannot be had.
    pub(crate) fn new(subsystem: String, options: Arc<NvmeOptions>) -> crate::block::Result<Self> {
        let host = Host::find(&options)?;
        Ok(Self {
            security: Security::load(&options, &host.nqn, &subsystem)?,
            subsystem,
            host,
            options,
        })
    }

    /// Connects a queue's transport.
    fn transport(
        &self,
        addresses: &[SocketAddr],
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Channel> {
        let wire = self.security.dial(addresses, deadline, waiter)?;
        let wishes = Wishes {
            header_digest: self.options.header_digest,
            data_digest: self.options.data_digest,
        };
        let transport = Transport::initialize(wire, wishes, deadline, waiter)?;
        Ok(Channel::new(transport))
    }

    /// Connects a queue (Base section 6.3), and authenticates it where that is required.
    fn connect(
        &self,
        channel: &mut Channel,
        (qid, cntlid): (u16, u16),
        entries: u32,
        kato: Duration,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<std::result::Result<u16, Refusal>> {
        let data = ConnectData {
            host_id: self.host.id,
            cntlid,
            subnqn: self.subsystem.clone(),
            hostnqn: self.host.nqn.clone(),
        };
        let kato_ms = u32::try_from(kato.as_millis()).unwrap_or(u32::MAX);
        let sqe = Sqe::connect(qid, entries, 0, kato_ms);
        let (Some(data), Some(sqe)) = (data.encode(), sqe) else {
            let text = "the names or the queue depth do not fit a Connect command";
            return Err(never(ErrorKind::InvalidImage, text));
        };
        let end = channel.run_with(sqe, &data, deadline, waiter);
        let end = end.map_err(|trouble| trouble.during("Connect"))?;
        if !end.status.is_success() {
            return Ok(Err(self.refused(&end)));
        }
        let result = ConnectResult::from_result(end.result);
        if result.authentication_required || result.secure_channel_required {
            let secure_channel = result.secure_channel_required;
            self.security
                .authenticate(self, channel, secure_channel, deadline, waiter)?;
        } else {
            self.security.none_required()?;
        }
        Ok(Ok(result.cntlid))
    }

    /// Why a Connect failed (Base section 6.3, figure 388: IPO and IATTR say which parameter).
    fn refused(&self, end: &Cqe) -> Refusal {
        let (offset, in_data) = ((end.result & 0xffff) as u16, end.result >> 16 & 1 != 0);
        let subsystem = &self.subsystem;
        let host = &self.host.nqn;
        let (kind, text) = match (Status::from_raw(end.status.code()), in_data, offset) {
            (Status::CONNECT_INVALID_PARAMETERS, true, 256..512) => (
                ErrorKind::NotFound,
                format!(
                    "the target does not have the subsystem {subsystem} at this address; check its name (virtioblkd \
                     nvme discover)"
                ),
            ),
            (Status::CONNECT_INVALID_PARAMETERS, true, 512..768) => not_allowed(host, subsystem),
            (Status::CONNECT_INVALID_HOST, _, _) => not_allowed(host, subsystem),
            (Status::CONNECT_INVALID_PARAMETERS, true, 16) => (
                ErrorKind::Io,
                "the target does not know the controller (any more)".to_owned(),
            ),
            (Status::CONNECT_INVALID_PARAMETERS, _, _) => (
                ErrorKind::Io,
                format!(
                    "the target does not take a parameter of Connect, at byte {offset} of its {}",
                    if in_data { "data" } else { "command" }
                ),
            ),
            (Status::CONTROLLER_BUSY, _, _) => (
                ErrorKind::Io,
                "the target has no controller free (Connect Controller Busy)".to_owned(),
            ),
            (Status::CONFLICTING_ATTRIBUTES, _, _) => (
                ErrorKind::Unsupported,
                "the target does not know this format of Connect (Connect Incompatible Format)"
                    .to_owned(),
            ),
            (Status::CONNECT_RESTART_DISCOVERY, _, _) => (
                ErrorKind::Io,
                "the subsystem is to be looked for anew (Connect Restart Discovery)".to_owned(),
            ),
            _ => {
                let advice = end
                    .status
                    .advice()
                    .map_or(String::new(), |advice| format!("; {advice}"));
                (end.status.kind(), format!("{}{advice}", end.status))
            }
        };
        Refusal {
            status: end.status,
            trouble: match end.status.do_not_retry() {
                true => never(kind, text),
                false => kind_of(kind, text),
            },
        }
    }

    /// Everything up to a controller that is ready and identified.
    pub(crate) fn admin(
        &self,
        addresses: &[SocketAddr],
        kato: Duration,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Ready> {
        let mut channel = self.transport(addresses, deadline, waiter)?;
        let peer = channel
            .peer()
            .map_err(|error| later(format!("the connection is gone: {error}")))?;
        let whole = (0, ConnectData::ANY_CONTROLLER);
        let connected = self.connect(&mut channel, whole, ADMIN_ENTRIES, kato, deadline, waiter)?;
        let cntlid = connected.map_err(|refusal| refusal.trouble)?;
        let cap = Capabilities(get(&mut channel, property::CAP, true, deadline, waiter)?);
        let version = get(&mut channel, property::VS, false, deadline, waiter)? as u32;
        if !cap.nvm_command_set() && !cap.command_sets() {
            return Err(never(
                ErrorKind::Unsupported,
                "the controller does not have the NVM command set (CAP.CSS)",
            ));
        }
        let mut ready = Ready {
            channel,
            peer,
            cntlid,
            cc: 0,
            controller: Controller::parse(&[0; 4096]).map_err(|error| later(error.to_string()))?,
            version,
            cap,
        };
        ready.enable(deadline, waiter)?;
        ready.controller = Reader {
            channel: &mut ready.channel,
            waiter,
            deadline,
        }
        .controller()?;
        Ok(ready)
    }

    /// An I/O queue, connected and authenticated. `peer` is where its controller was found.
    pub(crate) fn io_queue(
        &self,
        peer: SocketAddr,
        (qid, cntlid): (u16, u16),
        entries: u32,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<std::result::Result<Channel, Refusal>> {
        loop {
            let mut channel = self.transport(&[peer], deadline, waiter)?;
            let ids = (qid, cntlid);
            match self.connect(&mut channel, ids, entries, Duration::ZERO, deadline, waiter)? {
                Ok(_) => return Ok(Ok(channel)),
                // The controller has not yet noticed that an earlier connection of this queue is gone. Once it
                // has, it is done with that queue's commands as well, so it is worth waiting for.
                Err(refusal) if refusal.in_use() && Instant::now() + READY_POLL < deadline => {
                    pause(READY_POLL, waiter)?;
                }
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
    }
}

fn not_allowed(host: &str, subsystem: &str) -> (ErrorKind, String) {
    (
        ErrorKind::NotAllowed,
        format!(
            "the target does not allow this host to use {subsystem}; allow {host} there, or give another host-nqn"
        ),
    )
}

/// A Connect that the controller answered with a failure.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: Status,
    pub(crate) trouble: Trouble,
}

impl Refusal {
    /// The queue's identifier is that of another queue.
    fn in_use(&self) -> bool {
        let code = Status::from_raw(self.status.code());
        // Which of them differs: the first is Base section 3.3.1's, the others are those of Linux' target, by age.
        [
            Status::SEQUENCE_ERROR,
            Status::INVALID_QUEUE_ID,
            Status::CONTROLLER_BUSY,
        ]
        .contains(&code)
    }

    /// The controller will refuse it each time.
    pub(crate) fn for_good(&self) -> bool {
        self.status.do_not_retry()
    }
}

/// Waits for a time.
pub(crate) fn pause(time: Duration, waiter: &mut dyn Waiter) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        waiter.wait(Want::Time, end)?;
    }
    Ok(())
}

/// Property Get (Base section 6.4).
pub(crate) fn get(
    channel: &mut Channel,
    offset: u32,
    eight_bytes: bool,
    deadline: Instant,
    waiter: &mut dyn Waiter,
) -> Result<u64> {
    let what = format!("Property Get {offset:#x}");
    let end = channel.run(Sqe::property_get(offset, eight_bytes), deadline, waiter);
    let end = succeeded(end.map_err(|trouble| trouble.during(&what))?, &what)?;
    Ok(end.result)
}

/// Property Set (Base section 6.5).
pub(crate) fn set(
    channel: &mut Channel,
    offset: u32,
    value: u32,
    deadline: Instant,
    waiter: &mut dyn Waiter,
) -> Result<()> {
    let what = format!("Property Set {offset:#x}");
    let end = channel.run(Sqe::property_set(offset, value), deadline, waiter);
    succeeded(end.map_err(|trouble| trouble.during(&what))?, &what).map(|_| ())
}

impl Ready {
    /// Disables the controller if it is enabled, then enables it (Base section 3.5.1).
    fn enable(&mut self, deadline: Instant, waiter: &mut dyn Waiter) -> Result<()> {
        let channel = &mut self.channel;
        let before = get(channel, property::CC, false, deadline, waiter)? as u32;
        let status = get(channel, property::CSTS, false, deadline, waiter)? as u32;
        let mut timeout = self.cap.timeout();
        if before & CC_EN != 0 || status & (CSTS_RDY | CSTS_CFS) != 0 {
            set(
                channel,
                property::CC,
                before & !(CC_EN | CC_SHN),
                deadline,
                waiter,
            )?;
            self.until(CSTS_RDY, 0, timeout, "disabled", deadline, waiter)?;
        }
        let channel = &mut self.channel;
        if self.cap.ready_with_media() {
            let crto = get(channel, property::CRTO, false, deadline, waiter)?;
            // CRWMT; some controllers have CAP.TO larger than that, and mean it.
            timeout = timeout.max(TO_UNIT * (crto & 0xffff) as u32);
        }
        let css = if self.cap.command_sets() {
            CC_CSS_ALL
        } else {
            0
        };
        self.cc = CC_EN | CC_ENTRY_SIZES | css | self.cap.page_field() << 7;
        set(channel, property::CC, self.cc, deadline, waiter)?;
        self.until(CSTS_RDY, CSTS_RDY, timeout, "ready", deadline, waiter)
    }

    /// Waits until `mask` of CSTS is `value`.
    fn until(
        &mut self,
        mask: u32,
        value: u32,
        timeout: Duration,
        what: &str,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<()> {
        // A controller that tells no time gets the shortest that can be told.
        let allowed = Instant::now() + timeout.max(TO_UNIT);
        let too_late = || {
            later(format!(
                "the controller was not {what} in time; it may take {} ms: give a longer connect-timeout",
                timeout.as_millis()
            ))
        };
        loop {
            let status = match get(&mut self.channel, property::CSTS, false, deadline, waiter) {
                // It was asked just before, and the answer may be on its way.
                Err(Trouble::Failed(_)) if Instant::now() >= deadline => return Err(too_late()),
                status => status? as u32,
            };
            if status & mask == value {
                return Ok(());
            }
            if status & CSTS_CFS != 0 && value != 0 {
                return Err(later(
                    "the controller has failed (CSTS.CFS); look at the target",
                ));
            }
            let now = Instant::now();
            if now >= allowed {
                return Err(later(format!(
                    "the controller was not {what} within the {} ms that it tells (CAP.TO); look at the target",
                    timeout.max(TO_UNIT).as_millis()
                )));
            }
            if now + READY_POLL >= deadline {
                return Err(too_late());
            }
            pause(READY_POLL, waiter)?;
        }
    }

    /// Checks what Identify Controller says (Base section 5.17.2.1, TCP section 3.3.1).
    fn check(&self, target: &Target) -> Result<()> {
        let it = &self.controller;
        let wrong = |what: String| Err(never(ErrorKind::Unsupported, what));
        if it.subnqn != target.subsystem {
            return wrong(format!(
                "the controller says that it is of the subsystem {:?}, not of {}",
                it.subnqn, target.subsystem
            ));
        }
        if it.cntlid != self.cntlid {
            return wrong(format!(
                "the controller says that it is number {}, and Connect said {}",
                it.cntlid, self.cntlid
            ));
        }
        if it.cntrltype > 1 {
            return wrong(format!(
                "the controller is not for I/O (CNTRLTYPE {}); give the subsystem's own NQN",
                it.cntrltype
            ));
        }
        if it.ioccsz < 4 || it.iorcsz < 1 {
            return wrong(format!(
                "the controller's capsules are too small (IOCCSZ {}, IORCSZ {})",
                it.ioccsz, it.iorcsz
            ));
        }
        if it.icdoff != 0 {
            return wrong(format!(
                "the controller wants in-capsule data at an offset (ICDOFF {})",
                it.icdoff
            ));
        }
        if it.kas == 0 && !target.options.keep_alive.is_zero() {
            return wrong(
                "the controller has no keep-alive timer (KAS 0); give keep-alive-tmo 0".to_owned(),
            );
        }
        if it.sqes & 0xf > 6 || it.cqes & 0xf > 4 {
            return wrong(format!(
                "the controller wants larger queue entries (SQES {:#x}, CQES {:#x})",
                it.sqes, it.cqes
            ));
        }
        if it
            .max_transfer(self.cap.page())
            .is_some_and(|bytes| bytes < 4096)
        {
            return wrong(
                "the controller transfers less than 4096 bytes a command (MDTS)".to_owned(),
            );
        }
        Ok(())
    }

    /// Sets the controller up for I/O, and reads what there is to know of it and of the namespace.
    pub(crate) fn ground(
        &mut self,
        target: &Target,
        name: &NamespaceName,
        queues: u16,
        deadline: Instant,
        waiter: &mut dyn Waiter,
    ) -> Result<Ground> {
        self.check(target)?;
        let granted = self.queues(queues, deadline, waiter)?;
        if granted < MIN_GRANTED {
            return Err(never(
                ErrorKind::Unsupported,
                format!(
                    "the controller grants only {granted} I/O queue; one for each worker is needed, and one more: let \
                     the target grant more"
                ),
            ));
        }
        self.events(deadline, waiter)?;
        let retry_delays = self.retry_delays(deadline, waiter)?;
        let mut reader = Reader {
            channel: &mut self.channel,
            waiter,
            deadline,
        };
        let facts = reader.find(name, &self.controller)?;
        let ask = self.version >= 2 << 16 || self.cap.command_sets();
        let (page, block) = (self.cap.page(), facts.geometry.block);
        let limits = reader.limits(&self.controller, page, block, retry_delays, ask)?;
        let mut entries = (u32::from(target.options.queue_depth) + 1).min(self.cap.queue_entries());
        if self.controller.maxcmd > 1 {
            entries = entries.min(self.controller.maxcmd.into());
        }
        Ok(Ground {
            facts,
            limits,
            granted,
            // FFFFh entries more than one are all that a depth of 16 bits has.
            entries: entries.clamp(2, 65_535),
            in_capsule: self.controller.in_capsule(),
        })
    }

    /// Number of Queues (Base section 5.27.1.5): how many of `wanted` are granted.
    fn queues(&mut self, wanted: u16, deadline: Instant, waiter: &mut dyn Waiter) -> Result<u16> {
        let number = u32::from(wanted.max(1) - 1);
        let sqe = Sqe::set_features(feature::NUMBER_OF_QUEUES, number << 16 | number);
        let end = self.channel.run(sqe, deadline, waiter);
        let end = succeeded(end?, "Set Features (Number of Queues)")?;
        // Submission queues in the lower half, completion queues in the upper one, both less one.
        let (sqs, cqs) = (end.result as u16, (end.result >> 16) as u16);
        Ok(sqs.min(cqs).saturating_add(1).min(wanted))
    }

    /// Asynchronous Event Configuration (Base section 5.27.1.8).
    fn events(&mut self, deadline: Instant, waiter: &mut dyn Waiter) -> Result<()> {
        let wanted = self.controller.oaes & (EVENT_NAMESPACE | EVENT_ANA);
        let sqe = Sqe::set_features(feature::ASYNC_EVENT_CONFIGURATION, wanted | 0x1f);
        let end = self.channel.run(sqe, deadline, waiter)?;
        if !end.status.is_success() {
            log::warn!(
                "the controller does not take the configuration of events: {}; changes of the namespace may go unnoticed",
                end.status
            );
        }
        Ok(())
    }

    /// Host Behavior Support (Base section 5.27.1.18): with ACRE set, a status may say when to retry. The delays.
    fn retry_delays(&mut self, deadline: Instant, waiter: &mut dyn Waiter) -> Result<[u16; 3]> {
        if self.controller.crdt == [0; 3] {
            return Ok([0; 3]);
        }
        let mut data = [0; 512];
        data[0] = 1;
        let sqe = Sqe::set_features(feature::HOST_BEHAVIOR_SUPPORT, 0);
        let end = self.channel.run_with(sqe, &data, deadline, waiter)?;
        Ok(match end.status.is_success() {
            true => self.controller.crdt,
            false => [0; 3],
        })
    }
}
