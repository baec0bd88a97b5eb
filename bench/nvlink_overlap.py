"""Decode beside a matrix product: ten dispatches and combines of a small batch on few SMs, while
the same GPU multiplies two square matrices on another stream.

    torchrun --nproc-per-node 2 bench/nvlink_overlap.py COMMIT >> bench/results/nvlink_overlap.jsonl

The pairs are a captured graph on a stream of high priority. The product leaves them `--sms` SMs
(`torch._C._set_sm_carveout_experimental`), as an engine that overlaps two micro-batches does. Each
alone, then both at once; the slower rank of each round counts. `ratio`: both, over the longer one
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from nvlink_gpus import STANDARD, Bench

PAIRS, ROUNDS = 10, 20
Work = Callable[[], Any]


class Overlap(Bench):
    """A graph of pairs, and a product."""

    def __init__(self, tokens: int, sms: int, size: int) -> None:
        super().__init__(replace(STANDARD, tokens=tokens, layout="slab", quantize="fp8"))
        self.sms, self.size = sms, size
        self.comm: Any = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
        self.compute: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.a, self.b = (
            torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        self.bias = torch.zeros(size, device="cuda", dtype=torch.bfloat16)
        self.c = torch.empty_like(self.a)
        slab = self.slab()
        self.y = torch.zeros(slab.x.shape, dtype=torch.bfloat16, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.comm):
            self.pair()
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.graph(self.graph, stream=self.comm):
            for _ in range(PAIRS):
                self.pair()

    def slab(self) -> Any:
        return self.dispatch(layout="slab", quantize="fp8", sync=False, num_sms=self.sms)

    def pair(self) -> None:
        slab = self.slab()
        self.buffer.combine(
            self.y, slab.handle, per_rank=True, row_weights=slab.topk_weights, num_sms=self.sms
        )

    def pairs(self) -> None:
        with torch.cuda.stream(self.comm):
            self.graph.replay()

    def product(self) -> None:
        with torch.cuda.stream(self.compute):
            torch.addmm(self.bias, self.a, self.b, out=self.c)

    def both(self) -> None:
        self.pairs()
        self.product()

    def time(self, work: Work) -> float:
        """Microseconds from a common start to the end of both streams; the median round."""
        times = []
        for _ in range(ROUNDS + 3):
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)
            dist.all_reduce(self.one)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.comm.wait_event(start)
            self.compute.wait_event(start)
            work()
            here = torch.cuda.current_stream()
            here.wait_stream(self.comm)
            here.wait_stream(self.compute)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        samples = torch.tensor(times[3:], device="cuda")
        dist.all_reduce(samples, dist.ReduceOp.MAX)
        return statistics.median(samples.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", nargs="?", default="")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--sms", type=int, default=8)
    parser.add_argument("--size", type=int, default=8192)
    a = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    bench = Overlap(a.tokens, a.sms, a.size)
    torch._C._set_sm_carveout_experimental(a.sms)
    product, pairs, both = (bench.time(w) for w in (bench.product, bench.pairs, bench.both))
    torch._C._set_sm_carveout_experimental(None)
    whole = bench.time(bench.product)
    bench.buffer.check()
    if bench.rank == 0:
        line = {
            "case": bench.case.name,
            "op": f"{PAIRS} pairs beside a {a.size}^3 product",
            "sms": a.sms,
            "pairs_us": round(pairs, 1),
            "product_us": round(product, 1),
            "product_on_all_sms_us": round(whole, 1),
            "both_us": round(both, 1),
            "ratio": round(both / max(pairs, product), 3),
            "gpu": torch.cuda.get_device_name(),
            "commit": a.commit,
        }
        print(json.dumps(line), flush=True)
    bench.buffer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
