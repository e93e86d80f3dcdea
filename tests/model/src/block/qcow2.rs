//! The qcow2 allocator's parts that threads share.

#[path = "../../../../src/block/qcow2/arena.rs"]
mod arena;
pub mod arena_models;
#[path = "../../../../src/block/qcow2/limbo.rs"]
mod limbo;
pub mod limbo_models;
#[path = "../../../../src/block/qcow2/marks.rs"]
mod marks;
#[path = "../../../../src/block/qcow2/runs.rs"]
mod runs;
pub mod slice_models;
