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
NVME_HOST=(--nvme-host-nqn "$NVME_HOST_NQN" --nvme-host-id "$NVME_HOST_ID")
NVME_PORTS=1
NVME_QUESTIONS=0

# nvme_need own|newer|tls|newest: the target's kernel, the distribution's own or a newer one, which has authentication;
# with tls also the programs for it; the newest has reservations. Leaves guest_in as it is.
nvme_need() {
    local dir=$GUEST_DIR
    backend_is_virtioblkd || skip "qemu-storage-daemon has no NVMe/TCP initiator"
    target_in "$CACHE_DIR/guest"
    case $1 in
    own) get_target || skip "this distribution's kernel has no nvmet-tcp" ;;
    newer) get_target_newer || skip "no newer kernel with nvmet-tcp in reach of apt" ;;
    tls)
        get_target_newer || skip "no newer kernel with nvmet-tcp in reach of apt"
        get_target_tls || skip "no package ktls-utils in reach of apt"
        ;;
    newest) get_target_newest || skip "no kernel of Debian 13's backports in reach of apt" ;;
    esac
    NVME_KERNEL=$GUEST_KERNEL
    NVME_INITRD=$TARGET_INITRD
    [[ $1 != tls ]] || NVME_INITRD=$TARGET_TLS_INITRD
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

# nvme_host LETTER: NVME_HOST, options that make virtioblkd another host.
nvme_host() {
    NVME_HOST=(--nvme-host-nqn "${NVME_HOST_NQN%?}$1" --nvme-host-id "${NVME_HOST_ID%?}$1")
}

# nvme_uri [NQN [NSID]]: through all ports.
nvme_uri() { printf 'nvme+tcp://%s/%s?nsid=%s' "$NVME_ADDRESS" "${1:-$NVME_NQN}" "${2:-1}"; }

# nvme_backend NAME NSID [virtioblkd options]: serves a namespace of NVME_NQN.
nvme_backend() {
    local name=$1 nsid=$2
    shift 2
    start_backend "$name" "$(nvme_uri "$NVME_NQN" "$nsid")" raw "${NVME_HOST[@]}" "$@"
}

# nvme_link PORT true|false: what goes to and fro on it is lost without a word.
nvme_link() { vm_qmp target set_link "{\"name\":\"nic$1\",\"up\":$2}" || fail "set_link: $VM_ANSWER"; }

# nvme_resize DISK BYTES: the target's DISKth file, and who is connected is told.
nvme_resize() {
    vm_qmp target block_resize "{\"device\":\"file$1\",\"size\":$2}" || fail "block_resize: $VM_ANSWER"
    nvme_do "echo 1 | tee /sys/kernel/config/nvmet/subsystems/*/namespaces/$1/revalidate_size"
}

# check_namespace VM WORD FILE: what the guest read last ("WORD sha256") is what is in the target's file.
check_namespace() {
    local seen
    seen=$(guest_result "$1" "$2")
    [[ -n $seen ]] || fail "the guest told no $2"
    same "the namespace's contents ($3), guest and file" "$seen" "$(sha256_of "$RUN_DIR/$3")"
}

# nvme_end: the target powers itself off, having let go of its files.
nvme_end() {
    vm_order target "$((NVME_QUESTIONS + 1)) poweroff -f"
    vm_wait target 30 || fail "the end of the target"
}

# --- keys for TLS --------------------------------------------------------------

# nvme_psk KEY VERSION NQN: "HEX IDENTITY", the pre-shared key for NVME_HOST_NQN and the subsystem NQN that follows from
# KEY ("NVMeTLSkey-1:…"), and its identity in that version (NVMe TCP Transport Specification, 3.6.1.3), by openssl alone.
# (nvme-cli before 2.16 derives others: its HKDF-Expand-Label leaves out the lengths.)
nvme_psk() {
    local number=${1#NVMeTLSkey-1:} key identity digest
    number=${number%%:*}
    key=$(printf %s "${1:16}" | tr -d : | base64 -d | to_hex)
    # Behind it there are four bytes of a checksum.
    key=${key%????????}
    if [[ $number == 00 ]]; then
        if ((${#key} == 64)); then number=01; else number=02; fi
    else
        key=$(psk_expand "$number" "$key" HostNQN "$NVME_HOST_NQN")
    fi
    identity="NVMe$2R$number $NVME_HOST_NQN $3"
    if (($2 == 0)); then
        key=$(psk_expand "$number" "$key" nvme-tls-psk "$identity")
    else
        digest=$(printf %s "$NVME_HOST_NQN $3 NVMe-over-Fabrics" | psk_hmac "$number" "$key" | from_hex | base64 -w 0)
        identity+=" $digest"
        key=$(psk_expand "$number" "$key" nvme-tls-psk "$number $digest")
    fi
    printf '%s %s' "$key" "$identity"
}

# psk_expand HASH KEY LABEL CONTEXT: HKDF-Extract without a salt, and HKDF-Expand-Label to the length of KEY (RFC 5869,
# RFC 8446, 7.1), which is not more than the hash has.
psk_expand() {
    local prk label="tls13 $3"
    prk=$(printf %s "$2" | from_hex | psk_hmac "$1" "$(printf '%0*d' "${#2}" 0)")
    {
        printf '%04x%02x' "$((${#2} / 2))" "${#label}"
        printf %s "$label" | to_hex
        printf '%02x' "${#4}"
        printf %s "$4" | to_hex
        printf '01'
    } | from_hex | psk_hmac "$1" "$prk"
}

# psk_hmac HASH KEY: of its input, as hexadecimal digits.
psk_hmac() {
    local hash=sha256
    [[ $1 != 02 ]] || hash=sha384
    openssl dgst "-$hash" -mac HMAC -macopt "hexkey:$2" -binary | to_hex
}

to_hex() { od -An -v -tx1 | tr -d ' \n'; }
from_hex() { sed 's/../\\x&/g' | { read -r hex || true; printf %b "$hex"; }; }

# --- in the target -------------------------------------------------------------

NVME_FUNCTIONS="subsystem namespace port offer withdraw ana allow admit psk nvme_target"

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
    # Newer kernels have reservations.
    [ ! -e resv_enable ] || echo 1 >resv_enable
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
    admit "$1" "$2"
}

# admit NQN HOST: one that was allowed elsewhere already.
admit() {
    echo 0 >"/sys/kernel/config/nvmet/subsystems/$1/attr_allow_any_host"
    ln -s "/sys/kernel/config/nvmet/hosts/$2" "/sys/kernel/config/nvmet/subsystems/$1/allowed_hosts/$2"
}

# psk HEX IDENTITY...: a key for TLS by its identity, into the kernel's keyring of NVMe.
psk() {
    hex=$1
    shift
    printf %b "$(printf %s "$hex" | sed 's/../\\x&/g')" | keyctl padd psk "$*" %:.nvme
}
