#!/usr/bin/env bash
# Says where the time goes, per op and stage, and draws flame graphs: build/profile/.
#     tools/profile.sh                    the bundled model
#     tools/profile.sh --full-size 1|2    random weights at the published size, made under build/ if they are not there
#     tools/profile.sh --model DIR        any model folder
# What follows are options of benches/profile, such as --parts c,b --threads 1 --dtype i8. `make profile` takes all of it
# as PROFILE="--full-size 1 --parts c".
set -eu
. "$(dirname "$0")/common.sh"

model=examples/models/emoji-v1
case "${1:-}" in
--model) model=$2 && shift 2 ;;
--full-size)
    case $2 in
    1) model=build/bench-model maker=make_full_size.py ;;
    2) model=build/bench-model-v2 maker=make_full_size_v2.py ;;
    *) note "--full-size: expected 1 or 2, found $2" && exit 2 ;;
    esac
    shift 2
    if ! [ -e "$model/model_index.json" ]; then
        venv_has "torch, diffusers, transformers" -r tests/reference/requirements.txt ||
            { note "PyTorch, which makes the weights, is not there and could not be fetched"; exit 1; }
        note "making $model (9 GB, of generation 2 12 GB)"
        "$build/venv/bin/python" "tests/reference/$maker" "$model"
    fi
    ;;
esac
cargo bench --bench profile -- --model "$model" --out "$build/profile" "$@"
