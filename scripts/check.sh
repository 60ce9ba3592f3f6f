#!/usr/bin/env bash
# Sets up .venv and runs lint, types and tests, in CI as on a developer's machine.
#   scripts/check.sh            everything that a change can break, at most ten minutes on two cores
#   scripts/check.sh fast       without Ray, processes and the emulator, at most three minutes
#   scripts/check.sh full       also soaks, every signal phase, network namespaces, the browser, 1,000 examples a property
# Further arguments go to pytest, for example: scripts/check.sh fast -k engine
set -euo pipefail
tier=daily
case ${1-} in fast | full) tier=$1 && shift ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
unset PYTHONDONTWRITEBYTECODE  # each of some hundred processes would compile what it imports

# Tests that start ranks and servers wait for much of their time: three processes keep two cores busy.
case $tier in
  fast) left_out="ray or process or emulator or nightly or soak or browser or netns or clients" profile=dev patience_s=300 processes=2 ;;
  daily) left_out="nightly or soak or browser or netns or clients" profile=ci patience_s=300 processes=3 ;;
  full) left_out="" profile=full patience_s=3600 processes=3 ;;
esac
cache=$root/.venv/check_cache
export HYPOTHESIS_PROFILE=${HYPOTHESIS_PROFILE:-$profile}

failed=()
step() {
  local name=$1 started=$SECONDS
  shift
  if "$@"; then echo "check: $name ok in $((SECONDS - started)) s"; else failed+=("$name"); fi
}
types() {
  # mypy names packages after folders, so give it the checkout under the package's name.
  mkdir -p .venv/typecheck && ln -sfn "$root" .venv/typecheck/lockstep
  (cd .venv/typecheck && ../bin/mypy --config-file lockstep/pyproject.toml -p lockstep.kernels -p lockstep.comm -p lockstep.runtime -p lockstep.launch)
}
# Runs the tests that a marker expression selects. None (status 5) is no failure: -k may select others.
tests() {
  local selection=$1
  shift
  rm -rf "$cache"
  run_pytest -m "$selection${left_out:+ and not ($left_out)}" "$@" || alone
}
# A test that hangs ends its process, which prints the stacks of its threads; xdist then names the test.
run_pytest() {
  local status=0
  .venv/bin/python -m pytest -q -o cache_dir="$cache" \
    -o faulthandler_timeout="$patience_s" -o faulthandler_exit_on_timeout=true "$@" || status=$?
  [ "$status" = 0 ] || [ "$status" = 5 ]
}
# Runs up to three failed tests of the daily tier once more, with nothing beside them: processes that share two cores
# with others can be late. A test that passes now is named, for its race must be mended all the same.
alone() {
  local failed=$cache/v/cache/lastfailed again=()
  [ $tier = daily ] && [ -f "$failed" ] || return 1
  mapfile -t again < <(.venv/bin/python -c 'import json, sys; print(*json.load(sys.stdin), sep="\n")' <"$failed")
  [ ${#again[@]} -ge 1 ] && [ ${#again[@]} -le 3 ] || return 1
  run_pytest "${again[@]}" || return 1
  printf 'check: RACE: %s failed beside other tests and passed alone\n' "${again[@]}" >&2
}

step format .venv/bin/ruff format --check --quiet .
step lint .venv/bin/ruff check --quiet .
step types types
step tests tests "not serial" -n $processes --dist loadfile --no-loadscope-reorder "$@"
# All of them start processes. Their files are named to save the collection of the others.
serial=()
[ $# -gt 0 ] || mapfile -t serial < <(grep -rl "mark\.serial" tests --include="test_*.py")
[ $tier = fast ] || step "serial tests" tests serial "${serial[@]}" "$@"

if [ ${#failed[@]} -gt 0 ]; then
  echo "check: FAILED: ${failed[*]}" >&2
  exit 1
fi
echo "check: ok, everything passed in $SECONDS s"
