#!/usr/bin/env bash
# Installs what is missing and runs the tests.
#   bash launch/test.sh [--all] [pytest options]
# --all adds the slow tests. See launch/environment.sh for the interpreter that is used.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

marker=(-m "not slow")
if [[ "${1:-}" == --all ]]; then
  marker=()
  shift
elif [[ "${1:-}" == --help ]]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi

prepare_environment
cd -- "$ROOT"
exec "$PYTHON" -m pytest ${marker[@]+"${marker[@]}"} "$@"
