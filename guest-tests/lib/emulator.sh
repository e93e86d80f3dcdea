# shellcheck shell=bash
# A failure of the emulated machine itself, which says nothing about a disk. QEMU 10.0 without KVM ends now and then by an
# assertion of its own while a guest boots: with no disks but its own, four boots at a time on two CPUs, 3 of 87 with 20 more
# PCI devices and 1 of 118 without; none of 107 where one thread was all its CPUs.

# What QEMU says then; nothing else is taken for it.
EMULATOR_ASSERTIONS='(msix_table_mmio_(read|write)|iotlb_to_section): Assertion .* failed'

# emulator_failed DIR: prints what failed, out of the files of a scenario's guests; false if nothing of the kind did.
emulator_failed() {
    local found
    found=$(grep -aEho "$EMULATOR_ASSERTIONS" "$1"/*.qemu 2>/dev/null) || return 1
    printf '%s\n' "${found%%$'\n'*}"
}
