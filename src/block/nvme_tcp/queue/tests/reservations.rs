//! Reservations: what is asked of a controller, and what becomes of its answers.

use std::sync::Arc;

use super::peer::{Command, Do};
use super::rig::{Rig, Setup};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::nvme_tcp::reservation::Reservation;

const HOST: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
/// One half of it exclusively or the other.
const KEY: u64 = 0x0808_0808_0808_0818;
/// Status codes, with DNR.
const CONFLICT: u16 = 0x4083;
const INVALID_OPCODE: u16 = 0x4001;
const INVALID_FIELD: u16 = 0x4002;

fn rig() -> Rig {
    Rig::new(Setup {
        reserved_for: Some(HOST),
        ..Setup::default()
    })
}

fn take(rig: &mut Rig) -> Result<Option<Reservation>> {
    let storage = Arc::new(rig.storage.take().unwrap());
    let taken = rig.io.block_on(Reservation::take(&rig.io, &storage));
    if taken.is_err() {
        rig.storage = Some(Arc::into_inner(storage).unwrap());
    }
    taken
}

fn refused(rig: &mut Rig) -> Error {
    take(rig).expect_err("no reservation")
}

/// Opcodes and command dwords 10 of what came.
fn seen(rig: &Rig) -> Vec<(u8, u32)> {
    let seen = rig.peer().seen();
    seen.iter().map(|c| (c.opcode(), c.cdw(10))).collect()
}

fn keys(rig: &Rig) -> Vec<(u64, u64)> {
    let keys = rig.peer().keys();
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    keys.iter()
        .map(|k| (word(&k[..8]), word(&k[8..])))
        .collect()
}

/// A report of registered hosts: whether each holds the reservation, its key and its identifier.
fn report(count: u16, all: &[(bool, u64, [u8; 16])], bytes: usize) -> Vec<u8> {
    let mut report = vec![0; 64];
    report[4] = 1;
    report[5..7].copy_from_slice(&count.to_le_bytes());
    for (holds, key, host) in all {
        let mut entry = [0; 64];
        entry[2] = u8::from(*holds);
        entry[8..16].copy_from_slice(&key.to_le_bytes());
        entry[16..32].copy_from_slice(host);
        report.extend_from_slice(&entry);
    }
    report.resize(bytes, 0);
    report
}

const PERSIST: u32 = 3 << 30;
const REGISTER: (u8, u32) = (0x0d, PERSIST);
const UNREGISTER: (u8, u32) = (0x0d, 1);
/// Type 1: Write Exclusive.
const ACQUIRE: (u8, u32) = (0x11, 1 << 8);

#[test]
fn a_host_registers_acquires_and_gives_both_up_by_unregistering() {
    let mut rig = rig();
    let held = take(&mut rig).unwrap().expect("a reservation");
    assert_eq!(seen(&rig), [REGISTER, ACQUIRE]);
    assert_eq!(keys(&rig), [(0, KEY), (KEY, 0)]);
    rig.io.block_on(held.release(&rig.io)).unwrap();
    assert_eq!(seen(&rig), [REGISTER, ACQUIRE, UNREGISTER]);
    assert_eq!(keys(&rig)[2], (KEY, 0));
}

#[test]
fn nothing_is_asked_for_where_no_reservation_is_wanted() {
    let mut rig = Rig::new(Setup::default());
    assert!(take(&mut rig).unwrap().is_none());
    assert!(seen(&rig).is_empty());
}

#[test]
fn a_target_that_forgets_registrations_with_its_power_is_asked_for_less() {
    let mut rig = rig();
    rig.peer()
        .script(|command| match (command.opcode(), command.cdw(10)) {
            REGISTER => Do::Fail(INVALID_FIELD),
            _ => Do::It,
        });
    assert!(take(&mut rig).unwrap().is_some());
    assert_eq!(seen(&rig), [REGISTER, (0x0d, 0), ACQUIRE]);
}

#[test]
fn a_target_without_reservations_is_told_so() {
    let mut rig = rig();
    rig.peer().script(|_| Do::Fail(INVALID_OPCODE));
    let error = refused(&mut rig);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("leave the option"), "{error}");
}

