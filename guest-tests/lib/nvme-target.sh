# shellcheck shell=bash
# A guest whose Linux is an NVMe/TCP target (nvmet), reached on ports of 127.0.0.1 that QEMU forwards. Its
# namespaces are files of this host, which are looked into from here.

# "127.0.0.1:PORT" of each of the target's ports; with commas between all of them.
NVME_ADDRESSES=()
NVME_ADDRESS=''
NVME_NQN=nqn.2024-01.org.virtioblkd:target
# A host's name and identifier as virtioblkd is told them.
NVME_HOST_NQN=nqn.2014-08.org.nvmexpress:uuid:5e1f0000-0000-4000-8000-00000000000a
NVME_HOST_ID=5e1f0000-0000-4000-8000-00000000000a
NVME_PORTS=1
NVME_QUESTIONS=0

# nvme_need [newer|tls]: the target's kernel and initramfs: the distribution's own, or a newer one for authentication,
# and TLS. Leaves guest_in as it is.
nvme_need() {
    local dir=$GUEST_DIR
    backend_is_virtioblkd || skip "qemu-storage-daemon has no NVMe/TCP initiator"
    target_in "$CACHE_DIR/guest"
    case ${1:-} in
    '') get_target || skip "this distribution's kernel has no nvmet-tcp" ;;
    newer) get_target_newer || skip "no newer kernel with nvmet-tcp in reach of apt" ;;
    tls)
        get_target_newer || skip "no newer kernel with nvmet-tcp in reach of apt"
        get_target_tls || skip "no package ktls-utils in reach of apt"
        ;;
    esac
    NVME_KERNEL=$GUEST_KERNEL
    NVME_INITRD=$TARGET_INITRD
    [[ ${1:-} != tls ]] || NVME_INITRD=$TARGET_TLS_INITRD
    guest_in "$dir"
}

# nvme_start FILE[,DEVICE_OPTION...]...: boots VM "target" with NVME_PORTS ports, and these files as /dev/vda,
# /dev/vdb and so on (options of virtio-blk-pci). It serves nothing yet: see nvme_do, and the functions below.
nvme_start() {
    local disk id number=0 port
    # shellcheck disable=SC2086 # a list of names
    guest_script "$RUN_DIR/target.script" $NVME_FUNCTIONS
    vm_new target 256M 1
    for disk in "$@"; do
        number=$((number + 1))
        id=file$number
        VM_ARGS+=(-drive "if=none,id=$id,format=raw,discard=unmap,file=${disk%%,*}"
            -device "virtio-blk-pci,id=disk$number,drive=$id${disk#"${disk%%,*}"}")
    done
    for ((port = 1; port <= NVME_PORTS; port++)); do
        # A network for each, so that each can be cut. Port 0: whichever is free.
        VM_ARGS+=(-netdev "user,id=net$port,net=10.0.$port.0/24,restrict=on,hostfwd=tcp:127.0.0.1:0-127.0.0.1:1"
            -device "virtio-net-pci,netdev=net$port,id=nic$port")
    done
    vm_files
    vm_orders
    GUEST_KERNEL=$NVME_KERNEL vm_linux "$NVME_INITRD"
    vm_script "$RUN_DIR/target.script"
    vm_start
    guest_says target READY "$GUEST_TIMEOUT"
    NVME_ADDRESSES=()
    for ((port = 1; port <= NVME_PORTS; port++)); do
        nvme_forward "$port"
    done
    NVME_ADDRESS=$(IFS=, && printf '%s' "${NVME_ADDRESSES[*]}")
}

