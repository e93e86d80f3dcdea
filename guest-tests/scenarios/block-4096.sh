# shellcheck shell=bash
SUMMARY="a disk with blocks of 4096 bytes: announced, refused below, ext4 and fio on it"

host() {
    make_disk qcow2 128
    start_backend disk "$IMAGE" qcow2 --block-size 4096
    run_guest vm guest_4096 disk
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
}

guest_4096() {
    same "logical block size" 4096 "$(cat /sys/block/vda/queue/logical_block_size)"
    same "size in sectors" $((128 * 2048)) "$(cat /sys/block/vda/size)"
    # (busybox dd would try again without O_DIRECT.)
    must_fail fio --name=small --filename=/dev/vda --rw=read --bs=512 --size=512 --direct=1 --output=/dev/null
    fio_verify libaio 16 4k 64 8 --bs=4k
    fio_verify libaio 16 mixed 16384 8 --bsrange=4k-128k
    mkfs.ext4 -q -F /dev/vda
    mount /dev/vda /mnt
    tree /mnt/files 50
    check_tree /mnt/files 50
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck"
    result "SHA $(disk_sha /dev/vda)"
}
