#!/usr/bin/env bash
# Asks for a TPU VM in the queue, or creates one at once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/create.sh --name=NAME --type=TYPE --zone=ZONE [FLAG...] [-- TRAIN_FLAG...]
Asks Google's queue for a Cloud TPU VM. It costs money from when it is there; tpu_scripts/delete.sh ends that. With flags
of train.py, their preflight first prints what the run would cost, by the compiler on this machine (minutes, the first time).

  --name=NAME                what to call it
  --type=TYPE                accelerator type: v3-512, v4-32, v5litepod-16, v5p-8, v6e-8, ...
  --zone=ZONE                such as europe-west4-a
  --project=PROJECT          default: that of gcloud config
  --valid_until=TIME         a request not filled by then ends by itself, and costs nothing; default 6h
  --now                      past the queue: there at once, or an error
  --spot                     cheaper, and may be preempted at any time
  --reserved                 from the project's reservation
  --service_account=ADDRESS  whose rights the VMs have; default: Compute Engine's
  --internal_ips             no addresses outside; run the scripts within the network, which needs a Cloud NAT for pip
  --labels=KEY=VALUE,...     labels, such as for the bill
  --runtime_version=VERSION  image; default: the plain one of the generation, without TensorFlow
  --boot_disk_gb=N           refused: gcloud has no size for it
  --dry_run                  check, print the commands, change nothing
  TRAIN_FLAG                 such as --gin_file=96k_conadv.gin
END
}

# Ends where train.py refuses the settings: better before the TPU is paid for.
print_cost() {
  local python=$ROOT/.venv/bin/python
  ((${#TRAIN_ARGUMENTS[@]})) || return 0
  [[ -n ${FLAGS[dry_run]-} || -x $python ]] || fail \
    "there is no $python to print the cost with: run make demo, or leave out -- and what follows"
  run "$python" "$ROOT/train.py" "${TRAIN_ARGUMENTS[@]}" --tpu="$TYPE" --preflight
}

parse_flags "$REQUEST_VALUED --" "$REQUEST_SWITCHES" "$@"
check_place
check_type
check_request
check_type_of_tpu_flag
check_gcloud
node=$(node_state)
queue=$(queue_state)
[[ $node == NOT_FOUND ]] || fail \
  "TPU $NAME exists already and is $node: choose another --name, or remove it with $(place_command delete)"
[[ $queue == NOT_FOUND ]] || fail \
  "queued resource $NAME exists already and is $queue: choose another --name, or remove it with $(place_command delete)"
print_cost
create_tpu
[[ -z ${FLAGS[dry_run]-} ]] || exit 0
if [[ -n ${FLAGS[now]-} ]]; then
  echo "next: $(place_command setup)"
else
  echo "asked for $NAME, a $TYPE; a request that is not filled within $VALID_UNTIL ends by itself"
  echo "next: $(place_command setup), once it is READY"
fi
