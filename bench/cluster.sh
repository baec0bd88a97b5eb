#!/usr/bin/env bash
# Checks and times the hybrid backend on a cluster. On every host:
#
#   bench/cluster.sh RENDEZVOUS_HOST NUM_NODES [RANKS_PER_HOST] >> results.jsonl
#
# First all ranks compare every kind of call with the reference, bit for bit; then calls are timed, bytes
# over rails and over NVLink apart. Variables of NVSHMEM: README, "Clusters".
set -euo pipefail
host=${1:?rendezvous host} nodes=${2:?number of nodes} ranks=${3:-8}
cd "$(dirname "$0")/.."
run() {
    torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --rdzv-backend c10d \
        --rdzv-endpoint "$host:29500" --rdzv-id "$1" "${@:2}"
}
run checks tests/hybrid_ranks.py >&2
run times bench/hybrid_gpus.py "$(git rev-parse --short HEAD)" --fp8
