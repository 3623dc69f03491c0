#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster: as a JobSet that kubectl applies, or as a workload that XPK creates. Kubernetes starts
# it again after exit codes 42, 43 and 127-255, never after 1, 2, 44. See docs/pod_runs.md.
#   bash launch/gke_run.sh --name=NAME --topology=v6e:8x8 --config=configs/NAME.py --workdir=gs://BUCKET/RUN \
#     --image=REGION-docker.pkg.dev/PROJECT/REPO/NAME:TAG [options] [-- further flags of sora_jax.train]
# --build               build the image from the commit and push it first (docker)
# --num_slices=N        several such slices
# --max_restarts=N      default: 50
# --spot                nodes of spot capacity
# --namespace=, --queue=, --service_account=   of Kubernetes; --queue names a LocalQueue of Kueue
# --chips_per_host=N    default: 4, or all where the slice has fewer
# --output=FILE         where the rendered JobSet goes (default: runs/NAME/jobset.yaml)
# --backend=xpk --cluster= --zone= --project=   through xpk workload create instead
# --follow              wait for its end, show the failed pod's last lines; exit code of the run
# --teardown            delete the JobSet or workload and stop there (node pools stay)
# --allow_dirty         build from changed files that are not committed
# --dry_run             print the commands and the JobSet, run nothing
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/lib_common.sh
source "$HERE/lib_common.sh"

NAME="" TOPOLOGY="" CONFIG="" WORKDIR="" IMAGE="" BUILD="" NUM_SLICES=1 MAX_RESTARTS=50 SPOT="" NAMESPACE=default
QUEUE="" SERVICE_ACCOUNT="" CHIPS_PER_HOST="" OUTPUT="" BACKEND=jobset CLUSTER="" ZONE="" PROJECT="" FOLLOW=""
TEARDOWN="" ALLOW_DIRTY="" TRAIN_FLAGS=()
POLL_S="${SORA_JAX_POLL_S:-30}"

own_option() { # option
  case "$1" in
    --name=*) NAME="${1#*=}" ;;
    --topology=*) TOPOLOGY="${1#*=}" ;;
    --image=*) IMAGE="${1#*=}" ;;
    --num_slices=*) NUM_SLICES="${1#*=}" ;;
    --namespace=*) NAMESPACE="${1#*=}" ;;
    --queue=*) QUEUE="${1#*=}" ;;
    --service_account=*) SERVICE_ACCOUNT="${1#*=}" ;;
    --chips_per_host=*) CHIPS_PER_HOST="${1#*=}" ;;
    --output=*) OUTPUT="${1#*=}" ;;
    --backend=jobset | --backend=xpk) BACKEND="${1#*=}" ;;
    --cluster=*) CLUSTER="${1#*=}" ;;
    --zone=*) ZONE="${1#*=}" ;;
    --project=*) PROJECT="${1#*=}" ;;
    --build) BUILD=1 ;;
    --spot) SPOT=1 ;;
    --follow) FOLLOW=1 ;;
    --teardown) TEARDOWN=1 ;;
    *) return 1 ;;
  esac
}

