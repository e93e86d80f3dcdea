//! What a driver finds of a batch whose requests end as they begin.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;

use super::*;
use crate::dataplane::mailbox::RingFile;

/// Requests of a batch: no multiple of a share.
const COUNT: u64 = 20;

#[test]
fn a_driver_finds_them_share_by_share_and_is_interrupted_once() {
    for packed in [false, true] {
        let mut rig = Rig::with(Sim::default(), packed, u32::MAX);
        rig.guest.ring.set_notify(Notify::Call);
        let served = rig.serve();
        // SAFETY: a new descriptor is ours alone.
        let mut call = unsafe { File::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
        let ours = call.try_clone().unwrap();
        served.queue.set_file(RingFile::Call, Some(ours));
        let mut interrupts = || {
            let mut count = [0; 8];
            call.read(&mut count)
                .map_or(0, |_| u64::from_ne_bytes(count))
        };
        assert_eq!(
            interrupts(),
            1,
            "a driver may have waited for a predecessor"
        );
        for round in 0..3 {
            for n in 0..COUNT {
                // Nobody's neighbours.
                rig.read((n * 7 % COUNT) * 64 * KIB, 4 * KIB);
            }
            rig.guest.ring.publish();
            assert!(served.queue.poll());
            assert_eq!(interrupts(), 0, "{packed} {round}");
            let mut done = Vec::new();
            rig.take(&mut done);
            assert_eq!(done.len(), 16, "{packed} {round}");
            assert!(served.queue.publish());
            assert_eq!(interrupts(), 1, "{packed} {round}");
            rig.take(&mut done);
            assert_eq!(done.len() as u64, COUNT, "{packed} {round}");
            assert!(done.iter().all(|done| done.status == status::OK));
            // All of it known already.
            assert!(!served.queue.publish());
            assert_eq!(interrupts(), 0, "{packed} {round}");
        }
        served.queue.end();
    }
}
