"""What a differentiable call costs above the native call in it: host time on one rank.

    python bench/autograd_overhead.py [--json bench/results/cpu_autograd_overhead.jsonl]

One rank, so that nobody is waited for; rows are small, so that little is copied. Each number is the
least of many short runs, microseconds per call: other programs on the machine can only add to it.
`native` is the call of the buffer, `plain` that of ep_comm.autograd on tensors without gradients,
`recorded` on tensors with them, `step` recorded and its backward, which is the other call again.
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

from ep_comm import Buffer, StoreGroup
from ep_comm.autograd import combine, dispatch
from ep_comm.bench.machine import facts

NUM_EXPERTS, NUM_TOPK, HIDDEN, NUM_TOKENS = 16, 8, 256, 16


def least_us(call: Callable[[], Any], runs: int, calls: int = 20) -> float:
    """Time of a call in the fastest run."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return round(min(times) * 1e6, 1)


def cases(buffer: Buffer) -> dict[str, dict[str, Callable[[], Any]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    idx = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).argsort(1)[:, :NUM_TOPK]
    idx, weights = idx.contiguous(), torch.rand(NUM_TOKENS, NUM_TOPK, generator=generator)
    received = buffer.dispatch(x, idx, weights)
    handle, y = received.handle, received.x.clone()
    xs, ws, ys = (t.clone().requires_grad_() for t in (x, weights, y))
    rows, home = torch.ones_like(y), torch.ones_like(x)

    def dispatch_step() -> Any:
        return torch.autograd.grad(dispatch(buffer, xs, idx, ws).x, xs, rows)

    def combine_step() -> Any:
        return torch.autograd.grad(combine(buffer, ys, handle), ys, home)

    return {
        "dispatch": {
            "native": lambda: buffer.dispatch(x, idx, weights),
            "plain": lambda: dispatch(buffer, x, idx, weights),
            "recorded": lambda: dispatch(buffer, xs, idx, ws),
            "step": dispatch_step,
        },
        "combine": {
            "native": lambda: buffer.combine(y, handle),
            "plain": lambda: combine(buffer, y, handle),
            "recorded": lambda: combine(buffer, ys, handle),
            "step": combine_step,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    same = {
        "case": "autograd_overhead",
        "ranks": 1,
        "tokens": NUM_TOKENS,
        "topk": NUM_TOPK,
        "experts": NUM_EXPERTS,
        "hidden": HIDDEN,
        "runs": options.runs,
        "machine": facts(),
    }
    lines = []
    group = StoreGroup(dist.HashStore(), 0, 1, "overhead")
    with Buffer(
        group, num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, hidden=HIDDEN, max_tokens=NUM_TOKENS,
        device="cpu",
    ) as buffer:  # fmt: skip
        for op, calls in cases(buffer).items():
            times = {name: least_us(call, options.runs) for name, call in calls.items()}
            print(f"{op:9s}", ", ".join(f"{name} {us:.1f} us" for name, us in times.items()))
            lines.append(json.dumps({"op": op, "time_us": times, **same}))
    if options.json:
        options.json.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
