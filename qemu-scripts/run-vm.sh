#!/usr/bin/env bash
# Starts virtioblkd on a disk image and a VM that has it as its disk.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/all.sh
source "$(dirname "$0")/lib/all.sh"

usage() {
    cat <<'USAGE'
usage: qemu-scripts/run-vm.sh [OPTION...] IMAGE [-- QEMU_OPTION...]

Serves IMAGE with virtioblkd and boots a VM from it, with the VM's serial console on this terminal
(Ctrl-A X ends the VM, Ctrl-A C is QEMU's monitor). virtioblkd ends with the VM.

  --format raw|qcow2   the image's format (by its name's ending: .qcow2 is qcow2, all else raw)
  --read-only          the guest may not write
  --num-queues N       virtqueues of the disk (one for each CPU)
  --backend OPTIONS    more options of virtioblkd, with spaces between: --backend '--poll always --serial S1'
  --memory SIZE        of the guest (1G)
  --cpus N             of the guest (2)
  --uefi               boot through OVMF instead of SeaBIOS
  --test-guest         do not boot from the disk: boot the small Linux of the tests, with a shell, fio and the
                       disk as /dev/vda
  --kernel FILE, --initrd FILE, --append TEXT
                       boot this kernel instead
  --net                a network card with QEMU's user network (the guest reaches out, nothing reaches in)
  --ssh PORT           the same, and port PORT of 127.0.0.1 leads to the guest's port 22
  --graphics           a window instead of the serial console
  --print              only show the two commands
  QEMU_OPTION          anything QEMU knows

Environment: VIRTIOBLKD=PATH another binary; VIRTIOBLKD_ACCEL=kvm|tcg overrides the choice;
BACKEND=qemu-storage-daemon serves the image with that, to compare.

Examples:
  qemu-scripts/run-vm.sh debian-12-nocloud-amd64.qcow2
  qemu-scripts/run-vm.sh --test-guest --backend '--poll always' disk.raw
USAGE
}

image='' format='' memory=1G cpus=2 queues='' firmware=bios boot=disk kernel='' initrd='' append='' net='' graphics=no print=no
backend_options=()
qemu_options=()
# value OPTION...: the option's value must be there.
value() { (($# > 1)) || die "$1 needs a value (see --help)"; }
while (($#)); do
    case $1 in
    -h | --help) usage && exit 0 ;;
    --format) value "$@" && format=$2 && shift ;;
    --read-only) backend_options+=(--read-only) ;;
    --num-queues) value "$@" && queues=$2 && shift ;;
    --backend)
        value "$@"
        read -ra words <<<"$2"
        backend_options+=("${words[@]}")
        shift
        ;;
    --memory) value "$@" && memory=$2 && shift ;;
    --cpus) value "$@" && cpus=$2 && shift ;;
    --uefi) firmware=uefi ;;
    --test-guest) boot=test-guest ;;
    --kernel) value "$@" && boot=kernel kernel=$2 && shift ;;
    --initrd) value "$@" && initrd=$2 && shift ;;
    --append) value "$@" && append=$2 && shift ;;
    --net) net=user,id=net ;;
    --ssh) value "$@" && net=user,id=net,hostfwd=tcp:127.0.0.1:$2-:22 && shift ;;
    --graphics) graphics=yes ;;
    --print) print=yes ;;
    --)
        shift
        qemu_options=("$@")
        break
        ;;
    -*) die "unknown option $1 (see --help)" ;;
    *)
        [[ -z $image ]] || die "one image only: $image or $1? (see --help)"
        image=$1
        ;;
    esac
    shift
done
[[ -n $image ]] || die "which image? (see --help)"
[[ -e $image ]] || die "$image is not there; make one with: qemu-img create -f qcow2 $image 10G"
[[ $cpus =~ ^[1-9][0-9]*$ ]] || die "--cpus takes a number"
[[ ${queues:=$cpus} =~ ^[1-9][0-9]*$ ]] || die "--num-queues takes a number"
image=$(realpath "$image")
if [[ -z $format ]]; then
    format=raw
    [[ $image != *.qcow2 ]] || format=qcow2
fi

ensure_qemu
[[ $firmware == bios ]] || ensure /usr/share/OVMF=ovmf
[[ $boot != test-guest ]] || get_guest
if backend_is_virtioblkd && [[ ! -x $VIRTIOBLKD ]]; then
    build_virtioblkd
fi
choose_accel
new_run_dir "vm-$$"
# Only sockets and logs: nobody needs them after the VM.
CLEANUP_DIRS+=("$RUN_DIR")
install_cleanup

# QEMU runs where the user is, for the paths among its options. Where the socket's path is too long for a
# socket (107 bytes), it goes by a descriptor of the directory.
VM_SOCKETS=$RUN_DIR/
if ((${#VM_SOCKETS} > 95)); then
    exec 9<"$RUN_DIR"
    VM_SOCKETS=/proc/self/fd/9/
fi
# A reset starts the guest again.
ALLOW_RESET=yes
[[ $graphics == no ]] || VM_DISPLAY=gtk
vm_new vm "$memory" "$cpus"
# OVMF drives a disk that has a legacy interface by that one, and a vhost-user backend does not speak it.
vm_disk "disk,num-queues=$queues,bootindex=1,disable-legacy=on"
case $boot in
test-guest) vm_linux "$GUEST_INITRD" "virtioblkd=shell $append" ;;
kernel)
    VM_ARGS+=(-kernel "$(realpath "$kernel")")
    [[ -z $initrd ]] || VM_ARGS+=(-initrd "$(realpath "$initrd")")
    [[ -z $append ]] || VM_ARGS+=(-append "$append")
    ;;
esac
[[ $firmware == bios ]] || vm_uefi
[[ -z $net ]] || VM_ARGS+=(-netdev "$net" -device virtio-net-pci,netdev=net)
if [[ $graphics == yes ]]; then
    VM_ARGS+=(-device virtio-vga -device qemu-xhci -device usb-tablet)
else
    VM_ARGS+=(-chardev stdio,id=terminal,mux=on,signal=off -serial chardev:terminal -mon chardev=terminal)
fi
VM_ARGS+=("${qemu_options[@]}")

if [[ $print == yes ]]; then
    backend_command "${VM_SOCKETS}disk.sock" "$image" "$format" --num-queues "$queues" "${backend_options[@]}"
    printf '%q ' "${BACKEND_COMMAND[@]}" && echo
    printf '%q ' qemu-system-x86_64 "${VM_ARGS[@]}" && echo
    exit 0
fi

start_backend disk "$image" "$format" --num-queues "$queues" "${backend_options[@]}"
say "$BACKEND serves $image; booting under $(accel_words)"
[[ $graphics == yes ]] || say "(Ctrl-A X ends the VM)"
# In the background for the clean-up by its pid, yet with the terminal as its input.
qemu-system-x86_64 "${VM_ARGS[@]}" <&0 &
pid=$!
own_pid "$pid"
status=0
wait "$pid" || status=$?
[[ ! -t 0 ]] || stty sane
stop_backend disk || {
    tail -n 20 "$RUN_DIR/disk.log" >&2
    die "$BACKEND did not end well"
}
exit "$status"
