//! What a worker waits for while requests are under way.

use std::time::{Duration, Instant};

use super::*;
use crate::block::{FileOptions, FileStorage};

#[test]
fn requests_that_go_through_the_page_cache_may_wait_for_a_thread_of_the_kernel() {
    // Where this program is, and not where files may be in memory: those are read by the worker itself.
    let program = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let path = dir.path().join("a.img");
    std::fs::write(&path, vec![0; DISK as usize]).unwrap();
    for direct in [false, true] {
        let mut rig = Rig::new(Sim::default());
        let options = FileOptions {
            read_only: false,
            direct,
        };
        let file = FileStorage::open(&path, options).unwrap();
        rig.storage = Arc::new(Storage::File(file));
        let served = rig.serve();
        assert!(!served.queue.waits_for_threads());
        rig.write(0, 4 * KIB);
        rig.guest.ring.publish();
        served.queue.poll();
        assert_eq!(served.queue.requests(), 1);
        assert_eq!(served.queue.waits_for_threads(), !direct);
        let begin = Instant::now();
        while served.queue.requests() > 0 {
            served.turn();
            assert!(begin.elapsed() < Duration::from_secs(60), "it does not end");
        }
        assert!(!served.queue.waits_for_threads());
        served.queue.end();
    }
}
