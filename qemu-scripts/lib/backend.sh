# shellcheck shell=bash
# Starting and stopping the vhost-user backend: virtioblkd, or qemu-storage-daemon to compare with
# (BACKEND=qemu-storage-daemon).

BACKEND=${BACKEND:-virtioblkd}
VIRTIOBLKD=${VIRTIOBLKD:-$REPO_ROOT/target/release/virtioblkd}
declare -A BACKEND_PID=() BACKEND_LINE=()

backend_is_virtioblkd() { [[ $BACKEND == virtioblkd ]]; }

# storage_daemon_command SOCKET IMAGE FORMAT [virtioblkd options]: sets BACKEND_COMMAND to the nearest
# thing that qemu-storage-daemon has. What it has no option for is left out.
storage_daemon_command() {
    local socket=$1 image=$2 format=$3 writable=on read_only=off queues=2 block_size=512
    shift 3
    while (($#)); do
        case $1 in
        --read-only) writable=off read_only=on ;;
        --num-queues) queues=$2 && shift ;;
        --block-size) block_size=$2 && shift ;;
        --*) [[ $# -lt 2 || $2 == --* ]] || shift ;;
        esac
        shift
    done
    BACKEND_COMMAND=(qemu-storage-daemon
        --blockdev "driver=file,node-name=file,filename=$image,read-only=$read_only,discard=unmap"
        --blockdev "driver=$format,node-name=disk,file=file,read-only=$read_only,discard=unmap"
        --object iothread,id=io0,poll-max-ns=32768
        --export "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$socket,writable=$writable,num-queues=$queues,logical-block-size=$block_size,iothread=io0")
}

# backend_command SOCKET IMAGE FORMAT [virtioblkd options]: sets BACKEND_COMMAND.
backend_command() {
    local socket=$1 image=$2 format=$3
    shift 3
    if backend_is_virtioblkd; then
        [[ -x $VIRTIOBLKD ]] || die "$VIRTIOBLKD is not there: cargo build --release"
        BACKEND_COMMAND=("$VIRTIOBLKD" --socket-path "$socket" --blk-file "$image" --format "$format" "$@")
    else
        storage_daemon_command "$socket" "$image" "$format" "$@"
    fi
}

# start_backend NAME IMAGE FORMAT [virtioblkd options]: serves IMAGE on RUN_DIR/NAME.sock and returns when
# it can be connected to. Its log is RUN_DIR/NAME.log.
start_backend() {
    local name=$1 log=$RUN_DIR/$1.log deadline=$((SECONDS + 20)) pid
    shift
    # The socket's name is relative to RUN_DIR: a socket's path may have 107 bytes only.
    backend_command "$name.sock" "$@"
    rm -f "$RUN_DIR/$name.sock"
    BACKEND_LINE[$name]=$(printf '%q ' "${BACKEND_COMMAND[@]}")
    launch_backend "$name"
    pid=${BACKEND_PID[$name]}
    until [[ -S $RUN_DIR/$name.sock ]]; do
        alive "$pid" || {
            tail -n 20 "$log" >&2
            die "the backend ended at once: ${BACKEND_COMMAND[*]}"
        }
        ((SECONDS <= deadline)) || die "the backend made no socket within 20 s (see $log)"
        sleep 0.02
    done
}

# kill_backend NAME: as the kernel's out-of-memory killer would.
kill_backend() {
    kill -KILL "${BACKEND_PID[$1]}"
    # At once, or the shell says "Killed".
    wait "${BACKEND_PID[$1]}" 2>/dev/null || true
}

# launch_backend NAME: the command line of the last start_backend NAME, also over what a killed process left
# behind. Does not wait until it listens.
launch_backend() {
    local -a command
    eval "command=(${BACKEND_LINE[$1]})"
    (cd "$RUN_DIR" && exec "${command[@]}") >>"$RUN_DIR/$1.log" 2>&1 </dev/null &
    BACKEND_PID[$1]=$!
    own_pid $!
}

# stop_backend NAME: SIGTERM; it has to finish what it holds and leave with status 0.
stop_backend() {
    local pid=${BACKEND_PID[$1]:-} status=0
    [[ -n $pid ]] || return 0
    unset "BACKEND_PID[$1]"
    kill -TERM "$pid" 2>/dev/null || true
    if ! wait_gone "$pid" 30; then
        kill -KILL "$pid"
        say "backend $1 did not obey SIGTERM within 30 s"
        return 1
    fi
    wait "$pid" || status=$?
    ((status == 0)) || say "backend $1 left with status $status"
    return "$status"
}
