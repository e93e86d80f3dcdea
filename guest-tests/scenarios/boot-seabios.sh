# shellcheck shell=bash
SUMMARY="the disk boots through SeaBIOS: boot loader, kernel and initramfs come from it; and again after a write"

source "$REPO_ROOT/guest-tests/lib/boot-disk.sh"

host() { boot_scenario seabios; }