fn held_by_another(command: &Command, count: u16, all: &[(bool, u64, [u8; 16])]) -> Do {
    match command.opcode() {
        0x11 => Do::Fail(CONFLICT),
        0x0e => {
            assert_eq!(command.cdw(11), 1, "extended: identifiers have 16 bytes");
            assert_eq!((command.cdw(10) as usize + 1) * 4, command.data_len());
            Do::Give(report(count, all, command.data_len()))
        }
        _ => Do::It,
    }
}

#[test]
fn a_reservation_of_another_host_is_waited_for_like_a_lock_and_the_host_is_named() {
    let mut rig = rig();
    let others = [(false, KEY, HOST), (true, 0xabc, [0x11; 16])];
    rig.peer()
        .script(move |command| held_by_another(command, 2, &others));
    let error = refused(&mut rig);
    assert_eq!(error.kind(), ErrorKind::Locked);
    let text = error.to_string();
    assert!(
        text.contains("11111111-1111-1111-1111-111111111111"),
        "{text}"
    );
    assert!(text.contains("key 0xabc"), "{text}");
    assert!(text.contains("nvme resv-release DEVICE"), "{text}");
    assert_eq!(
        seen(&rig).last(),
        Some(&UNREGISTER),
        "nothing is left behind"
    );
    // And never preempted.
    assert!(
        seen(&rig)
            .iter()
            .all(|(opcode, cdw)| *opcode != 0x11 || cdw & 7 == 0)
    );
}

#[test]
fn a_reservation_of_another_type_of_this_host_is_left_to_who_made_it() {
    let mut rig = rig();
    rig.peer()
        .script(|command| held_by_another(command, 1, &[(true, KEY, HOST)]));
    let error = refused(&mut rig);
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("another type"), "{error}");
    assert!(!seen(&rig).contains(&UNREGISTER));
}

#[test]
fn a_report_that_promises_more_than_it_has_is_read_as_far_as_it_goes() {
    let mut rig = rig();
    rig.peer()
        .script(|command| held_by_another(command, u16::MAX, &[]));
    let error = refused(&mut rig);
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("one of 65535"), "{error}");
}

#[test]
fn a_host_that_is_registered_with_another_key_takes_nothing() {
    let mut rig = rig();
    rig.peer().script(|_| Do::Fail(CONFLICT));
    let error = refused(&mut rig);
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains("another key"), "{error}");
    assert_eq!(seen(&rig), [REGISTER]);
}

#[test]
fn a_reservation_that_was_taken_away_fails_writes_and_not_the_end() {
    let mut rig = rig();
    let storage = Arc::new(rig.storage.take().unwrap());
    let held = rig.io.block_on(Reservation::take(&rig.io, &storage));
    let held = held.unwrap().expect("a reservation");
    rig.peer().script(|command| match command.opcode() {
        0x02 => Do::It,
        _ => Do::Fail(CONFLICT),
    });
    let mut buf = rig.io.buf(4096);
    let written = rig.io.block_on(storage.write(&rig.io, 0, buf.sg()));
    let error = written.expect_err("a conflict");
    assert_eq!(error.kind(), ErrorKind::Locked);
    let text = error.to_string();
    assert!(text.contains("Reservation Conflict"), "{text}");
    rig.io.block_on(storage.read(&rig.io, 0, buf.sg())).unwrap();
    rig.io.block_on(held.release(&rig.io)).unwrap();
}

#[test]
fn a_path_that_is_lost_in_between_changes_nothing() {
    let mut rig = rig();
    let mut cut = [true; 2];
    rig.peer().script(move |command| {
        let which = usize::from(command.opcode() == 0x11);
        match std::mem::replace(&mut cut[which], false) {
            true => Do::ExecuteAndCut,
            false => Do::It,
        }
    });
    assert!(take(&mut rig).unwrap().is_some());
    assert_eq!(seen(&rig), [REGISTER, REGISTER, ACQUIRE, ACQUIRE]);
}
