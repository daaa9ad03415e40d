#!/usr/bin/env bash
# On every host of a slice: starts its TPU worker unless it runs, and waits until it listens.
# Usage: worker.sh TYPE [SECONDS]
set -euo pipefail
type=$1
patience=${2:-120}
port=${TPU_TASK_PORT:-8470} # as the worker itself reads it
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
variables=$(.venv/bin/python -m conadv_tf.run.tpu_runtime "$type")
eval "$variables"

# TensorFlow's own worker ends with a KeyError for a v6e.
worker=(start_grpc_tpu_worker)
[[ $type != v6e-* ]] || worker=(conadv-tpu-worker --type="$type")

fail() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 1
}

listens() { (exec 3<> "/dev/tcp/localhost/$port") 2> /dev/null; }

exec 9> worker.lock
if flock --nonblock 9; then
  # Images that bring a TensorFlow of their own serve the port with that one, of another version.
  if systemctl is-active --quiet tpu-runtime 2> /dev/null; then
    sudo systemctl stop tpu-runtime
  fi
  # The lock goes with the process, and is free again when it ends.
  setsid nohup .venv/bin/"${worker[0]}" "${worker[@]:1}" > worker.log 2>&1 < /dev/null &
fi
exec 9>&-
for ((second = 0; second < patience; second++)); do
  if listens; then
    exit 0
  fi
  sleep 1
done
fail "no TPU worker listens on port $port after $patience s ($(tail -n 1 worker.log)): see worker.log on $(hostname)"
