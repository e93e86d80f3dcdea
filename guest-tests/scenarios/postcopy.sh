# shellcheck shell=bash
SUMMARY="postcopy: the guest runs on the target while its memory still arrives, page by page, under load"

source "$REPO_ROOT/guest-tests/lib/load.sh"
source "$REPO_ROOT/guest-tests/lib/migrate.sh"

host() {
    local side pause round from to
    backend_is_virtioblkd || skip "qemu-storage-daemon can not do without the pages of its guest"
    [[ $(cat /proc/sys/vm/unprivileged_userfaultfd) == 1 || $EUID == 0 ]] ||
        skip "userfaultfd is for root here (vm.unprivileged_userfaultfd)"
    load_initrd
    make_disk qcow2 128
    start_backend a "$IMAGE" qcow2 --num-queues 2
    start_backend b "$IMAGE" qcow2 --num-queues 2
    MEMORY=320M ORDERS=yes
    start_guest m0 "$LOAD_FUNCTIONS" a,num-queues=2
    postcopy_capable m0
    guest_says m0 "UNDER LOAD" "$GUEST_TIMEOUT"
    for round in 1 2 3 4; do
        from=m$((round - 1)) to=m$round
        if ((round % 2)); then side=b; else side=a; fi
        start_target "$to" "$LOAD_FUNCTIONS" "$side,num-queues=2"
        postcopy_capable "$to"
        # Slow, so that most of the memory is still missing when the guest moves.
        migrate_begin "$from" "$to" '"max-bandwidth":40000000,"max-postcopy-bandwidth":40000000,"downtime-limit":1'
        migrate_until "$from" active 20
        sleep 1
        vm_qmp "$from" migrate-start-postcopy || fail "migrate-start-postcopy: $VM_ANSWER"
        vm_event "$to" RESUME 20
        pause=$(longest_pause "$to")
        migrate_until "$from" completed 90
        step "postcopy $round: downtime $(migration "$from" downtime) ms, $(migration "$from" postcopy-requests) pages asked for; longest wait for a read $((pause / 1000)) ms"
        vm_end "$from"
        load_ok "$to"
    done
    end_load "$to"
    for side in a b; do
        stop_backend "$side" || fail "the end of backend $side"
    done
    backend_complaints a b
    check_image
    check_guest_sha "$to"
}

postcopy_capable() {
    vm_qmp "$1" migrate-set-capabilities '{"capabilities":[{"capability":"postcopy-ram","state":true}]}' ||
        fail "migrate-set-capabilities: $VM_ANSWER"
}
