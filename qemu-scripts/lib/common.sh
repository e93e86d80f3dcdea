# shellcheck shell=bash
# Shared by every script here: messages, clean-up by pid, waiting with a sign of life.
# Sourced, never run. The other pieces of this library source nothing themselves: use all.sh.

REPO_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# Everything that is downloaded or built for a guest lives here (git-ignored).
CACHE_DIR=${VIRTIOBLKD_CACHE:-$REPO_ROOT/.cache}
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export LC_ALL=C

say() { printf '%s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

STEP_STARTED=$SECONDS
# step TEXT: the next visible step, with the time since the script began.
step() { printf '[%3ds] %s\n' "$((SECONDS - STEP_STARTED))" "$*" >&2; }

# --- processes ---------------------------------------------------------------

# Pids that this script started and that must not outlive it.
CLEANUP_PIDS=()
# Directories of this run that nobody needs afterwards.
CLEANUP_DIRS=()

own_pid() { CLEANUP_PIDS+=("$1"); }

# alive PID: true while the process runs (a zombie of ours counts as gone).
alive() {
    local state
    [[ -r /proc/$1/stat ]] || return 1
    state=$(sed 's/.*) \(.\) .*/\1/' "/proc/$1/stat" 2>/dev/null) || return 1
    [[ -n $state && $state != Z && $state != X ]]
}

# wait_gone PID SECONDS: false when the process is still there after that time.
wait_gone() {
    local deadline=$((SECONDS + $2))
    while alive "$1"; do
        ((SECONDS <= deadline)) || return 1
        sleep 0.05
    done
}

# end_pid PID [SECONDS]: SIGTERM, and SIGKILL when that is not obeyed in time.
end_pid() {
    alive "$1" || return 0
    kill -TERM "$1" 2>/dev/null || true
    wait_gone "$1" "${2:-10}" || kill -KILL "$1" 2>/dev/null || true
}

cleanup() {
    local status=$? i
    trap - EXIT INT TERM HUP
    # The last one started goes first: QEMU before its backend.
    for ((i = ${#CLEANUP_PIDS[@]} - 1; i >= 0; i--)); do
        end_pid "${CLEANUP_PIDS[i]}" 5
    done
    for i in "${CLEANUP_DIRS[@]}"; do
        rm -rf "$i"
    done
    exit "$status"
}

# Call once near the start of a script that starts processes.
install_cleanup() {
    trap cleanup EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

# --- waiting -----------------------------------------------------------------

# wait_for_line FILE REGEX SECONDS PID: until FILE has a line that matches. False when the time is
# over or when process PID ended without writing it.
wait_for_line() {
    local file=$1 regex=$2 deadline=$((SECONDS + $3)) pid=$4
    while true; do
        grep -Eaq -- "$regex" "$file" 2>/dev/null && return 0
        if ! alive "$pid"; then
            # It may have written the line just before it ended.
            grep -Eaq -- "$regex" "$file" 2>/dev/null
            return
        fi
        ((SECONDS <= deadline)) || return 1
        sleep 0.05
    done
}

# run_with_dots TEXT LOG COMMAND...: runs it with its output in LOG, a dot every two seconds, and the
# end of the log when it fails.
run_with_dots() {
    local text=$1 log=$2 pid started=$SECONDS shown=0
    shift 2
    printf '[%3ds] %s ' "$((SECONDS - STEP_STARTED))" "$text" >&2
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    own_pid "$pid"
    while alive "$pid"; do
        sleep 0.1
        if (((SECONDS - started) / 2 > shown)); then
            shown=$(((SECONDS - started) / 2))
            printf '.' >&2
        fi
    done
    if wait "$pid"; then
        printf ' done (%ds)\n' "$((SECONDS - started))" >&2
    else
        printf ' failed\n' >&2
        tail -n 30 "$log" >&2
        return 1
    fi
}

# follow_file FILE PID PREFIX SECONDS: copies lines to the terminal as they come, until PID ends; false when
# that takes longer.
follow_file() {
    local file=$1 pid=$2 prefix=$3 deadline=$((SECONDS + $4)) line count=0 finished=no
    while true; do
        alive "$pid" || finished=yes
        while IFS= read -r line; do
            count=$((count + 1))
            while [[ $line == *$'\r' ]]; do line=${line%$'\r'}; done
            # Of what was written over itself on one line, the last.
            [[ -z $line ]] || printf '%s%s\n' "$prefix" "${line##*$'\r'}" >&2
        done < <(tail -n "+$((count + 1))" "$file" 2>/dev/null)
        [[ $finished == no ]] || return 0
        ((SECONDS <= deadline)) || return 1
        sleep 0.3
    done
}

# --- small things ------------------------------------------------------------

# new_run_dir NAME: sets RUN_DIR to an empty directory for the sockets and logs of one run. It is
# left behind: the logs are what one looks at afterwards.
new_run_dir() {
    RUN_DIR=$CACHE_DIR/run/$1
    rm -rf "$RUN_DIR"
    mkdir -p "$RUN_DIR"
}

sha256_of() { sha256sum "$1" | cut -d' ' -f1; }

# cpu_ticks PID: user and system time of all its threads so far, in clock ticks (proc(5)).
cpu_ticks() { sed 's/.*) //' "/proc/$1/stat" | awk '{ print $12 + $13 }'; }