check() {
  need --name "$NAME"
  check_name --name "$NAME"
  check_form --namespace "$NAMESPACE" '[a-z0-9]([-a-z0-9]*[a-z0-9])?' "a namespace"
  if [[ "$BACKEND" == xpk ]]; then
    need --cluster "$CLUSTER"
    need --zone "$ZONE"
    need --project "$PROJECT"
    XPK_PLACE=(--cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT")
  fi
  if [[ "$BACKEND" == xpk ]]; then need_tool xpk "https://github.com/AI-Hypercomputer/xpk"; fi
  [[ "$BACKEND" == xpk && -z "$FOLLOW" ]] || need_tool kubectl "gcloud components install kubectl"
  [[ -z "$BUILD" ]] || need_tool docker "install it, or leave --build and name an image that is there"
  [[ -z "$TEARDOWN" ]] || return 0
  need --topology "$TOPOLOGY"
  parse_topology "$TOPOLOGY"
  # https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
  case "$GENERATION" in
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
    tpu7x) ACCELERATOR=tpu7x ;;
  esac
  CHIPS_PER_HOST="${CHIPS_PER_HOST:-$((CHIPS < 4 ? CHIPS : 4))}"
  check_count --chips_per_host "$CHIPS_PER_HOST"
  ((CHIPS % CHIPS_PER_HOST == 0)) ||
    fail "--topology=$TOPOLOGY has $CHIPS chips, which hosts of --chips_per_host=$CHIPS_PER_HOST do not divide"
  HOSTS=$((CHIPS / CHIPS_PER_HOST))
  check_count --num_slices "$NUM_SLICES"
  check_form --max_restarts "$MAX_RESTARTS" '[0-9]{1,5}' "a whole number"
  [[ -z "$QUEUE" ]] || check_form --queue "$QUEUE" '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' "the name of a queue"
  [[ -z "$SERVICE_ACCOUNT" ]] ||
    check_form --service_account "$SERVICE_ACCOUNT" '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' "a Kubernetes service account"
  check_config "$CONFIG"
  need --image "$IMAGE"
  check_form --image "$IMAGE" '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "the name of an image"
  need --workdir "$WORKDIR"
  [[ "$WORKDIR" == gs://?*/?* ]] ||
    fail "--workdir=$WORKDIR: name gs://BUCKET/RUN; what lies in a pod is lost at each restart"
  buckets >/dev/null # their names, before anything is built
  check_train_flags ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}
  OUTPUT="${OUTPUT:-$CODE_ROOT/runs/$NAME/jobset.yaml}"
  find_commit "$ALLOW_DIRTY"
  local devices=$((CHIPS * NUM_SLICES))
  [[ "$GENERATION" != tpu7x ]] || devices=$((devices * 2)) # two a chip
  check_settings "$devices" "$NUM_SLICES"
}

# --- rendering ---

json() { # a string as JSON, which YAML takes as well; Kubernetes would put a variable in the place of $(NAME)
  printf '"'
  # shellcheck disable=SC2016
  printf '%s' "$1" | sed -e 's/\\/\\\\/g' -e 's/"/\\"/g' -e 's/\$(/$$(/g' |
    awk 'NR > 1 { printf "\\n" } { printf "%s", $0 }'
  printf '"'
}

json_list() {
  local word comma=""
  printf '['
  for word in "$@"; do
    printf '%s' "$comma"
    json "$word"
    comma=", "
  done
  printf ']'
}

variable() { # name value
  printf '{name: %s, value: ' "$1"
  json "$2"
  printf '}'
}

restart_codes() {
  printf '[42, 43'
  printf ', %d' $(seq 127 255)
  printf ']'
}

buckets() {
  local value
  for value in "$WORKDIR" ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"}; do
    case "$value" in
      gs://*) value="${value#gs://}" ;;
      --*=gs://*) value="${value#*=gs://}" ;;
      *) continue ;;
    esac
    value="${value%%/*}"
    [[ "$value" =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "gs://$value is not a bucket"
    printf '%s\n' "$value"
  done | sort -u
}

# Each bucket of the workdir and of the flags, mounted at /buckets/NAME; lib_worker.sh translates gs:// to that.
volumes() {
  local names name comma="" options="implicit-dirs,rename-dir-limit=200000,metadata-cache:ttl-secs:0"
  local i=0
  MOUNTS="[" VOLUMES="["
  names="$(buckets)"
  for name in $names; do
    MOUNTS+="$comma{name: bucket-$i, mountPath: /buckets/$name}"
    VOLUMES+="$comma{name: bucket-$i, csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes:"
    VOLUMES+=" {bucketName: $name, mountOptions: \"$options\"}}}"
    comma=", " i=$((i + 1))
  done
  MOUNTS+="]" VOLUMES+="]"
}

# Replaces @KEY@ literally, whatever the value holds; a line whose only content becomes empty goes.
render() { # KEY=value ...
  awk '
    BEGIN {
      for (i = 1; i < ARGC; i++) {
        at = index(ARGV[i], "=")
        values["@" substr(ARGV[i], 1, at - 1) "@"] = substr(ARGV[i], at + 1)
        ARGV[i] = ""
      }
    }
    {
      line = $0; out = ""; found = 0
      while (match(line, /@[A-Z_]+@/)) {
        key = substr(line, RSTART, RLENGTH)
        out = out substr(line, 1, RSTART - 1) (key in values ? values[key] : key)
        line = substr(line, RSTART + RLENGTH); found = 1
      }
      out = out line
      if (!found || out !~ /^ *$/) print out
    }' "$@" <"$HERE/templates/jobset.yaml"
}

jobset() {
  local bucket_note="" env MOUNTS VOLUMES
  volumes
  [[ "$VOLUMES" == "[]" ]] || bucket_note='gke-gcsfuse/volumes: "true"'
  env="[$(variable SORA_JAX_RUN_ID "$NAME"), $(variable SORA_JAX_CONFIG "$CONFIG")"
  env+=", $(variable SORA_JAX_WORKDIR "$WORKDIR"), $(variable SORA_JAX_GENERATION "$GENERATION")"
  env+=", $(variable SORA_JAX_BUCKETS /buckets)]"
  local pairs=(NAME="$NAME" NAMESPACE="$NAMESPACE" MAX_RESTARTS="$MAX_RESTARTS" NUM_SLICES="$NUM_SLICES"
    HOSTS="$HOSTS" ACCELERATOR="$ACCELERATOR" TOPOLOGY="$DIMS" IMAGE="$(json "$IMAGE")" ENV="$env"
    CHIPS_PER_HOST="$CHIPS_PER_HOST" RESTART_CODES="$(restart_codes)" MOUNTS="$MOUNTS" VOLUMES="$VOLUMES"
    ARGS="$(json_list ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"})" BUCKET_ANNOTATION="${bucket_note:-{\}}"
    QUEUE_LABEL="${QUEUE:+kueue.x-k8s.io/queue-name: $QUEUE}" SPOT="${SPOT:+cloud.google.com/gke-spot: \"true\"}"
    SERVICE_ACCOUNT="${SERVICE_ACCOUNT:+serviceAccountName: $SERVICE_ACCOUNT}")
  render "${pairs[@]}"
}

