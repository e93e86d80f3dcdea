# shellcheck shell=bash
# A libvirtd of our own beside whatever is installed and running: with its own view of libvirt's directories, and
# its own process identifiers, so that nothing of it is left when it ends.

LIBVIRT_PID=''

# start_libvirt: as root. The first start asks QEMU for all its capabilities, which takes some seconds.
start_libvirt() {
    local own=$RUN_DIR/libvirt deadline=$((SECONDS + 60))
    ((EUID == 0)) || skip "libvirt's system instance needs root"
    ensure libvirtd=libvirt-daemon virsh=libvirt-clients
    unshare --mount --pid --fork true 2>/dev/null || skip "this container may not make namespaces"
    mkdir -p "$own"/{etc,lib,run,cache,log} /etc/libvirt /var/lib/libvirt /run/libvirt /var/cache/libvirt /var/log/libvirt
    cat >"$own/etc/qemu.conf" <<'CONF'
user = "root"
group = "root"
security_driver = "none"
namespaces = []
cgroup_controllers = []
remember_owner = 0
stdio_handler = "file"
CONF
    cat >"$own/etc/libvirtd.conf" <<'CONF'
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = "6f1a2b7c-0000-4000-8000-00000000000a"
CONF
    # The users that the package makes which starts libvirt by itself, and which is not needed here.
    cp /etc/passwd /etc/group "$own/"
    grep -q '^libvirt-qemu:' "$own/passwd" || echo 'libvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/false' >>"$own/passwd"
    grep -q '^libvirt-qemu:' "$own/group" || echo 'libvirt-qemu:x:64055:' >>"$own/group"
    grep -q '^kvm:' "$own/group" || echo 'kvm:x:64056:' >>"$own/group"
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        bash -c "$(declare -f libvirt_inside); libvirt_inside \"\$1\"" libvirtd "$own" >"$own/libvirtd.log" 2>&1 </dev/null &
    own_pid $!
    # unshare waits for its child, whose namespaces they are.
    until LIBVIRT_PID=$(pgrep -P $!) && [[ -S $own/run/libvirt-sock ]] && virsh_ list >/dev/null 2>&1; do
        alive $! && ((SECONDS <= deadline)) || {
            tail -n 20 "$own/libvirtd.log" >&2
            fail "libvirtd does not start"
        }
        sleep 0.2
    done
}

# libvirt_inside DIR: the first process of the namespace. It also reaps the machines, which are its orphans.
libvirt_inside() {
    local name
    mount --bind "$1/passwd" /etc/passwd
    mount --bind "$1/group" /etc/group
    mount --bind "$1/etc" /etc/libvirt
    mount --bind "$1/run" /run/libvirt
    for name in lib cache log; do
        mount --bind "$1/$name" "/var/$name/libvirt"
    done
    libvirtd --pid-file "$1/libvirtd.pid" &
    wait $!
}

# virsh_ COMMAND...: with our libvirtd.
virsh_() { nsenter --mount --pid --target "$LIBVIRT_PID" virsh --quiet --connect qemu:///system "$@"; }

# stop_libvirt: and every machine with it, as they are in its namespace. (A namespace's first process does not heed
# SIGTERM.)
stop_libvirt() {
    kill -KILL "$LIBVIRT_PID"
    wait_gone "$LIBVIRT_PID" 10
}

# virsh_must COMMAND...
virsh_must() {
    step "virsh $*"
    virsh_ "$@" </dev/null >&2 || fail "virsh $*"
}
