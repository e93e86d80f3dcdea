# shellcheck shell=bash
# KVM where it really works, TCG elsewhere.

# choose_accel: sets ACCEL (kvm or tcg) and CPU_MODEL. VIRTIOBLKD_ACCEL overrides.
#
# A /dev/kvm that opens and answers every ioctl is not enough: on a nested machine without hardware
# support it runs the firmware and then hangs. The CPU's own flag tells the truth.
choose_accel() {
    ACCEL=${VIRTIOBLKD_ACCEL:-}
    if [[ -z $ACCEL ]]; then
        if [[ -r /dev/kvm && -w /dev/kvm ]] && grep -Eqw 'svm|vmx' /proc/cpuinfo; then
            ACCEL=kvm
        else
            ACCEL=tcg
        fi
    fi
    # Nehalem: what distributions demand at most, and every QEMU emulates it well ("max" makes newer
    # kernels oops under QEMU 7.2).
    if [[ $ACCEL == kvm ]]; then CPU_MODEL=host; else CPU_MODEL=Nehalem; fi
}

accel_words() {
    if [[ $ACCEL == kvm ]]; then
        printf 'KVM'
    else
        printf 'TCG emulation (no usable KVM here: expect a tenth of the speed)'
    fi
}
