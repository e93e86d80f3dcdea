//! The protocol of an NVMe/TCP queue against a target that may say anything: see `nvme_exercise`.
#![no_main]

#[path = "../nvme_exercise.rs"]
mod nvme_exercise;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    nvme_exercise::exercise(bytes);
});
