#!/usr/bin/env bash
# Compares what the C ABI returns with what the authors' code and diffusers returned (tests/fixtures), then with what
# diffusers computes now on random v2 pipelines; what that needs is fetched into build/venv.
# PARITY holds arguments of tests/reference/diffusers_parity.py, such as PARITY="--cases 20 --seed 5".
# With --recorded only the first part runs, which needs numpy alone.
set -eu
. "$(dirname "$0")/common.sh"
venv_has numpy numpy || { note "parity needs Python 3 with numpy"; exit 1; }
[ -e target/release/libwuerstchen.so ] || tools/build.sh
status=0
"$build/venv/bin/python" tests/python/parity.py || status=1
if [ "${1:-}" != --recorded ]; then
    venv_has "torch, diffusers, transformers, peft" -r tests/reference/requirements.txt ||
        { note "diffusers is not there and could not be fetched: nothing to compare with"; exit 1; }
    # shellcheck disable=SC2086 # several words are meant
    "$build/venv/bin/python" tests/reference/diffusers_parity.py ${PARITY:-} || status=1
    "$build/venv/bin/python" tests/reference/lora_parity.py || status=1
fi
exit $status
