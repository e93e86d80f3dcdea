//! A VMM that hears of new sizes from whoever serves it.

use std::fs::File;

use crate::common::SOON;
use crate::frontend::blk::SECTOR;
use crate::frontend::{ConfigWatch, TempDir};
use crate::rig::{MIB, New, options};

#[test]
fn resize_is_told_by_the_one_that_serves_and_an_upgrade_tells_nothing() {
    let mut rig = crate::raw(TempDir::new(), 4 * MIB, 60_000);
    let mut device = rig.device(options(1));
    let watch = ConfigWatch::open(&device, true).unwrap();
    for mib in [8, 16, 2] {
        rig.fail_under(&New::With("VIRTIOBLKD_KILL_POINT=upgrade-started:1"), || {});
        rig.program(&New::Good);
        rig.upgrade_under(|| {});
        device.read_config().unwrap();
        assert!(watch.is_silent().unwrap());

        let size = mib * MIB;
        let image = File::options().write(true).open(rig.image()).unwrap();
        image.set_len(size).unwrap();
        rig.signal(libc::SIGHUP);
        let config = watch.wait(&device, SOON).unwrap();
        assert_eq!(config.capacity * SECTOR, size);
        let last = size / SECTOR - 1;
        device.write(last, &[mib as u8; 512]).unwrap();
        device.write(last + 1, &[1; 512]).unwrap_err();
    }
    rig.upgrade_under(|| {});
    assert_eq!(device.read(2 * MIB / SECTOR - 1, 512).unwrap(), [2; 512]);
    device.shut_down().unwrap();
    rig.terminate();
}

#[test]
fn vmm_that_has_not_answered_is_told_on_the_same_channel() {
    let mut rig = crate::raw(TempDir::new(), 4 * MIB, 60_000);
    let mut device = rig.device(options(1));
    let watch = ConfigWatch::open(&device, true).unwrap();
    let resize = |rig: &crate::Rig, mib: u64| {
        let image = File::options().write(true).open(rig.image()).unwrap();
        image.set_len(mib * MIB).unwrap();
        rig.signal(libc::SIGHUP);
    };
    resize(&rig, 8);
    crate::until("it is told", || !watch.is_silent().unwrap());
    rig.upgrade_under(|| {});
    // What the old one said is answered to the new one.
    let config = watch.wait(&device, SOON).unwrap();
    assert_eq!(config.capacity * SECTOR, 8 * MIB);
    device.write(0, &[1; 512]).unwrap();
    assert!(watch.is_silent().unwrap(), "once");
    resize(&rig, 12);
    let config = watch.wait(&device, SOON).unwrap();
    assert_eq!(config.capacity * SECTOR, 12 * MIB);
    device.shut_down().unwrap();
    rig.terminate();
}
