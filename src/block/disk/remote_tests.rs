//! Remote namespaces: as a disk, and below an image.

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::crypt::{Key, KeySource};
use super::super::nvme_tcp::link::NamespaceState;
use super::super::nvme_tcp::remote::testing::{connected, geometry, serve, serve_as, storage};
use super::super::nvme_tcp::spec::NvmeOptions;
use super::super::tests::pattern;
use super::tests::{Folder, empty_qcow2, overlay};
use super::*;

const BASE: &str = "nvme+tcp://base.lan:4420/nqn.b?nsid=1";
const MIB: u64 = 1 << 20;

/// A disk whose bytes are the namespace that `uri` names.
fn top(uri: &str) -> DiskSpec {
    DiskSpec::new(Source::Nvme(uri.parse().unwrap()), Format::Raw)
}

fn open(f: &Folder, spec: &DiskSpec) -> Disk {
    f.open(spec).unwrap()
}

fn refused(f: &Folder, spec: &DiskSpec) -> Error {
    f.open(spec).unwrap_err()
}

/// An image of the folder over remote files, of which `allowed` may be named.
fn image(f: &Folder, name: &str, allowed: &[&str]) -> DiskSpec {
    let mut spec = f.spec(name, Format::Qcow2);
    spec.allow_remote = allowed.iter().map(|one| one.parse().unwrap()).collect();
    spec
}

fn set_len(f: &Folder, subsystem: &str, len: u64) {
    let storage = storage(subsystem);
    f.io.block_on(storage.set_len(&f.io, len)).unwrap();
    for namespace in connected(subsystem) {
        namespace.set_bytes(len);
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

#[test]
fn a_namespace_is_a_disk_and_the_guest_sees_its_geometry() {
    let f = Folder::new();
    let mut model = pattern(MIB as usize, 1);
    serve("nqn.b", model.clone(), geometry(4096, 7));
    let disk = open(&f, &top(BASE));
    assert_eq!(disk.size(), MIB);
    assert_eq!(disk.describe(), format!("raw {BASE}"));
    assert_eq!(disk.block_size(), 4096);
    assert_eq!(disk.remote_identity(), Some([7; 16]));
    let limits = disk.limits();
    assert_eq!((limits.logical_block, limits.physical_block), (4096, 16384));
    assert_eq!(limits.optimal_io, 65536);
    assert!(limits.can_discard);
    assert_eq!(limits.discard_granularity, 32768);

    let active = f.activate(&disk).unwrap();
    f.write(&active, 8192, &[9; 4096]).unwrap();
    model[8192..12288].fill(9);
    assert!(f.read(&active, 0, MIB as usize).unwrap() == model);
    f.deactivate(active).unwrap();
    // Ring after ring, it stays connected.
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, MIB as usize).unwrap() == model);
    f.deactivate(active).unwrap();
    assert_eq!(connected("nqn.b").len(), 1);
}

#[test]
fn the_block_of_a_file_does_not_follow_where_it_is() {
    let f = Folder::new();
    f.put("a", &[0; 4096]);
    let disk = open(&f, &f.spec("a", Format::Raw));
    assert_eq!((disk.block_size(), disk.remote_identity()), (512, None));
}

#[test]
fn an_image_over_a_namespace_reads_through_and_writes_to_itself_only() {
    let f = Folder::new();
    let data = pattern(MIB as usize, 2);
    serve("nqn.b", data.clone(), geometry(512, 1));
    f.put("top", &empty_qcow2(MIB, Some((BASE, Some("raw")))));
    let disk = open(&f, &image(&f, "top", &["nvme+tcp://base.lan/nqn.b"]));
    assert!(
        disk.describe().ends_with(&format!(" over raw {BASE}")),
        "{}",
        disk.describe()
    );
    assert_eq!((disk.block_size(), disk.remote_identity()), (512, None));
    assert!(connected("nqn.b")[0].spec().read_only);
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, MIB as usize).unwrap() == data);
    f.write(&active, 512, &[7; 512]).unwrap();
    f.deactivate(active).unwrap();
    let mut model = data.clone();
    model[512..1024].fill(7);
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, MIB as usize).unwrap() == model);
    f.deactivate(active).unwrap();
    let Storage::Sim(base) = &*storage("nqn.b") else {
        unreachable!()
    };
    assert!(base.image() == data);
    assert!(
        base.take_events().is_empty(),
        "nothing was asked of it but reads"
    );
}

