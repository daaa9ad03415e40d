#!/usr/bin/env bash
# Starts, or deletes, VMs without TPUs that decode and augment the training images in the TPU hosts' place.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=tpu_scripts/common.sh
source "$here/common.sh"
# shellcheck source=tpu_scripts/steps.sh
source "$here/steps.sh"

usage() {
  cat << 'END'
Usage: tpu_scripts/data_service.sh --name=NAME --zone=ZONE --count=N [FLAG...]
       tpu_scripts/data_service.sh --name=NAME --zone=ZONE --stop [FLAG...]
Makes the VMs NAME-data-1 to NAME-data-N, installs this checkout on them and starts a process of the tf.data service on
each, a dispatcher with its worker. Prints the setting with which training uses them. With --stop, deletes these VMs, after
asking; until then they cost money.

  --name=NAME          of the TPU they work for
  --zone=ZONE          where it is, and they will be
  --project=PROJECT    default: that of gcloud config
  --count=N            VMs; a multiple or a divisor of the number of TPU hosts, as many as hosts to begin with
  --machine_type=TYPE  default: n2-standard-32
  --boot_disk_gb=N     default: the image's
  --service_account=ADDRESS, --internal_ips, --labels=KEY=VALUE,...
                       as for create.sh
  --stop               delete them
  --yes                do not ask
  --dry_run            check, print the commands, change nothing
END
}

PORT=5050

check_count() {
  local disk=${FLAGS[boot_disk_gb]-} longest
  COUNT=${FLAGS[count]-} MACHINE_TYPE=${FLAGS[machine_type]-n2-standard-32}
  [[ -n $COUNT ]] || usage_error "--count is missing: add the number of VMs, --count=N, or --stop"
  [[ $COUNT =~ ^[1-9][0-9]{0,2}$ ]] || usage_error "--count=$(quote "$COUNT") is no number of VMs: use 1 to 999"
  [[ $MACHINE_TYPE =~ ^[a-z][a-z0-9]*-[-a-z0-9]+$ ]] || usage_error \
    "--machine_type=$(quote "$MACHINE_TYPE") is no machine type: write one such as n2-standard-32"
  [[ -z $disk || $disk =~ ^[1-9][0-9]{1,4}$ ]] || usage_error \
    "--boot_disk_gb=$(quote "$disk") is no size of at least 10: write one such as --boot_disk_gb=50"
  longest=$NAME-data-$COUNT
  ((${#longest} <= 63)) || usage_error \
    "$longest would be a VM's name of ${#longest} characters, and 63 are the most: choose a shorter --name for the VMs"
  check_owner
}

# Sets VMS to those of this TPU that exist. A failing look must not pass for "there are none".
find_vms() {
  local listing
  listing=$(gcloud compute instances list --project="$PROJECT" --zones="$ZONE" \
    --filter="name~^$NAME-data-[0-9]+\$" --format="value(name)" 2>&1) || fail \
    "gcloud cannot list VMs (${listing%%$'\n'*}): run gcloud auth login, and check --project and --zone"
  VMS=()
  [[ -z $listing ]] || mapfile -t VMS <<< "$listing"
}

# A VM that runs, as Compute Engine says, may still boot: it refuses the first connections.
copy_to_new_vm() { # FILE VM FLAG...
  local try
  for ((try = 1; try <= 30; try++)); do
    if run gcloud compute scp "$1" "$2:" "${@:3}"; then return; fi
    sleep 10
  done
  fail "$2 takes no connection after $((try - 1)) tries, see above: delete the VMs with $(place_command data_service --stop)"
}

start_vms() {
  local names=() addresses=() archive=$ROOT/build/conadv_tf.tar.gz place=(--zone="$ZONE" --project="$PROJECT") like=() i vm
  [[ -z ${FLAGS[service_account]-} ]] || like+=(--service-account="${FLAGS[service_account]}")
  [[ -z ${FLAGS[internal_ips]-} ]] || like+=(--no-address)
  [[ -z ${FLAGS[labels]-} ]] || like+=(--labels="${FLAGS[labels]}")
  [[ -z ${FLAGS[boot_disk_gb]-} ]] || like+=(--boot-disk-size="${FLAGS[boot_disk_gb]}GB")
  for ((i = 1; i <= COUNT; i++)); do
    names+=("$NAME-data-$i")
    addresses+=("grpc://$NAME-data-$i:$PORT")
  done
  run gcloud compute instances create "${names[@]}" "${place[@]}" --machine-type="$MACHINE_TYPE" \
    --image-family=ubuntu-2204-lts --image-project=ubuntu-os-cloud --scopes=storage-ro "${like[@]}"
  run mkdir -p "$ROOT/build"
  run tar -czf "$archive" --exclude=__pycache__ -C "$ROOT" "${SHIPPED[@]}"
  for vm in "${names[@]}"; do
    copy_to_new_vm "$archive" "$vm" "${place[@]}"
    run gcloud compute ssh "$vm" "${place[@]}" --command="mkdir -p conadv_tf && cd conadv_tf &&\
 tar -xzf ../conadv_tf.tar.gz && bash tpu_scripts/host/data_service.sh $vm:$PORT"
  done
  [[ -n ${FLAGS[dry_run]-} ]] || echo "next: train with --gin_param=\"stream.service='$(IFS=, && echo "${addresses[*]}")'\""
}

stop_vms() {
  if [[ -z ${FLAGS[yes]-} && -z ${FLAGS[dry_run]-} ]]; then
    printf 'Delete %s in %s of %s? Type %s: ' "${VMS[*]}" "$ZONE" "$PROJECT" "$NAME"
    read -r answer || answer=
    [[ $answer == "$NAME" ]] || fail "the VMs of $NAME were not deleted, its name was not typed: type it, or add --yes"
  fi
  run gcloud compute instances delete "${VMS[@]}" --zone="$ZONE" --project="$PROJECT" --quiet
}

parse_flags "count machine_type boot_disk_gb service_account labels" "stop yes internal_ips" "$@"
check_place
[[ -n ${FLAGS[stop]-} ]] || check_count
check_gcloud
find_vms
if [[ -n ${FLAGS[stop]-} ]]; then
  ((${#VMS[@]})) || fail "there is no VM $NAME-data-N in $ZONE of $PROJECT: check --name, --zone and --project"
  stop_vms
else
  ((${#VMS[@]} == 0)) || fail "${VMS[*]} exist already: delete them with $(place_command data_service --stop)"
  start_vms
fi
