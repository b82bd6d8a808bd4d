#!/usr/bin/env bash
# The same run under Hugging Face Accelerate's launcher: it starts the processes, and each is `distdl train`.
#
#   bash launch/accelerate.sh [CONFIG] [PROCS] [KEY=VALUE ...]     e.g. configs/fashion_cnn.yaml 4 train.epochs=2
#
# On GPUs. On a CPU `accelerate launch --cpu` starts one process whatever it is asked for, and distdl refuses that;
# use launch/torchrun.sh there. With hardware.engine=accelerate, Accelerate's own configuration chooses what shards.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ -x .venv/bin/accelerate ] || {
  echo "error: no accelerate here; run '.venv/bin/pip install -e .[accelerate]'" >&2
  exit 3
}

config=${1:-configs/fashion_cnn.yaml}
procs=${2:-2}
shift $(($# < 2 ? $# : 2))

# What is not said here comes from `accelerate config`. OMP_NUM_THREADS only keeps it from warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/accelerate launch --multi_gpu --num_machines 1 --num_processes "$procs" -m distdl train "$config" "$@"
