#!/usr/bin/env bash
# Runs on each worker of a run, from the copied code; launch/*_run.sh call it, nobody else.
#   setup RUN_ID           installs Python where needed, the pins, and jax with libtpu
#   start RUN_ID N         starts attempt N apart from the shell that asked, so that it survives its end
#   status RUN_ID          one line: attempt, state (none, running, ended), exit code, when it ended
#   stop RUN_ID            SIGTERM, so that it saves; SIGKILL after STOP_S seconds
#   trace RUN_ID           asks the trainer for a profiler trace of the next steps
#   follow RUN_ID N OFFSET what was added to the log since
#   last RUN_ID HOST LINES the end of the log, on HOST alone
#   pack RUN_ID            all logs, as a base64 tar between two marks
#   install EXTRA          the environment alone: none, tpu or cuda12
#   task FOLDER, pod       one process of SLURM, of Kubernetes: trains in the foreground
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=launch/lib_common.sh
source "$HERE/lib_common.sh"
BASE="${SORA_JAX_HOME:-$HOME/sora_jax}"
BUCKETS="${SORA_JAX_BUCKETS:-$BASE/buckets}"
STOP_S="${SORA_JAX_STOP_S:-120}"
HOST="${SORA_JAX_HOST:-$(hostname)}"

problem() {
  echo "error: $HOST: $*" >&2
  exit 2
}

load_run() { # RUN_ID
  RUN="$BASE/$1"
  # shellcheck source=/dev/null
  source "$RUN/run.env"
}

newest_attempt() {
  local folder newest=0
  for folder in "$RUN"/attempt_*; do
    [[ -d "$folder" ]] || continue
    folder="${folder##*_}"
    if ((10#$folder > newest)); then newest=$((10#$folder)); fi
  done
  echo "$newest"
}

attempt_folder() {
  printf '%s/attempt_%04d' "$RUN" "$1"
}

# --- environment ---

# TPU VMs of Ubuntu 22.04 bring Python 3.10; uv installs a later one without root.
ensure_python() {
  [[ -z "${SORA_JAX_PYTHON:-}" ]] || return 0
  if find_python >/dev/null; then return; fi
  echo "no Python 3.11 or later; installing one with uv" >&2
  python3 -m pip install -q --user uv >&2 || curl -LsSf https://astral.sh/uv/install.sh | sh >&2 ||
    problem "neither Python 3.11 nor uv could be installed; use a runtime version with Python 3.11"
  export PATH="$HOME/.local/bin:$PATH"
  uv python install -q 3.12 >&2
  PATH="$(dirname -- "$(uv python find 3.12)"):$PATH"
}

# The pins are those of the CPU; jax's own extra adds the accelerator at the same version.
install_accelerator() { # none, tpu, cuda12
  [[ "$1" != none ]] || return 0
  local version wanted
  version="$("$PYTHON" -c 'from importlib.metadata import version; print(version("jax"))')"
  wanted="jax[$1]==$version"
  if [[ -z "${SORA_JAX_PYTHON:-}" ]] && ! grep -qxF -- "$wanted" "$VENV/accelerator.txt" 2>/dev/null; then
    echo "installing $wanted" >&2
    "$PYTHON" -m pip install -qq --disable-pip-version-check "$wanted" >&2 || problem "$wanted could not be installed"
    printf '%s\n' "$wanted" >"$VENV/accelerator.txt"
  fi
}

prepare() { # accelerator
  export SORA_JAX_VENV="${SORA_JAX_VENV:-$BASE/venv}"
  # shellcheck source=launch/environment.sh
  source "$HERE/environment.sh"
  ensure_python
  prepare_environment >&2
  install_accelerator "$1"
}

# --- buckets: sora_jax reads and writes files, so gs://BUCKET/PATH becomes a path below a mount ---

bucket_of() {
  local value="${1#*=gs://}"
  case "$1" in
    gs://*) value="${1#gs://}" ;;
    --*=gs://*) ;;
    *) return 0 ;;
  esac
  printf '%s\n' "${value%%/*}"
}

local_path() {
  case "$1" in
    gs://*) printf '%s\n' "$BUCKETS/${1#gs://}" ;;
    --*=gs://*) printf '%s\n' "${1%%=gs://*}=$BUCKETS/${1#*=gs://}" ;;
    *) printf '%s\n' "$1" ;;
  esac
}

