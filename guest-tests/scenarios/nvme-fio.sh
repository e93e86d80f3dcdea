# shellcheck shell=bash
SUMMARY="NVMe/TCP: fio with crc32c on namespaces of a Linux target, 1 and 4 queues, without and with digests, blocks of 512 and 4096"

source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

host() {
    local disk
    nvme_need own
    for disk in one four large; do
        make_base "$RUN_DIR/$disk.raw" 32
    done
    nvme_start one.raw four.raw large.raw,logical_block_size=4096,physical_block_size=4096
    nvme_do "subsystem $NVME_NQN"
    nvme_do "namespace $NVME_NQN 1 /dev/vda; namespace $NVME_NQN 2 /dev/vdb; namespace $NVME_NQN 3 /dev/vdc"
    nvme_serve
    nvme_backend one 1 --num-queues 1
    nvme_backend four 2 --num-queues 4 --nvme-header-digest --nvme-data-digest
    nvme_backend large 3 --num-queues 2 --nvme-data-digest --nvme-queue-depth 8
    CPUS=4 run_guest vm guest_namespaces one,num-queues=1 four,num-queues=4 large,num-queues=2
    for disk in one four large; do
        stop_backend "$disk" || fail "the end of backend $disk"
        check_namespace vm "$disk" "$disk.raw"
    done
    nvme_end
}

guest_namespaces() {
    same queues 1 "$(ls /sys/block/vda/mq | wc -l)"
    same queues 4 "$(ls /sys/block/vdb/mq | wc -l)"
    for DISK in vda vdb; do
        same "logical block size of $DISK" 512 "$(cat "/sys/block/$DISK/queue/logical_block_size")"
        same "size of $DISK in sectors" $((32 * 2048)) "$(cat "/sys/block/$DISK/size")"
    done
    DISK=vda
    fio_verify libaio 1 single 20 1 --bs=4k
    fio_verify libaio 16 4k 2068 2 --bs=4k
    fio_verify io_uring 64 64k 6164 4 --bs=64k
    fio_verify libaio 16 mixed 12288 4 --bsrange=512-256k
    DISK=vdb
    fio_verify libaio 16 4k 20 1 --bs=4k --numjobs=4 --offset_increment=1100k
    fio_verify io_uring 64 mixed 8192 2 --bsrange=512-256k --numjobs=4 --offset_increment=2060k
    DISK=vdc
    same "logical block size" 4096 "$(cat /sys/block/vdc/queue/logical_block_size)"
    same "size in sectors" $((32 * 2048)) "$(cat /sys/block/vdc/size)"
    # (busybox dd would try again without O_DIRECT.)
    must_fail fio --name=small --filename=/dev/vdc --rw=read --bs=512 --size=512 --direct=1 --output=/dev/null
    fio_verify libaio 32 mixed 64 4 --bsrange=4k-128k
    mkfs.ext4 -q -F /dev/vdc
    mount /dev/vdc /mnt
    tree /mnt/files 30
    check_tree /mnt/files 30
    umount /mnt
    fsck.ext4 -fn /dev/vdc || fail "fsck"
    result "one $(disk_sha /dev/vda)"
    result "four $(disk_sha /dev/vdb)"
    result "large $(disk_sha /dev/vdc)"
}
