# shellcheck shell=bash
SUMMARY="a read-only disk: the guest sees it as such, reads it, and cannot write or discard"

host() {
    local before
    make_disk qcow2 64
    before=$(sha256_of "$IMAGE")
    start_backend disk "$IMAGE" qcow2 --read-only
    run_guest vm guest_read_only disk
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
    same "the image's sha256" "$before" "$(sha256_of "$IMAGE")"
}

guest_read_only() {
    same "ro" 1 "$(cat /sys/block/vda/ro)"
    # Also with the kernel's own flag out of the way.
    blockdev --setrw /dev/vda || true
    must_fail dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync
    must_fail blkdiscard -f -o 0 -l 65536 /dev/vda
    must_fail blkdiscard -f -z -o 0 -l 65536 /dev/vda
    result "SHA $(disk_sha /dev/vda)"
}
