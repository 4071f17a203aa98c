#!/bin/sh
# Builds and runs the C and C++ tests. Prints "N passed, N failed" as its last line.
#   LIBDIR  folder with libwuerstchen.so (target/release)    MODEL   model folder (examples/models/emoji-v1)
#   V2      folder with the v2 models "model", "prior" and "decoder" (tests/fixtures/v2)
#   CC CXX  compilers (gcc, g++)                             QUICK=1 leaves out valgrind and the sanitizers
#   CUDA    folder with the emulated libcuda.so.1 (what 'cargo test' built there; without one, nothing of CUDA is tested)
set -u
export LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
LIBDIR=$(cd "${LIBDIR:-$root/target/release}" && pwd) || exit 1
MODEL=$(cd "${MODEL:-$root/examples/models/emoji-v1}" && pwd) || exit 1
V2=$(cd "${V2:-$root/tests/fixtures/v2}" && pwd) || exit 1
TINY=$root/tests/fixtures/model
CC=${CC:-gcc}
CXX=${CXX:-g++}
library=$LIBDIR/libwuerstchen.so
[ -f "$library" ] || { echo "no $library: cargo build --release first"; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/lib" "$work/scratch"
cp "$library" "$work/lib/libwuerstchen.so.0"
ln -s libwuerstchen.so.0 "$work/lib/libwuerstchen.so"
cp "$library" "$work/wuerstchen_copy.so"
export LD_LIBRARY_PATH="$work/lib"
CUDA=${CUDA:-$(dirname "$(ls -t "$LIBDIR"/build/cuda-emulation-*/out/lib/libcuda.so.1 2>/dev/null | head -n 1)")}
[ -f "$CUDA/libcuda.so.1" ] || CUDA=
# With the emulated driver, and kernels that nobody compiled before.
with_cuda() { env LD_LIBRARY_PATH="$work/lib:$CUDA" XDG_CACHE_HOME="$work/cache" "$@"; }

passed=0
failed=0
note() { # note NAME STATUS
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "failed: $1"; fi
}
# A check that is a command.
check() { name=$1; shift; "$@" >"$work/log" 2>&1; status=$?; [ $status -eq 0 ] || cat "$work/log"; note "$name" $status; }
# A program that counts for itself.
program() {
    name=$1; shift
    start=$(date +%s)
    "$@" >"$work/log" 2>&1
    status=$?
    cat "$work/log"
    line=$(grep -E '[0-9]+ passed, [0-9]+ failed$' "$work/log" | tail -n 1)
    [ -n "$line" ] || { note "$name: exit $status without a summary" 1; return; }
    passed=$((passed + $(echo "$line" | sed -E 's/.* ([0-9]+) passed.*/\1/')))
    wrong=$(echo "$line" | sed -E 's/.* ([0-9]+) failed$/\1/')
    failed=$((failed + wrong))
    # A failed check is counted already; a sanitizer or valgrind may be the one that complains.
    if [ $status -ne 0 ] && [ "$wrong" -eq 0 ]; then note "$name: exit $status" 1; fi
    echo "    $name: $(($(date +%s) - start)) s"
}

# A new folder to write to.
fresh() { mktemp -d "$work/scratch/XXXXXX"; }

c="-std=c99 -pedantic -Wall -Wextra -Wstrict-prototypes -Werror -I$root/include"
cpp="-std=c++17 -pedantic -Wall -Wextra -Werror -I$root/include"
link="-L$work/lib -lwuerstchen -lm -lpthread"

# Headers: C99, C11, C++17; gcc and, where there is one, clang.
compilers="$CC"; command -v clang >/dev/null 2>&1 && compilers="$compilers clang"
for compiler in $compilers; do
    check "$compiler: header, C99" $compiler $c -fsyntax-only "$here/header.c"
    check "$compiler: header, C11" $compiler $c -std=c11 -fsyntax-only "$here/header.c"
done
compilers="$CXX"; command -v clang++ >/dev/null 2>&1 && compilers="$compilers clang++"
for compiler in $compilers; do
    check "$compiler: header.c as C++17" $compiler $cpp -x c++ -fsyntax-only "$here/header.c"
    check "$compiler: wuerstchen.hpp" $compiler $cpp -fsyntax-only "$here/wrapper.cpp"
done
echo '#include "wuerstchen.h"
int main(void) { wst_generate_options_set_seed(0, 1, 0); return 0; }' >"$work/ignored.c"
$CC $c -c "$work/ignored.c" -o "$work/ignored.o" >/dev/null 2>&1
note "an ignored status is a warning" $((! $?))

# Exports: functions of the list and nothing else; SONAME.
nm -D --defined-only "$library" | awk '{print $3}' | sort >"$work/exports"
check "exports" diff "$here/exports.txt" "$work/exports"
nm -D --defined-only "$library" | awk '$2 != "T"' >"$work/data"
check "no data symbols" test ! -s "$work/data"
grep -oE '\bwst_[a-z0-9_]+\(' "$root/include/wuerstchen.h" | tr -d '(' | sort -u >"$work/declared"
check "every export is declared" sh -c "[ -z \"\$(comm -23 '$here/exports.txt' '$work/declared')\" ]"
check "SONAME" sh -c "readelf -d '$library' | grep -q 'SONAME.*\\[libwuerstchen.so.0\\]'"

build() { # build OUTPUT SOURCE [FLAGS]
    output=$work/$1; source=$here/$2; shift 2
    case $source in
    *.cpp) check "build $source" $CXX $cpp -g -O1 "$@" "$source" -o "$output" $link ;;
    *) check "build $source" $CC $c -g -O1 "$@" "$source" -o "$output" $link ;;
    esac
}
build arguments arguments.c
build run run.c
build v2 v2.c
build silent silent.c
build wrapper wrapper.cpp
build train_arguments train_arguments.c
build train train.c
build loader loader.c
build train_wrapper train_wrapper.cpp
check "build load.c" $CC -std=gnu99 -Wall -Wextra -Werror -g -I"$root/include" "$here/load.c" -o "$work/load" -ldl
check "build failing_malloc.c" $CC -std=gnu11 -Wall -Wextra -Werror -fno-builtin -shared -fPIC "$here/failing_malloc.c" -o "$work/libfailing_malloc.so"
check "build memory.c" $CC $c -g "$here/memory.c" -o "$work/memory" "$work/libfailing_malloc.so" $link
check "build train_memory.c" $CC $c -g "$here/train_memory.c" -o "$work/train_memory" "$work/libfailing_malloc.so" $link
check "build minimal.c" $CC $c "$root/examples/c/minimal.c" -o "$work/minimal" $link

