# shellcheck shell=bash
SUMMARY="a reboot by the guest, a reset by the host under load; each next boot finds all that was flushed"

host() {
    make_disk qcow2 128
    start_backend disk "$IMAGE" qcow2 --num-queues 2
    ALLOW_RESET=yes start_guest vm "part next load guest_reboot" disk,num-queues=2
    guest_says vm "SECOND BOOT UNDER LOAD" "$GUEST_TIMEOUT"
    vm_command vm system_reset
    guest_says vm "THIRD BOOT" "$GUEST_TIMEOUT"
    finish_guest vm
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
}

# The disk itself tells which boot this is. What is flushed: 8 MiB from 16 and 32 MiB on. The load goes to 64 MiB
# and up.
guest_reboot() {
    boot=$(dd if=/dev/vda bs=512 count=1 iflag=direct 2>/dev/null | head -c 4)
    case $boot in
    two!)
        [ "$(part 16 | cut -d' ' -f1)" = "$(block one $((8 << 20)) | sha256sum | cut -d' ' -f1)" ] || fail "lost over the guest's reboot"
        block two $((8 << 20)) | dd of=/dev/vda bs=1M seek=32 iflag=fullblock oflag=direct 2>/dev/null
        next tri!
        load 16 &
        wait_writes vda 300
        result "SECOND BOOT UNDER LOAD"
        wait
        sleep 60
        fail "the host did not reset this machine"
        ;;
    tri!)
        result "THIRD BOOT"
        [ "$(part 16 | cut -d' ' -f1)" = "$(block one $((8 << 20)) | sha256sum | cut -d' ' -f1)" ] || fail "lost over two resets"
        [ "$(part 32 | cut -d' ' -f1)" = "$(block two $((8 << 20)) | sha256sum | cut -d' ' -f1)" ] || fail "lost over the host's reset"
        result "SHA $(disk_sha /dev/vda)"
        ;;
    *)
        block one $((8 << 20)) | dd of=/dev/vda bs=1M seek=16 iflag=fullblock oflag=direct 2>/dev/null
        next two!
        load 16 &
        wait_writes vda 300
        reboot -f
        sleep 60
        ;;
    esac
}

part() { dd if=/dev/vda bs=1M skip="$1" count=8 iflag=direct 2>/dev/null | sha256sum; }

next() {
    block "$1" 512 >/tmp/next
    dd if=/tmp/next of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null
    sync
    blockdev --flushbufs /dev/vda
}

load() {
    fio --name=load --filename=/dev/vda --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth="$1" \
        --offset=64M --size=48M --time_based --runtime=60 --output=/dev/null
}
