# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python, makes .venv with the pinned packages, sets PYTHON.
# SORA_JAX_PYTHON=PATH uses that interpreter as it is and installs nothing.

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${SORA_JAX_VENV:-$ROOT/.venv}"

fail() {
  echo "error: $*" >&2
  exit 2
}

is_recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

has_pins() {
  is_recent "$1" && [[ -f "$(pins_of "$1")" ]]
}

pins_of() {
  "$1" -c 'import sys; print("'"$ROOT"'/launch/requirements/py%d%d.txt" % sys.version_info[:2])'
}

find_python() {
  local candidate
  # Versions with exact pins first.
  for candidate in python3.12 python3.13 python3.11 python3 python; do
    if command -v "$candidate" >/dev/null && has_pins "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  for candidate in python3 python; do
    if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  local base="$1" pins="$2"
  # A build that another Python made, or that was interrupted, is of no use.
  rm -rf -- "$VENV"
  if ! "$base" -m venv "$VENV" >/dev/null 2>&1; then
    rm -rf -- "$VENV"
    # Debian and Ubuntu ship venv apart; virtualenv, where present, does without it.
    "$base" -m virtualenv -q "$VENV" >/dev/null 2>&1 ||
      fail "$base cannot make a virtual environment; install its venv package (Debian, Ubuntu: python3-venv)"
  fi
  echo "installing packages into $VENV" >&2
  if [[ -f "$pins" ]]; then
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check -r "$pins" ||
      fail "the packages of $pins could not be installed; see above"
    cp -- "$pins" "$VENV/pins.txt"
  else
    echo "note: no pins for this Python; taking the newest versions that setup.cfg allows" >&2
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "${ROOT}[test]" ||
      fail "the packages of setup.cfg could not be installed; see above"
    "$VENV/bin/python" -m pip uninstall -qq -y sora_jax # the clone itself is what runs
    cp -- "$ROOT/setup.cfg" "$VENV/pins.txt"
  fi
}

prepare_environment() {
  if [[ -n "${SORA_JAX_PYTHON:-}" ]]; then
    PYTHON="$SORA_JAX_PYTHON"
    is_recent "$PYTHON" || fail "SORA_JAX_PYTHON=$PYTHON is not a Python of version 3.11 or later"
  else
    local base pins wanted
    base="$(find_python)" || fail "no Python of version 3.11 or later found; install one (https://www.python.org)"
    PYTHON="$VENV/bin/python"
    if is_recent "$PYTHON"; then
      base="$PYTHON" # an environment that is there decides
    fi
    pins="$(pins_of "$base")"
    wanted="$pins"
    [[ -f "$wanted" ]] || wanted="$ROOT/setup.cfg"
    if ! is_recent "$PYTHON" || ! cmp -s -- "$wanted" "$VENV/pins.txt"; then
      [[ "$base" != "$PYTHON" ]] || base="$(find_python)"
      make_venv "$base" "$(pins_of "$base")"
    fi
  fi
  export PYTHON
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

# What compiles for a TPU slice without one, for tests and rehearsals; the quickstart does without (200 MB).
prepare_rehearsal() {
  local pins
  if "$PYTHON" -c 'import libtpu' 2>/dev/null; then
    return
  fi
  pins="$("$PYTHON" -c 'import sys; print("'"$ROOT"'/launch/requirements/rehearse_py%d%d.txt" % sys.version_info[:2])')"
  if [[ -n "${SORA_JAX_PYTHON:-}" || ! -f "$pins" ]]; then
    echo "note: libtpu is not installed; rehearsals of TPU slices are skipped" >&2
    return
  fi
  echo "installing libtpu into $VENV" >&2
  "$PYTHON" -m pip install -qq --disable-pip-version-check -r "$pins" ||
    echo "note: libtpu could not be installed; rehearsals of TPU slices are skipped" >&2
}
