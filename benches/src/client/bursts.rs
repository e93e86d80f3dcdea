//! A load that comes and goes: all slots are kept busy for a while, then nothing is sent for a while.

use std::error::Error;
use std::time::{Duration, Instant};

use super::steady::{Stream, Tally, drain};
use super::{Client, Marks, Options, hangs};
use crate::record::Record;

/// Bursts of `on`, a burst each `on + off`, for the measured seconds of the options.
///
/// # Errors
/// As [`super::steady::run`].
pub fn run(
    options: &Options,
    client: &mut Client,
    on: Duration,
    off: Duration,
) -> Result<Record, Box<dyn Error>> {
    let mut streams = Stream::all(client, options)?;
    let period = on + off;
    let bursts = |seconds: f64| (seconds / period.as_secs_f64()).ceil().max(1.0) as u32;
    let warm_up = bursts(options.warm_up);
    let all = warm_up + bursts(options.seconds);
    let mut tally = Tally::default();
    let mut start = Marks::take(options.pid, client)?;
    let origin = Instant::now();
    let clock = || origin.elapsed().as_nanos() as u64;
    for burst in 0..all {
        let begin = origin + period * burst;
        std::thread::sleep(begin.saturating_duration_since(Instant::now()));
        if burst == warm_up {
            tally = Tally {
                errors: tally.errors,
                ..Tally::default()
            };
            start = Marks::take(options.pid, client)?;
        }
        let now = clock();
        for (stream, lane) in streams.iter_mut().zip(&mut client.lanes) {
            for slot in 0..options.depth {
                stream.submit(lane, slot, now);
            }
            lane.publish();
        }
        let until = now + on.as_nanos() as u64;
        let mut last = now;
        'on: loop {
            for (stream, lane) in streams.iter_mut().zip(&mut client.lanes) {
                let now = clock();
                if now >= until {
                    break 'on;
                }
                if now - last > options.patience().as_nanos() as u64 {
                    return Err(hangs(options.patience()).into());
                }
                let ready = lane.ready();
                for _ in 0..ready {
                    let slot = stream.take(lane, now, &mut tally)?;
                    stream.submit(lane, slot, now);
                }
                if ready > 0 {
                    lane.publish();
                    last = now;
                }
                std::hint::spin_loop();
            }
        }
        drain(client, &mut streams, &mut tally, options, clock)?;
    }
    // The last pause belongs to the last burst.
    let end = origin + period * all;
    std::thread::sleep(end.saturating_duration_since(Instant::now()));
    let mut record = tally.record(options, client, &start)?;
    record.errors = tally.errors;
    Ok(record)
}
