#!/usr/bin/env bash
# Creates a TPU VM, or asks for one in the queue.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/create.sh --name=NAME --type=TYPE --zone=ZONE [FLAG...]
Creates a Cloud TPU VM, which costs money from then on; tpu_scripts/delete.sh ends that.

  --name=NAME                what to call it
  --type=TYPE                accelerator type: v3-512, v4-32, v5litepod-16, v5p-8, v6e-8, ...
  --zone=ZONE                such as europe-west4-a
  --project=PROJECT          default: that of gcloud config
  --queued                   ask for a queued resource, which is filled when there is room
  --spot                     cheaper, and may be preempted at any time
  --runtime_version=VERSION  image; default: the plain one of the generation, without TensorFlow
  --dry_run                  check, print the commands, change nothing
END
}

parse_flags "type runtime_version" "queued spot" "$@"
check_place
check_type
check_gcloud
node=$(node_state)
queue=$(queue_state)
[[ $node == NOT_FOUND ]] || fail \
  "TPU $NAME exists already and is $node: choose another --name, or remove it with $(place_command delete)"
[[ $queue == NOT_FOUND ]] || fail \
  "queued resource $NAME exists already and is $queue: choose another --name, or remove it with $(place_command delete)"
create_tpu
[[ -n ${FLAGS[dry_run]-} ]] || echo "next: $(place_command setup)${FLAGS[queued]:+, once it is READY}"
