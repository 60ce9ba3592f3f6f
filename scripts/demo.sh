#!/usr/bin/env bash
# Sets up and generates with the bundled demo model on two tensor-parallel ranks, each a Ray actor. No download, no GPU needed.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

SECONDS=0
if .venv/bin/lockstep generate --tp 2 --max-tokens 60 --seed 11 \
  --prompt "In the beginning" --prompt "And the king said unto" --prompt "Blessed is the man that"; then
  echo "demo: ok, three texts from two ranks in $SECONDS s"
else
  echo "demo: FAILED, see the error above" >&2
  exit 1
fi
