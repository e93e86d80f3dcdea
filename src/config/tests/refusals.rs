//! What cannot be meant, and the words that say so.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::{Error, Images, LEAST, host};

#[test]
fn what_cannot_be_meant_is_refused_with_what_to_write_instead() {
    let images = Images::new();
    let long = "x".repeat(120);
    // Options that stand after the least command line, the option that must be named, and advice.
    let cases = [
        ("--format vmdk", "--format", "raw, qcow2"),
        (
            "--queue-size 0",
            "--queue-size",
            "a power of two from 2 to 32768",
        ),
        (
            "--queue-size 1",
            "--queue-size",
            "a power of two from 2 to 32768",
        ),
        (
            "--queue-size 100",
            "--queue-size",
            "a power of two from 2 to 32768",
        ),
        (
            "--queue-size 32769",
            "--queue-size",
            "a power of two from 2 to 32768",
        ),
        (
            "--queue-size 65536",
            "--queue-size",
            "a power of two from 2 to 32768",
        ),
        ("--queue-size=-1", "--queue-size", ""),
        ("--queue-size many", "--queue-size", ""),
        ("--num-queues 0", "--num-queues", "1 to 256"),
        ("--num-queues 257", "--num-queues", "1 to 256"),
        ("--num-queues 65537", "--num-queues", "1 to 256"),
        ("--block-size 1024", "--block-size", "512 or 4096"),
        ("--block-size 4294967808", "--block-size", "512 or 4096"),
        (
            "--serial 123456789012345678901",
            "--serial",
            "1 to 20 printable",
        ),
        ("--serial=", "--serial", "1 to 20 printable"),
        ("--serial sérial", "--serial", "1 to 20 printable"),
        ("--name a/b", "--name", "letters, digits"),
        ("--name=", "--name", "letters, digits"),
        ("--workers 0", "--workers", "1 or more"),
        ("--workers 5", "--workers", "more with num-queues"),
        ("--workers 3 --num-queues 2", "--workers", "(2 in total)"),
        ("--cpus 9", "--cpus", "choose from 0,1,2,3"),
        ("--cpus 1-", "--cpus", "such as 2,4-5"),
        ("--cpus 1,0-2", "--cpus", "names CPU 1 twice"),
        ("--cpus 0-1 --workers 3", "--cpus", "a CPU for each worker"),
        ("--poll-max-us 0", "--poll-max-us", "--poll never"),
        ("--poll-max-us 1000001", "--poll-max-us", "1 to 1000000"),
        (
            "--poll always --poll-max-us 9",
            "--poll-max-us and `--poll always`",
            "leave out one",
        ),
        (
            "--poll never --poll-max-us 9",
            "--poll-max-us and `--poll never`",
            "leave out one",
        ),
        ("--backing-cache none", "--backing-cache", "--format qcow2"),
        ("--on-dirty repair", "--on-dirty", "--format qcow2"),
        ("--allow-path @", "--allow-path", "--format qcow2"),
        ("--l2-cache-size 1M", "--l2-cache-size", "--format qcow2"),
        (
            "--format qcow2 --l2-cache-size 63K",
            "--l2-cache-size",
            "write 64K or more",
        ),
        (
            "--format qcow2 --l2-cache-size 1,5M",
            "--l2-cache-size",
            "write a number of bytes",
        ),
        ("--data-file @/b.img", "--data-file", "--format qcow2"),
        (
            "--format qcow2 --allow-path @/nowhere",
            "--allow-path",
            "a directory that exists",
        ),
        (
            "--format qcow2 --allow-path @/b.img",
            "--allow-path",
            "write the directory",
        ),
        (
            "--format luks",
            "--key-file is missing",
            "key-fd or key-keyring",
        ),
        ("--key-file @/b.img", "--key-file", "--format luks"),
        (
            "--image-key @/a.img=keyring:a",
            "--image-key",
            "--format luks",
        ),
        (
            "--format luks --key-file @/nowhere",
            "--key-file",
            "the file that holds the key",
        ),
        (
            "--format luks --key-file @/bases",
            "--key-file",
            "the path of a file",
        ),
        (
            "--format luks --key-file @/b.img --key-keyring a",
            "--key-file and `key-keyring`",
            "leave out one",
        ),
        ("--format luks --key-fd 1", "--key-fd", "3 or more"),
        (
            "--format luks --key-fd 9999",
            "--key-fd",
            "open at the start",
        ),
        (
            "--format luks --key-keyring=",
            "--key-keyring",
            "serial number",
        ),
        (
            "--format qcow2 --image-key @/a.img",
            "--image-key",
            "IMAGE=file:PATH",
        ),
        (
            "--format qcow2 --image-key =file:@/b.img",
            "--image-key",
            "IMAGE=file:PATH",
        ),
        (
            "--format qcow2 --image-key @/a.img=fd:x",
            "--image-key",
            "3 or more",
        ),
        (
            "--format luks --key-file @/b.img --backing-cache none",
            "--backing-cache",
            "--format qcow2",
        ),
        ("--fd 4", "--socket-path and `fd`", "leave out one"),
        (
            "--fd-name a",
            "--socket-path and `fd-name`",
            "leave out one",
        ),
        ("--socket-mode 0888", "--socket-mode", "in octal"),
        ("--socket-mode 4755", "--socket-mode", "in octal"),
        (
            "--socket-group no-such-group",
            "--socket-group",
            "its name or its number",
        ),
        (
            "--pid-file @/nowhere/pid",
            "--pid-file",
            "make the directory first",
        ),
        ("--pid-file @/bases", "--pid-file", "the path of a file"),
        ("--pid-file @/bases/../s", "--pid-file", "a file of its own"),
        ("--pid-file @/a.img", "--pid-file", "a file of its own"),
        (
            "--log-level loud",
            "--log-level",
            "error, warn, info, debug, trace",
        ),
        ("--config vm.toml", "--blk-file", "write it into that file"),
        ("--no-such-option", "--no-such-option", ""),
    ];
    for (options, named, advice) in cases {
        let error = images
            .run(&format!("{LEAST} {options}"), &host())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(named) && error.contains(advice),
            "{options}: {error}"
        );
    }

    // Whole command lines.
    let long = format!("--blk-file @/a.img --socket-path @/{long}");
    let cases = [
        ("", "--blk-file", "null:SIZE"),
        ("--blk-file @/a.img", "--socket-path is missing", "--fd N"),
        ("--blk-file @/a.img --fd-name a", "--fd-name", "LISTEN_FDS"),
        (
            "--blk-file @/a.img --socket-path @/nowhere/s",
            "--socket-path",
            "make the directory",
        ),
        (
            "--blk-file @/a.img --socket-path @/bases",
            "--socket-path",
            "move it away",
        ),
        (
            "--blk-file @/a.img --socket-path @/b.img",
            "--socket-path",
            "move it away",
        ),
        (
            "--blk-file @/a.img --socket-path /",
            "--socket-path",
            "write the path of a file",
        ),
        (&long, "--socket-path", "write a shorter path"),
        ("--socket-path @/s", "--blk-file is missing", "null:SIZE"),
        (
            "--socket-path @/s --blk-file @/nowhere.img",
            "--blk-file",
            "qemu-img create",
        ),
        (
            "--socket-path @/s --blk-file @",
            "--blk-file",
            "neither a regular file",
        ),
        (
            "--socket-path @/s --blk-file /dev/null",
            "--blk-file",
            "neither a regular file",
        ),
        (
            "--socket-path @/s --blk-file null:",
            "--blk-file",
            "such as 10G",
        ),
        (
            "--socket-path @/s --blk-file null:0",
            "--blk-file",
            "multiple of the block size",
        ),
        (
            "--socket-path @/s --blk-file null:1000",
            "--blk-file",
            "multiple of the block size",
        ),
        (
            "--socket-path @/s --blk-file null:512 --block-size 4096",
            "--blk-file",
            "4096",
        ),
        (
            "--socket-path @/s --blk-file null:8192P",
            "--blk-file",
            "multiple of the block size",
        ),
        (
            "--socket-path @/s --blk-file null:1G --format qcow2",
            "--format",
            "leave it out",
        ),
        (
            "--socket-path @/s --blk-file null:1G --allow-path /",
            "--allow-path",
            "leave it out",
        ),
        (
            "--socket-path @/s --blk-file json:{}",
            "--blk-file",
            "./json:{}",
        ),
        (
            "--socket-path @/s --blk-file nvme+tcp://h/n",
            "--blk-file",
            "write ?nsid=N",
        ),
        (
            "--socket-path @/s --blk-file nbd://h/n",
            "--blk-file",
            "not known",
        ),
        ("--blk-file @/a.img --fd 1", "--fd", "3 or more"),
        ("--blk-file @/a.img --fd=-1", "--fd", ""),
        (
            "--blk-file @/a.img --fd 987654",
            "--fd",
            "not an open descriptor",
        ),
        (
            "--blk-file @/a.img --fd 9 --socket-mode 0600",
            "--socket-mode and `fd`",
            "leave it out",
        ),
        (
            "--blk-file @/a.img --socket-group root",
            "--socket-group",
            "systemd",
        ),
        ("--config @/nowhere.toml", "nowhere.toml", ""),
        (
            "--config @/nowhere.toml --workers 2",
            "--workers",
            "write it into that file",
        ),
    ];
    for (line, named, advice) in cases {
        let error = images.run(line, &host()).unwrap_err().to_string();
        assert!(
            error.contains(named) && error.contains(advice),
            "{line}: {error}"
        );
    }
}

