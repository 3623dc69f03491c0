# shellcheck shell=bash disable=SC2034
# Sourced by the launch scripts of the machine that starts a run: saying, quoting, dry runs, options, the code
# at its commit, and what an exit code means. Nothing here needs a bash later than 3.2 (macOS); tested with 5.2.

CODE_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN="${DRY_RUN:-}"

say() {
  echo "[launch] $*" >&2
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# One word of a command as it can be pasted into a shell.
quote() {
  case "$1" in
    '') printf "''" ;;
    *[!A-Za-z0-9_./:=,@%+-]*)
      case "$1" in
        *[[:cntrl:]]*) printf '%q' "$1" ;;
        *\'*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
        *) printf "'%s'" "$1" ;;
      esac
      ;;
    *) printf '%s' "$1" ;;
  esac
}

quoted() {
  local word first=1
  for word in "$@"; do
    ((first)) || printf ' '
    first=0
    quote "$word"
  done
}

show() {
  quoted "$@"
  printf '\n'
}

# Runs a command; a dry run prints it instead, one line each.
act() {
  if [[ -n "$DRY_RUN" ]]; then
    show "$@"
  else
    "$@"
  fi
}

# A command whose answer is wanted: $ANSWER, $PROBLEM and the exit code. A dry run prints it; the answer is empty.
ask() {
  ANSWER="" PROBLEM=""
  if [[ -n "$DRY_RUN" ]]; then
    show "$@"
    return 0
  fi
  local code=0
  ANSWER="$("$@" 2>"$SCRATCH/problem")" || code=$?
  PROBLEM="$(cat "$SCRATCH/problem")"
  return "$code"
}

write_lines() {
  local path="$1"
  shift
  if [[ -n "$DRY_RUN" ]]; then
    printf 'printf '
    quote '%s\n'
    printf ' '
    quoted "$@"
    printf ' > '
    quote "$path"
    printf '\n'
  else
    printf '%s\n' "$@" >"$path"
  fi
}

make_scratch() {
  if [[ -n "$DRY_RUN" ]]; then
    SCRATCH="${TMPDIR:-/tmp}"
  else
    SCRATCH="$(mktemp -d)"
    trap 'rm -rf -- "$SCRATCH"' EXIT
  fi
}

usage_of() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
}

# --- options ---

# Options that all scripts which start a run have, and --help; what else there is goes to the function OWN, which
# returns 1 for what it does not know. Flags after -- are those of the training.
parse_options() { # OWN words
  local own="$1"
  shift
  while (($#)); do
    case "$1" in
      --config=*) CONFIG="${1#*=}" ;;
      --workdir=*) WORKDIR="${1#*=}" ;;
      --max_restarts=*) MAX_RESTARTS="${1#*=}" ;;
      --allow_dirty) ALLOW_DIRTY=1 ;;
      --dry_run) DRY_RUN=1 ;;
      --help | -h)
        usage_of "$0"
        exit 0
        ;;
      --)
        shift
        TRAIN_FLAGS=("$@")
        return
        ;;
      *) "$own" "$1" || fail "unknown option $1; --help shows all, flags of sora_jax.train go after --" ;;
    esac
    shift
  done
}

need() { # option value
  [[ -n "$2" ]] || fail "$1 is needed; --help shows all options"
}

need_tool() { # name remedy; a dry run does without
  [[ -n "$DRY_RUN" ]] || command -v "$1" >/dev/null || fail "$1 is not on the PATH: $2"
}

check_form() { # option value pattern what
  [[ "$2" =~ ^$3$ ]] || fail "$1=$2 is not $4"
}

check_count() {
  check_form "$1" "$2" '[1-9][0-9]{0,5}' "a whole number above 0"
}

check_name() {
  check_form "$1" "$2" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' \
    "a name: small letters, digits and -, first a letter, at most 40"
}

check_run_id() {
  check_form "$1" "$2" '[A-Za-z0-9][A-Za-z0-9._-]{0,62}' "a run id: letters, digits, . _ -, at most 63"
}

