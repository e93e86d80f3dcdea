# shellcheck shell=bash
# The host's half: what a scenario is made of. A scenario file sets SUMMARY and defines `host` (runs here)
# and functions guest_… (run in the guest; POSIX sh for busybox), sent there by run_guest.

# shellcheck source-path=SCRIPTDIR source=../../qemu-scripts/lib/all.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../qemu-scripts/lib/all.sh"

# Seconds that one boot of a guest may take before it counts as hung.
GUEST_TIMEOUT=${GUEST_TIMEOUT:-150}

fail() {
    say "FAIL: $*"
    exit 1
}

# skip REASON: only where the backend to compare with has no such feature, or the distribution no such package.
skip() {
    say "skip: $*"
    exit 77
}

same() { [[ $2 == "$3" ]] || fail "$1: wanted '$2', have '$3'"; }

# --- images ------------------------------------------------------------------

# make_base FILE MIB: known data with holes: every second 4 MiB. The same bytes every time.
make_base() {
    local mib
    rm -f "$1"
    truncate -s "$2M" "$1"
    for ((mib = 0; mib < $2; mib += 8)); do
        { seq "$((mib * 1000000))" 1 "$((mib * 1000000 + 999999))" || true; } 2>/dev/null | head -c 4M |
            dd of="$1" bs=1M seek="$mib" conv=notrunc status=none iflag=fullblock
    done
}

# make_overlay BASE OVERLAY: of the raw BASE beside it.
make_overlay() { qemu-img create -q -f qcow2 -b "$(basename "$1")" -F raw "$2" >/dev/null; }

# make_disk FORMAT MIB: sets IMAGE to a disk over known data: a raw file, or a qcow2 overlay of one.
make_disk() {
    BASE=$RUN_DIR/base.raw
    make_base "$BASE" "$2"
    BASE_SHA=$(sha256_of "$BASE")
    if [[ $1 == raw ]]; then
        IMAGE=$RUN_DIR/disk.raw
        cp --sparse=always "$BASE" "$IMAGE"
    else
        IMAGE=$RUN_DIR/disk.qcow2
        make_overlay "$BASE" "$IMAGE"
    fi
    IMAGE_FORMAT=$1
}

# image_sha IMAGE FORMAT: of the guest-visible contents, as qemu-img sees them.
image_sha() {
    local flat=$RUN_DIR/flat.raw
    rm -f "$flat"
    qemu-img convert -f "$2" -O raw "$1" "$flat" || return
    sha256_of "$flat"
    rm -f "$flat"
}

# check_image: IMAGE is clean and its base is untouched. The backend must have left.
check_image() {
    if [[ $IMAGE_FORMAT == qcow2 ]]; then
        qemu-img check -q -f qcow2 "$IMAGE" || {
            qemu-img check -f qcow2 "$IMAGE" >&2 || true
            fail "qemu-img check of $(basename "$IMAGE")"
        }
    fi
    same "the base image's sha256" "$BASE_SHA" "$(sha256_of "$BASE")"
}

# same_pattern: IMAGE is its base with the writes of lib/pattern.sh, which the guest did.
same_pattern() {
    local wanted=$RUN_DIR/wanted.raw
    cp --sparse=always "$BASE" "$wanted"
    bash -c 'source "$1" && pattern "$2"' - "$REPO_ROOT/guest-tests/lib/pattern.sh" "$wanted"
    qemu-img compare -f raw -F "$IMAGE_FORMAT" "$wanted" "$IMAGE" >&2 || fail "the disk is not what the guest wrote"
    rm -f "$wanted"
}

# check_guest_sha VM: the disk as the guest read it last ("SHA …") is the disk as qemu-img reads it.
check_guest_sha() {
    local seen
    seen=$(guest_result "$1" SHA)
    [[ -n $seen ]] || fail "the guest told no SHA"
    same "the disk's contents, guest and qemu-img" "$seen" "$(image_sha "$IMAGE" "$IMAGE_FORMAT")"
}

# allocated_kib FILE
allocated_kib() { du -k "$1" | cut -f1; }

# --- guests ------------------------------------------------------------------

# guest_script FILE FUNCTION...: FILE for the guest's init: the library, these functions, and a call of the last.
guest_script() {
    local file=$1
    shift
    {
        cat "$REPO_ROOT"/guest-tests/lib/{guest,pattern}.sh
        declare -f "$@"
        printf '%s\n' "${@: -1}"
    } >"$file"
}

VM_OPTIONS=()

# start_guest VM FUNCTIONS DISK...: boots VM, which runs the last of the functions (their names with spaces
# between), with these disks (see vm_disk). CPUS, MEMORY, INITRD, FIRMWARE and ALLOW_RESET may be set before; with
# ORDERS=yes the guest hears vm_order on its third serial port. VM_OPTIONS are more of QEMU's.
start_guest() {
    local name=$1 functions=$2 disk
    shift 2
    # shellcheck disable=SC2086 # a list of names
    guest_script "$RUN_DIR/$name.script" $functions
    vm_new "$name" "${MEMORY:-512M}" "${CPUS:-2}"
    for disk in "$@"; do
        vm_disk "$disk"
    done
    vm_files
    [[ ${ORDERS:-no} == no ]] || vm_orders
    [[ ${INCOMING:-no} == no ]] || VM_ARGS+=(-incoming defer)
    VM_ARGS+=("${VM_OPTIONS[@]}")
    case ${FIRMWARE:-none} in
    none) vm_linux "${INITRD:-$GUEST_INITRD}" ;;
    seabios) ;; # what QEMU takes by itself
    ovmf) vm_uefi ;;
    esac
    vm_script "$RUN_DIR/$name.script"
    vm_start
}

# guest_result VM WORD: the rest of the last line that begins with WORD.
guest_result() { sed -n "s/^$2 //p" "$RUN_DIR/$1.result" | tail -n 1; }

# guest_says VM LINE SECONDS: waits for that line of results.
guest_says() {
    wait_for_line "$RUN_DIR/$1.result" "^$2" "$3" "${VM_PID[$1]}" || fail "the guest did not say '$2' within $3 s"
}

# finish_guest VM: its script ended well, and it powered itself off.
finish_guest() {
    wait_for_line "$RUN_DIR/$1.result" '^GUEST-EXIT ' "$GUEST_TIMEOUT" "${VM_PID[$1]}" ||
        fail "the guest's script did not end (see $1.console)"
    same "the exit code of the guest's script" 0 "$(guest_result "$1" GUEST-EXIT)"
    vm_wait "$1" 30 || fail "VM $1"
    say "guest $1: done"
}

# run_guest VM FUNCTIONS DISK...: start_guest and finish_guest.
run_guest() {
    start_guest "$@"
    finish_guest "$1"
}
