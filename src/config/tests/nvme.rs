//! Remote disks: what is meant, and what cannot be.

use super::*;
use crate::block::nvme_tcp::spec::{Address, NamespaceName};

const URI: &str = "nvme+tcp://h:4420/nqn.a?nsid=1";
const REMOTE: &str = "--socket-path @/s --blk-file nvme+tcp://H/nqn.a?nsid=1";
const OVERLAY: &str =
    "--socket-path @/s --blk-file @/a.img --format qcow2 --allow-remote nvme+tcp://h";

#[test]
fn a_remote_disk_is_named_by_its_uri_and_follows_its_namespace() {
    let images = Images::new();
    let config = images.config(REMOTE, &host());
    let disk = &config.disks[0];
    let Source::Nvme(uri) = &disk.source else {
        panic!("{:?}", disk.source)
    };
    assert_eq!(uri.to_string(), URI);
    assert_eq!(uri.namespace, NamespaceName::Nsid(1));
    assert_eq!(
        (disk.format, disk.block_size, &disk.serial),
        (Format::Raw, None, &None)
    );
    assert_eq!(disk.nvme, Some(NvmeConfig::default()));
    let shown = config.to_string();
    assert!(shown.contains(&format!("blk-file = \"{URI}\"")), "{shown}");
    assert!(shown.contains("nvme-ctrl-loss-tmo = 600"), "{shown}");
    assert!(shown.contains("nvme-fast-io-fail-tmo = \"off\""), "{shown}");

    let line = format!("{REMOTE} --block-size 512 --serial mine --format luks --key-keyring k");
    let disk = &images.config(&line, &host()).disks[0];
    assert_eq!(
        (disk.block_size, disk.serial.as_deref()),
        (Some(512), Some("mine"))
    );
    let line = format!("{OVERLAY} --copy-on-read");
    let disk = &images.config(&line, &host()).disks[0];
    assert!(disk.copy_on_read && disk.nvme.is_some());
    assert_eq!(disk.block_size, Some(512));
    assert!(disk.serial.is_some(), "an overlay is a file");
}

#[test]
fn a_remote_disk_displays_as_a_file_that_means_the_same() {
    let images = Images::new();
    for line in [
        REMOTE.to_owned(),
        OVERLAY.to_owned(),
        format!("{OVERLAY} --copy-on-read"),
        format!("{REMOTE} --nvme-reservations --nvme-tls-key file:@/a.img --nvme-keep-alive 0"),
        format!("{REMOTE} --nvme-ctrl-loss-tmo 0 --nvme-fast-io-fail-tmo 0 --nvme-host-nqn nqn.a"),
        "--socket-path @/s --blk-file nvme+tcp://a,[::1]:1/n%20?uuid=00112233445566778899aabbccddeeff"
            .replace("%20", "%22"),
    ] {
        let config = images.config(&line, &host());
        let text = config.to_string();
        let again = images
            .file(&text, &host())
            .unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(again, config, "{text}");
    }
}

