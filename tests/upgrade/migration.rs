//! Upgrades of the source of a migration: marks go on in the same log.

use crate::common::until;
use crate::frontend::guest::Random;
use crate::frontend::guest::vm::{DISK, Log, QUEUE_SIZE, Vm, Vmm};
use crate::frontend::{Daemon, Disk, Program, TempDir, qemu};
use crate::rig::{New, Rig};

#[test]
fn upgrades_of_the_source_of_a_migration_lose_no_mark() {
    let dir = TempDir::new();
    let contents = Random::new(7).bytes(DISK as usize);
    let base = dir.join("base");
    std::fs::write(&base, &contents).unwrap();
    qemu::create_overlay(&dir.join("disk"), DISK, &base, "raw", "");
    let disk = Disk::new(dir.join("disk"), "qcow2")
        .queues(2)
        .workers(2)
        .queue_size(QUEUE_SIZE);
    let mut rig = Rig::start(dir, &disk, 60_000);

    let mut vm = Vm::new(contents, 3);
    let source = Vmm::boot(&rig.dir.join("s"), &mut vm);
    vm.run(100);
    let log = Log::new();
    let copy = vm.new_memory();
    source.log_on(&vm, &log);
    vm.copy(vm.pages(), &copy);

    let catch_up = |vm: &mut Vm| {
        vm.drain();
        let marked = log.take();
        assert!(!marked.is_empty());
        vm.copy(marked, &copy);
        // A worker that goes to sleep may write to its used ring even now, and marks that.
        until("all pages that differ were marked", || {
            vm.copy(log.take(), &copy);
            vm.stale(&copy).is_empty()
        });
    };
    catch_up(&mut vm);
    for _ in 0..4 {
        rig.upgrade_under(|| {
            vm.collect();
            vm.submit();
        });
        catch_up(&mut vm);
        // All of these are the new one's.
        vm.run(300);
        catch_up(&mut vm);
    }
    for point in ["upgrade-mapped", "upgrade-stopped", "upgrade-started"] {
        let new = format!("VIRTIOBLKD_KILL_POINT={point}:1");
        rig.fail_under(&New::With(&new), || {
            vm.collect();
            vm.submit();
        });
        vm.run(300);
        catch_up(&mut vm);
    }
    // The VMM ends the logging and begins it again, with the memory that it has sent once.
    source.set_logging(&vm, false);
    log.take();
    vm.run(100);
    vm.drain();
    assert_eq!(log.take(), [0; 0]);
    source.set_logging(&vm, true);
    vm.copy(vm.pages(), &copy);
    rig.program(&New::Good);
    rig.upgrade_under(|| {
        vm.collect();
        vm.submit();
    });
    vm.run(300);

    // And the migration comes to its end.
    let bases = source.stop();
    vm.collect();
    vm.copy(log.take(), &copy);
    assert_eq!(vm.stale(&copy), [0; 0], "pages that were not marked");
    let elsewhere = TempDir::new();
    let program = Program::Virtioblkd(env!("CARGO_BIN_EXE_virtioblkd").into());
    let host = Daemon::start(&program, &disk, elsewhere.path());
    let target = Vmm::connect(host.socket(), &vm);
    target.take_over(&mut vm, copy, bases);
    vm.run(100);
    vm.check_disk();
    drop(source);
    rig.terminate();
}
