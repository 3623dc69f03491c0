#!/usr/bin/env bash
# Trains on Cloud TPU VMs: creates or reuses them, copies the code at its commit, installs the pins, starts training on
# all workers, follows the log, restarts after preemption, and brings the logs home. See docs/pod_runs.md.
#   bash launch/tpu_run.sh --name=NAME --zone=ZONE --project=PROJECT --topology=v5p:4x4x4 \
#     --config=configs/NAME.py --workdir=gs://BUCKET/RUN [options] [-- further flags of sora_jax.train]
# --topology=v5p:4x4x4     or --accelerator=v5p-128: what to create
# --on_demand | --spot | --reserved    kind of capacity (default: on demand)
# --queued                 wait in Google's queue; goes with --spot and --reserved
# --num_slices=N           several such slices; implies --queued, as Multislice wants it
# --run_id=ID              fixed name of the run (default: NAME); a running one of that name is attached to
# --max_restarts=N         after preemption, hang or crash (default: 50), each wait twice as long, at most 5 minutes
# --runtime_version=V      TPU software version (default: that of the generation)
# --create_flag=F, --ssh_flag=F   further flags for gcloud, as --ssh_flag=--tunnel-through-iap; may be repeated
# --allow_dirty            send changed files that are not committed
# --logs_dir=DIR           where logs are collected (default: runs/ID/logs)
# --trace                  ask the running trainers for a profiler trace of their next steps, and stop there
# --teardown               delete the machines and stop there;  --teardown_at_end  delete them when the run has ended
# --dry_run                print every command of a run without faults, run nothing
# The same command attaches again, and resumes what was stopped. Exit code: that of the run.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/lib_common.sh
source "$HERE/lib_common.sh"
# shellcheck source=launch/lib_tpu.sh
source "$HERE/lib_tpu.sh"

NAME="" ZONE="" PROJECT="" TOPOLOGY="" ACCELERATOR="" CONFIG="" WORKDIR="" RUN_ID="" RUNTIME="" LOGS_DIR=""
CAPACITY="" QUEUED="" NUM_SLICES=1 MAX_RESTARTS=50 ALLOW_DIRTY="" TEARDOWN="" TEARDOWN_AT_END="" TRACE=""
EXISTS=""
CREATE_FLAGS=() SSH_FLAGS=() SCP_FLAGS=() TRAIN_FLAGS=()
GRACE_S="${SORA_JAX_GRACE_S:-120}"
COMMAND_LINE="bash launch/tpu_run.sh $(quoted "$@")"

set_capacity() {
  [[ -z "$CAPACITY" || "$CAPACITY" == "$1" ]] || fail "--$CAPACITY and --$1 exclude each other"
  CAPACITY="$1"
}

own_option() { # option
  case "$1" in
    --name=*) NAME="${1#*=}" ;;
    --zone=*) ZONE="${1#*=}" ;;
    --project=*) PROJECT="${1#*=}" ;;
    --topology=*) TOPOLOGY="${1#*=}" ;;
    --accelerator=*) ACCELERATOR="${1#*=}" ;;
    --run_id=*) RUN_ID="${1#*=}" ;;
    --runtime_version=*) RUNTIME="${1#*=}" ;;
    --num_slices=*) NUM_SLICES="${1#*=}" ;;
    --create_flag=*) CREATE_FLAGS+=("${1#*=}") ;;
    --ssh_flag=*) SSH_FLAGS+=("${1#*=}") SCP_FLAGS+=("${1#*=}") ;;
    --logs_dir=*) LOGS_DIR="${1#*=}" ;;
    --on_demand | --spot | --reserved) set_capacity "${1#--}" ;;
    --queued) QUEUED=1 ;;
    --trace) TRACE=1 ;;
    --teardown) TEARDOWN=1 ;;
    --teardown_at_end) TEARDOWN_AT_END=1 ;;
    *) return 1 ;;
  esac
}

