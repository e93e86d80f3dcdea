//! The daemon is killed (SIGKILL) again and again, at every step of a request's life, and a new one takes the
//! driver's requests up: each completes exactly once and with success, what was completed stays, and the image
//! is clean after a stop.
//!
//! `VIRTIOBLKD_KILLS` is how many times in all. Builds with debug assertions have named places in the daemon
//! where it ends itself (`src/kill_point.rs`); a signal from here comes at any moment.

mod case;
#[path = "../common/mod.rs"]
mod common;
mod death;
mod life;
mod scenarios;

use case::Case;
use life::run;
use vhost_user_frontend as frontend;

const RAW: Case = Case {
    name: "raw",
    seed: 1,
    share: 10,
    format: "raw",
    options: "",
    size: 8 << 20,
    grain: 8,
    base: 0,
    queues: 1,
    workers: 1,
    queue_size: 128,
    packed: false,
    depth: 32,
};

const QCOW2: Case = Case {
    name: "qcow2",
    format: "qcow2",
    grain: 128,
    share: 12,
    ..RAW
};

#[test]
fn raw_one_queue_one_request_at_a_time() {
    run(&Case {
        name: "raw, depth 1",
        depth: 1,
        share: 8,
        ..RAW
    });
}

#[test]
fn raw_two_queues_in_depth() {
    run(&Case {
        name: "raw, two queues",
        seed: 2,
        queues: 2,
        workers: 2,
        ..RAW
    });
}

#[test]
fn raw_packed_in_depth() {
    run(&Case {
        name: "raw, packed",
        seed: 3,
        packed: true,
        ..RAW
    });
}

#[test]
fn raw_packed_two_queues_of_odd_size() {
    run(&Case {
        name: "raw, packed, two queues of 100",
        seed: 4,
        queues: 2,
        packed: true,
        queue_size: 100,
        ..RAW
    });
}

#[test]
fn qcow2_over_a_base() {
    run(&Case {
        name: "qcow2, 64 KiB over a base",
        seed: 5,
        base: (5 << 20) + 1536,
        queues: 2,
        workers: 2,
        ..QCOW2
    });
}

#[test]
fn qcow2_of_small_clusters_over_a_base_packed() {
    run(&Case {
        name: "qcow2, 4 KiB over a base, packed",
        seed: 6,
        options: "cluster_size=4096",
        grain: 8,
        base: 5 << 20,
        packed: true,
        ..QCOW2
    });
}

#[test]
fn qcow2_fresh_packed_two_queues() {
    run(&Case {
        name: "qcow2, 64 KiB, packed",
        seed: 7,
        queues: 2,
        workers: 2,
        packed: true,
        ..QCOW2
    });
}

#[test]
fn qcow2_of_small_clusters_one_request_at_a_time() {
    run(&Case {
        name: "qcow2, 4 KiB, depth 1",
        seed: 8,
        options: "cluster_size=4096",
        grain: 8,
        depth: 1,
        ..QCOW2
    });
}

#[test]
fn qcow2_preallocated() {
    run(&Case {
        name: "qcow2, preallocated",
        seed: 9,
        options: "preallocation=metadata",
        share: 8,
        ..QCOW2
    });
}

#[test]
fn qcow2_with_subclusters_over_a_base() {
    run(&Case {
        name: "qcow2, extended L2 over a base",
        seed: 10,
        options: "extended_l2=on,cluster_size=65536",
        grain: 4,
        base: 5 << 20,
        share: 8,
        ..QCOW2
    });
}
