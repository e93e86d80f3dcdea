# shellcheck shell=bash
SUMMARY="NVMe/TCP: live migrations under load between two QEMUs, whose backends have the same namespace; requests per second before, during and after"

source "$REPO_ROOT/guest-tests/lib/load.sh"
source "$REPO_ROOT/guest-tests/lib/migrate.sh"
source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

MIGRATIONS=${MIGRATIONS:-2}

host() {
    local trip from=m0 to side=a before during pause started=0 done=0
    load_initrd
    nvme_need own
    make_base "$RUN_DIR/disk.raw" 96
    nvme_start disk.raw
    nvme_do "subsystem $NVME_NQN; namespace $NVME_NQN 1 /dev/vda"
    nvme_serve
    nvme_backend a 1 --num-queues 2
    nvme_backend b 1 --num-queues 2
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
    end_load "$from"
    for side in a b; do
        stop_backend "$side" || fail "the end of backend $side"
    done
    backend_complaints a b
    check_namespace "$from" SHA disk.raw
    nvme_end
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