#[test]
fn disks_that_share_something_are_refused() {
    let images = Images::new();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let fd = format!("fd = {}", ours.as_raw_fd());
    let a = "blk-file = '@/a.img'\nsocket-path = '@/s'";
    let cases = [
        (
            a,
            "blk-file = '@/b.img'\nsocket-path = '@/bases/../s'",
            "`socket-path` of disk \"disk1\"",
            "disk \"disk0\"",
        ),
        (
            a,
            "blk-file = '@/a.img'\nsocket-path = '@/t'",
            "`blk-file` of disk \"disk1\"",
            "an overlay of its own",
        ),
        (
            a,
            "blk-file = '@/link'\nsocket-path = '@/t'",
            "`blk-file`",
            "disk \"disk0\"",
        ),
        (
            a,
            "blk-file = '@/link'\nsocket-path = '@/t'\nread-only = true",
            "`blk-file`",
            "both read-only",
        ),
        (
            a,
            "blk-file = '@/b.img'\nsocket-path = '@/t'\nname = 'disk0'",
            "`name`",
            "its own name",
        ),
        (
            "blk-file = 'null:1G'\nsocket-path = '@/s'\nserial = 'x'",
            "blk-file = 'null:1G'\nsocket-path = '@/t'\nserial = 'x'",
            "`serial`",
            "its own serial",
        ),
        (
            &format!("{fd}\nblk-file = 'null:1G'"),
            &format!("{fd}\nblk-file = 'null:1G'"),
            "`fd`",
            "its own socket",
        ),
    ];
    for (first, second, named, advice) in cases {
        let text = format!("[[disk]]\n{first}\n[[disk]]\n{second}\n");
        let error = images.file(&text, &host()).unwrap_err();
        assert!(matches!(error, Error::Shared { .. }), "{text}: {error}");
        let error = error.to_string();
        assert!(
            error.contains(named) && error.contains(advice),
            "{text}: {error}"
        );
    }
}

