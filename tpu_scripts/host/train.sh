#!/usr/bin/env bash
# On the first host of a TPU: checks the settings, then starts train.py detached from the connection.
# Usage: train.sh NAME TYPE TRAIN_FLAG...
set -euo pipefail
name=$1
type=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

exec 9> train.lock
if ! flock --nonblock 9; then
  echo "error: training runs on $name already: watch it with tpu_scripts/watch.sh, or end it with pkill -f train.py" \
    "there, which saves it" >&2
  exit 1
fi

if ((${type##*-} > 8)); then
  # The TPU workers own the chips, those of this host too: the process that drives them must not claim any.
  export TPU_NAME=$name TPU_LOAD_LIBRARY=0
else
  # train.py itself sets what TensorFlow needs for the chips of its own host.
  export TPU_NAME=local
fi
.venv/bin/python train.py "$@" --preflight
# The lock goes with the process, and is free again when it ends.
setsid nohup .venv/bin/python -u train.py "$@" >> train.log 2>&1 < /dev/null &
echo "started on $name: process $!, log ~/conadv_tf/train.log"
