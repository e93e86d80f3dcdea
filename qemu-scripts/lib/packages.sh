# shellcheck shell=bash
# What the scripts need from the distribution (Debian 12/13, Ubuntu 24.04), installed only when it is
# missing. Mirrors are the machine's own: no address of one is written down here.

APT_FRESH=no
APT_OPTIONS=(-o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0)

# as_root COMMAND...: directly, or through sudo.
as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo "$@"
    fi
}

# can_install: whether packages can be installed at all from here.
can_install() { ((EUID == 0)) || command -v sudo >/dev/null; }

require_apt() {
    command -v apt-get >/dev/null || die "this needs apt (Debian 12 or 13, Ubuntu 24.04); elsewhere install by hand: $*"
    can_install || die "packages are missing; as root run: apt-get install --no-install-recommends $*"
}

# apt_update: once a run, and only when something has to be fetched.
apt_update() {
    [[ $APT_FRESH == no ]] || return 0
    as_root apt-get "${APT_OPTIONS[@]}" "${APT_EXTRA[@]}" -qq update >/dev/null || warn "apt-get update failed; going on with the lists there are"
    APT_FRESH=yes
}

# More options of apt-get, such as one more suite (see use_backports).
APT_EXTRA=()

apt_install() {
    require_apt "$@"
    step "installing: $*"
    apt_update
    mkdir -p "$CACHE_DIR"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get "${APT_OPTIONS[@]}" "${APT_EXTRA[@]}" \
        -y --no-install-recommends install "$@" >"$CACHE_DIR/apt.log" 2>&1 </dev/null || {
        tail -n 15 "$CACHE_DIR/apt.log" >&2
        die "apt-get install $* failed (whole output: $CACHE_DIR/apt.log)"
    }
}

