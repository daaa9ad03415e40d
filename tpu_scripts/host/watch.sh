#!/usr/bin/env bash
# On the first host of a TPU: follows the log; with LOGDIR, TensorBoard on port 6006 meanwhile.
# Usage: watch.sh [LOGDIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if (($#)); then
  TPU_LOAD_LIBRARY=0 .venv/bin/tensorboard --logdir="$1" --host=localhost --port=6006 > tensorboard.log 2>&1 &
  trap 'kill "$!" 2> /dev/null || true' EXIT
fi
tail -n 100 -F train.log