install_gcsfuse() {
  command -v gcsfuse >/dev/null && return
  local repo key=/usr/share/keyrings/cloud.google.asc
  repo="gcsfuse-$(lsb_release -c -s)"
  echo "installing gcsfuse" >&2
  {
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null &&
      echo "deb [signed-by=$key] https://packages.cloud.google.com/apt $repo main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null &&
      sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
  } >&2 || problem "gcsfuse could not be installed; see https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
}

mount_buckets() {
  local value bucket
  for value in "$SORA_JAX_WORKDIR" ${SORA_JAX_FLAGS[@]+"${SORA_JAX_FLAGS[@]}"}; do
    bucket="$(bucket_of "$value")"
    [[ -n "$bucket" ]] || continue
    mkdir -p -- "$BUCKETS/$bucket"
    mountpoint -q -- "$BUCKETS/$bucket" && continue
    install_gcsfuse
    # No cache of metadata: every host must see at once what another wrote. Checkpoints are committed by a rename.
    gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0 \
      --metadata-cache-negative-ttl-secs=0 "$bucket" "$BUCKETS/$bucket" >&2 ||
      problem "bucket gs://$bucket cannot be mounted; may the service account of this machine read and write it?"
  done
}

# --- training ---

# Becomes the trainer.
train() {
  local flag flags=()
  trap '' USR1 # until it listens itself, a wish for a trace would end it
  for flag in ${SORA_JAX_FLAGS[@]+"${SORA_JAX_FLAGS[@]}"}; do
    flags+=("$(local_path "$flag")")
  done
  export SORA_JAX_COMMIT SORA_JAX_RUN_ID
  export SORA_JAX_DISTRIBUTED="${SORA_JAX_DISTRIBUTED:-1}"
  if [[ -n "${SORA_JAX_GENERATION:-}" ]]; then
    LIBTPU_INIT_ARGS="$("$PYTHON" -m sora_jax.xla_flags --generation="$SORA_JAX_GENERATION")" ||
      problem "no XLA flags for $SORA_JAX_GENERATION; see above"
    export LIBTPU_INIT_ARGS
  fi
  echo "host $HOST, run $SORA_JAX_RUN_ID, commit $SORA_JAX_COMMIT, LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS:-}" >&2
  exec "$PYTHON" -m sora_jax.train --config="$SORA_JAX_CONFIG" --workdir="$(local_path "$SORA_JAX_WORKDIR")" \
    ${flags[@]+"${flags[@]}"}
}

# Trains, and notes how and when it ended: "code epoch" in FOLDER/exit_code.
watch_over() { # folder
  cd -- "$CODE_ROOT"
  run_child train >>"$1/train.log" 2>&1
  printf '%s %s\n' "$CODE" "$(date +%s)" >"$1/exit_code.tmp"
  mv -f -- "$1/exit_code.tmp" "$1/exit_code"
  return "$CODE"
}

# --- commands ---

do_setup() {
  load_run "$1"
  # An attempt of before would hold the TPU.
  do_stop "$1"
  prepare tpu
  printf '%s\n' "$PYTHON" >"$RUN/python"
  echo "SORA_JAX_READY $HOST"
}

do_start() { # RUN_ID N
  load_run "$1"
  local folder i
  folder="$(attempt_folder "$2")"
  if [[ ! -e "$folder" ]]; then mount_buckets; fi
  if mkdir -- "$folder" 2>/dev/null; then # by one of those who ask
    setsid nohup bash "$HERE/lib_worker.sh" supervise "$1" "$2" </dev/null >>"$folder/supervisor.log" 2>&1 &
    # Only then is it apart from this shell, whose end it is to survive.
    for ((i = 0; i < 300; i++)); do
      [[ ! -s "$folder/pid" ]] || break
      sleep 0.2
    done
    [[ -s "$folder/pid" ]] || problem "training was not started within a minute; see $folder/supervisor.log"
  elif [[ ! -d "$folder" ]]; then
    problem "$folder cannot be made; is the disk full?"
  fi
  do_status "$1"
}

do_supervise() {
  load_run "$1"
  printf '%s\n' $$ >"$(attempt_folder "$2")/pid"
  PYTHON="$(cat -- "$RUN/python")"
  export PYTHON PYTHONPATH="$CODE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
  watch_over "$(attempt_folder "$2")"
}

