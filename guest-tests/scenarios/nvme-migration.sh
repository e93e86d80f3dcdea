# shellcheck shell=bash
SUMMARY="NVMe/TCP: live migrations under load between two QEMUs, whose backends have the same namespace; requests per second before, during and after; a third is kept out"

source "$REPO_ROOT/guest-tests/lib/load.sh"
source "$REPO_ROOT/guest-tests/lib/migrate.sh"
source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

MIGRATIONS=${MIGRATIONS:-2}

host() {
    local trip from=m0 to side before during pause started=0 done=0
    local options=(--num-queues 2)
    load_initrd
    if (get_target_newest) >&2; then
        nvme_need newest
        options+=(--nvme-reservations)
    else
        warn "no target with reservations: migrating without"
        nvme_need own
    fi
    make_base "$RUN_DIR/disk.raw" 96
    nvme_start disk.raw
    nvme_do "subsystem $NVME_NQN; namespace $NVME_NQN 1 /dev/vda"
    nvme_serve
    for side in a b; do
        nvme_host "$side"
        nvme_backend "$side" 1 "${options[@]}"
    done
    side=a
    MEMORY=320M ORDERS=yes
    start_guest m0 "$LOAD_FUNCTIONS" a,num-queues=2
    guest_says m0 "UNDER LOAD" "$GUEST_TIMEOUT"
    say "requests per second   before   during    after   downtime   longest wait for a read (guest's clock)"
    for ((trip = 1; trip <= MIGRATIONS; trip++)); do
        to=m$trip
        if [[ $side == a ]]; then side=b; else side=a; fi
        start_target "$to" "$LOAD_FUNCTIONS" "$side,num-queues=2"
        before=$(rate "$from" 3)
        pause=$(longest_pause "$from")
        started=$EPOCHREALTIME
        done=$(requests_done "$from")
        migrate "$from" "$to"
        during=$(per_second "$done" "$(requests_done "$to")" "$started")
        load_ok "$to"
        pause=$(longest_pause "$to")
        say "$(printf 'migration %d         %8d %8d %8d %7d ms %7d ms' \
            "$trip" "$before" "$during" "$(rate "$to" 3)" "$DOWNTIME_MS" $((pause / 1000)))"
        from=$to
    done
    [[ ${options[*]} != *reservations* ]] || kept_out "$from"
    end_load "$from"
    for side in a b; do
        stop_backend "$side" || fail "the end of backend $side"
    done
    backend_complaints a b
    check_namespace "$from" SHA disk.raw
    nvme_end
}

# kept_out VM: the machine of a third host does not get at the namespace, and VM is none the worse for it.
kept_out() {
    nvme_host c
    nvme_backend c 1 "${options[@]}"
    ORDERS=no start_guest third guest_intrudes c,num-queues=2
    wait_for_line "$RUN_DIR/c.log" '(ERROR|WARN) .*reservation' "$GUEST_TIMEOUT" "${BACKEND_PID[c]}" ||
        fail "no word of the reservation in c.log"
    grep -E '(ERROR|WARN) .*reservation' "$RUN_DIR/c.log" | sed -n 1p >&2
    ! grep -q INTRUDED "$RUN_DIR/third.result" || fail "a third host wrote to the namespace"
    vm_kill third
    stop_backend c || say "the third backend failed, as it may"
    load_ok "$1"
}

# It ends the file system that is in use, if it can.
guest_intrudes() {
    dd if=/dev/zero of=/dev/vda bs=1M count=4 oflag=direct && result INTRUDED
}

# per_second COUNT COUNT SINCE: between then (EPOCHREALTIME) and now.
per_second() { awk -v n="$(($2 - $1))" -v a="$3" -v b="$EPOCHREALTIME" 'BEGIN { printf "%d", n / (b - a) }'; }

# rate VM SECONDS: of its requests.
rate() {
    local from=$EPOCHREALTIME count
    count=$(requests_done "$1")
    sleep "$2"
    per_second "$count" "$(requests_done "$1")" "$from"
}
