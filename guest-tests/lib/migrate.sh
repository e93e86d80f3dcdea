# shellcheck shell=bash
# Migrations between two QEMUs on this host, over a unix socket.

# start_target VM FUNCTIONS DISK...: as start_guest, but the machine comes from elsewhere.
start_target() { INCOMING=yes start_guest "$@"; }

# migrate_begin FROM TO [PARAMETERS]: PARAMETERS of migrate-set-parameters, as the inside of a JSON object; by
# default as fast as it can be.
migrate_begin() {
    local parameters=${3:-'"max-bandwidth":10000000000,"downtime-limit":300'}
    rm -f "$RUN_DIR/$2.migrate"
    vm_qmp "$2" migrate-incoming "{\"uri\":\"unix:$2.migrate\"}" || fail "migrate-incoming: $VM_ANSWER"
    vm_qmp "$1" migrate-set-parameters "{$parameters}" || fail "migrate-set-parameters: $VM_ANSWER"
    vm_qmp "$1" migrate "{\"uri\":\"unix:$2.migrate\"}" || fail "migrate: $VM_ANSWER"
}

# migration VM FIELD: of query-migrate. Of a field that is not there, nothing.
migration() {
    vm_qmp "$1" query-migrate || fail "query-migrate: $VM_ANSWER"
    vm_field "$2"
}

# migrate_until VM STATUS SECONDS
migrate_until() {
    local status deadline=$((SECONDS + $3))
    until [[ $(migration "$1" status) =~ ^($2)$ ]]; do
        status=$(migration "$1" status)
        [[ ! $status =~ ^(failed|cancelled|completed)$ || $status =~ ^($2)$ ]] || fail "the migration of $1 is $status and not $2"
        ((SECONDS <= deadline)) || fail "the migration of $1 is still $status after $3 s"
        sleep 0.05
    done
}

# migrate_passes VM COUNT SECONDS: until it has gone over the memory that often.
migrate_passes() {
    local have deadline=$((SECONDS + $3))
    until have=$(migration "$1" dirty-sync-count) && ((${have:-0} >= $2)); do
        ((SECONDS <= deadline)) || fail "the migration of $1 made only ${have:-0} passes in $3 s"
        sleep 0.05
    done
}

# migrate FROM TO: to its end. Sets DOWNTIME_MS to what QEMU measured, and ends FROM.
migrate() {
    migrate_begin "$1" "$2"
    migrate_until "$1" completed 60
    DOWNTIME_MS=$(migration "$1" downtime)
    vm_event "$2" RESUME 20
    vm_end "$1"
}

# vm_event VM EVENT SECONDS
vm_event() { wait_for_line "$RUN_DIR/$1.qmp" "\"event\": \"$2\"" "$3" "${VM_PID[$1]}" || fail "no $2 of $1 within $3 s"; }

# vm_end VM: ends QEMU.
vm_end() {
    vm_qmp "$1" quit || true
    vm_wait "$1" 20 || fail "the end of $1"
}

# backend_complaints NAME...: shows what is more than information in their logs.
backend_complaints() {
    local name
    for name in "$@"; do
        grep -E ' (WARN|ERROR) ' "$RUN_DIR/$name.log" | sed "s/^/$name: /" >&2 || true
    done
}
