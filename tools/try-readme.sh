#!/usr/bin/env bash
# Compiles and runs the C, C++ and Go programs that the README shows.
set -eu
. "$(dirname "$0")/common.sh"
out=$build/try-readme
rm -rf "$out"
mkdir -p "$out/go"

snippet() { awk -v start="\`\`\`$1" '$0 == start { on = 1; next } /^```/ { on = 0 } on' README.md; }
library="-Ltarget/release -lwuerstchen -Wl,-rpath,$top/target/release"

snippet c >"$out/readme.c"
snippet cpp >"$out/readme.cpp"
snippet go >"$out/go/main.go"
for file in "$out/readme.c" "$out/readme.cpp" "$out/go/main.go"; do
    [ -s "$file" ] || { note "the README has no program for $file"; exit 1; }
done

${CC:-cc} -std=c99 -pedantic -Wall -Wextra -Werror -Iinclude "$out/readme.c" -o "$out/readme-c" $library
${CXX:-c++} -std=c++17 -pedantic -Wall -Wextra -Werror -Iinclude "$out/readme.cpp" -o "$out/readme-cpp" $library
(
    cp -r examples "$out/" # the programs write beside where they run
    cd "$out"
    ./readme-c && mv apple.png apple-c.png
    ./readme-cpp && mv apple.png apple-cpp.png
    cmp apple-c.png apple-cpp.png
)
if find_go; then
    cat >"$out/go/go.mod" <<MOD
module readme

go 1.24

require github.com/wuerstchen/wuerstchen/bindings/go v0.0.0

replace github.com/wuerstchen/wuerstchen/bindings/go => $top/bindings/go
MOD
    (cd "$out/go" && GOFLAGS=-buildvcs=false go build -o ../readme-go . && cd .. && ./readme-go && test -s apple.png)
else
    note "skipped: the Go program of the README, for want of Go"
fi
echo "the programs of the README ran"