# ensure COMMAND=PACKAGE...: installs the packages whose command (or, with a slash, file) is missing.
ensure() {
    local pair missing=()
    for pair in "$@"; do
        if [[ ${pair%%=*} == */* ]]; then
            [[ -e ${pair%%=*} ]] || missing+=("${pair#*=}")
        else
            command -v "${pair%%=*}" >/dev/null || missing+=("${pair#*=}")
        fi
    done
    ((${#missing[@]} == 0)) || apt_install "${missing[@]}"
}

# os_field FIELD: of /etc/os-release.
os_field() { sed -n "s/^$1=//p" /etc/os-release | tr -d '"'; }

# apt_archives CODENAME: "OPTIONS|URI" of the archives that offer the suite CODENAME with its main
# component, out of the machine's one-line (.list) and deb822 (.sources) files.
apt_archives() {
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -r $file ]] || continue
        # deb [options] URI suite component...
        sed -n 's/#.*//; s/^[[:space:]]*deb[[:space:]]\+//p' "$file" | awk -v want="$1" '{
            options = ""
            if (match($0, /^\[[^]]*\][ \t]*/)) {
                options = substr($0, RSTART, RLENGTH); sub(/[ \t]+$/, "", options)
                $0 = substr($0, RSTART + RLENGTH)
            }
            if ($2 == want && / main( |$)/) print options "|" $1
        }'
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [[ -r $file ]] || continue
        awk -v want="$1" '
            function flush_stanza(   s, i, n, list) {
                n = split(value["suites"], list, /[ \t]+/)
                for (i = 1; i <= n; i++)
                    if (list[i] == want && value["components"] ~ /(^| )main( |$)/ &&
                        value["types"] ~ /(^| )deb( |$)/ && value["enabled"] != "no") {
                        s = value["uris"]; sub(/^[ \t]+/, "", s); sub(/[ \t].*/, "", s)
                        print (value["signed-by"] ~ /^\// ? "[signed-by=" value["signed-by"] "]" : "") "|" s
                    }
                split("", value)
            }
            /^#/ { next }
            /^[ \t]*$/ { flush_stanza(); next }
            /^[A-Za-z-]+:/ {
                key = tolower($0); sub(/:.*/, "", key)
                text = $0; sub(/^[^:]*:[ \t]*/, "", text); value[key] = text; next
            }
            { sub(/^[ \t]+/, ""); value[key] = value[key] " " $0 }
            END { flush_stanza() }' "$file"
    done
}

# use_backports CODENAME PACKAGE: lets apt see CODENAME-backports of the machine's own archive, for the calls of
# this script only (a list of ours beside the machine's; the machine's own files stay as they are). False when
# that suite has no such package.
use_backports() {
    local codename=$1 archive list=$CACHE_DIR/apt/sources.list
    archive=$(apt_archives "$codename" | sed -n 1p)
    [[ -n $archive ]] || return 1
    mkdir -p "${list%/*}"
    {
        [[ ! -r /etc/apt/sources.list ]] || cat /etc/apt/sources.list
        printf '\ndeb %s %s %s-backports main\n' "${archive%%|*}" "${archive#*|}" "$codename"
    } >"$list"
    APT_EXTRA=(-o "Dir::Etc::SourceList=$list" -o APT::Default-Release="$codename-backports")
    APT_FRESH=no
    apt_update
    apt-cache "${APT_EXTRA[@]}" policy "$2" | grep -- -backports >/dev/null
}

# use_suites CODENAME SUITE...: lets apt see nothing but these suites, the last one preferred, for the calls of this
# script, and with lists and a state of their own: nothing counts as installed. They are looked for in the machine's
# own archive, the one that offers CODENAME. False when it has no such suites.
use_suites() {
    local archive suite own=$CACHE_DIR/apt/${*: -1}
    archive=$(apt_archives "$1" | sed -n 1p)
    [[ -n $archive ]] || return 1
    mkdir -p "$own"/{lists,cache/archives}/partial
    : >"$own/status"
    for suite in "${@:2}"; do
        printf 'deb %s %s %s main\n' "${archive%%|*}" "${archive#*|}" "$suite"
    done >"$own/sources.list"
    APT_EXTRA=(-o "Dir::State::status=$own/status" -o "Dir::State::lists=$own/lists" -o "Dir::Cache=$own/cache"
        -o "Dir::Etc::SourceList=$own/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o APT::Sandbox::User=root -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
        -o "APT::Default-Release=${*: -1}")
    APT_FRESH=no
    apt_update
    [[ -n $(compgen -G "$own/lists/*_${*: -1}_*Packages*") ]]
}

# fetch_tree DIR PACKAGE...: unpacks these packages and all that they depend on in DIR, of the suites that apt sees after
# use_suites. False when there is no such package.
fetch_tree() {
    local dir=$1 package archives
    shift
    rm -rf "$dir.new"
    mkdir -p "$dir.new"
    apt-get "${APT_EXTRA[@]}" -qq -y --no-install-recommends --download-only install "$@" >"$CACHE_DIR/apt.log" 2>&1 || return
    eval "$(apt-config "${APT_EXTRA[@]}" shell archives Dir::Cache::archives/d)"
    for package in "$archives"/*.deb; do
        dpkg -x "$package" "$dir.new" || return
        rm "$package"
    done
    rm -rf "$dir"
    mv "$dir.new" "$dir"
}

# ensure_qemu: QEMU and qemu-img, both from one suite (mixing suites makes apt remove one of them). On
# Debian 12 that is backports: its own QEMU 7.2 waits for ever when a backend restarts at a bad moment.
ensure_qemu() {
    command -v qemu-system-x86_64 >/dev/null && command -v qemu-img >/dev/null && return
    require_apt qemu-system-x86 qemu-utils
    if [[ $(os_field VERSION_CODENAME) == bookworm ]]; then
        use_backports bookworm qemu-system-x86 || {
            warn "no bookworm-backports in reach: taking Debian 12's own QEMU"
            APT_EXTRA=()
        }
    fi
    apt_install qemu-system-x86 qemu-utils
    APT_EXTRA=()
    APT_FRESH=no
}

# --- Rust --------------------------------------------------------------------

RUST_NEEDED=1.85

# version_at_least HAVE WANT
version_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | sed -n 1p) == "$2" ]]; }

cargo_version() { "$1" --version 2>/dev/null | awk '{ print $2 }'; }

# find_cargo: sets CARGO to a recent enough cargo, if there is one.
find_cargo() {
    local candidate
    for candidate in "${CARGO:-}" cargo "$HOME/.cargo/bin/cargo" /usr/lib/rust-*/bin/cargo; do
        command -v "${candidate:-none}" >/dev/null || continue
        if version_at_least "$(cargo_version "$candidate")" "$RUST_NEEDED"; then
            CARGO=$(command -v "$candidate")
            # rustc, rustfmt and clippy of the same toolchain.
            PATH=$(dirname "$CARGO"):$PATH
            return 0
        fi
    done
    return 1
}

# candidate_version PACKAGE: what apt would install, without epoch and revision.
candidate_version() {
    apt-cache policy "$1" 2>/dev/null | awk '/Candidate:/ && $2 != "(none)" { sub(/^[0-9]+:/, "", $2); sub(/[-+~].*/, "", $2); print $2 }'
}

# ensure_rust: what the build needs, with the headers of OpenSSL (TLS of remote disks), and CARGO,
# installing the distribution's toolchain where that one is recent enough:
# `cargo` (Debian 13), the versioned packages (Ubuntu 24.04), `cargo-web` (Debian 12, kept current for
# its browsers).
ensure_rust() {
    local versioned
    ensure cc=gcc /usr/include/stdio.h=libc6-dev /etc/ssl/certs/ca-certificates.crt=ca-certificates \
        /usr/include/openssl/ssl.h=libssl-dev pkg-config=pkg-config
    ! find_cargo || return 0
    require_apt cargo
    apt_update
    if version_at_least "$(candidate_version rustc)" "$RUST_NEEDED"; then
        apt_install cargo rustc
    elif version_at_least "$(candidate_version rustc-web)" "$RUST_NEEDED"; then
        apt_install cargo-web rustc-web
    else
        versioned=$(apt-cache pkgnames cargo-1. | sed -n 's/^cargo-\(1\.[0-9]*\)$/\1/p' | sort -V | tail -n 1)
        if [[ -n $versioned ]] && version_at_least "$versioned" "$RUST_NEEDED"; then
            apt_install "cargo-$versioned" "rustc-$versioned"
        fi
    fi
    find_cargo || die "no Rust >= $RUST_NEEDED here and no package of it: install rustup (its web page says how), then run this again"
}

# build_virtioblkd: the release binary, quickly when it is up to date.
build_virtioblkd() {
    mkdir -p "$CACHE_DIR"
    ensure_rust
    run_with_dots "building virtioblkd (cargo build --release)" "$CACHE_DIR/build.log" \
        "$CARGO" build --release --manifest-path "$REPO_ROOT/Cargo.toml" || die "the build failed"
}

# build_checked: VIRTIOBLKD_CHECKED, a build with assertions, and with the switches that tests have in those.
build_checked() {
    [[ -z ${VIRTIOBLKD_CHECKED:-} ]] || return 0
    ensure_rust
    run_with_dots "building virtioblkd with assertions (cargo build --profile checked)" "$CACHE_DIR/build.log" \
        "$CARGO" build --profile checked --manifest-path "$REPO_ROOT/Cargo.toml" || die "the build failed"
    export VIRTIOBLKD_CHECKED=$REPO_ROOT/target/checked/virtioblkd
}
