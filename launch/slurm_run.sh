#!/usr/bin/env bash
# Trains on a SLURM cluster: copies the code at its commit beside the workdir, installs the pins once, submits a job
# that saves before its time limit and requeues itself. See docs/pod_runs.md.
#   bash launch/slurm_run.sh --config=configs/NAME.py --workdir=DIR --nodes=N --gpus_per_node=8 [options] \
#     [-- further flags of sora_jax.train]
# --workdir=DIR         on a disk that all nodes mount; logs go to DIR/slurm/RUN_ID
# --nodes=N, --gpus_per_node=G   one process for each GPU, as JAX wants it; G=0: one process a node, on CPU
# --time=LIMIT          as sbatch takes it, as 24:00:00; saved 120 s before
# --partition=, --account=       as sbatch takes them
# --run_id=ID           name of the job and of its logs (default: that of the workdir)
# --max_restarts=N      after time limit, preemption, hang or crash (default: 50)
# --python=PATH         a Python of an environment that is ready (on all nodes); nothing is installed
# --sbatch_flag=F, --srun_flag=F   further flags, as --sbatch_flag=--qos=long; may be repeated
# --allow_dirty         send changed files that are not committed
# --dry_run             print the commands, run nothing
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/lib_common.sh
source "$HERE/lib_common.sh"

CONFIG="" WORKDIR="" NUM_NODES="" GPUS="" TIME="" PARTITION="" ACCOUNT="" RUN_ID="" MAX_RESTARTS=50 PY=""
ALLOW_DIRTY="" SBATCH_FLAGS=() SRUN_FLAGS=() TRAIN_FLAGS=()
own_option() { # option
  case "$1" in
    --nodes=*) NUM_NODES="${1#*=}" ;;
    --gpus_per_node=*) GPUS="${1#*=}" ;;
    --time=*) TIME="${1#*=}" ;;
    --partition=*) PARTITION="${1#*=}" ;;
    --account=*) ACCOUNT="${1#*=}" ;;
    --run_id=*) RUN_ID="${1#*=}" ;;
    --python=*) PY="${1#*=}" ;;
    --sbatch_flag=*) SBATCH_FLAGS+=("${1#*=}") ;;
    --srun_flag=*) SRUN_FLAGS+=("${1#*=}") ;;
    *) return 1 ;;
  esac
}

parse_options own_option "$@"

check_config "$CONFIG"
need --workdir "$WORKDIR"
[[ "$WORKDIR" != *://* ]] || fail "--workdir=$WORKDIR: SLURM wants a path that all nodes share, as /shared/runs/NAME"
[[ "$WORKDIR" == /* ]] || WORKDIR="$PWD/$WORKDIR"
need --nodes "$NUM_NODES"
check_count --nodes "$NUM_NODES"
need --gpus_per_node "$GPUS"
check_form --gpus_per_node "$GPUS" '[0-9]{1,2}' "a number of GPUs; 0 trains on CPU"
check_form --max_restarts "$MAX_RESTARTS" '[0-9]{1,5}' "a whole number"
[[ -z "$TIME" ]] || check_form --time "$TIME" '[0-9:-]+' "a time limit, as 24:00:00"
if [[ -z "$RUN_ID" ]]; then
  RUN_ID="$(basename -- "$WORKDIR" | tr -c 'A-Za-z0-9._\n-' _)"
fi
check_run_id --run_id "$RUN_ID"
check_train_flags ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}
need_tool sbatch "start this on a login node of the cluster"
find_commit "$ALLOW_DIRTY"
check_settings $((NUM_NODES * GPUS)) 1

folder="$WORKDIR/slurm/$RUN_ID"
code="$folder/code-$COMMIT"
say "commit $COMMIT goes to $code"
act mkdir -p -- "$code"
act git -C "$CODE_ROOT" archive --format=tar --output="$folder/code.tar" "$TREE"
act tar -xf "$folder/code.tar" -C "$code"
act ln -sfn "code-$COMMIT" "$folder/code"

# Once, here: nodes may have no way out. The same on all, as the disk is the same.
if [[ -z "$PY" ]]; then
  PY="$folder/venv/bin/python"
  accelerator=none
  ((GPUS == 0)) || accelerator=cuda12
  act env SORA_JAX_VENV="$folder/venv" SORA_JAX_PYTHON= bash "$code/launch/lib_worker.sh" install "$accelerator"
fi

lines=("SORA_JAX_RUN_ID=$(quote "$RUN_ID")" "SORA_JAX_COMMIT=$COMMIT" "SORA_JAX_RUN_PYTHON=$(quote "$PY")"
  "SORA_JAX_CONFIG=$(quote "$CONFIG")" "SORA_JAX_WORKDIR=$(quote "$WORKDIR")" "SORA_JAX_FLAGS=()")
((GPUS > 0)) || lines+=("export JAX_PLATFORMS=cpu")
for flag in ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}; do lines+=("SORA_JAX_FLAGS+=($(quote "$flag"))"); done
write_lines "$folder/run.env" "${lines[@]}"

tasks=$((GPUS > 0 ? GPUS : 1))
flags=(--parsable --job-name="$RUN_ID" --nodes="$NUM_NODES" --ntasks-per-node="$tasks")
((GPUS == 0)) || flags+=(--gpus-per-node="$GPUS")
[[ -z "$TIME" ]] || flags+=(--time="$TIME")
[[ -z "$PARTITION" ]] || flags+=(--partition="$PARTITION")
[[ -z "$ACCOUNT" ]] || flags+=(--account="$ACCOUNT")
# SIGTERM to the steps 120 s before the limit, so that they save. The log goes on over requeues.
flags+=(--requeue --signal=TERM@120 --open-mode=append --output="$folder/job.log")
flags+=(${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"})
command=(sbatch "${flags[@]}" "$code/launch/lib_slurm_job.sh" "$folder" "$MAX_RESTARTS"
  ${SRUN_FLAGS[@]+"${SRUN_FLAGS[@]}"})
if [[ -n "$DRY_RUN" ]]; then
  show "${command[@]}"
  exit
fi
job="$("${command[@]}")" || fail "sbatch refused the job (above)"
say "job ${job%%;*} is submitted"
say "watch: tail -F $(quote "$folder/job.log") $(quote "$folder")/start_*/*/train.log"
say "end:   scancel ${job%%;*}     resume after it: the same command"
