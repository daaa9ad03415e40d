# shellcheck shell=bash
# What the scripts share: flags, quoting, the checks before money is spent, and what exists already.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old for associative arrays and quoting: use bash 4.4 or newer" >&2
  exit 1
fi

declare -A FLAGS=()   # --key=value → FLAGS[key]; a switch holds "yes"
TRAIN_ARGUMENTS=()    # what follows --

fail() { # MESSAGE: one line, exit code 1
  printf 'error: %s\n' "$1" >&2
  exit 1
}

usage_error() { # MESSAGE: one line, exit code 2
  printf 'error: %s (%s --help lists the flags)\n' "$1" "tpu_scripts/${0##*/}" >&2
  exit 2
}

# One line that a shell reads back as the same words.
quote() { # WORD...
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Every command that changes something goes through here.
run() { # COMMAND...
  if [[ -n ${FLAGS[dry_run]-} ]]; then
    quote "$@"
  else
    "$@"
  fi
}

# Fills FLAGS and TRAIN_ARGUMENTS. "--" must be among VALUED where arguments of train.py may follow.
parse_flags() { # VALUED SWITCHES ARGUMENT...
  local valued=" name zone project $1 " switches=" dry_run $2 " argument key
  shift 2
  while (($#)); do
    argument=$1
    shift
    key=${argument#--}
    key=${key%%=*}
    [[ $argument != --help ]] || { usage && exit 0; }
    if [[ $argument == -- && $valued == *" -- "* ]]; then
      TRAIN_ARGUMENTS=("$@")
      return
    fi
    [[ $argument =~ ^--[a-z_]+(=|$) ]] || usage_error "unexpected argument $(quote "$argument"): flags are --key=value"
    if [[ $valued == *" $key "* ]]; then
      [[ $argument == *=?* ]] || usage_error "--$key has no value: write --$key=VALUE"
      FLAGS[$key]=${argument#*=}
    elif [[ $switches == *" $key "* ]]; then
      [[ $argument != *=* ]] || usage_error "$(quote "$argument") takes no value: write --$key"
      FLAGS[$key]=yes
    else
      usage_error "unknown flag --$key: drop it"
    fi
  done
}

# Sets NAME, ZONE and PROJECT. What is wrong with the flags is said before gcloud is asked anything.
check_place() {
  NAME=${FLAGS[name]-} ZONE=${FLAGS[zone]-} PROJECT=${FLAGS[project]-}
  [[ -n $NAME ]] || usage_error "--name is missing: add the TPU's name, --name=NAME"
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] || usage_error \
    "--name=$(quote "$NAME") is no TPU name: use up to 63 of a-z, 0-9 and -, from a letter to a letter or digit"
  [[ -n $ZONE ]] || usage_error "--zone is missing: add the TPU's zone, such as --zone=europe-west4-a"
  [[ $ZONE =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || usage_error \
    "--zone=$(quote "$ZONE") is no zone: write one such as --zone=europe-west4-a"
  [[ -z $PROJECT || $PROJECT =~ ^[a-z][-a-z0-9.:]+$ ]] || usage_error \
    "--project=$(quote "$PROJECT") is no project id: gcloud projects list prints yours"
}

# Sets PROJECT where no flag did; the last check that needs no TPU.
check_gcloud() {
  command -v gcloud > /dev/null || fail "gcloud is not on PATH: install the Google Cloud CLI and run gcloud init"
  PROJECT=${PROJECT:-$(gcloud config get-value project 2> /dev/null || true)}
  [[ -n $PROJECT && $PROJECT != "(unset)" ]] || fail \
    "no Google Cloud project is set: add --project=PROJECT, or run gcloud config set project PROJECT"
}

# Sets TYPE and RUNTIME, the image that fits it.
check_type() {
  local generation count sizes
  TYPE=${FLAGS[type]-}
  [[ -n $TYPE ]] || usage_error "--type is missing: add the accelerator type, such as --type=v3-512"
  [[ $TYPE != v5e-* ]] || usage_error "--type=$(quote "$TYPE"): gcloud calls v5e v5litepod: write --type=v5litepod-N"
  [[ $TYPE =~ ^(v2|v3|v4|v5litepod|v5p|v6e)-([1-9][0-9]{0,4})$ ]] || usage_error \
    "--type=$(quote "$TYPE") is no accelerator type: write one such as v3-512, v4-32, v5litepod-16, v5p-8 or v6e-8"
  generation=${BASH_REMATCH[1]} count=${BASH_REMATCH[2]}
  case $generation in
    v2) sizes="8 32 128 256 512" RUNTIME=tpu-ubuntu2204-base ;;
    v3) sizes="8 32 64 128 256 512 1024 2048" RUNTIME=tpu-ubuntu2204-base ;;
    v4) sizes="multiples of 8" RUNTIME=tpu-ubuntu2204-base ;;
    v5p) sizes="multiples of 8" RUNTIME=v2-alpha-tpuv5 ;;
    v5litepod) sizes="1 4 8 16 32 64 128 256" RUNTIME=v2-alpha-tpuv5-lite ;;
    v6e) sizes="1 4 8 16 32 64 128 256" RUNTIME=v2-alpha-tpuv6e ;;
  esac
  if [[ $sizes == multiples* ]]; then
    ((count % 8 == 0)) || usage_error "--type=$TYPE does not exist: $generation comes in multiples of 8"
  else
    [[ " $sizes " == *" $count "* ]] || usage_error "--type=$TYPE cannot be used: sizes of $generation are $sizes"
  fi
  RUNTIME=${FLAGS[runtime_version]-$RUNTIME}
}