# nvme_forward PORT: to the same port in the guest, so that what the target tells in its discovery log is true here.
nvme_forward() {
    local number
    nvme_monitor info usernet
    number=$(sed 's/\\r\\n/\n/g; s/"return": "//' <<<"$VM_ANSWER" | awk -v net="(net$1):" '
        /^[^ ]/ || /Hub/ { here = index($0, net) } here && /HOST_FORWARD/ { print $4 }')
    nvme_monitor "hostfwd_remove net$1 tcp:127.0.0.1:$number"
    nvme_monitor "hostfwd_add net$1 tcp:127.0.0.1:$number-127.0.0.1:$number"
    [[ $VM_ANSWER == *'"return": ""'* ]] || fail "port $number of 127.0.0.1: $VM_ANSWER"
    NVME_ADDRESSES+=("127.0.0.1:$number")
}

nvme_monitor() {
    vm_qmp target human-monitor-command "{\"command-line\":\"$*\"}" || fail "QEMU's monitor: $VM_ANSWER"
}

# nvme_ask COMMAND...: runs a line of shell in the target and returns its status; NVME_ANSWER is what it printed.
nvme_ask() {
    local answer
    NVME_QUESTIONS=$((NVME_QUESTIONS + 1))
    vm_order target "$NVME_QUESTIONS $*"
    guest_says target "ANSWER $NVME_QUESTIONS " 60
    NVME_ANSWER=$(sed -n "s/^OUT $NVME_QUESTIONS //p" "$RUN_DIR/target.result")
    answer=$(guest_result target "ANSWER $NVME_QUESTIONS")
    return "$answer"
}

# nvme_do COMMAND...: which has to succeed.
nvme_do() { nvme_ask "$@" || fail "the target: $*: $NVME_ANSWER"; }

# nvme_serve [NQN...]: makes the ports and offers these subsystems (NVME_NQN) on all of them.
nvme_serve() {
    local port nqn
    (($#)) || set -- "$NVME_NQN"
    for ((port = 1; port <= NVME_PORTS; port++)); do
        nvme_do port "$port" "${NVME_ADDRESSES[port - 1]#*:}"
        for nqn in "$@"; do
            nvme_do offer "$port" "$nqn"
        done
    done
}

# nvme_uri [NQN [NSID]]: through all ports.
nvme_uri() { printf 'nvme+tcp://%s/%s?nsid=%s' "$NVME_ADDRESS" "${1:-$NVME_NQN}" "${2:-1}"; }

# nvme_end: the target powers itself off, having let go of its files.
nvme_end() {
    vm_order target "$((NVME_QUESTIONS + 1)) poweroff -f"
    vm_wait target 30 || fail "the end of the target"
}

# --- in the target -------------------------------------------------------------

NVME_FUNCTIONS="subsystem namespace port offer withdraw ana allow psk nvme_target"

# Runs lines that begin with a number, and answers with that number.
nvme_target() {
    stty -F /dev/ttyS2 raw -echo
    exec 3</dev/ttyS2
    mount -t configfs configfs /sys/kernel/config
    mkdir -p /dev/shm
    ip link set lo up
    echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet
    for nic in /sys/class/net/eth*; do
        nic=${nic##*/}
        # Its peers speak to 127.0.0.1, from an address of this network.
        ip addr add "10.0.$((${nic#eth} + 1)).15/24" dev "$nic"
        ip link set "$nic" up
    done
    [ ! -x /usr/bin/tlshd ] || tlshd -s -c /etc/tlshd.conf >/tmp/tlshd.log 2>&1 &
    result READY
    while read -r number line <&3; do
        status=0
        (eval "$line") >/tmp/answer 2>&1 </dev/null &
        wait "$!" || status=$?
        sed "s/^/OUT $number /" /tmp/answer >/dev/ttyS1
        result "ANSWER $number $status"
    done
}

# subsystem NQN: for any host.
subsystem() {
    mkdir "/sys/kernel/config/nvmet/subsystems/$1"
    echo 1 >"/sys/kernel/config/nvmet/subsystems/$1/attr_allow_any_host"
}

# namespace NQN NSID DEVICE [ANA_GROUP]
namespace() {
    cd "/sys/kernel/config/nvmet/subsystems/$1/namespaces"
    mkdir "$2"
    cd "$2"
    echo "$3" >device_path
    [ -z "${4:-}" ] || echo "$4" >ana_grpid
    echo 1 >enable
}

# port NUMBER TCP_PORT [tls1.3]: the latter is required then.
port() {
    mkdir "/sys/kernel/config/nvmet/ports/$1"
    cd "/sys/kernel/config/nvmet/ports/$1"
    echo ipv4 >addr_adrfam
    echo tcp >addr_trtype
    echo 127.0.0.1 >addr_traddr
    echo "$2" >addr_trsvcid
    [ -z "${3:-}" ] || { echo "$3" >addr_tsas && echo required >addr_treq; }
}

# offer PORT NQN, and withdraw: every connection to it is closed.
offer() { ln -s "/sys/kernel/config/nvmet/subsystems/$2" "/sys/kernel/config/nvmet/ports/$1/subsystems/$2"; }
withdraw() { rm "/sys/kernel/config/nvmet/ports/$1/subsystems/$2"; }

# ana PORT GROUP STATE
ana() {
    mkdir -p "/sys/kernel/config/nvmet/ports/$1/ana_groups/$2"
    echo "$3" >"/sys/kernel/config/nvmet/ports/$1/ana_groups/$2/ana_state"
}

# allow NQN HOST [SECRET [CONTROLLER_SECRET [HASH [DH_GROUP]]]]: only such hosts.
allow() {
    mkdir "/sys/kernel/config/nvmet/hosts/$2"
    cd "/sys/kernel/config/nvmet/hosts/$2"
    [ -z "${3:-}" ] || echo "$3" >dhchap_key
    [ -z "${4:-}" ] || echo "$4" >dhchap_ctrl_key
    [ -z "${5:-}" ] || echo "$5" >dhchap_hash
    [ -z "${6:-}" ] || echo "$6" >dhchap_dhgroup
    echo 0 >"/sys/kernel/config/nvmet/subsystems/$1/attr_allow_any_host"
    ln -s "/sys/kernel/config/nvmet/hosts/$2" "/sys/kernel/config/nvmet/subsystems/$1/allowed_hosts/$2"
}

# psk HEX IDENTITY...: a key for TLS by its identity, into the kernel's keyring of NVMe.
psk() {
    hex=$1
    shift
    printf "$(printf %s "$hex" | sed 's/../\\x&/g')" | keyctl padd psk "$*" %:.nvme
}
