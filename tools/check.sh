#!/usr/bin/env bash
# Everything that is checked without running the networks. All parts run, also after one failed.
set -u
. "$(dirname "$0")/common.sh"
failed=""

check() { # check NAME COMMAND...
    local name=$1
    shift
    say "$name"
    "$@" || failed="$failed, $name"
}

header_is_fresh() { # the lints ran the build script, which writes it
    git diff --exit-code -- include/ && [ -z "$(git ls-files --others --exclude-standard include/)" ]
}

# A test that needs no crate, so none has to be built for it.
alone() { # alone NAME
    CARGO_MANIFEST_DIR=$top rustc --edition 2024 --test "tests/$1.rs" -o "$build/$1-test" && "$build/$1-test"
}

go_is_formatted() {
    find_go || { note "skipped: no Go 1.24 to be had"; return 0; }
    local files
    files=$(gofmt -l bindings/go examples/go) && [ -z "$files" ] || { note "gofmt: $files"; return 1; }
}

lints_over_mpi() {
    find_mpi || { note "skipped: no MPI to be had"; return 0; }
    cargo clippy --features mpi --lib --example train_ranks --test training_mpi -- -D warnings
}

lints_for_arm() {
    has_aarch64_std || { note "skipped: no standard library for 64-bit Arm ('make test' fetches it)"; return 0; }
    cargo clippy --lib --target aarch64-unknown-linux-gnu -- -D warnings
}

check "format (Rust)" cargo fmt --all --check
check "format (Go)" go_is_formatted
check "lints" cargo clippy --workspace --all-targets -- -D warnings
check "lints (MPI)" lints_over_mpi
check "lints (64-bit Arm)" lints_for_arm
check "documentation" env RUSTDOCFLAGS=-Dwarnings cargo doc --no-deps
check "header" header_is_fresh
check "layering" alone layering
check "paths in the documents" alone docs
times_of_parts

[ -z "$failed" ] || { note "check failed: ${failed#, }"; exit 1; }
say "check passed"
