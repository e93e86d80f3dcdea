use std::path::PathBuf;
use std::process::Command;

use super::super::tests::{dir, io, pattern};
use super::*;
use crate::reactor::Io;

pub(super) struct Folder {
    dir: tempfile::TempDir,
    pub(super) io: Io,
}

impl Folder {
    pub(super) fn new() -> Self {
        Self {
            dir: dir(),
            io: io(),
        }
    }

    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn put(&self, name: &str, data: &[u8]) -> PathBuf {
        std::fs::write(self.at(name), data).unwrap();
        self.at(name)
    }

    /// Runs a QEMU tool in the folder; what it said on standard error if it failed.
    pub(super) fn run(&self, line: &[&str]) -> std::result::Result<(), String> {
        let output = Command::new(line[0])
            .args(&line[1..])
            .current_dir(self.dir.path())
            .output()
            .expect("these tests need qemu-img and qemu-io (package qemu-utils)");
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    pub(super) fn tool(&self, line: &[&str]) {
        self.run(line).unwrap();
    }

    pub(super) fn spec(&self, name: &str, format: Format) -> DiskSpec {
        let path = self.at(name);
        DiskSpec::new(Source::File { path }, format)
    }

    pub(super) fn open(&self, spec: &DiskSpec) -> Result<Disk> {
        self.io.block_on(Disk::open(&self.io, spec.clone()))
    }

    pub(super) fn open_qcow2(&self, name: &str) -> Result<Disk> {
        self.open(&self.spec(name, Format::Qcow2))
    }

    pub(super) fn activate(&self, disk: &Disk) -> Result<Arc<ActiveDisk>> {
        self.io.block_on(disk.activate(&self.io, 0))
    }

    pub(super) fn deactivate(&self, disk: Arc<ActiveDisk>) -> Result<()> {
        self.io.block_on(disk.deactivate(&self.io))
    }

    pub(super) fn read(&self, disk: &ActiveDisk, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut buf = self.io.buf(len);
        buf.fill(0xee);
        self.io
            .block_on(async { disk.read(&self.io, offset, buf.sg()).await })?;
        Ok(buf.to_vec())
    }

    pub(super) fn write(&self, disk: &ActiveDisk, offset: u64, data: &[u8]) -> Result<()> {
        let mut buf = self.io.buf(data.len());
        buf.copy_from_slice(data);
        self.io
            .block_on(async { disk.write(&self.io, offset, buf.sg()).await })
    }

    /// All that a chain shows, by this program, read-only.
    pub(super) fn contents(&self, name: &str, format: Format) -> Vec<u8> {
        let mut spec = self.spec(name, format);
        spec.read_only = true;
        let disk = self.open(&spec).unwrap();
        let active = self.activate(&disk).unwrap();
        let all = self.read(&active, 0, active.size() as usize).unwrap();
        self.deactivate(active).unwrap();
        all
    }

    /// All that a chain shows, by qemu-img.
    pub(super) fn by_qemu(&self, name: &str) -> Vec<u8> {
        self.tool(&[
            "qemu-img", "convert", "-f", "qcow2", "-O", "raw", name, "out.raw",
        ]);
        std::fs::read(self.at("out.raw")).unwrap()
    }
}

/// A version 3 image of 4 KiB clusters with nothing allocated.
pub(super) fn empty_qcow2(size: u64, backing: Option<(&str, Option<&str>)>) -> Vec<u8> {
    let mut image = vec![0; 4 * 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(20, &12u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &(size.div_ceil(512 * 4096) as u32).to_be_bytes());
    put(40, &(3u64 * 4096).to_be_bytes());
    put(48, &4096u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(4096, &(2u64 * 4096).to_be_bytes());
    put(8192, &[0, 1, 0, 1, 0, 1, 0, 1]);
    if let Some((name, format)) = backing {
        put(8, &1024u64.to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(1024, name.as_bytes());
        if let Some(format) = format {
            put(104, &0xe279_2acau32.to_be_bytes());
            put(108, &(format.len() as u32).to_be_bytes());
            put(112, format.as_bytes());
        }
    }
    image
}

pub(super) fn overlay(backing: &str) -> Vec<u8> {
    empty_qcow2(1 << 20, Some((backing, Some("qcow2"))))
}

#[test]
fn a_raw_disk_from_open_to_close() {
    let f = Folder::new();
    let mut model = pattern(1 << 20, 1);
    f.put("a.img", &model);
    for cache in [
        CacheMode::None,
        CacheMode::Writeback,
        CacheMode::Writethrough,
    ] {
        let mut spec = f.spec("a.img", Format::Raw);
        spec.cache = cache;
        let disk = f.open(&spec).unwrap();
        assert_eq!(disk.size(), 1 << 20);
        let how = if cache == CacheMode::None {
            "O_DIRECT"
        } else {
            "page cache"
        };
        let path = f.at("a.img");
        assert_eq!(disk.describe(), format!("raw {} ({how})", path.display()));
        let active = f.activate(&disk).unwrap();
        f.write(&active, 512, &[7; 1024]).unwrap();
        model[512..1536].fill(7);
        f.io.block_on(active.write_zeroes(&f.io, 8192, 5120, true))
            .unwrap();
        f.io.block_on(active.write_zeroes(&f.io, 20_480, 512, false))
            .unwrap();
        model[8192..13312].fill(0);
        model[20_480..20_992].fill(0);
        assert!(f.read(&active, 0, 1 << 20).unwrap() == model);
        f.io.block_on(active.discard(&f.io, 65_536, 65_536))
            .unwrap();
        model[65_536..131_072].fill(0);
        f.io.block_on(active.flush(&f.io)).unwrap();
        f.deactivate(active).unwrap();
        assert!(std::fs::read(&path).unwrap() == model);
    }
}

#[test]
fn a_null_disk_reads_zeros_and_forgets() {
    let f = Folder::new();
    let spec = DiskSpec::new(Source::Null { size: 1 << 40 }, Format::Raw);
    let disk = f.open(&spec).unwrap();
    assert_eq!((disk.size(), disk.describe().as_str()), (1 << 40, "null"));
    let active = f.activate(&disk).unwrap();
    f.write(&active, 4096, &[1; 512]).unwrap();
    assert_eq!(f.read(&active, 4096, 512).unwrap(), [0; 512]);
    assert!(f.read(&active, 1 << 40, 512).is_err());
    f.deactivate(active).unwrap();
}

#[test]
fn requests_beyond_the_end_are_refused_and_the_file_does_not_grow() {
    let f = Folder::new();
    let path = f.put("a.img", &[1; 8192]);
    let disk = f.open(&f.spec("a.img", Format::Raw)).unwrap();
    let active = f.activate(&disk).unwrap();
    let io = &f.io;
    let refused = [
        f.write(&active, 8192, &[0; 512]),
        f.write(&active, 7680, &[0; 1024]),
        f.write(&active, u64::MAX - 511, &[0; 512]),
        f.read(&active, 7680, 1024).map(|_| ()),
        io.block_on(active.discard(io, 4096, 8192)),
        io.block_on(active.write_zeroes(io, u64::MAX, 512, false)),
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::OutOfRange);
    }
    f.deactivate(active).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), [1; 8192]);
}

#[test]
fn a_size_that_is_no_whole_number_of_sectors_is_rounded_down_and_nothing_is_refused() {
    let f = Folder::new();
    let data = pattern(10_000, 2);
    let path = f.put("a.img", &data);
    let disk = f.open(&f.spec("a.img", Format::Raw)).unwrap();
    assert_eq!(disk.size(), 9728);
    assert!(
        disk.describe().contains("page cache"),
        "no O_DIRECT could write the last block"
    );
    let active = f.activate(&disk).unwrap();
    f.write(&active, 9216, &[5; 512]).unwrap();
    f.deactivate(active).unwrap();
    let got = std::fs::read(path).unwrap();
    assert!(got.len() == 10_000 && got[9728..] == data[9728..] && got[9216..9728] == [5; 512]);
    f.put("none.img", &[0; 511]);
    let error = f.open(&f.spec("none.img", Format::Raw)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let f = Folder::new();
    let path = f.put("a.img", &[1; 65_536]);
    let mut spec = f.spec("a.img", Format::Raw);
    spec.read_only = true;
    let disk = f.open(&spec).unwrap();
    assert!(!disk.limits().can_discard);
    let active = f.activate(&disk).unwrap();
    let io = &f.io;
    let refused = [
        f.write(&active, 0, &[0; 512]),
        io.block_on(active.discard(io, 0, 4096)),
        io.block_on(active.write_zeroes(io, 0, 4096, true)),
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    io.block_on(active.flush(io)).unwrap();
    f.deactivate(active).unwrap();
    assert_eq!(std::fs::read(path).unwrap(), [1; 65_536]);
}

#[test]
fn a_chain_reads_as_qemu_reads_it() {
    let f = Folder::new();
    // Backing files shorter than the overlay, longer, and of odd size.
    for (base, overlay) in [
        (1_000_001, "4M"),
        (300, "1M"),
        (5 << 20, "2M"),
        (1 << 20, "1M"),
    ] {
        f.put("base.img", &pattern(base, base as u64));
        for (name, below, format, size) in [
            ("mid.qcow2", "base.img", "raw", "3M"),
            ("top.qcow2", "mid.qcow2", "qcow2", overlay),
        ] {
            f.tool(&[
                "qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", format, name, size,
            ]);
        }
        f.tool(&[
            "qemu-io",
            "-f",
            "qcow2",
            "mid.qcow2",
            "-c",
            "write -P 1 65000 100000",
            "-c",
            "write -z 400k 64k",
        ]);
        f.tool(&[
            "qemu-io",
            "-f",
            "qcow2",
            "top.qcow2",
            "-c",
            "write -P 2 128k 3k",
            "-c",
            "write -z -u 512 64k",
            "-c",
            "write -c -P 9 512k 64k",
        ]);
        let got = f.contents("top.qcow2", Format::Qcow2);
        assert!(got == f.by_qemu("top.qcow2"), "{base} below {overlay}");
        std::fs::remove_file(f.at("out.raw")).unwrap();
    }
}

#[test]
fn a_chain_200_deep_opens_and_one_too_deep_is_refused() {
    let f = Folder::new();
    let data = pattern(1 << 20, 3);
    f.put("0", &data);
    f.put("1", &empty_qcow2(1 << 20, Some(("0", Some("raw")))));
    for n in 2..=chain::MAX_DEPTH {
        f.put(&n.to_string(), &overlay(&(n - 1).to_string()));
    }
    assert!(f.contents("200", Format::Qcow2) == data);
    assert!(f.contents("255", Format::Qcow2) == data);
    let error = f.open_qcow2("256").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains("more than 256 images"),
        "{error}"
    );
}

#[test]
fn a_loop_of_backing_files_is_told_by_name_under_whatever_names() {
    let f = Folder::new();
    f.put("self", &overlay("./self"));
    f.put("a", &overlay("b"));
    f.put("b", &overlay("c"));
    f.put("c", &overlay("link"));
    std::os::unix::fs::symlink("a", f.at("link")).unwrap();
    for name in ["self", "a", "b"] {
        let error = f.open_qcow2(name).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidImage);
        assert!(
            error.to_string().contains("a loop of backing files"),
            "{error}"
        );
    }
    std::fs::hard_link(f.at("self"), f.at("again")).unwrap();
    f.put("d", &overlay("again"));
    std::fs::remove_file(f.at("self")).unwrap();
    std::fs::hard_link(f.at("again"), f.at("self")).unwrap();
    assert!(f.open_qcow2("d").unwrap_err().to_string().contains("loop"));
}

#[test]
fn a_missing_backing_file_is_told_with_its_chain() {
    let f = Folder::new();
    f.put("top", &overlay("mid"));
    f.put("mid", &overlay("gone.qcow2"));
    let error = f.open_qcow2("top").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let text = error.to_string();
    let chain = format!(
        "{} → {} → gone.qcow2",
        f.at("top").display(),
        f.at("mid").display()
    );
    assert!(text.contains(&chain), "{text}");
}

#[test]
fn the_format_of_a_backing_file_is_never_guessed() {
    let f = Folder::new();
    f.put("base", &empty_qcow2(1 << 20, None));
    f.put("top", &empty_qcow2(1 << 20, Some(("base", None))));
    let error = f.open_qcow2("top").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotAllowed);
    assert!(
        error.to_string().contains("qemu-img rebase -u -F"),
        "{error}"
    );
    // A raw base that begins like qcow2 stays raw.
    f.put("top", &empty_qcow2(1 << 20, Some(("base", Some("raw")))));
    assert_eq!(f.contents("top", Format::Qcow2)[..4], *b"QFI\xfb");
    assert_eq!(f.contents("base", Format::Raw)[..4], *b"QFI\xfb");
    f.put("top", &empty_qcow2(1 << 20, Some(("base", Some("vmdk")))));
    let error = f.open_qcow2("top").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("vmdk"), "{error}");
    // And a raw file is no qcow2.
    f.put("plain", &[0; 65_536]);
    let error = f.open_qcow2("plain").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
}

