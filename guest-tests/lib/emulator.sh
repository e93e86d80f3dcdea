# shellcheck shell=bash
# Failures of the emulated machine itself, which say nothing about a disk. QEMU 10.0 without KVM gives each emulated CPU
# a thread, and while one of them moves the registers of PCI devices about, another's access may reach the wrong device,
# or nothing: QEMU then ends by an assertion that no guest and no backend can violate. On a busy host with two CPUs that
# was 3 of 87 boots of a machine with disks of QEMU's own and 20 more devices, and 1 of 118 with the disks alone. Once an
# emulated CPU's timer never fired, as its kernel said.

# What QEMU and the guest's kernel say then; nothing else is taken for it.
EMULATOR_ASSERTIONS='(msix_table_mmio_(read|write)|iotlb_to_section): Assertion .* failed'
EMULATOR_TIMER='Possible timer handling issue on cpu=[0-9]+'

# emulator_failed DIR: prints what failed, out of the files of a scenario's guests; false if nothing of the kind did.
emulator_failed() {
    local found
    found=$(grep -aEho "$EMULATOR_ASSERTIONS" "$1"/*.qemu 2>/dev/null) ||
        found=$(grep -aEho "$EMULATOR_TIMER" "$1"/*.console 2>/dev/null) || return 1
    printf '%s\n' "${found%%$'\n'*}"
}
