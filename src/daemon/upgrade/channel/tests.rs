//! Whatever the other process sends ends in a message or an error.

use std::os::fd::AsFd;
use std::time::Duration;

use super::*;
use crate::vhost_user::handover::Outgoing;
use crate::vhost_user::testing::{memfd, open_fds};

fn pair() -> (Channel, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Channel::new(ours, None).unwrap(), theirs)
}

fn channels() -> (Channel, Channel) {
    let (ours, theirs) = pair();
    (ours, Channel::new(theirs, None).unwrap())
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(30))
}

/// What `bytes`, and then the end of the stream, are taken for.
fn received(bytes: &[u8]) -> Result<Vec<u64>, ChannelError> {
    let (ours, mut theirs) = pair();
    let bytes = bytes.to_vec();
    let writer = std::thread::spawn(move || {
        // It may not be read to the end.
        let _ = theirs.write_all(&bytes);
    });
    let result = ours.receive(soon());
    drop(ours);
    writer.join().unwrap();
    result.map(|(message, _)| message)
}

fn header(version: u32, len: u32, fds: u32) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for word in [version, len, fds] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

fn message(version: u32, payload: &str) -> Vec<u8> {
    let mut bytes = header(version, payload.len() as u32, 0);
    bytes.extend(payload.as_bytes());
    bytes
}

#[test]
fn messages_arrive_whole_with_as_many_descriptors_as_there_are() {
    let (one, other) = channels();
    let file = memfd(10);
    for count in [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5] {
        let words: Vec<u64> = (0..count as u64 * 1000).collect();
        let mut fds = Outgoing::default();
        for _ in 0..count {
            fds.add(&file).unwrap();
        }
        std::thread::scope(|scope| {
            scope.spawn(|| one.send(&words, &fds.raw(), soon()).unwrap());
            let (got, mut fds): (Vec<u64>, _) = other.receive(soon()).unwrap();
            assert_eq!((got.len(), fds.len()), (words.len(), count));
            if let Some(last) = count.checked_sub(1) {
                let fd = fds.take(last as u32).unwrap();
                // SAFETY: fcntl with F_GETFD takes no further argument.
                let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
                assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
                let file = std::fs::File::from(fd.as_fd().try_clone_to_owned().unwrap());
                assert_eq!(file.metadata().unwrap().len(), 10);
                assert!(fds.take(last as u32).is_err(), "only once");
            }
            assert!(fds.take(count as u32).is_err());
        });
    }
}

#[test]
fn garbage_is_told_from_a_message() {
    let good = message(VERSION, r#"{"Message":[1,2]}"#);
    assert_eq!(received(&good).unwrap(), [1, 2]);
    for len in 0..good.len() {
        let error = received(&good[..len]).unwrap_err();
        assert!(matches!(error, ChannelError::Closed), "{len}: {error}");
    }
    for bytes in [
        vec![0; 64],
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        message(VERSION, r#"{"Message":"text"}"#),
        message(VERSION, r#"{"Message":[1,2]"#),
        message(VERSION, r#"{"Else":[1,2]}"#),
        message(VERSION, "\u{0}\u{1}"),
        message(VERSION, ""),
        header(VERSION, u32::MAX, 0),
        header(VERSION, 0, u32::MAX),
    ] {
        let error = received(&bytes).unwrap_err();
        assert!(
            matches!(error, ChannelError::Garbage(_)),
            "{bytes:?}: {error}"
        );
    }
    // A message with descriptors that come without them.
    let mut bytes = header(VERSION, 17, 3);
    bytes.extend(b"\0{\"Message\":[1,2]}");
    let error = received(&bytes).unwrap_err();
    assert!(error.to_string().contains("0 descriptors of 3"), "{error}");
    let error = received(&header(VERSION, 17, 3)).unwrap_err();
    assert!(matches!(error, ChannelError::Closed), "{error}");
}

#[test]
fn versions_that_do_not_understand_each_other_can_say_no() {
    let (one, mut other) = channels();
    other.version = VERSION + 1;
    other.send(&vec![1u64], &[], soon()).unwrap();
    let error = one.receive::<Vec<u64>>(soon()).unwrap_err();
    assert!(matches!(error, ChannelError::Version { theirs, .. } if theirs == VERSION + 1));
    other.refuse("not with that one", soon()).unwrap();
    let error = one.receive::<Vec<u64>>(soon()).unwrap_err();
    assert!(matches!(error, ChannelError::Refused(why) if why == "not with that one"));
    one.refuse("nor with that", soon()).unwrap();
    let error = other.receive::<Vec<u64>>(soon()).unwrap_err();
    assert!(matches!(error, ChannelError::Refused(why) if why == "nor with that"));
}

#[test]
fn wait_ends_in_time_and_when_it_has_no_purpose() {
    // A program that another test is starting has the other end, too, until it has become that program.
    let name = "daemon::upgrade::channel::tests::wait_ends_in_time_and_when_it_has_no_purpose";
    if !crate::vhost_user::testing::alone(name) {
        return;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    let abort = EventFd::new(0).unwrap();
    let ours = Channel::new(ours, Some(abort.try_clone().unwrap())).unwrap();
    let now = Some(Instant::now());
    let error = ours.receive::<Vec<u64>>(now).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut));
    // Somebody who does not read.
    let much = vec![u64::MAX; 100_000];
    let error = ours.send(&much, &[], now).unwrap_err();
    assert!(matches!(error, ChannelError::TimedOut));
    abort.write(1).unwrap();
    let error = ours.receive::<Vec<u64>>(None).unwrap_err();
    assert!(matches!(error, ChannelError::Aborted));
    drop(theirs);
    let error = ours.send(&much, &[], None).unwrap_err();
    assert!(matches!(error, ChannelError::Closed));
}

#[test]
fn descriptors_that_nobody_takes_are_closed() {
    let name = "daemon::upgrade::channel::tests::descriptors_that_nobody_takes_are_closed";
    if !crate::vhost_user::testing::alone(name) {
        return;
    }
    let (one, other) = channels();
    let file = memfd(1);
    let before = open_fds();
    let fds = [file.as_raw_fd(); 3];
    one.send(&vec![1u64], &fds, soon()).unwrap();
    one.send(&"no list", &fds, soon()).unwrap();
    drop(other.receive::<Vec<u64>>(soon()).unwrap());
    other.receive::<Vec<u64>>(soon()).unwrap_err();
    assert_eq!(open_fds(), before);
}
