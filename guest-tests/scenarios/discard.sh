# shellcheck shell=bash
SUMMARY="fstrim in the guest gives the space back on the host, qcow2 and raw"

host() {
    local format full trimmed
    for format in qcow2 raw; do
        make_disk "$format" 96
        start_backend disk "$IMAGE" "$format"
        run_guest "fill-$format" guest_fill disk
        stop_backend disk || fail "the backend's end"
        check_image
        full=$(allocated_kib "$IMAGE")

        start_backend disk "$IMAGE" "$format"
        run_guest "trim-$format" guest_trim disk
        stop_backend disk || fail "the backend's end"
        check_image
        check_guest_sha "trim-$format"
        trimmed=$(allocated_kib "$IMAGE")
        say "$format: $full KiB allocated before, $trimmed KiB after"
        # 40 MiB were written and deleted; the file system keeps a little.
        ((full > 40 * 1024)) || fail "only $full KiB allocated after the writes"
        ((trimmed < full - 36 * 1024)) || fail "fstrim freed $((full - trimmed)) KiB only"
    done
}

guest_fill() {
    # Nothing of the base stays, so that all that is allocated later is what was written.
    blkdiscard /dev/vda
    mkfs.ext4 -q -F -E nodiscard /dev/vda
    mount /dev/vda /mnt
    tr '\0' x </dev/zero | head -c $((40 << 20)) >/mnt/large
    tree /mnt/files 50
    rm /mnt/large
    umount /mnt
}

guest_trim() {
    mount /dev/vda /mnt
    fstrim -v /mnt
    check_tree /mnt/files 50
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck"
    result "SHA $(disk_sha /dev/vda)"
}
