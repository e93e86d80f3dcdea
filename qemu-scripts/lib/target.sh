# shellcheck shell=bash
# What a guest needs to be a storage target of Linux (nvmet) over TCP: more modules than the small guest has, and for
# TLS the daemon that does the handshakes for the kernel.

# target_in DIR: the guest's kernel is that of guest_in DIR.
target_in() {
    guest_in "$1"
    TARGET_INITRD=$GUEST_DIR/initrd-target
    TARGET_TLS_INITRD=$GUEST_DIR/initrd-target-tls
}

# crc32c for digests, the others for TLS records; names that a kernel does not have are built in.
TARGET_MODULES=(virtio_pci virtio_blk virtio_net crc32c_generic crc32c_intel nvmet nvmet-tcp
    tls gcm ghash_generic)

# get_target [KERNEL_PACKAGE]: the kernel, and TARGET_INITRD. False when the kernel is no such target.
get_target() {
    local stage=$GUEST_DIR/target-stage stamp
    get_guest "$@"
    stamp=$(cat "$GUEST_INITRD.stamp" "$REPO_ROOT/qemu-scripts/lib/target.sh" | sha256sum)
    [[ $(cat "$TARGET_INITRD.stamp" 2>/dev/null) != "$stamp" ]] || return 0
    step "building the target's initramfs"
    rm -rf "$stage"
    mkdir -p "$stage"
    stage_modules "$stage" "${TARGET_MODULES[@]}"
    grep -q /nvmet-tcp.ko "$stage/modules/list" || return 1
    pack_initramfs "$stage" "$TARGET_INITRD.more"
    # One archive behind another: the kernel unpacks both, and the second list of modules replaces the first.
    cat "$GUEST_INITRD_SMALL" "$TARGET_INITRD.more" >"$TARGET_INITRD"
    rm -rf "$stage" "$TARGET_INITRD.more"
    printf '%s\n' "$stamp" >"$TARGET_INITRD.stamp"
}

# get_target_newer: the same with the newer kernel, which has authentication and TLS. False when there is none.
get_target_newer() {
    target_in "$CACHE_DIR/guest-newer"
    if [[ -e $GUEST_KERNEL ]]; then
        get_target
    else
        newer_kernel_package && get_target "$NEWER_KERNEL"
    fi
}

# get_target_newest: the same with the kernel of the backports of Debian 13, whose target has reservations. False where
# the machine's archive is not Debian's.
get_target_newest() {
    local codename
    target_in "$CACHE_DIR/guest-newest"
    codename=$(os_field VERSION_CODENAME)
    if [[ ! -e $GUEST_KERNEL ]]; then
        [[ $(os_field ID) == debian ]] || return 1
        mkdir -p "$GUEST_DIR"
        # In a subshell: nobody is to install packages from there.
        (use_suites "$codename" trixie trixie-backports && get_kernel "$(kernel_package)") || return 1
    fi
    get_target
}

# --- TLS ---------------------------------------------------------------------

# Programs of a distribution that may be newer than this one, with their own libraries. They run here, too: see
# nvme_tool.
NVME_TOOLS=$CACHE_DIR/nvme-tools

# get_nvme_tools: tlshd, keyctl and nvme, in NVME_TOOLS. False when no archive in reach has them.
get_nvme_tools() {
    local suite
    [[ ! -e $NVME_TOOLS/usr/sbin/tlshd ]] || return 0
    suite=$(os_field VERSION_CODENAME)
    # Debian 12 has no ktls-utils.
    [[ $suite != bookworm ]] || suite=trixie
    step "fetching ktls-utils, keyutils and nvme-cli of $suite (unpacked in the cache, not installed)"
    # In a subshell: nobody is to install packages from there.
    (use_suites "$(os_field VERSION_CODENAME)" "$suite" && fetch_tree "$NVME_TOOLS" ktls-utils keyutils nvme-cli)
}

# nvme_tool PROGRAM ARGUMENTS...: runs a program of NVME_TOOLS with the libraries that it was built for.
nvme_tool() {
    local program
    program=$(compgen -G "$NVME_TOOLS/usr/*bin/$1") || die "no program $1 in $NVME_TOOLS"
    shift
    "$(nvme_tools_loader)" --library-path "$(nvme_tools_libraries)" "$program" "$@"
}

nvme_tools_libraries() { printf '%s' "$NVME_TOOLS"/usr/lib/*-linux-gnu; }
nvme_tools_loader() { printf '%s/ld-linux-x86-64.so.2' "$(nvme_tools_libraries)"; }

# get_target_tls: TARGET_TLS_INITRD, which is TARGET_INITRD with these programs in /tls. After get_target.
get_target_tls() {
    local stage=$GUEST_DIR/tls-stage stamp name file
    get_nvme_tools || return 1
    stamp=$(cat "$TARGET_INITRD.stamp")
    [[ $(cat "$TARGET_TLS_INITRD.stamp" 2>/dev/null) != "$stamp" ]] || return 0
    rm -rf "$stage"
    mkdir -p "$stage"/{etc,usr/bin,tls}
    for name in tlshd keyctl nvme; do
        file=$(compgen -G "$NVME_TOOLS/usr/*bin/$name")
        install -m 755 "$file" "$stage/tls/$name"
        # Among them the loader itself.
        nvme_tools_list "$file" | while IFS= read -r file; do
            install -m 755 "$file" "$stage/tls/"
        done
        printf '#!/bin/sh\nexec /tls/ld-linux-x86-64.so.2 --library-path /tls /tls/%s "$@"\n' "$name" >"$stage/usr/bin/$name"
        chmod 755 "$stage/usr/bin/$name"
    done
    # The handshake's keys are where the kernel looks for them, too.
    printf '[debug]\nloglevel=1\ntls=0\nnl=0\n[authenticate]\nkeyrings=.nvme\n' >"$stage/etc/tlshd.conf"
    pack_initramfs "$stage" "$TARGET_TLS_INITRD.more"
    cat "$TARGET_INITRD" "$TARGET_TLS_INITRD.more" >"$TARGET_TLS_INITRD"
    rm -rf "$stage" "$TARGET_TLS_INITRD.more"
    printf '%s\n' "$stamp" >"$TARGET_TLS_INITRD.stamp"
}

# nvme_tools_list PROGRAM: the files of its libraries.
nvme_tools_list() {
    "$(nvme_tools_loader)" --library-path "$(nvme_tools_libraries)" --list "$1" |
        sed -n "s|.* => \($NVME_TOOLS/[^ ]*\) (.*|\1|p"
}
