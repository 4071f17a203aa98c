#!/usr/bin/env bash
# The tests of the CUDA backend on a GPU. `make test` runs the same tests with an emulated driver; here nothing is
# emulated (WST_TEST_CUDA=real). The last line counts them.
#     tools/test-cuda.sh                 builds the tests and runs them
#     tools/test-cuda.sh --prepare DIR   builds only, into DIR, for a machine that has a GPU but no Rust: no GPU needed
#     tools/test-cuda.sh --run DIR       runs what DIR holds; also DIR/tools/test-cuda.sh --run DIR
# Where DIR lies in the checkout, DIR holds the programs alone, since the data is beside it: take the checkout along.
# The kernels are compiled with the tests, so that the GPU's machine needs no compiler; NVRTC and cuBLASLt are looked
# for in CUDA_HOME and in Python's wheels too. GPU_TESTS=ops, stages or sanitizer runs that part alone.
set -u
called_from=$PWD
. "$(dirname "$0")/common.sh"
export WST_TEST_CUDA=${WST_TEST_CUDA:-real}
parts=${GPU_TESTS:-ops stages sanitizer}
passed=0 failed=0 skipped=0
notes=""

# --- building -------------------------------------------------------------------------------------------------------

# prepare DIR: the test programs as DIR/bin/NAME, and what they read.
prepare() {
    local dir=$1 tests=() file program
    if ! have nvcc && [ -z "${NVCC:-}${CUDA_HOME:-}" ]; then
        NVCC=$(tools/cuda/toolkit.sh nvcc) && export NVCC ||
            note "nvcc could not be fetched: the tests compile the kernels themselves, with NVRTC"
    fi
    for file in $(grep -il cuda tests/*.rs); do tests+=(--test "$(basename "$file" .rs)"); done
    mkdir -p "$dir/bin"
    cargo test --release --no-run --lib ${tests[@]+"${tests[@]}"} 2>&1 | tee "$build/log/cuda-build.log"
    [ "${PIPESTATUS[0]}" = 0 ] || return 1
    rm -f "$dir"/bin/*
    # "Executable unittests src/lib.rs (target/release/deps/wuerstchen-0123456789abcdef)"
    for file in $(sed -nE 's/^ *Executable .*\((.*)\)$/\1/p' "$build/log/cuda-build.log"); do
        program=$dir/bin/$(basename "$file" | sed -E 's/-[0-9a-f]+$//')
        cp "$file" "$program" && strip "$program" || return 1
    done
    # The programs look for their data where they were built.
    echo "$top" >"$dir/built-in"
    case $(realpath "$dir")/ in
    "$top"/*) ;;
    *)
        mkdir -p "$dir/tests" "$dir/examples" "$dir/tools"
        cp -r tests/fixtures "$dir/tests/" && cp -r examples/models "$dir/examples/" &&
            cp Cargo.toml "$dir/" && cp tools/test-cuda.sh tools/common.sh "$dir/tools/" || return 1
        ;;
    esac
    note "ready in $dir: $(du -sh "$dir" | cut -f 1)"
}

# --- running --------------------------------------------------------------------------------------------------------

# data_where_it_was DIR: lets the programs find their data on another machine.
data_where_it_was() {
    local root data=$1
    root=$(cat "$1/built-in") || return 1
    [ -d "$data/tests" ] || data=$top
    [ -e "$root" ] || { mkdir -p "$(dirname "$root")" && ln -s "$data" "$root"; } ||
        { note "the tests look for their data in $root, which cannot be made"; return 1; }
}

# Adds the places of CUDA's libraries that the loader does not know by itself.
find_libraries() {
    local wheels
    wheels=$(python3 -c 'import glob, nvidia; print(*[f for p in nvidia.__path__ for f in glob.glob(p + "/*/lib")], sep=":")' 2>/dev/null)
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}${CUDA_HOME:-/usr/local/cuda}/lib64${wheels:+:$wheels}"
}