check() {
  need --name "$NAME"
  check_place
  need_tool gcloud "install it, https://cloud.google.com/sdk/docs/install"
  RUN_ID="${RUN_ID:-$NAME}"
  check_run_id --run_id "$RUN_ID"
  ((NUM_SLICES == 1)) || QUEUED=1
  CAPACITY="${CAPACITY:-on_demand}"
  LOGS_DIR="${LOGS_DIR:-$CODE_ROOT/runs/$RUN_ID/logs}"
  [[ -z "$TEARDOWN$TRACE" ]] || return 0

  check_form --max_restarts "$MAX_RESTARTS" '[0-9]{1,5}' "a whole number"
  if [[ -n "$TOPOLOGY" ]]; then
    [[ -z "$ACCELERATOR" ]] || fail "--topology and --accelerator exclude each other"
    parse_topology "$TOPOLOGY"
  else
    need "--topology or --accelerator" "$ACCELERATOR"
    check_form --accelerator "$ACCELERATOR" '(v5litepod|v5p|v6e)-[0-9]+' "an accelerator type, as v5p-128"
    check_accelerator "$ACCELERATOR"
    CHIPS=$((10#${ACCELERATOR##*-}))
    [[ "$ACCELERATOR" != v5p-* ]] || CHIPS=$((CHIPS / 2))
    GENERATION="${ACCELERATOR%-*}" DIMS=""
    GENERATION="${GENERATION/v5litepod/v5e}"
  fi
  TPU_TYPE="${GENERATION/v5e/v5litepod}"
  WANTED="${TOPOLOGY:-$ACCELERATOR}, $CAPACITY"
  ((NUM_SLICES == 1)) || WANTED+=", $NUM_SLICES slices"
  # https://cloud.google.com/tpu/docs/runtimes
  case "$GENERATION" in
    v5e) RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" ;;
    v5p) RUNTIME="${RUNTIME:-v2-alpha-tpuv5}" ;;
    v6e) RUNTIME="${RUNTIME:-v2-alpha-tpuv6e}" ;;
    *) fail "$GENERATION is not had as a TPU VM, only on GKE: use launch/gke_run.sh" ;;
  esac
  check_config "$CONFIG"
  need --workdir "$WORKDIR"
  case "$WORKDIR" in
    gs://?*/?* | /*) ;;
    *) fail "--workdir=$WORKDIR: all workers must see it: gs://BUCKET/RUN, or the path of a disk they all mount" ;;
  esac
  [[ "$WORKDIR" == gs://* ]] || say "warning: --workdir=$WORKDIR must be a disk that all workers mount, or checkpoints are lost"
  check_train_flags ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}
  find_commit "$ALLOW_DIRTY"
  check_settings $((CHIPS * NUM_SLICES)) "$NUM_SLICES"
}

# --- steps ---

worker() { # command of lib_worker.sh, on a machine that may be bare
  echo "bash ~/sora_jax/$RUN_ID/code/launch/lib_worker.sh $1"
}

send_code() {
  local tar="$SCRATCH/sora_jax-$RUN_ID.tar.gz" env="$SCRATCH/sora_jax-$RUN_ID.env" flag
  local lines=("SORA_JAX_RUN_ID=$(quote "$RUN_ID")" "SORA_JAX_COMMIT=$COMMIT" "SORA_JAX_GENERATION=$GENERATION"
    "SORA_JAX_CONFIG=$(quote "$CONFIG")" "SORA_JAX_WORKDIR=$(quote "$WORKDIR")" "SORA_JAX_FLAGS=()")
  for flag in ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}; do lines+=("SORA_JAX_FLAGS+=($(quote "$flag"))"); done
  say "sending commit $COMMIT"
  act git -C "$CODE_ROOT" archive --format=tar.gz --output="$tar" "$TREE" || fail "git archive failed (above)"
  write_lines "$env" "${lines[@]}"
  copy_all "$tar" "$env" || return
  # shellcheck disable=SC2088 # the worker's shell expands it
  local home="~/sora_jax/$RUN_ID" code="code-$COMMIT"
  say "installing on all workers"
  ssh_all "mkdir -p $home/$code && tar -xzf ~/sora_jax-$RUN_ID.tar.gz -C $home/$code && ln -sfn $code $home/code && \
mv ~/sora_jax-$RUN_ID.env $home/run.env && $(worker "setup $RUN_ID")" || return
}

