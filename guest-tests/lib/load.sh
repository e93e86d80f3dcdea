# shellcheck shell=bash
# A guest under load for as long as the host wants, with everything verified: for scenarios in which something
# happens to the backend meanwhile.

# What guest_load is made of, for run_guest and start_guest.
LOAD_FUNCTIONS="load_fio load_files load_pulse load_unflushed no_disk_errors guest_load"

# load_initrd: sets INITRD to one with the programs of guest-tests/programs/ in it.
load_initrd() {
    local source stage=$RUN_DIR/stage
    ensure cc=gcc /usr/include/stdio.h=libc6-dev
    mkdir -p "$stage/usr/bin"
    for source in "$REPO_ROOT"/guest-tests/programs/*.c; do
        cc -O2 -Wall -Wextra -Werror -static -pthread -o "$stage/usr/bin/$(basename "$source" .c)" "$source" ||
            fail "$source does not compile"
    done
    INITRD=$RUN_DIR/initrd
    # One archive behind another: the kernel unpacks both.
    pack_initramfs "$stage" "$INITRD.more"
    cat "$GUEST_INITRD" "$INITRD.more" >"$INITRD"
    rm -rf "$stage" "$INITRD.more"
}

# load_ok VM...: fails as soon as one of these machines has reported a failure, or ended.
load_ok() {
    local name line
    for name in "$@"; do
        line=$(grep -Ea '^(FAIL|GUEST-EXIT)' "$RUN_DIR/$name.result" | head -n 1 || true)
        [[ -z $line ]] || fail "guest $name: $line"
        [[ -z ${VM_PID[$name]:-} ]] || alive "${VM_PID[$name]}" || fail "VM $name ended"
    done
}

# longest_pause VM: of the reads since the last time, in microseconds of the guest's clock.
longest_pause() {
    local before
    before=$(grep -c '^LONGEST' "$RUN_DIR/$1.result" || true)
    vm_order "$1" pause
    local deadline=$((SECONDS + 30))
    until (($(grep -c '^LONGEST' "$RUN_DIR/$1.result" || true) > before)); do
        load_ok "$1"
        ((SECONDS <= deadline)) || fail "the guest's reads stand still for 30 s"
        sleep 0.05
    done
    guest_result "$1" LONGEST
}

# requests_done VM: by its first disk, reads and writes, since it booted.
requests_done() {
    local before deadline=$((SECONDS + 30))
    before=$(grep -c '^COUNT' "$RUN_DIR/$1.result" || true)
    vm_order "$1" count
    until (($(grep -c '^COUNT' "$RUN_DIR/$1.result" || true) > before)); do
        load_ok "$1"
        ((SECONDS <= deadline)) || fail "the guest does not answer for 30 s"
        sleep 0.05
    done
    guest_result "$1" COUNT
}

# end_load VM: the load ends, is verified, and the machine powers itself off.
end_load() {
    vm_order "$1" stop
    finish_guest "$1"
    say "guest: $(guest_result "$1" PASSES)"
}

# --- in the guest --------------------------------------------------------------

# fio in a file, files with fsync and checksums beside it, and single reads of the disk. A second disk, if there is
# one, is written without any flush. Orders: pause, count, stop.
guest_load() {
    stty -F /dev/ttyS2 raw -echo
    exec 3</dev/ttyS2
    # The base's data stays below, to be copied on write.
    mkfs.ext4 -q -F -E nodiscard /dev/vda
    mount /dev/vda /mnt
    block text 100000 >/tmp/text
    # VIRTIO_F_RING_PACKED is bit 34; the first one stands on the left.
    result "PACKED $(cut -c 35 /sys/block/vda/device/features)"
    load_fio &
    fio=$!
    load_files &
    files=$!
    load_pulse &
    pulse=$!
    unflushed=''
    if [ -b /dev/vdb ]; then
        load_unflushed &
        unflushed=$!
        wait_writes vdb 100
    fi
    wait_writes vda 300
    result "UNDER LOAD"
    while read -r order <&3 && [ "$order" != stop ]; do
        case $order in
        pause) kill -USR1 "$(cat /tmp/pulse)" ;;
        count) result "COUNT $(awk '{ print $1 + $5 }' /sys/block/vda/stat)" ;;
        esac
    done
    : >/tmp/stop
    kill -TERM "$(cat /tmp/pulse)"
    wait "$pulse" || fail "pulse"
    wait "$fio" || fail "fio"
    wait "$files" || fail "files"
    [ -z "$unflushed" ] || wait "$unflushed" || fail "the disk without flushes"
    umount /mnt
    fsck.ext4 -fn /dev/vda || fail "fsck"
    no_disk_errors
    result "PASSES $(cat /tmp/passes) of fio verified, $(cat /tmp/written) files written and compared"
    result "SHA $(disk_sha /dev/vda)"
}

# Random writes of all sizes, each pass read back and compared.
load_fio() {
    passes=0
    while [ ! -e /tmp/stop ]; do
        passes=$((passes + 1))
        fio --name=load --filename=/mnt/fio --size=8M --rw=randwrite --bsrange=512-64k --direct=1 \
            --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_dump=0 \
            --randseed="$passes" --eta=never --output-format=terse --output=/tmp/fio.out || fail "fio, pass $passes"
        echo "$passes" >/tmp/passes
    done
}

# Forty files over and over, each durable before the next; every fortieth time all of them are read from the disk.
load_files() {
    mkdir /mnt/files /tmp/wanted
    written=0
    while [ ! -e /tmp/stop ]; do
        n=$((written % 40))
        { echo "file $written" && head -c $((written * 7919 % 60000)) /tmp/text; } >/tmp/file
        dd if=/tmp/file of="/mnt/files/$n" bs=64k conv=fsync 2>/dev/null || fail "write of file $written"
        sha256sum </tmp/file >"/tmp/wanted/$n"
        written=$((written + 1))
        echo "$written" >/tmp/written
        if [ $((written % 40)) -eq 0 ]; then
            echo 3 >/proc/sys/vm/drop_caches
            for n in /mnt/files/*; do
                same "$n, of $written writes" "$(cat "/tmp/wanted/${n##*/}")" "$(sha256sum <"$n")"
            done
        fi
    done
}

# What no flush has made durable has to be there all the same when the backend was killed. Each pass goes to clusters
# that nobody has written to, for seven seconds: fio takes the smallest blocks for the rate, and the end has to wait
# for the pass that runs.
load_unflushed() {
    pass=0
    while [ ! -e /tmp/stop ]; do
        pass=$((pass + 1))
        [ "$pass" -le 250 ] || fail "the disk without flushes is full"
        fio --name=unflushed --filename=/dev/vdb --offset=$((pass * 4))M --size=4M --rw=randwrite --bsrange=4k-32k \
            --direct=1 --ioengine=libaio --iodepth=4 --rate_iops=300 --verify=crc32c --verify_fatal=1 \
            --verify_dump=0 --randseed="$pass" --eta=never --output-format=terse --output=/tmp/fio.unflushed ||
            fail "fio without flushes, pass $pass"
    done
}

load_pulse() {
    # Its own process identifier, not the subshell's.
    sh -c 'echo $$ >/tmp/pulse; exec pulse /dev/vda' >/dev/ttyS1
}

no_disk_errors() {
    if dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|blk_update_request|virtio_blk.*(reset|timeout)|hung_task|blocked for more' >/tmp/errors; then
        fail "the kernel complained: $(head -n 1 /tmp/errors)"
    fi
}
