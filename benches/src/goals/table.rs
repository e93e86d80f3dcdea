//! The goals, as data.

use super::{Bound, Cell, Figure, Goal, Metric, Who};

const fn goal(case: &'static str, what: &'static str, figure: Figure, bound: Bound) -> Goal {
    Goal {
        case,
        what,
        figure,
        bound,
    }
}

pub(super) const QD1: &str = "randread-4k-qd1";
pub(super) const QD32: &str = "randread-4k-qd32";
const WRITE1: &str = "randwrite-4k-qd1";
const WRITE32: &str = "randwrite-4k-qd32";
const FIRST32: &str = "firstwrite-4k-qd32";
/// Names of bursts in records: they are special measures, and no load of a layer.
pub const BURST: &str = "burst-4k";

const NULL1: &[Cell] = &[("null", QD1)];
const NULL32: &[Cell] = &[("null", QD32)];
const RAW_DISK1: &[Cell] = &[("raw-disk", QD1), ("raw-disk", WRITE1)];
pub(super) const RAW_DISK_DEEP: &[Cell] = &[
    ("raw-disk", QD32),
    ("raw-disk", WRITE32),
    ("raw-disk", "randread-4k-qd128"),
    ("raw-disk", "randwrite-4k-qd128"),
];
const RAW_SHM: &[Cell] = &[
    ("raw-shm", QD1),
    ("raw-shm", WRITE1),
    ("raw-shm", QD32),
    ("raw-shm", WRITE32),
];
const FULL_DISK: &[(Cell, Cell)] = &[
    (("full-disk", QD32), ("raw-disk", QD32)),
    (("full-disk", WRITE32), ("raw-disk", WRITE32)),
];
const FULL_SHM: &[(Cell, Cell)] = &[
    (("full-shm", QD32), ("raw-shm", QD32)),
    (("full-shm", WRITE32), ("raw-shm", WRITE32)),
];
const FRESH_TO_RAW: &[(Cell, Cell)] = &[
    (("fresh-disk", FIRST32), ("raw-disk", WRITE32)),
    (("fresh-shm", FIRST32), ("raw-shm", WRITE32)),
];
const FRESH_SHM: &[Cell] = &[("fresh-shm", FIRST32)];
const FRESH_DISK: &[Cell] = &[("fresh-disk", FIRST32)];
const OVERLAY: &[Cell] = &[("overlay-raw-disk", FIRST32), ("overlay-raw-shm", FIRST32)];
const OVERLAY_SEQUENTIAL: &[Cell] = &[
    ("overlay-raw-disk", "write-4k-qd1"),
    ("overlay-raw-disk", "write-4k-qd32"),
    ("overlay-raw-shm", "write-4k-qd1"),
    ("overlay-raw-shm", "write-4k-qd32"),
];
const CHAINS: &[(Cell, Cell)] = &[
    (("chain-16-disk", QD32), ("chain-1-disk", QD32)),
    (("chain-16-shm", QD32), ("chain-1-shm", QD32)),
    (("chain-16-shm", QD1), ("chain-1-shm", QD1)),
];
const WIDE: &[(Cell, Cell)] = &[(("null", "randread-4k-qd32-q2w2"), ("null", QD32))];
const GUEST: &[&str] = &["guest-randread-qd32", "guest-randwrite-qd32"];
const BURSTS: &[Cell] = &[("null", BURST), ("raw-disk", BURST)];

