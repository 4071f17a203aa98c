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

case $1 in
cpp)
    "$build/generate" --model $model --steps 4 --seed 7 --out "$out/apple.png" "a red apple"
    is_png "$out/apple.png" 128 128
    "$build/generate" --model $model --steps 4 --images 2 --out "$out/many.png" "a red apple" "a blue car"
    for i in 1 2 3 4; do is_png "$out/many-$i.png" 128 128; done
    is_png "$out/many.png" 264 264
    "$build/generate" --model $model --reconstruct "$out/apple.png" --out "$out/again.png"
    is_png "$out/again.png" 128 128
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
    ;;
esac
