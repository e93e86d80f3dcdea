# shellcheck shell=bash
SUMMARY="libvirt with qemu-scripts/libvirt-domain.xml: define, start, plug a disk in and out, save, restore, kill of the backend, destroy"

source "$REPO_ROOT/guest-tests/lib/libvirt.sh"

host() {
    start_libvirt
    make_disk qcow2 64
    cp --sparse=always "$BASE" "$RUN_DIR/data.raw"
    cp --sparse=always "$BASE" "$RUN_DIR/plugged.raw"
    start_backend root "$IMAGE" qcow2 --num-queues 2
    start_backend data "$RUN_DIR/data.raw" raw --num-queues 2
    start_backend plugged "$RUN_DIR/plugged.raw" raw --num-queues 2
    libvirt_domain
    libvirt_disk plugged vdc >"$RUN_DIR/plugged.xml"

    virsh_must define "$RUN_DIR/vm1.xml"
    virsh_must start vm1
    says READY
    virsh_must attach-device vm1 "$RUN_DIR/plugged.xml" --live
    order plug
    says PLUGGED
    virsh_must detach-device vm1 "$RUN_DIR/plugged.xml" --live
    order unplug
    says UNPLUGGED

    order load
    says "UNDER LOAD"
    virsh_must save vm1 "$RUN_DIR/vm1.save"
    same "the state of the saved machine" "shut off" "$(virsh_ domstate vm1)"
    ! backend_is_virtioblkd || check_image
    virsh_must restore "$RUN_DIR/vm1.save"
    sleep 1
    if backend_is_virtioblkd; then
        # <reconnect>: the machine waits, and goes on.
        kill_backend root
        launch_backend root
    fi
    order finish
    says "GUEST-EXIT 0"
    virsh_must destroy vm1
    virsh_must undefine vm1
    same "machines that are left" "" "$(virsh_ list --all --name | tr -d '\n')"
    stop_backend root || fail "the backend of the root disk"
    stop_backend data || fail "the backend of the data disk"
    stop_backend plugged || fail "the backend of the plugged disk"
    check_image
    check_guest_sha vm1
    stop_libvirt
}

# libvirt_domain: RUN_DIR/vm1.xml, from the file that users get: our kernel instead of the disk's, our sockets,
# and serial ports for the results and the orders.
libvirt_domain() {
    local type=qemu
    choose_accel
    [[ $ACCEL == tcg ]] || type=kvm
    guest_script "$RUN_DIR/vm1.script" wanted appears guest_libvirt
    mkfifo "$RUN_DIR/orders.in" "$RUN_DIR/orders.out"
    : >"$RUN_DIR/vm1.result"
    exec 8<>"$RUN_DIR/orders.in"
    {
        printf '<kernel>%s</kernel><initrd>%s</initrd>' "$GUEST_KERNEL" "$GUEST_INITRD"
        printf "<cmdline>%s</cmdline><smbios mode='sysinfo'/>\n" "$(linux_parameters)"
    } >"$RUN_DIR/os"
    {
        printf "<sysinfo type='smbios'><oemStrings><entry>\n#script-begin\n"
        sed 's/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g' "$RUN_DIR/vm1.script"
        printf "\n#script-end\n</entry></oemStrings></sysinfo>\n"
        [[ $ACCEL == kvm ]] || printf "<cpu mode='custom' match='exact'><model>%s</model></cpu>\n" "$CPU_MODEL"
    } >"$RUN_DIR/sysinfo"
    {
        printf "<serial type='file'><source path='%s' append='on'/></serial>\n" "$RUN_DIR/vm1.console" "$RUN_DIR/vm1.result"
        printf "<serial type='pipe'><source path='%s'/></serial>\n" "$RUN_DIR/orders"
    } >"$RUN_DIR/serial"
    sed -e "s/type='kvm'/type='$type'/; s|/run/virtioblkd/vm1-|$RUN_DIR/|; /boot order/d; /console type/d" \
        -e "s/>1024</>384</" -e "/<\/os>/{
            r $RUN_DIR/sysinfo
        }" -e "/<type arch/r $RUN_DIR/os" -e "/<serial type='pty'/{
            r $RUN_DIR/serial
            d
        }" "$REPO_ROOT/qemu-scripts/libvirt-domain.xml" >"$RUN_DIR/vm1.xml"
}

# libvirt_disk BACKEND TARGET
libvirt_disk() {
    cat <<XML
<disk type='vhostuser' device='disk'>
  <driver name='qemu' type='raw' queues='2'/>
  <source type='unix' path='$RUN_DIR/$1.sock'><reconnect enabled='yes' timeout='1'/></source>
  <target dev='$2' bus='virtio'/>
</disk>
XML
}

order() { printf '%s\n' "$1" >&8; }

# says LINE: the guest reports it. QEMU is libvirt's child here, so its end is not noticed, but waited for.
says() {
    wait_for_line "$RUN_DIR/vm1.result" "^($1|FAIL|GUEST-EXIT)" "$GUEST_TIMEOUT" $$ ||
        fail "the guest did not say '$1' within $GUEST_TIMEOUT s"
    grep -Eq "^$1" "$RUN_DIR/vm1.result" || fail "the guest: $(tail -n 1 "$RUN_DIR/vm1.result")"
}

guest_libvirt() {
    stty -F /dev/ttyS2 raw -echo
    exec 3</dev/ttyS2
    fio_verify libaio 16 root 20 4 --bs=4k
    same "the data disk" "$((64 * 2048))" "$(cat /sys/block/vdb/size)"
    result READY
    wanted plug
    appears vdc
    fio --name=plugged --filename=/dev/vdc --rw=randwrite --bs=16k --size=4M --direct=1 --ioengine=libaio \
        --iodepth=8 --verify=crc32c --verify_fatal=1 --output=/dev/null || fail "fio on the plugged disk"
    result PLUGGED
    wanted unplug
    tries=0
    while [ -e /sys/block/vdc ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || fail "vdc does not go"
        sleep 0.1
    done
    result UNPLUGGED
    wanted load
    # Twelve seconds: the save and the kill are in the middle of it. Then it is verified, on the restored machine.
    # (fio's rate_iops would count the smallest blocks only.)
    fio --name=load --filename=/dev/vda --rw=randwrite --bsrange=4k-64k --offset=16M --size=24M --rate=2m \
        --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio.out &
    load=$!
    wait_writes vda 100
    result "UNDER LOAD"
    wanted finish
    wait "$load" || fail "fio under load"
    result "SHA $(disk_sha /dev/vda)"
}

wanted() {
    read -r order <&3
    same order "$1" "$order"
}

appears() {
    tries=0
    until [ -b "/dev/$1" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 200 ] || fail "no $1"
        sleep 0.1
    done
}
