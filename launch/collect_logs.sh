#!/usr/bin/env bash
# Brings the logs of all hosts of a run into one folder, DIR/HOST/attempt_0001/train.log.
#   bash launch/collect_logs.sh --name=NAME --zone=ZONE --project=PROJECT [--num_slices=N] [--run_id=ID]
#   bash launch/collect_logs.sh --kind=gke --name=JOBSET [--namespace=NAMESPACE]
# --output_dir=DIR   where to (default: runs/ID/logs)
# --ssh_flag=F       further flags for gcloud's ssh; may be repeated
# --dry_run          print the commands, run nothing
# Logs of SLURM lie in WORKDIR/slurm already. Pods of a restart are new ones: what GKE still has is the last attempt.
set -euo pipefail

HERE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/lib_common.sh
source "$HERE/lib_common.sh"
# shellcheck source=launch/lib_tpu.sh
source "$HERE/lib_tpu.sh"

NAME="" ZONE="" PROJECT="" NUM_SLICES=1 RUN_ID="" OUTPUT="" KIND=tpu NAMESPACE=default QUEUED="" SSH_FLAGS=()
while (($#)); do
  case "$1" in
    --name=*) NAME="${1#*=}" ;;
    --zone=*) ZONE="${1#*=}" ;;
    --project=*) PROJECT="${1#*=}" ;;
    --num_slices=*) NUM_SLICES="${1#*=}" ;;
    --run_id=*) RUN_ID="${1#*=}" ;;
    --output_dir=*) OUTPUT="${1#*=}" ;;
    --kind=tpu | --kind=gke) KIND="${1#*=}" ;;
    --namespace=*) NAMESPACE="${1#*=}" ;;
    --ssh_flag=*) SSH_FLAGS+=("${1#*=}") ;;
    --dry_run) DRY_RUN=1 ;;
    --help | -h)
      usage_of "${BASH_SOURCE[0]}"
      exit 0
      ;;
    *) fail "unknown option $1; --help shows all" ;;
  esac
  shift
done

need --name "$NAME"
RUN_ID="${RUN_ID:-$NAME}"
check_run_id --run_id "$RUN_ID"
OUTPUT="${OUTPUT:-$CODE_ROOT/runs/$RUN_ID/logs}"
found=0

# The answer of each worker is a file: base64 between two marks, whatever else ssh says around it.
unpack() { # file
  local host
  host="$(sed -n 's/^SORA_JAX_LOGS_BEGIN \([A-Za-z0-9._-]*\)$/\1/p' "$1" | head -n 1)"
  [[ -n "$host" ]] || return 0
  mkdir -p -- "$OUTPUT/$host"
  sed -n '/^SORA_JAX_LOGS_BEGIN /,/^SORA_JAX_LOGS_END /p' "$1" | sed '1d;$d' | base64 --decode |
    tar -xzf - -C "$OUTPUT/$host"
  found=$((found + 1))
}

of_tpu() {
  check_place
  local node file
  for node in "${NODES[@]}"; do
    act mkdir -p -- "$SCRATCH/$node"
    # Workers' output goes to WORKER.log in that folder.
    act "${GCLOUD[@]}" tpu-vm ssh "$node" "${PLACE[@]}" ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --worker=all \
      --output-directory="$SCRATCH/$node" --command="bash ~/sora_jax/$RUN_ID/code/launch/lib_worker.sh pack $RUN_ID" ||
      say "not all workers of $node answered"
    [[ -z "$DRY_RUN" ]] || continue
    for file in "$SCRATCH/$node"/*; do
      [[ ! -f "$file" ]] || unpack "$file"
    done
  done
}

of_gke() {
  check_name --name "$NAME"
  check_form --namespace "$NAMESPACE" '[a-z0-9-]+' "a namespace"
  local pod
  ask kubectl get pods --namespace="$NAMESPACE" --selector="jobset.sigs.k8s.io/jobset-name=$NAME" --output=name ||
    fail "kubectl: $PROBLEM"
  [[ -z "$DRY_RUN" ]] || ANSWER=pod/POD
  for pod in $ANSWER; do
    act mkdir -p -- "$OUTPUT/${pod#pod/}"
    if [[ -n "$DRY_RUN" ]]; then
      show kubectl logs --namespace="$NAMESPACE" "$pod" --all-containers
    elif kubectl logs --namespace="$NAMESPACE" "$pod" --all-containers >"$OUTPUT/${pod#pod/}/train.log"; then
      found=$((found + 1))
    fi
  done
}

make_scratch
"of_$KIND"
[[ -z "$DRY_RUN" ]] || exit 0
((found)) || fail "no logs of $RUN_ID were found"
say "logs of $found hosts are in $OUTPUT"
