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
        [[ ${options[*]} != *reservations* ]] || kept_out
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

# kept_out: a third host does not get at the namespace while another one holds it.
kept_out() {
    local status=0
    nvme_host c
    (cd "$RUN_DIR" && exec timeout 30 "$VIRTIOBLKD" --blk-file "$(nvme_uri)" --format raw --socket-path third.sock \
        "${NVME_HOST[@]}" "${options[@]}") >"$RUN_DIR/third.log" 2>&1 </dev/null || status=$?
    ((status != 0)) || fail "a third host was let in"
    ((status != 124)) || fail "a third host tries for ever"
    grep -i reservation "$RUN_DIR/third.log" | tail -n 1 >&2 || fail "no word of the reservation in third.log"
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
