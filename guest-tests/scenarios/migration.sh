# shellcheck shell=bash
SUMMARY="10 round trips between two QEMUs with a backend each, one locked image; cancelled, failed and taken back as well"

source "$REPO_ROOT/guest-tests/lib/load.sh"
source "$REPO_ROOT/guest-tests/lib/migrate.sh"

ROUND_TRIPS=${ROUND_TRIPS:-10}
# qemu-storage-daemon can not hand over a locked image.
MIGRATED_FORMAT=raw
! backend_is_virtioblkd || MIGRATED_FORMAT=qcow2
# Slow enough that there is time to do something.
SLOWLY='"max-bandwidth":4000000,"downtime-limit":1'

# The machine that runs now, and the backend that serves it.
HERE=m0 SIDE=a COUNT=0

host() {
    local trip side longest=0 pause downtime=0
    load_initrd
    make_disk "$MIGRATED_FORMAT" 128
    start_backend a "$IMAGE" "$MIGRATED_FORMAT" --num-queues 2
    start_backend b "$IMAGE" "$MIGRATED_FORMAT" --num-queues 2
    MEMORY=320M ORDERS=yes
    start_guest m0 "$LOAD_FUNCTIONS" a,num-queues=2
    guest_says m0 "UNDER LOAD" "$GUEST_TIMEOUT"
    pause=$(longest_pause m0)
    sleep 3
    pause=$(longest_pause m0)
    step "longest wait for a read in 3 s without a migration: $((pause / 1000)) ms"

    for ((trip = 1; trip <= 2 * ROUND_TRIPS; trip++)); do
        next_machine
        migrate "$HERE" "$THERE"
        arrived
        pause=$(longest_pause "$HERE")
        step "migration $trip: downtime $DOWNTIME_MS ms, longest wait for a read $((pause / 1000)) ms"
        ((pause <= longest)) || longest=$pause
        ((DOWNTIME_MS <= downtime)) || downtime=$DOWNTIME_MS
    done
    say "$ROUND_TRIPS round trips: longest downtime $downtime ms; longest wait for a read $((longest / 1000)) ms (of the guest's clock, which stands still in the downtime)"

    cancelled
    target_dies
    switchover_fails
    taken_back

    # And nothing of all that is in the way of one more.
    next_machine
    migrate "$HERE" "$THERE"
    arrived
    end_load "$HERE"
    for side in a b; do
        stop_backend "$side" || fail "the end of backend $side"
    done
    backend_complaints a b
    check_image
    check_guest_sha "$HERE"
}

# next_machine [OPTION...]: THERE, a machine on the other side that waits for HERE. Options of QEMU.
next_machine() {
    COUNT=$((COUNT + 1))
    THERE=m$COUNT
    if [[ $SIDE == a ]]; then OTHER=b; else OTHER=a; fi
    VM_OPTIONS=("$@")
    start_target "$THERE" "$LOAD_FUNCTIONS" "$OTHER,num-queues=2"
    VM_OPTIONS=()
}

arrived() {
    HERE=$THERE
    SIDE=$OTHER
    load_ok "$HERE"
}

# lives_on WHAT: the guest works here as before.
lives_on() {
    local pause
    sleep 1
    load_ok "$HERE"
    pause=$(longest_pause "$HERE")
    step "$1: the guest lives on; longest wait for a read $((pause / 1000)) ms"
}

cancelled() {
    next_machine
    migrate_begin "$HERE" "$THERE" "$SLOWLY"
    migrate_until "$HERE" active 20
    sleep 1
    vm_qmp "$HERE" migrate_cancel || fail "migrate_cancel: $VM_ANSWER"
    migrate_until "$HERE" cancelled 20
    # What came so far is of no use to it: it ends.
    wait_gone "${VM_PID[$THERE]}" 20 || fail "the target of a cancelled migration stays"
    lives_on "cancelled"
}

target_dies() {
    next_machine
    migrate_begin "$HERE" "$THERE" "$SLOWLY"
    migrate_until "$HERE" active 20
    sleep 1
    vm_kill "$THERE"
    migrate_until "$HERE" failed 20
    lives_on "the target died in the middle"
}

# The source has stopped, flushed and let go of the image; the target is killed before it has the machine.
switchover_fails() {
    next_machine
    capability "$HERE" pause-before-switchover true
    migrate_begin "$HERE" "$THERE"
    migrate_until "$HERE" pre-switchover 60
    vm_kill "$THERE"
    vm_qmp "$HERE" migrate-continue '{"state":"pre-switchover"}' || say "migrate-continue: $VM_ANSWER"
    migrate_until "$HERE" failed 20
    resumed "$HERE"
    capability "$HERE" pause-before-switchover false
    lives_on "the target died at the switchover"
}

# The migration was completed, but the target never ran: it was started with -S, and is killed.
taken_back() {
    next_machine -S
    migrate_begin "$HERE" "$THERE"
    migrate_until "$HERE" completed 60
    vm_kill "$THERE"
    resumed "$HERE"
    lives_on "taken back after a migration whose target never ran"
}

capability() {
    vm_qmp "$1" migrate-set-capabilities "{\"capabilities\":[{\"capability\":\"$2\",\"state\":$3}]}" ||
        fail "migrate-set-capabilities: $VM_ANSWER"
}

# resumed VM: QEMU goes on by itself after some failures, and is told to after others.
resumed() {
    local deadline=$((SECONDS + 20))
    until vm_qmp "$1" query-status && [[ $(vm_field status) == running ]]; do
        vm_qmp "$1" cont || say "cont: $VM_ANSWER"
        ((SECONDS <= deadline)) || fail "$1 does not run again: $(vm_qmp "$1" query-status && echo "$VM_ANSWER")"
        sleep 0.1
    done
}
