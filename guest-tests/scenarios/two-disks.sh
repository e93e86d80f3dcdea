# shellcheck shell=bash
SUMMARY="two disks of one VM, raw and qcow2, each served by its own process, copied and compared under load"

host() {
    make_disk qcow2 64
    cp --sparse=always "$BASE" "$RUN_DIR/second.raw"
    start_backend one "$IMAGE" qcow2 --num-queues 2
    start_backend two "$RUN_DIR/second.raw" raw --num-queues 2
    run_guest vm guest_two one,num-queues=2 two,num-queues=2
    stop_backend one || fail "the first backend's end"
    stop_backend two || fail "the second backend's end"
    check_image
    same_pattern
    qemu-img compare -f qcow2 -F raw "$IMAGE" "$RUN_DIR/second.raw" >&2 || fail "the disks differ"
}

guest_two() {
    same "the disks at first" "$(disk_sha /dev/vda)" "$(disk_sha /dev/vdb)"
    pattern /dev/vda &
    first=$!
    pattern /dev/vdb &
    wait "$first" || fail "the first disk"
    wait "$!" || fail "the second disk"
    same "the disks at last" "$(disk_sha /dev/vda)" "$(disk_sha /dev/vdb)"
}
