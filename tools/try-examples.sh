#!/usr/bin/env bash
# try-examples.sh cpp|go|rust: draws a picture with an example and looks at the PNG.
set -eu
. "$(dirname "$0")/common.sh"
model=examples/models/emoji-v1
out=$build/try-$1
rm -rf "$out"
mkdir -p "$out"

is_png() { # is_png FILE WIDTH HEIGHT
    [ "$(head -c 8 "$1" | od -An -tx1 | tr -d ' \n')" = 89504e470d0a1a0a ] || { note "$1 is no PNG"; return 1; }
    local size
    size=$(od -An -tu1 -j16 -N8 "$1" | awk '{ print $3 * 256 + $4 "x" $7 * 256 + $8 }')
    [ "$size" = "$2x$3" ] || { note "$1 is $size, not $2x$3"; return 1; }
    echo "$1: $size"
}

# captioned NAME...: a folder of pictures in $out with captions, to train on.
captioned() {
    mkdir -p "$out/pictures"
    local name
    for name in "$@"; do
        cp "$out/$name.png" "$out/pictures/"
        echo "a picture called $name" >"$out/pictures/$name.txt"
    done
}

# draws MODEL: a model that was trained draws.
draws() {
    "$build/generate" --model "$1" --steps 2 --out "$out/trained.png" "a red apple"
    is_png "$out/trained.png" 128 128
}

case $1 in
cpp)
    "$build/generate" --model $model --steps 4 --seed 7 --out "$out/apple.png" "a red apple"
    is_png "$out/apple.png" 128 128
    "$build/generate" --model $model --steps 4 --images 2 --out "$out/many.png" "a red apple" "a blue car"
    for i in 1 2 3 4; do is_png "$out/many-$i.png" 128 128; done
    is_png "$out/many.png" 264 264
    "$build/generate" --model $model --reconstruct "$out/apple.png" --out "$out/again.png"
    is_png "$out/again.png" 128 128
    ${CXX:-c++} -std=c++17 -O2 -Wall -Wextra -Iinclude examples/cpp/fine_tune.cpp -o "$build/fine_tune" \
        -Ltarget/release -lwuerstchen -Wl,-rpath,'$ORIGIN/../target/release'
    captioned apple again many-2 many-3
    "$build/fine_tune" $model "$out/pictures" "$out/model" 3
    # Again, and further: from the checkpoint.
    "$build/fine_tune" $model "$out/pictures" "$out/model" 5
    draws "$out/model"
    if "$build/generate" --model no-such-folder "a red apple" 2>"$out/error.txt"; then
        note "a model that is not there should be an error"
        exit 1
    fi
    grep -q no-such-folder "$out/error.txt"
    ;;
rust)
    cargo run --release --example generate -- --model $model --steps 4 --seed 7 --out "$out/apple.png" "a red apple"
    is_png "$out/apple.png" 128 128
    # Same model, options and seed: the same picture, whatever the language.
    [ ! -e "$build/try-cpp/apple.png" ] || cmp "$out/apple.png" "$build/try-cpp/apple.png"
    ;;
go)
    find_go
    env -C examples/go/generate GOFLAGS=-buildvcs=false go build -o "$out/generate" .
    "$out/generate" --model $model --steps 4 --seed 7 --out "$out/apple.png" --prompt "a red apple"
    is_png "$out/apple.png" 128 128
    "$out/generate" --model $model --steps 4 --out "$out/two.png" --prompt "a red apple" --prompt "a blue car"
    is_png "$out/two-1.png" 128 128
    is_png "$out/two-2.png" 128 128
    env -C examples/go/finetune GOFLAGS=-buildvcs=false go build -o "$out/finetune" .
    captioned apple two-1 two-2
    "$out/finetune" -steps 3 $model "$out/pictures" "$out/model"
    draws "$out/model"
    ;;
esac