#[test]
fn an_image_names_no_namespace_that_was_not_allowed() {
    let f = Folder::new();
    serve("nqn.b", vec![0; MIB as usize], geometry(512, 1));
    f.put("top", &empty_qcow2(MIB, Some((BASE, Some("raw")))));
    for allowed in [
        &[][..],
        &["nvme+tcp://base.lan/nqn.c"],
        &["nvme+tcp://base.lan:8009"],
        &["nvme+tcp://other.lan"],
    ] {
        let error = refused(&f, &image(&f, "top", allowed));
        assert_eq!(error.kind(), ErrorKind::NotAllowed);
        let says = "allow it with allow-remote=nvme+tcp://base.lan:4420/nqn.b";
        assert!(error.to_string().ends_with(says), "{error}");
    }
    assert!(connected("nqn.b").is_empty());
    open(&f, &image(&f, "top", &["nvme+tcp://base.lan"]));
    // Nor by a name that is none, which is not repeated if it holds a secret.
    for (name, says) in [
        (
            "nvme+tcp://base.lan/nqn.b?nsid=1&x=DHHC-1:00:c2VjcmV0:",
            "holds a secret",
        ),
        ("nvme+tcp://base.lan/nqn.b", "which namespace"),
        (
            "nvme+tcp://base.lan/nqn.b?nsid=1&hdr_digest=1",
            "two things",
        ),
    ] {
        f.put("bad", &empty_qcow2(MIB, Some((name, Some("raw")))));
        let error = refused(&f, &image(&f, "bad", &["nvme+tcp://base.lan"]));
        assert_eq!(error.kind(), ErrorKind::NotAllowed);
        assert!(error.to_string().contains(says), "{error}");
        assert!(!error.to_string().contains("c2VjcmV0"), "{error}");
    }
    // The format is not guessed, and other protocols stay what they were.
    f.put("top", &empty_qcow2(MIB, Some((BASE, None))));
    let error = refused(&f, &image(&f, "top", &["nvme+tcp://base.lan"]));
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    f.put(
        "top",
        &empty_qcow2(MIB, Some(("nbd://base.lan/x", Some("raw")))),
    );
    let error = refused(&f, &image(&f, "top", &["nvme+tcp://base.lan"]));
    assert!(error.to_string().contains("only files"), "{error}");
}

#[test]
fn a_chain_that_is_followed_again_stays_connected() {
    let f = Folder::new();
    let data = pattern(MIB as usize, 3);
    serve("nqn.b", data.clone(), geometry(512, 1));
    serve("nqn.c", vec![5; MIB as usize], geometry(512, 2));
    let all = &["nvme+tcp://base.lan"];
    f.put("mid", &empty_qcow2(MIB, Some((BASE, Some("raw")))));
    f.put("top", &overlay("mid"));
    let disk = open(&f, &image(&f, "top", all));
    // Another file in the middle, with the same base.
    f.put("new", &empty_qcow2(MIB, Some((BASE, Some("raw")))));
    std::fs::rename(f.at("new"), f.at("mid")).unwrap();
    let event = event();
    disk.on_outside_change(event.try_clone().unwrap()).unwrap();
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, MIB as usize).unwrap() == data);
    f.deactivate(active).unwrap();
    assert_eq!(connected("nqn.b").len(), 1);
    // And with another base, which is watched, too.
    let other = BASE.replace("nqn.b", "nqn.c");
    f.put("new", &empty_qcow2(MIB, Some((&other, Some("raw")))));
    std::fs::rename(f.at("new"), f.at("mid")).unwrap();
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, MIB as usize).unwrap() == vec![5; MIB as usize]);
    assert_eq!(connected("nqn.c").len(), 1);
    assert!(event.read().is_err());
    connected("nqn.c")[0].set_state(NamespaceState::Removed);
    assert_eq!(event.read().unwrap(), 1);
    let error = f.io.block_on(active.refresh(&f.io)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    f.deactivate(active).unwrap();
}

