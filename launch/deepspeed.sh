#!/usr/bin/env bash
# The same run under DeepSpeed's launcher: it starts the processes, and each is `distdl train`.
#
#   bash launch/deepspeed.sh [CONFIG] [PROCS] [KEY=VALUE ...]     e.g. configs/fashion_cnn.yaml 4 hardware.engine=zero2
#
# The launcher and the engine are independent: any engine runs under any launcher. Its hostfile is also that of
# `distdl launch --on ssh` (docs/several-nodes.md).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ -x .venv/bin/deepspeed ] || {
  echo "error: no deepspeed here; run '.venv/bin/pip install -e .[deepspeed]'" >&2
  exit 3
}

config=${1:-configs/fashion_cnn.yaml}
procs=${2:-2}
shift $(($# < 2 ? $# : 2))

export PATH="$root/.venv/bin:$PATH"
exec deepspeed --num_gpus "$procs" --module distdl train "$config" "$@"
