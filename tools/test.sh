#!/usr/bin/env bash
# Every test there is. A part that fails does not stop the others; the last line adds all of them up.
set -u
. "$(dirname "$0")/common.sh"
passed=0 failed=0 skipped=0
notes=""
# Seconds that the programs of one part may take, all together.
LONGEST=2400
# Compiled kernels are kept there, and not in the home of whoever tests.
export XDG_CACHE_HOME=$build/cache

# add PASSED FAILED SKIPPED
add() { passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3)); }
skip() { add 0 0 1; notes="$notes"$'\n'"skipped: $1"; }
fail() { add 0 1 0; notes="$notes"$'\n'"failed: $1"; }

# run LOG COMMAND...: shows the output and keeps it in build/log/LOG.
run() {
    local log=$build/log/$1
    shift
    "$@" 2>&1 | tee "$log"
    return "${PIPESTATUS[0]}"
}

# sum LOG PATTERN: adds the number before PATTERN over all lines of the log.
sum() { grep -oE "[0-9]+ $2" "$build/log/$1" | awk '{ n += $1 } END { print n + 0 }'; }

# counted NAME LOG STATUS PASSED FAILED SKIPPED: a failing part counts at least one failure.
counted() {
    add "$4" "$5" "$6"
    if [ "$3" != 0 ] && [ "$5" = 0 ]; then fail "$1 ended with status $3, see build/log/$2"; fi
    if [ "$5" != 0 ]; then notes="$notes"$'\n'"failed: $5 in $1, see build/log/$2"; fi
    if [ "$3" = 0 ] && [ "$4" = 0 ] && [ "$5" = 0 ]; then skip "$1 ran no test"; fi
}

