#!/usr/bin/env bash
# A Slurm job of llm.train, one process a node (or a GPU: GPUS_PER_NODE): jax.distributed finds the others by itself.
#
#   launch/slurm.sh [--dry_run] NODES [SBATCH-OPTION ...] -- --config=... --workdir=DIR [--config.KEY=VALUE ...]
#
# scancel --signal=TERM JOB lets all save and stop; the same command, or Slurm's requeue, goes on from there.
set -euo pipefail

usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry=
if [ "${1:-}" = --dry_run ]; then dry=1; shift; fi
[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || usage
nodes=$1
shift
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ "${1:-}" = -- ] && [ $# -gt 1 ] || usage
shift

per_node=${GPUS_PER_NODE:-1}
script="#!/bin/bash
#SBATCH --job-name=pretune
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$per_node${GPUS_PER_NODE:+
#SBATCH --gpus-per-node=$GPUS_PER_NODE}
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
exec srun --kill-on-bad-exit=1 python -m llm.train --distributed$(printf ' %q' "$@")"
if [ -n "$dry" ]; then
  echo "sbatch${options[*]:+ ${options[*]}} <<'END'"
  echo "$script"
  echo END
else
  sbatch "${options[@]}" <<< "$script"
fi
