//! One run of one load: a line of the machine-readable file.

use serde::{Deserialize, Serialize};

/// What was run and what came out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Which backend.
    pub subject: String,
    /// What the disk is made of.
    pub layer: String,
    /// The load, block size and depth in a word: `randread-4k-qd32`.
    pub load: String,
    /// Which repetition, from 1.
    pub run: u32,
    /// Bytes a request.
    pub block_size: u64,
    /// Requests in flight, over all queues.
    pub depth: u32,
    /// Queues.
    pub queues: u32,
    /// Seconds measured.
    pub seconds: f64,
    /// Requests completed in them.
    pub requests: u64,
    /// Requests that ended with another status than OK, warm-up included.
    pub errors: u64,
    /// Requests a second.
    pub iops: f64,
    /// Mean latency in microseconds.
    pub mean_us: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// Latency that 99 % do not exceed, in microseconds.
    pub p99_us: f64,
    /// Latency that 99.9 % do not exceed, in microseconds.
    pub p999_us: f64,
    /// Milliseconds of a flush after all writes; 0 for loads that only read.
    pub flush_ms: f64,
    /// Seconds of CPU that the backend used in the measured time, all threads, user and system.
    pub backend_cpu_s: f64,
    /// Requests for each of those seconds.
    pub iops_per_cpu_s: f64,
    /// Kicks (eventfd writes) that the backend asked for, a request.
    pub kicks_per_request: f64,
    /// Share of the measured time in which the client was ready to run and had no CPU.
    pub client_waited: f64,
    /// The same for all threads of the backend together.
    pub backend_waited: f64,
}
