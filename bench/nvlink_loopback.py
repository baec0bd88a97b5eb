"""Kernel times of the nvlink backend with all ranks on one GPU.

What one GPU can tell: how long each kernel takes when the link is no limit. Nothing here is a wire
speed. Every kernel of the call is listed; notify includes the exchange between the ranks, which is
between streams of one GPU here. L2 is flushed before each round, all ranks start at one event.

    python bench/nvlink_loopback.py COMMIT >> bench/results/nvlink_loopback.jsonl
"""

from __future__ import annotations

import json
import os
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

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.cluster = Cluster(1, NUM_RANKS, device="cuda")
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
            name = event.name.replace("ep::kernels::(anonymous namespace)::", "")
            if event.name != name:
                kernels[name.removeprefix("void ").partition("(ep::")[0]].append(event.device_time)
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


def few_tokens() -> None:
    bench = Bench(128)
    recv = bench.round(bench.dispatch(sync=False))
    y = [b.empty(r.x.shape, r.x.dtype) for b, r in zip(bench.buffers, recv, strict=True)]
    bench.measure("dispatch bf16 static", bench.dispatch(sync=False, num_sms=32), 32)
    combine = lambda r: bench.buffers[r].combine(y[r], recv[r].handle, num_sms=32)  # noqa: E731
    bench.measure("combine bf16 from the arena", combine, 32)
    bench.close()


if __name__ == "__main__":
    many_tokens()
    few_tokens()