program arguments "$work/arguments" "$MODEL" "$work/scratch"
program run "$work/run" "$MODEL" 1000
program "run, v2" "$work/run" "$V2/model" 300
program v2 "$work/v2" "$V2"
program wrapper "$work/wrapper" "$MODEL" "$V2"
program train_arguments "$work/train_arguments" "$TINY"
program train "$work/train" "$TINY" "$(fresh)"
check "train: the library prints nothing" test "$(wc -l <"$work/log")" -eq 1
program loader "$work/loader" "$TINY" "$(fresh)"
program train_wrapper "$work/train_wrapper" "$TINY" "$(fresh)"
program load env -u LD_LIBRARY_PATH "$work/load" "$work/lib/libwuerstchen.so.0" "$work/wuerstchen_copy.so" "$MODEL"
for model in "$MODEL" "$V2/model"; do
    "$work/silent" "$model" >"$work/out" 2>"$work/err"
    note "silent: the calls" $?
    check "silent: standard output" test ! -s "$work/out"
    check "silent: standard error" test ! -s "$work/err"
done
if [ -n "$CUDA" ]; then
    build cuda cuda.c -ldl
    program cuda with_cuda "$work/cuda" "$TINY"
    with_cuda "$work/silent" "$TINY" >"$work/out" 2>"$work/err"
    note "silent on a GPU: the calls" $?
    check "silent on a GPU: standard output" test ! -s "$work/out"
    check "silent on a GPU: standard error" test ! -s "$work/err"
else
    echo "    no CUDA: 'cargo test' has built no emulated driver in $LIBDIR"
