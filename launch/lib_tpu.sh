# shellcheck shell=bash disable=SC2034
# Sourced by tpu_run.sh and collect_logs.sh: TPU VMs through gcloud. Wants NAME, ZONE, PROJECT, NUM_SLICES, QUEUED.
# gcloud reference: https://cloud.google.com/sdk/gcloud/reference/compute/tpus

GCLOUD=(gcloud compute tpus)
POLL_S="${SORA_JAX_POLL_S:-30}"
BACKOFF_S="${SORA_JAX_BACKOFF_S:-10}"

check_place() {
  check_name --name "$NAME"
  need --zone "$ZONE"
  check_form --zone "$ZONE" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, as us-east5-a"
  need --project "$PROJECT"
  check_form --project "$PROJECT" '[a-z][a-z0-9.:-]*' "the id of a project"
  check_count --num_slices "$NUM_SLICES"
  PLACE=(--zone="$ZONE" --project="$PROJECT" --quiet)
  NODES=("$NAME")
  if ((NUM_SLICES > 1)); then
    local i
    NODES=()
    for ((i = 0; i < NUM_SLICES; i++)); do NODES+=("$NAME-$i"); done
  fi
}

# --- state: a word of the API, or NONE (there is no such thing), or UNKNOWN (gcloud could not say) ---

state_of() { # kind name format
  STATE=""
  if ask "${GCLOUD[@]}" "$1" describe "$2" "${PLACE[@]}" --format="$3"; then
    STATE="${ANSWER:-NONE}"
  elif [[ "$PROBLEM" == *NOT_FOUND* || "$PROBLEM" == *"not found"* ]]; then
    STATE=NONE
  else
    STATE=UNKNOWN
  fi
}

node_state() {
  state_of tpu-vm "$1" 'value(state)'
}

queue_state() {
  state_of queued-resources "$NAME" 'value(state.state)'
}

# --- creation ---

create_flags() {
  FLAGS=("${PLACE[@]}")
  if [[ -n "$TOPOLOGY" ]]; then
    FLAGS+=(--type="$TPU_TYPE" --topology="$DIMS")
  else
    FLAGS+=(--accelerator-type="$ACCELERATOR")
  fi
  case "$CAPACITY" in
    spot) FLAGS+=(--spot) ;;
    reserved) FLAGS+=(--reserved) ;;
  esac
  FLAGS+=(${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"})
}

create() {
  create_flags
  EXISTS=1 # for an interruption while gcloud is asked
  if [[ -n "$QUEUED" ]]; then
    local nodes=(--node-id="$NAME")
    ((NUM_SLICES == 1)) || nodes=(--node-count="$NUM_SLICES" --node-prefix="$NAME")
    say "asking for $WANTED as queued resource $NAME"
    ask "${GCLOUD[@]}" queued-resources create "$NAME" "${nodes[@]}" --runtime-version="$RUNTIME" "${FLAGS[@]}" ||
      explain_refusal
  else
    say "creating TPU VM $NAME, $WANTED"
    ask "${GCLOUD[@]}" tpu-vm create "$NAME" --version="$RUNTIME" "${FLAGS[@]}" || explain_refusal
  fi
}

# Ends the script where $PROBLEM is one that asking again cannot solve.
give_up_if_hopeless() {
  case "$PROBLEM" in
    *"active account"* | *"auth login"* | *eauthenticat* | *"auth tokens"* | *invalid_grant* | *UNAUTHENTICATED*)
      fail "gcloud is not logged in, or no longer: run gcloud auth login"
      ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      fail "the TPU API is off in project $PROJECT: run gcloud services enable tpu.googleapis.com --project=$PROJECT"
      ;;
    *"denied on 'locations/"*) # what Google says of a zone that does not exist
      fail "there is no zone $ZONE, or project $PROJECT may not use it; those with TPUs:" \
        "gcloud compute tpus locations list --project=$PROJECT"
      ;;
    *"in zone"*"not found"* | *"not found in zone"* | *"nvalid AcceleratorType"* | *"not available in"*)
      fail "zone $ZONE has no ${WANTED%%,*}; what it has:" \
        "gcloud compute tpus accelerator-types list --zone=$ZONE --project=$PROJECT"
      ;;
    *PERMISSION_DENIED* | *"ermission '"*"denied"*)
      echo "$PROBLEM" >&2
      fail "this account may not use TPUs in project $PROJECT (above): check the name, or have it given the role" \
        "roles/tpu.admin"
      ;;
  esac
}

# Ends the script where asking again cannot help; returns where it can.
explain_refusal() {
  give_up_if_hopeless
  echo "$PROBLEM" >&2
  case "$PROBLEM" in
    *[Qq]uota*)
      fail "Google Cloud refused $NAME for want of quota (above); ask for more at" \
        "https://cloud.google.com/tpu/docs/quota, or choose another zone, size or --spot"
      ;;
    *"no more capacity"* | *[Ii]nsufficient* | *RESOURCE_EXHAUSTED* | *stockout* | *UNAVAILABLE* | *"try again"* | \
      *"internal error"* | *"state PREEMPTED"*)
      EXISTS=""
      say "no capacity for $NAME now; --queued waits in Google's queue instead of asking again"
      ;;
    *) fail "Google Cloud refused $NAME (above)" ;;
  esac
}