# What a TPU that is to be made may be given, by create.sh and by resume.sh.
# shellcheck disable=SC2034  # used where this file is sourced
REQUEST_VALUED="type runtime_version valid_until service_account labels boot_disk_gb"
# shellcheck disable=SC2034
REQUEST_SWITCHES="now spot reserved internal_ips"

# Sets VALID_UNTIL, when a request of the queue ends by itself.
check_request() {
  VALID_UNTIL=${FLAGS[valid_until]-6h}
  [[ -z ${FLAGS[spot]-} || -z ${FLAGS[reserved]-} ]] || usage_error \
    "--spot and --reserved ask for two kinds of capacity: drop one of the two"
  [[ -z ${FLAGS[now]-} || -z ${FLAGS[valid_until]-} ]] || usage_error \
    "--valid_until is for a request in the queue, and --now asks past the queue: drop one of the two"
  [[ $VALID_UNTIL =~ ^([1-9][0-9]*h([1-9][0-9]*m)?|[1-9][0-9]*m)$ ]] || usage_error \
    "--valid_until=$(quote "$VALID_UNTIL") is no time in hours and minutes: write one such as --valid_until=6h or 1h30m"
  [[ -z ${FLAGS[boot_disk_gb]-} ]] || usage_error \
    "--boot_disk_gb=$(quote "${FLAGS[boot_disk_gb]}"): gcloud has no size for a TPU's boot disk: drop it, keep data in gs://"
  check_owner
}

# What a TPU and the VMs that decode for it are both given.
check_owner() {
  local account=${FLAGS[service_account]-} labels=${FLAGS[labels]-} pair='[a-z][-a-z0-9_]*=[-a-z0-9_]*'
  [[ -z $account || $account =~ ^[a-z0-9][-a-z0-9.]*@[a-z0-9][-a-z0-9.]+$ ]] || usage_error \
    "--service_account=$(quote "$account") is no address of one: write NAME@PROJECT.iam.gserviceaccount.com"
  [[ -z $labels || $labels =~ ^$pair(,$pair)*$ ]] || usage_error \
    "--labels=$(quote "$labels") is no list of KEY=VALUE in small letters: write such as --labels=team=vision,run=96k"
}

