#!/usr/bin/env bash
# On the first host of a TPU: checks the settings, then starts train.py detached from the connection.
# Usage: train.sh NAME TYPE TRAIN_FLAG...
set -euo pipefail
name=$1
TYPE=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source=tpu_scripts/host/environment.sh
source tpu_scripts/host/environment.sh

exec 9> train.lock
flock --nonblock 9 || fail "training runs on $name already: watch it with tpu_scripts/watch.sh, or end it first"

if ((${TYPE##*-} > 8)); then
  # The TPU workers own the chips, those of this host too: the process that drives them must not claim any.
  export TPU_NAME=$name TPU_LOAD_LIBRARY=0
else
  export TPU_NAME=local
fi
.venv/bin/python train.py "$@" --preflight
# The lock goes with the process, and is free again when it ends.
setsid nohup .venv/bin/python -u train.py "$@" >> train.log 2>&1 < /dev/null &
echo "started on $name: process $!, log ~/conadv_tf/train.log"
