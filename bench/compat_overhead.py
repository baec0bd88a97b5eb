"""What a `deep_ep` call costs above the native call it becomes: host time on one rank.

    python bench/compat_overhead.py [--json bench/results/cpu_compat_overhead.jsonl]

One rank, so that nobody is waited for; rows are small, so that little is copied. `overhead_us` is
the time of a `deep_ep` call outside the native call inside it. That call is asked for a little more
than a native user would ask (`origins=True`, order): `above_plain_us` is the time of the `deep_ep`
call minus that of the plain native call that follows it. What native calls return is freed between
the measurements. p10, p50, p90, microseconds.
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


class Timed:
    """A native buffer that adds up the time spent in its operations."""

    def __init__(self, native: Any) -> None:
        self._native, self.inside_s = native, 0.0
        self.kept: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def dispatch(self, *args: Any, **options: Any) -> Any:
        return self._time(self._native.dispatch, args, options)

    def combine(self, *args: Any, **options: Any) -> Any:
        return self._time(self._native.combine, args, options)

    def _time(self, call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        start = time.perf_counter()
        result = call(*args, **options)
        self.kept.append(result)
        self.inside_s += time.perf_counter() - start
        return result


def calls(num_tokens: int) -> tuple[Timed, dict[str, tuple[Call, Call]]]:
    """The native buffer; by name, the call of `deep_ep` and the plain native one."""
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
    timed = Timed(native)
    buffer.runtime._buffers[(HIDDEN, NUM_EXPERTS, x.device)] = timed
    slab = {"layout": "slab", "capacity": num_tokens}
    recv = native.dispatch(x, idx, weights)
    slabs = native.dispatch(x, idx, weights, **slab)
    out = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout)
    copies = tuple(t.clone() for t in out[4])
    sent = buffer.low_latency_dispatch(x, idx, num_tokens, NUM_EXPERTS, use_fp8=False)
    return timed, {
        "dispatch": (
            lambda: buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout),
            lambda: native.dispatch(x, idx, weights),
        ),
        "dispatch_cached": (
            lambda: buffer.dispatch(x, handle=out[4]),
            lambda: native.dispatch(x, handle=recv.handle),
        ),
        "dispatch_cached_by_copies": (
            lambda: buffer.dispatch(x, handle=copies),
            lambda: native.dispatch(x, handle=recv.handle),
        ),
        "combine": (
            lambda: buffer.combine(out[0], out[4]),
            lambda: native.combine(recv.x, recv.handle),
        ),
        "combine_weights": (
            lambda: buffer.combine(out[0], out[4], topk_weights=out[2]),
            lambda: native.combine(recv.x, recv.handle, topk_weights=recv.topk_weights),
        ),
        "low_latency_dispatch": (
            lambda: buffer.low_latency_dispatch(x, idx, num_tokens, NUM_EXPERTS, use_fp8=False),
            lambda: native.dispatch(x, idx, weights, **slab),
        ),
        "low_latency_combine": (
            lambda: buffer.low_latency_combine(sent[0], idx, weights, sent[2]),
            lambda: native.combine(slabs.x, slabs.handle, weighted=True),
        ),
    }


def measure(timed: Timed, adapter: Call, plain: Call, iterations: int) -> dict[str, Any]:
    """Times of the two calls, in turns."""
    outside, above, whole = [], [], []
    for i in range(-iterations // 10, iterations):
        timed.inside_s = 0.0
        start = time.perf_counter()
        adapter()
        middle = time.perf_counter()
        timed.kept.clear()
        again = time.perf_counter()
        timed.kept.append(plain())
        end = time.perf_counter()
        timed.kept.clear()
        if i >= 0:
            whole.append((middle - start) * 1e6)
            outside.append((middle - start - timed.inside_s) * 1e6)
            above.append((middle - start - (end - again)) * 1e6)
    return {
        "overhead_us": spread(outside),
        "above_plain_us": spread(above),
        "call_us": spread(whole),
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
    timed, pairs = calls(options.tokens)
    for op, pair in pairs.items():
        meter = LoadMeter()
        found = measure(timed, *pair, options.iterations)
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
