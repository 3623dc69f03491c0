#!/usr/bin/env bash
# The batch script of launch/slurm_run.sh; SLURM runs it on the first node of the job. Arguments: FOLDER MAX_RESTARTS
# and then what srun is to be given. Requeues the job where its end asks for a restart.
set -euo pipefail

folder="$1" max_restarts="$2"
shift 2
# SLURM runs a copy of this file from its spool: the code lies in the folder.
# shellcheck source=launch/lib_common.sh
source "$folder/code/launch/lib_common.sh"

start="${SLURM_RESTART_COUNT:-0}"
ends="$folder/$(printf 'start_%04d' "$start")"
echo "[launch] job $SLURM_JOB_ID, start $start of at most $((max_restarts + 1)), nodes ${SLURM_JOB_NODELIST:-?}"

# A task that ends leaves the others 120 s to save; srun then ends them. Before the time limit SLURM signals the steps
# alone. This script is signalled by scancel, after which the job must not come back, and by preemption, after which SLURM
# itself requeues where the cluster is so configured.
run_child srun --kill-on-bad-exit=0 --wait=120 "$@" bash "$folder/code/launch/lib_worker.sh" task "$folder"
code="$CODE"

# srun gives the highest code of all tasks; the earliest is the one that says why.
WHO=""
CODE="$code"
if compgen -G "$ends/*/exit_code" >/dev/null; then
  decide < <(
    for file in "$ends"/*/exit_code; do
      read -r ended_with ended <"$file"
      echo "$ended $ended_with $(basename -- "$(dirname -- "$file")")"
    done
  )
  # A node that died left nothing behind.
  if [[ "$CODE" == 0 ]]; then CODE="$code" WHO=""; fi
fi
echo "[launch] ended with $CODE: $(words_of "$CODE")${WHO:+, first on $WHO}"

case "$(meaning_of "$CODE")" in
  restart)
    if ((TOLD)); then
      echo "[launch] this job was told to end, so it is not requeued from here"
    elif ((start < max_restarts)); then
      echo "[launch] requeueing"
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    else
      echo "[launch] that were $max_restarts restarts (--max_restarts); giving up"
    fi
    ;;
  stop) [[ -z "$WHO" ]] || tail -n 40 -- "$ends/$WHO/train.log" ;;
esac
exit "$CODE"
