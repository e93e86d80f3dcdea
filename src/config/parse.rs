//! Values that are more than a word or a number. Each error says what was expected.

/// Reads a size in bytes: a number with an optional binary suffix (`K`, `M`, `G`, `T`, `P`).
pub fn size(text: &str) -> Result<u64, &'static str> {
    const EXPECTED: &str = "write a number of bytes, or one with K, M, G, T or P such as 10G";
    let (digits, shift) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => {
            let shift = match suffix.to_ascii_uppercase() {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                _ => return Err(EXPECTED),
            };
            (&text[..at], shift)
        }
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(EXPECTED);
    }
    let number: u64 = digits.parse().map_err(|_| EXPECTED)?;
    number.checked_mul(1 << shift).ok_or(EXPECTED)
}

/// Reads a list of CPUs as the kernel writes it (`0-3,8`), in the order written.
pub fn cpu_list(text: &str) -> Result<Vec<usize>, &'static str> {
    const EXPECTED: &str = "write CPU numbers and ranges with commas between them, such as 2,4-5";
    /// No Linux kernel is built for more; a range must not eat all memory.
    const MOST: usize = 8192;
    let number = |text: &str| match text.trim().parse::<usize>() {
        Ok(n) if n < MOST && !text.trim().starts_with('+') => Ok(n),
        _ => Err(EXPECTED),
    };
    let mut cpus = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => cpus.push(number(part)?),
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(EXPECTED);
                }
                cpus.extend(first..=last);
            }
        }
    }
    Ok(cpus)
}

/// Writes a list of CPUs so that [`cpu_list`] reads it back.
pub fn show_cpu_list(cpus: &[usize]) -> String {
    cpus.iter()
        .map(usize::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

/// Reads permission bits, octal.
pub fn mode(text: &str) -> Result<u32, &'static str> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    match u32::from_str_radix(digits, 8) {
        Ok(bits) if octal && bits <= 0o777 => Ok(bits),
        _ => Err("write permission bits in octal, such as 0600 or 0660"),
    }
}

/// The FNV-1a hash, 64 bits: short, the same on every host and in every release.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The known word that needs the fewest changes to be `word`, if that is few enough to be a slip.
pub fn nearest(word: &str, known: &[&'static str]) -> Option<&'static str> {
    let (distance, best) = known.iter().map(|k| (edit_distance(word, k), *k)).min()?;
    (distance <= 1 + best.len() / 4).then_some(best)
}

/// Levenshtein's distance in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4k", 4096),
            ("1G", 1 << 30),
            ("3T", 3 << 40),
            ("1P", 1 << 50),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "+1",
            "1 G",
            "1.5G",
            "1GB",
            "1X",
            "é",
            "1é",
            "99999999P",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpu_lists() {
        assert_eq!(cpu_list("2,4-5"), Ok(vec![2, 4, 5]));
        assert_eq!(cpu_list("5, 0\n"), Ok(vec![5, 0]));
        for text in [
            "",
            ",",
            "1,",
            "5-4",
            "a",
            "1-",
            "-1",
            "+1",
            "0-99999999",
            "1-2-3",
        ] {
            assert!(cpu_list(text).is_err(), "{text}");
        }
        assert_eq!(cpu_list(&show_cpu_list(&[7, 1, 3])), Ok(vec![7, 1, 3]));
    }

    #[test]
    fn modes() {
        assert_eq!(mode("0600"), Ok(0o600));
        assert_eq!(mode("0o660"), Ok(0o660));
        assert_eq!(mode("660"), Ok(0o660));
        for text in ["", "0o", "8", "1777", "+600", "rw", "0x1"] {
            assert!(mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_nearest_key_is_found_and_a_far_one_is_not() {
        let known = ["queue-size", "num-queues", "fd"];
        assert_eq!(nearest("queue_size", &known), Some("queue-size"));
        assert_eq!(nearest("num-queue", &known), Some("num-queues"));
        assert_eq!(nearest("password", &known), None);
        assert_eq!(nearest("x", &[]), None);
    }

    #[test]
    fn fnv1a_is_the_published_one() {
        // Test vectors of the authors, for the empty string and "foobar".
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
