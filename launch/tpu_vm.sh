#!/usr/bin/env bash
# A TPU slice on Google Cloud: made or reused, set up, trained on until the run is finished, and given back.
#
#   launch/tpu_vm.sh [--dry_run] create
#   launch/tpu_vm.sh [--dry_run] run -- --config=... --workdir=DIR [--config.KEY=VALUE ...]
#   launch/tpu_vm.sh [--dry_run] status | logs | stop
#
# Settings come from the environment: NAME, ZONE, TYPE (v5litepod-16), and if they are needed PROJECT, VERSION (of the TPU
# software), SPOT=1. `run` goes on after a preemption until training is finished; `stop` ends it and deletes the slice.
set -euo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry=
if [ "${1:-}" = --dry_run ]; then dry=1; shift; fi
verb=${1:-}
[ $# -gt 0 ] && shift
for needed in NAME ZONE; do
  [ -n "${!needed:-}" ] || { echo "error: $needed is not set: NAME of the slice and its ZONE, e.g. NAME=my-slice ZONE=us-central2-b" >&2; exit 2; }
done
type=${TYPE:-v5litepod-16} version=${VERSION:-tpu-ubuntu2204-base}
where=(--zone="$ZONE" ${PROJECT:+--project="$PROJECT"})

# Runs a command, or prints exactly what would be run.
act() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
state() { gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2> /dev/null || echo NONE; }
on_workers() { act gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2"; }

create() {
  if [ -z "$dry" ] && [ "$(state)" != NONE ]; then echo "$NAME is there: $(state)"; return; fi
  act gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --accelerator-type="$type" --runtime-version="$version" \
    --node-id="$NAME" ${SPOT:+--spot}
}

wait_until_active() {
  [ -z "$dry" ] || return 0
  while [ "$(state)" != ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED) act gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --quiet --force; create ;; NONE) create ;; esac
    echo "waiting for $NAME: $(state)"
    sleep 30
  done
}

install() {
  act tar --create --gzip --file=/tmp/pretune.tar.gz --exclude=.git --exclude=.venv --exclude=./runs --exclude='./quickstart*' \
    --directory="$(dirname "$0")/.." .
  act gcloud compute tpus tpu-vm scp /tmp/pretune.tar.gz "$NAME":pretune.tar.gz "${where[@]}" --worker=all
  # The image's own Python may be older than what this needs: uv brings one.
  on_workers all "mkdir -p pretune && tar -xzf pretune.tar.gz -C pretune && cd pretune && python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.11 .venv && python3 -m uv pip install -q --python .venv/bin/python -c constraints.txt -e '.[tpu,gcs]'"
}

run() {
  [ "${1:-}" = -- ] && [ $# -gt 1 ] || usage
  shift
  local train
  train="cd pretune && .venv/bin/python -m llm.train --distributed$(printf ' %q' "$@") > run.log 2>&1"
  while true; do
    create
    wait_until_active
    install
    # Worker 0's log is followed while all workers train; what ssh returns is what training returned.
    local follower=
    if [ -z "$dry" ]; then
      gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=0 --command="tail -n +1 -F --retry pretune/run.log" &
      follower=$!
    fi
    local ended=0
    on_workers all "$train" || ended=$?
    [ -z "$follower" ] || kill "$follower" 2> /dev/null || true
    if [ "$ended" = 0 ]; then
      [ -n "$dry" ] || echo "finished"
      return 0
    fi
    case $(state) in   # no preemption, but a fault of the run, or somebody's `stop`
      ACTIVE | NONE | DELETING) echo "training ended with status $ended; see launch/tpu_vm.sh logs" >&2; return 1 ;;
    esac
    echo "preempted: going on from the last checkpoint"
  done
}

case $verb in
  create) create ;;
  run) run "$@" ;;
  status) act gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" ;;
  logs) on_workers 0 "tail -n 200 pretune/run.log" ;;
  stop)
    on_workers all "pkill -TERM -f '[l]lm.train' || true" || true   # an unreachable worker must not keep the slice alive
    act sleep 60   # the run saves
    act gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --quiet --force ;;
  *) usage ;;
esac
