# shellcheck shell=bash
SUMMARY="fixed writes and zeroings by the guest, compared with the same on a plain file, qcow2 and raw"

host() {
    local format
    for format in qcow2 raw; do
        make_disk "$format" 64
        start_backend disk "$IMAGE" "$format"
        run_guest "vm-$format" guest_pattern disk
        stop_backend disk || fail "the backend's end"
        check_image
        same_pattern
    done
}

guest_pattern() { pattern /dev/vda; }
