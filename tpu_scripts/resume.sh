#!/usr/bin/env bash
# Continues a training whose TPU was preempted, deleted or never came.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/resume.sh --name=NAME --type=TYPE --zone=ZONE [FLAG...] -- TRAIN_FLAG...
Looks at the TPU and does what is missing until train.py TRAIN_FLAG... runs: deletes what is left of a preempted TPU,
creates it again, waits, sets it up, starts train.py, which continues from the last checkpoint in --model_dir. Where the
training still runs, nothing is done. Give the flags of create.sh and of run.sh as they were given there.

  --name=NAME, --type=TYPE, --zone=ZONE, --project=PROJECT, --valid_until=TIME, --now, --spot, --reserved,
  --service_account=ADDRESS, --internal_ips, --labels=KEY=VALUE,..., --runtime_version=VERSION
                     as for create.sh
  --poll_seconds=N   how often to look while the TPU is not READY; default 30
  --dry_run          check, print the commands, change nothing
  TRAIN_FLAG         as for run.sh; --model_dir must be gs://..., the disk of a preempted TPU is lost
END
}

# start: training can be started; wait: READY comes by itself; recreate: it does not; later: something is ending.
action_for() { # NODE_STATE QUEUE_STATE
  case $2/$1 in
    FAILED/* | SUSPENDED/*) echo recreate ;;
    DELETING/* | SUSPENDING/*) echo later ;;
    WAITING_FOR_RESOURCES/* | ACCEPTED/* | PROVISIONING/* | CREATING/*) echo wait ;;
    */READY) echo start ;;
    */NOT_FOUND | */PREEMPTED | */TERMINATED) echo recreate ;;
    */CREATING | */STARTING | */RESTARTING | */REIMAGING | */REPAIRING) echo wait ;;
    */DELETING | */STOPPING) echo later ;;
    *) echo unknown ;;
  esac
}

wait_until_ready() {
  local node queue action
  if [[ -n ${FLAGS[dry_run]-} ]]; then
    echo "# once $NAME is READY:"
    return
  fi
  while true; do
    node=$(node_state)
    queue=$(queue_state)
    action=$(action_for "$node" "$queue")
    case $action in
      start) return ;;
      wait) echo "TPU $NAME is $node, its queued resource $queue" ;;
      *) fail "TPU $NAME is $node now, its queued resource $queue: run the same command again" ;;
    esac
    sleep "${FLAGS[poll_seconds]-30}"
  done
}

recreate() { # NODE_STATE QUEUE_STATE
  # What came from the queue goes back into it.
  [[ $2 == NOT_FOUND ]] || unset 'FLAGS[now]'
  delete_tpu "$1" "$2"
  create_tpu
  wait_until_ready
}

# A dry run does not ask: the first ssh registers a key.
check_not_running() {
  local answer
  [[ -z ${FLAGS[dry_run]-} ]] || return 0
  answer=$(on_hosts 0 "$(idle_or "echo BUSY")") || fail "ssh to $NAME failed, which is READY: see above, then try again"
  if [[ $answer == *BUSY* ]]; then
    echo "training runs on $NAME: nothing to do; watch it with $(place_command watch)"
    exit 0
  fi
}

parse_flags "$REQUEST_VALUED poll_seconds --" "$REQUEST_SWITCHES" "$@"
check_place
check_type
check_request
[[ ${FLAGS[poll_seconds]-30} =~ ^[0-9]+$ ]] || usage_error \
  "--poll_seconds=$(quote "${FLAGS[poll_seconds]}") is no whole number: write one, such as --poll_seconds=30"
check_train_flags
check_type_of_tpu_flag
check_gcloud
check_buckets
node=$(node_state)
queue=$(queue_state)
case $(action_for "$node" "$queue") in
  start)
    attached=$(describe tpu-vm "value(acceleratorType.basename())")
    [[ $attached == "$TYPE" ]] || fail "TPU $NAME is a $attached: write --type=$attached, or choose another --name"
    check_not_running
    ;;
  wait) wait_until_ready ;;
  recreate) recreate "$node" "$queue" ;;
  later) fail "TPU $NAME is $node, its queued resource $queue: run the same command again when that has ended" ;;
  *) fail "TPU $NAME is $node, its queued resource $queue: start it yourself, or run $(place_command delete) first" ;;
esac
set_up_hosts
start_training
[[ -n ${FLAGS[dry_run]-} ]] || echo "next: $(place_command watch --model_dir="$(train_flag model_dir)")"
