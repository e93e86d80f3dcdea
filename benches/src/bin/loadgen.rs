//! Drives a vhost-user-blk backend as a guest in poll mode would, and prints a JSON line of what came out.
//!
//! One thread drives all queues. In steady state a request allocates nothing, copies nothing and makes no
//! system call but the kick that the backend asks for.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use vhost_user_frontend::blk::{SECTOR, status};
use vhost_user_frontend::protocol::feature;
use vhost_user_frontend::{
    BlkQueue, Device, DeviceOptions, Notify, Op, RegionSpec, SlotOptions, process,
};
use virtioblkd_bench::histogram::Histogram;
use virtioblkd_bench::pattern::{Load, Pattern};
use virtioblkd_bench::proc;
use virtioblkd_bench::record::Record;

/// Drive a vhost-user-blk backend and measure it
#[derive(Debug, Parser)]
struct Args {
    /// The backend's socket
    #[arg(long)]
    socket: PathBuf,
    /// The backend's process
    #[arg(long)]
    pid: u32,
    /// What to do
    #[arg(long, value_enum)]
    load: Load,
    /// Bytes a request
    #[arg(long, default_value_t = 4096)]
    block_size: u32,
    /// Requests in flight on each queue
    #[arg(long, default_value_t = 1)]
    depth: u16,
    /// Queues
    #[arg(long, default_value_t = 1)]
    queues: u16,
    /// Bytes at the start of the disk to use [default: all]
    #[arg(long)]
    span: Option<u64>,
    /// For firstwrite: bytes from one write to the next
    #[arg(long, default_value_t = 64 << 10)]
    stride: u64,
    /// Seconds to measure, at most
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Seconds to run before measuring
    #[arg(long, default_value_t = 0.5)]
    warm_up: f64,
    /// Seconds without any completion after which the backend counts as hung
    #[arg(long, default_value_t = 20)]
    patience: u64,
    /// Leave the CPU to others where there is nothing to take: for a client that shares it
    #[arg(long)]
    yields: bool,
    /// Put into the record
    #[arg(long, default_value = "")]
    subject: String,
    /// Put into the record
    #[arg(long, default_value = "")]
    layer: String,
    /// Put into the record [default: made from the load]
    #[arg(long)]
    name: Option<String>,
    /// Put into the record
    #[arg(long, default_value_t = 1)]
    run: u32,
}

/// Totals of what ran, and the state of its clocks at the start of the measured time.
struct Marks {
    at: Instant,
    cpu: Duration,
    client_waited: Duration,
    backend_waited: Duration,
    kicks: u64,
}

impl Marks {
    fn take(pid: u32, device: &mut Device) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            cpu: process::cpu_time(pid)?,
            client_waited: proc::waited(std::process::id()),
            backend_waited: proc::waited(pid),
            kicks: device
                .queues_mut()
                .iter()
                .map(|queue| queue.ring.kicks())
                .sum(),
            at: Instant::now(),
        })
    }
}

/// One queue being driven.
struct Lane {
    pattern: Pattern,
    /// When the request in each slot was submitted.
    started: Vec<Instant>,
    in_flight: u32,
    ended: bool,
}

impl Lane {
    /// Submits one request, if the pattern has one.
    fn submit(
        &mut self,
        queue: &mut BlkQueue,
        args: &Args,
        now: Instant,
    ) -> vhost_user_frontend::Result<()> {
        let Some(offset) = self.pattern.offset() else {
            self.ended = true;
            return Ok(());
        };
        let sector = offset / SECTOR;
        let op = if args.load.writes() {
            Op::WriteInPlace {
                sector,
                len: args.block_size,
            }
        } else {
            Op::Read {
                sector,
                len: args.block_size,
            }
        };
        let slot = queue.submit(op, 0)?;
        self.started[usize::from(slot)] = now;
        self.in_flight += 1;
        Ok(())
    }
}

fn main() {
    if let Err(error) = run(&Args::parse()) {
        eprintln!("loadgen: {error}");
        std::process::exit(1);
    }
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let data = u64::from(args.depth) * (u64::from(args.block_size) + 4096);
    let memory = (u64::from(args.queues) * (data + (1 << 20))).next_multiple_of(2 << 20);
    let mut device = Device::start(
        &args.socket,
        DeviceOptions {
            // As a Linux guest with a polling driver: ring indices, and no interrupts.
            features: feature::LINUX,
            queues: args.queues,
            queue_size: 256,
            memory: vec![RegionSpec::new(0, memory)],
            slots: SlotOptions {
                count: args.depth,
                data_len: args.block_size,
                indirect: true,
                ..SlotOptions::default()
            },
            notify: Notify::Poll,
            timeout: Duration::from_secs(args.patience),
            ..DeviceOptions::default()
        },
    )?;
    let capacity = device.capacity();
    let span = args.span.unwrap_or(capacity);
    if span > capacity {
        return Err(format!("--span {span} is more than the disk has ({capacity} bytes)").into());
    }
    fill(&mut device, args);

    // Each queue has a part of the span to itself, or sequential loads would not be sequential.
    let part =
        span / u64::from(args.queues) / u64::from(args.block_size) * u64::from(args.block_size);
    let mut lanes = Vec::new();
    for i in 0..u64::from(args.queues) {
        let pattern = Pattern::new(args.load, args.block_size.into(), part, args.stride, 77 + i)
            .ok_or("--span has no room for one block on each queue")?;
        lanes.push(Lane {
            pattern,
            started: vec![Instant::now(); usize::from(args.depth)],
            in_flight: 0,
            ended: false,
        });
    }
    let record = measure(args, &mut device, &mut lanes)?;
    device.shut_down()?;
    println!("{}", serde_json::to_string(&record)?);
    if record.errors > 0 {
        return Err(format!("{} requests failed", record.errors).into());
    }
    Ok(())
}