#[test]
fn backing_names_that_are_no_plain_files_are_refused_by_name() {
    let f = Folder::new();
    for name in [
        "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
        "nvme+tcp://10.0.0.1/nqn",
        "nbd://localhost/x",
        "fat:rw:/etc",
    ] {
        f.put("top", &overlay(name));
        let error = f.open_qcow2("top").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAllowed, "{error}");
        let scheme = name.split(':').next().unwrap();
        assert!(error.to_string().contains(scheme), "{error}");
    }
    f.put("with:colon", &overlay("./with2:colon"));
    f.put("with2:colon", &empty_qcow2(1 << 20, None));
    f.open_qcow2("with:colon").unwrap();
    f.put("top", &overlay("file:with2:colon"));
    assert!(f.open_qcow2("top").is_err());
}

#[test]
fn backing_files_are_opened_only_where_the_user_allows() {
    let f = Folder::new();
    for folder in ["vm", "vm/sub", "store", "other"] {
        std::fs::create_dir(f.at(folder)).unwrap();
    }
    f.put("store/base", &empty_qcow2(1 << 20, None));
    f.put("vm/sub/near", &empty_qcow2(1 << 20, None));
    std::os::unix::fs::symlink(f.at("store/base"), f.at("vm/link")).unwrap();
    let absolute = f.at("store/base").to_str().unwrap().to_owned();
    let outside = ["../store/base", "link", &absolute, "sub/../../store/base"];
    for name in outside {
        f.put("vm/top", &overlay(name));
        let mut spec = f.spec("vm/top", Format::Qcow2);
        let error = f.open(&spec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotAllowed, "{name}");
        assert!(error.to_string().contains("allow-path="), "{error}");
        spec.allow_paths = vec![f.at("other")];
        assert!(f.open(&spec).is_err(), "{name}");
        for allowed in ["store", "store/base"] {
            spec.allow_paths = vec![f.at("other"), f.at(allowed)];
            f.open(&spec).unwrap();
        }
    }
    // A name that is a prefix of an allowed one is another name.
    std::fs::rename(f.at("store/base"), f.at("store/base2")).unwrap();
    f.put("vm/top", &overlay("../store/base2"));
    let mut spec = f.spec("vm/top", Format::Qcow2);
    f.put("store/base", &[]);
    spec.allow_paths = vec![f.at("store/base")];
    assert!(f.open(&spec).is_err());
    f.put("vm/top", &overlay("sub/near"));
    f.open_qcow2("vm/top").unwrap();
}

