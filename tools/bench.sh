#!/usr/bin/env bash
# Runs the benchmarks in benches/. The named rival needs PyTorch, in build/venv; without it only our side runs.
set -eu
. "$(dirname "$0")/common.sh"
tools/build.sh
venv_has torch torch numpy || note "skipped: PyTorch is not there and could not be fetched, so there is no rival to compare with"
cargo bench
