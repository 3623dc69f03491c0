#!/usr/bin/env bash
# Installs what is missing and runs the tests.
#   bash launch/test.sh [--all] [pytest options]
# --all adds the slow tests. Two files are tested at a time. See launch/environment.sh for the interpreter that is used.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

options=(-m "not slow")
if [[ "${1:-}" == --all ]]; then
  options=(-m "")
  shift
elif [[ "${1:-}" == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi

prepare_environment
prepare_rehearsal
export JAX_PLATFORMS=cpu # libtpu is there to compile, not to find a TPU
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
  options+=(-n 2 --dist loadfile)
fi
cd -- "$ROOT"
exec "$PYTHON" -m pytest "${options[@]}" "$@"
