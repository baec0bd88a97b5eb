#!/usr/bin/env bash
# What the GPUs of one node show in one go of under ten minutes: build, tests on all GPUs, benches, figures.
#
#   bench/sweep_node.sh [FOLDER]      all GPUs there are; default folder bench/results/node
#   PARTS="build tests stress mps throughput decode overlap hybrid figures"  which, in this order
#   LIMIT=570  seconds for all of it; a part gets what is left, and its own bound
#   TOKENS=4096,8192 DTYPE=bf16,fp8 SMS=8,12,16,20,24 ROUTING=uniform,zipf,onehot  of throughput
#   MPS_RANKS=8  processes that share the GPUs
#
# FOLDER: summary.txt, a log a part, and JSON lines as bench/README.md describes them. Exits with 1 when a
# part failed or found no time.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-bench/results/node}
PARTS=${PARTS:-build tests stress mps throughput decode overlap hybrid figures}
LIMIT=${LIMIT:-570} STRESS=${STRESS:-25}
TOKENS=${TOKENS:-4096,8192} DTYPE=${DTYPE:-bf16,fp8} SMS=${SMS:-8,12,16,20,24}
ROUTING=${ROUTING:-uniform,zipf,onehot} MPS_RANKS=${MPS_RANKS:-8} PYTHON=${PYTHON:-python3}
GPUS=$(nvidia-smi -L | grep -c '^GPU')
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2> /dev/null || true)}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
: > "$OUT/summary.txt"
SECONDS=0 failed=0

wants() { [[ " $PARTS " == *" $1 "* ]]; }
# part NAME BOUND OUTPUT COMMAND...: standard output goes to OUTPUT, the rest to a log.
part() {
    local name=$1 bound=$2 output=$3 left=$((LIMIT - SECONDS)) begun=$SECONDS rc
    shift 3
    [ $left -lt "$bound" ] && bound=$left
    if [ "$bound" -lt 5 ]; then
        echo "$name: no time left" | tee -a "$OUT/summary.txt"
        failed=1
        return
    fi
    timeout -k 5 "$bound" "$@" >> "$output" 2>> "$OUT/$name.log" < /dev/null
    rc=$?
    [ $rc -eq 0 ] || failed=1
    echo "$name: rc $rc, $((SECONDS - begun)) s, at $SECONDS s" | tee -a "$OUT/summary.txt"
}
ranks() { "$PYTHON" -m torch.distributed.run --nproc-per-node "$GPUS" "$@"; }
export -f ranks
export GPUS PYTHON

echo "$GPUS GPUs, commit ${COMMIT:-unknown}: $(nvidia-smi --query-gpu=name --format=csv,noheader | sort -u)" |
    tee -a "$OUT/summary.txt"
wants build && part build 240 "$OUT/build.log" "$PYTHON" setup.py --quiet build_ext --inplace
wants tests && part tests 240 "$OUT/tests.log" "$PYTHON" -m pytest -q --tb=short -o timeout=60 -m gpus
stress() {
    part "$1" $((STRESS + 40)) "$OUT/$1.log" "$PYTHON" tests/stress_nvlink.py --seconds "$STRESS" \
        --commit "$COMMIT" --json "$OUT/nvlink_stress.jsonl" "${@:2}"
}
wants stress && stress stress --ranks "$GPUS"
wants mps && stress mps --mps --ranks "$MPS_RANKS" --worlds small,many-experts,long-rows
bench() { part "$1" "$2" "$OUT/$3" bash -c 'ranks "$@"' ranks "bench/${@:4:1}" "$COMMIT" "${@:5}"; }
wants throughput && bench throughput 240 nvlink_gpus.jsonl nvlink_gpus.py --sweep --tokens "$TOKENS" \
    --dtype "$DTYPE" --sms "$SMS" --routing "$ROUTING"
wants decode && bench decode 120 nvlink_latency.jsonl nvlink_latency.py
wants overlap && bench overlap 60 nvlink_overlap.jsonl nvlink_overlap.py
if wants hybrid && [ "$GPUS" -gt 1 ]; then
    bench hybrid 90 hybrid_gpus.jsonl hybrid_gpus.py --ranks-per-node $((GPUS / 2))
fi
wants figures && part figures 60 "$OUT/figures.log" "$PYTHON" bench/plot.py sms latency --ranks "$GPUS" \
    --results "$OUT" --out "$OUT"
exit $failed