# Lines "node host attempt state code ended" in $STATUS.
get_status() {
  ssh_all "test ! -e ~/sora_jax/$RUN_ID/run.env || $(worker "status $RUN_ID")" || return
  [[ -n "$DRY_RUN" ]] || read_status
}

read_status() {
  local i
  STATUS=""
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    STATUS+="$(sed -n "s/^.*SORA_JAX_STATUS /$i /p" "$SCRATCH/out.$i")"$'\n'
  done
  STATUS="$(sort -u <<<"$STATUS" | sed '/^$/d')"
}

count() { # state, or nothing for all
  awk -v state="$1" 'NF && (state == "" || $4 == state) { n++ } END { print n + 0 }' <<<"$STATUS"
}

follow_log() {
  [[ -z "$DRY_RUN" ]] || {
    ssh_node "${NODES[0]}" 0 "$(worker "follow $RUN_ID $ATTEMPT 0")"
    return
  }
  local size
  ssh_node "${NODES[0]}" 0 "$(worker "follow $RUN_ID $ATTEMPT $OFFSET")" >"$SCRATCH/log" 2>/dev/null || return 0
  size="$(sed -n 's/^SORA_JAX_OFFSET \([0-9]*\)$/\1/p' "$SCRATCH/log" | tail -n 1)"
  sed '/^SORA_JAX_OFFSET /d' "$SCRATCH/log" | sed '${/^$/d;}'
  OFFSET="${size:-$OFFSET}"
}

stop_all() {
  say "stopping the processes that are left"
  ssh_all "$(worker "stop $RUN_ID")" || true
  get_status || true
}

start_attempt() {
  ATTEMPT=$((ATTEMPT + 1)) OFFSET=0
  say "run $RUN_ID, attempt $ATTEMPT"
  ssh_all "$(worker "start $RUN_ID $ATTEMPT")"
}

# Waits for the end of an attempt: CODE and WHO. CODE 42 where the machines went away.
watch() {
  local first_end="" unreachable=0 silent=0 now ended
  while :; do
    if get_status && follow_log && [[ -n "$DRY_RUN" ]]; then
      CODE=0
      return
    fi
    ended="$(count ended)" now="$(date +%s)"
    if [[ -n "$FAILED_NODE" ]]; then
      if is_lost; then
        say "${NODES[FAILED_NODE]} is $STATE"
        CODE=42
        return
      fi
      unreachable=$((unreachable + 1))
      say "no answer from ${NODES[FAILED_NODE]} ($unreachable): $(tail -n 1 "$SCRATCH/err.$FAILED_NODE")"
      if ((unreachable >= 40)); then
        say "gave up watching; the run may well go on. Attach again: $COMMAND_LINE"
        exit 75
      fi
    elif (($(count "") < NUM_WORKERS)); then # a machine that was made anew knows nothing of the run
      silent=$((silent + 1))
      say "only $(count "") of $NUM_WORKERS workers know of the run"
      if ((silent >= 3)); then
        stop_all
        CODE=42
        return
      fi
    else
      unreachable=0 silent=0
      if ((ended && $(count running) == 0)); then break; fi
      if ((ended)) && [[ -z "$first_end" ]]; then first_end="$now"; fi
      # The others of a process that ended may wait for it for ever.
      if [[ -n "$first_end" ]] && ((now - first_end >= GRACE_S)); then
        stop_all
        break
      fi
    fi
    sleep "$POLL_S"
  done
  follow_log
  decide < <(awk '$4 == "ended" { print $6, $5, $1, $2 }' <<<"$STATUS")
}

