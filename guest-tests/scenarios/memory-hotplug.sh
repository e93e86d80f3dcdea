# shellcheck shell=bash
SUMMARY="memory is plugged and unplugged under fio, whose buffers lie in it; the backend follows, mapping by mapping"

host() {
    local round plugged unplugged=0
    make_disk raw 128
    start_backend disk "$IMAGE" raw --num-queues 2
    guest_script "$RUN_DIR/vm.script" guest_more_memory guest_hotplug
    vm_new vm 384M 2
    VM_ARGS+=(-m "slots=4,maxmem=2G")
    vm_disk disk,num-queues=2
    vm_files
    vm_linux "$GUEST_INITRD"
    vm_script "$RUN_DIR/vm.script"
    vm_start
    guest_says vm "UNDER LOAD" "$GUEST_TIMEOUT"

    for round in 1 2 3; do
        plugged=$(backend_mappings)
        qmp object-add "{\"qom-type\":\"memory-backend-memfd\",\"id\":\"m$round\",\"size\":268435456,\"share\":true}"
        qmp device_add "{\"driver\":\"pc-dimm\",\"id\":\"d$round\",\"memdev\":\"m$round\"}"
        same "mappings of the backend with a DIMM more" $((plugged + 1)) "$(backend_mappings)"
        guest_says vm "USED $round" "$GUEST_TIMEOUT"
        if unplug "$round"; then
            unplugged=$((unplugged + 1))
            same "mappings of the backend without the DIMM" "$plugged" "$(backend_mappings)"
        fi
    done
    finish_guest vm
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
    say "3 DIMMs plugged under load, $unplugged of them unplugged"
    ((unplugged > 0)) || fail "the guest gave no DIMM back"
}

# backend_mappings: regions of guest memory that the backend has mapped; nothing to count in another backend.
backend_mappings() { grep -c 'memory-backend-memfd' "/proc/${BACKEND_PID[disk]}/maps" || true; }

# qmp COMMAND ARGUMENTS: which must succeed.
qmp() { vm_qmp vm "$@" || fail "$1: $VM_ANSWER"; }

# unplug ROUND: asks the guest for the DIMM, again if it says no; false if it keeps it.
unplug() {
    local try deadline refusals=0
    for try in 1 2 3; do
        qmp device_del "{\"id\":\"d$1\"}"
        deadline=$((SECONDS + 30))
        while ((SECONDS < deadline)); do
            if grep -aq "\"DEVICE_DELETED\".*\"device\": *\"d$1\"" "$RUN_DIR/vm.qmp"; then
                qmp object-del "{\"id\":\"m$1\"}"
                return 0
            fi
            (($(grep -ac '"DEVICE_UNPLUG_GUEST_ERROR"' "$RUN_DIR/vm.qmp") == refusals)) || break
            sleep 0.1
        done
        refusals=$(grep -ac '"DEVICE_UNPLUG_GUEST_ERROR"' "$RUN_DIR/vm.qmp" || true)
    done
    say "the guest keeps DIMM $1, asked $try times"
    return 1
}

# guest_more_memory: waits until the guest has more than before; what it gave back before does not count.
guest_more_memory() {
    tries=0
    least=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)
    while sleep 0.1; do
        now=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)
        [ "$now" -le $((least + 100000)) ] || return 0
        [ "$now" -ge "$least" ] || least=$now
        tries=$((tries + 1))
        [ "$tries" -lt 1200 ] || fail "the plugged memory does not come"
    done
}

guest_hotplug() {
    # Movable: what the guest is to give back must not hold what cannot be moved.
    echo online_movable >/sys/devices/system/memory/auto_online_blocks
    # Runs all the time, and verifies each of its passes.
    fio --name=load --filename=/dev/vda --rw=randwrite --bsrange=4k-64k --direct=1 --ioengine=libaio \
        --iodepth=16 --size=16M --verify=crc32c --verify_fatal=1 --verify_dump=0 --loops=1000 \
        --output=/tmp/load.out &
    load=$!
    wait_writes vda 1000
    result "UNDER LOAD"
    for round in 1 2 3; do
        guest_more_memory
        # Anonymous memory is taken from the movable zone first: these buffers lie in what was plugged.
        fio_verify libaio 32 "plugged-$round" 65536 16 --bsrange=4k-256k
        kill -0 "$load" || fail "the load has ended: $(cat /tmp/load.out)"
        result "USED $round"
    done
    kill -INT "$load"
    wait "$load" || true
    if grep -q 'verify:\|error=[1-9]' /tmp/load.out; then
        fail "the load: $(cat /tmp/load.out)"
    fi
    result "SHA $(disk_sha /dev/vda)"
}
