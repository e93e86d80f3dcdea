//! An L2 entry in 32 bits: what slices in memory are made of.
//!
//! A terabyte in clusters of 64 KiB has 16 Mi entries. Nearly all of them are a cluster number and two
//! flags, so half the format's 64 bits are enough; an entry that does not fit is kept in full beside the
//! slice, and its code says [`SPILLED`].
//!
//! | bits | plain entry | otherwise |
//! | --- | --- | --- |
//! | 0 | reads as zeros | kind: [`BAD`], [`SPILLED`] or incomplete |
//! | 1 | referenced exactly once | |
//! | 2 | 0 | 1 |
//! | 3 to 31 | host cluster; 0: none | number of an incomplete cluster |

use super::entry;

/// Set in everything but plain entries.
const SPECIAL: u32 = 4;
/// Not to be used: [`entry::BAD`].
pub(super) const BAD: u32 = SPECIAL;
/// The entry is kept in full elsewhere.
pub(super) const SPILLED: u32 = SPECIAL | 1;
/// An [`entry::INCOMPLETE`] marker.
const INCOMPLETE: u32 = SPECIAL | 2;
/// Bits 0 to 2.
const KIND: u32 = 7;
/// The first bit of the number.
const NUMBER: u32 = 3;
/// The bits of the flags in a plain code, and where [`entry::COPIED`] is in an entry.
const ZERO: u32 = 1;
const COPIED: u32 = 2;
const COPIED_SHIFT: u32 = 62;

/// True if [`plain`] says what the code means.
#[inline]
pub(super) fn is_plain(code: u32) -> bool {
    code & SPECIAL == 0
}

/// True if `next` says the same as `code`, one host cluster on; or just the same, where there is none.
#[inline]
pub(super) fn follows(code: u32, next: u32) -> bool {
    let step = if code >> NUMBER == 0 { 0 } else { 1 << NUMBER };
    is_plain(code) && code.checked_add(step) == Some(next)
}

/// True for a plain code of an entry that leads to a host cluster.
pub(super) fn has_cluster(code: u32) -> bool {
    is_plain(code) && code >> NUMBER != 0
}

/// The code that is `n` host clusters behind a plain one that has a cluster.
#[inline]
pub(super) fn behind(code: u32, n: u32) -> u32 {
    code.wrapping_add(n << NUMBER)
}

/// The entry of a plain code.
#[inline]
pub(super) fn plain(code: u32, cluster_bits: u32) -> u64 {
    let flags = u64::from(code & ZERO) | u64::from(code & COPIED) << COPIED_SHIFT;
    u64::from(code >> NUMBER) << cluster_bits | flags
}

/// The entry of any code but [`SPILLED`].
pub(super) fn raw(code: u32, cluster_bits: u32) -> u64 {
    match code & KIND {
        INCOMPLETE => entry::incomplete(code >> NUMBER),
        kind if is_plain(kind) => plain(code, cluster_bits),
        _ => entry::BAD,
    }
}

/// The code of an entry; [`SPILLED`] if it has none of its own.
pub(super) fn of(raw: u64, cluster_bits: u32) -> u32 {
    if raw == entry::BAD {
        return BAD;
    }
    if let Some(index) = entry::incomplete_index(raw) {
        return index << NUMBER | INCOMPLETE;
    }
    let number = (raw & entry::OFFSET) >> cluster_bits;
    let Ok(number) = u32::try_from(number << NUMBER) else {
        return SPILLED;
    };
    let flags = (raw & entry::ZERO) as u32 | (raw >> COPIED_SHIFT) as u32 & COPIED;
    // Whatever else is in the entry is lost in the code: reserved bits, a crooked offset, deflated data.
    match number | flags {
        code if plain(code, cluster_bits) == raw => code,
        _ => SPILLED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_cluster_and_nothing_else_follows() {
        let code = |raw| of(raw, 16);
        let host = |n: u64| n << 16 | entry::COPIED;
        assert!(follows(code(host(4)), code(host(5))));
        assert!(follows(code(0), code(0)));
        assert!(follows(code(entry::ZERO), code(entry::ZERO)));
        for (one, next) in [
            (host(4), host(4)),
            (host(4), 5 << 16),
            (host(4), host(5) | entry::ZERO),
            (host((1 << 29) - 1), 0),
            (host((1 << 29) - 1), entry::COPIED),
            (0, entry::ZERO),
            (0, 1 << 16),
            (entry::BAD, entry::BAD),
            (entry::incomplete(1), entry::incomplete(2)),
            (1 << 62, 1 << 62),
        ] {
            assert!(!follows(code(one), code(next)), "{one:#x} {next:#x}");
        }
    }

    #[test]
    fn what_a_code_says_is_the_entry_and_the_rest_is_spilled() {
        for bits in 9..=21 {
            let number = |n: u64| n << bits;
            let most = (1u64 << 29) - 1;
            let fit = [
                0,
                entry::ZERO,
                number(1),
                number(1) | entry::COPIED,
                number(most),
                number(most) | entry::ZERO,
                number(most) | entry::COPIED | entry::ZERO,
                entry::COPIED,
                entry::BAD,
                entry::incomplete(0),
                entry::incomplete(entry::MAX_INCOMPLETE),
            ];
            for entry in fit {
                let code = of(entry, bits);
                assert_ne!(code, SPILLED, "{entry:#x} with {bits} bits");
                assert_eq!(raw(code, bits), entry, "{entry:#x} with {bits} bits");
            }
            let spilled = [
                number(most + 1),
                number(1) | 1 << 8,
                number(1) | 1 << 56,
                number(1) | 2,
                1 << 62 | 0x1234,
                entry::BAD | 1,
                entry::incomplete(0) | 4,
                u64::MAX,
            ];
            for entry in spilled {
                assert_eq!(of(entry, bits), SPILLED, "{entry:#x} with {bits} bits");
            }
        }
    }
}
