# shellcheck shell=bash
SUMMARY="NVMe/TCP: ext4 over a reboot, discard that reaches the target, growth that reaches the guest, the discovery log"

source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

host() {
    local kib address
    nvme_need own
    make_base "$RUN_DIR/disk.raw" 64
    nvme_start disk.raw
    nvme_do "subsystem $NVME_NQN; namespace $NVME_NQN 1 /dev/vda"
    nvme_serve
    address=${NVME_ADDRESSES[0]}
    "$VIRTIOBLKD" nvme discover "$address" "${NVME_HOST[@]}" >"$RUN_DIR/discover.log" || fail "nvme discover"
    grep -F "$NVME_NQN" "$RUN_DIR/discover.log" >&2 || fail "the subsystem is not in the discovery log"
    grep -qF "${address#*:}" "$RUN_DIR/discover.log" || fail "its port is not in the discovery log"

    nvme_backend disk 1 --num-queues 2
    ALLOW_RESET=yes start_guest vm "second_boot guest_files" disk,num-queues=2
    guest_says vm "SECOND BOOT" "$GUEST_TIMEOUT"
    # All of the base was discarded: it had 32 MiB.
    kib=$(allocated_kib "$RUN_DIR/disk.raw")
    step "the namespace has $kib KiB on this host"
    ((kib < 16 * 1024)) || fail "discards did not reach the target's disk"
    nvme_resize 1 $((96 << 20))
    guest_says vm GROWN 60
    finish_guest vm
    stop_backend disk || fail "the backend's end"
    check_namespace vm SHA disk.raw
    nvme_end
}

# The first boot leaves a file system behind, by which the second one knows.
guest_files() {
    if mount -t ext4 /dev/vda /mnt 2>/dev/null; then
        second_boot
    else
        blkdiscard /dev/vda
        mkfs.ext4 -q -F -E nodiscard /dev/vda
        mount /dev/vda /mnt
        tree /mnt/files 60
        block large $((12 << 20)) >/mnt/large
        sync
        rm /mnt/large
        # Not free before the journal says so.
        sync
        fstrim -v /mnt
        check_tree /mnt/files 60
        umount /mnt
        fsck.ext4 -fn /dev/vda || fail "fsck"
        reboot -f
        sleep 60
    fi
}

second_boot() {
    check_tree /mnt/files 60
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck after the reboot"
    result "SECOND BOOT"
    tries=0
    until [ "$(cat /sys/block/vda/size)" = $((96 * 2048)) ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 300 ] || fail "the disk has $(cat /sys/block/vda/size) sectors still"
        sleep 0.1
    done
    result GROWN
    fio_verify libaio 16 new $((64 << 10)) 4 --bsrange=4k-64k
    block end 512 | dd of=/dev/vda bs=512 seek=$((96 * 2048 - 1)) oflag=direct 2>/dev/null || fail "the last sector"
    result "SHA $(disk_sha /dev/vda)"
}
