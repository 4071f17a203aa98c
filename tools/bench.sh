#!/usr/bin/env bash
# Times the stages beside PyTorch, for v2 diffusers on PyTorch, fetched into build/venv, and writes benches/record/.
# BENCH holds arguments of benches/run.py, such as BENCH="--generation 2 --parts c --threads 2".
set -eu
. "$(dirname "$0")/common.sh"
venv_has "torch, diffusers, transformers" -r tests/reference/requirements.txt ||
    { note "PyTorch and diffusers are not there and could not be fetched: no rival to compare with"; exit 1; }
# shellcheck disable=SC2086 # several words are meant
"$build/venv/bin/python" benches/run.py ${BENCH:-}
