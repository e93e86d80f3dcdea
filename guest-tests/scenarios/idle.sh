# shellcheck shell=bash
SUMMARY="an idle VM costs the backend less than 0.5 % of a core"

host() {
    local before after per_second
    per_second=$(getconf CLK_TCK)
    make_disk qcow2 64
    start_backend disk "$IMAGE" qcow2 --num-queues 2
    start_guest vm guest_idle disk,num-queues=2
    guest_says vm IDLE "$GUEST_TIMEOUT"
    # What is still polled after the last request may end first.
    sleep 1
    before=$(cpu_ticks "${BACKEND_PID[disk]}")
    sleep 10
    after=$(cpu_ticks "${BACKEND_PID[disk]}")
    alive "${VM_PID[vm]}" || fail "the VM ended early"
    say "$((after - before)) ticks of $((10 * per_second)) in ten seconds"
    # 0.5 % of ten seconds.
    (((after - before) * 200 < 10 * per_second)) || fail "the backend used $((after - before)) ticks in ten idle seconds"
    # A reset, which ends this VM. (An emulated guest's own clock is not to be relied on for "in a while".)
    vm_command vm system_reset
    vm_wait vm 30 || fail "the VM's end"
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
}

guest_idle() {
    fio_verify libaio 16 warm-up 0 4 --bs=4k
    result "SHA $(disk_sha /dev/vda)"
    result IDLE
    sleep 86400
}
