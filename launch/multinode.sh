#!/usr/bin/env bash
# The same run over several machines under torchrun. Type it on each of them, all alike:
#
#   bash launch/multinode.sh HOST:PORT NODES [CONFIG] [PROCS] [KEY=VALUE ...]
#   e.g. bash launch/multinode.sh node01:29400 2 configs/fashion_cnn.yaml 4
#
# HOST is one of the machines, by a name or an address that all of them reach; it keeps the store where they meet
# (c10d rendezvous). PORT is any that is free there. They need the same checkout and a run directory that all see.
#
# `distdl launch --nodes N --node-rank R --rendezvous HOST:PORT` does this and more: it restarts from the last
# checkpoint, names the node that failed, and leaves a stop as 75; `--on ssh --hostfile FILE` types it for you
# (docs/several-nodes.md).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
[ -x .venv/bin/torchrun ] || { echo "error: no .venv here; run 'bash launch/quickstart.sh' first" >&2; exit 3; }
[ $# -ge 2 ] || { echo "usage: bash launch/multinode.sh HOST:PORT NODES [CONFIG] [PROCS] [KEY=VALUE ...]" >&2; exit 2; }

rendezvous=$1
nodes=$2
config=${3:-configs/fashion_cnn.yaml}
procs=${4:-2}
shift $(($# < 4 ? $# : 4))

# Machines with several networks: name the one between them, e.g. GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1.
# The id keeps two runs apart that meet at one address; it has to be the same on all machines, and torchrun makes a
# folder of that name.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/torchrun --nnodes "$nodes" --nproc-per-node "$procs" \
  --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "distdl-${config//[^A-Za-z0-9._-]/-}" \
  -m distdl train "$config" "$@"
