//! Reading compressed clusters.
//!
//! `docs/interop/qcow2.rst`, sections "Cluster mapping" (Compressed Clusters Descriptor) and "Additional
//! fields" (`compression_type`): raw deflate data without a zlib header, or a zstd frame, at any byte
//! offset, ending somewhere in its last 512-byte sector.
//!
//! A cluster is decompressed on the worker's own thread, which does nothing else meanwhile. For a cluster of
//! 64 KiB that was 0.3 ms (deflate) or 0.01 ms (zstd), for the largest, 2 MiB, 4 ms or 0.4 ms (half noise, half
//! repetition; one thread of a busy host). Compressed images are bases and templates of 64 KiB as a rule.

use std::cell::RefCell;
use std::sync::Arc;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::zstd_safe::{DCtx, find_frame_compressed_size};

use super::Qcow2;
use super::entry::Compressed;
use super::header::Compression;
use crate::block::error::{Error, ErrorKind, Result};
use crate::reactor::{Io, Sg};

/// What decompresses, kept by each thread: about 50 KB for deflate, 100 KB for zstd. Frames are decompressed
/// straight into the cluster, so no window is allocated, whatever size a frame's header asks for.
#[derive(Default)]
struct Decompressors {
    deflate: Option<Decompress>,
    zstd: Option<DCtx<'static>>,
}

thread_local! {
    static DECOMPRESSORS: RefCell<Decompressors> = RefCell::default();
}

impl Decompressors {
    /// Fills `output` from what stands at the beginning of `input`; None if that is damaged.
    fn run(&mut self, kind: Compression, input: &[u8], output: &mut [u8]) -> Option<()> {
        match kind {
            Compression::Deflate => self.inflate(input, output),
            Compression::Zstd => self.unzstd(input, output),
        }
    }

    fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Option<()> {
        let inflater = self.deflate.get_or_insert_with(|| Decompress::new(false));
        inflater.reset(false);
        let status = inflater.decompress(input, output, FlushDecompress::Finish);
        let whole = inflater.total_out() == output.len() as u64;
        match status {
            Ok(Status::StreamEnd | Status::Ok | Status::BufError) if whole => Some(()),
            _ => None,
        }
    }

    /// As QEMU does, takes several frames if the first one does not make a whole cluster.
    fn unzstd(&mut self, mut input: &[u8], output: &mut [u8]) -> Option<()> {
        if self.zstd.is_none() {
            self.zstd = DCtx::try_create();
        }
        let context = self.zstd.as_mut()?;
        let mut done = 0;
        while done < output.len() {
            let frame = find_frame_compressed_size(input).ok()?;
            let (frame, rest) = input.split_at_checked(frame).filter(|f| !f.0.is_empty())?;
            done += context.decompress(&mut output[done..], frame).ok()?;
            input = rest;
        }
        Some(())
    }
}

impl Qcow2 {
    /// Fills `to` from `skip` bytes into a compressed cluster; not beyond its end.
    ///
    /// # Errors
    /// Those of reading the file; [`ErrorKind::Corrupt`] if the data is not a whole compressed cluster.
    pub async fn read_compressed(
        &self,
        io: &Io,
        data: Compressed,
        skip: u64,
        to: Sg<'_>,
    ) -> Result<()> {
        let cluster = self.inflate(io, data).await?;
        let part = cluster.get(skip as usize..).unwrap_or_default();
        to.copy_from(part);
        Ok(())
    }

    /// A whole cluster, decompressed now or by an earlier read.
    pub(super) async fn inflate(&self, io: &Io, data: Compressed) -> Result<Arc<[u8]>> {
        let slot = self.inflated.slot(data);
        // Whoever comes second waits for the first, and does the work if that one fails.
        let made = slot.get_or_try_init(|| self.inflate_now(io, data)).await;
        if made.is_err() {
            self.inflated.forget(data);
        }
        made.cloned()
    }

    /// Reads and decompresses. Input is bounded by the descriptor (twice the cluster size), output by the
    /// cluster size.
    async fn inflate_now(&self, io: &Io, data: Compressed) -> Result<Arc<[u8]>> {
        let start = data.offset.0 & !511;
        let lead = (data.offset.0 - start) as usize;
        let mut input = io.buf(lead + data.bytes as usize);
        // The file may end inside the last sector: the rest reads as zeros.
        self.storage.read(io, start, input.sg()).await?;
        let mut output: Arc<[u8]> = (0..self.tables.geometry.cluster_size())
            .map(|_| 0)
            .collect();
        let done = Arc::get_mut(&mut output).and_then(|output| {
            let kind = self.header.compression;
            DECOMPRESSORS.with_borrow_mut(|all| all.run(kind, &input[lead..], output))
        });
        self.inflated.count();
        done.map(|()| output).ok_or_else(|| {
            let what = "a compressed cluster is damaged";
            let path = &self.header.path;
            Error::image(ErrorKind::Corrupt, path, data.offset.0, what).hint(format_args!(
                "look at the image with: qemu-img check {}",
                path.display()
            ))
        })
    }
}
