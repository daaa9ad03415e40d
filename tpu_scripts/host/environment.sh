# shellcheck shell=bash
# Sourced on a TPU's host, in the checkout: where TensorFlow finds the TPU's library. TYPE is set.

fail() { # MESSAGE
  printf 'error: %s\n' "$1" >&2
  exit 1
}

libraries=(.venv/lib/python3*/site-packages/libtpu/libtpu.so)
[[ -e ${libraries[0]} ]] || fail "there is no ${libraries[0]} on $(hostname): run tpu_scripts/setup.sh again"
export TPU_LIBRARY_PATH=$PWD/${libraries[0]}
case $TYPE in
  v5* | v6*)
    # These are driven through PJRT, the earlier ones through TensorFlow's own stream executor.
    export NEXT_PLUGGABLE_DEVICE_USE_C_API=true
    export TF_PLUGGABLE_DEVICE_LIBRARY_PATH=$TPU_LIBRARY_PATH
    ;;
esac