#[test]
fn errors_of_a_file_name_the_file_the_disk_and_the_key() {
    let images = Images::new();
    for (text, message) in [
        (
            "",
            "vm.toml: `disk` is missing: write a [[disk]] table for each disk",
        ),
        (
            "[[disk]]\nname = 'root'\nsocket-path = '@/s'",
            "vm.toml: `blk-file` of disk \"root\" is missing: name the image with \
             blk-file = \"PATH\", or blk-file = \"null:SIZE\" for a disk that stores nothing",
        ),
        (
            "[workers]\ncount = 3\n[[disk]]\nblk-file = 'null:1M'\nnum-queues = 2\n\
             socket-path = '@/s'",
            "vm.toml: `count` in [workers]: \"3\" is more than there are queues to serve \
             (2 in total): write fewer workers, or more with num-queues",
        ),
        (
            "[workers]\npoll = 'never'\npoll-max-us = 3\n[[disk]]\nblk-file = 'null:1M'\n\
             socket-path = '@/s'",
            "vm.toml: `poll-max-us` in [workers] and `poll = \"never\"` cannot stand together: \
             only adaptive polling has a longest time; leave out one of them",
        ),
        (
            "pid-file = '/nowhere/pid'\n[[disk]]\nblk-file = 'null:1M'\nsocket-path = '@/s'",
            "vm.toml: `pid-file`: /nowhere: No such file or directory (os error 2): make the \
             directory first, or write another path",
        ),
    ] {
        let error = images.file(text, &host()).unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}

#[test]
fn a_descriptor_is_for_one_thing() {
    let images = Images::new();
    let (one, two) = UnixStream::pair().unwrap();
    let (one, two) = (one.as_raw_fd(), two.as_raw_fd());
    let disk = |image: &str, socket: &str, more: String| {
        format!(
            "[[disk]]\nblk-file = '@/{image}'\n{socket}\nformat = 'qcow2'\nserial = '{image}'\n{more}\n"
        )
    };
    for (first, second) in [
        (format!("key-fd = {one}"), format!("key-fd = {one}")),
        (
            format!("key-fd = {one}"),
            format!("image-key = ['/x=fd:{one}']"),
        ),
        (
            format!("image-key = ['/x=fd:{one}', '/y=fd:{one}']"),
            String::new(),
        ),
    ] {
        let text = disk("a.img", "socket-path = '@/s'", first)
            + &disk("b.img", "socket-path = '@/t'", second);
        let error = images.file(&text, &host()).unwrap_err().to_string();
        assert!(error.contains(&one.to_string()), "{error}");
    }
    let text = disk("a.img", &format!("fd = {one}"), format!("key-fd = {one}"));
    images.file(&text, &host()).unwrap_err();
    let text = disk("a.img", &format!("fd = {one}"), format!("key-fd = {two}"));
    let config = images.file(&text, &host()).unwrap();
    let source = super::super::KeySource::Fd(two);
    assert_eq!(config.disks[0].keys[0].source, source);
}
