# shellcheck shell=bash
SUMMARY="20 hot upgrades (SIGUSR2) in a row under load: no error in the guest, and QEMU's connection stays the same"

source "$REPO_ROOT/guest-tests/lib/load.sh"

UPGRADES=${UPGRADES:-20}

host() {
    local n pause longest=0 paused longest_paused=0 log=$RUN_DIR/disk.log
    backend_is_virtioblkd || skip "qemu-storage-daemon can not be replaced while it serves"
    load_initrd
    make_disk qcow2 128
    start_backend disk "$IMAGE" qcow2 --num-queues 2 --pid-file "$RUN_DIR/disk.pid"
    # Without reconnect: a connection that breaks stays broken.
    ORDERS=yes start_guest vm "$LOAD_FUNCTIONS" disk,num-queues=2
    guest_says vm "UNDER LOAD" "$GUEST_TIMEOUT"
    pause=$(longest_pause vm)
    sleep 3
    pause=$(longest_pause vm)
    step "longest wait for a read in 3 s without an upgrade: $((pause / 1000)) ms"
    for ((n = 1; n <= UPGRADES; n++)); do
        upgrade_backend disk "$n"
        paused=$(sed -n 's/.* the disks paused for \([0-9]*\)\.\([0-9]*\) ms.*/\1\2/p' "$log" | tail -n 1)
        sleep 0.3
        load_ok vm
        pause=$(longest_pause vm)
        step "upgrade $n: paused for $(ms "$paused"), longest wait for a read $(ms "$pause")"
        ((10#$paused <= longest_paused)) || longest_paused=$((10#$paused))
        ((pause <= longest)) || longest=$pause
    done
    end_load vm
    end_adopted disk
    say "$UPGRADES upgrades: longest pause $(ms "$longest_paused"), longest wait for a read in the guest $(ms "$longest")"
    same "connections of QEMU" 1 "$(grep -c 'a VMM has connected' "$log")"
    ! grep -E ' ERROR ' "$log" >&2 || fail "the backend's log has errors"
    check_image
    check_guest_sha vm
}

# ms MICROSECONDS
ms() { printf '%d.%03d ms' $((10#$1 / 1000)) $((10#$1 % 1000)); }

# upgrade_backend NAME N: its Nth upgrade. The process that takes over is no child of ours.
upgrade_backend() {
    local old=${BACKEND_PID[$1]} deadline=$((SECONDS + 60))
    kill -USR2 "$old"
    until (($(grep -c ' the disks paused for ' "$RUN_DIR/$1.log" || true) >= $2)) && ! alive "$old"; do
        load_ok vm
        ! grep -E 'the upgrade failed' "$RUN_DIR/$1.log" >&2 || fail "upgrade $2"
        ((SECONDS <= deadline)) || fail "upgrade $2 takes longer than 60 s"
        sleep 0.02
    done
    BACKEND_PID[$1]=$(<"$RUN_DIR/$1.pid")
    [[ ${BACKEND_PID[$1]} != "$old" ]] || fail "the pid file names the old process"
    own_pid "${BACKEND_PID[$1]}"
    alive "${BACKEND_PID[$1]}" || fail "the process that took over has ended"
}

# end_adopted NAME: as stop_backend, for a process whose status goes to somebody else.
end_adopted() {
    kill -TERM "${BACKEND_PID[$1]}"
    wait_gone "${BACKEND_PID[$1]}" 30 || fail "the backend does not obey SIGTERM"
    unset "BACKEND_PID[$1]"
}
