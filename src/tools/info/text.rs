//! What is told of an image, for people.

use std::fmt::Write;

use clap::ValueEnum;

use super::{Info, Qcow2Info};
use crate::block::qcow2::bitmaps::Bitmap;
use crate::block::qcow2::header::autoclear;
use crate::block::qcow2::snapshots::Snapshot;
use crate::config::Format;

/// Lines of `name: value`, without a line end behind the last.
pub(super) fn of(info: &Info) -> String {
    let mut out = String::new();
    let mut line = |name: &str, value: String| {
        if !out.is_empty() {
            out.push('\n');
        }
        // Writing to a string does not fail.
        let _ = write!(out, "{name}: {value}");
    };
    line("image", plain(&info.path.display().to_string()));
    line("file format", word(info.format));
    line("virtual size", size(info.virtual_size));
    line("disk size", size(info.disk_size));
    if let Some(image) = &info.qcow2 {
        qcow2(image, &mut line);
    }
    out
}

fn qcow2(image: &Qcow2Info, line: &mut impl FnMut(&str, String)) {
    let header = &image.header;
    line("cluster size", size(header.geometry.cluster_size()));
    line("version", header.version.to_string());
    for (kind, names) in [
        ("incompatible features", image.incompatible()),
        ("compatible features", image.compatible()),
        ("autoclear features", image.autoclear()),
    ] {
        if !names.is_empty() {
            line(kind, names.join(", "));
        }
    }
    if let Some(backing) = &header.backing {
        line("backing file", plain(&backing.name));
        let format = backing.format.as_deref().unwrap_or("not stated");
        line("backing file format", plain(format));
    }
    if let Some(name) = &header.data_file {
        let raw = header.autoclear & autoclear::RAW_EXTERNAL != 0;
        let name = if name.is_empty() { "not stated" } else { name };
        let raw = if raw { " (raw by itself)" } else { "" };
        line("data file", format!("{}{raw}", plain(name)));
    }
    line("encryption", image.encryption().unwrap_or("none").into());
    line("compression type", image.compression().into());
    line("refcount bits", header.geometry.refcount_bits().to_string());
    line("internal snapshots", image.snapshots.len().to_string());
    for snapshot in &image.snapshots {
        line("  snapshot", self::snapshot(snapshot));
    }
    line("persistent bitmaps", image.bitmaps.len().to_string());
    for bitmap in &image.bitmaps {
        line("  bitmap", self::bitmap(bitmap));
    }
}

fn bitmap(bitmap: &Bitmap) -> String {
    let state = match (bitmap.in_use, bitmap.auto) {
        (true, _) => "in use or not stored, so not valid",
        (false, true) => "enabled",
        (false, false) => "disabled",
    };
    let name = plain(&bitmap.name);
    format!(
        "name {name}, {state}, a bit for {}",
        size(bitmap.granularity)
    )
}

fn snapshot(snapshot: &Snapshot) -> String {
    format!(
        "id {}, name {}, taken {}, disk {}, machine state {}",
        plain(&snapshot.id),
        plain(&snapshot.name),
        date(snapshot.date_secs.into()),
        size(snapshot.disk_bytes),
        size(snapshot.vm_state_bytes),
    )
}

/// The word that the user writes for a format.
pub(super) fn word(format: Format) -> String {
    let value = format.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Text from an image, with what would move a terminal's cursor escaped.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// A number of bytes: by itself, and in the largest unit that does not hide its size.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = bytes.checked_ilog2().unwrap_or(0) / 10;
    match UNITS.get((power as usize).wrapping_sub(1)) {
        None => format!("{bytes} bytes"),
        Some(unit) => {
            let scaled = bytes as f64 / (1u64 << (power * 10)) as f64;
            let rounded = format!("{scaled:.2}");
            let rounded = rounded.trim_end_matches('0').trim_end_matches('.');
            format!("{rounded} {unit} ({bytes} bytes)")
        }
    }
}

/// Seconds since 1970 as date and time, UTC.
fn date(secs: u64) -> String {
    let (mut days, second) = (secs / 86_400, secs % 86_400);
    let is_leap = |year: u64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let mut year = 1970;
    loop {
        let in_year = if is_leap(year) { 366 } else { 365 };
        if days < in_year {
            break;
        }
        days -= in_year;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for in_month in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < in_month {
            break;
        }
        days -= in_month;
        month += 1;
    }
    format!(
        "{year}-{month:02}-{:02} {:02}:{:02}:{:02} UTC",
        days + 1,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (secs, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (u64::from(u32::MAX), "2106-02-07 06:28:15 UTC"),
        ] {
            assert_eq!(date(secs), want);
        }
    }

    #[test]
    fn sizes_are_told_exactly_and_shortly() {
        for (bytes, want) in [
            (0, "0 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB (1024 bytes)"),
            (1_572_864, "1.5 MiB (1572864 bytes)"),
            (u64::MAX, "16 EiB (18446744073709551615 bytes)"),
        ] {
            assert_eq!(size(bytes), want);
        }
    }

    #[test]
    fn control_characters_of_a_name_do_not_reach_the_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc ä"), "a\\u{1b}[2Jb\\nc ä");
    }
}
