#!/usr/bin/env bash
# N processes of llm.train on this machine, joined over loopback: what a pod does, without one.
#
#   launch/local.sh [--dry_run] N -- --config=configs/pretrain_gpt.py:tiny --workdir=DIR [--config.KEY=VALUE ...]
#
# Ctrl-C, or SIGTERM to this script, lets all of them save at the same step and stop.
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry=
if [ "${1:-}" = --dry_run ]; then dry=1; shift; fi
[[ "${1:-}" =~ ^[1-9][0-9]*$ && "${2:-}" = -- && $# -gt 2 ]] || usage
count=$1
shift 2

python=python
command -v python > /dev/null || python=python3
command -v "$python" > /dev/null || { echo "error: there is no python on the path" >&2; exit 2; }
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}
pids=()
for (( i = 0; i < count; i++ )); do
  command=(env JAX_COORDINATOR_ADDRESS="localhost:$port" JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$i"
    JAX_NUM_CPU_DEVICES="${JAX_NUM_CPU_DEVICES:-1}" "$python" -m llm.train --distributed "$@")
  if [ -n "$dry" ]; then printf '%q ' "${command[@]}"; echo; continue; fi
  "${command[@]}" &
  pids+=($!)
done
[ -z "$dry" ] || exit 0

# The processes start with SIGINT ignored, as a script's background ones do: only the SIGTERM reaches them.
trap 'kill -TERM "${pids[@]}" 2> /dev/null || true' INT TERM
status=0
for pid in "${pids[@]}"; do
  one=0
  wait "$pid" || one=$?
  while kill -0 "$pid" 2> /dev/null; do   # a trap ended the wait early
    one=0
    wait "$pid" || one=$?
  done
  [ "$one" -le "$status" ] || status=$one
done
exit "$status"
