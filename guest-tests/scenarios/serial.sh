# shellcheck shell=bash
SUMMARY="the serial number that the user chose arrives in the guest, up to all 20 characters"

host() {
    backend_is_virtioblkd || skip "qemu-storage-daemon has no choice of a serial number"
    make_disk raw 16
    start_backend one "$IMAGE" raw --serial virtioblkd-7
    cp "$IMAGE" "$RUN_DIR/other.raw"
    start_backend two "$RUN_DIR/other.raw" raw --serial 12345678901234567890
    INITRD=$GUEST_INITRD_SMALL run_guest vm guest_serial one two
    stop_backend one || fail "the backend's end"
    stop_backend two || fail "the backend's end"
    check_image
}

guest_serial() {
    same serial virtioblkd-7 "$(cat /sys/block/vda/serial)"
    same serial 12345678901234567890 "$(cat /sys/block/vdb/serial)"
}
