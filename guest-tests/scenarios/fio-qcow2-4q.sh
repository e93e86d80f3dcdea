# shellcheck shell=bash
SUMMARY="fio with crc32c on a qcow2 overlay, four queues: 4k, 64k and mixed sizes at depths 1, 16 and 64"

source "$REPO_ROOT/guest-tests/lib/fio.sh"

host() { fio_scenario qcow2 4; }
