# shellcheck shell=bash
# The backends of two disks are killed under load, and started again.

# shellcheck source-path=SCRIPTDIR source=load.sh
source "$REPO_ROOT/guest-tests/lib/load.sh"

# kill_scenario DISK_OPTIONS: with these options of vhost-user-blk-pci.
kill_scenario() {
    local kills pause which connected replayed
    backend_is_virtioblkd || skip "qemu-storage-daemon keeps no requests over its end"
    load_initrd
    make_disk qcow2 128
    # A disk that is never flushed: its new mappings are nowhere but in the journal.
    truncate -s 1G "$RUN_DIR/empty.raw"
    make_overlay "$RUN_DIR/empty.raw" "$RUN_DIR/second.qcow2"
    start_backend disk "$IMAGE" qcow2 --num-queues 2 --queue-size 1024
    start_backend second "$RUN_DIR/second.qcow2" qcow2 --num-queues 2 --queue-size 1024
    VM_RECONNECT=yes ORDERS=yes start_guest vm "$LOAD_FUNCTIONS" "disk,num-queues=2$1" "second,num-queues=2$1"
    guest_says vm "UNDER LOAD" "$GUEST_TIMEOUT"
    [[ $1 != *packed=on* ]] || same "packed rings" 1 "$(guest_result vm PACKED)"
    for ((kills = 1; kills <= KILLS; kills++)); do
        pause=$((200 + RANDOM % 1300))
        sleep "$((pause / 1000)).$(printf '%03d' $((pause % 1000)))"
        load_ok vm
        which=disk
        ((kills % 3)) || which=second
        alive "${BACKEND_PID[$which]}" || fail "the backend ended by itself before kill $kills"
        kill_backend "$which"
        launch_backend "$which"
    done
    sleep 1
    load_ok vm
    pause=$(longest_pause vm)
    connected=$(cat "$RUN_DIR"/{disk,second}.log | grep -c 'a VMM has connected')
    end_load vm
    stop_backend disk || fail "the backend's end"
    stop_backend second || fail "the second backend's end"
    replayed=$(cat "$RUN_DIR"/{disk,second}.log | grep -c ' were replayed' || true)
    say "$KILLS kills, $connected connections, $replayed journals replayed; the guest's longest wait for a read: $((pause / 1000)) ms"
    check_image
    check_guest_sha vm
    qemu-img check -q -f qcow2 "$RUN_DIR/second.qcow2" || fail "qemu-img check of the second disk"
}
