//! The L1 table of an image that is being opened.
//!
//! `docs/interop/qcow2.rst`, section "Cluster mapping".

use std::ops::Range;

use super::entry;
use super::header::Header;
use super::snapshots::{Held, merge};
use crate::block::error::{Error, ErrorKind, Result};
use crate::block::storage::Storage;
use crate::reactor::Io;

pub(super) async fn read_l1(io: &Io, storage: &Storage, header: &Header) -> Result<Vec<u64>> {
    let mut raw = Vec::with_capacity(header.l1_entries as usize);
    let bytes = header.l1_entries * 8;
    let mut done = 0;
    while done < bytes {
        let len = (bytes - done).min(1 << 20);
        // Whole sectors, so that the read needs no bounce buffer.
        let mut buf = io.buf(len.next_multiple_of(512) as usize);
        storage
            .read(io, header.l1_offset.0 + done, buf.sg())
            .await?;
        raw.extend(
            buf[..len as usize]
                .chunks_exact(8)
                .map(|b| b.try_into().map_or(0, u64::from_be_bytes)),
        );
        done += len;
    }
    Ok(raw)
}

/// Checks every L1 entry and returns the metadata clusters that they, the header, the L1 table and
/// snapshots make.
pub(super) fn check_l1(
    raw: &[u64],
    storage: &Storage,
    header: &Header,
    held: Option<&Held>,
) -> Result<Vec<Range<u64>>> {
    let g = header.geometry;
    let corrupt = |index: usize, what: &str| {
        let check = format!("qemu-img check -r all {}", header.path.display());
        Err(Error::image(
            ErrorKind::Corrupt,
            &header.path,
            header.l1_offset.0 + index as u64 * 8,
            format!("L1 entry {index} {what}; look at the image with: {check}"),
        ))
    };
    let cluster = |offset: u64| offset >> g.cluster_bits;
    let header_cluster = 0..1;
    let mut fixed = Vec::from([header_cluster]);
    if header.l1_entries > 0 {
        let first = cluster(header.l1_offset.0);
        fixed.push(first..first + g.clusters(header.l1_entries * 8));
    }
    // The refcount table may move, and its clusters become data: it is not among the fixed.
    let first = cluster(header.refcount_table_offset.0);
    let refcount_table = first..first + header.refcount_table_clusters;
    let mut tables: Vec<(u64, usize)> = Vec::new();
    for (index, &raw) in raw.iter().enumerate() {
        let offset = entry::l1_offset(raw);
        if !entry::l1_is_well_formed(raw, &g) || (offset == 0 && raw != 0) {
            return corrupt(index, "is malformed");
        }
        if offset == 0 {
            continue;
        }
        if offset >= storage.len() {
            return corrupt(index, "points outside the file");
        }
        let table = cluster(offset);
        if fixed.iter().any(|range| range.contains(&table)) || refcount_table.contains(&table) {
            return corrupt(index, "points at other metadata");
        }
        if let Some(held) = held {
            if held.has_table(table) {
                return corrupt(index, "points at a table of a snapshot");
            }
            match (entry::is_shared_table(raw), held.has_l2_table(table)) {
                (true, false) => {
                    let what = "says that its L2 table is shared, and no snapshot has it";
                    return corrupt(index, what);
                }
                (false, true) => {
                    let what = "says that its L2 table is its own, and a snapshot has it";
                    return corrupt(index, what);
                }
                _ => {}
            }
        }
        tables.push((table, index));
    }
    tables.sort_unstable();
    if let Some(pair) = tables.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        if held.is_some() {
            return corrupt(pair[1].1, "points at the L2 table of another entry");
        }
    }
    if let Some(held) = held {
        if let Some(range) = held.ranges().find(|held| {
            let both = |range: &Range<u64>| range.start < held.end && held.start < range.end;
            fixed.iter().any(both)
        }) {
            let what = format!(
                "a table of a snapshot overlaps the header or the L1 table; look at the image with: \
                 qemu-img check {}",
                header.path.display()
            );
            let at = range.start << g.cluster_bits;
            return Err(Error::image(ErrorKind::Corrupt, &header.path, at, what));
        }
        fixed.extend(held.ranges());
    }
    fixed.extend(tables.into_iter().map(|(table, _)| table..table + 1));
    merge(&mut fixed);
    Ok(fixed)
}
