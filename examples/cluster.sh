#!/usr/bin/env bash
# Starts a Ray cluster with token authentication on this machine and generates on it with two ranks.
#
#     bash examples/cluster.sh [IP] [PORT]
#
# On several machines: copy the token to each, run `ray start --head` on one and
# `ray start --address=IP:PORT` on the others. docs/cluster.md has the details.
set -euo pipefail
ip=${1:-127.0.0.1} port=${2:-6379}

folder=$(mktemp -d)
(umask 077 && python -c "import secrets; print(secrets.token_hex(32), end='')" > "$folder/ray.token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/ray.token"

ray start --head --node-ip-address="$ip" --port="$port" --num-cpus=2 --include-dashboard=false \
  --disable-usage-stats --temp-dir="$folder" --block > "$folder/head.log" 2>&1 &
head=$!
trap 'kill "$head" 2>/dev/null; wait "$head" || true; rm -rf "$folder"' EXIT
until grep -q "Ray runtime started" "$folder/head.log"; do
  kill -0 "$head" 2>/dev/null || { cat "$folder/head.log" >&2; exit 1; }
  sleep 0.2
done

lockstep doctor --tp 2 --ray-address "$ip:$port"
lockstep generate --tp 2 --ray-address "$ip:$port" --max-tokens 24 --seed 1 --prompt "In the beginning"
