# shellcheck shell=bash
SUMMARY="the backend is killed 30 times at random moments under load; the guest sees no error, and every byte is right"

source "$REPO_ROOT/guest-tests/lib/load.sh"

KILLS=${KILLS:-30}

host() {
    local kills pause connected
    backend_is_virtioblkd || skip "qemu-storage-daemon keeps no requests over its end"
    load_initrd
    make_disk qcow2 128
    start_backend disk "$IMAGE" qcow2 --num-queues 2
    VM_RECONNECT=yes ORDERS=yes start_guest vm "$LOAD_FUNCTIONS" disk,num-queues=2
    guest_says vm "UNDER LOAD" "$GUEST_TIMEOUT"
    for ((kills = 1; kills <= KILLS; kills++)); do
        pause=$((200 + RANDOM % 1300))
        sleep "$((pause / 1000)).$(printf '%03d' $((pause % 1000)))"
        load_ok vm
        alive "${BACKEND_PID[disk]}" || fail "the backend ended by itself before kill $kills"
        kill_backend disk
        launch_backend disk
    done
    sleep 1
    load_ok vm
    pause=$(longest_pause vm)
    connected=$(grep -c 'a VMM has connected' "$RUN_DIR/disk.log")
    end_load vm
    stop_backend disk || fail "the backend's end"
    say "$KILLS kills, $connected connections; the guest's longest wait for a read: $((pause / 1000)) ms"
    check_image
    check_guest_sha vm
}
