//! Mutated qcow2 images, from the header to writing: see `exercise`.
#![no_main]

#[path = "../exercise.rs"]
mod exercise;

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use virtioblkd::reactor::{Epochs, Io, IoConfig};

thread_local! {
    static IO: Io = Io::new(&IoConfig {
        worker: 0,
        entries: 64,
        epochs: Epochs::new(),
    })
    .expect("io_uring");
}

fuzz_target!(|bytes: &[u8]| {
    let path = PathBuf::from(format!("/dev/shm/virtioblkd-fuzz-{}", std::process::id()));
    IO.with(|io| exercise::exercise(io, &path, bytes));
    let _ = std::fs::remove_file(path);
});
