//! A block device over vhost-user, from the connection to synchronous reads and writes: what a VMM and a guest
//! do together.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::blk::{CONFIG_LEN, Config, Segment, status};
use crate::blk_queue::{BlkQueue, Completion, Op, SlotOptions};
use crate::client::{Client, DEFAULT_TIMEOUT};
use crate::error::{Error, Result};
use crate::memory::{Memory, RegionSpec};
use crate::message::Inflight;
use crate::postcopy::PageServer;
use crate::protocol::{feature, protocol_feature};
use crate::ring::{Notify, Virtqueue};

/// How a device is negotiated and laid out.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// Virtio features to acknowledge where they are offered.
    pub features: u64,
    /// Protocol features to acknowledge where they are offered.
    pub protocol_features: u64,
    /// Queues to start.
    pub queues: u16,
    /// Descriptors a queue.
    pub queue_size: u16,
    /// Guest memory.
    pub memory: Vec<RegionSpec>,
    /// Guest memory is in huge pages.
    pub huge_pages: bool,
    /// Hand the memory over region by region (ADD_MEM_REG) instead of with SET_MEM_TABLE.
    pub memory_slots: bool,
    /// Request slots of each queue.
    pub slots: SlotOptions,
    /// How completions are waited for.
    pub notify: Notify,
    /// Give the backend no kick descriptor: it is to poll.
    pub kick_fd: bool,
    /// Use packed rings; it is an error when they are not offered.
    pub packed: bool,
    /// Keep the requests in flight in memory that outlives the backend, where that is offered.
    pub inflight: bool,
    /// Deadline of each answer and each request.
    pub timeout: Duration,
}

impl Default for DeviceOptions {
    fn default() -> Self {
        Self {
            features: feature::LINUX,
            protocol_features: protocol_feature::USUAL,
            queues: 1,
            queue_size: 128,
            // Below and above the hole under 4 GiB, as a PC has it.
            memory: vec![
                RegionSpec::new(0, 16 << 20),
                RegionSpec::new(1 << 32, 16 << 20).at_offset(64 << 10),
            ],
            huge_pages: false,
            memory_slots: false,
            slots: SlotOptions::default(),
            notify: Notify::Call,
            kick_fd: true,
            packed: false,
            inflight: true,
            timeout: DEFAULT_TIMEOUT,
        }
    }
}

/// A device: a connection, guest memory, and its queues.
#[derive(Debug)]
pub struct Device {
    path: PathBuf,
    options: DeviceOptions,
    client: Option<Client>,
    /// Guest memory.
    pub memory: Memory,
    queues: Vec<BlkQueue>,
    offered: u64,
    features: u64,
    protocol_features: u64,
    config: Config,
    postcopy: Option<PageServer>,
    /// The inflight region: from the first start of the rings to the next reset of the device.
    inflight: Option<Inflight>,
    /// Where each ring goes on, as a VMM knows it: from the driver's start of it, or from its last stop.
    bases: Vec<u32>,
}

