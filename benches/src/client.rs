//! The client: a vhost-user-blk device driven as a guest in poll mode would, and what it measures.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use vhost_user_frontend::process::{IoCounters, io_counters};
use vhost_user_frontend::protocol::feature;
use vhost_user_frontend::{Device, DeviceOptions, Notify, RegionSpec, SlotOptions};

use crate::lane::Lane;
use crate::pattern::Load;
use crate::proc::{self, Resident};

pub mod bursts;
pub mod sleeper;
pub mod startup;
pub mod steady;

/// What every measure needs to know.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// The backend's socket
    #[arg(long)]
    pub socket: PathBuf,
    /// The backend's process
    #[arg(long)]
    pub pid: u32,
    /// What to do
    #[arg(long, value_enum, default_value = "randread")]
    pub load: Load,
    /// Bytes a request
    #[arg(long, default_value_t = 4096)]
    pub block_size: u32,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 1)]
    pub depth: u16,
    /// Queues
    #[arg(long, default_value_t = 1)]
    pub queues: u16,
    /// Workers of the backend, for the record
    #[arg(long, default_value_t = 1)]
    pub workers: u32,
    /// Bytes at the start of the disk to use [default: all]
    #[arg(long)]
    pub span: Option<u64>,
    /// For firstwrite and firstread: bytes from one request to the next
    #[arg(long, default_value_t = 64 << 10)]
    pub stride: u64,
    /// A sequential load ends at the end of the span
    #[arg(long)]
    pub once: bool,
    /// Seconds to measure, at most
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Seconds to run before measuring
    #[arg(long, default_value_t = 0.5)]
    pub warm_up: f64,
    /// Seconds without any completion after which the backend counts as hung
    #[arg(long, default_value_t = 20)]
    pub patience: u64,
    /// Leave the CPU to others where there is nothing to take: for a client that shares it
    #[arg(long)]
    pub yields: bool,
    /// Put into the record
    #[arg(long, default_value = "")]
    pub subject: String,
    /// Put into the record
    #[arg(long, default_value = "")]
    pub layer: String,
    /// Put into the record [default: made from the load]
    #[arg(long)]
    pub name: Option<String>,
    /// Put into the record
    #[arg(long, default_value_t = 1)]
    pub run: u32,
}

impl Options {
    /// What the record calls the load, such as `randread-4k-qd32`.
    pub fn load_name(&self) -> String {
        let made = || {
            let kib = self.block_size / 1024;
            format!("{}-{kib}k-qd{}", self.load.name(), self.depth)
        };
        self.name.clone().unwrap_or_else(made)
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(self.patience)
    }
}

/// A connected device and its queues.
#[derive(Debug)]
pub struct Client {
    device: Device,
    lanes: Vec<Lane>,
    /// Bytes of the disk that each queue has to itself.
    part: u64,
}

impl Client {
    /// Connects, starts the queues, and fills their buffers.
    ///
    /// # Errors
    /// Those of the connection, and of options that the disk has no room for.
    pub fn connect(options: &Options) -> Result<Self, Box<dyn Error>> {
        let data = u64::from(options.depth) * (u64::from(options.block_size) + 4096);
        let memory = (u64::from(options.queues) * (data + (1 << 20))).next_multiple_of(2 << 20);
        let mut device = Device::start(
            &options.socket,
            DeviceOptions {
                // As a Linux guest with a polling driver: ring indices, and no interrupts.
                features: feature::LINUX,
                queues: options.queues,
                queue_size: 256,
                memory: vec![RegionSpec::new(0, memory)],
                slots: SlotOptions {
                    count: options.depth,
                    data_len: options.block_size,
                    indirect: true,
                    ..SlotOptions::default()
                },
                notify: Notify::Poll,
                timeout: options.patience(),
                ..DeviceOptions::default()
            },
        )?;
        let capacity = device.capacity();
        let span = options.span.unwrap_or(capacity);
        if span > capacity {
            return Err(
                format!("--span {span} is more than the disk has ({capacity} bytes)").into(),
            );
        }
        let mut lanes = Vec::new();
        let mut random = 0x1234_5678_9abc_def1_u64;
        for index in 0..usize::from(options.queues) {
            let features = device.features();
            let (block, writes) = (options.block_size, options.load.writes());
            let lane = Lane::new(device.split(index), features, options.depth, writes, block)?;
            fill(&lane, options.block_size, &mut random);
            lanes.push(lane);
        }
        // Each queue has a part of the span to itself, or sequential loads would not be sequential.
        let block = u64::from(options.block_size);
        Ok(Self {
            device,
            lanes,
            part: span / u64::from(options.queues) / block * block,
        })
    }