#[test]
fn what_cannot_be_meant_of_remote_disks_is_refused_with_what_to_write_instead() {
    let images = Images::new();
    let cases = [
        // On a file.
        (
            LEAST,
            "--nvme-io-timeout 3",
            "--nvme-io-timeout and",
            "nothing of the disk is remote",
        ),
        (
            LEAST,
            "--nvme-header-digest",
            "--nvme-header-digest and",
            "allow-remote",
        ),
        (
            LEAST,
            "--nvme-tls-key file:@/b.img",
            "--nvme-tls-key and",
            "allow-remote",
        ),
        (
            LEAST,
            "--format qcow2 --nvme-queue-depth 3",
            "--nvme-queue-depth",
            "allow-remote",
        ),
        (
            LEAST,
            "--allow-remote nvme+tcp://h",
            "--allow-remote",
            "--format qcow2",
        ),
        (LEAST, "--copy-on-read", "--copy-on-read", "--format qcow2"),
        (
            LEAST,
            "--format qcow2 --copy-on-read --read-only",
            "--copy-on-read",
            "leave out one",
        ),
        (
            "--socket-path @/s --blk-file null:1M",
            "--nvme-reservations",
            "--nvme-res",
            "remote",
        ),
        // On a namespace.
        (
            REMOTE,
            "--format qcow2",
            "--format qcow2",
            "make a local overlay",
        ),
        (
            REMOTE,
            "--cache writeback",
            "--cache",
            "none or writethrough",
        ),
        (
            REMOTE,
            "--backing-cache none",
            "--backing-cache",
            "leave it out",
        ),
        (
            REMOTE,
            "--allow-remote nvme+tcp://h",
            "--allow-remote",
            "leave it out",
        ),
        (REMOTE, "--copy-on-read", "--copy-on-read", "leave it out"),
        (
            REMOTE,
            "--nvme-reservations --read-only",
            "--nvme-reservations",
            "is shared",
        ),
        (REMOTE, "--block-size 8192", "--block-size", "512 or 4096"),
        (REMOTE, "--format luks", "--key-file is missing", "key-fd"),
        (
            REMOTE,
            "--format luks --image-key nvme+tcp://h/nqn.a?nsid=1=file:@/b.img",
            "--image-key",
            "write key-file",
        ),
        // On an image over one.
        (
            OVERLAY,
            "--nvme-reservations",
            "--nvme-reservations",
            "shared by many",
        ),
        (
            OVERLAY,
            "--allow-remote nvme+tcp://h/n?nsid=1",
            "--allow-remote",
            "question mark",
        ),
        (
            OVERLAY,
            "--allow-remote h:4420",
            "--allow-remote",
            "nvme+tcp://HOST:PORT",
        ),
        // Anywhere.
        (
            REMOTE,
            "--nvme-host-nqn x",
            "--nvme-host-nqn",
            "nqn.YYYY-MM.DOMAIN",
        ),
        (
            REMOTE,
            "--nvme-host-nqn nqn.",
            "--nvme-host-nqn",
            "nqn.YYYY-MM.DOMAIN",
        ),
        (
            REMOTE,
            "--nvme-host-id 0011",
            "--nvme-host-id",
            "write a UUID",
        ),
        (
            REMOTE,
            "--nvme-host-id 00000000-0000-0000-0000-000000000000",
            "--nvme-host-id",
            "not all zeros",
        ),
        (
            REMOTE,
            "--nvme-queue-depth 0",
            "--nvme-queue-depth",
            "1 to 1024",
        ),
        (
            REMOTE,
            "--nvme-queue-depth 65537",
            "--nvme-queue-depth",
            "1 to 1024",
        ),
        (
            REMOTE,
            "--nvme-keep-alive 86401",
            "--nvme-keep-alive",
            "or 0 for none",
        ),
        (
            REMOTE,
            "--nvme-connect-timeout 0",
            "--nvme-connect-timeout",
            "1 to 86400 seconds",
        ),
        (
            REMOTE,
            "--nvme-io-timeout 0",
            "--nvme-io-timeout",
            "1 to 86400 seconds",
        ),
        (
            REMOTE,
            "--nvme-reconnect-delay 0",
            "--nvme-reconnect-delay",
            "1 to 86400",
        ),
        (
            REMOTE,
            "--nvme-ctrl-loss-tmo never",
            "--nvme-ctrl-loss-tmo",
            "or off",
        ),
        (
            REMOTE,
            "--nvme-ctrl-loss-tmo=-1",
            "--nvme-ctrl-loss-tmo",
            "or off",
        ),
        (
            REMOTE,
            "--nvme-ctrl-loss-tmo 5 --nvme-fast-io-fail-tmo 6",
            "--nvme-fast-io-fail-tmo and `--nvme-ctrl-loss-tmo 5`",
            "make the first one smaller",
        ),
        (
            REMOTE,
            "--nvme-io-policy numa",
            "--nvme-io-policy",
            "queue-depth, round-robin",
        ),
        (
            REMOTE,
            "--nvme-tls-key @/b.img",
            "--nvme-tls-key",
            "file:PATH, fd:N or keyring:NAME",
        ),
        (
            REMOTE,
            "--nvme-tls-key file:",
            "--nvme-tls-key",
            "file:PATH, fd:N or keyring:NAME",
        ),
        (
            REMOTE,
            "--nvme-tls-key file:@/nowhere",
            "--nvme-tls-key",
            "holds the key",
        ),
        (
            REMOTE,
            "--nvme-dhchap-secret fd:1",
            "--nvme-dhchap-secret",
            "3 or more",
        ),
        (
            REMOTE,
            "--nvme-dhchap-secret fd:9999",
            "--nvme-dhchap-secret",
            "open at the start",
        ),
        (
            REMOTE,
            "--nvme-dhchap-secret keyring:",
            "--nvme-dhchap-secret",
            "serial number",
        ),
        (
            REMOTE,
            "--nvme-dhchap-ctrl-secret file:@/b.img",
            "--nvme-dhchap-secret is missing",
            "leave nvme-dhchap-ctrl-secret out",
        ),
    ];
    for (line, options, named, advice) in cases {
        let error = images
            .run(&format!("{line} {options}"), &host())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(named) && error.contains(advice),
            "{line} {options}: {error}"
        );
    }
}

