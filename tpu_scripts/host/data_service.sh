#!/usr/bin/env bash
# On a VM that decodes images: installs TensorFlow, then starts the tf.data service and waits until it listens.
# Usage: data_service.sh HOST:PORT [SECONDS]
set -euo pipefail
address=$1
patience=${2:-120}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 1
}

if ! python3 -m venv .venv; then
  sudo apt-get -o DPkg::Lock::Timeout=600 update
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y python3-venv
  python3 -m venv --clear .venv
fi
# The version that runs on the TPU's hosts; one service cannot speak with another.
version=$(sed -n 's/^tensorflow-tpu==//p' tpu_scripts/host/requirements.txt)
tqdm=$(sed -n '/^tqdm/p' tpu_scripts/host/requirements.txt)
.venv/bin/python -m pip install --quiet "tensorflow-cpu==$version" "$tqdm"

# As a module of this folder: the checkout is not installed here, which would take all that training needs.
setsid nohup .venv/bin/python -u -m conadv_tf.data.service --address="$address" > data_service.log 2>&1 < /dev/null &
for ((second = 0; second < patience; second++)); do
  if grep -q "^serving at" data_service.log; then
    echo "$(hostname): $(tail -n 1 data_service.log)"
    exit 0
  fi
  sleep 1
done
fail "no data service at $address after $patience s ($(tail -n 1 data_service.log)): see data_service.log on $(hostname)"
