# shellcheck shell=bash
SUMMARY="a migration takes along what only the backend wrote to guest memory; with the dirty log muted it does not"

source "$REPO_ROOT/guest-tests/lib/load.sh"
source "$REPO_ROOT/guest-tests/lib/migrate.sh"

host() {
    local stale
    backend_is_virtioblkd || skip "qemu-storage-daemon has no switch that mutes its log"
    [[ -n ${VIRTIOBLKD_CHECKED:-} ]] || skip "the switch is there in builds with assertions only (VIRTIOBLKD_CHECKED)"
    VIRTIOBLKD=$VIRTIOBLKD_CHECKED
    load_initrd
    make_disk qcow2 64
    one_migration loud
    stale=$(guest_result loud-target STALE)
    say "with the dirty log: $stale sectors are stale"
    same "stale sectors" "0 of 32768" "$stale"

    # The negative control: a test that finds nothing here finds nothing anywhere.
    VIRTIOBLKD_MUTE_DIRTY_LOG=1 one_migration muted
    stale=$(guest_result muted-target STALE)
    say "with the log muted: $stale sectors are stale"
    # Nearly all; that some page comes along by chance is possible.
    ((${stale%% *} > 16384)) || fail "only $stale sectors are stale with the log muted: this test sees nothing"
}

# one_migration NAME: NAME-source on one backend, NAME-target on another, and the disk's reads in between.
one_migration() {
    local side
    for side in source target; do
        start_backend "$1-$side" "$IMAGE" qcow2 --num-queues 1
    done
    MEMORY=320M CPUS=2 ORDERS=yes
    start_guest "$1-source" guest_stale "$1-source,num-queues=1"
    start_target "$1-target" guest_stale "$1-target,num-queues=1"
    guest_says "$1-source" READY "$GUEST_TIMEOUT"
    # Slower than the guest writes to its memory, so that it does not end before it is told to.
    migrate_begin "$1-source" "$1-target" '"max-bandwidth":60000000,"downtime-limit":1'
    # Behind the first pass the buffer is not looked at again, unless somebody says that it has changed.
    migrate_passes "$1-source" 3 60
    vm_order "$1-source" read
    guest_says "$1-source" READ 60
    vm_order "$1-source" calm
    guest_says "$1-source" CALM 30
    vm_qmp "$1-source" migrate-set-parameters '{"max-bandwidth":10000000000,"downtime-limit":300}' || fail "$VM_ANSWER"
    migrate_until "$1-source" completed 60
    vm_event "$1-target" RESUME 20
    vm_end "$1-source"
    vm_order "$1-target" compare
    guest_says "$1-target" STALE 60
    finish_guest "$1-target"
    for side in source target; do
        stop_backend "$1-$side" || fail "the end of backend $1-$side"
    done
    backend_complaints "$1-source" "$1-target"
    check_image
}

guest_stale() {
    stty -F /dev/ttyS2 raw -echo
    stale /dev/vda 16 </dev/ttyS2 >/dev/ttyS1 || fail "stale"
}
