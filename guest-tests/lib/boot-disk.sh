# shellcheck shell=bash
# A disk that boots by itself, from a BIOS and from UEFI, made without loop devices.

# boot_scenario FIRMWARE: the firmware, the boot loader and the kernel read everything through the backend.
boot_scenario() {
    # OVMF drives a disk with a legacy interface by that one, without VIRTIO_F_VERSION_1.
    local disk=disk,num-queues=2,bootindex=1,disable-legacy=on
    make_boot_disk
    start_backend disk "$IMAGE" qcow2 --num-queues 2
    FIRMWARE=$1 run_guest vm guest_booted "$disk"
    # Once more, now with what the first boot wrote.
    FIRMWARE=$1 run_guest again guest_booted_again "$disk"
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha again
}

# make_boot_disk: a DOS label; GRUB for the BIOS in sector 0 and in the gap behind it; one FAT partition
# with GRUB for UEFI, the kernel and the initramfs. An overlay of it becomes IMAGE.
make_boot_disk() {
    local config=$RUN_DIR/grub.cfg partition fat=$RUN_DIR/fat.raw
    BASE=$RUN_DIR/base.raw
    IMAGE=$RUN_DIR/disk.qcow2
    IMAGE_FORMAT=qcow2
    cat >"$config" <<GRUB
search --no-floppy --file --set=root /vmlinuz
echo "loading the kernel"
linux /vmlinuz $(linux_parameters)
initrd /initrd
boot
GRUB
    # The contents of the partition, from 1 MiB on.
    truncate -s 62M "$fat"
    mformat -i "$fat" -v BOOT -N 12345678 ::
    mmd -i "$fat" ::/EFI ::/EFI/BOOT
    grub-mkimage -O x86_64-efi -p /EFI/BOOT -c "$config" -o "$RUN_DIR/BOOTX64.EFI" \
        part_msdos fat search search_fs_file linux normal echo serial
    mcopy -i "$fat" "$RUN_DIR/BOOTX64.EFI" ::/EFI/BOOT/
    mcopy -i "$fat" "$GUEST_KERNEL" ::/vmlinuz
    mcopy -i "$fat" "$GUEST_INITRD_SMALL" ::/initrd
    rm -f "$BASE"
    truncate -s 64M "$BASE"
    partition='start=2048, size=126976, type=ef, bootable'
    printf 'label: dos\nlabel-id: 0x12345678\n%s\n' "$partition" | sfdisk -q "$BASE"
    dd if="$fat" of="$BASE" bs=1M seek=1 conv=notrunc,sparse status=none
    # boot.img looks for the rest at sector 1, where it is by default; its last 72 bytes are the label.
    grub-mkimage -O i386-pc -p /boot -c "$config" -o "$RUN_DIR/core.img" \
        biosdisk part_msdos fat search search_fs_file linux normal echo serial
    dd if=/usr/lib/grub/i386-pc/boot.img of="$BASE" bs=440 count=1 conv=notrunc status=none
    dd if="$RUN_DIR/core.img" of="$BASE" bs=512 seek=1 conv=notrunc status=none
    (($(stat -c %s "$RUN_DIR/core.img") < 2047 * 512)) || fail "GRUB does not fit in front of the partition"
    rm -f "$fat"
    BASE_SHA=$(sha256_of "$BASE")
    make_overlay "$BASE" "$IMAGE"
}

guest_booted() {
    grep -q 'BOOT_IMAGE=/vmlinuz' /proc/cmdline || fail "not booted by the boot loader on the disk"
    block booted $((1 << 20)) | dd of=/dev/vda bs=1M seek=63 iflag=fullblock oflag=direct 2>/dev/null
}

guest_booted_again() {
    grep -q 'BOOT_IMAGE=/vmlinuz' /proc/cmdline || fail "not booted by the boot loader on the disk"
    same "what the first boot wrote" "$(block booted $((1 << 20)) | sha256sum)" \
        "$(dd if=/dev/vda bs=1M skip=63 iflag=direct 2>/dev/null | sha256sum)"
    result "SHA $(disk_sha /dev/vda)"
}
