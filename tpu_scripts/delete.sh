#!/usr/bin/env bash
# Deletes a TPU VM and its queued resource.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/delete.sh --name=NAME --zone=ZONE [FLAG...]
Deletes the TPU, with its disks and its queued resource, after asking. What lies in gs:// stays.

  --name=NAME        the TPU
  --zone=ZONE        where it is
  --project=PROJECT  default: that of gcloud config
  --yes              do not ask
  --dry_run          check, print the commands, change nothing
END
}

parse_flags "" "yes" "$@"
check_place
check_gcloud
node=$(node_state)
queue=$(queue_state)
[[ $node != NOT_FOUND || $queue != NOT_FOUND ]] || fail \
  "there is no TPU and no queued resource $NAME in $ZONE of $PROJECT: check --name, --zone and --project"
if [[ -z ${FLAGS[yes]-} && -z ${FLAGS[dry_run]-} ]]; then
  printf 'Delete TPU %s (%s) and its queued resource (%s) in %s of %s? Type its name: ' \
    "$NAME" "$node" "$queue" "$ZONE" "$PROJECT"
  read -r answer || answer=
  [[ $answer == "$NAME" ]] || fail "TPU $NAME was not deleted, its name was not typed: type it, or add --yes"
fi
delete_tpu "$node" "$queue"