is_alive() { # folder: the process is there and is ours, not one that got its number after a reboot
  local pid args i
  for ((i = 0; i < 25; i++)); do
    [[ ! -e "$1/exit_code" ]] || return 1
    if pid="$(cat -- "$1/pid" 2>/dev/null)" && [[ -n "$pid" ]]; then
      kill -0 "$pid" 2>/dev/null || return 1
      args="$(ps -ww -o args= -p "$pid")" || return 1
      [[ "$args" != *lib_worker.sh*"$SORA_JAX_RUN_ID"* ]] || return 0
      # While it becomes another program it has no arguments, and ps shows [its name].
      [[ -z "$args" || "$args" == "["* ]] || return 1
    elif [[ -z "$(find "$1" -maxdepth 0 -newermt '-1 minute' 2>/dev/null)" ]]; then
      return 1 # not one that is being started
    fi
    sleep 0.2
  done
  return 1
}

do_status() {
  load_run "$1"
  local attempt folder alive="" state=none code=- ended=-
  attempt="$(newest_attempt)"
  folder="$(attempt_folder "$attempt")"
  if ((attempt)); then
    # In this order: the code is written before the supervisor ends.
    if is_alive "$folder"; then alive=1; fi
    if [[ -e "$folder/exit_code" ]]; then
      state=ended
      read -r code ended <"$folder/exit_code"
    elif [[ -n "$alive" ]]; then
      state=running
    else # killed with its supervisor, or the machine was started anew
      state=ended code=137 ended="$(date -r "$folder/train.log" +%s 2>/dev/null || date +%s)"
    fi
  fi
  echo "SORA_JAX_STATUS $HOST $attempt $state $code $ended"
}

do_stop() {
  load_run "$1"
  local attempt folder pid i
  attempt="$(newest_attempt)"
  folder="$(attempt_folder "$attempt")"
  if ((attempt)) && is_alive "$folder"; then
    pid="$(cat -- "$folder/pid")"
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < STOP_S * 5; i++)); do
      is_alive "$folder" || break
      sleep 0.2
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
  fi
}

do_trace() {
  load_run "$1"
  local folder
  folder="$(attempt_folder "$(newest_attempt)")"
  is_alive "$folder" || problem "run $1 does not run here"
  kill -USR1 "$(cat -- "$folder/pid")"
}

do_follow() { # RUN_ID N OFFSET; at most 64 KiB at a time
  load_run "$1"
  local log size from="$3"
  log="$(attempt_folder "$2")/train.log"
  size="$(wc -c <"$log" 2>/dev/null || echo 0)"
  if ((size - from > 65536)); then from=$((size - 65536)); fi
  if ((size > from)); then tail -c "+$((from + 1))" -- "$log" | head -c "$((size - from))"; fi
  printf '\nSORA_JAX_OFFSET %d\n' "$size"
}

do_last() { # RUN_ID HOST LINES
  load_run "$1"
  [[ "$2" == "$HOST" ]] || return 0
  tail -n "$3" -- "$(attempt_folder "$(newest_attempt)")/train.log"
}

do_pack() {
  load_run "$1"
  echo "SORA_JAX_LOGS_BEGIN $HOST"
  (cd -- "$RUN" && tar -czf - run.env attempt_*) | base64
  echo "SORA_JAX_LOGS_END $HOST"
}

do_install() {
  prepare "$1"
}

# One task of srun. FOLDER is on the shared disk; its run.env says what to train.
do_task() {
  # shellcheck source=/dev/null
  source "$1/run.env"
  HOST="$HOST.${SLURM_PROCID:-0}"
  local folder
  folder="$1/$(printf 'start_%04d' "${SLURM_RESTART_COUNT:-0}")/$HOST"
  mkdir -p -- "$folder"
  PYTHON="$SORA_JAX_RUN_PYTHON"
  export PYTHON PYTHONPATH="$CODE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
  watch_over "$folder"
}

# The container's command: everything was installed into the image, options come in the environment and as arguments.
do_pod() {
  SORA_JAX_FLAGS=("$@")
  PYTHON="${PYTHON:-python}"
  export PYTHON PYTHONPATH="$CODE_ROOT${PYTHONPATH:+:$PYTHONPATH}"
  SORA_JAX_COMMIT="${SORA_JAX_COMMIT:-unknown}"
  cd -- "$CODE_ROOT"
  train
}

command="${1:-}"
shift || true
case "$command" in
  setup | install | start | supervise | status | stop | trace | follow | last | pack | task | pod) "do_$command" "$@" ;;
  *) problem "unknown command '$command' of lib_worker.sh" ;;
esac
