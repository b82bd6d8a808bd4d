#!/usr/bin/env bash
# The same run under torchrun: it starts the processes, and each of them is `distdl train`.
#
#   bash launch/torchrun.sh [CONFIG] [PROCS] [KEY=VALUE ...]     e.g. configs/fashion_cnn.yaml 4 train.epochs=2
#
# `distdl launch CONFIG --procs N` does this and more: one log file a rank, restarts from the last checkpoint,
# and a stop that leaves as 75. Under torchrun a stop leaves as 0 (docs/decisions/0004-exit-codes-under-torchrun.md)
# and a failed rank ends the run unless you add --max-restarts; started again, it goes on from the last
# checkpoint.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ -x .venv/bin/torchrun ] || { echo "error: no .venv here; run 'bash launch/quickstart.sh' first" >&2; exit 3; }

config=${1:-configs/fashion_cnn.yaml}
procs=${2:-2}
shift $(($# < 2 ? $# : 2))

# --standalone: one machine, a free port. torchrun sets RANK, WORLD_SIZE and MASTER_ADDR; distdl reads them.
# OMP_NUM_THREADS only keeps torchrun from warning; the plan decides how many threads a process uses.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/torchrun --standalone --nproc-per-node "$procs" -m distdl train "$config" "$@"