# It ends the script where $NAME may still be there, and cost money.
remove() {
  local command=("${GCLOUD[@]}" tpu-vm delete "$NAME" "${PLACE[@]}")
  # --force deletes its nodes as well.
  [[ -z "$QUEUED" ]] || command=("${GCLOUD[@]}" queued-resources delete "$NAME" "${PLACE[@]}" --force)
  if ask "${command[@]}"; then
    [[ -n "$DRY_RUN" ]] || say "$NAME is deleted"
  elif [[ "$PROBLEM" == *NOT_FOUND* ]]; then
    say "there is no $NAME in $ZONE${QUEUED:+ among the queued resources}: nothing to delete"
  else
    say "$NAME was not deleted; where it is there, it costs money"
    give_up_if_hopeless
    echo "$PROBLEM" >&2
    fail "$NAME was not deleted (above)"
  fi
}

# Brings STATE to READY, whatever it was: creates, waits, or removes what was preempted and creates anew.
ensure_vms() {
  local asked=0 waited=0 limit="${SORA_JAX_CREATE_TRIES:-10}"
  CREATED=""
  while :; do
    if [[ -n "$QUEUED" ]]; then queue_state; else node_state "$NAME"; fi
    case "$STATE" in NONE | UNKNOWN) ;; *) EXISTS=1 ;; esac
    case "$STATE" in
      READY) return ;;
      ACTIVE)
        are_nodes_ready && return
        ;;
      NONE)
        ((asked < limit)) || fail "$NAME could not be had in $limit tries; try later, elsewhere, or --queued"
        ((asked == 0)) || sleep "$(backoff "$asked")"
        asked=$((asked + 1))
        create
        CREATED=1
        if [[ -n "$DRY_RUN" ]]; then
          [[ -z "$QUEUED" ]] || queue_state # repeated until it says ACTIVE
          return
        fi
        continue
        ;;
      STOPPED)
        ((asked < limit)) || fail "$NAME could not be started in $limit tries; try later, or --teardown and elsewhere"
        ((asked == 0)) || sleep "$(backoff "$asked")"
        asked=$((asked + 1))
        say "$NAME is STOPPED; starting it"
        ask "${GCLOUD[@]}" tpu-vm start "$NAME" "${PLACE[@]}" || explain_refusal
        ;;
      FAILED)
        if [[ -n "$CREATED" ]]; then
          ask "${GCLOUD[@]}" queued-resources describe "$NAME" "${PLACE[@]}" || true
          echo "$ANSWER" >&2
          fail "the queued resource $NAME failed (above); quota, zone and type are the usual causes"
        fi
        remove
        continue
        ;;
      PREEMPTED | TERMINATED | SUSPENDED)
        say "$NAME is $STATE; removing it to create it anew"
        remove
        continue
        ;;
      UNKNOWN)
        give_up_if_hopeless
        echo "$PROBLEM" >&2
        waited=$((waited + 1))
        ((waited < 20)) || fail "gcloud cannot say what state $NAME is in (above); is it logged in, is the API on?"
        ;;
      *) ((waited++ % 10)) || say "$NAME is $STATE; waiting" ;;
    esac
    sleep "$POLL_S"
  done
}

# A slice of an active queued resource may be preempted alone; the set is of use only as a whole.
are_nodes_ready() {
  local node
  for node in "${NODES[@]}"; do
    node_state "$node"
    case "$STATE" in
      READY) ;;
      NONE | PREEMPTED | TERMINATED | STOPPED)
        say "slice $node is $STATE; removing $NAME to create it anew"
        remove
        return 1
        ;;
      *) return 1 ;;
    esac
  done
}

# True where a machine of the run is known to be gone.
is_lost() {
  local node
  for node in "${NODES[@]}"; do
    node_state "$node"
    case "$STATE" in
      NONE | PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | SUSPENDED) return 0 ;;
    esac
  done
  return 1
}

# --- all workers of all slices; slices at once, gcloud takes the workers of one at once ---

ssh_node() { # node worker command
  act "${GCLOUD[@]}" tpu-vm ssh "$1" "${PLACE[@]}" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --worker="$2" --command="$3"
}

# Output in $SCRATCH/out.N and err.N; fails where any slice does. FAILED_NODE says which.
ssh_all() { # command
  local i code=0 jobs=()
  FAILED_NODE=""
  for ((i = 0; i < ${#NODES[@]}; i++)); do
    if [[ -n "$DRY_RUN" ]]; then
      ssh_node "${NODES[i]}" all "$1"
    else
      ssh_node "${NODES[i]}" all "$1" >"$SCRATCH/out.$i" 2>"$SCRATCH/err.$i" &
      jobs+=($!)
    fi
  done
  for ((i = 0; i < ${#jobs[@]}; i++)); do
    wait "${jobs[i]}" || code=1 FAILED_NODE="$i"
  done
  return "$code"
}

copy_all() { # files
  local node
  for node in "${NODES[@]}"; do
    act "${GCLOUD[@]}" tpu-vm scp "$@" "$node:" "${PLACE[@]}" ${SCP_FLAGS[@]+"${SCP_FLAGS[@]}"} --worker=all || return
  done
}