rust_tests() {
    say "Rust"
    # The library's own profile: what is tested is what is shipped, and it is built once.
    local cargo=(cargo test --release --no-fail-fast)
    if ! run cargo-build.log "${cargo[@]}" --no-run; then
        fail "the build of the tests, see build/log/cargo-build.log"
        return
    fi
    # Kernels on the emulation of CUDA run one after the other, so each of those programs leaves cores to the others.
    local name i=0 others=() halves=("" "") cuda=()
    for name in tests/*.rs; do
        name=$(basename "$name" .rs)
        case $name in
        cuda_*) halves[i]+=" --test $name" i=$((1 - i)) ;;
        training_mpi) ;;
        *) others+=(--test "$name") ;;
        esac
    done
    for i in 0 1; do
        # shellcheck disable=SC2086 # several words are meant
        timeout "$LONGEST" "${cargo[@]}" ${halves[i]} >"$build/log/cargo-cuda-$i.log" 2>&1 &
        cuda[i]=$!
    done
    cargo_tests Rust cargo.log "${cargo[@]}" --lib --bins --examples "${others[@]}"
    cargo_tests "examples of the documentation" cargo-doc.log "${cargo[@]}" --doc
    say "Rust on the emulation of CUDA"
    for i in 0 1; do
        wait "${cuda[i]}"
        cargo_results "Rust on the emulation of CUDA" "cargo-cuda-$i.log" $?
        cat "$build/log/cargo-cuda-$i.log"
    done
}

# cargo_tests NAME LOG COMMAND...: counts what the test programs say. A program that hangs is a failure in the end.
cargo_tests() {
    local name=$1 log=$2
    shift 2
    run "$log" timeout "$LONGEST" "$@"
    cargo_results "$name" "$log" $?
}

# cargo_results NAME LOG STATUS
cargo_results() {
    local name=$1 log=$2 status=$3 results=${2%.log}-results.log
    grep -E '^test result:' "$build/log/$log" >"$build/log/$results"
    counted "$name" "$log" $status "$(sum "$results" passed)" "$(sum "$results" failed)" "$(sum "$results" ignored)"
}

# The emulation that the tests called cuda_* run on, and all kernels on it with sanitizers and threads in random order.
emulation_tests() {
    say "the emulation of CUDA"
    cargo_tests "the emulation of CUDA" emulation.log cargo test --release -p cuda-emulation --no-fail-fast
    say "CUDA kernels with sanitizers"
    if ! tools/cuda/sanitized.sh true; then
        skip "CUDA kernels with sanitizers: gcc has none beside it"
        return
    fi
    cargo_tests "CUDA kernels with sanitizers" sanitized.log \
        cargo test --release --lib --config "target.'cfg(unix)'.runner='$top/tools/cuda/sanitized.sh'" -- ops:: device::cuda::
}

# What has vector code of its own, and whole networks, on processors that an emulator stands for: x86-64 with what every
# one of its kind has, with AVX2 and nothing beyond, and 64-bit Arm.
other_processors() {
    local kernels="device:: ops:: tensor:: diffusion:: nn::"
    if [ "$(uname -m)" = x86_64 ]; then
        if need qemu-x86_64 qemu-user; then
            on_processor "x86-64 without AVX" Baseline qemu-x86_64 Nehalem "" $kernels
            # Named without what qemu would warn of: no program sees it.
            on_processor "x86-64 with AVX2" Avx2 qemu-x86_64 \
                Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid "" $kernels
        else
            say "other x86-64 processors"
            skip "other x86-64 processors: qemu is not there and could not be installed"
        fi
    fi
    if [ "$(uname -m)" = aarch64 ]; then
        return # The other tests ran on one.
    elif find_aarch64; then
        export QEMU_LD_PREFIX=/usr/aarch64-linux-gnu
        # One that has dot products: those who lack them take a loop that every processor is tested with.
        on_processor "64-bit Arm" Neon qemu-aarch64 neoverse-n1 --target=aarch64-unknown-linux-gnu $kernels
        step_of "the library for 64-bit Arm" aarch64-library.log \
            cargo build --release --target aarch64-unknown-linux-gnu
    else
        say "64-bit Arm"
        skip "64-bit Arm: qemu, gcc or the standard library for it is not there and could not be had"
    fi
}

# on_processor NAME LEVEL EMULATOR CPU OPTION FILTER...: the unit tests that match, which also see that the level of
# vector instructions is this one, and all networks and samplers. The option is cargo's, or empty.
on_processor() {
    local name=$1 level=$2 emulator=$3 cpu=$4 option=$5
    shift 5
    say "$name, emulated"
    local cargo=(env WST_TEST_CUDA=none WST_TEST_LEVEL="$level" cargo test --release ${option:+"$option"} --no-fail-fast
        --config "target.'cfg(unix)'.runner=['$emulator', '-cpu', '$cpu']")
    cargo_tests "$name" "processor-$level.log" "${cargo[@]}" --lib -- "$@"
    cargo_tests "$name, networks" "processor-$level-networks.log" "${cargo[@]}" \
        --test parity_networks --test parity_sampling
}

# Processes that train together. The library with MPI in it is built in the other profile, so that it does not take
# the place of the one that is shipped.
mpi_tests() {
    say "Rust over MPI"
    if ! find_mpi; then
        skip "training over MPI: Open MPI and libclang are not there and could not be installed"
        return
    fi
    if ! run mpi-build.log cargo build --features mpi --example train_ranks; then
        fail "the build with MPI, see build/log/mpi-build.log"
        return
    fi
    cargo_tests "Rust over MPI" mpi.log cargo test --features mpi --test training_mpi --no-fail-fast
}

# The kernels with NVIDIA's own compiler, for every architecture; it needs no GPU.
kernel_tests() {
    say "CUDA kernels with NVIDIA's compiler"
    local nvrtc cuobjdump
    if ! venv_has ctypes || ! nvrtc=$(tools/cuda/toolkit.sh nvrtc) || ! cuobjdump=$(tools/cuda/toolkit.sh cuobjdump); then
        skip "CUDA kernels with NVIDIA's compiler: NVRTC or cuobjdump could not be fetched"
        return
    fi
    run kernels.log "$build/venv/bin/python" tools/cuda/compile.py --nvrtc "$nvrtc" --cuobjdump "$cuobjdump"
    local status=$?
    tail -n 1 "$build/log/kernels.log" >"$build/log/kernels-results.log"
    counted "CUDA kernels with NVIDIA's compiler" kernels.log $status \
        "$(sum kernels-results.log passed)" "$(sum kernels-results.log failed)" 0

    say "images of the CUDA kernels"
    if ! tools/cuda/toolkit.sh nvcc >/dev/null; then
        skip "images of the CUDA kernels: nvcc could not be fetched"
        return
    fi
    # NVRTC has just compiled all kernels; of nvcc's way a few files tell enough.
    run images.log tools/cuda/images.sh "$top/src/device"
    status=$?
    tail -n 1 "$build/log/images.log" >"$build/log/images-results.log"
    counted "images of the CUDA kernels" images.log $status \
        "$(sum images-results.log passed)" "$(sum images-results.log failed)" 0
}

c_tests() {
    say "C and C++"
    need valgrind valgrind || skip "valgrind is not there and could not be installed: the C tests run without it"
    if [ -x tests/c/run.sh ]; then
        run c.log env LIBDIR="$top/target/release" tests/c/run.sh
    else
        run c.log make -C tests/c test
    fi
    local status=$?
    # The closing line of the C tests: "N passed, N failed[, N skipped]".
    grep -E '^[0-9]+ passed, [0-9]+ failed' "$build/log/c.log" | tail -n 1 >"$build/log/c-results.log"
    counted "C and C++" c.log $status "$(sum c-results.log passed)" "$(sum c-results.log failed)" "$(sum c-results.log skipped)"
}

go_tests() { # go_tests NAME LOG ARGUMENT...
    local name=$1 log=$2
    shift 2
    say "$name"
    run "$log" env -C bindings/go GOFLAGS=-buildvcs=false "$@"
    local status=$?
    counted "$name" "$log" $status "$(grep -c -- '^ *--- PASS' "$build/log/$log")" \
        "$(grep -c -- '^ *--- FAIL' "$build/log/$log")" "$(grep -c -- '^ *--- SKIP' "$build/log/$log")"
}

all_go_tests() {
    if ! find_go; then
        skip "Go: version 1.24 or newer is not there and could not be fetched"
        return
    fi
    say "Go vet"
    if run go-vet.log env -C bindings/go go vet ./... && run go-vet-example.log env -C examples/go/generate go vet ./... &&
        run go-vet-train.log env -C examples/go/finetune go vet ./...; then
        add 1 0 0
    else
        fail "go vet"
    fi
    go_tests "Go with the race detector" go-race.log go test -race -timeout 300s -count=1 -v ./...
    # The strictest check of pointers that Go hands to C.
    go_tests "Go with cgocheck2" go-cgocheck.log env GOEXPERIMENT=cgocheck2 go test -timeout 300s -count=1 -v ./...
}

parity_tests() {
    say "parity through the C ABI"
    if ! venv_has numpy numpy; then
        skip "parity through the C ABI: Python with numpy is not there and could not be fetched"
        return
    fi
    run parity.log tools/parity.sh --recorded
    counted "parity" parity.log $? "$(sum parity.log passed)" "$(sum parity.log failed)" "$(sum parity.log skipped)"

    say "parity with diffusers"
    if ! venv_has "torch, diffusers, transformers"; then
        skip "parity with diffusers: it or PyTorch is not there ('make parity' fetches them)"
        return
    fi
    run parity-diffusers.log "$build/venv/bin/python" tests/reference/diffusers_parity.py
    local status=$?
    tail -n 1 "$build/log/parity-diffusers.log" >"$build/log/parity-diffusers-results.log"
    counted "parity with diffusers" parity-diffusers.log $status \
        "$(sum parity-diffusers-results.log passed)" "$(sum parity-diffusers-results.log failed)" 0

    say "adapters of peft"
    if ! venv_has "torch, diffusers, peft"; then
        skip "adapters of peft: it, diffusers or PyTorch is not there ('make parity' fetches them)"
        return
    fi
    run parity-lora.log "$build/venv/bin/python" tests/reference/lora_parity.py
    status=$?
    tail -n 1 "$build/log/parity-lora.log" >"$build/log/parity-lora-results.log"
    counted "adapters of peft" parity-lora.log $status \
        "$(sum parity-lora-results.log passed)" "$(sum parity-lora-results.log failed)" 0
}

# step_of NAME LOG COMMAND...: one test that is a command.
step_of() {
    local name=$1 log=$2
    shift 2
    say "$name"
    if run "$log" "$@"; then add 1 0 0; else fail "$name, see build/log/$log"; fi
}

say "building the library"
if run build.log tools/build.sh; then built=yes; else built=no; fail "the build, see build/log/build.log"; fi
rust_tests
emulation_tests
other_processors
mpi_tests
kernel_tests
if [ $built = yes ]; then
    c_tests
    all_go_tests
    step_of "example: C++" example-cpp.log tools/try-examples.sh cpp
    step_of "example: Rust" example-rust.log tools/try-examples.sh rust
    if find_go; then
        step_of "example: Go" example-go.log tools/try-examples.sh go
    else
        skip "the Go example: no Go"
    fi
    step_of "snippets of the README" readme.log tools/try-readme.sh
    parity_tests
fi
if venv_has torch; then
    step_of "conversion of checkpoints" convert.log "$build/venv/bin/python" tests/reference/test_convert.py
    step_of "the PyTorch rival of the benchmarks" rival.log "$build/venv/bin/python" tests/reference/check_torch_v1.py
else
    skip "conversion of checkpoints, which needs PyTorch"
    skip "the PyTorch rival of the benchmarks: PyTorch is not there ('make bench' fetches it)"
fi

times_of_parts
printf '%s\n\n' "$notes"
echo "$passed passed, $failed failed, $skipped skipped" | tee "$build/log/closing-line"
[ "$failed" = 0 ]