    /// Kicks that the backend asked for so far.
    fn kicks(&self) -> u64 {
        self.lanes.iter().map(Lane::kicks).sum()
    }

    /// Ends the session as a VM that is shut down.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn shut_down(mut self) -> Result<(), Box<dyn Error>> {
        Ok(self.device.shut_down()?)
    }

    /// Submits the one request of slot 0 and polls for its end; returns when it was found, and whether it is
    /// OK. Nothing else may be in flight.
    fn one(&mut self, offset: u64, patience: Duration) -> Result<(Instant, bool), Box<dyn Error>> {
        let lane = &mut self.lanes[0];
        let begin = Instant::now();
        lane.submit(0, offset);
        lane.publish();
        let mut spins = 0u32;
        while lane.ready() == 0 {
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins % 4096 == 0 && begin.elapsed() > patience {
                return Err(hangs(patience).into());
            }
        }
        let found = Instant::now();
        let done = lane.take()?;
        lane.publish();
        Ok((found, done.ok))
    }
}

fn hangs(patience: Duration) -> String {
    format!(
        "no completion in {} s: the backend hangs",
        patience.as_secs()
    )
}

/// Puts data into all slots that no layer below can find cheaper than other data.
fn fill(lane: &Lane, block_size: u32, random: &mut u64) {
    for slot in 0..lane.depth() {
        let to = lane.data_of(slot);
        for at in 0..block_size as usize {
            *random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // SAFETY: the slot's buffer has `block_size` bytes, and nothing is in flight.
            unsafe { to.add(at).write((*random >> 56) as u8) };
        }
    }
}

/// The state of all clocks and counters at a moment.
#[derive(Debug)]
pub struct Marks {
    /// When.
    pub at: Instant,
    cpu: Duration,
    client_waited: Duration,
    backend_waited: Duration,
    io: IoCounters,
    kicks: u64,
}

impl Marks {
    /// Now.
    ///
    /// # Errors
    /// When the backend's process is gone.
    pub fn take(pid: u32, client: &Client) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            cpu: proc::cpu_time(pid)?,
            client_waited: proc::waited(std::process::id()),
            backend_waited: proc::waited(pid),
            // Only the same user may look, and a peer may be another one's.
            io: io_counters(pid).unwrap_or_default(),
            kicks: client.kicks(),
            at: Instant::now(),
        })
    }

    /// Puts what happened since `start` into a record that has its requests.
    pub fn since(&self, start: &Self, pid: u32, record: &mut crate::record::Record) {
        let seconds = (self.at - start.at).as_secs_f64();
        let cpu = (self.cpu - start.cpu).as_secs_f64();
        let requests = record.requests as f64;
        let share = |now: Duration, then| now.saturating_sub(then).as_secs_f64() / seconds;
        record.seconds = seconds;
        record.iops = requests / seconds;
        record.backend_cpu_s = cpu;
        record.iops_per_cpu_s = if cpu > 0.0 { requests / cpu } else { 0.0 };
        record.kicks_per_request = (self.kicks - start.kicks) as f64 / requests.max(1.0);
        record.client_waited = share(self.client_waited, start.client_waited);
        record.backend_waited = share(self.backend_waited, start.backend_waited);
        record.read_bytes = self.io.read_bytes.saturating_sub(start.io.read_bytes);
        record.write_bytes = self.io.write_bytes.saturating_sub(start.io.write_bytes);
        record.rchar = self.io.rchar.saturating_sub(start.io.rchar);
        record.wchar = self.io.wchar.saturating_sub(start.io.wchar);
        record.resident = Resident::of(pid);
    }
}