# --- steps ---

build_image() {
  local tar="$SCRATCH/sora_jax-$NAME.tar"
  say "building $IMAGE from commit $COMMIT"
  act git -C "$CODE_ROOT" archive --format=tar --output="$tar" "$TREE"
  local build=(docker build -f launch/templates/Dockerfile --build-arg "COMMIT=$COMMIT" -t "$IMAGE" -)
  if [[ -n "$DRY_RUN" ]]; then
    printf '%s < %s\n' "$(quoted "${build[@]}")" "$(quote "$tar")"
  else
    "${build[@]}" <"$tar" || fail "the image could not be built (above)"
  fi
  act docker push "$IMAGE" ||
    fail "$IMAGE could not be pushed (above); where it was denied: gcloud auth configure-docker ${IMAGE%%/*}"
}

apply_jobset() {
  act mkdir -p -- "$(dirname -- "$OUTPUT")"
  if [[ -n "$DRY_RUN" ]]; then
    echo "cat > $(quote "$OUTPUT") <<'JOBSET'"
    jobset
    echo JOBSET
  else
    jobset >"$OUTPUT"
  fi
  ask kubectl apply --filename="$OUTPUT" || explain_kubectl
  [[ "$ANSWER" != *unchanged* ]] ||
    say "this very JobSet is there already: nothing was started anew; where it has ended, --teardown comes first"
}

explain_kubectl() {
  case "$PROBLEM" in
    *"must be logged in"* | *Unauthorized* | *current-context* | *" refused"* | *auth-plugin* | *"auth login"*)
      fail "kubectl reaches no cluster, or is not logged in: run gcloud container clusters get-credentials CLUSTER" \
        "--location=ZONE --project=PROJECT"
      ;;
    *"no matches for kind"*) fail "the cluster has no JobSet controller: https://jobset.sigs.k8s.io/docs/installation" ;;
    *immutable*) fail "another JobSet $NAME is there: end it with --teardown, or choose another --name" ;;
  esac
  echo "$PROBLEM" >&2
  fail "kubectl refused $OUTPUT (above)"
}

