#!/usr/bin/env bash
# Several processes as one run on this machine, as on several hosts: fake CPU devices, collectives over gloo.
#   bash launch/local_run.sh [--num_processes=4] [--devices_per_process=2] [-- flags of sora_jax.train]
# Without flags: the debug preset of the quickstart in runs/local. Process I writes WORKDIR/logs/host_0000I.log and
# .jsonl (what it says) and .stderr (all else); process 0 is shown. SIGTERM (also for SIGINT) and SIGUSR1 are passed on.
# The exit code is that of the run (docs/faults.md). GRACE_S=120: how long the others may outlive the first to end.
# SORA_JAX_WORKER="-m MODULE" runs another program than sora_jax.train; --workdir must be among its flags.
set -uo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

num_processes=4 devices=2 arguments=()
while (($#)); do
  case "$1" in
    --num_processes=*) num_processes="${1#*=}" ;;
    --devices_per_process=*) devices="${1#*=}" ;;
    --)
      arguments=("${@:2}")
      break
      ;;
    -h | --help)
      sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "unknown option $1 (flags of the training go after --)" ;;
  esac
  shift
done
for number in "$num_processes" "$devices"; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "--num_processes and --devices_per_process must be numbers >= 1"
done
if ((${#arguments[@]} == 0)); then
  arguments=(--config=configs/quickstart.py:debug "--config.data.rows=$((num_processes * devices))" --workdir=runs/local)
fi
workdir=""
for argument in "${arguments[@]}"; do
  case "$argument" in --workdir=?*) workdir="${argument#*=}" ;; esac
done
[[ -n "$workdir" ]] || fail "--workdir=DIR must be among the flags after --"

prepare_environment
cd -- "$ROOT" || exit 2
logs="$workdir/logs"
mkdir -p -- "$logs" || fail "$logs cannot be made"
port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')"
export COORDINATOR_ADDRESS="localhost:$port" NUM_PROCESSES="$num_processes" JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
read -ra worker <<<"${SORA_JAX_WORKER:--m sora_jax.train}"

pids=() codes=()
for ((i = 0; i < num_processes; i++)); do
  file="$(printf '%s/host_%05d.stderr' "$logs" "$i")"
  if ((i == 0)); then
    PROCESS_ID=$i "$PYTHON" "${worker[@]}" "${arguments[@]}" 2> >(tee -a -- "$file" >&2) &
  else
    PROCESS_ID=$i "$PYTHON" "${worker[@]}" "${arguments[@]}" >>"$file" 2>&1 &
  fi
  pids+=($!) codes+=("")
done

# shellcheck disable=SC2317 # called by the traps
forward() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null; done
}
trap 'forward TERM' TERM INT # jobs in the background are deaf to SIGINT
trap 'forward USR1' USR1

# Waits for all; those that outlive the first by GRACE_S are killed.
grace="${GRACE_S:-120}" first_end="" left="$num_processes"
while ((left)); do
  sleep 0.2
  for ((i = 0; i < num_processes; i++)); do
    [[ -z "${codes[i]}" ]] || continue
    if ! kill -0 "${pids[i]}" 2>/dev/null; then
      wait "${pids[i]}"
      codes[i]=$?
      left=$((left - 1))
      first_end="${first_end:-$SECONDS}"
    elif [[ -n "$first_end" ]] && ((SECONDS - first_end > grace)); then
      echo "process $i is still there $grace s after the first ended: killed" >&2
      kill -KILL "${pids[i]}" 2>/dev/null
    fi
  done
done
echo "exit codes of processes 0 to $((num_processes - 1)): ${codes[*]}" >&2

# One code for the run: what forbids a restart first, then what explains the rest.
for wanted in 44 2 1 43 142 42; do
  for code in "${codes[@]}"; do
    if [[ "$code" == "$wanted" ]]; then
      ((code == 142)) && code=43
      exit "$code"
    fi
  done
done
for code in "${codes[@]}"; do
  ((code == 0)) || exit "$code"
done
exit 0
