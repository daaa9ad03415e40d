# shellcheck shell=bash
# The steps that change something, shared by the scripts that do one of them and by resume.sh, which does them all.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# What train.py needs of the checkout; no data, runs or virtual environment.
SHIPPED=(LICENSE README.md pyproject.toml setup.cfg train.py conadv_tf gin tpu_scripts)

create_tpu() {
  local where=("$NAME" --zone="$ZONE" --project="$PROJECT" --accelerator-type="$TYPE")
  [[ -z ${FLAGS[spot]-} ]] || where+=(--spot)
  [[ -z ${FLAGS[reserved]-} ]] || where+=(--reserved)
  [[ -z ${FLAGS[service_account]-} ]] || where+=(--service-account="${FLAGS[service_account]}")
  [[ -z ${FLAGS[internal_ips]-} ]] || where+=(--internal-ips)
  [[ -z ${FLAGS[labels]-} ]] || where+=(--labels="${FLAGS[labels]}")
  if [[ -n ${FLAGS[now]-} ]]; then
    run gcloud compute tpus tpu-vm create "${where[@]}" --version="$RUNTIME"
  else
    run gcloud compute tpus queued-resources create "${where[@]}" --node-id="$NAME" --runtime-version="$RUNTIME" \
      --valid-until-duration="$VALID_UNTIL"
  fi
}

# A TPU that came from the queue can only be deleted with its queued resource.
delete_tpu() { # NODE_STATE QUEUE_STATE
  local where=("$NAME" --zone="$ZONE" --project="$PROJECT" --quiet)
  if [[ $2 != NOT_FOUND ]]; then
    run gcloud compute tpus queued-resources delete "${where[@]}" --force
  elif [[ $1 != NOT_FOUND ]]; then
    run gcloud compute tpus tpu-vm delete "${where[@]}"
  fi
}

on_hosts() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --project="$PROJECT" --worker="$1" --command="$2"
}

set_up_hosts() {
  local archive=$ROOT/build/conadv_tf.tar.gz
  run mkdir -p "$ROOT/build"
  run tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" "${SHIPPED[@]}"
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:" --zone="$ZONE" --project="$PROJECT" --worker=all
  # Removed first, so that a recipe deleted here does not live on there; .venv stays.
  on_hosts all "mkdir -p conadv_tf && cd conadv_tf && rm -rf conadv_tf gin tpu_scripts &&\
 tar -xzf ../conadv_tf.tar.gz && bash tpu_scripts/host/install.sh"
}

# A command that succeeds on a host where no training runs, and does OTHERWISE on one where it does: training holds a lock
# on its host for as long as it lives. A host that was never set up has no folder for the lock; nothing runs there either.
idle_or() { # OTHERWISE
  echo "mkdir -p conadv_tf; flock --nonblock conadv_tf/train.lock true || $1"
}

# What a host says where setup.sh has not been; before what needs it.
INSTALLED="test -x conadv_tf/.venv/bin/conadv-train ||\
 { echo 'error: this host is not set up: run tpu_scripts/setup.sh first' >&2; exit 1; }"

# Under TPUStrategy one Python process, on the first host, drives the slice. It reaches the TPUs of the other hosts, and
# its own, through TPU workers, TensorFlow's servers, one of which has to run on each of them.
start_training() {
  if spans_hosts; then
    on_hosts all "$INSTALLED; bash conadv_tf/tpu_scripts/host/worker.sh $TYPE"
  fi
  on_hosts 0 "$INSTALLED; bash conadv_tf/tpu_scripts/host/train.sh $(quote "$NAME" "$TYPE" "${TRAIN_ARGUMENTS[@]}")"
}