/// All goals, in the order of the table.
pub const GOALS: &[Goal] = &[
    goal(
        "null, depth 32",
        "M IOPS per backend CPU second",
        Figure::Value(Metric::IopsPerCpu, NULL32, 1e6),
        Bound::AtLeast(6.0),
    ),
    goal(
        "null, depth 32",
        "IOPS, ours / qsd",
        Figure::Ratio(Metric::Iops, NULL32, Who::Named("qsd")),
        Bound::AtLeast(3.0),
    ),
    goal(
        "null, depth 32",
        "instructions of the ring, ours / reference stack",
        Figure::SpecialRatio("instructions", "ring-split", "ring-reference"),
        Bound::AtMost(0.05),
    ),
    goal(
        "null, depth 1, both polling",
        "p50, µs",
        Figure::Value(Metric::P50, NULL1, 1.0),
        Bound::AtMost(5.0),
    ),
    goal(
        "null, depth 1, both polling",
        "p50, ours / best peer",
        Figure::Ratio(Metric::P50, NULL1, Who::BestPeer),
        Bound::Below(1.0),
    ),
    goal(
        "raw on disk, depth 1",
        "p50, ours − bare fio, µs",
        Figure::Difference(Metric::P50, RAW_DISK1, Who::Named("fio")),
        Bound::AtMost(3.0),
    ),
    goal(
        "raw on disk, depth 32 and 128",
        "IOPS, ours / bare fio",
        Figure::Ratio(Metric::Iops, RAW_DISK_DEEP, Who::Named("fio")),
        Bound::AtLeast(0.97),
    ),
    goal(
        "raw on disk, depth 32 and 128",
        "CPU a request, ours / bare fio",
        Figure::Ratio(Metric::CpuPerRequest, RAW_DISK_DEEP, Who::Named("fio")),
        Bound::AtMost(1.0),
    ),
    goal(
        "raw in memory",
        "IOPS per CPU second, ours / qsd",
        Figure::Ratio(Metric::IopsPerCpu, RAW_SHM, Who::Named("qsd")),
        Bound::AtLeast(2.0),
    ),
    goal(
        "qcow2 full, on disk",
        "IOPS, full / raw",
        Figure::Own(FULL_DISK),
        Bound::AtLeast(0.97),
    ),
    goal(
        "qcow2 full, in memory",
        "IOPS, full / raw",
        Figure::Own(FULL_SHM),
        Bound::AtLeast(0.97),
    ),
    goal(
        "qcow2 fresh, first writes",
        "IOPS, fresh / raw",
        Figure::Own(FRESH_TO_RAW),
        Bound::AtLeast(0.8),
    ),
    goal(
        "qcow2 fresh, first writes, in memory",
        "IOPS, ours / qsd",
        Figure::Ratio(Metric::Iops, FRESH_SHM, Who::Named("qsd")),
        Bound::AtLeast(8.0),
    ),
    goal(
        "qcow2 fresh, first writes, on disk",
        "IOPS, ours / qsd",
        Figure::Ratio(Metric::Iops, FRESH_DISK, Who::Named("qsd")),
        Bound::AtLeast(2.5),
    ),
    goal(
        "overlay on raw, random first writes",
        "IOPS, ours / qsd",
        Figure::Ratio(Metric::Iops, OVERLAY, Who::Named("qsd")),
        Bound::AtLeast(2.0),
    ),
    goal(
        "overlay on raw, sequential writes",
        "IOPS, ours / qsd",
        Figure::Ratio(Metric::Iops, OVERLAY_SEQUENTIAL, Who::Named("qsd")),
        Bound::AtLeast(8.0),
    ),
    goal(
        "chain of 16, random reads",
        "IOPS, chain of 16 / chain of 1",
        Figure::Own(CHAINS),
        Bound::AtLeast(0.9),
    ),
    goal(
        "a second worker and queue, null",
        "IOPS, two / one",
        Figure::Own(WIDE),
        Bound::AtLeast(1.9),
    ),
    goal(
        "idle",
        "% of a CPU",
        Figure::Special("idle", "cpu_percent"),
        Bound::Below(0.5),
    ),
    goal(
        "first request after a sleep",
        "p50, request / bare eventfd wake",
        Figure::SpecialRatio("wake", "request_p50_us", "eventfd_p50_us"),
        Bound::AtMost(1.0),
    ),
    goal(
        "bursts, 1 ms on, 9 ms off",
        "p99, adaptive / always polling",
        Figure::Ratio(Metric::P99, BURSTS, Who::OursWith("poll-always")),
        Bound::AtMost(1.3),
    ),
    goal(
        "bursts, 1 ms on, 9 ms off",
        "CPU, adaptive / always polling",
        Figure::Ratio(Metric::Cpu, BURSTS, Who::OursWith("poll-always")),
        Bound::Below(0.5),
    ),
    goal(
        "start to first I/O, 1 TiB overlay, 4-layer chain",
        "ms",
        Figure::Special("start", "first_read_ms"),
        Bound::AtMost(20.0),
    ),
    goal(
        "memory, 1 TiB fully mapped, default cache",
        "MiB beside guest memory",
        Figure::Special("memory", "resident_mib"),
        Bound::AtMost(64.0),
    ),
    goal(
        "TCG guest, fio 4k depth 32",
        "IOPS, ours / qsd",
        Figure::SpecialToPeer(GUEST, "iops"),
        Bound::AtLeast(1.0),
    ),
    goal(
        "TCG guest, fio 4k depth 32",
        "CPU, ours / qsd",
        Figure::SpecialToPeer(GUEST, "cpu_share"),
        Bound::AtMost(0.5),
    ),
];
