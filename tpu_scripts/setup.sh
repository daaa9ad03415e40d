#!/usr/bin/env bash
# Copies this checkout to every host of a TPU and installs what it needs there.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/setup.sh --name=NAME --zone=ZONE [FLAG...]
Copies this checkout to ~/conadv_tf on every host of the TPU and installs it there, with TensorFlow 2.20 for TPUs, into
~/conadv_tf/.venv. Again after a change of the checkout: the same command, while no training runs there.

  --name=NAME        the TPU
  --zone=ZONE        where it is
  --project=PROJECT  default: that of gcloud config
  --dry_run          check, print the commands, change nothing
END
}

IN_THE_WAY="error: training runs on this host, and the code under it would change: wait for it (tpu_scripts/watch.sh),\
 or end it with pkill -f train.py there, which saves it"

parse_flags "" "" "$@"
check_place
check_gcloud
check_ready
on_hosts 0 "$(idle_or "{ echo '$IN_THE_WAY' >&2; exit 1; }")"
set_up_hosts
[[ -n ${FLAGS[dry_run]-} ]] || echo "next: $(place_command run) -- --tpu=$TYPE --gin_file=RECIPE ..."
