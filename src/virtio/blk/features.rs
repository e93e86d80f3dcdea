//! Feature bits (sections 5.2.3 and 6).

use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

use super::{DeviceLimits, SECTOR_SIZE};

/// `VIRTIO_BLK_F_SEG_MAX`.
pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
/// `VIRTIO_BLK_F_RO`.
pub const READ_ONLY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
/// `VIRTIO_BLK_F_BLK_SIZE`.
pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
/// `VIRTIO_BLK_F_FLUSH`.
pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
/// `VIRTIO_BLK_F_TOPOLOGY`.
pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
/// `VIRTIO_BLK_F_CONFIG_WCE`.
pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
/// `VIRTIO_BLK_F_MQ`.
pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
/// `VIRTIO_BLK_F_DISCARD`.
pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
/// `VIRTIO_BLK_F_WRITE_ZEROES`.
pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
/// `VIRTIO_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// `VIRTIO_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;

/// `VIRTIO_F_RING_PACKED`.
pub const RING_PACKED: u64 = 1 << virtio_config::VIRTIO_F_RING_PACKED;

/// The features of a disk: what virtio-blk and the rings offer. The bits of vhost and vhost-user are
/// not among them.
///
/// `SIZE_MAX` is never offered: there is no limit, and a `size_max` of 0 stops some drivers. `FLUSH`
/// is always offered, and must be where `CONFIG_WCE` is (section 5.2.5.2). A read-only disk offers
/// neither discard nor write-zeroes.
///
/// `IN_ORDER` is not offered: requests would wait for the slowest before them. `NOTIFICATION_DATA` is not: a kick
/// is an eventfd, which carries no data, and QEMU takes the driver's longer write for a kick only on a slower path.
pub fn offered(limits: &DeviceLimits) -> u64 {
    let mut features = SEG_MAX
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | MQ
        | INDIRECT_DESC
        | EVENT_IDX
        | RING_PACKED
        | VERSION_1;
    if limits.read_only {
        return features | READ_ONLY;
    }
    if limits.max_discard_bytes >= SECTOR_SIZE && limits.max_discard_segments > 0 {
        features |= DISCARD;
    }
    if limits.max_write_zeroes_bytes >= SECTOR_SIZE && limits.max_write_zeroes_segments > 0 {
        features |= WRITE_ZEROES;
    }
    features
}

/// Whether a write must be durable before it completes.
///
/// `features` are those the driver acknowledged, `wce` is the `writeback` field (section 5.2.6.2).
/// With `CONFIG_WCE` the field decides. Without it the driver cannot see the field: one that knows
/// `FLUSH` expects a write-back cache, one that knows neither cannot flush and gets write-through.
pub fn write_through(features: u64, wce: bool) -> bool {
    if features & CONFIG_WCE != 0 {
        !wce
    } else {
        features & FLUSH == 0
    }
}

/// `seg_max`: data buffers in one request. Header and status take two descriptors of a queue without
/// indirect tables; more than 254 (1 MiB of pages) gain nothing.
pub fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size.saturating_sub(2).clamp(1, 254))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> DeviceLimits {
        DeviceLimits {
            capacity_bytes: 1 << 30,
            read_only: false,
            block_size: 512,
            max_discard_bytes: 1 << 20,
            max_discard_segments: 4,
            discard_alignment: 4096,
            max_write_zeroes_bytes: 1 << 20,
            max_write_zeroes_segments: 4,
            write_zeroes_may_unmap: true,
        }
    }

    #[test]
    fn size_max_is_never_offered() {
        let bit = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
        assert_eq!(offered(&limits()) & bit, 0);
    }

    #[test]
    fn lifetime_and_secure_erase_are_never_offered() {
        let bits = 1 << 15 | 1 << 16;
        assert_eq!(offered(&limits()) & bits, 0);
    }

    #[test]
    fn flush_is_offered_wherever_config_wce_is() {
        for read_only in [false, true] {
            let features = offered(&DeviceLimits {
                read_only,
                ..limits()
            });
            assert_eq!(features & (FLUSH | CONFIG_WCE), FLUSH | CONFIG_WCE);
        }
    }

    #[test]
    fn a_read_only_disk_offers_neither_discard_nor_write_zeroes() {
        let features = offered(&DeviceLimits {
            read_only: true,
            ..limits()
        });
        assert_ne!(features & READ_ONLY, 0);
        assert_eq!(features & (DISCARD | WRITE_ZEROES), 0);
        assert_eq!(offered(&limits()) & READ_ONLY, 0);
    }

    #[test]
    fn discard_and_write_zeroes_are_offered_only_where_the_disk_has_limits_for_them() {
        assert_eq!(
            offered(&limits()) & (DISCARD | WRITE_ZEROES),
            DISCARD | WRITE_ZEROES
        );
        let none = DeviceLimits {
            max_discard_bytes: 0,
            max_write_zeroes_segments: 0,
            ..limits()
        };
        assert_eq!(offered(&none) & (DISCARD | WRITE_ZEROES), 0);
    }

    #[test]
    fn a_guest_that_acked_neither_flush_nor_config_wce_gets_write_through() {
        assert!(write_through(VERSION_1, true));
        assert!(write_through(VERSION_1, false));
        assert!(!write_through(FLUSH, true));
        assert!(!write_through(FLUSH, false));
        assert!(!write_through(FLUSH | CONFIG_WCE, true));
        assert!(write_through(FLUSH | CONFIG_WCE, false));
        assert!(write_through(CONFIG_WCE, false));
    }

    #[test]
    fn seg_max_leaves_room_for_header_and_status_and_is_never_zero() {
        assert_eq!(seg_max(0), 1);
        assert_eq!(seg_max(1), 1);
        assert_eq!(seg_max(2), 1);
        assert_eq!(seg_max(128), 126);
        assert_eq!(seg_max(256), 254);
        assert_eq!(seg_max(32768), 254);
    }

    #[test]
    fn the_firmware_of_qemu_finds_what_it_acknowledges() {
        // SeaBIOS acknowledges 0x140000046; bit 30 is vhost-user's, bit 1 (SIZE_MAX) only where it
        // is offered.
        let seabios = 0x1_4000_0046 & !(1 << 30) & !(1 << 1);
        assert_eq!(offered(&limits()) & seabios, seabios);
    }
}
