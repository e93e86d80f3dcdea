//! What the load generator and the report share: the latency histogram, the order of requests, and the
//! record of a run.

pub mod histogram;
pub mod pattern;
pub mod proc;
pub mod record;