check_config() {
  need --config "$1"
  local file="${1%%:*}"
  case "$file" in
    /* | *..*) fail "--config=$1: name a file of the repository, as configs/quickstart.py" ;;
  esac
  # What is copied is the commit, so the file must be part of it.
  [[ -f "$CODE_ROOT/$file" ]] || fail "--config=$1: there is no $file in $CODE_ROOT"
}

# Flags for sora_jax.train; the scripts set --config and --workdir themselves.
check_train_flags() {
  local flag
  for flag in "$@"; do
    case "$flag" in
      --config | --config=* | --workdir | --workdir=*)
        fail "$flag after --: this script sets ${flag%%=*} itself; give it before --"
        ;;
      --?*) ;;
      *) fail "'$flag' after --: not a flag of sora_jax.train; write --flag=VALUE, without a space" ;;
    esac
  done
}

# A Python here that has the packages, or nothing: nothing is installed for a check.
find_checker() {
  local candidate
  local has='import sys; from importlib.util import find_spec as f; sys.exit(sys.version_info < (3, 11)
    or not all(map(f, ("jax", "flax", "optax", "orbax", "grain", "ml_collections", "av", "tokenizers"))))'
  for candidate in "${SORA_JAX_PYTHON:-}" "${SORA_JAX_VENV:-$CODE_ROOT/.venv}/bin/python" python3 python; do
    if [[ -n "$candidate" ]] && command -v "$candidate" >/dev/null && "$candidate" -c "$has" 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
}

# What the trainer would say of the config at its start, before machines are paid for. Devices 0: not known.
check_settings() { # devices slices
  local python check said code=0
  python="$(find_checker)"
  if [[ -z "$python" ]]; then
    say "no Python with the packages here (SORA_JAX_PYTHON names one): a wrong --config shows on the machines only"
    return
  fi
  check=("$python" -m sora_jax.train --check_config --check_devices="$1" --check_slices="$2" --config="$CONFIG"
    --workdir="$WORKDIR" ${TRAIN_FLAGS[@]+"${TRAIN_FLAGS[@]}"})
  said="$(cd -- "$CODE_ROOT" && JAX_PLATFORMS=cpu PYTHONPATH="$CODE_ROOT" "${check[@]}" 2>&1)" || code=$?
  case "$code" in
    0) ;;
    2)
      grep '^error: ' <<<"$said" >&2 || echo "$said" >&2
      exit 2
      ;;
    *) say "the config was not checked, $python fails: $(tail -n 1 <<<"$said")" ;;
  esac
}

check_accelerator() { # v5p counts cores, two a chip
  local cores="${1##*-}"
  ((10#$cores > 0)) || fail "--accelerator=$1 has no chips"
  [[ "$1" != v5p-* ]] || ((10#$cores % 2 == 0)) ||
    fail "--accelerator=$1: v5p counts cores, two a chip, so the number is even"
}

# v5p:4x4x4 -> GENERATION=v5p DIMS=4x4x4 CHIPS=64
parse_topology() {
  check_form --topology "$1" '(v5e|v5p|v6e|tpu7x):[0-9]+x[0-9]+(x[0-9]+)?' \
    "a topology, as v5p:4x4x4 or v6e:8x8 (v5e, v5p, v6e, tpu7x)"
  GENERATION="${1%%:*}" DIMS="${1#*:}"
  CHIPS=1
  local dim
  for dim in ${DIMS//x/ }; do
    CHIPS=$((CHIPS * 10#$dim))
  done
  ((CHIPS)) || fail "--topology=$1 has no chips"
  local wanted=3 given=2
  [[ "$GENERATION" != v5e && "$GENERATION" != v6e ]] || wanted=2
  [[ "$DIMS" != *x*x* ]] || given=3
  ((given == wanted)) || fail "--topology=$1: $GENERATION has $wanted dimensions, as ${GENERATION}:$([[ $wanted == 2 ]] && echo 8x8 || echo 4x4x4)"
  for dim in ${DIMS//x/ }; do
    dim=$((10#$dim))
    ((wanted == 3 || dim <= 16)) || fail "--topology=$1: $GENERATION ends at 16x16"
    [[ "$GENERATION" != v5p ]] || ((dim <= 2 || dim % 4 == 0)) ||
      fail "--topology=$1: a dimension of v5p is 1, 2 or a multiple of 4"
  done
}

# --- the code at its commit ---

# Sets COMMIT (a label) and TREE (what to archive). Only what git knows is copied, so a dirty tree would run
# something else than what lies on the disk.
find_commit() { # allow_dirty
  local head dirty stash
  head="$(git -C "$CODE_ROOT" rev-parse --verify HEAD 2>/dev/null)" ||
    fail "$CODE_ROOT is not a git checkout; the code is copied at its commit"
  COMMIT="$head" TREE="$head"
  dirty="$(git -C "$CODE_ROOT" status --porcelain)"
  [[ -n "$dirty" ]] || return 0
  if [[ -z "$1" ]]; then
    fail "files are not committed ($(echo "$dirty" | head -n 3 | sed 's/^...//' | paste -s -d ' ' -)...); commit" \
      "them, or say --allow_dirty to send changed files as they are (new files stay behind)"
  fi
  stash="$(git -C "$CODE_ROOT" stash create)"
  COMMIT="$head-dirty" TREE="${stash:-$head}"
}

# --- exit codes ---

# done, restart or stop. 42 stopped and saved, 43 hang, 44 diverged or damaged, 127 and above: killed or aborted, among
# them 142: hung, where only SIGALRM could end it.
meaning_of() {
  case "$1" in
    0) echo 'done' ;;
    42 | 43 | 12[7-9] | 1[3-9][0-9] | 2[0-9][0-9]) echo restart ;;
    *) echo stop ;;
  esac
}

words_of() {
  case "$1" in
    0) echo "done" ;;
    1) echo "a fault of the program" ;;
    2) echo "a mistake in what was asked" ;;
    42) echo "stopped from outside, saved" ;;
    43) echo "hung, ended by the watchdog" ;;
    44) echo "diverged, or its checkpoints are damaged" ;;
    134) echo "aborted (a peer was lost, or the runtime failed)" ;;
    137) echo "killed" ;;
    142) echo "hung in the interpreter itself, ended by the watchdog" ;;
    *) echo "exit code $1" ;;
  esac
}

# Reads lines "ended_epoch code who"; sets CODE and WHO to the end that decides: the earliest, since peers of a lost
# process end later and with other codes. Of ends within 5 s, the gravest: stop, then restart, then done.
decide() {
  local ended code who first="" grade best=-1 rest=""
  CODE=0 WHO=""
  while read -r ended code who || [[ -n "$ended" ]]; do
    [[ -n "$ended" ]] || continue
    rest+="$ended $code $who"$'\n'
    if [[ -z "$first" ]] || ((ended < first)); then first="$ended"; fi
  done
  while read -r ended code who; do
    if [[ -z "$ended" ]] || ((ended > first + 5)); then continue; fi
    case "$(meaning_of "$code")" in
      stop) grade=2 ;;
      restart) grade=1 ;;
      *) grade=0 ;;
    esac
    if ((grade > best)); then
      best="$grade" CODE="$code" WHO="$who"
    fi
  done <<<"$rest"
}

# Runs a command as a child that is told of SIGTERM (for SIGINT too) and SIGUSR1. CODE: how it ended; TOLD: how often
# it was told to end.
run_child() {
  local before again
  CODE="" TOLD=0 ASKED=0 CHILD=""
  # Before there is a child: a signal in between would end this script alone and leave the child behind.
  trap 'TOLD=$((TOLD + 1)); [[ -z "$CHILD" ]] || kill -TERM "$CHILD" 2>/dev/null || true' TERM INT
  trap 'ASKED=$((ASKED + 1)); [[ -z "$CHILD" ]] || kill -USR1 "$CHILD" 2>/dev/null || true' USR1
  "$@" &
  CHILD=$!
  ((TOLD == 0)) || kill -TERM "$CHILD" 2>/dev/null || true
  while :; do
    before=$((TOLD + ASKED)) again=0
    wait "$CHILD" 2>/dev/null || again=$?
    # 127: known already, as the signal came after its end.
    if [[ -z "$CODE" ]] || ((again != 127)); then CODE=$again; fi
    # A signal ends wait with 143, also where the child has ended meanwhile: only asking again tells how.
    ((TOLD + ASKED != before)) || return 0
  done
}

# Seconds to wait before the nth restart: doubles from $BACKOFF_S, at most 5 minutes.
backoff() {
  local wait="$BACKOFF_S" i
  for ((i = 1; i < $1; i++)); do
    wait=$((wait * 2))
    ((wait < 300)) || break
  done
  echo $((wait < 300 ? wait : 300))
}
