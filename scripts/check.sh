#!/usr/bin/env bash
# Sets up and runs lint, types and tests: what CI and people run. Arguments go to pytest, for example: -k engine
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

failed=()
step() {
  local name=$1 started=$SECONDS
  shift
  if "$@"; then echo "check: $name ok in $((SECONDS - started)) s"; else failed+=("$name"); fi
}
types() {
  # mypy names packages after folders: give it the checkout under the name of the package, whatever it is called.
  mkdir -p .venv/typecheck && ln -sfn "$root" .venv/typecheck/lockstep
  (cd .venv/typecheck && ../bin/mypy --config-file lockstep/pyproject.toml -p lockstep.kernels -p lockstep.comm -p lockstep.runtime -p lockstep.launch)
}

step format .venv/bin/ruff format --check --quiet .
step lint .venv/bin/ruff check --quiet .
step types types
step tests .venv/bin/python -m pytest -q "$@"

if [ ${#failed[@]} -gt 0 ]; then
  echo "check: FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "check: ok, everything passed in $SECONDS s"
