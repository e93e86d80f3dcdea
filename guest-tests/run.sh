#!/usr/bin/env bash
# All tests: the host-side ones (cargo test) and then the scenarios in a real guest.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=../qemu-scripts/lib/all.sh
source "$(dirname "$0")/../qemu-scripts/lib/all.sh"
# shellcheck source-path=SCRIPTDIR source=lib/emulator.sh
source "$(dirname "$0")/lib/emulator.sh"

SCENARIOS=$REPO_ROOT/guest-tests/scenarios
# Seconds after which a scenario is ended and counts as failed.
SCENARIO_TIMEOUT=${SCENARIO_TIMEOUT:-300}

usage() {
    cat <<USAGE
usage: guest-tests/run.sh [--list] [--no-host] [--jobs N] [SCENARIO...]

Builds virtioblkd, runs the host-side tests (cargo test --workspace --profile checked), counts the instructions of a
request (benches/instructions --check), then runs each scenario with a real Linux guest under QEMU. Prints a line
for each scenario, and "N passed, N failed" at the end. A scenario in which the emulator itself failed, and not the
disk (guest-tests/lib/emulator.sh), is run once more, and said to be.

  --list      the scenarios, one a line, and nothing else
  --no-host   only the scenarios
  --jobs N    so many scenarios at once (1)
  SCENARIO    only these, without the host-side tests

Environment: VIRTIOBLKD_ACCEL=kvm|tcg overrides the choice; BACKEND=qemu-storage-daemon runs the scenarios
with that backend, to compare; VIRTIOBLKD=PATH takes another binary (nothing is built then), and
VIRTIOBLKD_CHECKED=PATH one with assertions, which the scenario dirty-log needs.
Logs are in .cache/run/guest-tests/.
USAGE
}