show_failure() { # WHO is "node host"
  local node="${WHO%% *}" host="${WHO#* }"
  say "worker $host of ${NODES[node]} ended first, with $CODE: $(words_of "$CODE"). Its last lines:"
  ssh_node "${NODES[node]}" all "$(worker "last $RUN_ID $(quote "$host") 40")" 2>/dev/null || true
}

finish() { # code
  local flags=(--name="$NAME" --zone="$ZONE" --project="$PROJECT" --num_slices="$NUM_SLICES" --run_id="$RUN_ID"
    --output_dir="$LOGS_DIR")
  for flag in ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"}; do flags+=(--ssh_flag="$flag"); done
  act bash "$CODE_ROOT/launch/collect_logs.sh" "${flags[@]}" || say "the logs could not be collected"
  if [[ -n "$TEARDOWN_AT_END" ]]; then
    (remove) || true # the code stays that of the run
  else
    say "the machines are still there and cost money; delete them: bash launch/tpu_run.sh --teardown" \
      "--name=$NAME --zone=$ZONE --project=$PROJECT --num_slices=$NUM_SLICES${QUEUED:+ --queued}"
  fi
  exit "$1"
}

detach() {
  exec 2>&3 # not that of the command which was interrupted
  [[ -n "$EXISTS" ]] || {
    say "interrupted; this command has created nothing"
    exit 130
  }
  say "detached; the run goes on. Attach again: $COMMAND_LINE"
  say "end it and delete the machines: the same with --teardown"
  exit 130
}

show_output() {
  [[ -z "$FAILED_NODE" ]] || cat "$SCRATCH/out.$FAILED_NODE" "$SCRATCH/err.$FAILED_NODE" >&2
}

attach_or_start() {
  if [[ -z "$CREATED" ]] && get_status && [[ -n "$STATUS" ]]; then
    ATTEMPT="$(awk '$3 > n { n = $3 } END { print n + 0 }' <<<"$STATUS")"
    if (($(count running))); then
      NUM_WORKERS="$(count "")"
      say "attached to run $RUN_ID, attempt $ATTEMPT"
      return
    fi
  fi
  if ! send_code; then
    show_output
    if is_lost; then return 1; fi
    fail "${NODES[${FAILED_NODE:-0}]} could not be set up (above)"
  fi
  if ! start_attempt; then
    show_output
    if is_lost; then return 1; fi
    stop_all
    fail "training did not start on all workers (above)"
  fi
  if [[ -z "$DRY_RUN" ]]; then
    read_status
    NUM_WORKERS="$(count "")"
  fi
}

main() {
  local restarts=0 begun
  ATTEMPT=0 OFFSET=0 STATUS="" NUM_WORKERS=0
  while :; do
    ensure_vms
    begun="$(date +%s)" CODE=42 # where machines are lost before training begins
    if attach_or_start; then watch; fi
    case "$(meaning_of "$CODE")" in
      'done')
        say "run $RUN_ID: done"
        finish 0
        ;;
      stop)
        show_failure
        finish "$CODE"
        ;;
    esac
    say "run $RUN_ID, attempt $ATTEMPT: $CODE, $(words_of "$CODE")"
    restarts=$((restarts + 1))
    if ((restarts > MAX_RESTARTS)); then
      say "that were $MAX_RESTARTS restarts (--max_restarts); giving up"
      finish "$CODE"
    fi
    sleep "$(backoff $(($(date +%s) - begun > 3600 ? 1 : restarts)))"
  done
}

parse_options own_option "$@"
check
make_scratch
if [[ -n "$TEARDOWN" ]]; then
  remove
  exit
fi
if [[ -n "$TRACE" ]]; then
  if ! ssh_all "$(worker "trace $RUN_ID")"; then
    show_output
    fail "not all workers of $RUN_ID could be asked (above)"
  fi
  say "asked; the traces go to profile/ in the workdir of the run"
  exit
fi
exec 3>&2
trap detach INT TERM HUP
main
