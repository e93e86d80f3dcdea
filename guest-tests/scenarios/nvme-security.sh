# shellcheck shell=bash
SUMMARY="NVMe/TCP: DH-HMAC-CHAP one way and both ways, TLS 1.3, and both together; wrong secrets are refused, and no log has any"

source "$REPO_ROOT/guest-tests/lib/nvme-target.sh"

# What no log may have in it.
SECRETS=()

host() {
    local both=$NVME_NQN.2 tls=$NVME_NQN.3 all=$NVME_NQN.4 key fd nqn name
    nvme_need tls
    ensure openssl=openssl
    make_base "$RUN_DIR/disk.raw" 32
    NVME_PORTS=2
    nvme_start disk.raw
    secret host 1 "$NVME_HOST_NQN"
    secret controller 2 "$both"
    secret other 0 "$NVME_HOST_NQN"
    key=$(nvme_tool nvme gen-tls-key --hmac=1)
    SECRETS+=("$key")
    printf '%s\n' "$key" >"$RUN_DIR/tls.key"
    printf '%s\n' "$(nvme_tool nvme gen-tls-key --hmac=1)" >"$RUN_DIR/other-tls.key"
    SECRETS+=("$(<"$RUN_DIR/other-tls.key")")
    chmod 600 "$RUN_DIR"/*.key

    # The first port without TLS, the second one with nothing else.
    nvme_do "port 1 ${NVME_ADDRESSES[0]#*:}; port 2 ${NVME_ADDRESSES[1]#*:} tls1.3"
    for nqn in "$NVME_NQN" "$both" "$tls" "$all"; do
        nvme_do "subsystem $nqn; namespace $nqn 1 /dev/vda"
    done
    # A host has one secret; to whom the controller proves itself is the host's choice.
    nvme_do "allow $both $NVME_HOST_NQN $(<"$RUN_DIR/host.key") $(<"$RUN_DIR/controller.key") 'hmac(sha384)' ffdhe3072"
    nvme_do "admit $NVME_NQN $NVME_HOST_NQN; admit $all $NVME_HOST_NQN"
    nvme_do "offer 1 $NVME_NQN; offer 1 $both; offer 2 $tls; offer 2 $all"
    # The specification's identity, and the one of the nvme-cli in use, which many targets have.
    nvme_do "psk $(nvme_psk "$key" 1 "$tls")"
    nvme_do "nvme check-tls-key --keydata=$key --hostnqn=$NVME_HOST_NQN --subsysnqn=$all --identity=0 --insert"

    refused none 1 "$NVME_NQN" "requires authentication"
    refused wrong 1 "$NVME_NQN" "the host's secret" --nvme-dhchap-secret file:other.key
    refused controller 1 "$both" "the controller's secret" --nvme-dhchap-secret file:host.key --nvme-dhchap-ctrl-secret file:other.key
    refused plain 2 "$tls" "closed the connection"
    refused wrong-tls 2 "$tls" "pre-shared key" --nvme-tls-key file:other-tls.key

    serve way 1 "$NVME_NQN" --nvme-dhchap-secret file:host.key
    exec {fd}<"$RUN_DIR/controller.key"
    serve ways 1 "$both" --nvme-dhchap-secret file:host.key --nvme-dhchap-ctrl-secret "fd:$fd"
    exec {fd}<&-
    serve tls 2 "$tls" --nvme-tls-key file:tls.key --nvme-header-digest
    serve all 2 "$all" --nvme-tls-key file:tls.key --nvme-dhchap-secret file:host.key
    run_guest vm guest_secure way,num-queues=1 ways,num-queues=1 tls,num-queues=1 all,num-queues=1
    for name in way ways tls all; do
        stop_backend "$name" || fail "the end of backend $name"
    done
    check_namespace vm SHA disk.raw
    no_secrets
    nvme_end
}

# secret NAME HMAC NQN: one that nvme-cli makes, in RUN_DIR/NAME.key.
secret() {
    nvme_tool nvme gen-dhchap-key --hmac="$2" --nqn="$3" >"$RUN_DIR/$1.key"
    SECRETS+=("$(<"$RUN_DIR/$1.key")")
}

# uri PORT NQN
uri() { printf 'nvme+tcp://%s/%s?nsid=1' "${NVME_ADDRESSES[$1 - 1]}" "$2"; }

# serve NAME PORT NQN [virtioblkd options]
serve() {
    start_backend "$1" "$(uri "$2" "$3")" raw "${NVME_HOST[@]}" --log-level trace "${@:4}"
}

# refused NAME PORT NQN WORDS [virtioblkd options]: it ends by itself, and says why.
refused() {
    local status=0 log=$RUN_DIR/refused-$1.log
    (cd "$RUN_DIR" && exec timeout 30 "$VIRTIOBLKD" --blk-file "$(uri "$2" "$3")" --format raw --socket-path refused.sock \
        "${NVME_HOST[@]}" --log-level trace "${@:5}") >"$log" 2>&1 </dev/null || status=$?
    ((status != 0)) || fail "$1: was not refused"
    ((status != 124)) || fail "$1: tries for ever"
    say "refused ($1): $(tail -n 1 "$log")"
    tail -n 3 "$log" | grep -q "$4" || fail "$1: the message does not say what is wrong (see refused-$1.log)"
}

# no_secrets: of no secret is there a part in any log.
no_secrets() {
    local secret part log
    for log in way ways tls all refused-wrong refused-controller refused-wrong-tls; do
        [[ -s $RUN_DIR/$log.log ]] || fail "$log.log is empty, and shows nothing"
    done
    for secret in "${SECRETS[@]}"; do
        IFS=: read -r _ _ part _ <<<"$secret"
        ((${#part} >= 48)) || fail "a secret of ${#part} characters"
        ! grep -lF "${part:0:20}" "$RUN_DIR"/*.log >&2 || fail "a secret in a log"
        part=$(printf %s "$part" | base64 -d | to_hex)
        ! grep -liF "${part:0:24}" "$RUN_DIR"/*.log >&2 || fail "a secret in a log, as digits"
    done
}

# One namespace under four names, one after another.
guest_secure() {
    fio_verify libaio 16 way 20 1 --bs=4k
    DISK=vdb
    fio_verify libaio 16 ways 4116 1 --bs=4k
    DISK=vdc
    fio_verify libaio 16 tls 8212 1 --bs=4k
    fio_verify libaio 8 large 12288 4 --bsrange=512-256k
    DISK=vdd
    fio_verify libaio 16 all 20480 1 --bs=4k
    for DISK in vda vdb vdc; do
        same "$DISK and vdd" "$(disk_sha /dev/vdd)" "$(disk_sha "/dev/$DISK")"
    done
    result "SHA $(disk_sha /dev/vdd)"
}
