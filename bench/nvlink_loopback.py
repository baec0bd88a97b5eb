"""Kernel times of the nvlink backend with all ranks on one GPU, and across nodes that it pretends.

What one GPU can tell: how long each kernel takes when the link is no limit. Nothing here is a wire
speed. Every kernel of the call is listed; notify includes the exchange between the ranks, which is
between streams of one GPU here. L2 is flushed before each round, all ranks start at one event.

    python bench/nvlink_loopback.py COMMIT >> bench/results/nvlink_loopback.jsonl
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # read when CUDA starts

import torch
from torch.profiler import ProfilerActivity, profile

from ep_comm import build_info
from ep_comm.testing import Cluster

NUM_RANKS, HIDDEN, NUM_TOPK, NUM_EXPERTS, ROUNDS = 2, 7168, 8, 256, 6
Work = Callable[[int], Any]


class Bench:
    """A cluster, its inputs, and rounds in which every rank does the same."""

    def __init__(self, tokens: int, num_nodes: int = 1) -> None:
        self.tokens = tokens
        self.cluster = Cluster(num_nodes, NUM_RANKS // num_nodes, device="cuda")
        self.buffers = self.cluster.make_buffers(
            num_experts=NUM_EXPERTS,
            num_topk=NUM_TOPK,
            hidden=HIDDEN,
            max_tokens=tokens,
            arena_bytes=4 << 30,
        )
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.first, *self.streams = (torch.cuda.Stream() for _ in range(NUM_RANKS + 1))
        torch.manual_seed(0)
        rows = [torch.randn(tokens, HIDDEN, device="cuda") for _ in range(NUM_RANKS)]
        self.x = [r.to(torch.bfloat16) for r in rows]
        self.x8 = [r.to(torch.float8_e4m3fn) for r in rows]
        self.scales = [torch.rand(tokens, HIDDEN // 128, device="cuda") for _ in rows]
        self.idx = [torch.rand(tokens, NUM_EXPERTS, device="cuda").topk(NUM_TOPK)[1] for _ in rows]
        self.weights = [torch.rand(tokens, NUM_TOPK, device="cuda") for _ in rows]
        torch.cuda.synchronize()

    def dispatch(self, **options: Any) -> Work:
        return lambda r: self.buffers[r].dispatch(
            self.x[r], self.idx[r], self.weights[r], **options
        )

    def dispatch_fp8(self, **options: Any) -> Work:
        return lambda r: self.buffers[r].dispatch(
            self.x8[r], self.idx[r], self.weights[r], scales=self.scales[r], **options
        )

    def round(self, work: Work) -> list[Any]:
        """Every rank on its stream, behind one event."""
        with torch.cuda.stream(self.first):
            self.flush.zero_()
            torch.cuda._sleep(4_000_000)  # until all ranks have queued
            go = self.first.record_event()

        def body(rank: int) -> Any:
            with torch.cuda.stream(self.streams[rank]):
                self.streams[rank].wait_event(go)
                result = work(rank)
            self.streams[rank].synchronize()
            return result

        return self.cluster.run(body)

    def measure(self, case: str, work: Work, num_sms: int) -> None:
        for _ in range(2):
            self.round(work)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(ROUNDS):
                self.round(work)
        kernels = defaultdict(list)
        for event in seen.events():
            name = event.name.replace("(anonymous namespace)::", "").removeprefix("void ")
            if name.startswith("ep::kernels::"):
                kernel = re.split(r"[<(]", name.removeprefix("ep::kernels::"))[0]
                kernels[kernel].append(event.device_time)
        for name, times in kernels.items():
            line = {
                "case": case,
                "kernel": name,
                "kernel_us": {
                    "p50": round(statistics.median(times), 1),
                    "min": round(min(times), 1),
                },
                "n": len(times),
                "sms": num_sms,
                "ranks": NUM_RANKS,
                "tokens": self.tokens,
                "gpu": torch.cuda.get_device_name(),
                "commit": sys.argv[1] if len(sys.argv) > 1 else "",
                "nvcc": build_info()["cuda"],
            }
            print(json.dumps(line), flush=True)

    def close(self) -> None:
        self.cluster.close()


def many_tokens() -> None:
    bench = Bench(4096)
    recv = bench.round(bench.dispatch())
    y = [b.empty(r.x.shape, r.x.dtype) for b, r in zip(bench.buffers, recv, strict=True)]
    for there, r in zip(y, recv, strict=True):
        there.copy_(r.x)
    plain = [r.x.clone() for r in recv]
    handles = [r.handle for r in recv]
    bench.measure("dispatch bf16", bench.dispatch(num_sms=15), 15)
    bench.measure("dispatch fp8 with scales", bench.dispatch_fp8(num_sms=15), 15)
    bench.measure("dispatch bf16 to fp8", bench.dispatch(num_sms=15, quantize="fp8"), 15)
    grouped = bench.dispatch(num_sms=15, layout="grouped", alignment=128)
    bench.measure("dispatch bf16 grouped", grouped, 15)
    for sms in (8, 20):
        from_arena = lambda r, n=sms: bench.buffers[r].combine(y[r], handles[r], num_sms=n)  # noqa: E731
        bench.measure("combine bf16 from the arena", from_arena, sms)
    from_tensor = lambda r: bench.buffers[r].combine(plain[r], handles[r], num_sms=20)  # noqa: E731
    bench.measure("combine bf16 from a tensor", from_tensor, 20)
    bench.close()


def few_tokens(tokens: int) -> None:
    bench = Bench(tokens)
    for sms in (8, 16, 32, 64):
        small_calls(bench, sms)
    bench.close()


def small_calls(bench: Bench, sms: int) -> None:
    room = NUM_RANKS * bench.tokens * NUM_TOPK * 4 // NUM_EXPERTS + 16  # as bench/nvlink_latency.py
    compact = bench.dispatch(sync=False, num_sms=sms)
    slab = bench.dispatch(sync=False, num_sms=sms, layout="slab", capacity=room, quantize="fp8")
    rows, slabs = bench.round(compact), bench.round(slab)
    y = [b.empty(r.x.shape, r.x.dtype) for b, r in zip(bench.buffers, rows, strict=True)]
    z = [torch.zeros(r.x.shape, dtype=torch.bfloat16, device="cuda") for r in slabs]
    weights = [r.topk_weights for r in slabs]

    def combine(r: int) -> Any:
        return bench.buffers[r].combine(y[r], rows[r].handle, num_sms=sms)

    def slabs_back(r: int, **options: Any) -> Any:
        return bench.buffers[r].combine(z[r], slabs[r].handle, num_sms=sms, **options)

    bench.measure("dispatch bf16 static", compact, sms)
    bench.measure("combine bf16 from the arena", combine, sms)
    bench.measure("dispatch bf16 to fp8 slabs", slab, sms)
    per_rank = lambda r: slabs_back(r, per_rank=True, row_weights=weights[r])  # noqa: E731
    bench.measure("combine of slabs per rank", per_rank, sms)
    unreduced = lambda r: slabs_back(r, weighted=True, order="topk")  # noqa: E731
    bench.measure("combine of slabs, unreduced", unreduced, sms)


def across_nodes() -> None:
    bench = Bench(4096, num_nodes=NUM_RANKS)
    for sms in (8, 12, 20):
        calls_across_nodes(bench, sms)
    bench.close()


def calls_across_nodes(bench: Bench, sms: int) -> None:
    dispatch = bench.dispatch(num_sms=sms)
    recv = bench.round(dispatch)
    y = [b.empty(r.x.shape, r.x.dtype) for b, r in zip(bench.buffers, recv, strict=True)]
    bench.measure("dispatch bf16 across nodes", dispatch, sms)
    combine = lambda r: bench.buffers[r].combine(y[r], recv[r].handle, num_sms=sms)  # noqa: E731
    bench.measure("combine bf16 across nodes", combine, sms)


if __name__ == "__main__":
    many_tokens()
    few_tokens(32)
    few_tokens(128)
    across_nodes()
