#!/usr/bin/env bash
# Starts python train.py on a TPU; it goes on when the connection ends.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/run.sh --name=NAME --zone=ZONE [FLAG...] -- TRAIN_FLAG...
Starts python train.py TRAIN_FLAG... on the TPU's first host, on a slice of several hosts after a TPU worker on each
of them. First train.py --preflight checks the settings there and prints the run's arithmetic. Output goes to
~/conadv_tf/train.log on the first host; tpu_scripts/watch.sh shows it.

  --name=NAME        the TPU
  --zone=ZONE        where it is
  --project=PROJECT  default: that of gcloud config
  --dry_run          check, print the commands, change nothing
  TRAIN_FLAG         flags of train.py: --tpu and --model_dir=gs://... are needed, --data_dir must be gs://... too
END
}

parse_flags "--" "" "$@"
check_place
check_train_flags
check_gcloud
check_ready
check_type_of_tpu_flag
check_buckets
start_training
[[ -n ${FLAGS[dry_run]-} ]] || echo "next: $(place_command watch --model_dir="$(train_flag model_dir)")"
