#!/usr/bin/env bash
# Compares what the C ABI returns with what the authors' code returned (tests/fixtures).
set -eu
. "$(dirname "$0")/common.sh"
venv_has numpy numpy || { note "parity needs Python 3 with numpy"; exit 1; }
[ -e target/release/libwuerstchen.so ] || tools/build.sh
"$build/venv/bin/python" tests/python/parity.py