scenario_names() {
    local file
    for file in "$SCENARIOS"/*.sh; do basename "$file" .sh; done
}

list_scenarios() {
    local name
    while IFS= read -r name; do
        printf '%-22s %s\n' "$name" "$(sed -n 's/^SUMMARY="\(.*\)"$/\1/p' "$SCENARIOS/$name.sh")"
    done < <(scenario_names)
}

HOST_TESTS=yes
JOBS=1
WANTED=()
while (($#)); do
    case $1 in
    --list)
        list_scenarios
        exit 0
        ;;
    --no-host) HOST_TESTS=no ;;
    --jobs)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "--jobs takes a number"
        JOBS=$2
        shift
        ;;
    -h | --help)
        usage
        exit 0
        ;;
    -*) die "unknown option $1 (see --help)" ;;
    *)
        [[ -e $SCENARIOS/$1.sh ]] || die "no scenario $1 (see --list)"
        WANTED+=("$1")
        ;;
    esac
    shift
done
if ((${#WANTED[@]})); then
    HOST_TESTS=no
else
    mapfile -t WANTED < <(scenario_names)
fi

install_cleanup
PASSED=0
FAILED=0
SKIPPED=0
LOGS=$CACHE_DIR/run/guest-tests
mkdir -p "$LOGS"

# host_tests: counts what cargo test counts. A test binary that could not be built or that crashed has no
# counts of its own and is one failure.
host_tests() {
    local log=$LOGS/host-tests.log started=$SECONDS passed failed status=0
    step "host-side tests (cargo test --workspace --profile checked)"
    "$CARGO" test --workspace --profile checked --no-fail-fast --manifest-path "$REPO_ROOT/Cargo.toml" >"$log" 2>&1 </dev/null &
    own_pid $!
    follow_results "$log" $!
    wait $! || status=$?
    passed=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")
    failed=$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$log")
    if ((status != 0 && failed == 0)); then
        failed=1
    fi
    PASSED=$((PASSED + passed))
    FAILED=$((FAILED + failed))
    if ((failed == 0)); then
        printf 'ok host-tests (%d tests, %d s)\n' "$passed" "$((SECONDS - started))"
    else
        printf 'FAIL host-tests (%d of %d failed; %s)\n' "$failed" "$((passed + failed))" "$log"
        grep -E '^(test .* FAILED|error)' "$log" || true
        tail -n 40 "$log"
    fi
}

# follow_results LOG PID: shows which test binaries ended, as they do.
follow_results() {
    local shown=0 count
    while alive "$2"; do
        sleep 0.5
        count=$(grep -c '^test result:' "$1" || true)
        while ((shown < count)); do
            shown=$((shown + 1))
            printf '        %s\n' "$(grep '^test result:' "$1" | sed -n "${shown}p")"
        done
    done
}

# instruction_counts: one test: a request costs no more instructions than is recorded.
instruction_counts() {
    local log=$LOGS/instructions.log started=$SECONDS
    step "instructions of a request (benches/instructions --check)"
    if "$REPO_ROOT/benches/instructions" --check >"$log" 2>&1 </dev/null; then
        PASSED=$((PASSED + 1))
        printf 'ok instructions (%d s)\n' "$((SECONDS - started))"
        grep -- '--record' "$log" || true
    else
        FAILED=$((FAILED + 1))
        printf 'FAIL instructions (%s)\n' "$log"
        tail -n 40 "$log"
    fi
}

# start_scenario NAME: in the background; sets STARTED_PID.
start_scenario() {
    timeout --kill-after=20 "$SCENARIO_TIMEOUT" "$REPO_ROOT/guest-tests/lib/run-one" "$SCENARIOS/$1.sh" \
        >"$LOGS/$1.log" 2>&1 </dev/null &
    STARTED_PID=$!
    own_pid "$STARTED_PID"
}

declare -A REPEATED=()

# repeats NAME STATUS: whether the scenario failed for the emulator's sake, the first time; it is then run again.
repeats() {
    local why
    (($2 != 0 && $2 != 77)) && [[ $ACCEL == tcg && -z ${REPEATED[$1]:-} ]] || return 1
    why=$(emulator_failed "$LOGS/$1") || return 1
    REPEATED[$1]=$why
    printf 'again %s (the emulator failed: %s)\n' "$1" "$why"
    WANTED+=("$1")
}

# report NAME STATUS SECONDS
report() {
    local file
    ! repeats "$1" "$2" || return 0
    case $2 in
    0)
        PASSED=$((PASSED + 1))
        printf 'ok %s (%d s)\n' "$1" "$3"
        # Gigabytes, and of no use any more.
        find "$LOGS/$1" -type f \( -name '*.raw' -o -name '*.qcow2' \) -delete
        ;;
    77)
        SKIPPED=$((SKIPPED + 1))
        printf 'skip %s (%s)\n' "$1" "$(sed -n 's/^skip: //p' "$LOGS/$1.log")"
        ;;
    *)
        FAILED=$((FAILED + 1))
        printf 'FAIL %s\n' "$1"
        [[ $2 != 124 ]] || printf '  (ended after %d s)\n' "$SCENARIO_TIMEOUT"
        for file in "$LOGS/$1.log" "$LOGS/$1"/*.{result,console,qemu,log}; do
            [[ -s $file ]] || continue
            printf '  --- %s\n' "${file#"$LOGS/"}"
            tail -n 15 "$file" | tr -d '\r' | sed 's/^/  | /'
        done
        ;;
    esac
}

run_scenarios() {
    local -A name_of=() started_at=()
    local name pid status next=0
    while ((next < ${#WANTED[@]} || ${#name_of[@]} > 0)); do
        while ((next < ${#WANTED[@]} && ${#name_of[@]} < JOBS)); do
            name=${WANTED[next]}
            next=$((next + 1))
            start_scenario "$name"
            name_of[$STARTED_PID]=$name
            started_at[$STARTED_PID]=$SECONDS
        done
        for pid in "${!name_of[@]}"; do
            ! alive "$pid" || continue
            status=0
            wait "$pid" || status=$?
            report "${name_of[$pid]}" "$status" "$((SECONDS - started_at[$pid]))"
            unset "name_of[$pid]"
        done
        sleep 0.1
    done
}

# prepare WHAT OTHERWISE COMMAND...: warns when WHAT could not be made, and says what becomes of the scenarios then.
prepare() {
    local what=$1 otherwise=$2 status
    shift 2
    # Not as a condition, in which functions would go on after a command that fails.
    set +e
    (
        set -e
        "$@"
    )
    status=$?
    set -e
    ((status == 0)) || warn "no $what (status $status; see above, and $CACHE_DIR/apt.log): $otherwise"
}

target_own() {
    target_in "$CACHE_DIR/guest"
    get_target
}

target_tls() {
    get_target_newer
    get_target_tls
}

# prepare_targets: what the scenarios nvme-… take their targets from.
prepare_targets() {
    local skipped="the scenarios that need it are skipped"
    ensure openssl=openssl
    prepare "NVMe/TCP target with this distribution's kernel" "$skipped" target_own
    prepare "NVMe/TCP target with a newer kernel, authentication and TLS" "$skipped" target_tls
    [[ " ${WANTED[*]} " != *" nvme-migration "* ]] ||
        prepare "NVMe/TCP target with reservations (the kernel of Debian 13's backports)" \
            "nvme-migration does without reservations" get_target_newest
}

# What the scenarios need, once and before them.
ensure_qemu
ensure fio=fio mke2fs=e2fsprogs mcopy=mtools sfdisk=fdisk grub-mkimage=grub-common \
    /usr/lib/grub/i386-pc/boot.img=grub-pc-bin /usr/lib/grub/x86_64-efi/moddep.lst=grub-efi-amd64-bin \
    /usr/share/OVMF=ovmf
get_guest
choose_accel
[[ " ${WANTED[*]}" != *" nvme-"* ]] || prepare_targets
if backend_is_virtioblkd && [[ $VIRTIOBLKD == "$REPO_ROOT/target/release/virtioblkd" ]]; then
    build_virtioblkd
    # Here, and not in the time of the scenario.
    [[ " ${WANTED[*]} " != *" dirty-log "* ]] || build_checked
fi
if [[ $HOST_TESTS == yes ]]; then
    ensure_rust
    host_tests
    instruction_counts
fi
step "${#WANTED[@]} scenario(s) with $BACKEND under $(accel_words)"
run_scenarios
((${#REPEATED[@]} == 0)) || warn "${#REPEATED[@]} scenario(s) run twice, since the emulator failed: ${!REPEATED[*]}"
((SKIPPED == 0)) || warn "$SKIPPED scenario(s) skipped, for the reasons above"
printf '%d passed, %d failed\n' "$PASSED" "$FAILED"
((FAILED == 0))
