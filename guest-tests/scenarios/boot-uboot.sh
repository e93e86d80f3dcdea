# shellcheck shell=bash
SUMMARY="U-Boot's own virtio-blk driver: finds the disk, loads a kernel from its FAT partition, reads and writes sectors"

source "$REPO_ROOT/guest-tests/lib/boot-disk.sh"

UBOOT=$GUEST_DIR/uboot

host() {
    local size sum
    # Not installed: one file of it is enough.
    [[ -d $UBOOT ]] || {
        apt_update
        fetch_package u-boot-qemu "$UBOOT.new"
        mv "$UBOOT.new" "$UBOOT"
    }
    make_boot_disk
    # Known bytes for U-Boot to copy: it has no tool that would make any.
    block_of uboot 65536 | dd of="$BASE" bs=1M seek=63 conv=notrunc iflag=fullblock status=none
    BASE_SHA=$(sha256_of "$BASE")
    start_backend disk "$IMAGE" qcow2 --num-queues 1

    # U-Boot knows the memory map of the older machine only.
    VM_MACHINE=pc vm_new vm 256M 1
    # Its PCI driver takes the modern interface where there is no other.
    vm_disk disk,num-queues=1,disable-legacy=on
    vm_files qmp
    vm_terminal
    VM_ARGS+=(-bios "$UBOOT/usr/lib/u-boot/qemu-x86/u-boot.rom")
    vm_start
    wait_for_line "$RUN_DIR/vm.console" 'stop autoboot' 60 "${VM_PID[vm]}" || fail "U-Boot does not start"
    vm_type vm ''
    uboot "virtio scan" '=>'
    uboot "virtio info" 'Capacity: 64\.0 MB'
    size=$(printf '%x' "$(stat -c %s "$GUEST_KERNEL")")
    sum=$(crc32_of "$GUEST_KERNEL")
    uboot "load virtio 0:1 1000000 /vmlinuz" "$((16#$size)) bytes read"
    uboot "crc32 1000000 $size" "==> $sum"
    # 64 KiB from 63 MiB on, to where the image has nothing yet, and back.
    uboot "virtio read 1000000 1f800 80" '128 blocks read: OK'
    uboot "virtio write 1000000 1fc01 80" '128 blocks written: OK'
    uboot "virtio read 2000000 1fc01 80" '128 blocks read: OK'
    uboot "crc32 2000000 10000" "==> $(crc32_of <(block_of uboot 65536))"
    vm_command vm quit
    vm_wait vm 20 || fail "the VM's end"
    stop_backend disk || fail "the backend's end"
    check_image
    qemu-img dd -f qcow2 -O raw if="$IMAGE" of="$RUN_DIR/read.raw" bs=512 skip=$((0x1fc01)) count=$((0x1fc81))
    block_of uboot 65536 | cmp - "$RUN_DIR/read.raw" || fail "what U-Boot wrote is not in the image"
}

# block_of TAG SIZE: as the guest's `block`.
block_of() { { yes "$1" || true; } | head -c "$2"; }

# crc32_of FILE: it stands at the end of every gzip file.
crc32_of() { gzip -c1 "$1" | tail -c 8 | od -A n -t x4 -N 4 | tr -d ' '; }

# uboot COMMAND REGEX: types it and waits for what it prints.
uboot() {
    local before deadline=$((SECONDS + 30)) tail
    before=$(stat -c %s "$RUN_DIR/vm.console")
    vm_type vm "$1"
    while true; do
        # Behind the echo of the command, which ends in a new line; to the next prompt.
        tail=$(tail -c "+$((before + 1))" "$RUN_DIR/vm.console" | tr -d '\000\r' | sed 1d)
        [[ ! $tail =~ (^|$'\n')'=> '$ ]] || break
        alive "${VM_PID[vm]}" && ((SECONDS <= deadline)) || fail "U-Boot: no prompt after '$1'"
        sleep 0.05
    done
    say "U-Boot: $1: $(tr '\n' ' ' <<<"$tail" | head -c 120)"
    grep -Eq -- "$2" <<<"$tail" || fail "U-Boot: '$1' should have said '$2'"
}
