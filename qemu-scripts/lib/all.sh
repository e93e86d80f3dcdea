# shellcheck shell=bash
# The whole library, for: source "$(dirname "$0")/lib/all.sh"
# shellcheck source-path=SCRIPTDIR
_lib=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=common.sh
source "$_lib/common.sh"
# shellcheck source=packages.sh
source "$_lib/packages.sh"
# shellcheck source=accel.sh
source "$_lib/accel.sh"
# shellcheck source=guest.sh
source "$_lib/guest.sh"
# shellcheck source=target.sh
source "$_lib/target.sh"
# shellcheck source=backend.sh
source "$_lib/backend.sh"
# shellcheck source=qemu.sh
source "$_lib/qemu.sh"
