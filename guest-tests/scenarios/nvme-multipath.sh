# shellcheck shell=bash
SUMMARY="NVMe/TCP: two ports under load: ANA states change, a path is cut, one falls silent, both are gone for a moment; no error in the guest"

source "$REPO_ROOT/guest-tests/lib/load.sh"
source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

CUTS=${CUTS:-3}

host() {
    local cut
    load_initrd
    nvme_need newer
    make_base "$RUN_DIR/disk.raw" 96
    NVME_PORTS=2
    nvme_start disk.raw
    nvme_do "subsystem $NVME_NQN; namespace $NVME_NQN 1 /dev/vda"
    nvme_serve
    nvme_do "ana 2 1 non-optimized"
    nvme_backend disk 1 --num-queues 2 --nvme-keep-alive 4 --nvme-reconnect-delay 1
    ORDERS=yes start_guest vm "$LOAD_FUNCTIONS" disk,num-queues=2
    guest_says vm "UNDER LOAD" "$GUEST_TIMEOUT"
    pause=$(longest_pause vm)
    sleep 2
    lives_on "nothing happens"

    nvme_do "ana 2 1 optimized; ana 1 1 inaccessible"
    sleep 1
    lives_on "the namespace moves to the other port"
    nvme_do "ana 1 1 optimized; ana 2 1 inaccessible"
    sleep 1
    lives_on "and back"
    nvme_do "ana 2 1 optimized"

    nvme_do "withdraw 1 $NVME_NQN"
    sleep 1
    lives_on "the first port's connections are closed"
    nvme_do "offer 1 $NVME_NQN"
    sleep 2
    nvme_do "withdraw 2 $NVME_NQN"
    sleep 1
    lives_on "then the second one's"
    nvme_do "offer 2 $NVME_NQN"
    sleep 2

    nvme_link 1 false
    sleep 8
    lives_on "the first port has fallen silent for 8 s"
    grep -q 'no answer to a Keep Alive' "$RUN_DIR/disk.log" || fail "nobody noticed that a port is silent"
    nvme_link 1 true

    for ((cut = 1; cut <= CUTS; cut++)); do
        nvme_do "withdraw 1 $NVME_NQN; withdraw 2 $NVME_NQN"
        sleep "0.$((RANDOM % 10))"
        nvme_do "offer 1 $NVME_NQN; offer 2 $NVME_NQN"
        sleep 2
        lives_on "both ports were gone ($cut)"
    done
    end_load vm
    stop_backend disk || fail "the backend's end"
    backend_complaints_count
    check_namespace vm SHA disk.raw
    nvme_end
}

# lives_on WHAT: no error so far; the longest wait since the last time.
lives_on() {
    load_ok vm
    pause=$(longest_pause vm)
    step "$1: longest wait for a read $((pause / 1000)) ms"
}

backend_complaints_count() {
    say "the backend's log has $(grep -cE ' (WARN|ERROR) ' "$RUN_DIR/disk.log" || true) warnings and errors"
}
