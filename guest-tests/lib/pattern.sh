# shellcheck shell=sh
# A fixed series of writes, done by the guest on its disk and by the host on a plain file, which must
# then be equal. Whatever runs this must have neither `pipefail` nor a disk below 64 MiB.

# pattern TARGET: 120 writes of 512 B to 512 KiB at 512-byte steps, some over others, some of zeros.
pattern() {
    seed=12345
    writes=0
    while [ "$writes" -lt 120 ]; do
        # Lehmer's generator, in 31 bits (works in any shell's arithmetic).
        seed=$((seed * 48271 % 2147483647))
        offset=$((seed % 122880 * 512))
        seed=$((seed * 48271 % 2147483647))
        # Powers of two, and one sector more or less for every third.
        size=$((512 << seed % 11))
        [ $((writes % 3)) -ne 0 ] || size=$((size + 512))
        if [ $((writes % 8)) -eq 7 ]; then
            pattern_zeros "$1" "$offset" "$size"
        else
            yes "write $writes at $offset" | head -c "$size" |
                dd of="$1" bs="$size" seek="$offset" oflag=seek_bytes iflag=fullblock conv=notrunc 2>/dev/null
        fi
        writes=$((writes + 1))
    done
    sync
}

# pattern_zeros TARGET OFFSET SIZE: WRITE_ZEROES on a disk.
pattern_zeros() {
    if [ -b "$1" ]; then
        sync
        blkdiscard -z -o "$2" -l "$3" "$1"
    else
        dd if=/dev/zero of="$1" bs="$3" seek="$2" count=1 oflag=seek_bytes conv=notrunc 2>/dev/null
    fi
}
