# shellcheck shell=bash
# What the fio scenarios have in common.

# fio_scenario FORMAT QUEUES: every block size at every depth, and then the whole disk against qemu-img.
fio_scenario() {
    make_disk "$1" 128
    start_backend disk "$IMAGE" "$1" --num-queues "$2"
    # A queue for each CPU: the guest uses no more queues than it has CPUs.
    if (($2 == 1)); then
        run_guest vm guest_fio_one "disk,num-queues=1"
    else
        CPUS=$2 run_guest vm guest_fio_many "disk,num-queues=$2"
    fi
    stop_backend disk || fail "the backend's end"
    check_image
    check_guest_sha vm
}

# The regions do not begin at the start of a cluster, and end in the middle of one.
guest_fio_one() {
    same queues 1 "$(ls /sys/block/vda/mq | wc -l)"
    offset=20
    for depth in 1 16 64; do
        engine=libaio
        [ "$depth" -lt 64 ] || engine=io_uring
        fio_verify "$engine" "$depth" "4k-$depth" "$offset" 6 --bs=4k
        fio_verify "$engine" "$depth" "64k-$depth" $((offset + 8192)) 12 --bs=64k
        fio_verify "$engine" "$depth" "mixed-$depth" $((offset + 24576)) 12 --bsrange=512-256k
        offset=$((offset + 40960))
    done
    result "SHA $(disk_sha /dev/vda)"
}

guest_fio_many() {
    same queues 4 "$(ls /sys/block/vda/mq | wc -l)"
    offset=20
    for depth in 1 16 64; do
        engine=libaio
        [ "$depth" -lt 64 ] || engine=io_uring
        # Four writers at once, on neighbouring regions that share a cluster at their seams.
        fio_verify "$engine" "$depth" "4k-$depth" "$offset" 2 --bs=4k --numjobs=4 --offset_increment=2076k
        fio_verify "$engine" "$depth" "64k-$depth" $((offset + 9000)) 3 --bs=64k --numjobs=4 --offset_increment=3100k
        fio_verify "$engine" "$depth" "mixed-$depth" $((offset + 24576)) 3 --bsrange=512-256k --numjobs=4 --offset_increment=3100k
        offset=$((offset + 40960))
    done
    result "SHA $(disk_sha /dev/vda)"
}
