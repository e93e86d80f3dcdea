# shellcheck shell=bash
SUMMARY="the same with packed rings of 1024 entries, 10 times"

source "$REPO_ROOT/guest-tests/lib/kills.sh"

KILLS=${KILLS:-10}

host() { kill_scenario ",packed=on,queue-size=1024"; }