#[test]
fn a_namespace_that_names_itself_is_a_loop_under_any_name() {
    let f = Folder::new();
    let other = "nvme+tcp://10.0.0.1:4420/nqn.b?uuid=00112233-4455-6677-8899-aabbccddeeff";
    serve(
        "nqn.b",
        empty_qcow2(MIB, Some((other, Some("qcow2")))),
        geometry(512, 1),
    );
    f.put("top", &empty_qcow2(MIB, Some((BASE, Some("qcow2")))));
    let spec = image(&f, "top", &["nvme+tcp://base.lan,10.0.0.1"]);
    let error = refused(&f, &spec);
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    assert!(
        error.to_string().contains("a loop of backing files"),
        "{error}"
    );
}

#[test]
fn an_image_in_a_namespace_is_a_base_and_its_names_are_whole_paths() {
    let f = Folder::new();
    let data = pattern(MIB as usize, 4);
    let base = f.put("base", &data);
    let inner = |name: &str| empty_qcow2(MIB, Some((name, Some("raw"))));
    serve("nqn.b", inner(base.to_str().unwrap()), geometry(4096, 1));
    serve("nqn.c", inner("base"), geometry(512, 2));
    f.put("top", &empty_qcow2(MIB, Some((BASE, Some("qcow2")))));
    // The folder of the top image is not the namespace's.
    let mut spec = image(&f, "top", &["nvme+tcp://base.lan"]);
    let error = refused(&f, &spec);
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    assert!(
        error.to_string().contains("what a namespace names"),
        "{error}"
    );
    assert!(error.to_string().contains("allow-path="), "{error}");
    spec.allow_paths = vec![base];
    let disk = open(&f, &spec);
    let active = f.activate(&disk).unwrap();
    assert!(f.read(&active, 0, MIB as usize).unwrap() == data);
    f.deactivate(active).unwrap();

    let other = BASE.replace("nqn.b", "nqn.c");
    f.put("top", &empty_qcow2(MIB, Some((&other, Some("qcow2")))));
    let error = refused(&f, &image(&f, "top", &["nvme+tcp://base.lan"]));
    assert!(
        error.to_string().contains("a namespace has no folder"),
        "{error}"
    );
}

#[test]
fn a_qcow2_image_in_a_namespace_is_no_disk() {
    let f = Folder::new();
    serve("nqn.b", empty_qcow2(MIB, None), geometry(512, 1));
    let mut spec = top(BASE);
    spec.format = Format::Qcow2;
    let error = refused(&f, &spec);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains("make a local overlay"),
        "{error}"
    );
    assert!(connected("nqn.b").is_empty());
}

#[test]
fn growth_and_shrinking_are_told_and_taken() {
    let f = Folder::new();
    serve("nqn.b", pattern(MIB as usize, 5), geometry(512, 1));
    let disk = open(&f, &top(BASE));
    let event = event();
    // What happened before anybody listened is told at once.
    set_len(&f, "nqn.b", 2 * MIB);
    disk.on_outside_change(event.try_clone().unwrap()).unwrap();
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(f.io.block_on(disk.refresh(&f.io)).unwrap(), 2 * MIB);
    assert_eq!(disk.size(), 2 * MIB);
    disk.on_outside_change(event.try_clone().unwrap()).unwrap();
    assert!(event.read().is_err(), "nothing has changed since");

    let active = f.activate(&disk).unwrap();
    set_len(&f, "nqn.b", 3 * MIB);
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(f.io.block_on(active.refresh(&f.io)).unwrap(), 3 * MIB);
    f.write(&active, 3 * MIB - 512, &[1; 512]).unwrap();
    set_len(&f, "nqn.b", MIB);
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(f.io.block_on(active.refresh(&f.io)).unwrap(), MIB);
    let error = f.write(&active, MIB, &[1; 512]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfRange);
    f.write(&active, MIB - 512, &[1; 512]).unwrap();
    f.deactivate(active).unwrap();
}

