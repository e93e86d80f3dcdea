# shellcheck shell=bash
SUMMARY="kill -9 of QEMU under load: the backend stays, flushes, unlocks, and serves the next VM a whole file system"

host() {
    local pid deadline
    make_disk qcow2 256
    start_backend disk "$IMAGE" qcow2 --num-queues 2
    pid=${BACKEND_PID[disk]}
    start_guest first guest_load disk,num-queues=2
    guest_says first "UNDER LOAD" "$GUEST_TIMEOUT"
    vm_kill first

    if backend_is_virtioblkd; then
        # The lock is given back when everything is flushed; until then qemu-img refuses.
        deadline=$((SECONDS + 20))
        until qemu-img check -q -f qcow2 "$IMAGE" 2>"$RUN_DIR/check"; do
            alive "$pid" || fail "the backend ended with its VM"
            ((SECONDS <= deadline)) || {
                cat "$RUN_DIR/check" >&2
                fail "qemu-img check still fails 20 s after QEMU's end"
            }
            sleep 0.1
        done
    fi
    alive "$pid" || fail "the backend ended with its VM"

    run_guest second guest_after disk,num-queues=2
    same "the backend's pid" "$pid" "${BACKEND_PID[disk]}"
    alive "$pid" || fail "the backend ended with the second VM"
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha second
}

guest_load() {
    mkfs.ext4 -q -F /dev/vda
    mount /dev/vda /mnt
    tree /mnt/files 100
    fio --name=load --directory=/mnt --rw=randrw --bsrange=4k-64k --size=96M --ioengine=libaio --direct=1 \
        --iodepth=16 --fsync=50 --time_based --runtime=120 --output=/dev/null &
    wait_writes vda 1000
    result "UNDER LOAD"
    wait
    fail "nobody killed this machine"
}

guest_after() {
    # Mounting replays the journal; then there is nothing left to repair.
    mount /dev/vda /mnt
    check_tree /mnt/files 100
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck after the crash"
    fio_verify libaio 16 again 0 8 --bs=4k
    result "SHA $(disk_sha /dev/vda)"
}
