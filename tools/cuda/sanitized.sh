#!/usr/bin/env bash
# sanitized.sh COMMAND...: runs a test program whose emulated kernels are compiled with AddressSanitizer and
# UndefinedBehaviorSanitizer, and whose threads, warps and blocks run in a random order. Fails where gcc has neither.
set -eu
preload=""
for name in libasan.so libubsan.so; do
    library=$(gcc -print-file-name=$name)
    [ "$library" != $name ] || exit 1
    preload="$preload $library"
done
# Fibers are no stack that the sanitizer knows to follow; what tests leave to the end of the process is no leak.
exec env LD_PRELOAD="${preload# }" ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
    CUEMU_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \
    CUEMU_ORDER=2 CUEMU_SEED="${CUEMU_SEED:-1}" "$@"
