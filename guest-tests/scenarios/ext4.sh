# shellcheck shell=bash
SUMMARY="ext4: made, 150 files, checked, and the files again after a remount and in a second VM"

host() {
    make_disk qcow2 256
    start_backend disk "$IMAGE" qcow2
    run_guest first guest_fill disk
    # The same process serves the next VM.
    run_guest second guest_look disk
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha second
}

guest_fill() {
    mkfs.ext4 -q -F /dev/vda
    mount /dev/vda /mnt
    tree /mnt/files 150
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck after the first use"
    mount /dev/vda /mnt
    check_tree /mnt/files 150
    rm -r /mnt/files/3
    umount /mnt
}

guest_look() {
    fsck.ext4 -fn /dev/vda || fail "fsck in the second VM"
    mount /dev/vda /mnt
    tree /mnt/files 150
    check_tree /mnt/files 150
    umount /mnt
    result "SHA $(disk_sha /dev/vda)"
}
