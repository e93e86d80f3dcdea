//! Images that were not closed, and metadata that is found to be wrong while an image is served.

use super::*;
use crate::block::qcow2::check::check;

const WRITE: Options = Options {
    read_only: false,
    ..READ
};

fn word(bytes: &[u8], at: u64) -> u64 {
    let at = at as usize;
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// An image with data in 16 clusters; where its L2 table and its first refcount block are.
fn image(options: &str) -> (Vec<u8>, u64, u64) {
    let images = Images::new();
    images.create("a", options, 4 << 20);
    images.qemu_io("a", &["write -P 1 0 1M"]);
    let bytes = images.bytes("a");
    let l2 = word(&bytes, word(&bytes, 40)) & 0x00ff_ffff_ffff_fe00;
    let block = word(&bytes, word(&bytes, 48));
    (bytes, l2, block)
}

fn marks(storage: &Storage) -> u8 {
    the_sim(storage).crash_with(|_, _| 0)[79] & 3
}

/// What QEMU with lazy refcounts leaves behind when it is killed: the bit, and refcounts that lag behind.
fn unclosed() -> Vec<u8> {
    let (mut bytes, _, block) = image("cluster_size=64k,lazy_refcounts=on");
    bytes[79] |= 1;
    for cluster in 6..14 {
        bytes[block as usize + cluster * 2 + 1] = 0;
    }
    bytes
}

#[test]
fn an_image_that_was_not_closed_is_repaired_before_it_is_written_to() {
    let io = reactor();
    let storage = sim(unclosed(), Sim::default());
    io.block_on(async {
        assert!(check(&io, &storage).await.expect("check").errors >= 8);
        let image = open(&io, &storage, WRITE).await.expect("open");
        assert_eq!(marks(&storage), 0);
        let mut buf = io.buf(1 << 20);
        buf.fill(9);
        image
            .write(&io, &(), 2 << 20, buf.sg())
            .await
            .expect("write");
        let all = read_all(&io, &image, &()).await.expect("read");
        assert!(
            all[..1 << 20].iter().all(|b| *b == 1),
            "nothing was handed out twice"
        );
        // The compatible bit of lazy refcounts does not make them lazy here.
        assert_eq!(marks(&storage), 0);
        image.close(&io, &()).await.expect("close");
        let report = check(&io, &storage).await.expect("check");
        assert!(report.is_clean(), "{report:?}");
    });
    io.close();
}

#[test]
fn an_image_that_was_not_closed_is_refused_by_option_and_read_as_it_is() {
    let io = reactor();
    let bytes = unclosed();
    let storage = sim(bytes.clone(), Sim::default());
    io.block_on(async {
        let refuse = Options {
            on_dirty: OnDirty::Refuse,
            ..WRITE
        };
        let error = open(&io, &storage, refuse).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        for command in ["virtioblkd check -r all", "qemu-img check -r all"] {
            assert!(error.to_string().contains(command), "{error}");
        }
        let image = open(&io, &storage, READ).await.expect("for reading");
        let all = read_all(&io, &image, &()).await.expect("read");
        assert!(all[..1 << 20].iter().all(|b| *b == 1));
        assert_same(&the_sim(&storage).image(), &bytes, "nothing was written");
    });
    io.close();
}

#[test]
fn an_image_that_can_not_be_repaired_is_not_opened_for_writing() {
    let io = reactor();
    let (mut bytes, l2, _) = image("cluster_size=64k");
    bytes[79] |= 1;
    put(&mut bytes, l2, 1 << 40 | 1 << 63);
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let error = open(&io, &storage, WRITE).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(marks(&storage), 1, "the dirty bit stays");
        assert!(open(&io, &storage, READ).await.is_ok());
    });
    io.close();
}

#[test]
fn an_entry_that_leads_nowhere_marks_an_image_that_is_written_to() {
    let io = reactor();
    for reading in [true, false] {
        let (mut bytes, l2, _) = image("cluster_size=64k");
        put(&mut bytes, l2 + 8, 1 << 40 | 1 << 63);
        let storage = sim(bytes, Sim::default());
        io.block_on(async {
            let image = open(&io, &storage, WRITE).await.expect("open");
            let mut buf = io.buf(512);
            buf.fill(3);
            image
                .write(&io, &(), 0, buf.sg())
                .await
                .expect("a good cluster");
            let result = match reading {
                true => read(&io, &image, &(), 65536, buf.sg()).await,
                false => image.write(&io, &(), 65536, buf.sg()).await,
            };
            assert_eq!(result.expect_err("bad").kind(), ErrorKind::Corrupt);
            assert_eq!(marks(&storage), 2);
            let error = image
                .write(&io, &(), 0, buf.sg())
                .await
                .expect_err("stopped");
            assert!(error.to_string().contains("check -r all"), "{error}");
            read(&io, &image, &(), 0, buf.sg())
                .await
                .expect("reading goes on");
        });
    }
    // An image that is only read is left as it is.
    let (mut bytes, l2, _) = image("cluster_size=64k");
    put(&mut bytes, l2 + 8, 1 << 40 | 1 << 63);
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, READ).await.expect("open");
        let mut buf = io.buf(512);
        assert!(read(&io, &image, &(), 65536, buf.sg()).await.is_err());
        assert_eq!(marks(&storage), 0);
    });
    io.close();
}

#[test]
fn a_freed_cluster_that_nobody_counted_marks_the_image() {
    let io = reactor();
    let (mut bytes, l2, block) = image("cluster_size=64k");
    let cluster = (word(&bytes, l2) & 0x00ff_ffff_ffff_fe00) >> 16;
    bytes[(block + cluster * 2 + 1) as usize] = 0;
    let storage = sim(bytes, Sim::default());
    io.block_on(async {
        let image = open(&io, &storage, WRITE).await.expect("open");
        image.discard(&io, 0, 65536).await.expect("discard");
        // Once what came before has ended, the cluster leaves limbo.
        for _ in 0..3 {
            let flushed = image.flush(&io, &()).await;
            flushed.expect("the guest's data is safe");
            io.yield_now().await;
        }
        // The flush does not wait for what is freed; the housekeeping sees what came of it.
        image.allocator().expect("writable").settled().await;
        let kept = image.write_back_if_due(&io, &()).await;
        kept.expect("housekeeping");
        assert_eq!(marks(&storage), 2);
        let mut buf = io.buf(512);
        buf.fill(3);
        let error = image
            .write(&io, &(), 65536, buf.sg())
            .await
            .expect_err("stopped");
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    });
    io.close();
}