fi
check "minimal.c" "$work/minimal" "$MODEL" "a red apple" "$work/scratch/apple.png"
check "minimal.c wrote a picture" test -s "$work/scratch/apple.png"
# Every large allocation; of all that there are, a few hundred. glibc itself aborts when it has no 32 bytes for the
# destructor of a thread-local.
memory() { # memory NAME MODEL RUNS [SETTING...]
    name=$1 model=$2 runs=$3; shift 3
    program "$name" env LD_PRELOAD="$work/libfailing_malloc.so" "$@" "$work/memory" "$model" "$work/scratch/memory.png" "$runs"
}
memory memory "$MODEL" "${MEMORY_RUNS:-1000000}"
memory "memory, small blocks" "$MODEL" "${MEMORY_RUNS:-100}" WST_FAIL_BYTES=33
memory "memory, eight bits" "$MODEL" "${MEMORY_RUNS:-100}" WST_FAIL_BYTES=1024 COMPUTE_DTYPE=i8
memory "memory, v2" "$V2/model" "${MEMORY_RUNS:-1000000}"
memory "memory, v2, small blocks" "$V2/model" "${MEMORY_RUNS:-100}" WST_FAIL_BYTES=33
# The smallest model: its tensors are small blocks too.
program "train_memory" env LD_PRELOAD="$work/libfailing_malloc.so" WST_FAIL_BYTES=1024 \
    "$work/train_memory" "$TINY" "$(fresh)" "${MEMORY_RUNS:-100}"

if [ -z "${QUICK:-}" ]; then
    sanitize="-fsanitize=address,undefined -fno-sanitize-recover=all"
    if $CC $sanitize -x c - -o "$work/probe" 2>/dev/null <<'P' && "$work/probe"; then
int main(void) { return 0; }
P
        for name in arguments run v2 train_arguments train loader; do
            build "${name}_asan" "$name.c" $sanitize
        done
        for name in wrapper train_wrapper; do
            build "${name}_asan" "$name.cpp" $sanitize
        done
        # The payload of a caught panic is leaked on purpose: its destructor may panic again.
        echo "leak:panicking" >"$work/leaks"
        export LSAN_OPTIONS="suppressions=$work/leaks:print_suppressions=0"
        # An absurd size is to come back as NULL, as malloc gives it.
        export ASAN_OPTIONS=allocator_may_return_null=1
        program "arguments, sanitized" "$work/arguments_asan" "$MODEL" "$work/scratch"
        program "run, sanitized" "$work/run_asan" "$MODEL" 50
        if [ -n "$CUDA" ]; then
            build cuda_asan cuda.c $sanitize -ldl
            program "cuda, sanitized" with_cuda "$work/cuda_asan" "$TINY"
        fi
        program "v2, sanitized" "$work/v2_asan" "$V2"
        program "wrapper, sanitized" "$work/wrapper_asan" "$MODEL" "$V2"
        program "train_arguments, sanitized" "$work/train_arguments_asan" "$TINY"
        for name in train loader train_wrapper; do
            program "$name, sanitized" "$work/${name}_asan" "$TINY" "$(fresh)"
        done
    else
        echo "    no sanitizers: $CC cannot link them"
    fi
    if command -v valgrind >/dev/null 2>&1; then
        # Errors of memory, and blocks that nothing points to. Tables that crates keep in statics for good look
        # "possibly lost", since a hash table points into the middle of its block.
        valgrind="valgrind -q --error-exitcode=99 --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite"
        program "arguments, valgrind" $valgrind "$work/arguments" "$MODEL" "$work/scratch"
        program "train_arguments, valgrind" $valgrind "$work/train_arguments" "$TINY"
        program "loader, valgrind" $valgrind "$work/loader" "$TINY" "$(fresh)"
        check "generating, valgrind" $valgrind "$work/silent" "$MODEL"
        check "generating in eight bits, valgrind" env COMPUTE_DTYPE=i8 $valgrind "$work/silent" "$MODEL"
        check "generating, v2, valgrind" $valgrind "$work/silent" "$V2/model"
    else
        echo "    no valgrind"
    fi
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
