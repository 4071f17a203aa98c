#!/usr/bin/env bash
# Builds target/release/libwuerstchen.so (and .a), and the C++ example as build/generate.
set -eu
. "$(dirname "$0")/common.sh"

cargo build --release --lib
# Programs ask for the library by its SONAME.
ln -sf libwuerstchen.so target/release/libwuerstchen.so.0

if ! [ build/generate -nt examples/cpp/generate.cpp ] || ! [ build/generate -nt include/wuerstchen.hpp ] ||
    ! [ build/generate -nt include/wuerstchen.h ]; then
    ${CXX:-c++} -std=c++17 -O2 -Wall -Wextra -Iinclude examples/cpp/generate.cpp -o build/generate \
        -Ltarget/release -lwuerstchen -Wl,-rpath,'$ORIGIN/../target/release'
fi
