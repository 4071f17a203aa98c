#!/usr/bin/env bash
# Prints the path of a part of the CUDA toolkit, which it first fetches into build/cuda: no GPU and no driver is needed.
#     tools/cuda/toolkit.sh nvrtc        libnvrtc.so.13
#     tools/cuda/toolkit.sh nvcc         nvcc, which also needs a C++ compiler
#     tools/cuda/toolkit.sh cuobjdump    cuobjdump, with nvdisasm beside it
set -eu
. "$(dirname "$0")/../common.sh"

# Every wheel is pinned: each takes the newest of the others, and then ptxas refuses what the compiler wrote.
case ${1:-} in
nvrtc) tool=lib/libnvrtc.so.13 wheels="nvidia-cuda-nvrtc==13.0.88" ;;
nvcc)
    tool=bin/nvcc
    wheels="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96"
    ;;
# The first of these that there are wheels of; they read what older compilers wrote.
cuobjdump) tool=bin/cuobjdump wheels="nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51" ;;
*)
    note "usage: tools/cuda/toolkit.sh nvrtc | nvcc | cuobjdump"
    exit 2
    ;;
esac

folder=$build/cuda/$1
# The list of wheels is written last: a folder without it is a download that did not end.
if [ "$(cat "$folder/wheels" 2>/dev/null)" != "$wheels" ]; then
    venv_has pip || { note "Python with pip is not there and could not be fetched"; exit 1; }
    note "fetching $wheels into build/cuda"
    rm -rf "$folder"
    # shellcheck disable=SC2086 # several words are meant
    "$build/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" $wheels \
        >>"$build/log/cuda-toolkit.log" 2>&1 || { note "see build/log/cuda-toolkit.log"; exit 1; }
    echo "$wheels" >"$folder/wheels"
fi
echo "$folder/nvidia/cu13/$tool"