impl Device {
    /// Connects, negotiates, shares the memory, and starts all queues.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn start(path: &Path, options: DeviceOptions) -> Result<Self> {
        let mut device = Self::negotiate(path, options)?;
        device.start_queues()?;
        Ok(device)
    }

    /// Connects, negotiates and shares the memory; queues are made but not started.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn negotiate(path: &Path, options: DeviceOptions) -> Result<Self> {
        let memory = if options.huge_pages {
            Memory::huge(&options.memory)?
        } else {
            Memory::new(&options.memory)?
        };
        let mut device = Self {
            path: path.to_owned(),
            client: None,
            memory,
            queues: Vec::new(),
            offered: 0,
            features: 0,
            protocol_features: 0,
            config: Config::default(),
            postcopy: None,
            inflight: None,
            bases: Vec::new(),
            options,
        };
        device.handshake()?;
        device.make_queues()?;
        Ok(device)
    }

    /// Connects and asks the first question. A backend that has not yet noticed the end of the connection
    /// before turns the next one away; VMMs try again then, and so does this.
    fn connect(&self) -> Result<(Client, u64)> {
        let deadline = Instant::now() + self.options.timeout;
        loop {
            let client = Client::connect_within(&self.path, self.options.timeout)?;
            client.set_timeout(self.options.timeout)?;
            match client.get_features() {
                Ok(offered) => return Ok((client, offered)),
                Err(Error::Closed) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// What QEMU does at a new connection, in its order.
    fn handshake(&mut self) -> Result<()> {
        let (mut client, offered) = self.connect()?;
        self.offered = offered;
        self.protocol_features = 0;
        if self.offered & feature::PROTOCOL_FEATURES != 0 {
            self.protocol_features =
                client.get_protocol_features()? & self.options.protocol_features;
            client.set_protocol_features(self.protocol_features)?;
        }
        if self.protocol_features & protocol_feature::MQ != 0 {
            let offered = client.get_queue_num()?;
            if offered < u64::from(self.options.queues) {
                return Err(Error::Protocol(format!(
                    "{} queues were asked for, {offered} are offered",
                    self.options.queues
                )));
            }
        }
        client.set_owner()?;
        let mut wanted = self.options.features | feature::PROTOCOL_FEATURES;
        if self.options.packed {
            wanted |= feature::RING_PACKED;
            if self.offered & feature::RING_PACKED == 0 {
                return Err(Error::Protocol("packed rings are not offered".into()));
            }
        }
        self.features = self.offered & wanted;
        client.set_features(self.features)?;
        if self.protocol_features & protocol_feature::CONFIG != 0 {
            self.config = Config::parse(&client.get_config(0, CONFIG_LEN)?);
        }
        // At the start of a device QEMU does this before it shares the memory.
        if let Some(region) = &self.inflight {
            client.set_inflight_fd(region)?;
        }
        if self.postcopy.is_some() {
            // Shared when the incoming migration listens.
        } else if self.options.memory_slots {
            for region in self.memory.regions() {
                client.add_mem_reg(region)?;
            }
        } else {
            client.set_mem_table(&self.memory)?;
        }
        self.client = Some(client);
        Ok(())
    }

    fn make_queues(&mut self) -> Result<()> {
        for _ in 0..self.options.queues {
            let ring = Virtqueue::new(&self.memory, self.options.queue_size, self.options.packed)?;
            let ring = self.negotiated(ring);
            let mut slots = self.options.slots;
            slots.indirect &= self.features & feature::INDIRECT_DESC != 0;
            self.bases.push(ring.base());
            self.queues.push(BlkQueue::new(&self.memory, ring, slots));
        }
        Ok(())
    }

    /// Sets a ring up as it was negotiated.
    fn negotiated(&self, mut ring: Virtqueue) -> Virtqueue {
        ring.set_event_idx(self.features & feature::EVENT_IDX != 0);
        ring.set_notify(self.options.notify);
        ring
    }

    /// Puts a new, empty ring in the place of a queue's, as a driver does after a reset. The queue must be
    /// stopped.
    pub fn replace_ring(&mut self, index: usize, ring: Virtqueue) {
        let ring = self.negotiated(ring);
        self.queues[index].ring = ring;
        self.reset_queue(index);
    }

    /// Starts every queue where its ring stands.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn start_queues(&mut self) -> Result<()> {
        self.share_inflight()?;
        for index in 0..self.queues.len() {
            let base = self.queues[index].ring.base();
            self.start_queue(index, base)?;
        }
        Ok(())
    }

    /// What QEMU does with the inflight region at each start: it asks for one where it has none, and gives the
    /// one that it has.
    fn share_inflight(&mut self) -> Result<()> {
        if !self.options.inflight || self.protocol_features & protocol_feature::INFLIGHT_SHMFD == 0
        {
            return Ok(());
        }
        let client = self.client.as_ref().ok_or(Error::Closed)?;
        if self.inflight.is_none() {
            let region = client.get_inflight_fd(self.options.queues, self.options.queue_size)?;
            self.inflight = Some(region);
        }
        match &self.inflight {
            Some(region) => client.set_inflight_fd(region),
            None => Ok(()),
        }
    }

    /// The inflight region that is kept.
    pub fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_ref()
    }

    /// Keeps another inflight region, or none; the backend hears of it at the next start.
    pub fn set_inflight(&mut self, region: Option<Inflight>) -> Option<Inflight> {
        std::mem::replace(&mut self.inflight, region)
    }

    /// Gives the backend one ring, to go on at `base` (split: an available index; packed: 16 bits where to look
    /// next and 16 bits where to write next), and enables it.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn start_queue(&mut self, index: usize, base: u32) -> Result<()> {
        self.bases[index] = base;
        let ring = &self.queues[index].ring;
        let client = self.client.as_ref().ok_or(Error::Closed)?;
        let i = index as u32;
        client.set_vring_num(i, u32::from(ring.size()))?;
        client.set_vring_base(i, base)?;
        client.set_vring_addr(i, &ring.vring_addr(0))?;
        client.set_vring_err(i, Some(ring.err_fd().raw()))?;
        let kick = self.options.kick_fd.then(|| ring.kick_fd().raw());
        client.set_vring_kick(i, kick)?;
        client.set_vring_call(i, Some(ring.call_fd().raw()))?;
        if self.features & feature::PROTOCOL_FEATURES != 0 {
            client.set_vring_enable(i, true)?;
        }
        // A ring starts with its first kick; this side may find requests in it from an earlier session.
        if self.options.kick_fd {
            self.queues[index].ring.kick();
        }
        Ok(())
    }

    /// Stops one ring; returns where it would go on.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn stop_queue(&mut self, index: usize) -> Result<u32> {
        let base = self.client()?.get_vring_base(index as u32)?;
        self.bases[index] = base;
        Ok(base)
    }

    /// What a reset of the device by its driver is to the backend: all rings stop, the inflight region is
    /// dropped. Rings are cleared, and start again with [`Device::start_queues`].
    ///
    /// # Errors
    /// Those of the messages.
    pub fn reset(&mut self) -> Result<()> {
        for index in 0..self.queues.len() {
            self.stop_queue(index)?;
        }
        self.inflight = None;
        for index in 0..self.queues.len() {
            self.reset_queue(index);
        }
        Ok(())
    }

    fn reset_queue(&mut self, index: usize) {
        self.queues[index].reset();
        self.bases[index] = self.queues[index].ring.base();
    }

    /// Stops all rings and disconnects, as a VM that is shut down.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn shut_down(&mut self) -> Result<()> {
        for index in 0..self.queues.len() {
            self.stop_queue(index)?;
        }
        self.disconnect();
        Ok(())
    }

    /// Closes the connection, whatever is in flight.
    pub fn disconnect(&mut self) {
        self.client = None;
    }

    /// Connects and negotiates again with the same memory. Rings are cleared and started from zero: requests
    /// in flight are forgotten.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn reconnect(&mut self) -> Result<()> {
        self.disconnect();
        self.inflight = None;
        self.handshake()?;
        for index in 0..self.queues.len() {
            self.reset_queue(index);
        }
        self.start_queues()
    }

    /// What QEMU does after its backend went away: it connects and negotiates again, hands the inflight region
    /// over, and starts the rings. Split ones at their used index, so that without a region what was not
    /// completed is taken up again, which is right only where nothing was completed out of order. Packed ones
    /// where they were started last, since nothing in memory tells better (QEMU's
    /// `virtio_queue_restore_last_avail_idx`).
    ///
    /// # Errors
    /// Those of the messages.
    pub fn resume(&mut self) -> Result<()> {
        self.disconnect();
        self.handshake()?;
        if self.inflight.is_none() {
            self.share_inflight()?;
        }
        for index in 0..self.queues.len() {
            let base = match &self.queues[index].ring {
                Virtqueue::Split(ring) => u32::from(ring.used_idx()),
                Virtqueue::Packed(_) => self.bases[index],
            };
            self.start_queue(index, base)?;
        }
        Ok(())
    }

    /// Moves the VM by postcopy to the backend at `path`: stops the rings, takes every page away, connects there, and
    /// starts the rings with no page present. From here on [`Device::pages`] brings what this side and the backend
    /// touch.
    ///
    /// # Errors
    /// Those of the messages; `Protocol` when the backend has no userfaultfd.
    pub fn move_by_postcopy(&mut self, path: &Path) -> Result<()> {
        for index in 0..self.queues.len() {
            self.stop_queue(index)?;
        }
        self.disconnect();
        path.clone_into(&mut self.path);
        self.options.protocol_features |= protocol_feature::PAGEFAULT;
        self.postcopy = Some(PageServer::new(&self.memory)?);
        self.handshake()?;
        let client = self.client.as_ref().ok_or(Error::Closed)?;
        let userfault = client.postcopy_advise()?;
        let userfault = userfault.ok_or_else(|| Error::Protocol("no userfaultfd came".into()))?;
        client.postcopy_listen()?;
        let bases = self.memory.regions().iter();
        let bases = bases.map(|region| client.add_mem_reg_postcopy(region));
        let bases = bases.collect::<Result<Vec<_>>>()?;
        if let Some(pages) = &mut self.postcopy {
            pages.serve(userfault, &bases)?;
        }
        client.postcopy_ready()?;
        // Where the rings stand is known without touching them.
        for index in 0..self.queues.len() {
            let base = self.queues[index].ring.base();
            self.start_queue(index, base)?;
        }
        Ok(())
    }

    /// Who brings pages, after [`Device::move_by_postcopy`].
    ///
    /// # Panics
    /// When there was no such move.
    pub fn pages(&mut self) -> &mut PageServer {
        self.postcopy.as_mut().expect("a postcopy migration")
    }

    /// Brings all pages that are still missing, and ends the migration.
    ///
    /// # Errors
    /// Those of the messages.
    ///
    /// # Panics
    /// When there is no migration.
    pub fn end_postcopy(&mut self) -> Result<()> {
        let mut pages = self.postcopy.take().expect("a postcopy migration");
        pages.bring_all()?;
        self.client()?.postcopy_end()?;
        pages.stop();
        Ok(())
    }

    /// The connection.
    ///
    /// # Errors
    /// `Closed` after [`Device::disconnect`].
    pub fn client(&self) -> Result<&Client> {
        self.client.as_ref().ok_or(Error::Closed)
    }

    /// One queue.
    ///
    /// # Panics
    /// When there is none of that index.
    pub fn queue(&mut self, index: usize) -> &mut BlkQueue {
        &mut self.queues[index]
    }

    /// All queues, to hand them to threads.
    pub fn queues_mut(&mut self) -> &mut [BlkQueue] {
        &mut self.queues
    }

    /// Memory and one queue at once.
    ///
    /// # Panics
    /// When there is none of that index.
    pub fn split(&mut self, index: usize) -> (&Memory, &mut BlkQueue) {
        (&self.memory, &mut self.queues[index])
    }

    /// The options the device was made with.
    pub fn options(&self) -> &DeviceOptions {
        &self.options
    }

    /// All features the backend offers.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// The features in force.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features in force.
    pub fn protocol_features(&self) -> u64 {
        self.protocol_features
    }

    /// The configuration space as it was at the connection.
    pub fn config(&self) -> Config {
        self.config
    }

    /// The configuration space as it is now.
    ///
    /// # Errors
    /// Those of GET_CONFIG.
    pub fn read_config(&self) -> Result<Config> {
        Ok(Config::parse(&self.client()?.get_config(0, CONFIG_LEN)?))
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> u64 {
        self.config.capacity * crate::blk::SECTOR
    }

    /// One request on queue `index`, from submission to completion, and the data it read.
    ///
    /// # Errors
    /// Those of [`BlkQueue::run`]; a status other than OK is not an error here.
    pub fn run_on(&mut self, index: usize, op: Op<'_>) -> Result<(Completion, Vec<u8>)> {
        let timeout = self.options.timeout;
        self.queues[index].run(op, timeout)
    }

    /// [`Device::run_on`] queue 0.
    ///
    /// # Errors
    /// Those of [`BlkQueue::run`].
    pub fn run(&mut self, op: Op<'_>) -> Result<(Completion, Vec<u8>)> {
        self.run_on(0, op)
    }

    fn run_ok(&mut self, op: Op<'_>) -> Result<Vec<u8>> {
        match self.run(op)? {
            (c, data) if c.status == status::OK => Ok(data),
            (c, _) => Err(Error::Status(c.status)),
        }
    }

    /// Reads `len` bytes at a sector.
    ///
    /// # Errors
    /// `Status` when the request failed, and those of [`Device::run`].
    pub fn read(&mut self, sector: u64, len: u32) -> Result<Vec<u8>> {
        self.run_ok(Op::Read { sector, len })
    }

    /// Writes at a sector.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        self.run_ok(Op::Write { sector, data }).map(drop)
    }

    /// Flushes.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn flush(&mut self) -> Result<()> {
        self.run_ok(Op::Flush).map(drop)
    }

    /// The ID string, all 20 bytes.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn get_id(&mut self) -> Result<Vec<u8>> {
        self.run_ok(Op::GetId)
    }

    /// Discards ranges.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn discard(&mut self, segments: &[Segment]) -> Result<()> {
        self.run_ok(Op::Discard(segments)).map(drop)
    }

    /// Writes zeroes to ranges.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn write_zeroes(&mut self, segments: &[Segment]) -> Result<()> {
        self.run_ok(Op::WriteZeroes(segments)).map(drop)
    }
}
