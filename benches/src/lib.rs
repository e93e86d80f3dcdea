//! Side-by-side benchmarks of virtioblkd and its peers; `benches/README.md` says what is measured and how.
//!
//! [`client`] is the load generator, on [`lane`], the driver side of a queue. [`runner`] gives each
//! [`load`] of each [`layer`] to each [`subject`] in turns, and keeps [`record`]s; [`special`] and [`guest`]
//! are the measures that are no such load. [`goals`], [`report`] and [`plot`] make of the records what is read.

pub mod client;
pub mod fio;
pub mod goals;
pub mod guest;
pub mod histogram;
pub mod lane;
pub mod layer;
pub mod load;
pub mod machine;
pub mod options;
pub mod pattern;
pub mod plot;
pub mod proc;
pub mod process;
pub mod record;
pub mod report;
pub mod runner;
pub mod special;
pub mod subject;
