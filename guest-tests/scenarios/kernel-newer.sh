# shellcheck shell=bash
SUMMARY="a newer Linux than the distribution's own (6.12 on Debian 12): fio on four packed queues of 1024 entries, ext4, discard"

host() {
    guest_in "$CACHE_DIR/guest-newer"
    if [[ ! -e $GUEST_KERNEL ]]; then
        newer_kernel_package || skip "no newer kernel for virtual machines in reach of apt"
        get_guest "$NEWER_KERNEL"
    else
        get_guest
    fi
    make_disk qcow2 128
    start_backend disk "$IMAGE" qcow2 --num-queues 4 --queue-size 1024
    CPUS=4 run_guest vm guest_newer disk,num-queues=4,queue-size=1024,packed=on
    stop_backend disk || fail "the backend's end"
    ! backend_is_virtioblkd || same "packed rings" 1 "$(guest_result vm PACKED)"
    say "guest kernel: $(guest_result vm KERNEL)"
    check_image
    check_guest_sha vm
}

guest_newer() {
    result "KERNEL $(uname -r)"
    # VIRTIO_F_RING_PACKED; the first bit stands on the left.
    result "PACKED $(cut -c 35 /sys/block/vda/device/features)"
    same queues 4 "$(ls /sys/block/vda/mq | wc -l)"
    same "entries of the queue" 1024 "$(cat /sys/block/vda/queue/nr_requests)"
    fio_verify io_uring 64 4k 20 8 --bs=4k
    fio_verify libaio 16 mixed 16384 16 --bsrange=512-256k
    fio_verify io_uring 64 four 40960 4 --bsrange=512-64k --numjobs=4 --offset_increment=5100k
    blkdiscard -o $((64 << 20)) -l $((8 << 20)) /dev/vda
    mkfs.ext4 -q -F -E nodiscard /dev/vda
    mount /dev/vda /mnt
    tree /mnt/files 60
    check_tree /mnt/files 60
    fstrim /mnt
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck"
    result "SHA $(disk_sha /dev/vda)"
}
