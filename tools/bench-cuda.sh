#!/usr/bin/env bash
# Times the library on a GPU beside diffusers and torch.compile on the same GPU, and writes benches/record/.
#     tools/bench-cuda.sh                 builds and runs
#     tools/bench-cuda.sh --prepare DIR   builds only, into DIR, for a machine that has a GPU and Python but no Rust
#     tools/bench-cuda.sh --run DIR       runs what DIR holds
# BENCH holds arguments of benches/cuda.py, such as BENCH="--generation 1 --parts c". Python needs torch, diffusers and
# transformers: build/venv is used where it has them, else the machine's own.
set -eu
. "$(dirname "$0")/common.sh"

prepare() {
    if ! have nvcc && [ -z "${NVCC:-}${CUDA_HOME:-}" ]; then
        NVCC=$(tools/cuda/toolkit.sh nvcc) && export NVCC || note "nvcc could not be fetched: NVRTC will compile"
    fi
    mkdir -p "$1"
    local program
    program=$(cargo bench --bench stages --no-default-features --no-run 2>&1 | tee /dev/stderr |
        sed -nE 's/^ *Executable .*\((.*)\)$/\1/p')
    cp "$program" "$1/stages" && strip "$1/stages"
    note "ready: $1/stages"
}

measure() {
    # shellcheck disable=SC2086 # several words are meant
    "$(venv_python)" benches/cuda.py "$@" ${BENCH:-}
}

venv_python() {
    if [ -x "$build/venv/bin/python" ]; then echo "$build/venv/bin/python"; else echo python3; fi
}

case ${1:-} in
--prepare) prepare "$2" ;;
--run) measure --stages "$2/stages" ;;
"") measure ;;
*) echo "usage: $0 [--prepare DIR | --run DIR]" >&2 && exit 2 ;;
esac
