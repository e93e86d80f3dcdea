# shellcheck shell=bash
# A small Linux guest: a distribution kernel, unpacked and never installed, and an initramfs of our own
# with busybox, the modules a virtio disk needs, e2fsprogs and fio.

# guest_in DIR: where the guest's kernel and its initramfs are, or will be made.
guest_in() {
    GUEST_DIR=$1
    GUEST_KERNEL=$GUEST_DIR/vmlinuz
    # Without fio (3 MB, for firmware to read) and with it (~40 MB).
    GUEST_INITRD_SMALL=$GUEST_DIR/initrd-small
    GUEST_INITRD=$GUEST_DIR/initrd
}
guest_in "$CACHE_DIR/guest"

GUEST_MODULES=(virtio_pci virtio_blk crc32c_generic crc32c_intel ext4)

# fetch_package PACKAGE DIR: unpacks the distribution's package there.
fetch_package() {
    local package=$1 dir=$2 download=$CACHE_DIR/debs
    rm -rf "$download"
    mkdir -p "$download" "$dir"
    (cd "$download" && apt-get "${APT_EXTRA[@]}" -qq download "$package" >/dev/null 2>"$CACHE_DIR/apt.log") ||
        die "cannot download the package $package (see $CACHE_DIR/apt.log)"
    dpkg -x "$download"/*.deb "$dir"
    rm -rf "$download"
}

# depends_of PACKAGE REGEX: the first package it depends on that matches.
depends_of() {
    apt-cache "${APT_EXTRA[@]}" show --no-all-versions "$1" 2>/dev/null | sed -n 's/^Depends: //p' | sed 's/[,|]/\n/g' |
        sed 's/ *(.*//; s/^ *//; s/ *$//' | grep -E -- "$2" | sed -n 1p
}

# kernel_package: the kernel for virtual machines, Debian's or Ubuntu's, of the suites that apt looks at.
kernel_package() {
    depends_of linux-image-cloud-amd64 '^linux-image-.*-cloud-amd64$' | grep . ||
        depends_of linux-image-virtual '^linux-image-[0-9].*-generic$' | grep .
}

# newer_kernel_package: a newer one than the distribution began with: Debian's from backports (apt looks there from
# then on), Ubuntu's from its hardware enablement. Sets NEWER_KERNEL, or is false.
newer_kernel_package() {
    local plain
    apt_update
    plain=$(kernel_package) || return
    if [[ $(os_field ID) == debian ]]; then
        use_backports "$(os_field VERSION_CODENAME)" linux-image-cloud-amd64 || return
        NEWER_KERNEL=$(kernel_package) || return
    else
        NEWER_KERNEL=$(depends_of "linux-image-virtual-hwe-$(os_field VERSION_ID)" '^linux-image-[0-9].*-generic$')
    fi
    [[ -n $NEWER_KERNEL && $NEWER_KERNEL != "$plain" ]]
}

# get_kernel [PACKAGE]: GUEST_KERNEL and its modules below GUEST_DIR/root.
get_kernel() {
    [[ ! -e $GUEST_KERNEL ]] || return 0
    local image=${1:-} modules root=$GUEST_DIR/root.new
    require_apt busybox
    apt_update
    [[ -n $image ]] || image=$(kernel_package) ||
        die "no package of a kernel for virtual machines found (linux-image-cloud-amd64, linux-image-virtual)"
    step "fetching a guest kernel: $image (unpacked in the cache, not installed)"
    rm -rf "$root"
    fetch_package "$image" "$root"
    modules=linux-modules-${image#linux-image-}
    # Ubuntu, and Debian from 7.0 on, keep the modules in a package of their own, and the latter the kernel, too.
    ! compgen -G "$root/lib/modules/*/kernel" >/dev/null && ! compgen -G "$root/usr/lib/modules/*/kernel" >/dev/null &&
        fetch_package "$modules" "$root"
    ! compgen -G "$root/boot/vmlinuz-*" >/dev/null && fetch_package "linux-binary-${image#linux-image-}" "$root"
    rm -rf "$GUEST_DIR/root"
    mv "$root" "$GUEST_DIR/root"
    find "$GUEST_DIR/root" -name 'vmlinuz*' -type f -exec cp {} "$GUEST_KERNEL.new" \;
    mv "$GUEST_KERNEL.new" "$GUEST_KERNEL"
}

# module_files DIR NAME...: the files of these modules and of those they need, dependencies first.
# Names that are no file are built into the kernel.
module_files() {
    local dir=$1 name file needed
    shift
    for name in "$@"; do
        file=$(find "$dir/kernel" -name "${name//_/[-_]}.ko*" | sed -n 1p)
        [[ -n $file ]] || continue
        needed=$(modinfo -F depends "$file" | tr ',' ' ')
        # shellcheck disable=SC2086 # a list of names
        module_files "$dir" $needed
        printf '%s\n' "$file"
    done
}

# stage_modules STAGE NAME...: these modules of the guest's kernel and those that they need, and the list of them that
# the guest's init loads.
stage_modules() {
    local stage=$1 dir module name
    shift
    # dpkg's own idea of where modules are differs between releases (lib or usr/lib).
    dir=$(find "$GUEST_DIR/root" -type d -path '*lib/modules/*' -name kernel -prune -printf '%h\n' | sed -n 1p)
    [[ -n $dir ]] || die "no modules in the kernel package (remove $GUEST_DIR and try again)"
    mkdir -p "$stage/modules"
    : >"$stage/modules/list"
    while IFS= read -r module; do
        name=$(basename "${module%.ko*}").ko
        case $module in
        *.xz) xz -dc "$module" ;;
        *.zst) zstd -qdc "$module" ;;
        *) cat "$module" ;;
        esac >"$stage/modules/$name"
        printf '/modules/%s\n' "$name" >>"$stage/modules/list"
    done < <(module_files "$dir" "$@" | awk '!seen[$0]++')
}

