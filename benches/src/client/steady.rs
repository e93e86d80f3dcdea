//! A load that keeps all slots busy: warm-up, measured time, drain, flush.

use std::error::Error;
use std::time::{Duration, Instant};

use super::{Client, Marks, Options, hangs};
use crate::histogram::Histogram;
use crate::lane::Lane;
use crate::pattern::Pattern;
use crate::record::Record;

/// Turns without anything to take between two looks at the clock.
const SPINS: u32 = 32;

/// One queue's part of the load.
#[derive(Debug)]
pub(super) struct Stream {
    pattern: Pattern,
    /// When the request in each slot was submitted, in nanoseconds since the load began.
    started: Vec<u64>,
    pub(super) in_flight: u16,
}

impl Stream {
    /// One for each queue.
    pub(super) fn all(client: &Client, options: &Options) -> Result<Vec<Self>, Box<dyn Error>> {
        let one = |index: usize| {
            let seed = 77 + index as u64;
            let block = options.block_size.into();
            let pattern = Pattern::new(options.load, block, client.part, options.stride, seed)?;
            Some(Self {
                pattern: pattern.once(options.once),
                started: vec![0; usize::from(options.depth)],
                in_flight: 0,
            })
        };
        (0..client.lanes.len())
            .map(|index| one(index).ok_or_else(|| "no room for one block on each queue".into()))
            .collect()
    }

    /// Submits a request in a free slot, if the pattern has one more.
    #[inline]
    pub(super) fn submit(&mut self, lane: &mut Lane, slot: u16, now: u64) {
        if let Some(offset) = self.pattern.offset() {
            lane.submit(slot, offset);
            self.started[usize::from(slot)] = now;
            self.in_flight += 1;
        }
    }

    /// Takes one completion.
    #[inline]
    pub(super) fn take(
        &mut self,
        lane: &mut Lane,
        now: u64,
        tally: &mut Tally,
    ) -> Result<u16, String> {
        let done = lane.take()?;
        self.in_flight -= 1;
        tally.errors += u64::from(!done.ok);
        tally
            .latencies
            .record(now - self.started[usize::from(done.slot)]);
        Ok(done.slot)
    }
}

/// What was counted.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) latencies: Histogram,
    pub(super) errors: u64,
    /// Nanoseconds in which the client had something to do.
    pub(super) busy: u64,
}

impl Tally {
    /// The record of all this.
    pub(super) fn record(
        &self,
        options: &Options,
        client: &Client,
        start: &Marks,
    ) -> Result<Record, Box<dyn Error>> {
        let us = |nanoseconds: u64| nanoseconds as f64 / 1e3;
        let end = Marks::take(options.pid, client)?;
        let requests = self.latencies.count();
        let mut record = Record {
            subject: options.subject.clone(),
            layer: options.layer.clone(),
            load: options.load_name(),
            run: options.run,
            block_size: options.block_size.into(),
            depth: u32::from(options.depth) * u32::from(options.queues),
            queues: options.queues.into(),
            workers: options.workers,
            requests,
            mean_us: self.latencies.mean() / 1e3,
            p50_us: us(self.latencies.quantile(0.5)),
            p99_us: us(self.latencies.quantile(0.99)),
            p999_us: us(self.latencies.quantile(0.999)),
            client_ns: self.busy as f64 / requests.max(1) as f64,
            ..Record::default()
        };
        end.since(start, options.pid, &mut record);
        record.client_busy = self.busy as f64 / 1e9 / record.seconds;
        Ok(record)
    }
}

/// Runs the load.
///
/// # Errors
/// When the backend hangs, goes away or breaks the ring. Requests that fail are counted.
pub fn run(options: &Options, client: &mut Client) -> Result<Record, Box<dyn Error>> {
    let mut streams = Stream::all(client, options)?;
    let mut tally = Tally::default();
    // A load that ends is measured from its first request.
    let ends = options.load.ends() || options.once;
    let warm_up = Duration::from_secs_f64(if ends { 0.0 } else { options.warm_up });
    let seconds = Duration::from_secs_f64(options.seconds).as_nanos() as u64;
    let patience = options.patience().as_nanos() as u64;

    let mut start = Marks::take(options.pid, client)?;
    let origin = start.at;
    let clock = || origin.elapsed().as_nanos() as u64;
    let mut measuring = warm_up.is_zero();
    let mut until = if measuring {
        seconds
    } else {
        warm_up.as_nanos() as u64
    };
    let mut last = 0;
    for (stream, lane) in streams.iter_mut().zip(&mut client.lanes) {
        for slot in 0..options.depth {
            stream.submit(lane, slot, last);
        }
        lane.publish();
    }

    let mut spins = 0;
    // Since when the client is busy.
    let mut busy_since = None;
    loop {
        let mut idle = true;
        for (stream, lane) in streams.iter_mut().zip(&mut client.lanes) {
            let ready = lane.ready();
            if ready == 0 {
                continue;
            }
            // One reading of the clock for all completions that are there at once; it also ends the turn
            // before, if nothing else did.
            let now = clock();
            if let Some(since) = busy_since.replace(now) {
                tally.busy += now - since;
            }
            for _ in 0..ready {
                let slot = stream.take(lane, now, &mut tally)?;
                stream.submit(lane, slot, now);
            }
            lane.publish();
            last = now;
            idle = false;
        }
        if idle {
            match options.yields {
                true => std::thread::yield_now(),
                false => std::hint::spin_loop(),
            }
            spins += 1;
            if busy_since.is_none() && spins % SPINS != 0 && !options.yields {
                continue;
            }
            let now = clock();
            if let Some(since) = busy_since.take() {
                tally.busy += now - since;
                spins = 0;
            }
            if now - last > patience {
                return Err(hangs(options.patience()).into());
            }
            // A load that is over has nothing more to come.
            if now < until && streams.iter().any(|stream| stream.in_flight > 0) {
                continue;
            }
        } else if last < until {
            continue;
        }
        if measuring {
            break;
        }
        measuring = true;
        start = Marks::take(options.pid, client)?;
        tally.latencies.clear();
        tally.busy = 0;
        busy_since = None;
        until = clock() + seconds;
    }
    let mut record = tally.record(options, client, &start)?;
    drain(client, &mut streams, &mut tally, options, clock)?;
    record.errors = tally.errors;
    if options.load.writes() {
        client.lanes[0].make_flush();
        let begin = Instant::now();
        let (end, ok) = client.one(0, options.patience())?;
        record.errors += u64::from(!ok);
        record.flush_ms = (end - begin).as_secs_f64() * 1e3;
    }
    Ok(record)
}

/// Takes everything that is in flight.
pub(super) fn drain(
    client: &mut Client,
    streams: &mut [Stream],
    tally: &mut Tally,
    options: &Options,
    clock: impl Fn() -> u64,
) -> Result<(), Box<dyn Error>> {
    let begin = Instant::now();
    for (stream, lane) in streams.iter_mut().zip(&mut client.lanes) {
        while stream.in_flight > 0 {
            while lane.ready() > 0 {
                stream.take(lane, clock(), tally)?;
            }
            std::hint::spin_loop();
            if begin.elapsed() > options.patience() {
                return Err(hangs(options.patience()).into());
            }
        }
        lane.publish();
    }
    Ok(())
}