#[test]
fn a_secret_itself_is_refused_wherever_it_stands_and_is_not_repeated() {
    let images = Images::new();
    let dhchap = "DHHC-1:00:c2VjcmV0:";
    let tls = "NVMeTLSkey-1:01:c2VjcmV0:";
    for (line, named) in [
        (
            format!("{REMOTE} --nvme-dhchap-secret {dhchap}"),
            "--nvme-dhchap-secret: ",
        ),
        (
            format!("{REMOTE} --nvme-dhchap-secret={dhchap}"),
            "--nvme-dhchap-secret: ",
        ),
        (
            format!("{REMOTE} --nvme-dhchap-ctrl-secret file:{dhchap}"),
            "--nvme-dhchap-ctrl-secret: ",
        ),
        (format!("{REMOTE} --nvme-tls-key {tls}"), "--nvme-tls-key: "),
        (
            format!("--blk-file nvme+tcp://h/n?nsid=1&key={tls}"),
            "--blk-file: ",
        ),
        (format!("--no-such-option {dhchap}"), "--no-such-option: "),
        (format!("--{dhchap}"), "the command line: "),
        (format!("nvme discover h {tls}"), "the command line: "),
    ] {
        let error = images.run(&line, &host()).unwrap_err().to_string();
        assert!(error.starts_with(named), "{line}: {error}");
        assert!(error.contains("everybody can read it"), "{error}");
        assert!(error.contains("file:PATH"), "{error}");
        assert!(!error.contains("c2VjcmV0"), "{error}");
    }
    // What may be a part of one is not repeated either.
    let line = format!("{REMOTE} --nvme-tls-key c2VjcmV0");
    let error = images.run(&line, &host()).unwrap_err().to_string();
    assert!(!error.contains("c2VjcmV0"), "{error}");
    for text in [
        format!("[[disk]]\nnvme-tls-key = '{tls}'\n"),
        format!("[[disk]]\nnvme-tls-key = {tls}\n"),
        format!("once = true\n# {dhchap}\n"),
    ] {
        let error = images.file(&text, &host()).unwrap_err().to_string();
        assert!(
            error.starts_with("vm.toml: line 2: a secret stands here"),
            "{error}"
        );
        assert!(!error.contains("c2VjcmV0"), "{error}");
    }
}

#[test]
fn numbers_and_words_of_a_file_are_what_they_are_on_the_command_line() {
    let images = Images::new();
    let disk = format!("[[disk]]\nblk-file = '{URI}'\nsocket-path = '@/s'\n");
    for (key, time) in [
        ("nvme-ctrl-loss-tmo = 7", Some(7)),
        ("nvme-ctrl-loss-tmo = '7'", Some(7)),
        ("nvme-ctrl-loss-tmo = 'off'", None),
    ] {
        let config = images.file(&format!("{disk}{key}\n"), &host()).unwrap();
        let nvme = config.disks[0].nvme.as_ref().unwrap();
        assert_eq!(nvme.ctrl_loss_tmo, time.map(Duration::from_secs), "{key}");
    }
    for key in [
        "nvme-ctrl-loss-tmo = -1",
        "nvme-ctrl-loss-tmo = 'x'",
        "nvme-ctrl-loss-tmo = true",
    ] {
        let error = images.file(&format!("{disk}{key}\n"), &host()).unwrap_err();
        assert!(matches!(error, Error::Syntax { .. }), "{key}: {error}");
    }
}

#[test]
fn two_disks_do_not_share_a_namespace_or_a_secrets_descriptor() {
    let images = Images::new();
    let disk = |number: u32, more: &str| {
        format!(
            "[[disk]]\nblk-file = 'nvme+tcp://h{number}/nqn.a?nsid=1'\nsocket-path = '@/{number}'\n{more}\n"
        )
    };
    // Another address of the same subsystem.
    let error = images
        .file(&(disk(1, "") + &disk(2, "")), &host())
        .unwrap_err();
    assert!(matches!(error, Error::Shared { .. }), "{error}");
    assert!(error.to_string().contains("both read-only"), "{error}");
    let read_only = "read-only = true";
    images
        .file(&(disk(1, read_only) + &disk(2, read_only)), &host())
        .unwrap();

    let (one, _two) = UnixStream::pair().unwrap();
    let fd = one.as_raw_fd();
    let secrets = format!("nvme-dhchap-secret = 'fd:{fd}'\nnvme-tls-key = 'fd:{fd}'");
    let error = images
        .file(&disk(1, &secrets), &host())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`nvme-tls-key`") && error.contains("a descriptor for each"),
        "{error}"
    );
}

#[test]
fn a_discovery_controller_is_asked_at_its_own_port() {
    let images = Images::new();
    let discover = |line: &str| match images.run(&format!("nvme discover {line}"), &host()) {
        Ok(Invocation::Discover(discovery)) => Ok(discovery),
        Ok(other) => panic!("{line}: {other:?}"),
        Err(error) => Err(error.to_string()),
    };
    let at = |host: &str, port| Address {
        host: host.to_owned(),
        port,
    };
    assert_eq!(
        discover("Storage.lan"),
        Ok(Discovery {
            address: at("storage.lan", 8009),
            nvme: NvmeConfig::default(),
            json: false,
        })
    );
    let found =
        discover("[::1]:4420 --json --nvme-host-nqn nqn.x --nvme-tls-key file:@/b.img").unwrap();
    assert_eq!((found.address, found.json), (at("::1", 4420), true));
    assert_eq!(found.nvme.host_nqn.as_deref(), Some("nqn.x"));
    assert_eq!(found.nvme.secrets().count(), 1);
    for (line, advice) in [
        ("", "HOST[:PORT]"),
        ("h:0", "8009"),
        ("::1", "[ADDRESS]:PORT"),
        ("h --nvme-host-nqn x", "nqn.YYYY"),
        ("h --nvme-io-timeout 3", "--nvme-io-timeout"),
    ] {
        let error = discover(line).unwrap_err();
        assert!(error.contains(advice), "{line}: {error}");
    }
}