# A slice of up to 8 cores (v2 to v4, v5p) or chips (v5e, v6e) is one host.
spans_hosts() { ((${TYPE##*-} > 8)); }

# The value of the last --KEY=VALUE or --KEY VALUE among the arguments of train.py; empty without one.
train_flag() { # KEY
  local value="" previous="" argument
  for argument in ${TRAIN_ARGUMENTS[@]+"${TRAIN_ARGUMENTS[@]}"}; do
    [[ $previous != "--$1" && $previous != "-$1" ]] || value=$argument
    [[ ! $argument =~ ^--?"$1"= ]] || value=${argument#*=}
    previous=$argument
  done
  printf '%s\n' "$value"
}

check_bucket_path() { # KEY VALUE WHY
  [[ $2 =~ ^gs://[a-z0-9][-a-z0-9_.]+(/.*)?$ ]] || usage_error "--$1=$(quote "$2") must begin with gs://BUCKET: $3"
}

# What train.py would only find out on a TPU that is already paid for.
check_train_flags() {
  local model_dir data_dir tpu
  model_dir=$(train_flag model_dir) data_dir=$(train_flag data_dir) tpu=$(train_flag tpu)
  [[ -n $tpu ]] || usage_error "--tpu is missing after --: without it train.py leaves the TPU idle; add --tpu=TYPE"
  [[ -n $model_dir ]] || usage_error "--model_dir is missing after --: add --model_dir=gs://BUCKET/RUN"
  check_bucket_path model_dir "$model_dir" "the disk of a TPU VM is lost with it"
  [[ -z $data_dir ]] || check_bucket_path data_dir "$data_dir" "every host of the TPU reads it"
}

check_buckets() {
  local model_dir data_dir bucket folder listing
  model_dir=$(train_flag model_dir) data_dir=$(train_flag data_dir)
  bucket=${model_dir#gs://}
  listing=$(gcloud storage ls "gs://${bucket%%/*}" 2>&1) || fail \
    "--model_dir=$(quote "$model_dir"): its bucket cannot be listed (${listing%%$'\n'*}): make it, or ask for access"
  [[ -n $data_dir ]] || return 0
  # gcloud reads * ? [ as patterns, and has no way to say a name with them: the folder above is looked at.
  folder=${data_dir%/}/
  [[ $folder != *[*?[]* ]] || { folder=${folder%%[*?[]*} && folder=${folder%/*}/; }
  listing=$(gcloud storage ls "$folder" 2>&1) || fail \
    "--data_dir=$(quote "$data_dir") cannot be listed (${listing%%$'\n'*}): correct it, or ask for access"
  [[ -n $listing ]] || fail "--data_dir=$(quote "$data_dir") is empty: copy the TFRecords there first"
}

check_type_of_tpu_flag() {
  local tpu
  tpu=$(train_flag tpu)
  [[ ! $tpu =~ ^v[0-9][a-z]*-[0-9]+$ || $tpu == "$TYPE" ]] || usage_error \
    "--tpu=$tpu is not the type of $NAME, which is a $TYPE: write --tpu=$TYPE"
}

# Prints FORMAT of what carries the name, or NOT_FOUND. Any other failure must not pass for "does not exist".
describe() { # tpu-vm|queued-resources FORMAT
  local where=("$NAME" --zone="$ZONE" --project="$PROJECT") error
  if ! error=$(gcloud compute tpus "$1" describe "${where[@]}" --format="$2" 2>&1 >&3); then
    [[ $error == *NOT_FOUND* ]] || fail \
      "gcloud cannot look $NAME up (${error%%$'\n'*}): run gcloud auth login, and check --project and --zone"
    echo NOT_FOUND
  fi
} 3>&1

node_state() { describe tpu-vm "value(state)"; }

queue_state() { describe queued-resources "value(state.state)"; }

# Sets TYPE to that of the TPU, which must be up.
check_ready() {
  local state queue
  state=$(node_state)
  if [[ $state == NOT_FOUND ]]; then
    queue=$(queue_state)
    [[ $queue != NOT_FOUND ]] || fail "there is no TPU $NAME in $ZONE: make it with $(place_command create --type=TYPE)"
    [[ ! $queue =~ ^(FAILED|SUSPENDED|SUSPENDING|DELETING)$ ]] || fail \
      "there is no TPU $NAME, and none will come, its queued resource is $queue: let tpu_scripts/resume.sh ask again"
    fail "TPU $NAME is not there yet, its queued resource is $queue: wait, or let tpu_scripts/resume.sh do so and start"
  fi
  [[ $state == READY ]] || fail "TPU $NAME is $state, not READY: wait, or bring it back with tpu_scripts/resume.sh"
  TYPE=$(describe tpu-vm "value(acceleratorType.basename())")
}

place_command() { # SCRIPT FLAG...
  quote "tpu_scripts/$1.sh" --name="$NAME" --zone="$ZONE" "${@:2}"
}