create_workload() {
  local type command bucket
  # Type names count cores for v5p, chips for v5e and v6e.
  case "$GENERATION" in
    v5p) type="v5p-$((CHIPS * 2))" ;;
    v5e) type="v5litepod-$CHIPS" ;;
    tpu7x) type="tpu7x-$DIMS" ;;
    *) type="$GENERATION-$CHIPS" ;;
  esac
  for bucket in $(buckets); do
    say "gs://$bucket must be attached to the cluster at /buckets/$bucket: xpk storage attach (docs/pod_runs.md)"
  done
  command="SORA_JAX_RUN_ID=$NAME SORA_JAX_GENERATION=$GENERATION SORA_JAX_BUCKETS=/buckets"
  command+=" SORA_JAX_CONFIG=$(quote "$CONFIG") SORA_JAX_WORKDIR=$(quote "$WORKDIR")"
  command+=" bash launch/lib_worker.sh pod $(quoted ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"})"
  local spot=()
  [[ -z "$SPOT" ]] || spot=(--spot)
  # XPK restarts on 42 and 127-255 by itself; 43 is told.
  act xpk workload create --workload="$NAME" "${XPK_PLACE[@]}" --tpu-type="$type" --num-slices="$NUM_SLICES" \
    --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=43 \
    --termination-grace-period-seconds=120 ${spot[@]+"${spot[@]}"} --command="${command% }" ||
    fail "xpk refused the workload (above)"
}

remove() {
  if [[ "$BACKEND" == xpk ]]; then
    act xpk workload delete --workload="$NAME" "${XPK_PLACE[@]}" --force
  else
    act kubectl delete jobset "$NAME" --namespace="$NAMESPACE" --ignore-not-found
  fi
}

# The terminal state of a JobSet is Completed or Failed, the codes are in the pods.
follow() {
  local failures=0 codes
  while :; do
    if ask kubectl get jobset "$NAME" --namespace="$NAMESPACE" --output='jsonpath={.status.terminalState}'; then
      failures=0
      [[ -z "$DRY_RUN" ]] || return 0
      case "$ANSWER" in
        Completed)
          say "$NAME: done"
          return 0
          ;;
        Failed) break ;;
      esac
    else
      failures=$((failures + 1))
      ((failures < 20)) || fail "kubectl: $PROBLEM"
    fi
    sleep "$POLL_S"
  done
  codes='{range .items[*]}{.status.containerStatuses[?(@.name=="train")].state.terminated.finishedAt} '
  codes+='{.status.containerStatuses[?(@.name=="train")].state.terminated.exitCode} {.metadata.name}{"\n"}{end}'
  ask kubectl get pods --namespace="$NAMESPACE" --selector="jobset.sigs.k8s.io/jobset-name=$NAME" \
    --output="jsonpath=$codes" || fail "kubectl: $PROBLEM"
  CODE="" WHO=""
  read -r _ CODE WHO < <(awk 'NF == 3 && $2 != 0' <<<"$ANSWER" | sort) || true
  [[ -n "$CODE" ]] || fail "$NAME failed and its pods are gone; kubectl describe jobset $NAME says why"
  say "pod $WHO ended first, with $CODE: $(words_of "$CODE"). Its last lines:"
  kubectl logs --namespace="$NAMESPACE" "$WHO" --container=train --tail=40 || true
  exit "$CODE"
}

parse_options own_option "$@"
check
make_scratch
if [[ -n "$TEARDOWN" ]]; then
  remove
  exit
fi
[[ -z "$BUILD" ]] || build_image
if [[ "$BACKEND" == xpk ]]; then create_workload; else apply_jobset; fi
say "watch: kubectl logs --follow --namespace=$NAMESPACE --selector=jobset.sigs.k8s.io/jobset-name=$NAME --prefix"
say "end it: bash launch/gke_run.sh --teardown --name=$NAME --namespace=$NAMESPACE; node pools cost money until deleted"
if [[ -n "$FOLLOW" ]]; then follow; fi
