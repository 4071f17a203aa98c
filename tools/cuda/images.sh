#!/usr/bin/env bash
# Compiles every CUDA kernel with nvcc as build.rs does, and looks at what is in the images. Needs no GPU.
#     tools/cuda/images.sh [SOURCES]    the last line counts the tests
set -eu
. "$(dirname "$0")/../common.sh"
sources=${1:-$top/src}
out=$build/cuda/images
passed=0 failed=0
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED: $1"; }

cuobjdump=$(tools/cuda/toolkit.sh cuobjdump)
PATH="$(dirname "$cuobjdump"):$PATH" # it calls nvdisasm
nvcc=$(tools/cuda/toolkit.sh nvcc)
rustc --edition 2024 -C opt-level=1 tools/cuda/images.rs -o "$build/cuda/build-images"

# images_with NVCC WST_NVCC FOLDER: builds; prints what it warns of and leaves how many images there are in $images.
images_with() {
    NVCC=$1 WST_NVCC=$2 NUM_JOBS=$(nproc) "$build/cuda/build-images" "$sources" "$3" >"$build/log/images-build.log"
    sed -n 's/^cargo:warning=//p' "$build/log/images-build.log"
    images=$(grep -c include_bytes "$3/cuda_images.rs" || true)
}
kernels=$(find "$sources" -name '*.cu' | wc -l)

# Without a compiler that works there is no image, and no failure either.
images_with "$nvcc" 0 "$out-none" && [ "$images" = 0 ] && ok || bad "WST_NVCC=0 leaves $images images"
images_with false 1 "$out-none" >/dev/null && [ "$images" = 0 ] && ok || bad "an nvcc that fails leaves $images images"

images_with "$nvcc" 1 "$out"
[ "$images" = "$kernels" ] && ok || bad "$images images of $kernels files"
rustc --edition 2024 --crate-type lib --emit metadata "$out/cuda_images.rs" -o "$build/cuda/images.rmeta" &&
    ok || bad "cuda_images.rs is no Rust"

for image in "$out"/cuda/*.fatbin; do
    [ -e "$image" ] || continue
    held=$("$cuobjdump" --list-elf --list-ptx "$image" | grep -oE 'sm_[0-9]+a?\.(cubin|ptx)' | sort)
    expected=$(sed -nE 's/^(sm_[0-9]+a?)$/\1.cubin/p; s/^compute_([0-9]+)$/sm_\1.ptx/p' src/device/cuda/options.txt | sort)
    [ "$held" = "$expected" ] && ok || bad "$(basename "$image") holds $(echo $held), expected $(echo $expected)"
done
du -ch "$out"/cuda/*.fatbin 2>/dev/null | tail -n 1 || true

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
