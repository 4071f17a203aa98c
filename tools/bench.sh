#!/usr/bin/env bash
# Times the stages beside PyTorch, which it fetches into build/venv, and writes benches/record/.
# BENCH holds arguments of benches/run.py, such as BENCH="--parts c --threads 2".
set -eu
. "$(dirname "$0")/common.sh"
venv_has torch -r benches/requirements.txt || { note "PyTorch is not there and could not be fetched: no rival to compare with"; exit 1; }
# shellcheck disable=SC2086 # several words are meant
"$build/venv/bin/python" benches/run.py ${BENCH:-}
