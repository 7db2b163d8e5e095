#!/bin/bash
# One of the model scripts on several machines, which meet by torchrun's rendezvous. The same line on each of them:
#
#   NUM_NODES=2 RDZV_ENDPOINT=node0:29400 bash examples/multi_node.sh examples/llama3.2_3b.sh [flags]
#
# RDZV_ENDPOINT names one of the machines and a free port there; RDZV_ID tells two runs on one endpoint apart. CHECKPOINT,
# DATA_PATH and RUN lie on storage that all of them see. TP stays within a machine: it divides GPUS_PER_NODE. Machines may
# come in any order; NCCL_SOCKET_IFNAME chooses the network interface where there are several.
set -euo pipefail

: "${NUM_NODES:?how many machines take part}"
: "${RDZV_ENDPOINT:?host:port of one of the machines, the same everywhere}"
if (($# == 0)); then
    echo "error: expected the script to run: bash $0 examples/llama3.2_3b.sh [flags]" >&2
    exit 2
fi
if ((${GPUS_PER_NODE:-8} % ${TP:-1})); then
    echo "error: TP=$TP does not divide GPUS_PER_NODE=${GPUS_PER_NODE:-8}: a layer would be shared between machines" >&2
    exit 2
fi

export NUM_NODES RDZV_ENDPOINT
script=$1
shift
exec bash "$script" "$@"