#[test]
fn relative_names_start_from_the_image_that_names_them() {
    let f = Folder::new();
    std::fs::create_dir(f.at("sub")).unwrap();
    f.put("top", &overlay("sub/mid"));
    f.put(
        "sub/mid",
        &empty_qcow2(1 << 20, Some(("base", Some("raw")))),
    );
    f.put("sub/base", &[3; 1 << 20]);
    f.put("base", &[4; 1 << 20]);
    assert_eq!(f.contents("top", Format::Qcow2)[0], 3);
}

#[test]
fn an_active_chain_is_locked_as_qemu_locks_it_and_free_afterwards() {
    let f = Folder::new();
    f.put("base.img", &[1; 1 << 20]);
    for name in ["one.qcow2", "two.qcow2"] {
        f.tool(&[
            "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", name,
        ]);
    }
    let one = f.open_qcow2("one.qcow2").unwrap();
    let two = f.open_qcow2("two.qcow2").unwrap();
    f.tool(&["qemu-img", "info", "one.qcow2"]);
    let first = f.activate(&one).unwrap();
    let second = f.activate(&two).unwrap();
    let said = f.run(&["qemu-img", "info", "one.qcow2"]).unwrap_err();
    assert!(said.contains("lock"), "{said}");
    let write_base = ["qemu-io", "-f", "raw", "base.img", "-c", "write 0 512"];
    assert!(f.run(&write_base).is_err());
    assert_eq!(f.activate(&one).unwrap_err().kind(), ErrorKind::Locked);
    let again = f.open_qcow2("one.qcow2").unwrap();
    assert_eq!(f.activate(&again).unwrap_err().kind(), ErrorKind::Locked);
    let base = f.open(&f.spec("base.img", Format::Raw)).unwrap();
    assert_eq!(f.activate(&base).unwrap_err().kind(), ErrorKind::Locked);
    f.deactivate(first).unwrap();
    f.tool(&["qemu-img", "info", "one.qcow2"]);
    assert!(
        f.run(&write_base).is_err(),
        "the other overlay still uses it"
    );
    f.deactivate(second).unwrap();
    f.tool(&write_base);
    let base = f.activate(&base).unwrap();
    let refused = f.activate(&one).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Locked);
    f.tool(&["qemu-img", "check", "-q", "-U", "one.qcow2"]);
    f.deactivate(base).unwrap();
    let active = f.activate(&one).unwrap();
    f.deactivate(active).unwrap();
    for name in ["one.qcow2", "two.qcow2"] {
        f.tool(&["qemu-img", "check", "-q", name]);
    }
}

