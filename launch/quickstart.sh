#!/usr/bin/env bash
# From nothing to samples: makes an environment, trains a small model, samples from it, says where all lies.
#   bash launch/quickstart.sh [--data=DIR_OR_METADATA_CSV] [--workdir=DIR] [--config.KEY=VALUE ...]
# Without --data: captioned moving shapes that are drawn on the fly. With it: your own clips and images, in a
# folder with captions beside them (a.mp4 + a.txt) or listed in a metadata.csv, .jsonl or .json.
# --workdir: where results go (default: runs/quickstart, or runs/own_data). The same command again resumes.
# --config.KEY=VALUE changes configs/quickstart.py, as --config.train.num_steps=100.
# About 10 minutes on 2 CPU cores. See launch/environment.sh for the interpreter that is used.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

usage() {
  sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"
}

absolute() {
  case "$1" in
    /*) echo "$1" ;;
    *) echo "$PWD/$1" ;;
  esac
}

data="" workdir="" overrides=()
while (($#)); do
  case "$1" in
    --data=?*) data="$(absolute "${1#*=}")" ;;
    --workdir=?*) workdir="$(absolute "${1#*=}")" ;;
    --data | --workdir)
      (($# > 1)) || fail "$1 wants a value: $1=PATH"
      set -- "$1=$2" "${@:3}"
      continue
      ;;
    --config.?*=*) overrides+=("$1") ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      fail "unknown option $1"
      ;;
  esac
  shift
done

if [[ -n "$data" && ! -e "$data" ]]; then
  fail "--data=$data does not exist"
fi
config=configs/quickstart.py
if [[ -n "$data" ]]; then
  config+=:own_data
  overrides=("--config.data.source=$data" ${overrides[@]+"${overrides[@]}"})
fi
cd -- "$ROOT"
workdir="${workdir:-$ROOT/runs/$([[ -n "$data" ]] && echo own_data || echo quickstart)}"

SECONDS=0
prepare_environment
# The pinned packages are those of the CPU; elsewhere, say JAX_PLATFORMS.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"

run() {
  echo "+ $*" >&2
  "$PYTHON" -m "$@"
}

run sora_jax.train --config="$config" --workdir="$workdir" ${overrides[@]+"${overrides[@]}"}
run sora_jax.sample --workdir="$workdir" --prompts_file="$workdir/prompts.txt" \
  --output_dir="$workdir/samples/final" >/dev/null
run sora_jax.plots --workdir="$workdir" >/dev/null
if [[ -z "$data" ]]; then
  run sora_jax.evaluate --workdir="$workdir"
fi

newest() {
  # The names are our own: no odd characters.
  # shellcheck disable=SC2012
  ls -t "$@" 2>/dev/null | head -n 1
}

count() {
  if [[ -e "$1" ]]; then echo $#; else echo 0; fi
}

cat <<END

Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Look at
  sample grid      $(newest "$workdir"/samples/step_*.png)
  sample videos    $workdir/samples/final ($(count "$workdir"/samples/final/sample_*.mp4) MP4, $(count "$workdir"/samples/final/sample_*.png) PNG)
  loss plot        $workdir/loss.png
  checkpoint       $workdir/checkpoints/$(newest "$workdir"/checkpoints)
  TensorBoard log  $workdir/tensorboard (pip install tensorboard; tensorboard --logdir=...)
More samples:
  $PYTHON -m sora_jax.sample --workdir=$workdir --prompt="..."
END
