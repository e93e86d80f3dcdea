//! vhost-user client and virtio driver side, for tests and benchmarks.
