#!/usr/bin/env bash
# The commands behind bench/results/cpu_*.jsonl and cpu_*.png, as they were run.
#
#   bench/run_cpu.sh            all of them, about ten minutes on two quiet cores
#   bench/run_cpu.sh ep4 ep2    those named
#
#   EP_COMM=...   the command to run, default: ep-comm of .venv, else of PATH
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${EP_COMM:-} ]]; then
    EP_COMM=ep-comm
    [[ -x .venv/bin/ep-comm ]] && EP_COMM=.venv/bin/ep-comm
fi
mkdir -p bench/results
chosen=("$@")

# measure NAME OPTIONS...: writes cpu_NAME.jsonl
measure() {
    local name=$1
    shift
    if ((${#chosen[@]})) && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
    echo "== $name, load $(cut -d' ' -f1 /proc/loadavg): ep-comm bench $*" >&2
    $EP_COMM bench "$@" --json "bench/results/cpu_$name.jsonl"
}

every=dispatch,dispatch_cached,combine,combine_tensor,pair

# The two cases the project has bounds for.
measure ep4 --ranks 4 --tokens 1024 --hidden 2048 --topk 8 --experts 64 --dtype bf16 \
    --ops $every --baseline gloo --iterations 50 --plot bench/results/cpu_ep4.png
measure ep2 --ranks 2 --tokens 4096 --hidden 7168 --topk 8 --experts 256 --dtype bf16 \
    --ops $every --baseline gloo --iterations 30 --plot bench/results/cpu_ep2.png

# The same with memory given back to the system after every call, torch's default on CPUs.
measure ep2_malloc --ranks 2 --tokens 4096 --hidden 7168 --topk 8 --experts 256 --dtype bf16 \
    --malloc default --baseline gloo --iterations 15

# Popular experts, and the worst case: all tokens of all ranks to one rank.
measure ep4_zipf --ranks 4 --tokens 1024 --hidden 2048 --topk 8 --experts 64 --routing zipf \
    --baseline gloo
measure ep4_onehot --ranks 4 --tokens 1024 --hidden 2048 --topk 8 --experts 64 --routing onehot \
    --baseline gloo

# Other layouts and FP8.
measure ep4_grouped --ranks 4 --tokens 1024 --hidden 2048 --topk 8 --experts 64 \
    --layout grouped --alignment 16 --baseline gloo
measure ep4_fp8 --ranks 4 --tokens 1024 --hidden 2048 --topk 8 --experts 64 \
    --quantize fp8 --baseline gloo
measure ep4_slab --ranks 4 --tokens 64 --hidden 2048 --topk 8 --experts 64 --layout slab --static \
    --baseline gloo

# From a few tokens to many, and the collective backend in between.
measure ep4_tokens --ranks 4 --tokens 16,64,256,1024,4096 --hidden 2048 --topk 8 --experts 64 \
    --baseline gloo --plot bench/results/cpu_ep4_tokens.png
measure ep4_collective --ranks 4 --tokens 1024 --hidden 2048 --topk 8 --experts 64 \
    --backend collective --baseline gloo
