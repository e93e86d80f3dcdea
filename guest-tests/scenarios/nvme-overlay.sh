# shellcheck shell=bash
SUMMARY="NVMe/TCP: qcow2 overlays of a namespace, which stays as it was; what was copied on read needs the target no more"

source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

host() {
    local disk
    nvme_need own
    BASE=$RUN_DIR/base.raw
    make_base "$BASE" 48
    BASE_SHA=$(sha256_of "$BASE")
    nvme_start base.raw
    nvme_do "subsystem $NVME_NQN; namespace $NVME_NQN 1 /dev/vda"
    nvme_serve
    for disk in plain copied; do
        qemu-img create -q -u -f qcow2 -F raw -b "$(nvme_uri)" "$RUN_DIR/$disk.qcow2" 48M >/dev/null
    done
    refused_unless_allowed
    start_overlay plain
    start_overlay copied --copy-on-read
    ORDERS=yes start_guest vm guest_overlays plain,num-queues=2 copied,num-queues=2
    guest_says vm "WITHOUT TARGET" "$GUEST_TIMEOUT"
    nvme_end
    vm_order vm go
    finish_guest vm
    for disk in plain copied; do
        stop_backend "$disk" || fail "the end of backend $disk"
        IMAGE=$RUN_DIR/$disk.qcow2 IMAGE_FORMAT=qcow2
        # From here on the base is what the target had.
        qemu-img rebase -u -f qcow2 -F raw -b base.raw "$IMAGE"
        check_image
        same "the disk's contents ($disk), guest and qemu-img" "$(guest_result vm "$disk")" "$(image_sha "$IMAGE" qcow2)"
    done
}

# start_overlay NAME [virtioblkd options]
start_overlay() {
    local name=$1
    shift
    start_backend "$name" "$name.qcow2" qcow2 "${NVME_HOST[@]}" \
        --allow-remote "nvme+tcp://$NVME_ADDRESS/$NVME_NQN" --num-queues 2 "$@"
}

# An image must not make this machine connect to whatever it names.
refused_unless_allowed() {
    if (cd "$RUN_DIR" && timeout 20 "$VIRTIOBLKD" --blk-file plain.qcow2 --format qcow2 --socket-path refused.sock) \
        >"$RUN_DIR/refused.log" 2>&1; then
        fail "a remote backing file was opened though nobody allowed it"
    fi
    grep -F allow-remote "$RUN_DIR/refused.log" >&2 || fail "no word of allow-remote in refused.log"
}

guest_overlays() {
    stty -F /dev/ttyS2 raw -echo
    exec 3</dev/ttyS2
    # Everything is copied, at the first reading.
    base=$(disk_sha /dev/vdb)
    same "the overlays at first" "$base" "$(disk_sha /dev/vda)"
    DISK=vda
    fio_verify libaio 16 4k 20 1 --bs=4k
    fio_verify libaio 16 mixed 4148 4 --bsrange=512-256k
    mkfs.ext4 -q -F -E nodiscard /dev/vda
    mount /dev/vda /mnt
    tree /mnt/files 40
    check_tree /mnt/files 40
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck"
    result "plain $(disk_sha /dev/vda)"
    DISK=vdb
    fio_verify libaio 16 before 16404 1 --bs=4k
    before=$(disk_sha /dev/vdb)
    result "WITHOUT TARGET"
    read -r order <&3
    same "the copy without the target" "$before" "$(disk_sha /dev/vdb)"
    fio_verify libaio 16 after 32788 1 --bs=4k
    result "copied $(disk_sha /dev/vdb)"
}