/// Puts data into all slots that no layer below can find cheaper than other data.
fn fill(device: &mut Device, args: &Args) {
    let mut random = 0x1234_5678_9abc_def1_u64;
    for queue in device.queues_mut() {
        for slot in 0..args.depth {
            let to = queue.data_ptr(slot, args.block_size);
            for at in 0..args.block_size as usize {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                // SAFETY: the slot's buffer has `block_size` bytes, and nothing is in flight.
                unsafe { to.add(at).write((random >> 56) as u8) };
            }
        }
    }
}

/// Runs the load: warm-up, measured time, drain.
fn measure(args: &Args, device: &mut Device, lanes: &mut [Lane]) -> Result<Record, Box<dyn Error>> {
    let mut latencies = Histogram::default();
    let mut errors = 0;
    // A load that ends must be measured from its first request.
    let finite = args.load == Load::Firstwrite;
    let warm_up = Duration::from_secs_f64(if finite { 0.0 } else { args.warm_up });
    let seconds = Duration::from_secs_f64(args.seconds);
    let patience = Duration::from_secs(args.patience);

    let mut start = Marks::take(args.pid, device)?;
    let mut measuring = warm_up.is_zero();
    let mut until = start.at + if measuring { seconds } else { warm_up };
    let mut last = start.at;
    for (i, lane) in lanes.iter_mut().enumerate() {
        for _ in 0..args.depth {
            lane.submit(device.queue(i), args, last)?;
        }
        device.queue(i).ring.publish();
    }

    loop {
        let mut idle = true;
        for (i, lane) in lanes.iter_mut().enumerate() {
            let queue = device.queue(i);
            let mut now = None;
            while let Some(done) = queue.poll()? {
                // One reading of the clock for all completions that are there at once.
                let now = *now.get_or_insert_with(Instant::now);
                latencies.record((now - lane.started[usize::from(done.slot)]).as_nanos() as u64);
                errors += u64::from(done.status != status::OK);
                queue.release(done);
                lane.in_flight -= 1;
                lane.submit(queue, args, now)?;
            }
            if let Some(now) = now {
                queue.ring.publish();
                last = now;
                idle = false;
            }
        }
        if idle {
            match args.yields {
                true => std::thread::yield_now(),
                false => std::hint::spin_loop(),
            }
            let now = Instant::now();
            if now - last > patience {
                return Err(
                    format!("no completion in {} s: the backend hangs", args.patience).into(),
                );
            }
            // A load that is over has nothing more to come.
            if now < until && lanes.iter().any(|lane| lane.in_flight > 0) {
                continue;
            }
        } else if last < until {
            continue;
        }
        if measuring {
            break;
        }
        measuring = true;
        latencies.clear();
        start = Marks::take(args.pid, device)?;
        until = start.at + seconds;
        last = start.at;
    }
    let end = Marks::take(args.pid, device)?;
    let requests = latencies.count();

    for (i, lane) in lanes.iter_mut().enumerate() {
        while lane.in_flight > 0 {
            let done = device.queue(i).wait(patience)?;
            errors += u64::from(done.status != status::OK);
            device.queue(i).release(done);
            lane.in_flight -= 1;
        }
    }
    let mut flush_ms = 0.0;
    if args.load.writes() {
        let begin = Instant::now();
        device.flush()?;
        flush_ms = begin.elapsed().as_secs_f64() * 1e3;
    }

    let elapsed = (end.at - start.at).as_secs_f64();
    let cpu = (end.cpu - start.cpu).as_secs_f64();
    let us = |nanoseconds: u64| nanoseconds as f64 / 1e3;
    let share = |time: Duration| time.as_secs_f64() / elapsed;
    Ok(Record {
        subject: args.subject.clone(),
        layer: args.layer.clone(),
        load: args.name.clone().unwrap_or_else(|| load_name(args)),
        run: args.run,
        block_size: args.block_size.into(),
        depth: u32::from(args.depth) * u32::from(args.queues),
        queues: args.queues.into(),
        seconds: elapsed,
        requests,
        errors,
        iops: requests as f64 / elapsed,
        mean_us: latencies.mean() / 1e3,
        p50_us: us(latencies.quantile(0.5)),
        p99_us: us(latencies.quantile(0.99)),
        p999_us: us(latencies.quantile(0.999)),
        flush_ms,
        backend_cpu_s: cpu,
        iops_per_cpu_s: if cpu > 0.0 {
            requests as f64 / cpu
        } else {
            0.0
        },
        kicks_per_request: (end.kicks - start.kicks) as f64 / requests.max(1) as f64,
        client_waited: share(end.client_waited.saturating_sub(start.client_waited)),
        backend_waited: share(end.backend_waited.saturating_sub(start.backend_waited)),
    })
}

/// Such as `randread-4k-qd32`.
fn load_name(args: &Args) -> String {
    let load = format!("{:?}", args.load).to_lowercase();
    format!("{load}-{}k-qd{}", args.block_size / 1024, args.depth)
}