# copy_program STAGE FILE [NAME]: a program and the libraries that it names.
copy_program() {
    local stage=$1 file=$2 library
    install -D -m 755 "$file" "$stage/usr/bin/${3:-$(basename "$file")}"
    # Lines: "name => /path (address)" and "/lib64/ld-linux… (address)".
    while IFS= read -r library; do
        install -D -m 755 "$library" "$stage$library"
    done < <(ldd "$file" | grep -o '/[^ ]* (0x' | sed 's/ (0x//')
}

pack_initramfs() { (cd "$1" && find . -print0 | sort -z | cpio --quiet --null --create --format=newc --owner=0:0) >"$2"; }

# build_initramfs: GUEST_INITRD_SMALL and GUEST_INITRD.
build_initramfs() {
    local init=$REPO_ROOT/qemu-scripts/lib/guest-init stamp stage=$GUEST_DIR/stage
    # Built again when this recipe or the init script is newer.
    stamp=$(cat "$init" "$REPO_ROOT/qemu-scripts/lib/guest.sh" | sha256sum)
    if [[ -e $GUEST_INITRD && $(cat "$GUEST_INITRD.stamp" 2>/dev/null) == "$stamp" ]]; then
        return 0
    fi
    ensure fio=fio mke2fs=e2fsprogs cpio=cpio modinfo=kmod xz=xz-utils zstd=zstd
    if [[ ! -x $GUEST_DIR/busybox ]]; then
        # Its package conflicts with the plain busybox, so it is not installed either.
        fetch_package busybox-static "$GUEST_DIR/busybox.d"
        find "$GUEST_DIR/busybox.d" -type f -path "*bin/busybox" -exec cp {} "$GUEST_DIR/busybox" \;
        rm -rf "$GUEST_DIR/busybox.d"
    fi
    step "building the guest's initramfs"
    rm -rf "$stage"
    mkdir -p "$stage"/{proc,sys,dev,tmp,run,mnt,etc,root,modules} "$stage"/usr/{bin,sbin,lib,lib64}
    local link
    for link in bin sbin lib lib64; do
        ln -s "usr/$link" "$stage/$link"
    done
    install -m 755 "$GUEST_DIR/busybox" "$stage/usr/bin/busybox"
    while IFS= read -r link; do
        [[ $link == busybox ]] || ln -s busybox "$stage/usr/bin/$link"
    done < <("$GUEST_DIR/busybox" --list)
    install -m 755 "$init" "$stage/init"

    stage_modules "$stage" "${GUEST_MODULES[@]}"
    pack_initramfs "$stage" "$GUEST_INITRD_SMALL"

    copy_program "$stage" "$(command -v fio)"
    for link in mke2fs e2fsck blkdiscard; do
        rm -f "$stage/usr/bin/$link"
        copy_program "$stage" "$(command -v "$link")"
    done
    ln -sf mke2fs "$stage/usr/bin/mkfs.ext4"
    ln -sf e2fsck "$stage/usr/bin/fsck.ext4"
    pack_initramfs "$stage" "$GUEST_INITRD"
    rm -rf "$stage"
    printf '%s\n' "$stamp" >"$GUEST_INITRD.stamp"
}

# get_guest [KERNEL_PACKAGE]: everything for `-kernel`.
get_guest() {
    [[ $(uname -m) == x86_64 ]] || die "these scripts boot x86-64 guests only; this machine is $(uname -m)"
    mkdir -p "$GUEST_DIR"
    get_kernel "$@"
    build_initramfs
}