# tests_of NAME LOG COMMAND...: runs tests and adds them up. A crash is a failure, and a time-out too.
tests_of() {
    local name=$1 log=$build/log/$2 status result p f i
    shift 2
    timeout --kill-after=10 "${GPU_TEST_SECONDS:-300}" "$@" >"$log" 2>&1
    status=$?
    result=$(grep -E '^test result:' "$log" | sed -E 's/.* ([0-9]+) passed; ([0-9]+) failed; ([0-9]+) ignored.*/\1 \2 \3/')
    read -r p f i <<<"${result:-0 0 0}"
    if [ $status != 0 ] && [ "$f" = 0 ]; then f=1; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + i))
    printf '%-44s %4d passed %3d failed\n' "$name" "$p" "$f"
    if [ "$f" != 0 ]; then
        tail -n 40 "$log"
        notes="$notes"$'\n'"failed: $f in $name (status $status), see ${log#"$top"/}"
    fi
}

# names_of PROGRAM: its tests. The emulation is no part of listing them.
names_of() { "$1" --list --format terse 2>/dev/null | sed -n 's/: test$//p'; }

# Each op is a process of its own: a kernel that fails takes the device's context with it, and later tests too.
ops() {
    local unit=$1/bin/wuerstchen group
    say "the device's memory, streams and graphs; the ops one by one"
    for group in $(names_of "$unit" | sed -nE 's/^(device::cuda|ops::[a-z0-9_]+)::.*/\1/p' | sort -u); do
        tests_of "$group" "cuda-${group//::/-}.log" "$unit" "$group::"
    done
}

# Whole networks, stages and training steps: the tests that have "cuda" in their name, and the files that have it.
stages() {
    local program name tests test
    say "whole stages"
    for program in "$1"/bin/*; do
        name=$(basename "$program")
        case $name in
        wuerstchen) tests=$(names_of "$program" | grep cuda | grep -vE '^(device::cuda|ops)::') ;;
        cuda*) tests=$(names_of "$program") ;;
        *) tests=$(names_of "$program" | grep cuda) ;;
        esac
        for test in $tests; do
            tests_of "$name $test" "cuda-$name-${test//::/-}.log" "$program" --exact "$test"
        done
    done
}

# The ops once more, each access to memory looked at.
sanitizer() {
    local tool
    say "compute-sanitizer over the ops"
    if ! have compute-sanitizer; then
        skipped=$((skipped + 1))
        notes="$notes"$'\n'"skipped: compute-sanitizer is not on PATH"
        return
    fi
    for tool in memcheck racecheck; do
        GPU_TEST_SECONDS=${GPU_TEST_SECONDS:-1800} tests_of "$tool" "cuda-$tool.log" compute-sanitizer --tool $tool \
            --error-exitcode 9 "$1/bin/wuerstchen" ops:: device::cuda:: --test-threads=1
        grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$build/log/cuda-$tool.log"
    done
}

run_in() {
    local dir=$1 step
    [ -x "$dir/bin/wuerstchen" ] || { note "$dir holds no tests: make them with tools/test-cuda.sh --prepare DIR"; exit 1; }
    if [ "$WST_TEST_CUDA" = real ]; then
        nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader ||
            { note "there is no GPU: 'make test' runs these tests with an emulated one"; exit 1; }
    fi
    data_where_it_was "$dir" || exit 1
    find_libraries
    for step in $parts; do $step "$dir"; done
    times_of_parts
    printf '%s\n\n' "$notes"
    echo "$passed passed, $failed failed, $skipped skipped"
    [ "$failed" = 0 ] && [ "$passed" != 0 ]
}

# As the caller means it, who may stand elsewhere.
dir=${2:+$(cd "$called_from" && realpath -m "$2")}
case "${1:-} ${2:+DIR}" in
"--prepare DIR") prepare "$dir" ;;
"--run DIR") run_in "$dir" ;;
" ") prepare "$build/cuda-tests" && run_in "$build/cuda-tests" ;;
*) note "usage: tools/test-cuda.sh [--prepare DIR | --run DIR]" && exit 2 ;;
esac
