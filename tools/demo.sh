#!/usr/bin/env bash
# Draws $PROMPT with the bundled model and prints where the picture is.
set -eu
. "$(dirname "$0")/common.sh"
tools/build.sh
"$build/generate" --model examples/models/emoji-v1 --out "$build/demo.png" "${PROMPT:-a red apple}"
