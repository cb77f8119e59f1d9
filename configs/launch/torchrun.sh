#!/usr/bin/env bash
# Trains on the GPUs of one node or of several. What follows the configuration goes to train.py as it is.
#
#   configs/launch/torchrun.sh configs/image_7b.yaml
#   configs/launch/torchrun.sh configs/image_7b.yaml stages.align.steps=20 --stage align
#   configs/launch/torchrun.sh configs/image_7b.yaml --preflight
#
# On several nodes, the same line on each of them, with its number:
#
#   NODES=4 NODE_RANK=0 MASTER_ADDR=node-0 configs/launch/torchrun.sh configs/image_7b.yaml
#
# PROCESSES: ranks of a node (default: its number of GPUs). MASTER_PORT: default 29500. PYTHON: default python.
#
# SIGTERM to torchrun reaches every rank: the step in flight is finished and saved, for up to TIMEOUT seconds. The same
# command continues.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 CONFIG [overrides and options of train.py]" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
nodes=${NODES:-1}

options=(--nproc-per-node="${PROCESSES:-gpu}" --shutdown-timeout="${TIMEOUT:-600}")
if [ "$nodes" -eq 1 ]; then
    options+=(--standalone)
else
    : "${NODE_RANK:?the number of this node, from 0}" "${MASTER_ADDR:?the address of node 0}"
    options+=(--nnodes="$nodes" --node-rank="$NODE_RANK")
    options+=(--master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
fi
exec "${PYTHON:-python}" -m torch.distributed.run "${options[@]}" "$root/train.py" "$@"
