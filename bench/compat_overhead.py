"""What a `deep_ep` call costs above the native call it becomes: host time on one rank.

    python bench/compat_overhead.py [--json bench/results/cpu_compat_overhead.jsonl]

One rank, so that nobody is waited for; rows are small, so that little is copied. `call_us` is the
time of a `deep_ep` call, `overhead_us` that outside the native call inside it. That call is asked
for a little more than a native user would ask (`origins=True`, order): `above_plain_us` is
`call_us` minus the time of the plain native call that follows. What calls return is freed between
the measurements. Operations are measured in turns, in many rounds, so that what else the machine
does meets all of them alike. p10, p50, p90, microseconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
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
        self._native, self._backend, self.inside_s = native, native._backend, 0.0
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


class Natives:
    """Puts the native buffer or its timed double under a `deep_ep.Buffer`."""

    routing: Any = None  # of a low-latency handle, which names the native buffer, too

    def __init__(self, buffer: deep_ep.Buffer, num_experts: int, hidden: int) -> None:
        device = torch.device("cpu")
        self._all, self._key = buffer.runtime._buffers, (hidden, num_experts, device)
        self.native = buffer.runtime.get(hidden, num_experts, device)
        self.timed = Timed(self.native)

    def use(self, native: Any) -> None:
        self._all[self._key] = self.routing.native = native


def calls(num_tokens: int) -> tuple[Natives, dict[str, tuple[Call, Call]]]:
    """The native buffers; by name, the call of `deep_ep` and the plain native one."""
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
    natives = Natives(buffer, NUM_EXPERTS, HIDDEN)
    native = natives.native
    slab = {"layout": "slab", "capacity": num_tokens}
    recv = native.dispatch(x, idx, weights)
    slabs = native.dispatch(x, idx, weights, **slab)
    out = buffer.dispatch(x, topk_idx=idx, topk_weights=weights, **layout)
    copies = tuple(t.clone() for t in out[4])
    sent = buffer.low_latency_dispatch(x, idx, num_tokens, NUM_EXPERTS, use_fp8=False)
    natives.routing = sent[2][0].ep_comm_routing
    return natives, {
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


@dataclass
class Times:
    """Microseconds of every iteration."""

    outside: list[float] = field(default_factory=list)
    above: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def spreads(self) -> dict[str, dict[str, float]]:
        return {
            "overhead_us": spread(self.outside),
            "above_plain_us": spread(self.above),
            "call_us": spread(self.whole),
        }


def measure(natives: Natives, adapter: Call, plain: Call, iterations: int, times: Times) -> None:
    """Add times of the two calls, in turns; the first tenth warms up."""
    timed, native = natives.timed, natives.native
    for i in range(-iterations // 10, iterations):
        timed.inside_s = 0.0
        natives.use(timed)
        kept, with_clock_s = clocked(adapter)
        inside_s = timed.inside_s
        timed.kept.clear()
        natives.use(native)
        kept, call_s = clocked(adapter)
        del kept
        kept, plain_s = clocked(plain)
        del kept
        if i >= 0:
            times.whole.append(call_s * 1e6)
            times.outside.append((with_clock_s - inside_s) * 1e6)
            times.above.append((call_s - plain_s) * 1e6)


def clocked(call: Call) -> tuple[Any, float]:
    """What it returns, and the seconds it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {name: round(ordered[int(len(ordered) * q)], 1) for name, q in at.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=3000, help="of each operation")
    parser.add_argument("--rounds", type=int, default=20, help="the iterations are spread over")
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
        "rounds": options.rounds,
        "machine": facts(),
    }
    natives, pairs = calls(options.tokens)
    times = {op: Times() for op in pairs}
    meter = LoadMeter()
    for _ in range(options.rounds):
        for op, pair in pairs.items():
            measure(natives, *pair, options.iterations // options.rounds, times[op])
    load = meter.read(meter.own_s())
    lines = []
    for op, found in times.items():
        spreads = found.spreads()
        shown = [
            f"{name.removesuffix('_us')} {at['p10']:6.1f} {at['p50']:6.1f}"
            for name, at in spreads.items()
        ]
        print(f"{op:26s} p10, p50 us: {', '.join(shown)}")
        lines.append(json.dumps({"op": op, **spreads, "load": load, **same}))
    if options.json:
        options.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
