# shellcheck shell=bash
SUMMARY="a raw file that was grown, and SIGHUP: the guest sees the new size, and uses it"

host() {
    backend_is_virtioblkd || skip "qemu-storage-daemon does not look at the sizes of its files"
    make_disk raw 64
    start_backend disk "$IMAGE" raw --num-queues 2
    start_guest vm "sectors guest_grow" disk,num-queues=2
    guest_says vm "UNDER LOAD" "$GUEST_TIMEOUT"
    truncate -s 96M "$IMAGE"
    kill -HUP "${BACKEND_PID[disk]}"
    guest_says vm GROWN 30
    # And once more, to a size that is no multiple of anything large.
    truncate -s $((100 * 1024 * 1024 + 512)) "$IMAGE"
    kill -HUP "${BACKEND_PID[disk]}"
    guest_says vm "GROWN AGAIN" 30
    finish_guest vm
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
    grep -E 'size|capacity' "$RUN_DIR/disk.log" >&2 || true
}

guest_grow() {
    same "sectors at first" $((64 * 2048)) "$(cat /sys/block/vda/size)"
    must_fail dd if=/dev/zero of=/dev/vda bs=1M seek=64 count=1 oflag=direct 2>/dev/null
    fio --name=load --filename=/dev/vda --rw=randwrite --bs=16k --size=12M --direct=1 --ioengine=libaio --iodepth=8 \
        --verify=crc32c --verify_fatal=1 --loops=2 --eta=never --output=/tmp/fio.out &
    load=$!
    wait_writes vda 200
    result "UNDER LOAD"
    sectors $((96 * 2048))
    dmesg | grep 'vda: detected capacity change' || fail "the kernel did not say that the capacity changed"
    result GROWN
    sectors $((100 * 2048 + 1))
    result "GROWN AGAIN"
    wait "$load" || fail "fio while the disk grew"
    fio --name=new --filename=/dev/vda --rw=randwrite --bs=4k --offset=60M --size=38M --io_size=8M --direct=1 \
        --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --output=/tmp/fio.out || fail "fio in the new space"
    block end 512 | dd of=/dev/vda bs=512 seek=$((100 * 2048)) oflag=direct 2>/dev/null || fail "the last sector"
    result "SHA $(disk_sha /dev/vda)"
}

# sectors COUNT: waits until the disk has that many.
sectors() {
    tries=0
    until [ "$(cat /sys/block/vda/size)" = "$1" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || fail "the disk has $(cat /sys/block/vda/size) sectors and not $1"
        sleep 0.1
    done
}
