#!/usr/bin/env bash
# Everything that is checked without running the networks. All parts run, also after one failed.
set -u
. "$(dirname "$0")/common.sh"
failed=""

part() { # part NAME COMMAND...
    local name=$1
    shift
    say "$name"
    "$@" || failed="$failed, $name"
}

header_is_fresh() { # the build has just written it
    cargo build && git diff --exit-code -- include/ && [ -z "$(git ls-files --others --exclude-standard include/)" ]
}

go_is_formatted() {
    find_go || { note "skipped: no Go 1.24 to be had"; return 0; }
    local files
    files=$(gofmt -l bindings/go examples/go) && [ -z "$files" ] || { note "gofmt: $files"; return 1; }
}

part "format (Rust)" cargo fmt --check
part "format (Go)" go_is_formatted
part "lints" cargo clippy --all-targets -- -D warnings
part "documentation" env RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps
part "header" header_is_fresh
part "layering" cargo test --test layering

[ -z "$failed" ] || { note "check failed: ${failed#, }"; exit 1; }
say "check passed"
