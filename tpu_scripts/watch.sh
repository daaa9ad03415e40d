#!/usr/bin/env bash
# Follows the log of the training on a TPU, with TensorBoard if asked.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/watch.sh --name=NAME --zone=ZONE [FLAG...]
Follows train.log of the TPU's first host until Ctrl-C; the training goes on.

  --name=NAME            the TPU
  --zone=ZONE            where it is
  --project=PROJECT      default: that of gcloud config
  --model_dir=gs://PATH  also show this run in TensorBoard, at http://localhost:6006
  --dry_run              check, print the commands, change nothing
END
}

parse_flags "model_dir" "" "$@"
check_place
[[ -z ${FLAGS[model_dir]-} ]] || check_bucket_path model_dir "${FLAGS[model_dir]}" "TensorBoard runs on the TPU's host"
check_gcloud
check_ready
ssh=(gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --worker=0)
if [[ -n ${FLAGS[model_dir]-} ]]; then
  [[ -n ${FLAGS[dry_run]-} ]] || echo "TensorBoard: http://localhost:6006"
  run "${ssh[@]}" --command="$INSTALLED; bash conadv_tf/tpu_scripts/host/watch.sh $(quote "${FLAGS[model_dir]%/}/tensorboard")" \
    -- -L 6006:localhost:6006
else
  run "${ssh[@]}" --command="$INSTALLED; bash conadv_tf/tpu_scripts/host/watch.sh"
fi
