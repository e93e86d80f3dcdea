# shellcheck shell=bash
SUMMARY="the backends of two disks are killed 30 times at random moments under load; no error, and every byte is right"

source "$REPO_ROOT/guest-tests/lib/kills.sh"

KILLS=${KILLS:-30}

host() { kill_scenario ""; }
