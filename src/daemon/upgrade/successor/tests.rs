//! A predecessor that is over at the worst of moments.

use std::net::Shutdown;
use std::sync::mpsc::channel;

use super::*;

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(30))
}

/// What a takeover of no disks comes to if the predecessor hears and says no more after `Stopped`, or, where it
/// `has_paused` nothing, before that.
fn taken_over_from_one_that_dies(has_paused: bool) -> Result<usize, UpgradeError> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let old = Channel::new(ours.try_clone().unwrap(), None).unwrap();
    let new = Channel::new(theirs, None).unwrap();
    let (done, is_done) = channel();
    let predecessor = std::thread::spawn(move || {
        let hello = FromOld::Hello(Hello { disks: Vec::new() });
        old.send(&hello, &[], soon()).unwrap();
        for wanted in [FromNew::Ready, FromNew::Mapped] {
            let (message, _): (FromNew, _) = old.receive(soon()).unwrap();
            assert_eq!(message, wanted);
        }
        if has_paused {
            // `Taken` is not to be heard any more, however quick the successor is.
            ours.shutdown(Shutdown::Read).unwrap();
            let stopped = Stopped {
                since_ns: monotonic_ns(),
                bases: Vec::new(),
            };
            old.send(&FromOld::Stopped(stopped), &[], soon()).unwrap();
        }
        // Nor is `Go` to come.
        ours.shutdown(Shutdown::Both).unwrap();
        is_done.recv().unwrap();
    });
    let result = Predecessor::listen(new).and_then(|predecessor| predecessor.take_over(Vec::new()));
    done.send(()).unwrap();
    predecessor.join().unwrap();
    result.map(|all| all.len())
}

#[test]
fn predecessor_that_dies_before_it_hears_that_all_is_taken_is_succeeded() {
    assert_eq!(taken_over_from_one_that_dies(true).unwrap(), 0);
}

#[test]
fn predecessor_that_dies_before_it_has_paused_is_not_succeeded() {
    let error = taken_over_from_one_that_dies(false).err().unwrap();
    assert!(error.to_string().contains("has ended"), "{error}");
}
