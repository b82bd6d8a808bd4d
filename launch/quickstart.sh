#!/usr/bin/env bash
# Two cores and nothing installed: makes .venv, trains a CNN on real images with two processes (or with every
# GPU there is), evaluates it on the test images, and says how good it is and where everything lies.
#
#   bash launch/quickstart.sh [KEY=VALUE ...]      e.g. train.epochs=2
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/setup_env.sh
. "$here/launch/setup_env.sh"
setup_env ""

procs=2
gpus="$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)"
if [ "$gpus" -gt 0 ]; then
  procs=$((gpus < 8 ? gpus : 8)) # the recipe has 8 microbatches a step
fi
cd "$here"
exec .venv/bin/distdl launch configs/fashion_cnn.yaml --procs "$procs" "$@"
