# shellcheck shell=sh
# The guest's half of the library: busybox sh. It is put in front of every guest function.
set -eu

# result TEXT...: a line for the host.
result() { echo "$*" >/dev/ttyS1; }

fail() {
    result "FAIL: $*"
    exit 1
}

# busybox runs its own command of this name, which knows less.
blkdiscard() { /usr/bin/blkdiscard "$@"; }

# disk_sha DEVICE: of the whole disk, past the guest's cache.
disk_sha() {
    sync
    echo 3 >/proc/sys/vm/drop_caches
    dd if="$1" bs=1M iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1
}

# must_fail COMMAND...
must_fail() {
    if "$@"; then
        fail "succeeded and should not have: $*"
    fi
}

# same WHAT WANTED HAVE
same() { [ "$2" = "$3" ] || fail "$1: wanted '$2', have '$3'"; }

# block TAG SIZE: SIZE bytes that only this tag has.
block() { yes "$1" 2>/dev/null | head -c "$2"; }

# tree DIR COUNT: COUNT files of up to 100 kB with contents that follow from their number; sums in DIR.sums.
tree() {
    mkdir -p "$1" "$1/0" "$1/1" "$1/2" "$1/3" "$1/4" "$1/5" "$1/6"
    block text 100000 >/tmp/text
    n=0
    while [ "$n" -lt "$2" ]; do
        { echo "file $n" && head -c $((n * 7919 % 100000)) /tmp/text; } >"$1/$((n % 7))/$n"
        n=$((n + 1))
    done
    (cd "$1" && find . -type f | sort | xargs sha256sum) >/tmp/sums
    cp /tmp/sums "$1.sums"
    sync
}

# check_tree DIR COUNT
check_tree() {
    echo 3 >/proc/sys/vm/drop_caches
    same "files in $1" "$2" "$(wc -l <"$1.sums")"
    (cd "$1" && sha256sum -c -s "$1.sums") || fail "files in $1 changed"
}

# writes_done DEVICE: completed write requests so far (Documentation/block/stat).
writes_done() { awk '{ print $5 }' "/sys/block/$1/stat"; }

# wait_writes DEVICE COUNT: until that many more were completed (the load runs).
wait_writes() {
    want=$(($(writes_done "$1") + $2))
    tries=0
    while [ "$(writes_done "$1")" -lt "$want" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 600 ] || fail "no load on $1"
        sleep 0.1
    done
}

# fio_verify ENGINE DEPTH NAME OFFSET_KIB SIZE_MIB OPTIONS...: random writes, read back and compared by crc32c. DISK says
# where, if not on vda.
fio_verify() {
    engine=$1 depth=$2 name=$3 offset=$4 size=$5
    shift 5
    fio --name="$name" --filename="/dev/${DISK:-vda}" --rw=randwrite --direct=1 --ioengine="$engine" --iodepth="$depth" \
        --offset="${offset}k" --size="${size}M" --verify=crc32c --verify_fatal=1 --verify_dump=0 \
        --randseed="$offset" --output-format=terse --terse-version=5 --output=/tmp/fio.out "$@" ||
        fail "fio $name"
    result "fio $name verified"
}
