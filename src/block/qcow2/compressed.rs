//! Reading compressed clusters.
//!
//! `docs/interop/qcow2.rst`, section "Cluster mapping" (Compressed Clusters Descriptor): raw deflate data
//! without a zlib header, at any byte offset, ending somewhere in its last 512-byte sector.

use flate2::{Decompress, FlushDecompress, Status};

use super::Qcow2;
use super::entry::Compressed;
use crate::block::error::{Error, ErrorKind, Result};
use crate::reactor::{AlignedBuf, Io, Sg};

impl Qcow2 {
    /// Fills `to` from `skip` bytes into a compressed cluster; not beyond its end.
    ///
    /// # Errors
    /// Those of reading the file; [`ErrorKind::Corrupt`] if the data is not a whole deflated cluster.
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

    /// Reads and inflates a whole cluster. Input is bounded by the descriptor (twice the cluster size),
    /// output by the cluster size.
    pub(super) async fn inflate(&self, io: &Io, data: Compressed) -> Result<AlignedBuf> {
        let start = data.offset.0 & !511;
        let lead = (data.offset.0 - start) as usize;
        let mut input = io.buf(lead + data.bytes as usize);
        // The file may end inside the last sector: the rest reads as zeros.
        self.storage.read(io, start, input.sg()).await?;
        let mut output = io.buf(self.tables.geometry.cluster_size() as usize);
        let mut inflater = Decompress::new(false);
        let status = inflater.decompress(&input[lead..], &mut output, FlushDecompress::Finish);
        let whole = inflater.total_out() == output.len() as u64;
        match status {
            Ok(Status::StreamEnd | Status::Ok | Status::BufError) if whole => Ok(output),
            _ => Err(Error::image(
                ErrorKind::Corrupt,
                &self.header.path,
                data.offset.0,
                "a compressed cluster is damaged",
            )),
        }
    }
}
