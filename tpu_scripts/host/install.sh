#!/usr/bin/env bash
# On every host of a TPU: installs the checkout this file is in, into .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! python3 -m venv .venv; then
  # Ubuntu ships Python without venv; a fresh VM may still hold the package lock for its own updates.
  sudo apt-get -o DPkg::Lock::Timeout=600 update
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y python3-venv
  python3 -m venv --clear .venv
fi
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet -r tpu_scripts/host/requirements.txt
# These ask for the package tensorflow, which would overwrite tensorflow-tpu with a build that has no TPU.
.venv/bin/python -m pip install --quiet --no-deps -r tpu_scripts/host/requirements_no_deps.txt
.venv/bin/python -m pip install --quiet --no-deps --editable .
# The library would claim the TPU; to see that everything can be imported it is not needed.
TPU_LOAD_LIBRARY=0 TF_CPP_MIN_LOG_LEVEL=3 .venv/bin/python -c \
  'from conadv_tf import run; import tensorflow; print("installed: tensorflow", tensorflow.__version__)'
