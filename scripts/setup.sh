# Makes .venv with what this machine needs; sourced by demo.sh and check.sh. A second run skips what is done.
# PYTHON chooses the interpreter (3.10 or newer).
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1 | cut -d. -f1)
  if [ "$driver" -ge 580 ]; then machine=cuda13; else machine=cuda12; fi
  extras=$machine,test
else
  machine=cpu
  extras=test
fi
want="$machine $(cat pyproject.toml scripts/setup.sh | cksum)"

install_all() {
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: lockstep needs Python 3.10 or newer, which $python is not; set PYTHON" >&2; return 1; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv || return 1
  local pip=".venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile"
  if [ "$machine" = cpu ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    # The CPU build where pip can find one; the general build also runs without a GPU but brings gigabytes along.
    $pip 'torch==2.13.0+cpu' 2>/dev/null ||
      { echo "setup: pip finds no CPU build of torch, taking the general one"; $pip 'torch==2.13.0'; } || return 1
  fi
  $pip --editable ".[$extras]" || return 1
  # pip would do so on one core. The exit status tells of files for other versions of Python, which some packages have.
  .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
  echo "$want" > .venv/.lockstep-setup
}

if [ "$(cat .venv/.lockstep-setup 2>/dev/null)" = "$want" ]; then
  echo "setup: .venv is up to date ($machine)"
else
  echo "setup: making .venv for this machine ($machine); takes a minute or two the first time"
  SECONDS=0
  install_all || { echo "error: set-up failed, see above" >&2; exit 1; }
  echo "setup: done in $SECONDS s"
fi
