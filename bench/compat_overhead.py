"""What a `deep_ep` call costs above the native call it becomes: host time on one rank.

    python bench/compat_overhead.py [--json bench/results/cpu_compat_overhead.jsonl]

One rank, so that nobody is waited for; rows are small, so that little is copied. In each iteration
the adapter and the native call take turns. `overhead_us` is the adapter's time minus that of the
native call with the options the adapter needs (`origins=True`, order, weights); `above_plain_us` is
measured against the call a native user would write. p10, p50, p90 of the differences between
neighbours, microseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ep_comm import StoreGroup
from ep_comm.bench.machine import LoadMeter, facts
from ep_comm.compat import deep_ep

NUM_EXPERTS, NUM_TOPK, HIDDEN = 16, 8, 128

Call = Callable[[], Any]


def calls(num_tokens: int) -> dict[str, tuple[Call, Call, Call]]:
    """By name: the adapter's call, the same natively, and the plain native one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, HIDDEN, generator=generator).bfloat16()
    order = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)
    idx, weights = order[:, :NUM_TOPK].contiguous(), torch.rand(num_tokens, NUM_TOPK)
    buffer = deep_ep.Buffer(StoreGroup(dist.HashStore(), 0, 1, "overhead"))
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, NUM_EXPERTS)
    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }
    native = buffer.runtime.get(HIDDEN, NUM_EXPERTS, x.device)
    slab = {"layout": "slab", "capacity": num_tokens}
    recv = native.dispatch(x, idx, weights)
    slabs = native.dispatch(x, idx, weights, **slab)
    out = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout)
    sent = buffer.low_latency_dispatch(x, idx, num_tokens, NUM_EXPERTS, use_fp8=False)

    def hooked() -> None:
        hook = buffer.low_latency_dispatch(
            x, idx, num_tokens, NUM_EXPERTS, use_fp8=False, return_recv_hook=True
        )[4]
        assert hook is not None
        hook()

    return {
        "dispatch": (
            lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout),
            lambda: native.dispatch(x, idx, weights, origins=True),
            lambda: native.dispatch(x, idx, weights),
        ),
        "dispatch_cached": (
            lambda: buffer.dispatch(x, handle=out[4]),
            lambda: native.dispatch(x, handle=recv.handle),
            lambda: native.dispatch(x, handle=recv.handle),
        ),
        "combine": (
            lambda: buffer.combine(out[0], out[4]),
            lambda: native.combine(recv.x, recv.handle),
            lambda: native.combine(recv.x, recv.handle),
        ),
        "combine_weights": (
            lambda: buffer.combine(out[0], out[4], topk_weights=out[2]),
            lambda: native.combine(
                recv.x, recv.handle, topk_weights=recv.topk_weights, sum_weights=True
            ),
            lambda: native.combine(recv.x, recv.handle, topk_weights=recv.topk_weights),
        ),
        "low_latency_dispatch": (
            lambda: buffer.low_latency_dispatch(x, idx, num_tokens, NUM_EXPERTS, use_fp8=False),
            lambda: native.dispatch(x, idx, origins=True, **slab),
            lambda: native.dispatch(x, idx, weights, **slab),
        ),
        "low_latency_dispatch_hook": (
            hooked,
            lambda: native.dispatch(x, idx, origins=True, wait=False, **slab).wait(),
            lambda: native.dispatch(x, idx, weights, wait=False, **slab).wait(),
        ),
        "low_latency_combine": (
            lambda: buffer.low_latency_combine(sent[0], idx, weights, sent[2]),
            lambda: native.combine(slabs.x, slabs.handle, weighted=True, order="topk"),
            lambda: native.combine(slabs.x, slabs.handle, weighted=True),
        ),
    }


def measure(three: tuple[Call, Call, Call], iterations: int) -> dict[str, Any]:
    """Times of the three calls, in turns."""
    times: list[list[float]] = [[], [], []]
    for i in range(-iterations // 10, iterations):
        for call, kept in zip(three, times, strict=True):
            start = time.perf_counter()
            call()
            if i >= 0:
                kept.append((time.perf_counter() - start) * 1e6)
    adapter, same, plain = times
    return {
        "overhead_us": spread([a - b for a, b in zip(adapter, same, strict=True)]),
        "above_plain_us": spread([a - b for a, b in zip(adapter, plain, strict=True)]),
        "call_us": spread(adapter),
    }


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {name: round(ordered[int(len(ordered) * q)], 1) for name, q in at.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    same = {
        "case": "compat_overhead",
        "ranks": 1,
        "tokens": options.tokens,
        "topk": NUM_TOPK,
        "experts": NUM_EXPERTS,
        "hidden": HIDDEN,
        "iterations": options.iterations,
        "machine": facts(),
    }
    lines = []
    for op, three in calls(options.tokens).items():
        meter = LoadMeter()
        found = measure(three, options.iterations)
        load = meter.read(meter.own_s())
        overhead, plain = found["overhead_us"], found["above_plain_us"]
        print(
            f"{op:26s} overhead p50 {overhead['p50']:6.1f} us, above plain {plain['p50']:6.1f} us"
        )
        lines.append(json.dumps({"op": op, **found, "load": load, **same}))
    if options.json:
        options.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
