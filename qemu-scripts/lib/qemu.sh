# shellcheck shell=bash
# A virtual machine: vm_new, then vm_… for each part, then vm_start; it writes to files in RUN_DIR.
#   NAME.console  first serial port (kernel messages, what programs print)
#   NAME.result   second serial port (what a guest script reports)
#   NAME.qmp      QEMU's answers and events

declare -A VM_PID=() VM_QMP=() VM_ORDERS=()

# vm_new NAME MEMORY CPUS
vm_new() {
    VM_NAME=$1
    [[ -n ${ACCEL:-} ]] || choose_accel
    # Shared memory is what vhost-user is about: the backend maps the guest's RAM.
    VM_ARGS=(-name "$1" -nodefaults -no-user-config -display "${VM_DISPLAY:-none}"
        -machine "${VM_MACHINE:-q35},memory-backend=ram" -accel "$ACCEL" -cpu "$CPU_MODEL"
        -m "$2" -smp "$3" -object "memory-backend-memfd,id=ram,size=$2,share=on")
    # A guest's reset, or its panic, ends QEMU, unless a reset is what one wants to see.
    [[ ${ALLOW_RESET:-no} == yes ]] || VM_ARGS+=(-no-reboot)
}

# vm_disk BACKEND_NAME[,DEVICE_OPTION...]: the disk that this backend serves. QEMU runs in RUN_DIR, or
# VM_SOCKETS says where the sockets are. With VM_RECONNECT=yes it connects again whenever the backend went away.
vm_disk() {
    local chardev="socket,id=${1%%,*},path=${VM_SOCKETS:-}${1%%,*}.sock"
    [[ ${VM_RECONNECT:-no} == no ]] || chardev+=,$(reconnect_option)
    VM_ARGS+=(-chardev "$chardev" -device "vhost-user-blk-pci,chardev=$1")
}