#[test]
fn what_changed_while_the_disk_was_not_in_use_is_seen_when_it_is() {
    let f = Folder::new();
    f.put("one.img", &[1; 1 << 20]);
    f.put("two.img", &[2; 1 << 20]);
    f.tool(&[
        "qemu-img", "create", "-q", "-f", "qcow2", "-b", "one.img", "-F", "raw", "a.qcow2",
    ]);
    let mut spec = f.spec("a.qcow2", Format::Qcow2);
    spec.read_only = true;
    let disk = f.open(&spec).unwrap();
    let look = || {
        let active = f.activate(&disk).unwrap();
        let seen = (active.size(), f.read(&active, 0, 512).unwrap()[0]);
        f.deactivate(active).unwrap();
        seen
    };
    assert_eq!(look(), (1 << 20, 1));
    f.tool(&[
        "qemu-img", "rebase", "-u", "-b", "two.img", "-F", "raw", "a.qcow2",
    ]);
    assert_eq!(look(), (1 << 20, 2));
    f.tool(&["qemu-img", "resize", "-q", "-f", "qcow2", "a.qcow2", "2M"]);
    f.tool(&[
        "qemu-io",
        "-f",
        "qcow2",
        "a.qcow2",
        "-c",
        "write -P 3 0 512",
    ]);
    assert_eq!(look(), (2 << 20, 3));
    std::fs::remove_file(f.at("a.qcow2")).unwrap();
    assert_eq!(f.activate(&disk).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn a_file_that_was_replaced_under_its_name_is_the_new_one_when_it_is_used() {
    let f = Folder::new();
    f.put("a.img", &[1; 65_536]);
    let disk = f.open(&f.spec("a.img", Format::Raw)).unwrap();
    f.put("new.img", &[2; 131_072]);
    std::fs::rename(f.at("new.img"), f.at("a.img")).unwrap();
    let active = f.activate(&disk).unwrap();
    assert_eq!(active.size(), 131_072);
    assert_eq!(f.read(&active, 0, 512).unwrap(), [2; 512]);
    f.deactivate(active).unwrap();
}

#[test]
fn what_the_guest_is_told_of_the_disk() {
    let f = Folder::new();
    f.put("a.img", &[0; 65_536]);
    let raw = f.open(&f.spec("a.img", Format::Raw)).unwrap().limits();
    assert_eq!(raw.logical_block, 512);
    assert!(raw.physical_block >= 512 && raw.can_discard && raw.write_zeroes_may_unmap);
    f.tool(&["qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1G"]);
    let mut spec = f.spec("a.qcow2", Format::Qcow2);
    let qcow2 = f.open(&spec).unwrap().limits();
    assert_eq!(
        (qcow2.discard_granularity, qcow2.optimal_io),
        (65_536, 65_536)
    );
    spec.discard = false;
    assert!(!f.open(&spec).unwrap().limits().can_discard);
}
