#!/usr/bin/env bash
# From a fresh Debian 12/13 or Ubuntu 24.04 to a Linux guest doing I/O on a qcow2 overlay that virtioblkd
# serves. May be run again at any time. Writes below .cache/ of this checkout, and what apt installs.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib/all.sh
source "$(dirname "$0")/lib/all.sh"

case ${1:-} in
'') ;;
-h | --help)
    cat <<USAGE
usage: qemu-scripts/quickstart.sh

Installs what is missing (as root or through sudo), builds virtioblkd, makes a base image and a qcow2 overlay,
boots a small Linux guest on the overlay, runs fio in it and shows the results, qemu-img check of the
overlay, and that the base image was not touched.

Environment: VIRTIOBLKD_ACCEL=kvm|tcg overrides the choice.
USAGE
    exit 0
    ;;
*) die "no such option: $1 (see --help)" ;;
esac

# The guest's part (sent there as it stands; busybox sh).
guest_part() {
    say() { echo "== $*"; }
    check() { "$@" || { say "failed: $*" && exit 1; }; }
    run_fio() {
        name=$1
        shift
        say "fio $name"
        # The job's state once a second; the results go to a file.
        check fio --name="$name" --filename=/mnt/fio --size=96M --direct=1 --ioengine=io_uring --randseed=7 \
            --eta=always --eta-newline=1 --lat_percentiles=1 --clat_percentiles=0 --output-format=json --output=/tmp/json "$@"
        echo
        # The host reads this from the second serial port.
        cat /tmp/json >/dev/ttyS1
    }
    say "Linux $(uname -r), $(nproc) CPUs, $(cat /sys/block/vda/size) sectors on /dev/vda"
    check mount /dev/vda /mnt
    say "reading the files of the base image"
    check cd /mnt/data
    check sha256sum -c -s SHA256SUMS
    cd /
    say "their checksums are right"
    run_fio write-64k-verified --rw=randwrite --bs=64k --iodepth=16 --verify=crc32c --verify_fatal=1
    run_fio randread-4k --rw=randread --bs=4k --iodepth=16 --runtime=5 --time_based
    run_fio randwrite-4k --rw=randwrite --bs=4k --iodepth=16 --runtime=5 --time_based
    run_fio randwrite-4k-depth-1 --rw=randwrite --bs=4k --iodepth=1 --runtime=5 --time_based
    check rm /mnt/fio
    check umount /mnt
    say "checking the guest's file system"
    check fsck.ext4 -fn /dev/vda
    say "powering off"
}

# make_base FILE: an ext4 file system with files in it, the same bytes every time.
make_base() {
    local source=$CACHE_DIR/quickstart/data n
    rm -rf "$source"
    mkdir -p "$source"
    for n in 1 2 3 4; do
        seq "$((n * 10000000))" 1 "$((n * 10000000 + 1000000))" >"$source/numbers-$n"
    done
    (cd "$source" && sha256sum numbers-* >SHA256SUMS)
    rm -f "$1" "$1.new"
    truncate -s 512M "$1.new"
    # A fixed time and fixed identifiers, or each file system would be another one.
    export E2FSPROGS_FAKE_TIME=1700000000
    mke2fs -q -F -t ext4 -L quickstart -U 6f1a2b7c-0000-4000-8000-000000000001 \
        -E hash_seed=6f1a2b7c-0000-4000-8000-000000000002 "$1.new"
    {
        printf 'mkdir /data\ncd /data\n'
        for n in SHA256SUMS numbers-1 numbers-2 numbers-3 numbers-4; do
            printf 'write %s %s\n' "$n" "$n"
        done
    } >"$source/commands"
    (cd "$source" && debugfs -w -f commands "$1.new" >commands.log 2>&1)
    unset E2FSPROGS_FAKE_TIME
    mv "$1.new" "$1"
    rm -rf "$source"
}

# show_results: out of the JSON documents that the guest sent.
show_results() {
    sed '/^GUEST-EXIT/d' "$1" | jq -rs '
        def us: . / 1000 * 10 | round / 10 | tostring;
        def row($job; $way): $job[$way] | select(.total_ios > 0) |
            [$job.jobname, $way, (.iops | round | tostring), (.bw / 1024 | round | tostring)]
            + (.lat_ns.percentile | [."50.000000", ."99.000000", ."99.900000"] | map(us));
        ["job", "", "IOPS", "MiB/s", "p50 us", "p99 us", "p99.9 us"],
        (.[].jobs[] | . as $job | row($job; "read"), row($job; "write"))
        | @tsv' | awk -F '\t' '{ printf "  %-22s %-6s %9s %9s %9s %9s %9s\n", $1, $2, $3, $4, $5, $6, $7 }'
}

install_cleanup
step "checking what is installed"
ensure_qemu
ensure jq=jq mke2fs=e2fsprogs
get_guest
! backend_is_virtioblkd || build_virtioblkd
choose_accel

images=$CACHE_DIR/quickstart
base=$images/base.raw
overlay=$images/overlay.qcow2
mkdir -p "$images"
step "making the base image (ext4, 512 MiB) and a qcow2 overlay over it"
make_base "$base"
rm -f "$overlay"
qemu-img create -q -f qcow2 -b base.raw -F raw "$overlay"
before=$(sha256_of "$base")

new_run_dir quickstart
step "starting $BACKEND: the overlay, on a vhost-user socket"
start_backend disk "$overlay" qcow2 --num-queues 2
say "       ${BACKEND_COMMAND[*]}"
{
    declare -f guest_part
    printf 'guest_part\n'
} >"$RUN_DIR/script"
step "booting Linux under $(accel_words)"
vm_new vm 512M 2
vm_disk disk,num-queues=2
vm_files
vm_linux "$GUEST_INITRD"
vm_script "$RUN_DIR/script"
vm_start
follow_file "$RUN_DIR/vm.console" "${VM_PID[vm]}" '       guest| ' 400 ||
    die "the guest did not end within 400 s (see $RUN_DIR)"
vm_wait vm 10 || die "QEMU failed (see $RUN_DIR)"
grep -aqx 'GUEST-EXIT 0' "$RUN_DIR/vm.result" || die "the guest's script failed (see $RUN_DIR/vm.console)"
step "stopping $BACKEND"
stop_backend disk || die "$BACKEND did not end well (see $RUN_DIR/disk.log)"

step "fio in the guest (latency from submission to completion):"
show_results "$RUN_DIR/vm.result"
step "qemu-img check of the overlay:"
qemu-img check -f qcow2 "$overlay" | sed 's/^/  /' || die "qemu-img check found errors in $overlay"
after=$(sha256_of "$base")
step "the base image:"
printf '  sha256 before %s\n  sha256 after  %s\n' "$before" "$after"
[[ $before == "$after" ]] || die "the base image was changed"
step "done. The images and logs are in $images and $RUN_DIR"
say "       Next: qemu-scripts/run-vm.sh --help, and guest-tests/run.sh"
