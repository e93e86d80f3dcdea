//! What a guest sees of a remote disk.

use std::mem::offset_of;

use virtio_bindings::virtio_blk::virtio_blk_config;

use super::*;
use crate::block::Limits;
use crate::block::nvme_tcp::link::Geometry;
use crate::block::nvme_tcp::remote::testing::{connected, geometry, serve};
use crate::cli::{Invocation, load_from};
use crate::config::Host;

const URI: &str = "nvme+tcp://h/nqn.a?nsid=1";

fn plane() -> Arc<Dataplane> {
    let workers = WorkersConfig {
        count: 1,
        cpus: Vec::new(),
        poll: config::PollMode::Never,
        poll_max: config::DEFAULT_POLL_MAX,
    };
    Dataplane::start(&plane_config(&workers)).unwrap()
}

/// The configuration of one disk, in a directory that need not exist for long.
fn disk(options: &str) -> DiskConfig {
    let dir = tempfile::tempdir().unwrap();
    let line = format!(
        "virtioblkd --socket-path {}/s {options}",
        dir.path().display()
    );
    match load_from(line.split_whitespace(), &Host::of_this_process()) {
        Ok(Invocation::Run(mut config)) => config.disks.remove(0),
        other => panic!("{line}: {other:?}"),
    }
}

fn read(device: &BlkDevice, offset: usize, len: u32) -> u64 {
    let mut bytes = device.config(offset as u32, len).unwrap();
    bytes.resize(8, 0);
    u64::from_le_bytes(bytes.try_into().unwrap())
}

fn block_size(device: &BlkDevice) -> u64 {
    read(device, offset_of!(virtio_blk_config, blk_size), 4)
}

#[test]
fn the_guest_sees_the_namespaces_geometry() {
    serve("nqn.a", vec![0; 1 << 20], geometry(4096, 5));
    let plane = plane();
    let device = open_device(&plane, &disk(&format!("--blk-file {URI}"))).unwrap();
    assert_eq!(device.capacity(), 1 << 20);
    assert_eq!(block_size(&device), 4096);
    let field = |offset, len| read(&device, offset, len);
    // Exponent of the physical block; sizes in blocks.
    assert_eq!(
        field(offset_of!(virtio_blk_config, physical_block_exp), 1),
        2
    );
    assert_eq!(field(offset_of!(virtio_blk_config, min_io_size), 2), 4);
    assert_eq!(field(offset_of!(virtio_blk_config, opt_io_size), 4), 16);
    // In sectors.
    let at = offset_of!(virtio_blk_config, discard_sector_alignment);
    assert_eq!(field(at, 4), 64);
    assert!(device.describe().starts_with("raw nvme+tcp://h:4420/"));
}

#[test]
fn the_users_block_size_wins() {
    serve("nqn.a", vec![0; 1 << 20], geometry(4096, 5));
    serve("nqn.b", vec![0; 1 << 20], geometry(512, 6));
    let plane = plane();
    for (uri, option, bytes) in [
        (URI, "", 4096),
        (URI, "--block-size 512", 512),
        ("nvme+tcp://h/nqn.b?nsid=1", "", 512),
        ("nvme+tcp://h/nqn.b?nsid=1", "--block-size 4096", 4096),
    ] {
        let config = disk(&format!("--blk-file {uri} {option}"));
        let device = open_device(&plane, &config).unwrap();
        assert_eq!(block_size(&device), bytes, "{uri} {option}");
    }
}

#[test]
fn the_serial_is_the_namespaces_over_every_path_and_under_every_name() {
    serve("nqn.a", vec![0; 1 << 20], geometry(512, 5));
    serve("nqn.b", vec![0; 1 << 20], geometry(512, 6));
    let plane = plane();
    let serial = |options: &str| {
        let device = open_device(&plane, &disk(options)).unwrap();
        device.serial()
    };
    let one = serial(&format!("--blk-file {URI}"));
    // Known by heart: a guest's /dev/disk/by-id would change with it.
    assert_eq!(one, "nvmef8f1672d2625c775");
    let uuid = "nvme+tcp://10.0.0.1,i/nqn.a?uuid=00112233445566778899aabbccddeeff";
    assert_eq!(serial(&format!("--blk-file {uuid} --read-only")), one);
    assert_ne!(serial("--blk-file nvme+tcp://h/nqn.b?nsid=1"), one);
    assert_eq!(serial(&format!("--blk-file {URI} --serial mine")), "mine");
}

#[test]
fn one_namespace_under_two_names_is_no_disk_of_two_writers() {
    serve("nqn.a", vec![0; 1 << 20], geometry(512, 5));
    let plane = plane();
    let uuid = "nvme+tcp://i/nqn.a?uuid=00112233445566778899aabbccddeeff";
    let mut namespaces = Namespaces::default();
    let mut add = |options: &str| {
        let disk = disk(options);
        let device = open_device(&plane, &disk).unwrap();
        namespaces
            .add(&disk, &device)
            .map_err(|error| error.to_string())
    };
    add("--blk-file null:1M").unwrap();
    add(&format!("--blk-file {URI} --name a --read-only")).unwrap();
    add(&format!("--blk-file {uuid} --name b --read-only")).unwrap();
    let error = add(&format!("--blk-file {uuid} --name c")).unwrap_err();
    assert!(
        error.contains("\"c\"") && error.contains("\"a\""),
        "{error}"
    );
}

#[test]
fn a_target_that_tells_odd_sizes_makes_no_odd_disk() {
    let limits = |physical_block, optimal_io| Limits {
        physical_block,
        optimal_io,
        ..geometry(512, 5).limits
    };
    let plane = plane();
    for (name, limits) in [
        ("nqn.0", limits(0, 1)),
        ("nqn.1", limits(3000, 513)),
        ("nqn.2", limits(1 << 31, u32::MAX)),
    ] {
        let geometry = Geometry {
            limits,
            ..geometry(512, 5)
        };
        serve(name, vec![0; 1 << 20], geometry);
        let config = disk(&format!("--blk-file nvme+tcp://h/{name}?nsid=1"));
        let device = open_device(&plane, &config).unwrap();
        let at = offset_of!(virtio_blk_config, physical_block_exp);
        assert_eq!(read(&device, at, 1), 0, "{name}");
    }
}

#[test]
fn options_reach_the_namespace() {
    serve("nqn.a", vec![0; 1 << 20], geometry(512, 5));
    let plane = plane();
    let options = "--nvme-host-nqn nqn.h --nvme-data-digest --nvme-queue-depth 7 --nvme-keep-alive 0 \
                   --nvme-ctrl-loss-tmo off --nvme-fast-io-fail-tmo 3 --nvme-io-policy round-robin \
                   --nvme-io-timeout 9 --nvme-reservations";
    open_device(&plane, &disk(&format!("--blk-file {URI} {options}"))).unwrap();
    let namespace = connected("nqn.a").remove(0);
    let spec = namespace.spec();
    assert!(!spec.read_only);
    let options = &spec.options;
    assert_eq!(options.host_nqn.as_deref(), Some("nqn.h"));
    assert!(options.data_digest && !options.header_digest && options.reservations);
    assert_eq!(options.queue_depth, 7);
    assert!(options.keep_alive.is_zero());
    assert_eq!(options.ctrl_loss, None);
    assert_eq!(options.fast_io_fail.map(|time| time.as_secs()), Some(3));
    assert_eq!(options.policy, IoPolicy::RoundRobin);
    assert_eq!(options.io_timeout.as_secs(), 9);
}