# qemu_version: such as 10.0.2.
qemu_version() { qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p'; }

# reconnect_option: of a chardev. What takes milliseconds came with QEMU 9.2.
reconnect_option() {
    if version_at_least "$(qemu_version)" 9.2; then printf 'reconnect-ms=100'; else printf 'reconnect=1'; fi
}

# vm_files [qmp]: serial ports to files, and QMP on a pair of pipes; or the latter alone.
vm_files() {
    local base=$RUN_DIR/$VM_NAME
    rm -f "$base".{console,result,qmp,pipe.in,pipe.out}
    : >"$base.console"
    : >"$base.result"
    mkfifo "$base.pipe.in" "$base.pipe.out"
    [[ ${1:-} == qmp ]] ||
        VM_ARGS+=(-serial "file:$VM_NAME.console" -serial "file:$VM_NAME.result")
    VM_ARGS+=(-chardev "pipe,id=qmp,path=$VM_NAME.pipe" -mon chardev=qmp,mode=control)
}

# vm_orders: a third serial port, on which the guest reads lines of vm_order.
vm_orders() {
    local base=$RUN_DIR/$VM_NAME.orders
    rm -f "$base".{in,out}
    mkfifo "$base".in "$base".out
    VM_ARGS+=(-chardev "pipe,id=orders,path=$VM_NAME.orders" -serial chardev:orders)
}

# vm_order NAME LINE
vm_order() { printf '%s\n' "$2" >&"${VM_ORDERS[$1]}"; }

# vm_terminal: the first serial port to NAME.console, with what vm_type sends as its input.
vm_terminal() {
    local base=$RUN_DIR/$VM_NAME.orders
    vm_orders
    : >"$RUN_DIR/$VM_NAME.console"
    cat "$base.out" >"$RUN_DIR/$VM_NAME.console" &
    own_pid $!
}

# vm_type NAME LINE: as from a keyboard.
vm_type() { printf '%s\r' "$2" >&"${VM_ORDERS[$1]}"; }

# vm_linux INITRD [KERNEL_PARAMETERS]: boots our kernel directly.
vm_linux() {
    VM_ARGS+=(-kernel "$GUEST_KERNEL" -initrd "$1" -append "$(linux_parameters) ${2:-}")
}

# no_timer_check: on a busy host an emulated timer may be too late for the kernel's test of it, and it panics.
linux_parameters() { printf 'console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check'; }

# vm_script FILE: what the guest's init runs.
vm_script() {
    printf '\n#script-begin\n%s\n#script-end\n' "$(cat "$1")" >"$RUN_DIR/$VM_NAME.smbios"
    VM_ARGS+=(-smbios "type=11,path=$VM_NAME.smbios")
}

# vm_uefi: OVMF instead of SeaBIOS.
vm_uefi() {
    local code
    for code in /usr/share/OVMF/OVMF_CODE_4M.fd /usr/share/OVMF/OVMF_CODE.fd; do
        [[ -e $code ]] || continue
        cp "${code/_CODE/_VARS}" "$RUN_DIR/$VM_NAME.vars"
        VM_ARGS+=(-drive "if=pflash,unit=0,format=raw,readonly=on,file=$code"
            -drive "if=pflash,unit=1,format=raw,file=$RUN_DIR/$VM_NAME.vars")
        return 0
    done
    die "no UEFI firmware: apt-get install ovmf"
}

# vm_start: runs it in the background.
vm_start() {
    local base=$RUN_DIR/$VM_NAME pid fd
    (cd "$RUN_DIR" && exec qemu-system-x86_64 "${VM_ARGS[@]}") >"$base.qemu" 2>&1 </dev/null &
    pid=$!
    own_pid "$pid"
    VM_PID[$VM_NAME]=$pid
    if [[ -p $base.pipe.out ]]; then
        # Ends when QEMU closes its end.
        cat "$base.pipe.out" >"$base.qmp" &
        own_pid $!
        # Held open: what is in a pipe that nobody has open is lost. Both directions: opening does not wait.
        exec {fd}<>"$base.pipe.in"
        VM_QMP[$VM_NAME]=$fd
        vm_command "$VM_NAME" qmp_capabilities
    fi
    if [[ -p $base.orders.in ]]; then
        exec {fd}<>"$base.orders.in"
        VM_ORDERS[$VM_NAME]=$fd
    fi
}

# vm_command NAME COMMAND: one QMP command without arguments.
vm_command() {
    alive "${VM_PID[$1]}" || return 1
    printf '{"execute":"%s"}\n' "$2" >&"${VM_QMP[$1]}"
}

# vm_qmp NAME COMMAND [ARGUMENTS]: one QMP command, its arguments as a JSON object. VM_ANSWER is the answer; false
# when QEMU refuses, or has ended.
vm_qmp() {
    # Microseconds: no two are alike, in a subshell either.
    local arguments=${3:-} id=${EPOCHREALTIME/[^0-9]/} deadline=$((SECONDS + 30))
    [[ -n $arguments ]] || arguments='{}'
    VM_ANSWER=''
    alive "${VM_PID[$1]}" || return 1
    printf '{"execute":"%s","arguments":%s,"id":%d}\n' "$2" "$arguments" "$id" >&"${VM_QMP[$1]}"
    until VM_ANSWER=$(grep -Ea -m 1 "\"id\": $id[,}]" "$RUN_DIR/$1.qmp"); do
        alive "${VM_PID[$1]}" || return 1
        ((SECONDS <= deadline)) || die "QEMU of $1 did not answer $2 within 30 s"
        sleep 0.02
    done
    [[ $VM_ANSWER != *'"error": {'* ]]
}

# vm_field NAME: of VM_ANSWER, a number or a string.
vm_field() { sed -n "s/.*\"$1\": \"\{0,1\}\([^\",}]*\).*/\1/p" <<<"$VM_ANSWER"; }

# vm_wait NAME SECONDS: until QEMU ends by itself, with status 0.
vm_wait() {
    local pid=${VM_PID[$1]} status=0
    if ! wait_gone "$pid" "$2"; then
        say "VM $1 still runs after $2 s"
        return 1
    fi
    unset "VM_PID[$1]"
    wait "$pid" || status=$?
    ((status == 0)) || {
        say "QEMU of $1 left with status $status:"
        tail -n 5 "$RUN_DIR/$1.qemu" >&2
    }
    return "$status"
}

# vm_kill NAME: as the kernel's out-of-memory killer would.
vm_kill() {
    kill -KILL "${VM_PID[$1]}"
    # At once, or the shell says "Killed".
    wait "${VM_PID[$1]}" 2>/dev/null || true
    unset "VM_PID[$1]"
}