#[test]
fn a_namespace_that_is_removed_is_told_of_and_not_taken_again() {
    let f = Folder::new();
    serve("nqn.b", pattern(MIB as usize, 6), geometry(512, 1));
    let disk = open(&f, &top(BASE));
    let event = event();
    disk.on_outside_change(event.try_clone().unwrap()).unwrap();
    let active = f.activate(&disk).unwrap();
    connected("nqn.b")[0].set_state(NamespaceState::Removed);
    assert_eq!(event.read().unwrap(), 1);
    let told = f.io.block_on(active.refresh(&f.io)).unwrap_err();
    assert_eq!(told.kind(), ErrorKind::NotFound);
    assert!(told.to_string().starts_with(BASE), "{told}");
    assert_eq!(
        active.size(),
        MIB,
        "the guest's requests fail by themselves"
    );
    f.deactivate(active).unwrap();
    assert_eq!(f.activate(&disk).unwrap_err().kind(), ErrorKind::NotFound);
    let told = f.io.block_on(disk.refresh(&f.io)).unwrap_err();
    assert_eq!(told.kind(), ErrorKind::NotFound);
}

#[test]
fn a_write_protected_namespace_is_a_read_only_disk_or_none() {
    let f = Folder::new();
    let state = NamespaceState::WriteProtected;
    serve_as("nqn.b", pattern(MIB as usize, 7), geometry(512, 1), state);
    let mut spec = top(BASE);
    let error = refused(&f, &spec);
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    assert!(error.to_string().contains("write-protected"), "{error}");
    spec.read_only = true;
    let disk = open(&f, &spec);
    assert!(connected("nqn.b").last().unwrap().spec().read_only);
    let active = f.activate(&disk).unwrap();
    assert_eq!(
        f.write(&active, 0, &[1; 512]).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    f.deactivate(active).unwrap();
}

#[test]
fn a_secret_is_read_once_and_handed_on_by_the_number_of_its_descriptor() {
    let f = Folder::new();
    serve("nqn.b", pattern(MIB as usize, 8), geometry(512, 1));
    let file = f.put("secret", b"from a file");
    let given = std::fs::File::open(f.put("other", b"from a descriptor")).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&given);
    let mut spec = top(BASE);
    spec.nvme = Arc::new(NvmeOptions {
        dhchap_secret: Some(KeySource::File(file.clone())),
        tls_key: Some(KeySource::Fd(Arc::new(given))),
        ..NvmeOptions::default()
    });
    let disk = open(&f, &spec);
    // Whatever becomes of the file, each association finds it.
    std::fs::remove_file(&file).unwrap();
    let namespace = connected("nqn.b").remove(0);
    let options = &namespace.spec().options;
    for (source, text) in [
        (&options.dhchap_secret, "from a file"),
        (&options.tls_key, "from a descriptor"),
    ] {
        for _ in 0..2 {
            let key = Key::read(source.as_ref().unwrap()).unwrap();
            assert_eq!(key.secret(), text.as_bytes());
            assert!(
                !format!("{key:?} {source:?}").contains("from a d"),
                "{key:?}"
            );
        }
    }
    let handed = disk.descriptors().unwrap();
    assert_eq!(handed.len(), 1);
    assert_eq!(handed[0].0, number);
    let mut text = String::new();
    let mut pipe = &handed[0].1;
    std::io::Read::read_to_string(&mut pipe, &mut text).unwrap();
    assert_eq!(text, "from a descriptor");

    spec.nvme = Arc::new(NvmeOptions {
        dhchap_secret: Some(KeySource::File(file)),
        ..NvmeOptions::default()
    });
    assert_eq!(refused(&f, &spec).kind(), ErrorKind::NotFound);
}
